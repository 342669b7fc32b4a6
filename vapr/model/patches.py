"""Every change that vapr makes to the modules of transformers and peft.

Weights, their names and the classes of modules stay. What is replaced is a module's ``forward``, by a function below.

| what | by what | why | the test that would miss it |
| --- | --- | --- | --- |
| attention of the decoder, and of Qwen's and Pixtral's towers | functions that `attention.py` registers with transformers' `AttentionInterface` | a decoder layer left as it is attends over a forest; a tower makes one call for all windows or images | `test_patches`: `layers_left`; `test_gpu`: `vision_tower` |
| dropout | a probability of 0 | shared and separate sequences would differ | `test_policy`: `dropout` |
| peft's LoRA layers | `adapted_linear` | three passes over the output less, on any device | `test_patches`: `adapters` |
| frozen linear layers, on a CPU | `frozen_linear` | products in fp32 by the faster library | `test_exactness`: `onednn` |
| patch embedding of Qwen's tower | `patches_by_matmul` | a matrix product, which Conv3d computes more slowly on a CPU | `test_policy`: `equal_patches` |
| the loop over decoder layers | `run_decoder`, `decoder_layer` of `decoder.py` | one kernel rotates keys and gathers them; the last layer skips tokens that predict nothing | `test_patches`: `launches`; `test_policy`: `last_layer` |
| norm and linear layers that read it, norm and gated MLP | `joint_attention`, `joint_mlp` there | products as narrow as an adapter's rank become columns of wide ones; neither a norm's output nor the input of `down` is kept | `test_patches`: `launches`; `test_adapted_linears`: `kept` |
| layers of LLaVA's tower behind the one whose output is taken | `hand_through` | nobody reads what they compute | `test_policy`: `unused_layers` |
| RMSNorms, with kernels | `fused_norm`, Gemma's `fused_norm_around_one` | 8 passes over the memory become 4 | `test_patches`: `every_module` |
| gated MLPs, with kernels | `fused_mlp` | silu(gate) is neither stored nor read again | `test_patches`: `every_module` |
| attention of Qwen's tower, with kernels on a GPU in half precision | `tower_attention` | rotation in one pass, not one in fp32 for each product and sum | `test_tower_patches`: `features` |
| frozen gated MLPs of Qwen2.5-VL's tower, likewise | `padded_mlp` | rows that begin at multiples of 16 bytes; cuBLAS is slow at others | `test_tower_patches`: `padded` |

All of it is plain and none of it costs anything: a step dispatches fewer operations than with transformers' own loop. The
library's own way to exchange layers, ``kernelize``, needs another package, takes all modules of a class, and knows no norm
that adds; so of transformers' ways only the attention interface and the arguments of the tower are used.

A name promises nothing about what a module computes. So of every kind (class, sizes, settings) one module is run on
random input before and after. A kind whose outputs differ by more than rounding stays as it is, and the caller is told.

T = packed tokens, or patches of the tower; H = query heads, G = key heads, E = head size, D = hidden size, O = output
size of a linear layer.
"""  # noqa: E501

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from vapr.batches.sequences import LastQueries
from vapr.families import FAMILIES
from vapr.model.attention import BY_IMAGE, LANGUAGE_MODEL, VISION_TOWER, varlen_attention
from vapr.model.decoder import (
    Attend,
    Stream,
    Tables,
    decoder_layer,
    query_scale_step,
    query_scales,
    rotary_tables,
    scaled_queries,
    transformers_layer,
)
from vapr.model.joint_layers import JointDecoderLayer
from vapr.model.quantized import QuantizedLinear
from vapr_kernels import add_rms_norm, launch, lora_linear, rms_norm, swiglu
from vapr_kernels.matmul import linear
from vapr_kernels.rotary import rotary as rotate

Forward = Callable[..., Any]
SILU = (nn.SiLU, type(ACT2FN["silu"]))

MULTIPLE = 8
"""Rows of 16 bytes in bf16: what cuBLAS' fast kernels ask of a matrix."""

