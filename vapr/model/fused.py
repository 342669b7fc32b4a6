"""Fused kernels inside transformers' modules, whose code is neither copied nor changed.

Two of the operations span modules: the addition before a norm, and the product after an activation. There the module
returns its operand, and the operator that the modelling code applies to it runs the fused kernel. Rotary embeddings are
applied where keys are gathered (attention.py), so the attention modules are given a function that leaves them out.

Modules are found by name, which promises nothing about what they compute. So one of every kind is tried on random input
before and after; where the two differ by more than rounding, the kind stays as it is, and the caller is told.
"""

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN

from vapr_kernels import add_rms_norm, launch, rms_norm, swiglu
from vapr_kernels.rotary import rotary as rotate

SILU = (nn.SiLU, type(ACT2FN["silu"]))
ROWS = 16  # of the random input
SEED = 0
ATTENTION_IN_TRIALS = "vapr_trial"


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can serve a policy of this dtype there."""
    return launch.runs_triton(torch.empty(0, device=device)) and dtype in (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def fuse(base: nn.Module, layers: nn.ModuleList, tables: tuple[Tensor, Tensor]) -> tuple[str, ...]:
    """Let norms, gated MLPs and residual additions of a model run fused, and leave rotary embeddings to attention.

    Args:
        base: the whole model, on the device where it will run.
        layers: the decoder layers of its language model.
        tables: cosines and sines of ``ROWS`` positions, each (1, ROWS, E).

    Returns:
        Classes of which some modules stay as they are, because they compute something else than the kernels.
    """
    norms = [module for module in base.modules() if type(module).__name__.endswith("RMSNorm")]
    mlps = [module for module in base.modules() if _is_gated_mlp(module)]
    left = fuse_kinds(norms, lambda norm: (norm, types.MethodType(_norm, norm)), _try_norm)
    left += fuse_kinds(mlps, lambda mlp: (mlp.act_fn, _Gate), _try_mlp)
    attention: Any = layers[0].self_attn
    config = attention.config  # of all layers
    implementation, config._attn_implementation = config._attn_implementation, ATTENTION_IN_TRIALS
    left += fuse_kinds(layers, _fused_attention, lambda layer: _try_layer(layer, tables))
    config._attn_implementation = implementation
    return tuple(dict.fromkeys(left))


def _is_gated_mlp(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(hasattr(module, name) for name in parts) and isinstance(module.act_fn, SILU)


def _fused_attention(layer: Any) -> tuple[nn.Module, Callable[..., Any]]:
    attention = layer.self_attn
    return attention, types.MethodType(_attend(type(attention).forward), attention)


def fuse_kinds(
    modules: Iterable[nn.Module],
    fused: Callable[[Any], tuple[nn.Module, Callable[..., Any]]],
    attempt: Callable[[Any], list[Tensor]],
) -> list[str]:
    """Replace forwards where one module of the same kind gives the same outputs afterwards.

    Args:
        fused: module -> the module whose forward to replace, and by what.
        attempt: module -> what it computes of random input.

    Returns:
        The class of every kind that stays as it is.
    """
    kinds: dict[Any, list[nn.Module]] = {}
    for module in modules:
        kinds.setdefault(_kind(module), []).append(module)
    left = []
    for alike in kinds.values():
        own = attempt(alike[0])
        replacements: list[tuple[Any, Callable[..., Any]]] = [fused(module) for module in alike]
        for target, forward in replacements:
            target.forward = forward
        try:
            agrees = all(_agree(*outs) for outs in zip(attempt(alike[0]), own, strict=True))
        except (AttributeError, TypeError, ValueError):  # it does with an operand what no kernel does
            agrees = False
        if not agrees:
            left.append(type(alike[0]).__name__)
            for target, _ in replacements:
                del target.forward  # the class's own
    return left


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What modules that compute the same have in common: classes, sizes, and settings of their parts."""

    def settings(part: nn.Module) -> list[tuple[str, Any]]:
        plain = [(name, value) for name, value in vars(part).items() if isinstance(value, bool | int | float | str)]
        return sorted((name, value) for name, value in plain if name != "layer_idx")

    parts = [(name, type(part), *settings(part)) for name, part in module.named_modules()]
    return (*parts, *((name, parameter.shape) for name, parameter in module.named_parameters()))


