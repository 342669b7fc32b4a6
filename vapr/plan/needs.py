"""Predict the memory of a run's packs, for any size of a pack and any way of storing the model.

Packs of two sizes are run on fake tensors, and a straight line through both gives every other size. The process
remembers both runs.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from vapr.batches.packing import PackedBatch
from vapr.config import LEVELS, Checkpointing, Config
from vapr.plan.fake_step import Choices, Profile, profile
from vapr.plan.live_bytes import Peak
from vapr.plan.memory import Need, Storage, peak_by_part, weight_bytes
from vapr.plan.opaque import HeadCall, head_budget
from vapr.plan.packs import Reading, two_sizes
from vapr.plan.shapes import Shapes

_REMEMBERED: dict[Any, Profile] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Settings that change what a run takes, and that a user can change."""

    storage: Storage
    checkpointing: Checkpointing
    cached_features: bool
    tokens: int  # of the largest pack


@dataclass(slots=True)
class Needs:
    """Predicts memory for any variant of one config and its data."""

    config: Config
    shapes: Shapes
    reading: Reading
    kernels: bool
    _sizes: tuple[PackedBatch, PackedBatch] = field(init=False)
    _model: str = field(init=False)

    def __post_init__(self) -> None:
        self._sizes = two_sizes(self.reading, self.config.packing.share)
        self._model = json.dumps(self.shapes.config.to_dict(), sort_keys=True, default=str)

    @property
    def tokens(self) -> int:
        """Return the tokens of the largest pack: of the data, or a full one where not all of it was read."""
        assert self.reading.largest is not None
        return self.reading.largest.num_tokens if self.reading.whole else self.config.packing.max_tokens

    def peak(self, variant: Variant, gpu_bytes: int) -> dict[str, int]:
        """Return the bytes of every part on one rank at its peak; see :func:`vapr.plan.memory.peak_by_part`."""
        return peak_by_part(self.need(variant, gpu_bytes), variant.storage, gpu_bytes)

    def need(self, variant: Variant, gpu_bytes: int) -> Need:
        """Return what a variant needs besides its storage."""
        return Need(
            shapes=self.shapes,
            itemsize=self._itemsize,
            kernels=self.kernels,
            cached_features=variant.cached_features,
            profile=self.profile(variant, gpu_bytes),
            several_packs=self._packs_of_a_step(variant.tokens) > variant.storage.world_size,
        )

    def _packs_of_a_step(self, tokens: int) -> int:
        """Return the most packs that a step has; where packs are smaller than those of the data, it has more."""
        steps = self.reading.steps
        return max(max(len(step.packs), -(-step.tokens // tokens) if tokens < self.tokens else 0) for step in steps)

    @property
    def _itemsize(self) -> int:
        return 4 if self.config.policy.dtype == "float32" else 2

    @property
    def frozen_bytes(self) -> int:
        """Return the bytes of the weights that are not trained, as the config stores them."""
        need = Need(self.shapes, self._itemsize, self.kernels, False, Profile({}, 0, 0, 0, ()), False)
        frozen = (weight for weight in self.shapes.weights if not weight.trained)
        return sum(weight_bytes(weight, self.config.policy.base_weights, need) for weight in frozen)

    def profile(self, variant: Variant, gpu_bytes: int) -> Profile:
        """Return what a pack of ``variant.tokens`` needs."""
        keep = self._keeps_logits(variant.tokens, gpu_bytes)
        small, large = (self._measured(batch, variant, keep) for batch in self._sizes)
        a, b = (batch.num_tokens for batch in self._sizes)
        return _between(small, large, (variant.tokens - a) / (b - a))

    def _keeps_logits(self, tokens: int, gpu_bytes: int) -> bool:
        """Tell whether the exponentials of a trained head are kept for the backward pass; see make_plan."""
        if not self.shapes.head_trained:
            return False
        _, large = self._sizes
        predictions = len(large.labels) * tokens / large.num_tokens
        return predictions * self.shapes.head[0] * 2 <= 3 * head_budget(gpu_bytes)

    def _measured(self, batch: PackedBatch, variant: Variant, keep: bool) -> Profile:
        policy = dataclasses.replace(self.config.policy, checkpointing=variant.checkpointing, base_weights="bfloat16")
        in_parts = variant.checkpointing in ("mlp", "full")  # MLPs, but not where each part would restore weights
        choices = Choices(
            policy, tuple(self.config.loss), self.kernels, gpu=True, keep_logits=keep,
            cached_features=variant.cached_features,
            restored=in_parts and variant.storage.base_weights != "bfloat16",
            module_by_module=variant.storage.module_by_module,
        )  # fmt: skip
        key = (
            self._model,
            repr(dataclasses.replace(choices, policy=dataclasses.replace(policy, model=""))),
            _signature(batch),
        )
        if key not in _REMEMBERED:
            _REMEMBERED[key] = profile(self.shapes.config, choices, batch)
        return _REMEMBERED[key]


def _signature(batch: PackedBatch) -> tuple[Any, ...]:
    """Return what of a pack its run on fake tensors depends on."""
    images = tuple((image.layout, tuple(image.pixel_values.shape)) for image in batch.images)
    attention = batch.attention
    sizes = (batch.num_tokens, len(batch.predicting), len(batch.labels), len(batch.token_weights), batch.num_pairs)
    return (*sizes, attention.lengths_q, attention.lengths_k, images)


def _between(small: Profile, large: Profile, share: float) -> Profile:
    """Return the profile at ``share`` of the way from one to the other; 0 and 1 are these themselves."""

    def at(a: int, b: int) -> int:
        return max(0, round(a + share * (b - a)))

    def peak(a: Peak, b: Peak) -> Peak:
        return Peak(at(a.alive, b.alive), at(a.with_gradients, b.with_gradients), at(a.gradients, b.gradients))

    def call(a: HeadCall, b: HeadCall) -> HeadCall:
        return dataclasses.replace(
            b, L=at(a.L, b.L), alive=at(a.alive, b.alive), gradients=at(a.gradients, b.gradients)
        )

    return Profile(
        {phase: peak(small.peaks.get(phase, Peak()), large.peaks[phase]) for phase in large.peaks},
        at(small.features, large.features),
        at(small.activations, large.activations),
        at(small.head, large.head),
        tuple(call(a, b) for a, b in zip(small.head_calls, large.head_calls, strict=True)),
    )


def least_checkpointing(needs: Needs, variant: Variant, gpu_bytes: int, usable: float) -> Variant:
    """Return the variant with the first level of checkpointing with which it fits ``usable`` bytes; else with the last.

    This is what ``policy.checkpointing: auto`` means.
    """
    for level in LEVELS:
        variant = dataclasses.replace(variant, checkpointing=level)
        if sum(needs.peak(variant, gpu_bytes).values()) <= usable:
            break
    return variant


def largest_tokens(needs: Needs, variant: Variant, gpu_bytes: int, usable: float) -> int | None:
    """Return the largest pack that fits ``usable`` bytes; None: not even the longest row does.

    What a pack takes grows with its tokens, so the answer is found by halving.
    """
    longest = needs.reading.longest[0][0]

    def fits(tokens: int) -> bool:
        return sum(needs.peak(dataclasses.replace(variant, tokens=tokens), gpu_bytes).values()) <= usable

    if not fits(longest):
        return None
    low, high = longest, MOST_TOKENS
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


MOST_TOKENS = 1_000_000
"""No larger pack is looked for."""
