"""Qwen's vision tower on a GPU: rotary embeddings in one pass, and MLPs of a width that tensor cores like.

T = patches, H = heads, E = head dim, D = hidden width, I = intermediate size of the MLP.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vapr.model.attention import varlen_attention
from vapr.model.fused import fuse_kinds, random_rows
from vapr_kernels import rotary, swiglu

MULTIPLE = 8
"""Rows of 16 bytes in bf16: what cuBLAS' fast kernels ask of a matrix."""


@torch.no_grad()
def fuse_tower(tower: Any) -> list[str]:
    """Let attention of Qwen's tower rotate in a kernel, and frozen gated MLPs of odd width run in a wider one.

    Args:
        tower: on the device where it runs, with attention ``vapr_flash_vision``.

    Returns:
        Classes that stay as they are, because they compute something else.
    """
    attentions = [block.attn for block in tower.blocks]
    left = fuse_kinds(attentions, lambda attention: (attention, types.MethodType(_attend, attention)), _try_attention)
    mlps = [block.mlp for block in tower.blocks if _is_odd(block.mlp)]
    return left + fuse_kinds(mlps, lambda mlp: (mlp, _Padded(mlp)), _try_mlp)


def _attend(
    module: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Forward of Qwen's vision attention on (T, D): inside images or windows, which ``cu_seqlens`` bounds."""
    q, k, v = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # each (T, H, E)
    q, k = (rotary(x, *position_embeddings) for x in (q, k))
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else int(max_seqlen)
    out = varlen_attention(q, k, v, cu_seqlens, longest, scale=module.scaling)
    return module.proj(out.flatten(1))


def _try_attention(attention: Any) -> list[Tensor]:
    """Two images of different length."""
    x = random_rows(attention.qkv.in_features, attention.qkv.weight)[0]
    cu_seqlens = torch.tensor([0, 5, len(x)], device=x.device, dtype=torch.int32)
    angles = random_rows(attention.head_dim // 2, attention.qkv.weight)[0].float().repeat(1, 2)
    tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return [attention(x, cu_seqlens=cu_seqlens, position_embeddings=tables, max_seqlen=len(x) - 5)]


def _is_odd(mlp: Any) -> bool:
    """Whether ``mlp`` is gated, frozen, and of a width that its matrix products are slow at: Qwen2.5-VL's 3,420."""
    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in layers)
    return plain and mlp.down_proj.in_features % MULTIPLE != 0


class _Padded:
    """Forward of a gated MLP whose intermediate columns are padded with zeros, which add nothing.

    Its weights stay the parameters that they were, of the same names and shapes: they become parts of the padded ones.
    """

    def __init__(self, mlp: Any) -> None:
        width = -(-mlp.down_proj.in_features // MULTIPLE) * MULTIPLE
        self.gate, self.gate_bias = _padded_rows(mlp.gate_proj, width)
        self.up, self.up_bias = _padded_rows(mlp.up_proj, width)
        down = mlp.down_proj
        self.down = down.weight.new_zeros(down.out_features, width)
        self.down[:, : down.in_features] = down.weight
        down.weight.data = self.down[:, : down.in_features]
        self.down_bias = down.bias

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)
        product = swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view_as(up)
        return F.linear(product, self.down, self.down_bias)


def _padded_rows(layer: nn.Linear, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight (width, D) and bias (width,) that begin with the layer's own."""
    padded = []
    for own in (layer.weight, layer.bias):
        if own is None:
            padded.append(None)
            continue
        wide = own.new_zeros(width, *own.shape[1:])
        wide[: len(own)] = own
        own.data = wide[: len(own)]
        padded.append(wide)
    weight, bias = padded
    assert weight is not None
    return weight, bias


def _try_mlp(mlp: Any) -> list[Tensor]:
    return [mlp(random_rows(mlp.gate_proj.in_features, mlp.gate_proj.weight))]
