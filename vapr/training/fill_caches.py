"""Computes ahead of training what stays the same: reference log-probs and, on request, image features."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from vapr.batches.loader import PairLoader, open_loader
from vapr.batches.model_folder import PROCESSOR_FILES
from vapr.batches.packing import PackedBatch
from vapr.batches.workers import open_workers
from vapr.cache import files_hash, user_cache, written_whole
from vapr.config import Config
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.interrupts import stopped_at_once
from vapr.model.image_features import Features, announce
from vapr.model.policy import Policy, image_features, load_policy
from vapr.model.reference import Reference
from vapr.progress import Display

SECONDS_BETWEEN_SAVES = 30.0
"""What a killed run loses at most."""


def prepare(config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fill the reference cache, and the feature cache if there is to be one, for every pair of ``config.data``.

    Killed and started again it goes on where it was; a changed row costs that row. ``say`` is shown what was found.

    Returns:
        Counts of completions and images found and computed, and the folders.

    Raises:
        UserError: for a mistake in config, data or model, or if no loss of the config has a reference.
    """
    if not config.features.cache and not any(term.needs_reference for term in config.loss):
        kinds = ", ".join(term.kind for term in config.loss)
        raise UserError(f"loss: {kinds} needs no reference, and features.cache is false; there is nothing to prepare")
    with open_workers(config) as workers:
        loaders = {"train": open_loader(config, "train", workers, say)}
        if config.data.eval is not None:
            loaders["eval"] = open_loader(config, "eval", workers, say)
        policy = load_policy(config.policy, kernels=config.kernels)
        if policy.merged is not None:
            say(f"merged     {policy.merged}")
        reference = _new_reference(config, policy, say)
        features = open_features(config, policy, loaders["train"], say)
        skipped: dict[str, str] = {}
        for name, loader in loaders.items():
            rows, stop = _rows_to_fill(config, loader, name == "train")
            _fill(policy, reference, features, rows, stop, name)
            skipped |= rows.skipped
    result: dict[str, Any] = {"skipped": skipped}
    if reference is not None:
        result["reference"] = {"found": reference.hits, "computed": reference.misses, "on disk": len(reference)}
        result["reference"]["folder"] = str(reference.folder)
    if features is not None:
        result["features"] = {"found": features.hits, "computed": features.misses, "on disk": len(features)}
        result["features"]["folder"] = str(features.folder)
    return result


def open_features(
    config: Config, policy: Policy, loader: PairLoader, say: Callable[[str], None] = print
) -> Features | None:
    """The cache of image features, if it is asked for; says how large it will be."""
    if not config.features.cache:
        return None
    features = Features(policy, config.features.cache_dir)
    _tell("features", features.messages, say)
    sample = next(loader.steps(0, 1))
    images = {image.content_hash: image for batch in sample.batches for image in batch.images}
    if images:
        tokens = float(np.mean([image.num_tokens for image in images.values()]))
        num_images = loader.pairs.num_images if isinstance(loader.pairs, Pairs) else len(images)
        say(f"features   {announce(policy, features, num_images, tokens)}")
    return features


def open_reference(
    config: Config, policy: Policy, features: Features | None, loaders: list[PairLoader]
) -> Reference | None:
    """The reference, if a loss needs one.

    With adapters it is there whenever they are switched off. In full fine-tuning the policy is its own reference only
    until its first update, so everything the run will see is scored now. The first of ``loaders`` is trained on.
    """
    reference = _new_reference(config, policy, print)
    if reference is None or policy.adapters is not None:
        return reference
    for number, loader in enumerate(loaders):
        _fill(policy, reference, features, *_rows_to_fill(config, loader, number == 0), "reference")
    reference.policy_changes()
    return reference


def shared_image_features(policy: Policy, batch: PackedBatch, features: Features | None) -> Tensor | None:
    """The features that policy and reference have in common, if tower and projector are frozen; else None."""
    if not batch.images or policy.vision_trained:
        return None
    return image_features(policy, batch.images) if features is None else features.of_batch(batch)


def _new_reference(config: Config, policy: Policy, say: Callable[[str], None]) -> Reference | None:
    if not any(term.needs_reference for term in config.loss):
        return None
    reference = Reference(policy, config.reference.cache_dir, config.packing.share)
    _tell("reference", reference.messages, say)
    return reference


