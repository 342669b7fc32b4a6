"""How MMMU's authors read an answer (MMMU-Benchmark/MMMU bb0b95a, eval_utils.py), in words of our own.

The rule is kept as it is, with what is odd in it: a letter in an open answer counts where it stands beside a space, and
sentences are never told apart, because the text is put in lower case before capitals are looked for.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vapr.evaluation.benchmarks.benchmark import Reading

SEED = 0
"""Of the draws where no option can be read. Of the two for LLaVA-1.5-13B's published answers one is right, as with the
authors' own; the expectation that is given beside the score owes nothing to the seed."""

_BEFORE_KEY = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


@dataclass(frozen=True, slots=True)
class OpenReading(Reading):
    """An open answer as the authors read it: all that it may be saying, of which one right part is enough."""

    candidates: tuple[str, ...] = ()


def read_choice(text: str, letters: str, options: Sequence[str], id: str) -> Reading:
    """Read the letter that stands last: in brackets, else between spaces; else the option whose text does.

    Texts of options count in answers of more than five words. Where nothing is found, the rule draws an option: here
    with a seed for each question, so that no other answer changes it.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    ways = [
        [text.rfind(f"({letter})") for letter in letters],
        [text.rfind(f" {letter} ") for letter in letters],
    ]
    if len(text.split()) > 5:
        ways.append([text.lower().rfind(option.lower()) for option in options])
    for places in ways:
        if max(places, default=-1) >= 0:
            return Reading(letters[places.index(max(places))])
    return Reading(random.Random(f"{SEED} {id}").choice(letters), guessed=True)


def read_open(text: str) -> OpenReading:
    """Read what follows the last "is", "so", "answer" and the like in each line, or all of it, and numbers therein."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    keys = []
    for number, line in enumerate(lines, start=1):
        marks = (*_BEFORE_KEY, "=") if number == len(lines) else _BEFORE_KEY
        # An empty end is forgotten where a later mark is found; the shortest end counts.
        shortest = ""
        for mark in marks:
            if mark in line:
                end = line.rpartition(mark)[2].strip()
                shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [text]
    numbers = [found for key in keys for pattern in _NUMBERS for found in pattern.findall(key)]
    return OpenReading(" | ".join(keys) or None, candidates=(*keys, *numbers))


def open_is_right(reading: OpenReading, truths: Sequence[str]) -> bool:
    """Return whether a number equals a truth to two decimals, or a text holds one in it."""
    wanted = [form for truth in truths for form in _forms(truth)]
    for said in (form for candidate in reading.candidates for form in _forms(candidate)):
        if isinstance(said, float) and said in wanted:
            return True
        if isinstance(said, str) and any(isinstance(one, str) and one in said for one in wanted):
            return True
    return False


def _forms(text: str) -> list[float | str]:
    """Return a number to two decimals, or a text in lower case; a single letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
