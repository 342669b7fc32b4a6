"""What a benchmark is: its questions, how an answer is read, when it is right, and its own figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question
from vapr.evaluation.scoring.review import Review
from vapr.evaluation.scoring.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer was read as: None if it could not be read.

    ``guessed`` marks a value that the answer does not state: what an official rule falls back on. It counts in the
    official score and is unparsed all the same.
    """

    value: str | None
    guessed: bool = False

    @property
    def unparsed(self) -> bool:
        return self.value is None or self.guessed


@dataclass(frozen=True, slots=True)
class Row:
    """A scored answer."""

    prediction: Prediction
    gold: str | None
    reading: Reading
    right: float  # 1 or 0, or a chance between where a rule draws at random


@dataclass(frozen=True, slots=True)
class Results:
    """Answers in a layout of the benchmark's authors.

    ``asked`` are the questions that were put to the model, where that is a known part of the set; None for all.
    """

    predictions: Sequence[Prediction]
    asked: Sequence[Question] | None = None
    notes: Sequence[str] = ()


NEEDS_A_JUDGE = (
    "only a judge can score it; name an OpenAI-compatible server with --judge http://HOST:PORT/v1 --judge-model NAME, "
    "or stored reviews with --reviews FILE"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How a judge is asked about an answer, and what its verdicts come to.

    Attributes:
        prompt: what the judge is asked about an answer.
        read_review: the scores that a review states; None if it states none.
        figures: of the predictions whose reviews could be read, their verdicts and the seed of the bootstrap. A figure
            ``accuracy`` becomes the common one.
        no_reference: why questions without a reference answer cannot be judged, and the way out; empty if they can.
        read_reviews: reads reviews in a layout of the authors; None if there is none.
    """

    prompt: Callable[[Prediction], str]
    read_review: Callable[[str], Verdict | None]
    figures: Callable[[Sequence[Prediction], Sequence[Verdict], int], Mapping[str, Figure]]
    no_reference: str
    read_reviews: Callable[[Path], list[Review]] | None = None


def equals_gold(prediction: Prediction, gold: str | None, reading: Reading) -> float:
    """Return whether the reading is the truth."""
    return float(reading.value is not None and reading.value == gold)


def no_figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return nothing: the common figures say it all."""
    return {}


def lacks_nothing(predictions: Sequence[Prediction], policy: Policy) -> str | None:
    """Return that every policy can read the answers as they are."""
    return None


def anything(rows: Sequence[Row]) -> None:
    """Accept all answers: no question counts only together with others."""


def by_split(prediction: Prediction) -> str | None:
    """Return the split that the prediction names."""
    return prediction.split


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark, all of it in one file of this folder.

    Attributes:
        name: the word after ``--bench``.
        title: how people call it.
        source: repository and commit of the official scorer, and its licence.
        read: reads questions from the benchmark's own files (file or folder). Shapes of other tools are
            :mod:`vapr.evaluation.readers`' business.
        gold: the truth as :attr:`read_answer` would read it: "yes", "no", a letter, ...; None if withheld.
        read_answer: reads an answer under a policy.
        right: whether a reading is right.
        figures: the benchmark's own figures by name, values in the official unit.
        check_groups: refuses answers to a part of the questions that count only together; not asked where a result is
            known to be partial, whose group figures are those of the whole groups.
        headline: the figure that people quote: a key of ``figures``, or a common one.
        split: the part of the set that a question belongs to.
        read_results: reads the authors' own layout of results, given the questions.
        questions_in_results: reads questions with their truths from that layout, where it holds them.
        relabels: the benchmark whose answers count as answers to this one: only the truth differs.
        scored: None, or why answers alone cannot be scored (a judge is needed, the truth is withheld).
        lacks: why these answers cannot be read under a policy, None if they can.
        note: where the official rule is not followed, and why.
        judged: how a judge scores the answers, where one is needed; :attr:`scored` then says so.
    """

    name: str
    title: str
    source: str
    read: Callable[[Path], list[Question]]
    gold: Callable[[Prediction], str | None]
    read_answer: Callable[[Prediction, Policy], Reading]
    right: Callable[[Prediction, str | None, Reading], float] = equals_gold
    figures: Callable[[Sequence[Row]], Mapping[str, Figure]] = no_figures
    check_groups: Callable[[Sequence[Row]], None] = anything
    headline: str = "accuracy"
    split: Callable[[Prediction], str | None] = by_split
    read_results: Callable[[Path, Sequence[Question]], Results] | None = None
    questions_in_results: Callable[[Path], list[Question]] | None = None
    relabels: str | None = None
    scored: str | None = None
    lacks: Callable[[Sequence[Prediction], Policy], str | None] = lacks_nothing
    note: str = ""
    judged: Judged | None = None


def yes_no_gold(prediction: Prediction) -> str | None:
    """Return the truth as "yes" or "no"; None if it is neither."""
    said = str(prediction.answer).strip().lower().rstrip(".")
    return said if said in ("yes", "no") else None


def letter_gold(prediction: Prediction) -> str | None:
    """Return the letter of the true option, in upper case and without brackets."""
    said = str(prediction.answer).strip().strip("()").strip().upper()
    return said if len(said) == 1 and said.isalpha() else None


def options_of(prediction: Prediction) -> list[str]:
    """Return the texts of the options, none if only letters are known.

    Raises:
        UserError: if they are no list.
    """
    options: Any = prediction.meta.get("options") or prediction.meta.get("choices") or []
    if not isinstance(options, list | tuple):
        raise UserError(
            f"question '{prediction.id}' of {prediction.benchmark}: meta has {str(options)[:40]!r} for options; write "
            "a list of their texts, that of A first"
        )
    return [str(option) for option in options]


def reference(prediction: Prediction) -> str | None:
    """Return the reference answer that a judge compares with; None if there is none."""
    return str(prediction.answer) if prediction.answer not in (None, "") else None


def unread(prediction: Prediction, policy: Policy) -> Reading:
    """Return an answer that no rule reads: a judge does."""
    return Reading(None)
