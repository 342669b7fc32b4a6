"""Hand over: write the task, run the tool in its own environment if asked, and take its answers back."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vapr.errors import UserError
from vapr.evaluation.handover import lmms_eval, vlmevalkit
from vapr.evaluation.handover.task import Call, Task
from vapr.evaluation.readers.open import open_answers, open_benchmark
from vapr.evaluation.readers.pictures import require_images
from vapr.evaluation.scoring.prediction import Prediction, write_predictions

Tool = Literal["lmms-eval", "vlmevalkit"]
TOOLS = {"lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit}


def prepare(
    model: Path, benches: Sequence[str], tool: Tool, folder: Path, *,
    model_class: str | None = None, max_new_tokens: int = 512,
) -> Call:  # fmt: skip
    """Write what the tool needs to answer questions about local files, without a network.

    Args:
        model: folder of a whole model.
        benches: ``NAME=PATH`` of benchmarks and their questions.
        tool: which.
        folder: where it is written.
        model_class: the tool's name for the model's kind, where it is not told from the model.
        max_new_tokens: the longest answer.

    Raises:
        UserError: for what cannot be handed over, missing pictures included.
    """
    if not model.is_dir():
        raise UserError(f"{model}: no such folder; other tools run offline, so fetch the model first")
    questions = {}
    for bench in benches:
        benchmark, asked = open_benchmark(bench)
        if asked is None:
            raise UserError(f"--bench {bench}: which questions? Give --bench {bench}=PATH with their file or folder")
        if benchmark.name in questions:
            raise UserError(f"--bench {benchmark.name} is given twice; put its files into one folder")
        require_images(asked)
        questions[benchmark.name] = asked
    task = Task(model=model, model_class=model_class, questions=questions, folder=folder, max_new_tokens=max_new_tokens)
    return TOOLS[tool].write(task)


def run(call: Call, python: Path) -> None:
    """Run a call with a tool's own Python; what it prints is shown.

    Raises:
        UserError: if that is no Python, or the tool fails.
    """
    if python.is_dir():
        python = python / "bin" / "python"
    if not python.exists():
        raise UserError(f"--python {python}: no such file; give the Python of the environment that the tool is in")
    try:
        ended = subprocess.run([str(python), *call.arguments], env={**os.environ, **call.environment}, check=False)
    except OSError as error:
        raise UserError(f"--python {python}: cannot be started ({error.strerror})") from None
    if ended.returncode != 0:
        raise UserError(
            f"the tool ended with code {ended.returncode}; its last lines say why: {call.text(str(python))}"
        )


def take_back(
    benches: Sequence[str], tool: Tool, folder: Path, *, partial: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Read the answers that the tool logged under ``folder``, and write them there as ``predictions.jsonl``.

    Raises:
        UserError: if it logged none, or not all.
    """
    predictions: list[Prediction] = []
    for bench in benches:
        benchmark, questions = open_benchmark(bench, pictures=False)
        found = TOOLS[tool].logs(folder, benchmark.name)
        if not found:
            way_out = "it left a pickle because XlsxWriter is missing: install that there, and run it again"
            if not any((folder / "logs").rglob("*.pkl")):
                way_out = "run it first"
            raise UserError(f"{folder / 'logs'}: {tool} logged no answers to {benchmark.name}; {way_out}")
        answered, notes, _ = open_answers(found[-1], benchmark, questions, partial=partial)
        predictions += answered
        for note in notes:
            say(note)
    file = folder / "predictions.jsonl"
    write_predictions(file, predictions)
    return file
