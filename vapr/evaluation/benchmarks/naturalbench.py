"""NaturalBench: 1,900 groups of two pictures and two questions, each question answered differently by the pictures.

Whoever does not look gets half of the answers right and no group. Within a group, question 0 is "yes" (or A) on picture
0 and question 1 on picture 1, so the true yes rate is one half.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Row, letter_gold, options_of, yes_no_gold
from vapr.evaluation.benchmarks.groups import all_right, grouped, refuse_parts
from vapr.evaluation.benchmarks.rows import picture, read_objects, text_of
from vapr.evaluation.scoring.answers import Policy, states, yes_or_no
from vapr.evaluation.scoring.figures import Figure, numbered, share
from vapr.evaluation.scoring.letters import letter
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

ASKED_FOR = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
"""What is asked of the answer's form, by the type of the question."""

_OPTIONS = re.compile(r"\bA\s*[:.)]\s*(.+?)[\s;,.]*(?:\bOption\s*)?\bB\s*[:.)]\s*(.+?)[\s;.]*$", re.DOTALL)
GROUP = ("Question_0", "Question_1", *(f"Image_{i}_Question_{q}" for q in (0, 1) for i in (0, 1)))
FLAT = ("Index", "Question", "Question_Type", "Answer")


def read(path: Path) -> list[Question]:
    """Read rows of the data set on Hugging Face, or of its flat copy for lmms-eval, as JSON or JSON lines.

    A row is a whole group (``Index``, ``Image_0``, ``Question_0``, ``Image_0_Question_0``, ...) or one question
    (``Index``, which is 4 x group + 2 x question + picture, ``Image``, ``Question``, ``Question_Type``, ``Answer``).
    Pictures are names of files beside the rows; without them, ``images/<group>_<picture>.jpg``.
    """
    files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .json or .jsonl of NaturalBench in it")
    questions = []
    for file in files:
        for where, row in read_objects(file, ("Index",), "a row of NaturalBench"):
            questions += from_row(row, where, file.parent)
    check_ids(questions, path)
    return questions


