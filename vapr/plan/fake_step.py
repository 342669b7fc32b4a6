"""Run forward and backward of one pack on FakeTensors, as :mod:`vapr.plan.fake_policy` makes them, and count bytes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vapr.batches.packing import PackedBatch
from vapr.batches.sequences import SegmentAttention
from vapr.families import FAMILIES
from vapr.model import logps as logps_module
from vapr.model import policy as policy_module
from vapr.model.logps import token_logps
from vapr.model.policy import Policy, image_features
from vapr.plan import opaque
from vapr.plan.fake_policy import Choices, fake_policy, faked, shortened
from vapr.plan.live_bytes import LiveBytes, Peak
from vapr.plan.opaque import HeadCall
from vapr.plan.trials import trials_of
from vapr_kernels import naive, preference_loss
from vapr_kernels.gather_rows import RowIndex

BLOCK = 512
"""Bytes that PyTorch's allocator on a GPU rounds to."""

TOWER = "image tower"
WITHOUT_LAYERS = ("start", "head", "loss")
"""Phases in which no linear layer runs but the head."""

FEW_LAYERS = 4
"""Decoder layers of a shortened model: the last, which skips tokens, two between, and the first."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes alive while one pack runs, beyond weights and optimizer state."""

    peaks: Mapping[str, Peak]  # by phase
    features: int  # image features
    activations: int  # what the language model keeps for the backward pass
    head: int  # what head and loss keep for it
    head_calls: tuple[HeadCall, ...]

    def peak(self, budget: int, *, gradients_share: float | None = None, restored: int = 0) -> int:
        """Return the most that was alive.

        Args:
            budget: see :meth:`vapr.plan.opaque.HeadCall.inside`.
            gradients_share: of this pack's own gradients, which grow as activations go, the share that a rank holds;
                None: gradients are counted elsewhere, as they are all there from the step's first pack on.
            restored: bytes of the largest weight that layers restore from fewer bits; the head's is stored as it is.
        """
        share = gradients_share or 0.0
        most = 0.0
        for phase, peak in self.peaks.items():
            both = peak.with_gradients if share == 1 else peak.alive + share * peak.gradients
            weight = 0 if phase in WITHOUT_LAYERS else restored
            most = max(most, weight + (peak.alive if gradients_share is None else both))
        for call in self.head_calls:
            most = max(most, call.alive + call.inside(budget) + share * call.gradients)
        return int(most)


def profile(config: Any, choices: Choices, batch: PackedBatch) -> Profile:
    """Run a pack through a model of ``config`` (of transformers) and count.

    Where the layers of a decoder are alike, a model of many is run with a few, once with one more, and what that one
    adds is added for all others. A frozen tower keeps nothing for the backward pass and runs apart, once.
    """
    num_layers = int(config.get_text_config().num_hidden_layers)
    few = num_layers > FEW_LAYERS + 1 and trials_of(config).alike
    counts = (FEW_LAYERS, FEW_LAYERS + 1) if few else (num_layers,)
    frozen = not (choices.policy.train.vision_tower or choices.policy.train.projector)
    apart = dataclasses.replace(choices, cached_features=choices.cached_features or frozen)
    runs = [_run(shortened(config, count), apart, batch) for count in counts]
    result = _extrapolated(runs[0], runs[-1], num_layers - counts[0])
    if choices.cached_features or not frozen or not batch.images:
        return result
    return dataclasses.replace(result, peaks={**result.peaks, TOWER: _run_tower(config, choices, batch)})


def _extrapolated(few: Profile, more: Profile, times: int) -> Profile:
    """Add ``times`` what one more layer added."""

    def far(a: int, b: int) -> int:
        return a + times * (b - a)

    return Profile(
        peaks={
            phase: Peak(
                far(peak.alive, more.peaks[phase].alive),
                far(peak.with_gradients, more.peaks[phase].with_gradients),
                far(peak.gradients, more.peaks[phase].gradients),
            )
            for phase, peak in few.peaks.items()
        },
        features=few.features,
        activations=far(few.activations, more.activations),
        head=few.head,
        head_calls=tuple(
            dataclasses.replace(a, alive=far(a.alive, b.alive), gradients=far(a.gradients, b.gradients))
            for a, b in zip(few.head_calls, more.head_calls, strict=True)
        ),
    )


def _run_tower(config: Any, choices: Choices, batch: PackedBatch) -> Peak:
    """Run the frozen tower and projector over a pack's images."""
    with faked(choices):
        policy = fake_policy(shortened(config, 1), choices)
        live = LiveBytes(opaque.inside if choices.gpu else None, BLOCK if choices.gpu else 1)
        with live:
            live.enter(TOWER)
            image_features(policy, batch.images)
    return live.peaks[TOWER]