def random_rows(width: int, like: Tensor) -> Tensor:
    """The same input each time, (1, ROWS, width), from a generator of its own."""
    drawn = torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(SEED))
    return drawn.to(like.device, like.dtype)


def _agree(got: Tensor, own: Tensor) -> bool:
    """Whether every row is the same to a few roundings of its dtype (to sums in another order in fp32)."""
    allowed = max(4 * torch.finfo(own.dtype).eps, 1e-4)
    difference = (got.float() - own.float()).square().mean(-1)
    return bool((difference <= allowed**2 * own.float().square().mean(-1)).all())


def _try_norm(norm: Any) -> list[Tensor]:
    """Rows from very small, where epsilon counts, to large."""
    x = random_rows(len(norm.weight), norm.weight)
    scale = torch.logspace(-3, 2, ROWS).to(x.device, x.dtype)
    return [norm(x * scale[:, None])]


def _try_mlp(mlp: Any) -> list[Tensor]:
    """Gates of about 2, where activations that look alike around 0 differ."""
    weight = mlp.down_proj.weight
    x = random_rows(mlp.gate_proj.in_features, weight)
    return [mlp(x * (2 / mlp.gate_proj(x).float().std()).to(x.dtype))]


def _try_layer(layer: Any, tables: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Queries and keys as attention is to see them, and what the layer makes of what attention returns."""
    seen: list[Tensor] = []
    x = random_rows(layer.self_attn.q_proj.in_features, tables[0])
    out = layer(x, attention_mask=None, position_embeddings=tables, segments=seen)
    return [*seen, out]


def _attention_in_trials(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    segments: list[Tensor], rotary: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Give the queries back, and put queries and keys, rotated, into ``segments``."""
    q, k = (x[0].transpose(0, 1) for x in (query, key))
    if rotary is not None:
        q, k = (rotate(x, *rotary) for x in (q, k))
    segments += [q, k]
    return q[None], None


AttentionInterface.register(ATTENTION_IN_TRIALS, _attention_in_trials)


class _Branch:
    """What attention adds to the residual stream, before it is added."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __radd__(self, residual: Tensor) -> "_Sum":
        return _Sum(residual, self.value)


class _Sum:
    """A residual stream and a branch; the norm that comes next adds them."""

    def __init__(self, residual: Tensor, branch: Tensor) -> None:
        self.residual, self.branch = residual, branch
        self.total: Tensor | None = None

    def __add__(self, other: Tensor) -> Tensor:
        return (self.residual + self.branch if self.total is None else self.total) + other


def _norm(module: Any, x: Tensor | _Sum) -> Tensor:
    """Forward of an RMSNorm (D,) on (..., D)."""
    if isinstance(x, Tensor):
        return rms_norm(x.flatten(0, -2), module.weight, module.variance_epsilon).view_as(x)
    residual = x.residual
    normed, total = add_rms_norm(
        x.branch.flatten(0, -2), residual.flatten(0, -2), module.weight, module.variance_epsilon
    )
    x.total = total.view_as(residual)
    return normed.view_as(residual)


class _Gate:
    """silu(value), before it is multiplied."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __mul__(self, up: Tensor) -> Tensor:
        return swiglu(self.value.flatten(0, -2), up.flatten(0, -2)).view_as(up)


def _attend(forward: Any) -> Callable[..., tuple[_Branch, Any]]:
    """``forward`` of an attention class, which in a packed batch hands the tables on instead of rotating."""
    unrotated = _without_rotary(forward)

    def attend(
        self: nn.Module, *args: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[_Branch, Any]:
        if "segments" in kwargs:
            cos, sin = position_embeddings
            kwargs["rotary"] = cos[0], sin[0]
        run = unrotated if "segments" in kwargs else forward  # else somebody calls the model as transformers would
        out, weights = run(self, *args, position_embeddings=position_embeddings, **kwargs)
        return _Branch(out), weights

    return attend


def _without_rotary(forward: Any) -> Any:
    """``forward`` of an attention class with its rotary function bound to one that does nothing."""
    forward = inspect.unwrap(forward)  # transformers 5.24 decorates it
    names = {**forward.__globals__, "apply_rotary_pos_emb": lambda q, k, *tables, **options: (q, k)}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
