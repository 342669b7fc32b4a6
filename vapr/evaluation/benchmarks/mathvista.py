"""MathVista, testmini: 1,000 questions of mathematics about pictures, with options or with a number as the answer."""

import ast
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, options_of
from vapr.evaluation.benchmarks.choices import accuracies, prompt_of
from vapr.evaluation.benchmarks.rows import files_of, pictures, read_json, read_rows, require
from vapr.evaluation.scoring.answers import Policy, final_answers
from vapr.evaluation.scoring.figures import Figure, share
from vapr.evaluation.scoring.letters import letter, without_lead
from vapr.evaluation.scoring.numbers import number, stated_number
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

_ASK = {
    "integer": "Answer with a whole number, which stands at the end.",
    "float": "Answer with a number of {precision} decimals, which stands at the end.",
    "list": "Answer with a list of numbers such as [1, 2], which stands at the end.",
}
_LIST = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True, slots=True)
class Extracted(Reading):
    """A number or list that was extracted, rounded and written as the authors' script does, which compares texts."""


def read(path: Path) -> list[Question]:
    """Read ``testmini.json``, questions by pid; with ``query.json`` beside it, the authors' prompts."""
    (file, *_) = files_of(path, ("*testmini*.json*",), "lupantech/MathVista, data/")
    rows = _rows(file)
    beside = file.parent / "query.json"
    prompts = read_json(beside) if beside.is_file() else {}
    questions = [_question(row, where, file.parent, prompts.get(str(row.get("pid")))) for where, row in rows]
    check_ids(questions, path)
    return questions


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return place and columns of each question: an object by pid, or one row a line."""
    if file.suffix == ".jsonl":
        return list(read_rows(file))
    by_pid = read_json(file)
    if not isinstance(by_pid, dict) or not all(isinstance(row, dict) for row in by_pid.values()):
        raise UserError(f"{file}: not MathVista's object of rows by pid")
    return [(f"{file}: '{pid}'", {"pid": pid, **row}) for pid, row in by_pid.items()]


def _question(row: Mapping[str, Any], where: str, folder: Path, prompt: str | None) -> Question:
    require(row, where, ("pid", "question", "answer", "question_type", "answer_type"), "a question of MathVista")
    precision = row.get("precision")
    if precision is not None and (not isinstance(precision, int | float) or not 0 <= precision < 20):
        raise UserError(f"{where}: 'precision' is {str(precision)[:40]!r}, no number of decimals")
    precision = None if precision is None else int(precision)
    kind, choices = row["answer_type"], [str(choice) for choice in row.get("choices") or []]
    about = {key: row[key] for key in ("question_type", "answer_type")} | {"precision": precision}
    if row["question_type"] == "multi_choice":
        if str(row["answer"]) not in choices:
            raise UserError(f"{where}: 'answer' is {str(row['answer'])[:40]!r}, none of the {len(choices)} choices")
        asked = prompt_of(row["question"], choices)
    else:
        unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
        asked = f"{row['question']}{unit}\n{_ASK.get(kind, '').format(precision=precision)}".strip()
    facts = row.get("metadata") or {}
    about |= {key: facts[key] for key in ("task", "context", "grade", "source", "language", "skills") if key in facts}
    return Question(
        benchmark="mathvista", id=str(row["pid"]), question=row.get("query") or prompt or asked, answer=row["answer"],
        meta={**about, "split": facts.get("task"), "options": choices, "image": row.get("image")},
        images=pictures(row.get("image"), folder),
    )  # fmt: skip


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read ``output_*.json``: by pid the ``response``, and what a language model extracted from it, if one did."""
    by_id = {question.id: question for question in questions}
    predictions = []
    for where, row in _rows(path):
        if row["pid"] not in by_id:
            raise UserError(f"{where}: an answer to '{row['pid']}', which is no question of MathVista testmini")
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where}: no 'response' that is a text; has {', '.join(list(row)[:12])}")
        extracted = {"extraction": str(row["extraction"])} if row.get("extraction") is not None else {}
        predictions.append(Prediction.of(by_id[row["pid"]], row["response"], **extracted))
    return Results(predictions)


def _is_choice(prediction: Prediction) -> bool:
    return bool(prediction.meta.get("question_type", "multi_choice") == "multi_choice" and options_of(prediction))


def gold(prediction: Prediction) -> str | None:
    """Return the letter of the true option, or the true number or list as it is written."""
    if prediction.answer in (None, ""):
        return None
    if not _is_choice(prediction):
        return str(prediction.answer)
    labelled = zip(_letters(prediction), options_of(prediction), strict=False)
    return next((label for label, option in labelled if option == str(prediction.answer)), None)


def _letters(prediction: Prediction) -> str:
    return string.ascii_uppercase[: len(options_of(prediction))]


def lacks(predictions: Sequence[Prediction], policy: Policy) -> str | None:
    """Return why the official rule cannot be followed: a language model extracts the answers that are not plain."""
    without = sum(_extracted(prediction) is None for prediction in predictions) if policy == "official" else 0
    if not without:
        return None
    return (
        f"a language model extracts what an answer says, and {without:,} of {len(predictions):,} answers have no "
        "'extraction'; run MathVista's extract_answer.py on them, or read them with --policy last-answer"
    )


