"""Find the question that each answer of another tool is to: by id, by picture and text, never by line."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Results
from vapr.evaluation.readers.pictures import UNNAMED
from vapr.evaluation.score import plain_question
from vapr.evaluation.scoring.prediction import Prediction, Question

FAILED = "Failed to obtain answer"
"""What VLMEvalKit writes in the place of an answer that a server did not give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, and what its row tells about the question.

    ``ids`` are what the question may be called, ``question`` its text, perhaps with more around it. ``image``,
    ``split`` and ``truth`` are None where the row does not tell. ``order`` is the row's number in the tool's data set.
    """

    where: str
    text: str
    ids: tuple[str, ...]
    question: str
    image: str | None = None
    split: str | None = None
    truth: Any = None
    order: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)


def join(answers: Sequence[Answer], questions: Sequence[Question], file: Path, *, drops: str = "") -> Results:
    """Return the answers as predictions of the questions.

    Ids are trusted if every answer's leads to a question of its text; else text, picture and split have to tell.

    Args:
        answers: of the tool.
        questions: that could have been asked.
        file: for messages.
        drops: the benchmark that was asked, if some of its questions are known to be left out here.

    Raises:
        UserError: naming the row whose question is unknown, or could be several.
    """
    if not answers:
        raise UserError(f"{file}: no answer in it; run the tool again, or give the file that it filled")
    notes = []
    if drops:
        known = {question.id: question for question in questions}
        kept = [answer for answer in answers if _fitting(answer, known)]
        left_out = len(answers) - len(kept)
        notes = [f"{file.name}: answers to {drops}; {left_out:,} are to questions that {questions[0].benchmark} drops"]
        answers = kept
    found = _by_id(answers, questions) or _by_content(answers, questions, file)
    predictions: list[Prediction] = []
    taken: dict[str, str] = {}
    shared = _hand_out(answers, found, file)
    for answer, question in zip(answers, shared, strict=True):
        if question.id in taken:
            raise UserError(
                f"{answer.where}: a second answer to question '{question.id}', after {taken[question.id]}; keep one "
                "run in a file"
            )
        taken[question.id] = answer.where
        predictions.append(Prediction.of(question, answer.text, **answer.more))
    return Results(predictions, notes=[*notes, *_notes(answers, found, file)])


def _by_id(answers: Sequence[Answer], questions: Sequence[Question]) -> list[list[Question]] | None:
    """Return the questions that each answer may be to by its ids; None unless each has one of its text."""
    known = {question.id: question for question in questions}
    found = []
    for answer in answers:
        fitting = _fitting(answer, known)
        if not fitting:
            return None
        found.append(_narrowed(answer, fitting))
    return found


def _fitting(answer: Answer, known: Mapping[str, Question]) -> list[Question]:
    return [known[id] for id in dict.fromkeys(answer.ids) if id in known and _agree(answer, known[id])]


def _by_content(answers: Sequence[Answer], questions: Sequence[Question], file: Path) -> list[list[Question]]:
    by_line: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_line[_first_line(question.question)].append(question)
    found = []
    for answer in answers:
        lines = {_first_line(line) for line in answer.question.splitlines() if line.strip()}
        fitting = [q for line in lines for q in by_line.get(line, []) if _agree(answer, q)]
        if not fitting:
            asked = " ".join(answer.question.split())[:60]
            raise UserError(
                f"{answer.where}: {asked!r} is no question of {questions[0].benchmark}"
                f"{f' about {answer.image}' if answer.image else ''}; give the questions that {file.name} answers: "
                f"--bench {questions[0].benchmark}=PATH"
            )
        found.append(_narrowed(answer, fitting))
    return found


def _narrowed(answer: Answer, fitting: list[Question]) -> list[Question]:
    """Return those of several questions whose split and truth are the answer's, where that leaves any."""
    for same in (_same_split, _same_truth):
        fitting = [question for question in fitting if same(answer, question)] or fitting
    return fitting


def _hand_out(answers: Sequence[Answer], found: Sequence[list[Question]], file: Path) -> list[Question]:
    """Return one question for each answer. Splits may ask the same thing again: then the tool's order decides."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, fitting in enumerate(found):
        if len(fitting) > 1:
            groups[tuple(question.id for question in fitting)].append(number)
    chosen = [fitting[0] for fitting in found]
    for ids, members in groups.items():
        fitting = found[members[0]]
        alike = {(plain_question(q.question), str(q.meta.get("image")), str(q.answer)) for q in fitting}
        where = answers[members[0]].where
        if len(alike) > 1:
            raise UserError(
                f"{where}: could answer {len(ids):,} questions ('{ids[0]}', '{ids[1]}', ...), and its row names no "
                f"picture; give the tool's own questions: --bench {fitting[0].benchmark}=PATH"
            )
        if len(members) != len(fitting):
            raise UserError(
                f"{where}: {len(members):,} answer(s) to what {len(ids):,} questions ask ('{ids[0]}', '{ids[1]}', "
                "...), and nothing tells to which; give the answers to all splits, or to one that the file's name tells"
            )
        for question, number in zip(fitting, sorted(members, key=lambda n: answers[n].order), strict=True):
            chosen[number] = question
    return chosen


def _notes(answers: Sequence[Answer], found: Sequence[list[Question]], file: Path) -> list[str]:
    notes = []
    if repeated := sum(len(fitting) > 1 for fitting in found):
        notes.append(f"{file.name}: {repeated:,} answers are to questions that several splits ask; joined in its order")
    if empty := sum(not answer.text for answer in answers):
        notes.append(f"{file.name}: {empty:,} answers are empty; they count as unparsed")
    if failed := sum(answer.text.startswith(FAILED) for answer in answers):
        notes.append(f"{file.name}: {failed:,} answers are '{FAILED}', which is the tool's and not the model's")
    return notes


def _agree(answer: Answer, question: Question) -> bool:
    """Return whether text, and picture and split where both tell, can be those of the question."""
    image, name = answer.image, question.meta.get("image")
    if image and name and not _unnamed(str(name)) and not _unnamed(image) and _stem(image) != _stem(str(name)):
        return False
    said, asked = plain_question(answer.question), plain_question(question.question)
    return not said or said in asked or _first_line(question.question) in said


def _same_split(answer: Answer, question: Question) -> bool:
    split = question.meta.get("split")
    return answer.split is None or split is None or answer.split.lower() == str(split).lower()


def _same_truth(answer: Answer, question: Question) -> bool:
    return answer.truth is None or _plain(answer.truth) == _plain(question.answer)


def _plain(truth: Any) -> str:
    return " ".join(str(truth).lower().split()).strip("().")


def _first_line(text: str) -> str:
    return plain_question(next((line for line in text.splitlines() if plain_question(line)), ""))


def _stem(name: str) -> str:
    return Path(name).stem.lower()


def _unnamed(name: str) -> bool:
    """Return whether a picture has no name but its place in a table."""
    return _stem(name).startswith(UNNAMED)
