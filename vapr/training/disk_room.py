"""Compare what a run is going to write with the room on its disk, before it is needed."""

import math
import shutil
from pathlib import Path

from vapr.config import CheckpointConfig
from vapr.errors import UserError
from vapr.model.policy import Policy
from vapr.training.engine_deepspeed import AnyEngine


def check_room(run_dir: Path, engine: AnyEngine, policy: Policy, keep: CheckpointConfig) -> None:
    """Refuse to start a run whose checkpoints and final model do not fit its disk.

    While a checkpoint is written, those that are kept are still there. Checkpoints in the folder already need no room.

    Raises:
        UserError: with the sizes.
    """
    if not engine.ranks.is_first:
        return
    folders = [folder for folder in (run_dir / "checkpoints").glob("step-*") if folder.suffix != ".tmp"]
    left = math.ceil((engine.num_steps - engine.num_updates) / keep.every)
    at_once = min(keep.keep + int(keep.best) + 1, len(folders) + left)
    each, final = engine.checkpoint_bytes, final_bytes(policy)
    needed = max(at_once - len(folders), 0) * each + final
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        plural = "s" if at_once > 1 else ""
        what = f"{at_once} checkpoint{plural} of {in_units(each)} and the final model of {in_units(final)}"
        raise UserError(
            f"run_dir: {what} do not fit the {in_units(free)} that are free at {run_dir}; make room, lower "
            "checkpoint.keep, or give another run_dir"
        )


def check_room_for_one(folder: Path, engine: AnyEngine) -> None:
    """Refuse to write a checkpoint that does not fit the disk, so that no half of one is written.

    Raises:
        UserError: with the sizes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if engine.checkpoint_bytes > free:
        raise UserError(
            f"{folder}: a checkpoint of {in_units(engine.checkpoint_bytes)} does not fit the {in_units(free)} that are "
            "free; make room"
        )


def final_bytes(policy: Policy) -> int:
    """Return the size of the weights in ``final/``: the whole model, or its adapter."""
    if policy.adapters is None:
        return sum(weight.numel() * weight.element_size() for weight in policy.base.state_dict().values())
    return sum(weight.numel() * weight.element_size() for weight in policy.trained_parameters().values())


def in_units(size: float) -> str:
    """Write a number of bytes in the largest unit of which there is at least one."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
