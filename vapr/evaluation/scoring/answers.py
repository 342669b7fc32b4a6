"""Read what an answer says: yes or no, or the letter of an option, under a named policy.

``strict`` reads an answer that begins with what it says; ``last-answer`` drops reasoning and reads the answer after it,
wherever that stands. Neither guesses: an answer that says nothing of the kind is None, *unparsed*. What a benchmark's
authors do is the policy ``official``, in the benchmark's own file.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal

from vapr.text import polarity, sentences

Policy = Literal["official", "strict", "last-answer"]
POLICIES: tuple[Policy, ...] = ("official", "strict", "last-answer")

_OPEN = r"<(?:think|thinking|thought|reasoning|reason|analysis)>|◁think▷|\[THINK\]"
_CLOSE = r"</(?:think|thinking|thought|reasoning|reason|analysis)>|◁/think▷|\[/THINK\]"
_REASONING = re.compile(rf"(?:{_OPEN}).*?(?:{_CLOSE})", re.DOTALL | re.IGNORECASE)
_FIRST_OPEN = re.compile(_OPEN, re.IGNORECASE)
_LAST_CLOSE = re.compile(rf".*(?:{_CLOSE})", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}")
_MARKED = re.compile(
    r"\b(?:answer|conclusion)\b[\s*_]*(?:to (?:the|this|your) question)?[\s*_]*"
    r"(?:(?:is|would be|should be)\b|[:：=])[\s:：]*",
    re.IGNORECASE,
)
_SO = re.compile(r"(?:(?:so|thus|therefore|hence|in conclusion|overall|finally|in short)[\s,:]+)+", re.IGNORECASE)
_BOTH = re.compile(r"\W*yes\s*(?:/|and|or|\|)\s*no\b|\W*no\s*(?:/|and|or|\|)\s*yes\b", re.IGNORECASE)
_ENDING = re.compile(r"(?:[,;:—–-]|\b(?:so|is|be|say))\s*[\"'*_(]*(yes|no)[\"'*_)]*[.!]*\s*$", re.IGNORECASE)

_LEAD = re.compile(
    r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)(?:\s+is)?[\s:：]*", re.IGNORECASE
)
_BEFORE_LETTER = "[\\s\"'“‘*_`#>(\\[{$]*"
_AFTER_LETTER = "[\\s\"'”’*_`.)\\]}:：,;$]*"


def after_reasoning(text: str) -> str:
    """Return what a reasoning model says after its reasoning; empty if it never got there.

    Blocks such as ``<think>...</think>`` are dropped. Where only the end of one stands, because the chat template
    opened it, all before it is dropped; where one never ends, all after its beginning.
    """
    text = _LAST_CLOSE.sub("", _REASONING.sub("", text), count=1)
    opened = _FIRST_OPEN.search(text)
    return (text[: opened.start()] if opened else text).strip()


def final_answers(text: str) -> list[str]:
    """Return the places of a text where its final answer may stand, the most telling first.

    These are an ``<answer>`` block, a ``\\boxed{}``, what follows the last "answer is" or "Answer:", and the sentences
    from the last to the first.
    """
    text = after_reasoning(text)
    places = [found[-1] for pattern in (_TAGGED, _BOXED) if (found := pattern.findall(text))]
    if marks := list(_MARKED.finditer(text)):
        places.append(text[marks[-1].end() :])
    return [*places, *reversed(sentences(text))]


def yes_or_no(text: str, policy: Policy) -> str | None:
    """Read ``"yes"`` or ``"no"``; None if the answer says neither.

    An answer says so that begins with the word ("Yes", "No.", "Yes, there is a dog"). Under ``last-answer`` the final
    answer or the last sentence that says so counts, also where it ends with the word ("so the answer is no").
    """
    if policy != "last-answer":
        return _polarity(text)
    for place in final_answers(text):
        place = _SO.sub("", place.strip(), count=1)
        if (found := _polarity(place)) is not None:
            return found
        if ending := _ENDING.search(place):
            return ending[1].lower()
    return None


def _polarity(text: str) -> str | None:
    text = _LEAD.sub("", text.lstrip(), count=1) if _LEAD.match(text.lstrip()) else text
    return None if _BOTH.match(text) else polarity(text)


def letter(text: str, options: Sequence[str], policy: Policy) -> str | None:
    """Read the letter of an option, ``"A"`` for the first; None if the answer names none, or several.

    An answer names an option that begins with its letter ("B", "(B)", "B. red", "The answer is B") or is its text.
    "A" is an article unless a mark, the end, or the option's text follows. Under ``last-answer`` the final answer or
    the last sentence that names one counts.

    Args:
        text: the answer.
        options: texts of the options; empty if only the letters are known.
        policy: ``last-answer``, or anything else for ``strict``.
    """
    letters = string.ascii_uppercase[: len(options) or 26]
    if policy != "last-answer":
        return _letter(text, letters, options)
    for place in final_answers(text):
        place = _SO.sub("", place.strip(), count=1)
        if (found := _letter(place, letters, options)) is not None:
            return found
        bracketed = re.findall(r"\(([A-Z])\)", place)
        if len(set(bracketed)) == 1 and bracketed[0] in letters:
            return str(bracketed[0])
    return None


def _letter(text: str, letters: str, options: Sequence[str]) -> str | None:
    text = _LEAD.sub("", text.strip().lstrip("*_ "), count=1) if _LEAD.match(text.strip().lstrip("*_ ")) else text
    said = _plain(text)
    same = [letter for letter, option in zip(letters, options, strict=False) if _plain(option) == said]
    if len(same) == 1:
        return same[0]
    found = re.match(rf"{_BEFORE_LETTER}([A-Za-z])(?![A-Za-z0-9'’])({_AFTER_LETTER})(.*)", text, re.DOTALL)
    if found is None or found[1].upper() not in letters:
        return None
    chosen, after, rest = found[1].upper(), found[2], found[3]
    if not rest.strip():
        return chosen
    if re.match(r"(?:or|and|/|&)\s*\(?[A-Za-z]\b(?!['’])", rest.strip(), re.IGNORECASE) and len(rest) < 12:
        return None  # "A or B"
    if options and _plain(rest).startswith(_plain(options[letters.index(chosen)])):
        return chosen
    # "A dog" and "I see" are words; "A. The dog" and "(A) The dog" are letters.
    return chosen if found[1].isupper() and after.strip() else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" \"'“”‘’*_`.,;:()[]")
