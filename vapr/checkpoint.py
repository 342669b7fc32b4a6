"""Save, resume and export: safetensors and JSON, whole or not at all.

``checkpoints/step-000100/`` holds ``weights.safetensors`` (fp32 master weights of what is trained),
``optimizer.safetensors`` and ``state.json``. A folder of that name is complete; one ending in ``.tmp`` never counts.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vapr.cache import written_whole
from vapr.config import Config
from vapr.engine import Engine
from vapr.errors import UserError
from vapr.model import FAMILIES, Policy, load_model_config

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip


def save(run_dir: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and delete all but the ``keep`` newest.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        engine: whose weights and optimizer state are saved.
        state: JSON data to get back from :func:`load`.
    """
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    weights, moments = engine.state()
    try:
        _save_tensors(weights, temporary / "weights.safetensors")
        _save_tensors({**moments, **_random_state()}, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"step": step, **state})
    except (OSError, UserError):
        shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint must not keep a full disk full
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if re.fullmatch(r"step-\d{6,}", f.name)), key=lambda f: int(f.name[5:]))


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state; returns the saved state.

    Raises:
        UserError: if the checkpoint is damaged or belongs to another model.
    """
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        state = json.loads((folder / "state.json").read_text())
        if shapes := [n for n, master in engine.masters.items() if weights[n].shape != master.shape]:
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


def save_final(policy: Policy, folder: Path) -> None:
    """Write the aligned model (or its PEFT adapter) with tokenizer and processor files, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    if policy.adapters is not None:
        with _as_os_error(temporary):
            policy.adapters.save_pretrained(str(temporary))
        readme = temporary / "README.md"  # PEFT's empty model card
        readme.unlink(missing_ok=True)
        settings = json.loads((temporary / "adapter_config.json").read_text())
        settings["target_modules"].sort()  # PEFT writes a set, in an order of the process's own
        write_json(temporary / "adapter_config.json", settings)
    else:
        with _as_os_error(temporary):
            policy.base.save_pretrained(temporary)
    copy_processor_files(policy.folder, temporary)
    _publish(temporary, folder)


def export(run_dir: Path, out: Path, *, adapter: bool = False) -> None:
    """Write a finished run as a Hugging Face folder: merged weights, or with ``adapter`` the PEFT adapter.

    Raises:
        UserError: if the run has no final model, or ``out`` holds something already.
    """
    final = run_dir / "final"
    if not final.is_dir():
        newest = list_checkpoints(run_dir)
        hint = (
            f"its newest checkpoint is {newest[-1].name}; finish it with vapr train --resume"
            if newest
            else "train first"
        )
        raise UserError(f"{run_dir}: no finished run in it (no final/ folder); {hint}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder with --out")
    is_adapter = (final / "adapter_config.json").is_file()
    if adapter and not is_adapter:
        raise UserError(f"{run_dir}: trained without LoRA, so there is no adapter; leave --adapter out")
    temporary = out.with_name(out.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    if is_adapter and not adapter:
        _merge(run_dir, final, temporary)
    else:
        shutil.copytree(final, temporary)
    _publish(temporary, out)


def _merge(run_dir: Path, final: Path, temporary: Path) -> None:
    dtype = getattr(torch, Config.load(run_dir / "config.yaml").policy.dtype)
    source = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    model_class, _, _ = FAMILIES[load_model_config(source).model_type]
    base = model_class.from_pretrained(source, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(base, str(final)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(temporary)
    copy_processor_files(final, temporary)


def copy_processor_files(source: Path, target: Path) -> None:
    """Copy tokenizer, image processor and chat template as they are."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. Raises UserError if it cannot be written."""
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def _publish(temporary: Path, folder: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync_folder(folder.parent)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with _as_os_error(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    _sync(path)


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


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
