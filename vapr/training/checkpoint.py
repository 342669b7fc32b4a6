"""Save and resume: safetensors and JSON, whole or not at all.

``checkpoints/step-000100/`` holds ``weights.safetensors`` (fp32 master weights of what is trained),
``optimizer.safetensors`` and ``state.json``. Where each process holds a part of the state, it writes a file of its own,
such as ``weights-00001-of-00002.safetensors``; any number of processes reads any number of files. A folder of that name
is complete; one ending in ``.tmp`` never counts.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vapr.batches.model_folder import copy_processor_files
from vapr.cache import give_ordinary_permissions, write_json
from vapr.config import CheckpointConfig
from vapr.errors import UserError, one_line
from vapr.model.policy import Policy
from vapr.training.engine_deepspeed import AnyEngine

LOWER_IS_BETTER = ("eval/loss",)


def save(run_dir: Path, step: int, engine: AnyEngine, state: dict[str, Any], keep: CheckpointConfig) -> Path:
    """Write a checkpoint and delete those that ``keep`` does not ask for.

    Every rank calls it, and writes its share of weights and optimizer state; the folder appears when all have.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        engine: whose weights and optimizer state are saved.
        state: JSON data to get back from :func:`load`.
        keep: how many of the newest stay, and whether the best does.
    """
    ranks = engine.ranks
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")

    def write_share() -> None:
        part = f"-{ranks.rank:05d}-of-{ranks.size:05d}" if engine.is_sharded else ""
        _save_tensors(weights, temporary / f"weights{part}.safetensors")
        _save_tensors(moments | random, temporary / f"optimizer{part}.safetensors")
        if ranks.is_first:
            write_json(temporary / "state.json", {"step": step, **state})

    try:
        ranks.in_turn(lambda: _make_empty(temporary) if ranks.is_first else None)
        weights, moments = engine.state()
        random = _random_state() if ranks.is_first else {}
        ranks.agree(lambda: write_share() if engine.is_sharded or ranks.is_first else None)
    except (OSError, UserError):
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint must not keep a full disk full
        raise
    if ranks.is_first:
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        delete_old(run_dir, keep)
    ranks.wait()
    return folder


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def delete_old(run_dir: Path, keep: CheckpointConfig) -> None:
    """Delete all checkpoints but the ``keep.keep`` newest and, with ``keep.best``, the best."""
    best = best_checkpoint(run_dir, keep.best_metric) if keep.best else None
    for old in list_checkpoints(run_dir)[: -keep.keep]:
        if best is None or old != best[0]:
            shutil.rmtree(old)


def best_checkpoint(run_dir: Path, metric: str) -> tuple[Path, float] | None:
    """Find the checkpoint whose held-out figure in metrics.jsonl is best, of equal ones the first; None: none has one.

    Only checkpoints that are still there count.
    """
    rows = _rows_with(run_dir, metric)
    figures = {step: values[metric] for step, values in rows.items() if values[metric] is not None}
    folders = list_checkpoints(run_dir)
    scored = [(folder, figures[step]) for folder in folders if (step := step_of(folder)) in figures]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(scored, key=lambda entry: sign * entry[1], default=None)


def evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Read the held-out figures of a run: step -> ``eval/...`` -> value."""
    return _rows_with(run_dir, "eval/loss")


def _rows_with(run_dir: Path, metric: str) -> dict[int, dict[str, Any]]:
    """Read the objects of metrics.jsonl that hold a figure, by step."""
    found = {}
    with contextlib.suppress(OSError):
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            if f'"{metric}"' in line:
                with contextlib.suppress(ValueError):  # the half-written last line of a killed run
                    entry = json.loads(line)
                    found[entry["step"]] = entry
    return found


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of whole checkpoints, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if is_checkpoint(f)), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Tell whether the name is a whole checkpoint's."""
    return re.fullmatch(r"step-\d{6,}", folder.name) is not None


def step_of(folder: Path) -> int:
    """Return the optimizer steps done when the checkpoint was written."""
    return int(folder.name[5:])


def read_state(folder: Path) -> dict[str, Any]:
    """Read what was saved beside a checkpoint's weights. Raises UserError if it is damaged."""
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'}: cannot be read ({one_line(error)})") from None


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, read one at a time from however many files hold them.

    Args:
        folder: the checkpoint.
        kind: ``weights`` or ``optimizer``.

    Raises:
        OSError, ValueError, safetensors.SafetensorError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        files = sorted(folder.glob(f"{kind}*.safetensors"))
        if not files:
            raise ValueError(f"{kind}.safetensors is missing")
        if (parts := re.search(r"-of-(\d+)$", files[0].stem)) and len(files) != int(parts[1]):
            raise ValueError(f"{len(files)} of {int(parts[1])} files of {kind} are there")
        self._file_of = {name: file for path in files for file in [safe_open(path, "pt")] for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())


def load(folder: Path, engine: AnyEngine) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state; return the saved state.

    Raises:
        UserError: if the checkpoint is damaged or belongs to another model.
    """
    try:
        weights, moments = SavedTensors(folder, "weights"), SavedTensors(folder, "optimizer")
        state = json.loads((folder / "state.json").read_text())
        if shapes := [name for name, shape in engine.shapes.items() if weights.shape(name) != shape]:
            raise ValueError(f"'{shapes[0]}' has another shape")
        engine.load_state(weights, moments, state["step"])
        torch.set_rng_state(moments["random.cpu"])
        if "random.cuda" in moments and torch.cuda.is_available():
            torch.cuda.set_rng_state(moments["random.cuda"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder}: checkpoint cannot be used ({reason}); delete it to resume from the one before"
        ) from None
    return state


def save_final(policy: Policy, engine: AnyEngine, folder: Path) -> None:
    """Write the aligned model (or its PEFT adapter) with tokenizer and processor files, whole or not at all.

    Every rank calls it; the first one writes.
    """

    weights = engine.whole_weights(policy)

    def write() -> None:
        with new_folder(folder) as temporary:
            if policy.adapters is not None:
                save_adapter(policy, temporary, weights)
            else:
                save_model(policy, temporary, weights)

    engine.ranks.agree(lambda: write() if engine.ranks.is_first else None)


def save_start(policy: Policy, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the policy as training began, with an adapter merged into it: the base of the adapters trained on it."""
    with new_folder(folder) as temporary:
        save_model(policy, temporary, weights)


def save_model(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights below the adapters, and processor files, as a Hugging Face folder.

    ``weights`` are the policy's by their names, where it does not hold them itself.
    """
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in (policy.base.state_dict() if weights is None else weights).items()
        if ".lora_" not in name
    }
    with _as_os_error(folder):
        policy.base.save_pretrained(folder, state_dict=weights)
    copy_processor_files(policy.folder, folder)


def save_adapter(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the PEFT adapter, and processor files; ``weights`` as in :func:`save_model`."""
    assert policy.adapters is not None
    with _as_os_error(folder):
        named = None if weights is None else {f"base_model.model.{name}": weight for name, weight in weights.items()}
        policy.adapters.save_pretrained(str(folder), state_dict=named)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"].sort()  # PEFT writes a set, in an order of the process's own
    write_json(folder / "adapter_config.json", settings)
    copy_processor_files(policy.folder, folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into that appears as ``folder``, with ordinary permissions, when it is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            _finish(file)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync_folder(folder.parent)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with _as_os_error(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    _finish(path)


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """safetensors has an error of its own for a full disk."""
    try:
        yield
    except safetensors.SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


def _random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def _finish(path: Path) -> None:
    """Make a written file last, and readable by whom the umask allows."""
    give_ordinary_permissions(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
