"""Join result folders: the questions that every model answered, by benchmark and id."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.compare.folders import ResultFolder, SetName
from vapr.evaluation.score import plain_question
from vapr.evaluation.scoring.prediction import Prediction


@dataclass(frozen=True)
class SharedSet:
    """The questions of a benchmark that every folder answers, in one order.

    Attributes:
        name: the benchmark, with pictures or without.
        benchmark: how it is scored; None for a name that is not vapr's, such as a judge set of the user's own.
        answers: of each folder, to the same questions in the same order.
        left_out: of each folder, how many of its questions another folder has not.
    """

    name: SetName
    benchmark: Benchmark | None
    answers: tuple[tuple[Prediction, ...], ...]
    left_out: tuple[int, ...]


def join(folders: Sequence[ResultFolder]) -> tuple[list[SharedSet], list[str]]:
    """Join the folders' answers.

    Returns:
        The benchmarks that all have, in the order of names, and lines on what is not compared.

    Raises:
        UserError: for no common benchmark or question, and where an id is of different questions or truths.
    """
    names = sorted({name for folder in folders for name in folder.sets})
    common = [name for name in names if all(name in folder.sets for folder in folders)]
    if not common:
        held = "; ".join(f"{folder.path} holds {', '.join(map(str, sorted(folder.sets)))}" for folder in folders)
        raise UserError(f"no benchmark that all folders have: {held}")
    notes = []
    for name in names:
        if name not in common:
            having = ", ".join(folder.name for folder in folders if name in folder.sets)
            notes.append(f"{name} is not compared: only {having} {'have' if ', ' in having else 'has'} answers to it")
    shared = []
    for name in common:
        one = _join_set(name, folders)
        shared.append(one)
        if any(one.left_out):
            counted = ", ".join(
                f"{count:,} of {folder.name}" for folder, count in zip(folders, one.left_out, strict=True) if count
            )
            notes.append(
                f"{name}: {len(one.answers[0]):,} questions that all have; left out, because another has no answer: "
                f"{counted}"
            )
    return shared, notes


def _join_set(name: SetName, folders: Sequence[ResultFolder]) -> SharedSet:
    columns = [folder.sets[name] for folder in folders]
    ids = sorted(set(columns[0]).intersection(*columns[1:]), key=_natural)
    if not ids:
        examples = "; ".join(f"{folder.path} has '{next(iter(folder.sets[name]))}'" for folder in folders)
        raise UserError(f"{name}: no question that all folders have: {examples}; evaluate the same questions")
    benchmark = BENCHMARKS.get(name.benchmark)
    for id_ in ids:
        for folder, column in zip(folders[1:], columns[1:], strict=True):
            _check_same(columns[0][id_], column[id_], benchmark, f"{name}: question '{id_}'", (folders[0], folder))
    answers = tuple(tuple(column[id_] for id_ in ids) for column in columns)
    return SharedSet(name, benchmark, answers, tuple(len(column) - len(ids) for column in columns))


def _check_same(
    one: Prediction, other: Prediction, benchmark: Benchmark | None, what: str,
    folders: tuple[ResultFolder, ResultFolder],
) -> None:  # fmt: skip
    """Refuse answers to different questions; a question that is not known (of another tool's results) may be any."""
    facts: list[tuple[str, Any, Any]] = []
    if one.question and other.question and one.question != other.question:
        facts.append(("question", plain_question(one.question), plain_question(other.question)))
    facts.append(("truth", *_truths(one, other, benchmark)))
    facts.append(("picture", PurePath(one.image).name, PurePath(other.image).name))
    if benchmark:
        facts.append(("split", benchmark.split(one), benchmark.split(other)))
    for fact, mine, theirs in facts:
        if mine != theirs:
            raise UserError(
                f"{what} has the {fact} {str(mine)[:60]!r} in {folders[0].path}, but {str(theirs)[:60]!r} in "
                f"{folders[1].path}; only answers to the same questions compare: evaluate both with the same files"
            )


def _truths(one: Prediction, other: Prediction, benchmark: Benchmark | None) -> tuple[Any, Any]:
    """Return both truths as the benchmark reads them, as they stand where it cannot."""
    if benchmark and None not in (truths := (benchmark.gold(one), benchmark.gold(other))):
        return truths
    return one.answer, other.answer


def _natural(id_: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key by which ``q-9`` stands before ``q-10``."""
    return tuple((0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part)
                 for part in re.split(r"(\d+)", id_) if part)  # fmt: skip
