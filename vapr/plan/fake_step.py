"""Run forward and backward of one pack on FakeTensors, which have shapes and dtypes but no memory, and count bytes.

Everything runs as a GPU would run it: kernels, varlen attention, the tower's own operations. The tensors are of the
CPU all the same: a build of PyTorch without CUDA refuses to index fake tensors of a GPU, and autograd asks a GPU's
driver for streams.
"""

import contextlib
import copy
import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from vapr.batches.packing import PackedBatch, SegmentAttention
from vapr.batches.processed_image import joined_pixels
from vapr.config import LossConfig, PolicyConfig
from vapr.model import attention, patches
from vapr.model import logps as logps_module
from vapr.model import policy as policy_module
from vapr.model.logps import token_logps
from vapr.model.policy import Policy, image_features
from vapr.plan import opaque
from vapr.plan.live_bytes import LiveBytes, Peak
from vapr.plan.opaque import HeadCall
from vapr.plan.shapes import build
from vapr_kernels import launch, naive, preference_loss
from vapr_kernels.gather_rows import RowIndex

_HEAD = importlib.import_module("vapr_kernels.linear_logps")  # the package has a function of that name
BLOCK = 512
"""Bytes that PyTorch's allocator on a GPU rounds to."""

TOWER = "image tower"
WITHOUT_LAYERS = ("start", "head", "loss")
"""Phases in which no linear layer runs but the head."""

FEW_LAYERS = 4
"""Decoder layers of a shortened model: the last, which skips tokens, two between, and the first."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The settings that decide how a pack is computed."""

    policy: PolicyConfig
    loss: tuple[LossConfig, ...]
    kernels: bool
    gpu: bool  # what a GPU would run; False: what a CPU does
    keep_logits: bool  # whether the exponentials of a trained head are kept for its gradient
    cached_features: bool  # whether the image features come from the cache, and no tower runs


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

    Layers of a decoder are alike: a model of many is run with a few, once with one more, and what that one adds is
    added for all others. A frozen tower keeps nothing for the backward pass and runs apart, once and with few blocks.
    """
    num_layers = int(config.get_text_config().num_hidden_layers)
    counts = (num_layers,) if num_layers <= FEW_LAYERS + 1 else (FEW_LAYERS, FEW_LAYERS + 1)
    if choices.policy.train.vision_tower or choices.policy.train.projector:
        runs = [_run(_shortened(config, count), choices, batch) for count in counts]
        return _extrapolated(runs[0], runs[-1], num_layers - counts[0])
    with_features = dataclasses.replace(choices, cached_features=True)
    runs = [_run(_shortened(config, count, blocks=1), with_features, batch) for count in counts]
    result = _extrapolated(runs[0], runs[-1], num_layers - counts[0])
    if choices.cached_features or not batch.images:
        return result
    tower = _run_tower(_shortened(config, 1, blocks=2), choices, batch)
    return dataclasses.replace(result, peaks={**result.peaks, TOWER: tower})


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


def _shortened(config: Any, num_layers: int, blocks: int | None = None) -> Any:
    """Return a config of fewer decoder layers, and of fewer blocks in Qwen's tower: one attends in windows, if any do.

    LLaVA's tower stays whole where it runs, because transformers keeps what each of its layers puts out.
    """
    config = copy.deepcopy(config)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    if blocks is not None and hasattr(vision, "depth"):
        if hasattr(vision, "fullatt_block_indexes"):
            full = [min(n, blocks - 1) for n in vision.fullatt_block_indexes if n < vision.depth]
            vision.fullatt_block_indexes = full[:1]
        vision.depth = min(blocks, vision.depth)
    elif blocks == 1:
        vision.num_hidden_layers = 1
    return config


def _run_tower(config: Any, choices: Choices, batch: PackedBatch) -> Peak:
    """Run the frozen tower and projector over a pack's images."""
    with _fake(choices):
        policy = _policy(config, choices)
        live = LiveBytes(opaque.inside if choices.gpu else None, BLOCK if choices.gpu else 1)
        with live:
            live.enter(TOWER)
            image_features(policy, batch.images)
    return live.peaks[TOWER]


def _run(config: Any, choices: Choices, batch: PackedBatch) -> Profile:
    """Run forward and backward of a pack, phase by phase."""
    with _fake(choices) as fake:
        policy = _policy(config, choices)
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
        width = policy.base.config.get_text_config().hidden_size
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