def _extracted(prediction: Prediction) -> str | None:
    """Return what was extracted; for an answer that is an option's text or a number on its own, that. None if unknown.

    An extraction that is empty is one: the language model found nothing.
    """
    if (stored := prediction.meta.get("extraction")) is not None:
        return str(stored)
    text = prediction.prediction
    if text == "" or (_is_choice(prediction) and text in options_of(prediction)):
        return text
    try:
        return {"integer": lambda: str(int(text)), "float": lambda: str(float(text))}[prediction.meta["answer_type"]]()
    except (KeyError, ValueError):
        return None


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read a letter, a number or a list of numbers; under the official rule, from what was extracted."""
    if policy == "official":
        return _official(prediction, (_extracted(prediction) or "").strip())
    text, kind = prediction.prediction, prediction.meta.get("answer_type")
    if _is_choice(prediction):
        return Reading(letter(text, options_of(prediction), policy) or _by_number(prediction, policy))
    if kind == "list":
        if policy != "last-answer":
            said = without_lead(text).strip().rstrip(".")
            return Reading(said if _LIST.fullmatch(said) else None)
        return Reading(next((found for place in final_answers(text) for found in _LIST.findall(place)), None))
    value = stated_number(text, policy)
    return Reading(None if value is None else f"{value:.12g}")


def _by_number(prediction: Prediction, policy: Policy) -> str | None:
    """Return the letter of the one option whose number is stated: "145" where an option is "145°"."""
    value = stated_number(prediction.prediction, policy)
    if value is None:
        return None
    options = zip(_letters(prediction), options_of(prediction), strict=False)
    same = [label for label, option in options if number(option) == value]
    return same[0] if len(same) == 1 else None


def _official(prediction: Prediction, text: str) -> Reading:
    """Read an extraction as the authors do: a letter in brackets or on its own, or the option of the nearest text.

    The nearest text is a guess where it is not the same. Nothing is near an empty extraction: see the note.
    """
    if not text:
        return Reading(None)
    if _is_choice(prediction):
        options, letters = options_of(prediction), _letters(prediction)
        bracketed = re.search(r"\(([a-zA-Z])\)", text)
        said = bracketed[1].upper() if bracketed else text
        if len(said) == 1 and said in letters:
            return Reading(said)
        distances = [Levenshtein.distance(said, option) for option in options]
        nearest = distances.index(min(distances))
        return Reading(letters[nearest], guessed=options[nearest] != said)
    try:
        if prediction.meta.get("answer_type") == "integer":
            return Extracted(str(int(float(text))))
        if prediction.meta.get("answer_type") == "float":
            return Extracted(str(_rounded(float(text), prediction)))
    except (ValueError, OverflowError):
        return Reading(None)
    return Extracted(text)


def right(prediction: Prediction, gold: str | None, reading: Reading) -> float:
    """Return whether the option's text is the true one, the number to the decimals asked for, or the whole list."""
    if reading.value is None or gold is None:
        return 0.0
    if _is_choice(prediction):
        said = options_of(prediction)[_letters(prediction).index(reading.value)]
        return float(said == str(prediction.answer))
    if isinstance(reading, Extracted):
        return float(reading.value == gold)
    if prediction.meta.get("answer_type") == "list":
        numbers = _numbers(reading.value)
        return float(numbers is not None and numbers == _numbers(gold))
    value, wanted_value = number(reading.value), number(gold)
    if value is None or wanted_value is None:
        return 0.0
    if prediction.meta.get("answer_type") == "float":
        value = _rounded(value, prediction)
    return float(math.isclose(value, wanted_value, rel_tol=1e-9, abs_tol=1e-9))


def _rounded(value: float, prediction: Prediction) -> float:
    """Round to the decimals that a question asks for; not at all where it names none."""
    decimals = prediction.meta.get("precision")
    return round(value, int(decimals)) if isinstance(decimals, int | float) else value


def _numbers(text: str) -> list[Any] | None:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return list(found) if isinstance(found, list | tuple) else None


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the accuracy of questions with options, of free ones, and of each skill; a question may need several."""
    kinds = accuracies(rows, lambda prediction: str(prediction.meta.get("question_type") or "") or None)
    of_skill: dict[str, list[Row]] = {}
    for row in rows:
        for skill in row.prediction.meta.get("skills") or []:
            of_skill.setdefault(str(skill), []).append(row)
    skills = {
        skill: share([row.right for row in members], [row.prediction.image for row in members])
        for skill, members in sorted(of_skill.items())
    }
    return {**kinds, **skills}


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista testmini",
    source="lupantech/MathVista e999481, evaluation/calculate_score.py, CC-BY-SA-4.0",
    read=read,
    gold=gold,
    read_answer=read_answer,
    right=right,
    figures=figures,
    lacks=lacks,
    read_results=read_results,
    note=(
        "The official rule takes the option whose text is nearest to what was extracted: a guess. From an empty "
        "extraction the authors' script makes the shortest option, so that a judge that never answered gives a "
        "plausible score; here it is unparsed and wrong."
    ),
)
