"""Write questions as data sets of VLMEvalKit, which runs them offline in an environment of its own."""

import base64
import csv
import importlib.resources
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.cache import write_json, written_whole
from vapr.evaluation.handover.lmms_eval import answer_text
from vapr.evaluation.handover.task import ID, PREFIX, Call, Task, class_of, content_of
from vapr.evaluation.scoring.prediction import Question

CLASSES = {"qwen2_5_vl": "Qwen2VLChat", "qwen2_vl": "Qwen2VLChat"}
"""Names of VLMEvalKit's models by ``model_type``. Its LLaVA class wants weights in the format of LLaVA's authors."""

QWEN = {"use_custom_prompt": False, "do_sample": False}
"""The prompt is vapr's, and answers are greedy."""


def write(task: Task) -> Call:
    """Write tables and configuration under ``task.folder``, and return the call that answers them.

    The tables have names of their own: under a name that VLMEvalKit knows it compares the MD5, and fetches its own file
    where that differs.

    Raises:
        UserError: for a model of an unknown kind, or a picture that cannot be read.
    """
    model_class = class_of(task, CLASSES, "VLMEvalKit")
    without = 0
    for name, questions in task.questions.items():
        write_tsv(task.folder / "LMUData" / f"{data_name(name)}.tsv", questions)
        without += sum(not question.images for question in questions)
    model: dict[str, Any] = {"class": model_class, "model_path": str(task.model.absolute())}
    if model_class == "Qwen2VLChat":
        model |= {"max_new_tokens": task.max_new_tokens, **QWEN}
    names = list(map(data_name, task.questions))
    config = {
        "model": {task.model.name: model},
        "data": {name: {"class": "CustomVQADataset", "dataset": name} for name in names},
    }
    write_json(task.folder / "config.json", config)
    start = task.folder / "start_vlmevalkit.py"
    with written_whole(start) as file:
        file.write(importlib.resources.files(__package__).joinpath("start_vlmevalkit.txt").read_bytes())
    arguments = [
        str(start.absolute()), "--config", str((task.folder / "config.json").absolute()), "--mode", "infer",
        "--work-dir", str((task.folder / "logs").absolute()),
    ]  # fmt: skip
    notes = [f"{without:,} questions have no picture; VLMEvalKit leaves them out"] if without else []
    return Call(arguments, {"LMUData": str((task.folder / "LMUData").absolute()), "HF_HUB_OFFLINE": "1"}, notes)


def logs(folder: Path, name: str) -> list[Path]:
    """Return the tables of answers that VLMEvalKit wrote of a benchmark, the newest last."""
    found = (
        file for ending in ("xlsx", "tsv", "json") for file in (folder / "logs").rglob(f"*_{data_name(name)}.{ending}")
    )
    return sorted(found, key=lambda file: file.stat().st_mtime)


def data_name(name: str) -> str:
    """Return the name of a benchmark's table, which VLMEvalKit must not know."""
    return f"vapr_{name.replace('-', '_')}_openended"


def write_tsv(file: Path, questions: Sequence[Question]) -> None:
    """Write questions with their pictures in base64; a picture's second row names the index of its first."""
    first: dict[Any, int] = {}
    with written_whole(file) as out:
        text = io.TextIOWrapper(out, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer", ID])
        for index, question in enumerate(questions):
            images = tuple(question.images)
            writer.writerow(
                [index, _pictures(images, index, first), question.question, answer_text(question), PREFIX + question.id]
            )
        text.detach()


def _pictures(images: tuple[Path | bytes, ...], index: int, first: dict[Any, int]) -> str:
    if images in first:
        return str(first[images])
    if images and all(isinstance(image, Path) for image in images):
        first[images] = index
    coded = [base64.b64encode(content_of(image)).decode() for image in images]
    return json.dumps(coded) if len(coded) > 1 else "".join(coded)
