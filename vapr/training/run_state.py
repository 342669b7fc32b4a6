"""How far a run has come: what a checkpoint holds beside weights and optimizer, saved and restored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vapr.batches.loader import PairLoader
from vapr.cache import write_json
from vapr.config import CheckpointConfig
from vapr.errors import UserError
from vapr.model.image_features import ImageFeatures
from vapr.model.reference import Reference
from vapr.training import checkpoint
from vapr.training.engine_deepspeed import AnyEngine
from vapr.training.extreme_pairs import Extremes
from vapr.training.run_dir import RunDir


@dataclass(slots=True)
class RunState:
    """Pairs trained on, the step of the newest checkpoint, and the pairs with extreme margins."""

    num_pairs: int = 0
    saved_step: int = 0
    extremes: Extremes = field(default_factory=Extremes)

    def add(self, margins: list[tuple[int, float]], step: int, steps_per_epoch: int) -> None:
        """Count the pairs of a step (counted from 1) and note their margins, each as (row number, margin)."""
        self.extremes.add((step - 1) // steps_per_epoch, step, margins)
        self.num_pairs += len(margins)


def resume(run: RunDir, engine: AnyEngine, loader: PairLoader) -> RunState:
    """Restore the newest whole checkpoint; without one the run starts from the beginning, and says so.

    Raises:
        UserError: if the pairs changed since the run was started, or the checkpoint is of another model.
    """
    ranks = engine.ranks
    folder = ranks.in_turn(
        lambda: checkpoint.newest_whole(run.path, lambda line: print(line, flush=True), writes=ranks.is_first)
    )
    if folder is None:
        damaged = any((run.path / "checkpoints").glob("*.damaged"))
        print(f"{run.path}: no {'whole checkpoint' if damaged else 'checkpoint yet'}; starting from the beginning")
        return RunState()
    saved = ranks.agree(lambda: checkpoint.load(folder, engine))
    if saved["data"] != loader.digest:
        raise UserError(
            f"data.train: the pairs changed since {run.path} was started, or data.verdicts did; restore them, or give "
            "another run_dir"
        )
    loader.skipped.update(saved["skipped"])
    state = RunState(saved["num_pairs"], saved["step"])
    state.extremes.restore(saved["extremes"])
    print(f"{run.path}: resuming after step {state.saved_step} (step-{state.saved_step:06d})")
    return state


def save(
    run: RunDir, state: RunState, engine: AnyEngine, loaders: Sequence[PairLoader | None],
    caches: Sequence[Reference | ImageFeatures | None], keep: CheckpointConfig,
) -> Path:  # fmt: skip
    """Write a checkpoint, what the caches computed and the list of skipped pairs; return the checkpoint's folder.

    Every rank calls it, and writes what it has.

    Args:
        loaders: of the training pairs and of the held-out ones; None if there are none.
        keep: which checkpoints stay.

    Raises:
        UserError: if every pair of the whole run was skipped.
    """
    loader = loaders[0]
    assert loader is not None
    ranks = engine.ranks
    for one in loaders:
        for skipped in ranks.gather_objects(one.skipped if one else {}):
            if one:
                one.skipped.update(skipped)
    if state.num_pairs == 0 and engine.num_updates == engine.num_steps:
        raise UserError(f"data.train: every pair was skipped; the first: {next(iter(loader.skipped.values()))}")
    for cache in caches:
        if cache is not None:
            ranks.agree(cache.flush)
            if ranks.size > 1:
                cache.find_new_shards()  # the other ranks'
    list_skipped(run, loaders)
    written = {
        "num_pairs": state.num_pairs,
        "skipped": loader.skipped,
        "data": loader.digest,
        "extremes": state.extremes.state(),
        "num_steps": engine.num_steps,
    }
    folder = checkpoint.save(run.path, engine.num_updates, engine, written, keep)
    state.saved_step = engine.num_updates
    return folder


def list_skipped(run: RunDir, loaders: Sequence[PairLoader | None]) -> int:
    """Write the pairs left out so far, place in the file -> reason, on the first rank; return how many."""
    skipped = {place: reason for loader in loaders if loader for place, reason in loader.skipped.items()}
    listed = run.path / "skipped.json"
    if skipped and run.writes:
        write_json(listed, skipped)
    elif run.writes:
        listed.unlink(missing_ok=True)
    return len(skipped)
