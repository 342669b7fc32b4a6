"""The run's folder: who may write to it, what a resumed run must agree with, what describes it."""

import difflib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from vapr.cache import write_json
from vapr.config import Config
from vapr.errors import UserError
from vapr.model.policy import Policy
from vapr.model.policy_id import cache_root, weights_hash
from vapr.training import checkpoint

MAY_CHANGE = (
    "run_dir", "checkpoint", "reference", "features", "data.eval", "data.workers", "data.too_long", "data.on_bad_row",
    "probe", "trackers", "packing.max_tokens", "policy.checkpointing", "parallel",
    "policy.gradient_checkpointing",  # in the config.yaml of an older run
)  # fmt: skip
"""Keys (and what lies below them) that a resumed run may set differently."""

NEW_KEYS = {"policy": {"base_weights": "bfloat16"}, "optim": {"kind": "adamw"}}
NEW_LOSS_KEYS = {
    "margin_weight": 0.0, "delta": 0.0, "consistency": 1e-4,
    "second_image": {"make": "crop", "area": None, "steps": 500},
}  # fmt: skip
"""What keys, and those of each loss, mean that the config.yaml of an older run lacks."""

START = "policy"
"""Folder of the merged policy, in a run with LoRA that began from an adapter."""


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()
# A lock is the trainer's, not its workers', who would keep it when the trainer is killed.
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _held])


class RunDir:
    """Opens ``config.run_dir`` for one process; the lock goes with the process, however it ends.

    With ``writes=False`` nothing is locked, checked or written: on all ranks but the first.

    Raises:
        UserError: if it holds a run and ``resume`` is false, is in use, or was started with another config.
    """

    def __init__(self, config: Config, *, resume: bool, writes: bool = True) -> None:
        self.path = Path(config.run_dir)
        self.writes = writes
        if not writes:
            return
        if resume and not self.path.exists():
            raise UserError(
                f"run_dir: {self.path} does not exist, so there is nothing to resume; {_runs_beside(self.path)}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run_dir: {self.path} cannot be written ({error.strerror})") from None
        _held.add(self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"run_dir: {self.path} is in use by another vapr process") from None
        try:
            self._check(config, resume)
        except UserError:
            self._lock.close()
            raise
        for left in self.path.glob("*.tmp"):
            if left.is_file():  # half a page or list of a process that was killed
                left.unlink()

    def _check(self, config: Config, resume: bool) -> None:
        if not self.holds_run:
            return
        if not resume:
            raise UserError(f"run_dir: {self.path} holds a run; continue it with --resume, or give another run_dir")
        if difference := _difference(self.path / "config.yaml", config):
            raise UserError(f"run_dir: {self.path} was started with {difference}; set it back, or give another run_dir")

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *error: object) -> None:
        if self.writes:
            self._lock.close()

    @property
    def holds_run(self) -> bool:
        """Tell whether at least one step was taken here."""
        metrics = self.path / "metrics.jsonl"
        begun = False
        if metrics.is_file():
            with metrics.open("rb") as file:
                begun = any(b'"loss"' in line for line in file)  # a probe comes before the first step
        return begun or self.finished or bool(checkpoint.list_checkpoints(self.path))

    @property
    def final(self) -> Path:
        """Folder of the aligned model."""
        return self.path / "final"

    @property
    def start(self) -> Path:
        """Folder of the merged policy, if a run with LoRA began from an adapter."""
        return self.path / START

    @property
    def finished(self) -> bool:
        return self.final.is_dir()

    def keeps_merged_policy(self, policy: Policy) -> bool:
        """Tell whether an adapter was merged into the policy, and adapters are trained on that."""
        return policy.merged is not None and policy.adapters is not None

    def keep_merged_policy(self, policy: Policy, weights: Mapping[str, Tensor], *, begins: bool) -> None:
        """Keep a policy with an adapter merged into it, where the adapters trained on it find their base.

        Args:
            policy: nothing is kept unless it has adapters and an adapter was merged into its weights.
            weights: of the policy by their names, on the rank that writes.
            begins: whether the run starts from its first step; then what an earlier start left is deleted.
        """
        if begins and self.writes and self.start.is_dir():
            shutil.rmtree(self.start)
        if not self.keeps_merged_policy(policy):
            return
        assert policy.adapters is not None
        if self.writes and not self.start.is_dir():
            checkpoint.save_start(policy, weights, self.start)
        policy.adapters.peft_config["default"].base_model_name_or_path = str(self.start.resolve())
        print(f"base       {self.start} holds the merged policy, which the run's adapter needs", flush=True)

    def describe(self, config: Config, policy: Policy) -> None:
        """Write config.yaml (resolved) and environment.json, after a look at the weights.

        Raises:
            UserError: if a run is there that began with other weights; what it has trained would not fit these.
        """
        weights = weights_hash(policy, cache_root("reference", config.reference.cache_dir), config=False)
        if self.holds_run and weights_at_start(self.path) not in (None, weights):
            raise UserError(
                f"policy.model: the weights of {config.policy.model} changed since {self.path} was started; restore "
                "them, or give another run_dir"
            )
        if not self.writes:
            return
        text = yaml.safe_dump(config.as_dict(), sort_keys=False)
        temporary = self.path / "config.yaml.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / "config.yaml")
        write_json(self.path / "environment.json", {**environment(policy), "weights": weights})


