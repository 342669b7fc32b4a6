"""What is handed over: a model, questions, and the call that another harness is started with."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.scoring.prediction import Question

ID = "vapr_id"
"""Column, and key in logs, that holds a question's id: what comes back is joined by it."""

PREFIX = "vapr:"
"""Before the id in tables of text, which pandas would read as a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model and the questions of one or more benchmarks.

    Attributes:
        model: folder of the model, with adapters merged.
        model_class: the tool's name for its kind; None to tell it from the model's config.json.
        questions: by name of the benchmark.
        folder: where everything is written.
        max_new_tokens: the longest answer.
    """

    model: Path
    model_class: str | None
    questions: Mapping[str, Sequence[Question]]
    folder: Path
    max_new_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Call:
    """How the tool is started: arguments of its Python, and what is added to the environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    notes: Sequence[str] = ()

    def text(self, python: str = "python") -> str:
        """Return the call as a line for a shell."""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{settings} {python} {shlex.join(self.arguments)}"


def model_kind(model: Path) -> str:
    """Return the ``model_type`` of a model's config.json.

    Raises:
        UserError: for a folder that is no whole model.
    """
    file = model / "config.json"
    if (model / "adapter_config.json").is_file() and not file.is_file():
        raise UserError(f"{model}: an adapter; merge it first with vapr export, for other tools load whole models")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{model}: no config.json with a model_type; give the folder of a whole model") from None


def class_of(task: Task, classes: Mapping[str, str], tool: str) -> str:
    """Return the tool's name for the model's kind.

    Raises:
        UserError: if it is not known.
    """
    if task.model_class is not None:
        return task.model_class
    kind = model_kind(task.model)
    if kind not in classes:
        raise UserError(
            f"{task.model}: which class of {tool} runs a {kind} is not known here (known: {', '.join(classes)}); "
            "name it with --model-class"
        )
    return classes[kind]


def content_of(image: Path | bytes) -> bytes:
    """Return the content of a picture.

    Raises:
        UserError: if it cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"image '{image}' cannot be read ({error.strerror})") from None