def from_row(row: Mapping[str, Any], where: str, folder: Path) -> list[Question]:
    """Return the questions of a row, four for that of a group, from wherever it was read.

    Raises:
        UserError: naming the column that is missing, or the value that is none of the benchmark's.
    """
    row = {key.replace(" ", "_"): value for key, value in row.items()}  # "Question Type" in the first edition
    flat = "Question" in row
    if missing := [key for key in (FLAT if flat else (*GROUP, "Question_Type")) if key not in row]:
        raise UserError(f"{where}: no '{missing[0]}'; a row of NaturalBench has Index, Question_Type, and either "
                        "Question and Answer or Question_0, Image_0_Question_0 and so on")  # fmt: skip
    if not str(row["Index"]).isdecimal():
        raise UserError(f"{where}: 'Index' is {row['Index']!r}, not a number")
    if row["Question_Type"] not in ASKED_FOR:
        raise UserError(f"{where}: 'Question_Type' is {row['Question_Type']!r}, not yes_no or multiple_choice")
    index = int(row["Index"])
    if flat:
        cells = [(index // 4, index // 2 % 2, index % 2, "Question", "Answer", "Image")]
    else:
        cells = [
            (index, q, i, f"Question_{q}", f"Image_{i}_Question_{q}", f"Image_{i}") for q in (0, 1) for i in (0, 1)
        ]
    questions = []
    for group, q, i, asked, answer, image in cells:
        for key in (asked, answer):
            text_of(dict(row), key, where)
        meta = {"split": row["Question_Type"], "group": group, "question_number": q, "image": f"{group}_{i}"}
        if row["Question_Type"] == "multiple_choice" and (options := _OPTIONS.search(row[asked])):
            meta["options"] = list(options.groups())
        questions.append(
            Question(
                benchmark="naturalbench", id=f"{group}-q{q}-i{i}",
                question=f"{row[asked].strip()} {ASKED_FOR[row['Question_Type']]}", answer=row[answer],
                meta=meta, images=(_image(row.get(image), folder, f"{group}_{i}.jpg"),),
            )
        )  # fmt: skip
    return questions


def _image(value: Any, folder: Path, name: str) -> Path | bytes:
    """Return the picture of a cell: bytes, as parquet holds them, or the name of a file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    return picture(folder, value if isinstance(value, str) and value else name, ("images",))


def gold(prediction: Prediction) -> str | None:
    """Return "yes" or "no", or the letter A or B; None for anything else."""
    if prediction.split != "multiple_choice":
        return yes_no_gold(prediction)
    said = letter_gold(prediction)
    return said if said in ("A", "B") else None


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no, or A or B. The official rule: whichever of the two words comes first, wherever it stands."""
    text, choice = prediction.prediction, prediction.split == "multiple_choice"
    if policy != "official":
        return Reading(_letter(prediction, policy) if choice else yes_or_no(text, policy))
    found = re.search(r"\b(a|b)\b" if choice else r"\b(yes|no)\b", text, re.IGNORECASE)
    if found is None:
        return Reading(None)
    if choice:  # "a" is mostly an article
        said = found[1].upper()
        return Reading(said, guessed=_letter(prediction, "last-answer") != said)
    return Reading(found[1].lower(), guessed=not states(text, found[1].lower()))


def _letter(prediction: Prediction, policy: Policy) -> str | None:
    said = letter(prediction.prediction, options_of(prediction), policy)
    return said if said in ("A", "B") else None


def _group(row: Row) -> Hashable:
    return row.prediction.meta.get("group")


def _question(row: Row) -> Hashable:
    return _group(row), row.prediction.meta.get("question_number")


def check_groups(rows: Sequence[Row]) -> None:
    """Refuse groups of which not all four answers are there."""
    for row in rows:
        if missing := [key for key in ("group", "question_number", "image") if row.prediction.meta.get(key) is None]:
            raise UserError(
                f"question '{row.prediction.id}' of naturalbench: meta has no '{missing[0]}'; give the questions with "
                "--bench naturalbench=PATH"
            )
    refuse_parts(grouped(rows, _group), 4, "NaturalBench", "group")


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the accuracies of questions, pictures and groups, and how often both pictures get the same answer."""
    whole = [row for group in grouped(rows, _group).values() if len(group) == 4 for row in group]
    questions = list(grouped(whole, _question).values())
    pictures = list(grouped(whole, lambda row: row.prediction.image).values())
    same = {
        name: [all(row.reading.value in values for row in pair) for pair in questions]
        for name, values in {"yes": ("yes", "A"), "no": ("no", "B")}.items()
    }
    clusters = numbered([_group(pair[0]) for pair in questions])
    either = [one or other for one, other in zip(same["yes"], same["no"], strict=True)]
    return {
        "acc": share([row.right for row in whole], numbered([_group(row) for row in whole])),
        "q_acc": all_right(questions, _group),
        "i_acc": all_right(pictures, _group),
        "g_acc": all_right(list(grouped(whole, _group).values()), _group),
        "same_answer": share(either, clusters),
        "same_answer_yes_or_a": share(same["yes"], clusters),
        "same_answer_no_or_b": share(same["no"], clusters),
    }


NATURALBENCH = Benchmark(
    name="naturalbench",
    title="NaturalBench",
    source="Baiqi-Li/NaturalBench 3717258, naturalbench_vqa.py, Apache-2.0",
    read=read,
    gold=gold,
    read_answer=read_answer,
    figures=figures,
    headline="g_acc",
    check_groups=check_groups,
    note="Group figures are of groups with all four answers. The official rule takes the first of yes and no (A and B, "
    "the article 'a' included) for the answer; where the answer does not state it, it counts as guessed.",
)
