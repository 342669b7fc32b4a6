"""Fused kernels inside transformers' modules, whose code is neither copied nor changed.

Two of the operations span modules: the addition before a norm, and the product after an activation. There the module
returns its operand, and the operator that the modelling code applies to it runs the fused kernel. Rotary embeddings are
applied where keys are gathered (attention.py), so the attention modules are given a function that leaves them out.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vapr_kernels import add_rms_norm, launch, rms_norm, swiglu

SILU = (nn.SiLU, type(ACT2FN["silu"]))


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can serve a policy of this dtype there."""
    return launch.runs_triton(torch.empty(0, device=device)) and dtype in (torch.bfloat16, torch.float16, torch.float32)


def fuse(base: nn.Module, decoder_layers: nn.ModuleList) -> None:
    """Let norms, gated MLPs and residual additions of a model run fused, and leave rotary embeddings to attention."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and isinstance(
            module.act_fn, SILU
        ):
            module.act_fn = _Silu()
    for layer in decoder_layers:
        attention: Any = layer.self_attn
        attention.forward = types.MethodType(_attend(type(attention).forward), attention)


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


class _Silu(nn.Module):
    def forward(self, gate: Tensor) -> _Gate:
        return _Gate(gate)


def _attend(forward: Any) -> Callable[..., tuple[_Branch, Any]]:
    """``forward`` of an attention class, which leaves rotating to whoever is handed the tables as ``rotary``."""
    unrotated = _without_rotary(forward)

    def attend(self: nn.Module, *args: Any, rotary: Any = None, **kwargs: Any) -> tuple[_Branch, Any]:
        if rotary is None:  # not a packed batch: somebody calls the model as transformers would
            out, weights = forward(self, *args, **kwargs)
        else:
            out, weights = unrotated(self, *args, rotary=rotary, **kwargs)
        return _Branch(out), weights

    return attend


def _without_rotary(forward: Any) -> Any:
    """``forward`` of an attention class with its rotary function bound to one that does nothing."""
    assert "apply_rotary_pos_emb" in forward.__code__.co_names, f"{forward.__qualname__} rotates by another name"
    names = {**forward.__globals__, "apply_rotary_pos_emb": lambda q, k, *tables, **options: (q, k)}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