def weights_at_start(run: Path) -> str | None:
    """Return the hash of the weights that a run began with; None if it is not known."""
    try:
        return str(json.loads((run / "environment.json").read_text())["weights"])
    except (OSError, ValueError, KeyError):
        return None


def library_versions() -> dict[str, str | None]:
    """Return the versions of what a run's figures depend on; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in (
        "vapr", "torch", "triton", "transformers", "peft", "safetensors", "numpy", "pillow", "torchvision", "deepspeed",
        "bitsandbytes",
    ):  # fmt: skip
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment(policy: Policy) -> dict[str, Any]:
    """Collect versions and devices that a reader of the run wants to know."""
    device = (
        torch.cuda.get_device_name() if policy.device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "versions": library_versions(),
        "device": device,
        "threads": torch.get_num_threads(),
        "model_folder": str(policy.folder),
        "adapter": str(policy.source.adapter) if policy.source.adapter is not None else None,
        "attention": policy.attention_backend,
        "kernels": policy.kernels,
        "quantized": str(policy.quantized) if policy.quantized is not None else None,
        "left_unfused": policy.left_unfused,
    }


def _runs_beside(path: Path) -> str:
    """Name the runs in the same folder, the nearest name first, or the way out."""
    folders = [file.parent for name in ("metrics.jsonl", "config.yaml") for file in path.parent.glob(f"*/{name}")]
    runs = sorted(set(folders), key=lambda run: (-difflib.SequenceMatcher(None, path.name, run.name).ratio(), run))
    if not runs:
        return f"there is no run in {path.parent} either; start it without --resume"
    return f"runs beside it: {', '.join(map(str, runs[:5]))}" + (f" and {len(runs) - 5} more" if len(runs) > 5 else "")


def _difference(saved: Path, config: Config) -> str | None:
    """The first key whose value is not the saved run's, as ``key: value (now value)``."""
    try:
        values = yaml.safe_load(saved.read_text())
        losses = [NEW_LOSS_KEYS | term for term in values.get("loss", ())]
        before = flat(NEW_KEYS) | flat(values | {"loss": losses})
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{saved}: cannot be read ({' '.join(str(error).split())})") from None
    now = flat(config.as_dict())
    for key in {**before, **now}:
        if any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        if before.get(key) != now.get(key):
            return f"{key}: {before.get(key)} (now {now.get(key)})"
    return None


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values below nested keys by ``a.b.c``."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return flat({str(n): item for n, item in enumerate(value)}, prefix)
    return {prefix.rstrip("."): value}
