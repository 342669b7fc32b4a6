"""A frozen base stored in 4 or 8 bits: linear layers whose weight is restored where it is used, and kept nowhere.

| kind | what is stored of a weight (O, D) | bits a weight |
| --- | --- | --- |
| nf4 | codes of bitsandbytes' NormalFloat4 in blocks of 64 (arXiv 2305.14314), block maxima in 8 bits | 4.13 |
| fp8 | float8_e4m3fn and a power of two for each row, so that restoring rounds nothing, in bfloat16 neither | 8 |
| int8 | steps of 1/127 of each row's largest | 8 |

There is one path: the reference and the policy, with gradients and without, restore the same weight and multiply it
with the same call. So a policy equals its reference before the first update to the last bit. The library's own layer
(bitsandbytes' Linear4bit) takes other kernels where no gradient is wanted.

T = tokens, D = input width, O = output width, R = rank.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

from vapr.errors import UserError, one_line
from vapr_kernels.lora_linear import lora_linear_bwd, lora_linear_fwd

BLOCK = 64
"""Weights that share a scale in nf4, whatever the width of the layer: blocks run on into the next row."""

GROUP = 256
"""Blocks whose scales share an fp32 number."""

LARGEST_FP8 = 448.0

BITSANDBYTES = "0.50.2"
"""The oldest version that was tested. 0.46 and 0.48 make NaN of blocks of zeros, and AdamW in 8 bits on a GPU alone."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer that stores its weight as ``kind``.

    Args:
        layer: whose weight, in the compute dtype, is stored, and whose bias stays.
        kind: ``nf4``, ``fp8`` or ``int8``.
        device: where the weight is quantised and stays.
    """

    codes: Tensor
    scales: Tensor  # bytes: DeepSpeed and peft round floating buffers when they change a module's dtype
    steps: Tensor | None  # nf4 alone

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype = layer.weight.dtype
        weight = layer.weight.detach().to(device)
        store = {"nf4": _store_nf4, "fp8": _store_fp8, "int8": _store_int8}[kind]
        codes, scales, steps = store(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.contiguous().view(torch.uint8))
        self.register_buffer("steps", steps)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Restore the weight, (O, D), in the dtype that it had."""
        with torch.no_grad():
            scales = self.scales.view(torch.float32)
            if self.kind == "nf4":
                assert self.steps is not None
                return _restore_nf4(self.codes, scales, self.steps, (self.out_features, self.in_features), self.dtype)
            if self.kind == "fp8":  # a power of two times four bits: exact
                return self.codes.view(torch.float8_e4m3fn).to(self.dtype).mul_(scales.to(self.dtype))
            # ``out`` takes what is multiplied in fp32, without a copy of it in fp32.
            return torch.mul(self.codes, scales, out=torch.empty_like(self.codes, dtype=self.dtype))

    @property
    def num_bytes(self) -> int:
        """Return what is stored of the weight, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on (..., D) -> (..., O)."""
        return self.adapted(x, None, None, 1.0)

    def adapted(self, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
        """Run the layer with a LoRA adapter ``a`` (R, D), ``b`` (O, R) on (..., D) -> (..., O); None: without."""
        out = _Restored.apply(x.reshape(-1, x.shape[-1]), self, a, b, scale)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class _Restored(torch.autograd.Function):
    """``x W^T + bias + scale (x A^T) B^T``; W is restored in each direction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: QuantizedLinear, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:  # fmt: skip
        ctx.layer, ctx.scale, ctx.has_adapter = layer, scale, a is not None
        weight = layer.weight.to(x.dtype)
        if a is None or b is None:
            return F.linear(x, weight, layer.bias)
        out, down = lora_linear_fwd(x, weight, layer.bias, a, b, scale)
        ctx.save_for_backward(x, down, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        weight = ctx.layer.weight.to(dout.dtype)
        if not ctx.has_adapter:
            return dout @ weight, None, None, None, None
        x, down, a, b = ctx.saved_tensors
        dx, da, db = lora_linear_bwd(dout, x, down, weight, a, b, ctx.scale, with_dx=ctx.needs_input_grad[0])
        return dx, None, da, db, None


@dataclass(frozen=True, slots=True)
class Quantized:
    """A count of a model's layers that were quantised and of those that were not."""

    kind: str
    layers: int
    linear: int  # layers there are, the LM head included
    left: dict[str, int]  # why layers stay as they are -> how many
    num_bytes: int
    num_bytes_before: int
    dtype: torch.dtype  # before

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        left = "".join(f"; {count:,} {reason}" for reason, count in self.left.items())
        return (
            f"{self.layers:,} of {self.linear:,} linear layers as {self.kind}, {_size(self.num_bytes)} "
            f"({_size(self.num_bytes_before)} in {dtype}); as they are: embeddings, norms, convolutions{left}"
        )


def check_available(kind: str) -> None:
    """Raise UserError if a storage of the base needs a library that is not here."""
    if kind == "nf4":
        import_bitsandbytes("policy.base_weights: nf4", "take int8 or fp8, which need no library")


def import_bitsandbytes(key: str, else_do: str) -> Any:
    """Import bitsandbytes.

    Raises:
        UserError: naming what asked for it and what to do, if it is not installed, does not import or is too old.
    """
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"{key} needs bitsandbytes, which does not import ({one_line(error)}); pip install 'vapr[quant]', or "
            f"{else_do}"
        ) from None
    if Version(bitsandbytes.__version__) < Version(BITSANDBYTES):
        raise UserError(
            f"{key} needs bitsandbytes {BITSANDBYTES} or newer, and {bitsandbytes.__version__} is installed; "
            f"pip install 'vapr[quant]', or {else_do}"
        )
    return bitsandbytes


