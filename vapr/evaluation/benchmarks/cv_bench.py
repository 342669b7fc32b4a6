"""CV-Bench: relations and counts in 2D, depth order and distance in 3D; 2,638 questions with options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Row, letter_gold, options_of
from vapr.evaluation.benchmarks.choices import ASK_FOR_LETTER, accuracies, official_letter, prompt_of, read_letter
from vapr.evaluation.benchmarks.rows import files_of, pictures, read_rows, require
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.averages import mean_of
from vapr.evaluation.scoring.figures import NONE, Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

SOURCES = ("ADE20K", "COCO", "Omni3D")


def read(path: Path) -> list[Question]:
    """Read ``test_2d.jsonl`` and ``test_3d.jsonl`` of a folder, or one of them; pictures lie in ``img/``."""
    files = files_of(path, ("test*.jsonl",), "nyu-visionx/CV-Bench on the hub")
    questions = [_question(row, where, file.parent) for file in files for where, row in read_rows(file)]
    check_ids(questions, path)
    return questions


def _question(row: Mapping[str, Any], where: str, folder: Path) -> Question:
    needed = ("idx", "type", "task", "question", "choices", "answer", "source")
    require(row, where, needed, "a question of CV-Bench")
    if row["source"] not in SOURCES:
        raise UserError(f"{where}: 'source' is {str(row['source'])[:40]!r}; CV-Bench has {', '.join(SOURCES)}")
    if not isinstance(row["choices"], list):
        raise UserError(f"{where}: 'choices' is {str(row['choices'])[:40]!r}, not a list")
    name = row.get("filename") or row.get("image")
    beside = f"img/{name}" if row.get("filename") and not row.get("image") else row.get("image")
    asked = f"{row['prompt']}\n{ASK_FOR_LETTER}" if row.get("prompt") else prompt_of(row["question"], row["choices"])
    meta = {"split": row["task"], "type": row["type"], "source": row["source"], "options": list(row["choices"])}
    return Question(
        benchmark="cv-bench", id=str(row["idx"]), question=asked, answer=row["answer"],
        meta=meta | ({"image": name} if name else {}), images=pictures(beside, folder),
    )  # fmt: skip


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read a letter. The official rule: the first character after the last "answer is" or "answer:"."""
    if policy != "official":
        return read_letter(prediction, policy)
    text = prediction.prediction.lower().strip()
    for mark in ("answer is", "answer is:", "answer:"):
        text = text.rpartition(mark)[2]
    said = text.strip().rstrip(".").lstrip("(").rstrip(")")
    return official_letter(prediction, said[:1], "ABCDEF"[: len(options_of(prediction)) or 6])


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the accuracy on each source of pictures, in 2D and 3D, and CV-Bench's own mean of the two.

    2D is the mean of ADE20K and COCO, however many questions each has; 3D is Omni3D.
    """
    found = accuracies(rows, lambda prediction: prediction.meta.get("source"))
    of = {source: found.get(source, NONE) for source in SOURCES}
    two = mean_of([of["ADE20K"], of["COCO"]])
    both = mean_of([of["ADE20K"], of["COCO"], of["Omni3D"]], [0.25, 0.25, 0.5])
    return {**found, "2D": two, "3D": of["Omni3D"], "cv_bench": both}


CV_BENCH = Benchmark(
    name="cv-bench",
    title="CV-Bench",
    source="nyu-visionx/CV-Bench, README, Apache-2.0; letters as in cambrian-mllm/cambrian a220b3f, Apache-2.0",
    read=read,
    gold=letter_gold,
    read_answer=read_answer,
    figures=figures,
    headline="cv_bench",
    note="The official rule takes the first character of any answer for a letter: 'because' is B.",
)
