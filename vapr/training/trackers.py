"""Send the metrics of a run to where people watch them: TensorBoard, Weights & Biases, Trackio, MLflow.

accelerate's trackers start a new run each time; these go on with the curves of a resumed one.
"""

import importlib.util
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vapr.cache import written_whole
from vapr.config import Config, TrackerName
from vapr.errors import UserError, one_line

PROJECT = "vapr"
"""Project or experiment of the runs, unless WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME says another."""


class Tracker(Protocol):
    """A place that metrics go to besides metrics.jsonl."""

    cuts_off: bool
    """Whether a resumed run's tracker forgets what was sent after the checkpoint. If not, it must not be sent twice."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise UserError if the library of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out")


def open_trackers(config: Config, run_dir: Path, resume_step: int | None) -> list[Tracker]:
    """Open the trackers that the config names.

    Args:
        config: the run's config, which some trackers show.
        run_dir: folder for what a tracker keeps on disk, and for ``trackers.json``, with which a resumed run finds its
            curves.
        resume_step: step after which the run goes on; None for a new run.

    Raises:
        UserError: if a tracker refuses to start, because nobody is logged in for example.
    """
    ids = _ids_of(run_dir, new=resume_step is None)
    trackers: list[Tracker] = []
    for name in config.trackers:
        if name == "tensorboard":
            trackers.append(_TensorBoard(run_dir, resume_step))
        elif name == "mlflow":
            trackers.append(_MLflow(config, run_dir, ids))
        else:
            trackers.append(_Hosted(name, config, run_dir, ids))
    with written_whole(run_dir / "trackers.json") as file:
        file.write(json.dumps(ids).encode())
    return trackers


def _ids_of(run_dir: Path, new: bool) -> dict[str, str]:
    """Return the ids of a run by tracker; ``all`` is the one that vapr gives it."""
    try:
        ids: dict[str, str] = {} if new else json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    return {"all": uuid.uuid4().hex[:21], **ids}


class _TensorBoard:
    cuts_off = True

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import scalar

        self._summary, self._scalar = Summary, scalar
        self._board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=(resume_step or 0) + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        # One event for all of them: add_scalar makes one each, and its thread takes the training's turn every time.
        figures = [figure for name, value in values.items() for figure in self._scalar(name, value).value]
        self._board.file_writer.add_summary(self._summary(value=figures), step)

    def close(self) -> None:
        self._board.close()


class _Hosted:
    """Weights & Biases, and Trackio, which took over its interface."""

    cuts_off = False

    def __init__(self, name: TrackerName, config: Config, run_dir: Path, ids: dict[str, str]) -> None:
        self._library = importlib.import_module(name)
        title = run_dir.resolve().name
        options: dict[str, Any] = {
            "wandb": {"name": title, "id": ids["all"], "dir": str(run_dir)},
            "trackio": {"name": f"{title}-{ids['all'][:6]}"},  # goes by the name alone
        }[name]
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        try:
            self._run = self._library.init(project=project, resume="allow", config=config.as_dict(), **options)
        except _errors_of(name) as error:
            raise UserError(f"trackers: {name} did not start ({one_line(error)})") from None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._library.finish()


class _MLflow:
    cuts_off = False

    def __init__(self, config: Config, run_dir: Path, ids: dict[str, str]) -> None:
        import mlflow

        self._mlflow = mlflow
        try:
            if "mlflow" in ids:
                mlflow.start_run(run_id=ids["mlflow"])
                return
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            ids["mlflow"] = mlflow.start_run(run_name=run_dir.resolve().name).info.run_id
            mlflow.log_dict(config.as_dict(), "config.json")
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"trackers: mlflow did not start ({one_line(error)})") from None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.end_run()


def _errors_of(name: TrackerName) -> tuple[type[Exception], ...]:
    """Return the errors that a library raises if it cannot start."""
    if name == "wandb":
        from wandb.errors import Error

        return (Error,)
    return (OSError, RuntimeError, ValueError)