@torch.no_grad()
def quantize(base: nn.Module, head: nn.Module | None, kind: str, device: torch.device) -> Quantized:
    """Put a :class:`QuantizedLinear` in the place of every frozen linear layer of a model, one layer after the other.

    What stays: the LM head, layers that are trained or share their weight, and what is no linear layer. Only one
    layer's weight is on ``device`` as it was at any moment.

    Raises:
        UserError: if this machine cannot quantise.
    """
    check_available(kind)
    owners = Counter(id(p) for module in base.modules() for p in module.parameters(recurse=False))
    left: Counter[str] = Counter()
    replaced: dict[nn.Module, QuantizedLinear] = {}
    before = 0
    dtype = torch.bfloat16
    for parent in list(base.modules()):
        for name, layer in list(parent._modules.items()):
            if not isinstance(layer, nn.Linear) or layer.weight.requires_grad:
                continue
            if layer not in replaced:
                if reason := _why_not(layer, head, owners):
                    left[reason] += 1
                    continue
                replaced[layer] = _quantized(layer, kind, device)
                before += layer.weight.numel() * layer.weight.element_size()
                dtype = layer.weight.dtype
            setattr(parent, name, replaced[layer])
    after = sum(layer.num_bytes for layer in replaced.values())
    count = len(replaced)
    return Quantized(kind, count, count + left.total(), dict(left), after, before, dtype)


@torch.no_grad()
def dequantize(base: nn.Module) -> None:
    """Put plain linear layers with the restored weights in the places of quantised ones."""
    for parent in list(base.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, QuantizedLinear):
                with torch.device("meta"):
                    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.dtype)
                plain.weight = nn.Parameter(layer.weight, requires_grad=False)
                plain.bias = layer.bias
                setattr(parent, name, plain)


def _why_not(layer: nn.Linear, head: nn.Module | None, owners: Counter[int]) -> str | None:
    """Return why a frozen linear layer stays as it is, in words that follow a number; None: it does not."""
    if layer is head:
        return "LM head"
    if type(layer) is not nn.Linear:
        return f"of class {type(layer).__name__}, which computes something else"
    return "with a weight shared with another layer" if owners[id(layer.weight)] > 1 else None


def _quantized(layer: nn.Linear, kind: str, device: torch.device) -> QuantizedLinear:
    try:
        return QuantizedLinear(layer, kind, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"policy.base_weights: {kind} cannot be made on {device} here ({one_line(error)}); take another one of "
            "nf4, fp8 and int8, or bfloat16"
        ) from None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"


# Codes, fp32 scales and, for nf4, steps of a weight (O, D); and back.


def _store_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (two a byte), the largest block maximum of each group (groups, 1), and 8-bit steps (groups, GROUP).

    A block's maximum is ``(step / 255)**2`` of the group's largest: squares keep small blocks beside large ones. The
    library's own way for these (nested statistics) rounds by a table that other devices search in another way.
    """
    flat = F.pad(weight.flatten(), (0, weight.numel() % 2))  # two codes a byte
    codes, maxima = torch.ops.bitsandbytes.quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
    groups = F.pad(maxima.float(), (0, -maxima.numel() % GROUP)).view(-1, GROUP)
    largest = groups.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    steps = (groups / largest).sqrt().mul(255).round().clamp(min=1).to(torch.uint8)
    return codes, largest, steps


def _restore_nf4(codes: Tensor, largest: Tensor, steps: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1]
    even = size + size % 2
    maxima = (steps.float() / 255).square_().mul_(largest.view(-1, 1)).flatten()[: -(-even // BLOCK)]
    flat = torch.ops.bitsandbytes.dequantize_4bit(codes, maxima, BLOCK, "nf4", (1, even), dtype)
    return flat.flatten()[:size].view(shape)


def _store_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the bytes of float8_e4m3fn (O, D) and a power of two for each row (O, 1)."""
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True)
    _, exponent = torch.frexp(largest / LARGEST_FP8)
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)  # damage stays visible: inf would become 448
    return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales, None


def _store_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return steps (O, D) in int8, and the size of a step for each row (O, 1)."""
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scales).round().to(torch.int8), scales, None
