"""MMMU, validation: 900 questions of 30 college subjects, 847 with options and 53 open ones."""

import ast
import math
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks import mmmu_rule
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, equals_gold, letter_gold, options_of
from vapr.evaluation.benchmarks.choices import accuracies, prompt_of, read_letter
from vapr.evaluation.benchmarks.rows import files_of, pictures, read_json, read_rows, require, text_of
from vapr.evaluation.scoring.answers import Policy, final_answers
from vapr.evaluation.scoring.averages import mean_of
from vapr.evaluation.scoring.figures import Figure, share
from vapr.evaluation.scoring.letters import plain, without_lead
from vapr.evaluation.scoring.numbers import number, stated_number
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids
from vapr.text import sentences

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
_DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
ASK_FOR_PHRASE = "Answer the question using a single word or phrase."
"""LLaVA-1.5's words, as those for options."""


def read(path: Path) -> list[Question]:
    """Read ``answer_dict_val.json``, which holds no more than the truths, or rows with the hub's columns."""
    patterns = ("answer_dict_val.json", "validation*.jsonl", "*.jsonl")
    questions = []
    for file in files_of(path, patterns, "MMMU-Benchmark/MMMU, mmmu/, or MMMU/MMMU on the hub"):
        if file.name.startswith("answer_dict"):
            questions += _truths(file)
        else:
            questions += [_question(row, where, file.parent) for where, row in read_rows(file)]
    check_ids(questions, path)
    return questions


def _truths(file: Path) -> list[Question]:
    truths = read_json(file)
    if not isinstance(truths, dict):
        raise UserError(f"{file}: a JSON {type(truths).__name__}, not MMMU's object of truths by id")
    for id, row in truths.items():
        if not isinstance(row, dict) or "question_type" not in row or "ground_truth" not in row:
            raise UserError(f"{file}: '{id}' has no question_type or no ground_truth; use MMMU's answer_dict_val.json")
    return [
        Question(
            benchmark="mmmu", id=id, question="", answer=row["ground_truth"],
            meta={"split": _subject(id), "question_type": row["question_type"]},
        )
        for id, row in truths.items()
    ]  # fmt: skip


def _question(row: Mapping[str, Any], where: str, folder: Path) -> Question:
    require(row, where, ("id", "question", "options", "answer", "question_type"), "a question of MMMU")
    for key in ("id", "question"):
        text_of(row, key, where)
    options = _listed(row["options"]) or []
    choice = row["question_type"] == "multiple-choice"
    asked = prompt_of(row["question"], options) if choice else prompt_of(row["question"], [], ASK_FOR_PHRASE)
    meta = {"split": _subject(row["id"]), "question_type": row["question_type"], "options": options}
    numbers: list[str] = []

    def mark(found: re.Match[str]) -> str:  # a picture that is named again is only named
        seen = found[1] in numbers
        numbers.append(found[1])
        return f"image {found[1]}" if seen else "<image>"

    asked = re.sub(r"<image (\d)>", mark, asked)
    shown = pictures([row.get(f"image_{n}") for n in dict.fromkeys(numbers)], folder)
    return Question(
        benchmark="mmmu", id=row["id"], question=asked, answer=_listed(row["answer"]) or row["answer"], meta=meta,
        images=shown,
    )  # fmt: skip


def _listed(value: Any) -> list[str] | None:
    """Return a list that stands in a column as text; None for any other text."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) and value.startswith("[") else value
    except (ValueError, SyntaxError):
        return None
    return [str(one) for one in found] if isinstance(found, list) else None


def _subject(id: str) -> str:
    return "_".join(id.split("_")[1:-1])


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read ``output.json`` of each subject's folder, or one file of answers by id.

    The former say what the options are, so that the authors' rule can be followed. In the latter, which holds letters
    that were read already, guesses cannot be told.
    """
    by_id = {question.id: question for question in questions}
    files, notes = _result_files(path)
    predictions = [_answer(id, row, where, by_id) for file in files for id, row, where in _answers(file)]
    check_ids(predictions, path)
    return Results(predictions, notes=notes)


def questions_in_results(path: Path) -> list[Question]:
    """Read the truths that ``output.json`` holds beside the answers; one file of answers by id holds none."""
    questions = []
    for id, row, where in (answer for file in _result_files(path)[0] for answer in _answers(file)):
        require(row, where, ("answer", "question_type"), "an answer that holds its truth")
        meta = {"split": _subject(id), "question_type": row["question_type"]}
        questions.append(Question(benchmark="mmmu", id=id, question="", answer=row["answer"], meta=meta))
    check_ids(questions, path)
    return questions