def _rows_to_fill(config: Config, loader: PairLoader, trained_on: bool) -> tuple[PairLoader, int]:
    """A loader of what the run will see, and its number of steps: every row once, or the first steps of a short run."""
    max_steps = config.optim.max_steps
    if trained_on and max_steps is not None and max_steps < loader.steps_per_epoch:
        return loader, max_steps
    rows = loader.once(by_image=True)
    return rows, rows.steps_per_epoch


def _fill(
    policy: Policy, reference: Reference | None, features: Features | None, loader: PairLoader, stop: int, label: str
) -> None:
    """Compute what is missing for steps 0 to ``stop`` of a loader, saving every half minute.

    Raises:
        Stopped: after a signal; what was computed is saved first.
    """
    caches = [cache for cache in (reference, features) if cache is not None]
    name = f"prepared-{_processor_and_order(policy, loader)}.json"
    done, skipped, images = _prepared_before(caches, name, loader, stop)
    loader.skipped.update(skipped)
    saved = time.monotonic()
    with stopped_at_once(lambda: _kept(caches)), Display(f"prepare {label}", stop, done=done) as display:
        if done:
            display.say(f"{done:,} of {stop:,} steps were prepared before")
        for number, step in enumerate(loader.steps(done, stop), start=done + 1):
            for cpu_batch in step.batches:
                batch = cpu_batch.to(policy.device)
                try:
                    shared = shared_image_features(policy, batch, features)
                    if reference is not None:
                        reference.logps(batch, shared)
                except torch.OutOfMemoryError:
                    raise UserError("packing.max_tokens: a pack does not fit the GPU's memory; lower it") from None
            loader.hash_images(number - 1, images)
            display.advance(_counts(reference, features))
            for cache in caches:
                _tell(label, cache.messages, display.say)
            if number == stop or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                saved = time.monotonic()
                note = {"steps": number, "images": images.hexdigest(), "skipped": loader.skipped}
                for cache in caches:
                    cache.flush()
                    with written_whole(cache.folder / name) as file:
                        file.write(json.dumps({**note, "shards": cache.shards}).encode())


def _kept(caches: list[Reference | Features]) -> str:
    for cache in caches:
        cache.flush()
    return "what was computed so far is kept; the same command goes on"


def _processor_and_order(policy: Policy, loader: PairLoader) -> str:
    """Name of rows, order and processor, for which a number of steps always means the same tokens."""
    files = [file for name in PROCESSOR_FILES if (file := policy.folder / name).is_file()]
    identity = files_hash(files, user_cache() / "index" / "files.json")
    library = f"transformers {transformers.__version__}"  # which decides what becomes of transparency
    return hashlib.sha256(f"{loader.place} {identity} {loader.image_backend} {library}".encode()).hexdigest()[:16]


def _prepared_before(
    caches: list[Reference | Features], name: str, loader: PairLoader, stop: int
) -> tuple[int, dict[str, str], Any]:
    """Steps that the caches hold the values of, by their own notes; rows skipped in them; and their images' hash.

    No step if a file or value was lost since, or an image changed: then everything is looked up again.
    """
    nothing: tuple[int, dict[str, str], Any] = 0, {}, hashlib.sha256()
    images = hashlib.sha256()
    notes: list[dict[str, Any]] = []
    for cache in caches:
        try:
            notes.append(json.loads((cache.folder / name).read_text()))
            if isinstance(cache, Reference):  # features can be computed again at any time, values only before training
                cache.verify()
            lost = set(notes[-1]["shards"]) - set(cache.shards)
            if lost or notes[-1]["steps"] != notes[0]["steps"] or not 0 < notes[0]["steps"] <= stop:
                return nothing
        except (OSError, ValueError, KeyError, TypeError):
            return nothing
    for step in range(notes[0]["steps"]):
        loader.hash_images(step, images)
    if any(note["images"] != images.hexdigest() for note in notes):
        return nothing
    return notes[0]["steps"], notes[0]["skipped"], images


def _counts(reference: Reference | None, features: Features | None) -> str:
    counts = []
    if reference is not None:
        counts.append(f"{reference.hits:,} found, {reference.misses:,} computed")
    if features is not None:
        counts.append(f"images {features.hits:,} found, {features.misses:,} computed")
    return "; ".join(counts)


def _tell(label: str, messages: list[str], say: Callable[[str], None]) -> None:
    """Show what a cache has to say, once."""
    for line in messages:
        say(f"{label:<10} {line}")
    messages.clear()