@contextlib.contextmanager
def _fake(choices: Choices) -> Iterator[FakeTensorMode]:
    """Make every tensor fake, and take the choices that load_policy makes on a GPU."""
    tower_arguments = policy_module._tower_arguments
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def arguments_of_real_sizes(policy: Any, images: Any) -> dict[str, Any]:
        with _disable_current_modes():
            return tower_arguments(policy, images)

    def pixels(images: Any, device: Any) -> Tensor:
        with _disable_current_modes():
            real = joined_pixels(images)
        return torch.empty(real.shape, dtype=real.dtype) if choices.gpu else fake.from_tensor(real)  # a GPU has a copy

    replaced: list[tuple[Any, str, Any]] = [
        (patches, "_agree", lambda got, own: got.shape == own.shape),  # there are no values to compare
        (policy_module, "_tower_arguments", arguments_of_real_sizes),
        (policy_module, "_pixels", pixels),
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", _make_adapter_beside_its_layer),
        (nn.Module, "to", lambda module, *where, **options: module),  # built in the right place
        (_HEAD, "_budget", lambda device: 2**60 if choices.keep_logits else 1),
    ]
    if choices.gpu:
        replaced.append((launch, "runs_triton", lambda x: choices.kernels))
        replaced.append((attention, "causal_attention", attention._sdpa))  # a CPU's own, and fake tensors lie on one
    caches = (attention._bottom_right, attention._in_window, attention._cumulative)
    for cache in caches:
        cache.cache_clear()  # of real tensors, and below of fake ones
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        for cache in caches:
            stack.callback(cache.cache_clear)
        yield stack.enter_context(fake)


def _make_adapter_beside_its_layer(layer: Any, adapter_name: str, device: Any = None) -> None:
    """Do what peft does by assigning to a parameter's data, which fake tensors refuse."""
    weight = layer.get_base_layer().weight
    for name in ("lora_A", "lora_B"):
        linear = getattr(layer, name)[adapter_name]
        linear.weight = nn.Parameter(torch.empty(linear.weight.shape, device=weight.device, dtype=weight.dtype))


def _policy(config: Any, choices: Choices) -> Policy:
    """Build the policy through load_policy itself; only reading its weights is replaced."""
    cpu = torch.device("cpu")
    wanted = dataclasses.replace(choices.policy, base_weights="bfloat16", attention="auto")
    with (
        mock.patch.object(policy_module, "load_weights", lambda *arguments: build(config, wanted, cpu)),
        mock.patch.object(policy_module, "merge_adapter", lambda *arguments: ""),  # into weights of the same shapes
        # The tower takes what a GPU takes in any case: transformers' own code loops over images.
        mock.patch.object(policy_module, "choose_backend", lambda *arguments, **options: "varlen"),
    ):
        policy = policy_module.load_policy(wanted, cpu, kernels="auto" if choices.kernels else "off")
    varlen = choices.gpu and wanted.dtype == "bfloat16" and choices.policy.attention != "sdpa"
    return dataclasses.replace(policy, attention_backend="varlen" if varlen else "sdpa")


def _collect_gradients(policy: Policy, live: LiveBytes) -> None:
    """Do with gradients what the engine does: each is added to an fp32 one as soon as it is finished.

    What they take in fp32 is counted apart, and the layer that they belong to names the phase.
    """
    num_layers = int(policy.base.config.get_text_config().num_hidden_layers)
    names = {num_layers - 1: "last", num_layers - 2: "last but one", 1: "second", 0: "first"}

    def hook(phase: str) -> Any:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            if weight.dtype == torch.float32:  # the gradient stays as it is
                live.forget(weight.grad)
            live.enter(phase)
            live.add_gradient(weight.numel() * 4)
            weight.grad = None

        return take

    for name, weight in policy.trained_parameters().items():
        if layer := re.search(r"language_model\.layers\.(\d+)\.", name):
            phase = f"backward, {names.get(int(layer[1]), 'between')} layer"
        elif "embed_tokens" in name:
            phase = "backward, embeddings"
        else:
            phase = "backward, head" if name.startswith(("lm_head", "model.language_model.norm")) else "backward, tower"
        weight.register_post_accumulate_grad_hook(hook(phase))


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