def _result_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files of results, and what is said of others."""
    if not path.is_dir():
        return [path], []
    if files := sorted(path.glob("*/output.json")):
        return files, [f"{file.name} left aside: the subjects' own files are read" for file in path.glob("*.json")]
    return files_of(path, ("total*.json", "output.json"), "the authors' layout: a folder for each subject"), []


def _answers(file: Path) -> list[tuple[str, Mapping[str, Any], str]]:
    """Return id, row and place of each answer."""
    rows = read_json(file)
    if isinstance(rows, dict):
        return [(id, {"response": answer}, f"{file}: '{id}'") for id, answer in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: neither answers by id nor a list of rows with id and response")
    return [(str(row.get("id")), row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _answer(id: str, row: Mapping[str, Any], where: str, by_id: Mapping[str, Question]) -> Prediction:
    if id not in by_id:
        raise UserError(f"{where}: an answer to '{id}', which is no question of MMMU's validation set")
    if not isinstance(row.get("response"), str):
        raise UserError(f"{where}: 'response' is {str(row.get('response'))[:40]}, not a text")
    letters, texts = row.get("all_choices") or [], row.get("index2ans") or {}
    if list(letters) != list(string.ascii_uppercase[: len(letters)]) or set(letters) != set(texts):
        raise UserError(f"{where}: all_choices are not the letters from A on that index2ans has")
    return Prediction.of(by_id[id], row["response"], **({"options": list(texts.values())} if texts else {}))


def _is_choice(prediction: Prediction) -> bool:
    kind = prediction.meta.get("question_type")
    return bool(options_of(prediction)) if kind is None else kind == "multiple-choice"


def _true_texts(prediction: Prediction) -> list[str]:
    """Return the truths of an open question, some of which have several."""
    answer = prediction.answer
    return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]


def gold(prediction: Prediction) -> str | None:
    """Return the letter of the true option, or the true texts of an open question."""
    if _is_choice(prediction):
        return letter_gold(prediction)
    return " / ".join(_true_texts(prediction)) if prediction.answer not in (None, "", "?") else None


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read a letter, or what is stated: a number where the truth is one, else the beginning or the final answer."""
    text, options = prediction.prediction, options_of(prediction)
    if policy != "official":
        return read_letter(prediction, policy) if _is_choice(prediction) else _stated(prediction, policy)
    if not _is_choice(prediction):
        return mmmu_rule.read_open(text)
    if not options:  # an answer that was read already
        said = text.strip()
        return Reading(said if len(said) == 1 and said in string.ascii_uppercase else None)
    return mmmu_rule.read_choice(text, string.ascii_uppercase[: len(options)], options, prediction.id)


def _stated(prediction: Prediction, policy: Policy) -> Reading:
    if any(number(truth) is not None for truth in _true_texts(prediction)):
        value = stated_number(prediction.prediction, policy)
        return Reading(None if value is None else f"{value:.10g}")
    places = final_answers(prediction.prediction) if policy == "last-answer" else [prediction.prediction]
    said = sentences(without_lead(places[0])) if places else []
    if not said:
        return Reading(None)
    ending = re.split(r"\b(?:is|are|was)\s|[:=]\s", said[0])[-1] if policy == "last-answer" else said[0]
    return Reading(ending.strip())


def right(prediction: Prediction, gold: str | None, reading: Reading) -> float:
    """Return whether the letter, the number to two decimals as the authors compare, or the text is the truth."""
    if _is_choice(prediction):
        return equals_gold(prediction, gold, reading)
    truths = _true_texts(prediction)
    if isinstance(reading, mmmu_rule.OpenReading):
        return float(mmmu_rule.open_is_right(reading, truths))
    if reading.value is None:
        return 0.0
    return float(any(_agree(reading.value, truth) for truth in truths))


def _agree(said: str, truth: str) -> bool:
    wanted = number(truth)
    value = number(said)
    if wanted is None or value is None:
        return plain(said) == plain(truth)
    if "/" in truth or "frac" in truth:
        return math.isclose(value, wanted, rel_tol=1e-3)
    return round(value, 2) == round(wanted, 2)


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the expected accuracy, each guess right with one over the number of options; disciplines; their mean."""
    expected = [1 / len(options_of(row.prediction)) if row.reading.guessed else row.right for row in rows]
    found = {"expected_accuracy": share(expected, [row.prediction.image for row in rows])}
    subjects = accuracies(rows, split)
    if len(subjects) > 1:
        found["mean_of_subjects"] = mean_of(list(subjects.values()))
        found |= accuracies(rows, lambda prediction: _DISCIPLINE_OF.get(split(prediction) or ""))
    return found


def split(prediction: Prediction) -> str | None:
    """Return the subject, from the id where nothing else names it."""
    return prediction.split or _subject(prediction.id) or None


MMMU = Benchmark(
    name="mmmu",
    title="MMMU val",
    source="MMMU-Benchmark/MMMU bb0b95a, mmmu/utils/eval_utils.py, Apache-2.0",
    read=read,
    gold=gold,
    read_answer=read_answer,
    right=right,
    figures=figures,
    split=split,
    read_results=read_results,
    questions_in_results=questions_in_results,
    note=(
        "The official rule draws an option where it reads none: such answers are guessed, and expected_accuracy is the "
        "score without the luck of the draw. Under the other policies any text answers an open question whose truth is "
        "a text."
    ),
)
