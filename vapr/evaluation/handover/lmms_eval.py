"""Write questions as tasks of lmms-eval, which runs them offline in an environment of its own."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vapr.cache import written_whole
from vapr.errors import UserError
from vapr.evaluation.handover.task import ID, Call, Task, class_of, content_of
from vapr.evaluation.scoring.prediction import Question

CLASSES = {"qwen2_5_vl": "qwen2_5_vl", "qwen2_vl": "qwen2_vl", "llava": "llava_hf"}
"""Names of lmms-eval's models by ``model_type``."""

MORE = {"llava_hf": ",device_map=auto"}
"""Arguments of a model that it does not run without: transformers refuses this one's empty default."""

ROWS_AT_A_TIME = 64


def write(task: Task) -> Call:
    """Write tasks and data under ``task.folder``, and return the call that answers them.

    The data lies there as parquet, so that nothing is fetched. lmms-eval takes a model for another one by its path
    alone, so its answers are kept apart by the path, which is given in full, and no cache of answers is asked for.

    Raises:
        UserError: for a model of an unknown kind, or a picture that cannot be read.
    """
    model_class = class_of(task, CLASSES, "lmms-eval")
    for name, questions in task.questions.items():
        data = (task.folder / "data" / name).absolute()
        write_parquet(data / "test-00000-of-00001.parquet", questions)
        folder = task.folder / "tasks" / task_name(name)
        with written_whole(folder / "lmms_task.py") as file:
            file.write(importlib.resources.files(__package__).joinpath("lmms_task.txt").read_bytes())
        with written_whole(folder / f"{task_name(name)}.yaml") as file:
            file.write(_task_yaml(name, data, task.max_new_tokens).encode())
    model = f"pretrained={task.model.absolute()}{MORE.get(model_class, '')}"
    arguments = [
        "-m", "lmms_eval", "--model", model_class, "--model_args", model,
        "--tasks", ",".join(map(task_name, task.questions)), "--include_path", str((task.folder / "tasks").absolute()),
        "--batch_size", "1", "--log_samples", "--output_path", str((task.folder / "logs").absolute()),
    ]  # fmt: skip
    return Call(arguments, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})


def logs(folder: Path, name: str) -> list[Path]:
    """Return the logs that lmms-eval wrote of a benchmark, the newest last."""
    return sorted((folder / "logs").rglob(f"*_samples_{task_name(name)}.jsonl"), key=lambda file: file.name)


def task_name(name: str) -> str:
    """Return the name of a benchmark's task."""
    return f"vapr_{name.replace('-', '_')}"


def _task_yaml(name: str, data: Path, max_new_tokens: int) -> str:
    """Return a task's configuration; functions are named with lmms-eval's own tag, which YAML must not quote."""
    head: dict[str, Any] = {
        "task": task_name(name), "dataset_path": str(data), "dataset_kwargs": {}, "test_split": "test",
        "output_type": "generate_until", "doc_to_target": "answer", "metadata": [{"version": 1.0}],
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "temperature": 0, "do_sample": False, "num_beams": 1},
    }  # fmt: skip
    return yaml.safe_dump(head, sort_keys=False) + (
        "doc_to_visual: !function lmms_task.visuals\n"
        "doc_to_text: !function lmms_task.text\n"
        "doc_to_messages: !function lmms_task.messages\n"
        "process_results: !function lmms_task.results\n"
        "metric_list:\n"
        "  - metric: answered\n"
        "    aggregation: !function lmms_task.share_answered\n"
        "    higher_is_better: true\n"
    )


def write_parquet(file: Path, questions: Sequence[Question]) -> None:
    """Write questions with their pictures, a few at a time, in a form that the datasets library decodes."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("handing over to lmms-eval needs pyarrow; pip install 'vapr[data]'") from None
    columns = [f"image_{number}" for number in range(max((len(q.images) for q in questions), default=0))]
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {ID: pyarrow.string(), "question": pyarrow.string(), "answer": pyarrow.string()}
    features: dict[str, Any] = {key: {"dtype": "string", "_type": "Value"} for key in kinds}
    features |= {column: {"_type": "Image"} for column in columns}
    schema = pyarrow.schema([*kinds.items(), *((column, picture) for column in columns)])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with written_whole(file) as out, parquet.ParquetWriter(out, schema) as writer:
        for start in range(0, len(questions), ROWS_AT_A_TIME):
            rows = [_row(question, columns) for question in questions[start : start + ROWS_AT_A_TIME]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _row(question: Question, columns: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {ID: question.id, "question": question.question, "answer": answer_text(question)}
    for number, column in enumerate(columns):
        shown = number < len(question.images)
        row[column] = {"bytes": content_of(question.images[number]), "path": None} if shown else None
    return row


def answer_text(question: Question) -> str:
    """Return the truth as text: tools log it beside the answer."""
    return question.answer if isinstance(question.answer, str) else json.dumps(question.answer)
