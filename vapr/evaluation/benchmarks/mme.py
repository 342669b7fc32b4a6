"""MME: 14 tasks of perception and cognition, two questions a picture, the one to be answered yes, the other no."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, yes_no_gold
from vapr.evaluation.benchmarks.groups import grouped, refuse_parts
from vapr.evaluation.benchmarks.rows import picture
from vapr.evaluation.scoring.answers import Policy, yes_or_no
from vapr.evaluation.scoring.figures import Figure, of_counts, share
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)


def read(path: Path) -> list[Question]:
    """Read the benchmark's folder, one folder a task, or that of ``eval_tool``, one ``<task>.txt`` a task.

    A task's folder holds texts of ``question<TAB>truth`` and pictures of the same names, or both in
    ``questions_answers_YN/`` and ``images/``; a line of ``<task>.txt`` is picture, question, truth, and, in a folder of
    results, the answer.
    """
    if not path.is_dir():
        raise UserError(f"{path}: a file; MME is a folder with one folder, or one .txt, for each task")
    questions: list[Question] = []
    for task in TASKS:
        lines = _of_folder(path / task) if (path / task).is_dir() else _of_tool(path / f"{task}.txt", 3)
        numbers: dict[str, int] = {}
        for where, name, cells, image in lines:
            numbers[name] = numbers.get(name, 0) + 1
            if cells[1].lower() not in ("yes", "no"):
                raise UserError(f"{where}: the truth is {cells[1][:40]!r}, not Yes or No")
            questions.append(
                Question(
                    benchmark="mme", id=f"{task}/{name}-{numbers[name]}", question=cells[0], answer=cells[1].lower(),
                    meta={"split": task, "image": f"{task}/{name}"}, images=(image,),
                )
            )  # fmt: skip
    if not questions:
        raise UserError(f"{path}: no folder and no .txt of a task of MME in it ({', '.join(TASKS[:3])}, ...)")
    check_ids(questions, path)
    return questions


Lines = Iterator[tuple[str, str, list[str], Path]]
"""Place, name of the picture without its ending, the cells behind it, and the picture."""


def _of_folder(folder: Path) -> Lines:
    texts = folder / "questions_answers_YN"
    texts = texts if texts.is_dir() else folder
    for file in sorted(texts.glob("*.txt")):
        name = next(
            (f"{file.stem}{end}" for end in (".jpg", ".png") if _lies(folder, f"{file.stem}{end}")), f"{file.stem}.jpg"
        )
        for where, cells in _tabbed(file, 2):
            yield where, file.stem, cells, picture(folder, name, ("images",))


def _lies(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / "images" / name).is_file()


def _of_tool(file: Path, least: int) -> Lines:
    if file.is_file():
        for where, cells in _tabbed(file, least):
            yield where, Path(cells[0]).stem, cells[1:], file.parent / file.stem / cells[0]


def _tabbed(file: Path, least: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of each line, the last with all that follows, however many tabs are in it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split("\t", 3)]
        if not line.strip():
            continue
        if len(cells) < least:
            has = ("question and truth", "picture, question and truth", "picture, question, truth and answer")[
                least - 2
            ]
            raise UserError(f"{file}:{number}: {len(cells)} cells between tabs, not {has}; is the line whole?")
        yield f"{file}:{number}", cells


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read a folder of ``eval_tool``: ``<task>.txt`` with picture, question, truth and answer in each line."""
    if not path.is_dir():
        raise UserError(f"{path}: a file; MME's results are a folder with one .txt for each task")
    by_content = {(q.meta["image"], _plain(q.question)): q for q in questions}
    predictions = []
    for task in TASKS:
        for where, name, cells, _ in _of_tool(path / f"{task}.txt", 4):
            question = by_content.get((f"{task}/{name}", _plain(cells[0])))
            if question is None:
                raise UserError(f"{where}: {cells[0][:60]!r} is no question of MME on {task}/{name}")
            if cells[1].lower() != question.answer:
                raise UserError(f"{where}: says that the truth is {cells[1]}, but it is {question.answer}")
            predictions.append(Prediction.of(question, cells[2]))
    return Results(predictions)


def _plain(question: str) -> str:
    """Return the question without space and without what is asked of the answer's form, which tools drop or double."""
    return "".join(question.lower().replace("please answer yes or no.", "").split())


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no. The official rule looks for "yes", then for "no", in the first four characters."""
    if policy != "official":
        return Reading(yes_or_no(prediction.prediction, policy))
    beginning = prediction.prediction.lower()[:4]
    said = next((word for word in ("yes", "no") if word in beginning), None)
    stated = re.match(r"\W*(?:yes|no)\b", prediction.prediction, re.IGNORECASE)
    return Reading(said, guessed=said is not None and stated is None)


def check_groups(rows: Sequence[Row]) -> None:
    """Refuse pictures of which not both questions are answered."""
    for row in rows:
        if not {"image", "image_id", "image_source"} & row.prediction.meta.keys():
            raise UserError(
                f"question '{row.prediction.id}' of mme: meta names no 'image', and the two questions of a picture "
                "count together; give the questions with --bench mme=PATH"
            )
    refuse_parts(grouped(rows, lambda row: row.prediction.image), 2, "MME", "picture")


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the official points: 100 x (accuracy + share of pictures all right) of each task, and their sums."""
    there = {row.prediction.split: row.prediction.id for row in rows}
    if strange := [split for split in there if split not in TASKS]:
        raise UserError(f"question '{there[strange[0]]}' of mme: 'split' is {strange[0]!r}, no task of MME")
    tasks = [task for task in TASKS if task in there]
    column = {task: 4 * number for number, task in enumerate(tasks)}
    pictures = list(grouped(rows, lambda row: row.prediction.image).values())
    # Of each task: right answers, answers, pictures all right, pictures with both answers.
    counts = np.zeros((len(pictures), 4 * len(tasks)))
    for picture_counts, group in zip(counts, pictures, strict=True):
        right, at = sum(row.right for row in group), column[str(group[0].prediction.split)]
        picture_counts[at : at + 4] = right, len(group), len(group) == 2 == right, len(group) == 2

    def points(these: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
        at = np.array([column[task] for task in these], dtype=int)
        return lambda c: 100 * (c[:, at] / c[:, at + 1] + c[:, at + 2] / c[:, at + 3]).sum(axis=1)

    parts = {"perception": PERCEPTION, "cognition": COGNITION}
    statistics = {
        name: points(those) for name, of in parts.items() if (those := [task for task in tasks if task in of])
    } | {task: points([task]) for task in tasks if len(tasks) > 1}
    both = share([len(group) == sum(row.right for row in group) for group in pictures if len(group) == 2])
    return {**of_counts(counts, np.arange(len(pictures)), statistics), "acc_plus": both}


MME = Benchmark(
    name="mme",
    title="MME",
    source="BradyFU/Awesome-Multimodal-Large-Language-Models, eval_tool/calculation.py (no licence: rule written anew)",
    read=read,
    gold=yes_no_gold,
    read_answer=read_answer,
    figures=figures,
    headline="perception",
    check_groups=check_groups,
    read_results=read_results,
    questions_in_results=read,
    note="Points are sums over the tasks that are there: 2,000 of perception and 800 of cognition at most. The "
    "official rule finds 'no' in the first four letters of 'I know', too; such readings count as guessed.",
)
