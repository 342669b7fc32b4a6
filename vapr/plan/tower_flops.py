"""FLOPs of the image tower and projector over a pack's images: the model's own modules run on fake tensors, counted.

So no family needs formulas. Answers are remembered by the sizes of images, and blocks that are alike run once.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from vapr.config import Checkpointing
from vapr.families import FAMILIES
from vapr.families.processed_image import ProcessedImage
from vapr.model import patches
from vapr.model.policy import Policy, image_features
from vapr.plan.counted import COUNTED
from vapr.plan.fake_policy import Choices, fake_policy, faked, shortened
from vapr.plan.packs import ImageSizes, PackSizes
from vapr.plan.shapes import Shapes


def tower_flops(shapes: Shapes, pack: PackSizes, *, checkpointing: Checkpointing) -> tuple[float, bool]:
    """Count the tower and projector over a pack's images, their backward pass included where they are trained.

    Returns:
        FLOPs, and whether the features have a gradient.
    """
    level: Checkpointing = "full" if checkpointing == "full" else "none"  # the others are the decoder's
    return _remembered(shapes, tuple(sorted(pack.images, key=repr)), level, trains=True)


def tower_forward_flops(shapes: Shapes, pack: PackSizes) -> float:
    """Count the forward pass alone, with adapters off."""
    return _remembered(shapes, tuple(sorted(pack.images, key=repr)), "none", trains=False)[0]


@functools.lru_cache(maxsize=4096)
def _remembered(
    shapes: Shapes, images: tuple[ImageSizes, ...], level: Checkpointing, *, trains: bool
) -> tuple[float, bool]:  # fmt: skip
    """Run images through the tower, as the policy or as its reference."""
    policy, fake, choices = _tower(shapes, level)
    with faked(choices, fake), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        return _count(policy, counter, [image.without_pixels() for image in images], trains=trains)


@functools.lru_cache(maxsize=8)
def _tower(shapes: Shapes, level: Checkpointing) -> tuple[Policy, FakeTensorMode, Choices]:
    """Build the policy with one decoder layer, as a CPU runs it."""
    wanted = dataclasses.replace(shapes.policy, checkpointing=level, dtype="float32")
    choices = Choices(wanted, (), kernels=False, gpu=False, keep_logits=False, cached_features=False)
    with faked(choices) as fake:
        return fake_policy(shortened(shapes.config, 1), choices), fake, choices


def _count(
    policy: Policy, counter: FlopCounterMode, images: Sequence[ProcessedImage], *, trains: bool
) -> tuple[float, bool]:
    off = contextlib.nullcontext() if trains else policy.adapters_off()
    with torch.set_grad_enabled(trains), off, _alike_once(policy, counter) as again:
        features = image_features(policy, images)
        if features.requires_grad:
            features.sum().backward()
            policy.base.zero_grad()
    return float(counter.get_total_flops() + sum(again)), features.requires_grad


@contextlib.contextmanager
def _alike_once(policy: Policy, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Let each kind of block run once for inputs of the same sizes, forward and backward; later calls are looked up.

    Yields:
        The FLOPs of the calls that were looked up.
    """
    again: list[int] = []
    seen: dict[Any, Seen] = {}
    family = FAMILIES[policy.family]
    blocks = [block for tower in family.modules(policy.base, family.tower) for block in _outermost_blocks(tower)]
    with contextlib.ExitStack() as stack:
        for block in blocks:
            replaced = vars(block).get("forward")  # by patches.py
            learning = tuple(name for name, weight in block.named_parameters() if weight.requires_grad)
            kind = (patches._kind(block), getattr(replaced, "__func__", None), learning)
            run = functools.partial(_run_or_look_up, block.forward, kind, counter, seen, again)
            stack.enter_context(mock.patch.object(block, "forward", run))
        yield again


def _outermost_blocks(module: nn.Module) -> list[Any]:
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [block for child in module.children() for block in _outermost_blocks(child)]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a call of a block took, and what it returned."""

    flops: int
    out: Any  # without a graph
    learns: bool  # whether it had one


def _run_or_look_up(
    own: Callable[..., Any], kind: Any, counter: FlopCounterMode, seen: dict[Any, Seen],
    again: list[int], *arguments: Any, **options: Any,
) -> Any:  # fmt: skip
    """Run a block and its backward pass by themselves, or look up what they took. Returns outputs of their sizes."""
    leaves, structure = tree_flatten((arguments, options))
    key = (kind, torch.is_grad_enabled(), str(structure), tuple(map(_size, leaves)))
    if key in seen:
        again.append(seen[key].flops)
    else:
        before = counter.get_total_flops()
        inputs = [leaf.detach().requires_grad_() if _has_gradient(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, structure)
        out = own(*args, **kwargs)
        learning = [leaf for leaf in tree_leaves(out) if _has_gradient(leaf)]
        if learning:
            torch.autograd.backward([leaf.sum() for leaf in learning])
        detached = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, out)
        seen[key] = Seen(counter.get_total_flops() - before, detached, bool(learning))
    if not seen[key].learns:
        return seen[key].out
    # A graph without products, through which the backward pass reaches what comes before.
    through = sum((leaf.sum() for leaf in leaves if _has_gradient(leaf)), torch.zeros((), requires_grad=True))
    return tree_map(lambda leaf: leaf + through if isinstance(leaf, Tensor) else leaf, seen[key].out)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _size(value: Any) -> Any:
    """Return what a block's work depends on of one of its arguments: a fake tensor's sizes, and real values."""
    if isinstance(value, FakeTensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, Tensor):
        with _disable_current_modes():
            return value.dtype, tuple(value.flatten().tolist())
    return value
