"""Verdicts out of what Label Studio or Argilla exports, after people compared what :mod:`vapr.data.annotation` wrote.

Who picks the side that was chosen keeps the pair; who picks the other side, or neither, drops it. Where people disagree
nothing is decided.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vapr.data.annotation import NEITHER, QUESTION, right_side
from vapr.errors import UserError, one_line

Verdict = Literal["keep", "drop"]

SIDES = {"label-studio": ("left", "right"), "argilla": ("a", "b")}
"""How the tools call the first and the second side."""
UNANSWERED = "not answered"
DISAGREE = "people disagree"
OTHER_ANSWER = "an answer that is no side"
NO_ID = "no id of a pair"
NO_TASK = "no task that vapr wrote"


@dataclass(slots=True)
class Annotated:
    """What people have decided: a verdict by the id of the pair, and why other rows have none."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    undecided: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # of each reason, the first row

    def leave(self, reason: str, row: str) -> None:
        """Count a row that decides nothing."""
        self.undecided[reason] += 1
        self.first.setdefault(reason, row)

    def told(self) -> str | None:
        """Return one line on the rows without a verdict; None if there are none."""
        if not self.undecided:
            return None
        reasons = (f"{count:,} {reason} (the first: {self.first[reason]})" for reason, count in self.undecided.items())
        return f"{self.undecided.total():,} without a verdict: {', '.join(reasons)}"


def read_annotated(text: str, where: str) -> Annotated:
    """Read the JSON of Label Studio's tasks with annotations, or of Argilla's records with responses.

    Args:
        text: of the file, a list.
        where: the name of the file, for messages.

    Raises:
        UserError: if it is cut short, or nothing in it is of one of the tools, or nothing is decided.
    """
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({one_line(error)}); export it again") from None
    annotated = Annotated()
    said: dict[str, list[Any]] = defaultdict(list)
    for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
        if (problem := _take(row, said)) is not None:
            annotated.leave(problem, f"row {number}")
    for id, answers in said.items():
        decided = set(answers)
        if not decided:
            annotated.leave(UNANSWERED, f"'{id:.60}'")
        elif None in decided:
            annotated.leave(OTHER_ANSWER, f"'{id:.60}'")
        elif len(decided) > 1:
            annotated.leave(DISAGREE, f"'{id:.60}'")
        else:
            annotated.verdicts[id] = decided.pop()
    if not said:
        raise UserError(
            f"{where}: holds no task that vapr wrote for people; export Label Studio's tasks as JSON (not JSON-MIN), "
            "or Argilla's by dataset.records.to_json"
        )
    if not annotated.verdicts:
        raise UserError(f"{where}: holds no verdict; {annotated.told()}")
    return annotated


def _take(row: Any, said: dict[str, list[Any]]) -> str | None:
    """Note what was said of a row's pair: verdicts, or None for an answer that is none; return what is wrong."""
    if not isinstance(row, dict):
        return NO_TASK
    if isinstance(row.get("annotations"), list):
        tool, answers, told = "label-studio", _label_studio_answers(row["annotations"]), row.get("meta")
        id = row["data"].get("id") if isinstance(row.get("data"), dict) else None
    elif isinstance(row.get("responses"), dict):
        tool, answers, told, id = "argilla", _argilla_answers(row), row.get("metadata"), row.get("id")
    else:
        return NO_TASK
    if not isinstance(id, str) or not id:
        return NO_ID
    said[id] += [_verdict(answer, _right(tool, told, id), tool) for answer in answers]
    return None


def _right(tool: str, told: Any, id: str) -> str:
    """Return the side that was chosen, as the task tells it; where a tool has dropped that, as it was drawn."""
    right = told.get("chosen") if isinstance(told, Mapping) else None
    if right in SIDES[tool]:
        return str(right)
    return SIDES[tool][right_side(id) == "second"]


def _verdict(answer: Any, right: str, tool: str) -> Verdict | None:
    if not isinstance(answer, str) or answer not in (*SIDES[tool], NEITHER):
        return None
    return "keep" if answer == right else "drop"


def _label_studio_answers(annotations: list[Any]) -> Iterator[Any]:
    """Yield what was picked in each annotation that was submitted; a task that was skipped has one, too."""
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        result = annotation.get("result")
        for region in result if isinstance(result, list) else []:
            if isinstance(region, dict) and region.get("from_name") == QUESTION:
                value = region.get("value")
                yield value.get("selected") if isinstance(value, dict) else None


def _argilla_answers(record: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what was answered in each response.

    Argilla writes drafts and discarded ones like others. A record nobody has submitted anything of is pending, though.
    """
    responses = record["responses"].get(QUESTION)
    for response in responses if isinstance(responses, list) and record.get("status") != "pending" else []:
        value = response.get("value") if isinstance(response, dict) else response
        if value is not None:  # discarded without an answer
            yield value
