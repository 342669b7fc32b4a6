"""What benchmarks of options share: the prompt, the letter that an answer names, accuracy by group."""

import string
from collections.abc import Callable, Mapping, Sequence

from vapr.evaluation.benchmarks.benchmark import Reading, Row, options_of
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.figures import Figure, share
from vapr.evaluation.scoring.letters import letter
from vapr.evaluation.scoring.prediction import Prediction

ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's words, on which many models were trained."""


def prompt_of(question: str, options: Sequence[str], ask: str = ASK_FOR_LETTER) -> str:
    """Return a question with its options, "(A) red", each in a line, and what is asked of the answer's form."""
    lines = [f"({label}) {option}" for label, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, ask])


def read_letter(prediction: Prediction, policy: Policy) -> Reading:
    """Read the letter of an option under ``strict`` or ``last-answer``."""
    return Reading(letter(prediction.prediction, options_of(prediction), policy))


def official_letter(prediction: Prediction, said: str, letters: str) -> Reading:
    """Return what an official rule took an answer for: a guess where the answer does not name an option on its own.

    Rules that look at the first character alone read "a" from "a dog" and "b" from "because".
    """
    said = said.upper()
    if not said or said not in letters:
        return Reading(None)
    return Reading(said, guessed=letter(prediction.prediction, options_of(prediction), "strict") is None)


def accuracies(rows: Sequence[Row], group: Callable[[Prediction], str | None]) -> Mapping[str, Figure]:
    """Return the accuracy in each group of questions, groups in the order of their first question."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if (name := group(row.prediction)) is not None:
            groups.setdefault(name, []).append(row)
    return {
        name: share([row.right for row in members], [row.prediction.image for row in members])
        for name, members in groups.items()
    }
