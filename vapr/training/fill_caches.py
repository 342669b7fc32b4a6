"""Fill the caches with what stays the same in training: reference log-probs and, on request, image features."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from vapr.batches.loader import PairLoader, open_loaders
from vapr.batches.model_folder import PROCESSOR_FILES
from vapr.batches.packing import PackedBatch
from vapr.cache import files_hash, user_cache, written_whole
from vapr.config import Config
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.interrupts import Stopped, stopped_at_once
from vapr.model.image_features import ImageFeatures, shared_image_features
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.model.sharded_cache import ShardedCache
from vapr.plan.checkpointing import load_policy_to_train
from vapr.progress import Display
from vapr.training.out_of_memory import CacheCounts, FittingPacks
from vapr.training.ranks import Ranks, open_ranks
from vapr.training.same_everywhere import check_same_everywhere

SECONDS_BETWEEN_SAVES = 30.0  # the most that a killed run loses


def prepare(config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fill the reference cache, and the feature cache if there is to be one, for every pair of ``config.data``.

    Killed and started again, it goes on where it was; a changed row costs that row. ``say`` is shown what was found.

    Returns:
        Counts of completions and images found and computed, the folders, and the skipped rows with their reasons.

    Raises:
        UserError: for a mistake in config, data or model, or if no loss of the config has a reference.
        Stopped: after a signal; what was computed is saved first.
    """
    if not config.features.cache and not any(term.needs_reference for term in config.loss):
        kinds = ", ".join(term.kind for term in config.loss)
        raise UserError(f"loss: {kinds} needs no reference, and features.cache is false; there is nothing to prepare")
    with contextlib.ExitStack() as opened:
        ranks = opened.enter_context(open_ranks(config.parallel))
        check_same_everywhere(config, ranks)
        loaders = ranks.in_turn(
            lambda: opened.enter_context(open_loaders(config, say=say, rank=ranks.rank, num_ranks=ranks.size))
        )
        policy = ranks.agree(lambda: load_policy_to_train(config, ranks.size, say))
        if policy.merged is not None:
            say(f"merged     {policy.merged}")
        reference = ranks.in_turn(lambda: _new_reference(config, policy, say))
        features = ranks.in_turn(lambda: open_features(config, policy, loaders["train"], say))
        fitting = FittingPacks(config.packing.share, say)
        result: dict[str, Any] = {"skipped": {}}
        for name, loader in loaders.items():
            rows, stop = _rows_to_fill(config, loader, is_trained_on=name == "train")
            _fill(policy, reference, features, rows, stop, name, ranks, fitting)
            for skipped in ranks.gather_objects(rows.skipped):
                result["skipped"] |= skipped
        for kind, cache in (("reference", reference), ("features", features)):
            if cache is not None:
                found, computed = ranks.gather([cache.hits, cache.misses]).sum(axis=0).astype(int).tolist()
                counts = {"found": found, "computed": computed, "on disk": len(cache)}
                result[kind] = {**counts, "folder": str(cache.folder)}
        return result


def open_features(
    config: Config, policy: Policy, loader: PairLoader, say: Callable[[str], None] = print
) -> ImageFeatures | None:
    """Open the cache of image features, if the config asks for one, and say how large it will be."""
    if not config.features.cache:
        return None
    features = ImageFeatures(policy, config.features.cache_dir)
    _say_messages("features", features, say)
    sample = next(loader.steps(0, 1))
    images = {image.content_hash: image for batch in sample.batches for image in batch.images}
    if images:
        tokens = float(np.mean([image.num_tokens for image in images.values()]))
        num_images = loader.pairs.num_images if isinstance(loader.pairs, Pairs) else len(images)
        if config.second_image is not None and config.second_image.make not in ("retrieved", "given"):
            num_images += len(loader.pairs)  # every row has a second one of its own
        say(f"features   {features.describe_size(num_images, tokens)}")
    return features


def open_reference(
    config: Config, policy: Policy, features: ImageFeatures | None, loaders: list[PairLoader], ranks: Ranks,
    fitting: FittingPacks,
) -> Reference | None:  # fmt: skip
    """Open the reference, if a loss needs one; the first of ``loaders`` is trained on.

    With adapters it can be computed whenever they are switched off. In full fine-tuning the policy is its own reference
    only until its first update, so everything the run will see is scored now. ``fitting`` is the run's limit on packs.
    """
    reference = ranks.in_turn(lambda: _new_reference(config, policy, print))
    if reference is None or policy.adapters is not None:
        return reference
    for number, loader in enumerate(loaders):
        rows, stop = _rows_to_fill(config, loader, is_trained_on=number == 0)
        _fill(policy, reference, features, rows, stop, "reference", ranks, fitting)
    reference.stop_computing()
    return reference


def _new_reference(config: Config, policy: Policy, say: Callable[[str], None]) -> Reference | None:
    if not any(term.needs_reference for term in config.loss):
        return None
    reference = Reference(policy, config.reference.cache_dir, config.packing.share)
    _say_messages("reference", reference, say)
    return reference


def _rows_to_fill(config: Config, loader: PairLoader, *, is_trained_on: bool) -> tuple[PairLoader, int]:
    """Return a loader of what the run will see and its number of steps: each row once, or the first of a short run."""
    max_steps = config.optim.max_steps
    if is_trained_on and max_steps is not None and max_steps < loader.steps_per_epoch:
        return loader, max_steps
    rows = loader.once(by_image=True)
    return rows, rows.steps_per_epoch