def _run(config: Any, choices: Choices, batch: PackedBatch) -> Profile:
    """Run forward and backward of a pack, phase by phase."""
    with faked(choices) as fake:
        policy = fake_policy(config, choices)
        pack = _as_fakes(batch, fake)
        calls: list[HeadCall] = []
        marks: list[int] = []
        reference = torch.empty(len(batch.sum_prediction.rows))

        def inside(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> int:
            if name.startswith("vapr::linear_logps"):
                calls.append(_head_call(name, arguments, live))
            return opaque.inside(name, arguments, options) if choices.gpu else 0

        def marked(*arguments: Any) -> Tensor:
            hidden = policy_module.hidden_states(*arguments)
            live.enter("head")
            marks.append(live.alive)
            return hidden

        live = LiveBytes(inside, BLOCK if choices.gpu else 1)
        _collect_gradients(policy, live)
        with live, mock.patch.object(logps_module, "hidden_states", marked):
            live.enter(TOWER)
            features = _features(policy, pack, choices)
            marks.append(live.alive)
            live.enter("forward")
            logps = token_logps(policy, pack, features, reference)
            live.enter("loss")
            fused_or_naive = preference_loss if policy.kernels else naive.preference_loss
            losses = fused_or_naive(logps, reference, pack.completions, choices.loss, mean_chosen_length=100.0)[0]
            marks.append(live.alive)
            live.enter("backward")
            if losses.requires_grad:
                losses.sum().backward()
    after_tower, after_layers, after_head = marks
    return Profile(live.peaks, after_tower, after_layers - after_tower, after_head - after_layers, tuple(calls))


def _features(policy: Policy, batch: PackedBatch, choices: Choices) -> Tensor | None:
    """Return the images' features, with a gradient where the tower is trained."""
    if not batch.images:
        return None
    if choices.cached_features:
        config = policy.base.config
        width = config.get_text_config().hidden_size * (1 + FAMILIES[policy.family].num_deep(config))
        return torch.empty(sum(image.num_tokens for image in batch.images), width, dtype=policy.dtype)
    return image_features(policy, batch.images)


def _head_call(name: str, arguments: Sequence[Any], live: LiveBytes) -> HeadCall:
    if name == "vapr::linear_logps":
        hidden, head, _, _, product, gradient, with_dx, _ = arguments
        return HeadCall(False, product, gradient, *_sizes(hidden, head), with_dx, live.alive, live.gradients)
    _, hidden, head, _, _, exps, product, with_dx, _ = arguments
    gradient = "keep" if len(exps) == len(hidden) else "recompute"
    return HeadCall(True, product, gradient, *_sizes(hidden, head), with_dx, live.alive, live.gradients)


def _sizes(hidden: Tensor, head: Tensor) -> tuple[int, int, int]:
    return len(hidden), len(head), int(head.shape[1])


def _collect_gradients(policy: Policy, live: LiveBytes) -> None:
    """Do with gradients what the engine does: each is added to an fp32 one as soon as it is finished.

    What they take in fp32 is counted apart, and the layer that they belong to names the phase.
    """

    def hook(phase: str) -> Any:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            if weight.dtype == torch.float32:  # the gradient stays as it is
                live.forget(weight.grad)
            live.enter(phase)
            live.add_gradient(weight.numel() * 4)
            weight.grad = None

        return take

    phases = _phases(policy)
    for name, weight in policy.trained_parameters().items():
        weight.register_post_accumulate_grad_hook(hook(phases.get(name, "backward, tower")))


def _phases(policy: Policy) -> dict[str, str]:
    """Name the phase of the backward pass in which each parameter's gradient is finished, all but the tower's."""
    decoder, names = policy.decoder, {}
    last = len(decoder.layers) - 1
    numbers = {last: "last", last - 1: "last but one", 1: "second", 0: "first"}
    parts = [(decoder.norm, "head"), (policy.base.get_output_embeddings(), "head")]
    parts += [(layer, f"{numbers.get(n, 'between')} layer") for n, layer in enumerate(decoder.layers)]
    parts += [(decoder.get_input_embeddings(), "embeddings")]  # the last of them names tied ones
    known = {id(weight): name for name, weight in policy.base.named_parameters()}
    for module, part in parts:
        names.update({known[id(weight)]: f"backward, {part}" for weight in module.parameters()})
    return names


def _as_fakes(batch: PackedBatch, fake: FakeTensorMode) -> PackedBatch:
    """Return the batch with fake tensors, as it would lie on the device; images stay on the host."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fake.from_tensor(value)
        if isinstance(value, RowIndex | SegmentAttention):
            fields = {field.name: convert(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value

    moved = {field.name: convert(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **moved)
