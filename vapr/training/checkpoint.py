"""Save and resume: safetensors and JSON, whole or not at all.

``checkpoints/step-000100/`` holds ``weights.safetensors`` (fp32 master weights of what is trained),
``optimizer.safetensors``, ``state.json`` and ``SHA256SUMS``. Where each process holds a part of the state, it writes a
file of its own, such as ``weights-00001-of-00002.safetensors``; any number of processes reads any number of files. A
folder of that name is complete; one ending in ``.tmp`` never counts, and one that was damaged since is set aside as
``.damaged``.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from vapr.families import FAMILIES
from vapr.model.policy import Policy, load_base
from vapr.training.checksums import DamagedCheckpoint, check_checksums, checksums, write_checksums
from vapr.training.disk_room import check_room_for_one
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

    Raises:
        UserError: if the disk has no room for it, before anything is written.
    """
    ranks = engine.ranks
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")

    def write_share() -> dict[str, str]:
        part = f"-{ranks.rank:05d}-of-{ranks.size:05d}" if engine.is_sharded else ""
        files = [temporary / f"{kind}{part}.safetensors" for kind in ("weights", "optimizer")]
        _save_tensors(weights, files[0])
        _save_tensors(moments | random, files[1])
        if ranks.is_first:
            files.append(temporary / "state.json")
            write_json(files[-1], {"step": step, **state})
        return checksums(files)

    def complete() -> None:
        write_checksums(temporary, {name: known for part in sums for name, known in part.items()})
        _sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        delete_old(run_dir, keep)

    try:
        ranks.in_turn(lambda: _make_empty(temporary, engine) if ranks.is_first else None)
        weights, moments = engine.state()
        random = _random_state() if ranks.is_first else {}
        written = ranks.agree(lambda: write_share() if engine.is_sharded or ranks.is_first else {})
        sums = ranks.gather_objects(written)
        ranks.agree(lambda: complete() if ranks.is_first else None)
    except (OSError, UserError):
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint must not keep a full disk full
        raise
    return folder


def _make_empty(folder: Path, engine: AnyEngine) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    check_room_for_one(folder.with_suffix(""), engine)
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


def newest_whole(run_dir: Path, say: Callable[[str], None], *, writes: bool) -> Path | None:
    """Return the folder of the newest whole checkpoint; None if there is none.

    Damaged ones are set aside where ``writes`` (on rank 0, which comes first), so that none of them counts among the
    newest that are kept; ``say`` is called with a line for each.

    Raises:
        UserError: if one cannot be read for lack of permissions.
    """
    for folder in reversed(list_checkpoints(run_dir)):
        if not writes:
            return folder
        try:
            check_whole(folder)
            return folder
        except DamagedCheckpoint as error:
            aside = folder.with_suffix(".damaged")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            say(f"{'checkpoint':<10} {error}; set aside as {aside.name} (delete it at will), the one before it is used")
    return None


def check_whole(folder: Path) -> None:
    """Read a checkpoint's files once.

    Raises:
        DamagedCheckpoint: if a file is missing, cut short or changed.
        UserError: if it cannot be read for lack of permissions.
    """
    try:
        is_known_whole = check_checksums(folder)
        weights, moments = SavedTensors(folder, "weights"), SavedTensors(folder, "optimizer")
        json.loads((folder / "state.json").read_text())["step"], moments["random.cpu"]
        if not is_known_whole:  # nothing may be half loaded when it turns out to be damaged
            for saved in (weights, moments):
                for name in saved:
                    saved[name]
    except PermissionError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpoint(f"{folder}: cannot be read ({one_line(error)})") from None


def load(folder: Path, engine: AnyEngine) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state from a whole checkpoint; return the saved state.

    Every rank calls it.

    Raises:
        UserError: if the checkpoint belongs to another model, or to another kind of optimizer.
    """
    weights, moments = SavedTensors(folder, "weights"), SavedTensors(folder, "optimizer")
    state = dict(json.loads((folder / "state.json").read_text()))
    found = {name: weights.shape(name) if name in weights else None for name in engine.shapes}
    if other := next((name for name, shape in engine.shapes.items() if found[name] != shape), None):
        there = "is missing" if found[other] is None else f"has shape {found[other]}"
        raise UserError(
            f"{folder}: the checkpoint belongs to another model: '{other}' {there}, and {engine.shapes[other]} is "
            "wanted; give another run_dir"
        )
    try:
        engine.load_state(weights, moments, state["step"])
    except ValueError as error:
        raise UserError(f"{folder}: the checkpoint does not fit optim.kind: {one_line(error)}") from None
    torch.set_rng_state(moments["random.cpu"])
    if "random.cuda" in moments and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments["random.cuda"])
    return state


def save_final(
    policy: Policy, engine: AnyEngine, folder: Path, write_card: Callable[[Path], None] | None = None
) -> None:
    """Write the aligned model (or its PEFT adapter) with tokenizer and processor files, whole or not at all.

    Every rank calls it; the first one writes. ``write_card`` writes a model card into the folder it is given.
    """

    weights = engine.whole_weights(policy)

    def write() -> None:
        with new_folder(folder) as temporary:
            if policy.adapters is not None:
                save_adapter(policy, temporary, weights)
            else:
                save_model(policy, temporary, weights)
            if write_card is not None:
                write_card(temporary)

    engine.ranks.agree(lambda: write() if engine.ranks.is_first else None)


def save_start(policy: Policy, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the policy as training began, with an adapter merged into it: the base of the adapters trained on it.

    Of a quantised policy the unquantised weights are written, which are read and merged again for that.
    """
    if policy.quantized is not None:
        base, _ = load_base(policy.family, policy.source, str(policy.folder), policy.dtype)
        policy = dataclasses.replace(policy, base=base, adapters=None, quantized=None)
        weights = base.state_dict()
    with new_folder(folder) as temporary:
        save_model(policy, temporary, weights)


def save_model(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights below the adapters, and processor files, as a Hugging Face folder.

    ``weights`` are the policy's by their names, where it does not hold them itself.
    """
    assert policy.quantized is None
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in (policy.base.state_dict() if weights is None else weights).items()
        if ".lora_" not in name
    }
    with _as_os_error(folder):
        original = FAMILIES[policy.family].original_format
        policy.base.save_pretrained(folder, state_dict=weights, save_original_format=original)
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