ROWS = 16
"""Rows of the random input on which modules are tried."""


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton kernels can serve a policy of this dtype on this device."""
    return launch.runs_triton(torch.empty(0, device=device)) and dtype in (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def patch(
    base: Any, family: str, backend: str, *, kernels: bool, joint: bool = True
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Change the modules of a model as the table above says.

    Args:
        base: a model of one of the families, on the device where it will run, its adapters included.
        backend: of attention, see :func:`vapr.model.attention.choose_backend`.
        kernels: whether norms, gated MLPs, rotations and additions run fused.
        joint: whether layers that read the same rows are joined, and differentiated by hand.

    Returns:
        The numbers of the decoder layers that compute what :func:`decoder_layer` does, and the classes of which some
        modules compute something else and stay as they are.
    """
    decoder, tower = FAMILIES[family].decoder(base), getattr(base.model, "visual", None)  # only Qwen's tower is changed
    decoder.config._attn_implementation = LANGUAGE_MODEL
    left = []
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, LoraLinear):
            _replace([module], adapted_linear)
    _replace(FAMILIES[family].unused_layers(base), hand_through)
    if decoder.norm.weight.device.type == "cpu":
        linears = [module for module in base.modules() if type(module) is nn.Linear and not module.weight.requires_grad]
        _replace(linears, frozen_linear)
    if tower is not None:
        _replace([tower.patch_embed.proj], patches_by_matmul)
        if backend != "sdpa":  # whose path loops over windows
            tower.config._attn_implementation = VISION_TOWER
            left += patch_tower(tower) if kernels else []
    if FAMILIES[family].attends_by_image:
        attending: list[Any] = FAMILIES[family].modules(base, FAMILIES[family].tower)
        for module in attending:
            module.config._attn_implementation = BY_IMAGE[backend]
    if kernels:
        norms = [module for module in base.modules() if type(module).__name__.endswith("RMSNorm")]
        mlps = [module for module in base.modules() if _is_gated_mlp(module) and "forward" not in vars(module)]
        for forward, gemmas in ((fused_norm, False), (fused_norm_around_one, True)):
            kind = [norm for norm in norms if hasattr(norm, "eps") == gemmas]
            left += _replace_where_same(kind, forward, _try_norm)
        left += _replace_where_same(mlps, fused_mlp, _try_mlp)
    step = query_scale_step(decoder)  # far apart where queries are scaled by how far they are
    positions = (torch.arange(ROWS, device=decoder.norm.weight.device) * step).expand(3, -1)
    tables = rotary_tables(decoder, positions[: FAMILIES[family].position_axes])
    try_layer = functools.partial(_try_layer, tables=tables)
    written_out = functools.partial(_written_out, kernels=kernels, scales=query_scales(decoder, positions[0]))
    own = functools.partial(transformers_layer, position_ids=positions[:1])
    for layer in decoder.layers:
        layer.joint = None
    same, different = same_with(written_out, decoder.layers, try_layer, own)
    if joint:
        _join(decoder.layers, same, written_out, try_layer, own)
    numbers = frozenset(number for number, layer in enumerate(decoder.layers) if layer in same)
    return numbers, tuple(dict.fromkeys([*left, *different]))


def _join(
    layers: Iterable[Any], written_out: Iterable[Any], run: Forward, attempt: Callable[..., list[Tensor]], own: Forward
) -> None:
    """Join what reads the same rows in the layers that are written out, where that computes the same."""
    *others, last = layers
    for number, alike in enumerate((others, [last])):
        candidates = [layer for layer in alike if layer in written_out]
        for layer in candidates:
            layer.joint = JointDecoderLayer.of(layer, is_last=number == 1)
        candidates = [layer for layer in candidates if layer.joint is not None]
        same, _ = same_with(run, candidates, attempt, own)
        for layer in candidates:
            layer.joint = layer.joint if layer in same else None


# What forwards are replaced by.


def adapted_linear(layer: Any, x: Tensor) -> Tensor:
    """Run a linear layer with an adapter, (..., D) -> (..., O), without peft's passes over the output."""
    if layer.disable_adapters:
        return layer.base_layer(x)
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        return base.adapted(x, a, b, layer.scaling[name])
    return lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])