def _fill(
    policy: Policy,
    reference: Reference | None,
    features: ImageFeatures | None,
    loader: PairLoader,
    stop: int,
    name: str,
    ranks: Ranks,
    fitting: FittingPacks,
) -> None:
    """Compute what is missing for this rank's part of steps 0 to ``stop`` of a loader, saving every half minute.

    At the end each rank knows what the others computed, too.

    Raises:
        Stopped: after a signal; what was computed is saved first.
    """
    caches: list[ShardedCache] = [cache for cache in (reference, features) if cache is not None]
    note = _note_name(policy, loader)
    done, images = _steps_done_before(caches, note, loader, stop)
    saved = time.monotonic()
    try:
        with (
            stopped_at_once(lambda: "what was computed so far is kept; the same command goes on"),
            Display(f"prepare {name}", stop, done=done) as display,
        ):
            fitting.say = display.say
            if done:
                display.say(f"{done:,} of {stop:,} steps were prepared before")

            def look_up_all() -> None:
                nonlocal saved
                for number, step in enumerate(loader.steps(done, stop), start=done + 1):
                    look_up = partial(_look_up, policy, reference, features)
                    fitting.each(step.batches, look_up, CacheCounts(*caches).restore)
                    loader.hash_images(number - 1, images)
                    display.advance(_counts(reference, features))
                    for cache in caches:
                        _say_messages(name, cache, display.say)
                    _say_messages(name, loader, display.say)
                    if number == stop or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        saved = time.monotonic()
                        _save(caches, note, {"steps": number, "images": images.hexdigest(), "skipped": loader.skipped})

            policy.passes.together(look_up_all, ranks.agree)
    except (Stopped, torch.OutOfMemoryError) as error:
        for cache in caches:
            cache.flush()
        if isinstance(error, Stopped):
            raise
        raise UserError(
            "the reference of a pack does not fit the GPU's memory; lower packing.max_tokens, or set "
            "policy.base_weights: nf4 (docs/memory.md)"
        ) from None
    ranks.wait()
    if ranks.size > 1:
        for cache in caches:
            cache.find_new_shards()


def _look_up(policy: Policy, reference: Reference | None, features: ImageFeatures | None, batch: PackedBatch) -> None:
    """Have the caches compute what they lack of a batch, which is on the CPU."""
    batch = batch.to(policy.device)
    shared = shared_image_features(policy, batch, features)
    if reference is not None:
        reference.logps(batch, shared)


def _save(caches: list[ShardedCache], name: str, note: dict[str, Any]) -> None:
    """Write what the caches hold, and then beside it a note of how far they are filled."""
    for cache in caches:
        cache.flush()
        with written_whole(cache.folder / name) as file:
            file.write(json.dumps({**note, "shards": cache.shards}).encode())


def _note_name(policy: Policy, loader: PairLoader) -> str:
    """Name the note after rows, order and processor: for these, a number of steps always means the same tokens."""
    files = [file for name in PROCESSOR_FILES if (file := policy.folder / name).is_file()]
    identity = files_hash(files, user_cache() / "index" / "files.json")
    library = f"transformers {transformers.__version__}"  # which decides what becomes of transparency
    digest = hashlib.sha256(f"{loader.place} {identity} {loader.image_backend} {library}".encode())
    return f"prepared-{digest.hexdigest()[:16]}.json"


def _steps_done_before(caches: list[ShardedCache], name: str, loader: PairLoader, stop: int) -> tuple[int, Any]:
    """Return how many steps all caches are filled for, by their own notes, and the hash of these steps' images.

    Rows that were skipped in them are added to ``loader.skipped``. Where a file or a value was lost since, or an image
    changed, no step counts, and everything is looked up again; so it is where rows are shown images of other rows,
    which may be rows of a later step.
    """
    if loader.retrieves_images:
        return 0, hashlib.sha256()
    notes = [note for cache in caches if (note := _read_note(cache, name, stop)) is not None]
    if len(notes) == len(caches) and all(note["steps"] == notes[0]["steps"] for note in notes):
        images = hashlib.sha256()
        for step in range(notes[0]["steps"]):
            loader.hash_images(step, images)
        if all(note["images"] == images.hexdigest() for note in notes):
            loader.skipped.update(notes[0]["skipped"])
            return notes[0]["steps"], images
    return 0, hashlib.sha256()


def _read_note(cache: ShardedCache, name: str, stop: int) -> dict[str, Any] | None:
    """Read how far a cache was filled; None without a sound note, or if a file or a reference value was lost since."""
    try:
        note: dict[str, Any] = json.loads((cache.folder / name).read_text())
        shards = set(note["shards"])
        if not 0 < note["steps"] <= stop or not {"images", "skipped"} <= note.keys():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(cache, Reference):  # features can be computed again at any time, values only before training
        cache.verify()
    return note if shards <= set(cache.shards) else None


def _counts(reference: Reference | None, features: ImageFeatures | None) -> str:
    counts = []
    if reference is not None:
        counts.append(f"{reference.hits:,} found, {reference.misses:,} computed")
    if features is not None:
        counts.append(f"images {features.hits:,} found, {features.misses:,} computed")
    return "; ".join(counts)


def _say_messages(label: str, cache: ShardedCache | PairLoader, say: Callable[[str], None]) -> None:
    """Show what a cache or a loader has to say, once."""
    for line in cache.messages:
        say(f"{label:<10} {line}")
    cache.messages.clear()