def hand_through(layer: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Return what a layer was given."""
    return hidden_states


def patches_by_matmul(convolution: Any, patches: Tensor) -> Tensor:
    """Embed patches (T, channels, time, height, width) -> (T, D). Each has one position: a matrix product."""
    return linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def frozen_linear(layer: Any, x: Tensor) -> Tensor:
    """Run a linear layer that is not trained on (..., D)."""
    return linear(x, layer.weight, layer.bias)


def fused_norm(module: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """Run an RMSNorm on (..., D). With a residual (..., D), norm the sum and return the sum, too."""
    weight, eps = module.weight, module.variance_epsilon
    if residual is None:
        return rms_norm(x.flatten(0, -2), weight, eps).view_as(x)
    normed, total = add_rms_norm(x.flatten(0, -2), residual.flatten(0, -2), weight, eps)
    return normed.view_as(x), total.view_as(x)


def fused_norm_around_one(module: Any, x: Tensor) -> Tensor:
    """Run Gemma's RMSNorm on (..., D): it scales by 1 more than its weight, a sum that half precision would round."""
    weight = 1.0 + module.weight.to(torch.promote_types(x.dtype, torch.float32))
    return rms_norm(x.flatten(0, -2), weight, module.eps).view_as(x)


def fused_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Run ``down(silu(gate(x)) * up(x))`` on (..., D)."""
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view_as(up))


def padded_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Run a gated MLP on (T, D) with the padded weights that :func:`_pad_mlp` made."""
    gate = F.linear(x, mlp.padded_gate, mlp.padded_gate_bias)
    up = F.linear(x, mlp.padded_up, mlp.padded_up_bias)
    return F.linear(swiglu(gate, up), mlp.padded_down, mlp.down_proj.bias)


def tower_attention(
    module: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Run attention of Qwen's tower on (T, D), inside images or windows that ``cu_seqlens`` (int32) bounds."""
    q, k, v = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # each (T, H, E)
    q, k = (rotate(x, *position_embeddings) for x in (q, k))
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else int(max_seqlen)
    out = varlen_attention(q, k, v, cu_seqlens, longest, scale=module.scaling)
    return module.proj(out.flatten(1))


@torch.no_grad()
def patch_tower(tower: Any) -> list[str]:
    """Replace attention and the frozen MLPs of odd width in Qwen's tower, whose attention is ``VISION_TOWER``.

    Returns the classes that stay as they are, because they compute something else.
    """
    left = _replace_where_same([block.attn for block in tower.blocks], tower_attention, _try_tower_attention)
    mlps = odd_mlps(tower)
    for mlp in mlps:
        _pad_mlp(mlp)
    return left + _replace_where_same(mlps, padded_mlp, _try_mlp)


def odd_mlps(tower: Any) -> list[Any]:
    """Return the MLPs of Qwen's tower that are padded."""
    return [block.mlp for block in tower.blocks if _is_odd(block.mlp)]


def padded_width(width: int) -> int:
    """Return the multiple of :data:`MULTIPLE` that a width is padded to."""
    return -(-width // MULTIPLE) * MULTIPLE


def _is_gated_mlp(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(hasattr(module, name) for name in parts) and isinstance(module.act_fn, SILU)


def _is_odd(mlp: Any) -> bool:
    """Return whether a gated MLP is frozen and its matrix products are slow at its width: Qwen2.5-VL's 3,420."""
    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in layers)
    return plain and mlp.down_proj.in_features != padded_width(mlp.down_proj.in_features)


def _pad_mlp(mlp: Any) -> None:
    """Pad the intermediate columns of a gated MLP with zeros, which add nothing.

    Its weights stay parameters of the same names and shapes: they become parts of the padded ones, which are not saved.
    """
    width = padded_width(mlp.down_proj.in_features)
    for name, layer in (("padded_gate", mlp.gate_proj), ("padded_up", mlp.up_proj)):
        mlp.register_buffer(name, _padded(layer.weight, 0, width), persistent=False)
        bias = None if layer.bias is None else _padded(layer.bias, 0, width)
        mlp.register_buffer(f"{name}_bias", bias, persistent=False)
    mlp.register_buffer("padded_down", _padded(mlp.down_proj.weight, 1, width), persistent=False)


def _padded(own: nn.Parameter, dim: int, width: int) -> Tensor:
    """Return ``own`` padded with zeros to ``width`` along ``dim``; its data becomes a part of what is returned."""
    padded = own.new_zeros([width if d == dim else size for d, size in enumerate(own.shape)])
    part = padded.narrow(dim, 0, own.shape[dim])
    part.copy_(own)
    own.data = part
    return padded


# Trials.


def _replace(modules: Iterable[Any], forward: Forward) -> None:
    for module in modules:
        module.forward = types.MethodType(forward, module)


def _replace_where_same(modules: Iterable[Any], forward: Forward, attempt: Callable[..., list[Tensor]]) -> list[str]:
    """Replace the forward of modules that compute the same with it. Returns the classes of the others."""
    same, left = same_with(forward, modules, attempt, nn.Module.__call__)
    _replace(same, forward)
    return left


def same_with(
    forward: Forward, modules: Iterable[Any], attempt: Callable[..., list[Tensor]], own: Forward
) -> tuple[list[Any], list[str]]:
    """Return the modules whose kind computes the same with ``forward`` as with ``own``, and the classes of the others.

    ``attempt`` takes a module and one of the two, and returns outputs for random input, each (..., ROWS, width).
    """
    kinds: dict[Any, list[Any]] = {}
    for module in modules:
        kinds.setdefault(_kind(module), []).append(module)
    same, left = [], []
    for alike in kinds.values():
        truth = attempt(alike[0], own)
        try:
            agree = all(_agree(*outs) for outs in zip(attempt(alike[0], forward), truth, strict=True))
        except (AttributeError, TypeError, ValueError):  # it lacks a part, or a part takes something else
            agree = False
        if agree:
            same += alike
        else:
            left.append(type(alike[0]).__name__)
    return same, left


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Return what modules that compute the same have in common: classes, sizes, and settings of their parts."""

    def settings(part: nn.Module) -> list[tuple[str, Any]]:
        plain = [(name, value) for name, value in vars(part).items() if isinstance(value, bool | int | float | str)]
        return sorted((name, value) for name, value in plain if name != "layer_idx")

    parts = [(name, type(part), *settings(part)) for name, part in module.named_modules()]
    return (*parts, *((name, parameter.shape) for name, parameter in module.named_parameters()))


def _agree(got: Tensor, own: Tensor) -> bool:
    """Return whether every row is the same to a few roundings of its dtype (to sums in another order in fp32)."""
    allowed = max(4 * torch.finfo(own.dtype).eps, 1e-4)
    difference = (got.float() - own.float()).square().mean(-1)
    return bool((difference <= allowed**2 * own.float().square().mean(-1)).all())


def _random_rows(width: int, like: Tensor) -> Tensor:
    """Return the same input each time, (ROWS, width), from a generator of its own."""
    drawn = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    return drawn.to(like.device, like.dtype)


def _try_norm(norm: Any, forward: Forward) -> list[Tensor]:
    """Run rows from very small, where epsilon counts, to large."""
    x = _random_rows(len(norm.weight), norm.weight)
    scale = torch.logspace(-3, 2, ROWS).to(x.device, x.dtype)
    return [forward(norm, x * scale[:, None])]


def _try_mlp(mlp: Any, forward: Forward) -> list[Tensor]:
    """Run gates of about 2, where activations that look alike around 0 differ."""
    x = _random_rows(mlp.gate_proj.in_features, mlp.down_proj.weight)
    return [forward(mlp, x * (2 / mlp.gate_proj(x).float().std()).to(x.dtype))]


def _try_tower_attention(attention: Any, forward: Forward) -> list[Tensor]:
    """Run two images of different length."""
    x = _random_rows(attention.qkv.in_features, attention.qkv.weight)
    cu_seqlens = torch.tensor([0, 5, len(x)], device=x.device, dtype=torch.int32)
    angles = _random_rows(attention.head_dim // 2, attention.qkv.weight).float().repeat(1, 2)
    tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return [forward(attention, x, cu_seqlens=cu_seqlens, position_embeddings=tables, max_seqlen=len(x) - 5)]


def _written_out(
    layer: Any, x: Tensor, tables: Tables, attend: Attend, *, kernels: bool, scales: Tensor | None = None
) -> Tensor:
    only, attend = None, scaled_queries(attend, scales)
    if layer.joint is not None and layer.joint.qkv is None:  # the last one, which runs on some rows
        every = torch.arange(len(x), device=x.device)
        only = LastQueries(every, every, (len(x),), every)
    return decoder_layer(layer, Stream(x), tables, attend, only=only, kernels=kernels).total()


def _try_layer(layer: Any, forward: Forward, tables: Sequence[Tables]) -> list[Tensor]:
    """Return queries, keys and values as attention gets them, and what the layer makes of what attention returns."""
    seen: list[Tensor] = []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float, rotary: tuple[Tensor, Tensor] | None = None, only: None = None
    ) -> Tensor:
        if rotary is not None:
            q, k = (rotate(x, *rotary) for x in (q, k))
        seen.extend((q * scale, k, v))
        return q

    here = tables[layer.self_attn.layer_idx]
    routed = hasattr(layer.mlp, "experts")
    if routed:  # experts run transformers' own code in any case, and a rounding chooses between those that nearly tie
        _replace([layer.mlp], hand_through)
    try:
        out = forward(layer, _random_rows(layer.self_attn.q_proj.in_features, here[0]), here, attend)
    finally:
        if routed:
            del layer.mlp.forward
    return [*seen, out]
