"""The linear layers of a decoder layer that read the same rows, as vapr_kernels runs them: their weights joined.

Each weight stays the parameter that it was, with its name and its shape; its data become rows of a joint matrix, and so
do those of the adapters' first matrices. Whoever gives a parameter other data (DeepSpeed does) parts it from the joint
matrix. That is seen at the next call, and its layers are multiplied one by one from then on.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from vapr.model.quantized import QuantizedLinear
from vapr_kernels.adapted_linears import Linears, Piece


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer and its adapter, if it has one."""

    base: Any  # nn.Linear or QuantizedLinear
    down: Tensor | None  # (R, D)
    up: Tensor | None  # (O, R)
    scale: float
    adapters: LoraLinear | None


@dataclass(slots=True)
class JointLayers:
    """Linear layers that read the same rows, as they were joined."""

    linears: Linears
    _joined: list[tuple[Tensor, Tensor]]  # a parameter, and the rows of the joint matrix that are its data
    _apart: Linears | None = None
    _adapters: LoraLinear | None = None

    @property
    def adapted(self) -> bool:
        """Return whether adapters are switched on."""
        return self._adapters is not None and not self._adapters.disable_adapters

    def now(self) -> Linears:
        """Return the layers as they are stored by now."""
        if not all(_is_same_memory(own, rows) for own, rows in self._joined):
            assert self._apart is not None
            self.linears, self._joined = self._apart, []
        return self.linears


@dataclass(frozen=True, slots=True)
class JointDecoderLayer:
    """The linear layers of a decoder layer; the last one's queries read other rows than its keys and values.

    A mixture of experts has neither ``gate_up`` nor ``down``.
    """

    qkv: JointLayers | None
    q: JointLayers | None
    kv: JointLayers | None
    output: JointLayers
    gate_up: JointLayers | None
    down: JointLayers | None

    @classmethod
    def of(cls, layer: Any, *, is_last: bool) -> "JointDecoderLayer | None":
        """Join the linear layers of a layer of Llama, Qwen2 or Qwen3; None where one is something else."""
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        groups = [*([[q], [k, v]] if is_last else [[q, k, v]]), [attention.o_proj]]
        if not hasattr(mlp, "experts"):
            if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
                return None
            groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
        parts = [join(group) for group in groups]
        if any(part is None for part in parts):
            return None
        gate_up, down = (None, None) if hasattr(mlp, "experts") else (parts.pop(-2), parts.pop())
        *attending, output = parts
        assert output is not None
        if is_last:
            return cls(None, attending[0], attending[1], output, gate_up, down)
        return cls(attending[0], None, None, output, gate_up, down)


def part(layers: Iterable[Any]) -> None:
    """Let decoder layers run module by module from now on, where hooks of the modules gather their weights (ZeRO 3)."""
    for layer in layers:
        layer.joint = None


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()


def join(modules: Sequence[nn.Module]) -> JointLayers | None:
    """Join linear layers that read the same rows; None where one is no linear layer as vapr makes them.

    What is stored in fewer bits stays apart.
    """
    layers = [_layer(module) for module in modules]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers) or any(hasattr(layer.base.weight, "ds_id") for layer in known):
        return None
    apart = _linears(known, _pieces(known))
    adapters = next((layer.adapters for layer in known if layer.adapters is not None), None)
    weights = [layer.base.weight for layer in known if isinstance(layer.base, nn.Linear)]
    parts = [*weights, *(layer.down for layer in known if layer.down is not None)]
    if len(weights) < len(known) or len(parts) == 1 or len({part.dtype for part in parts}) > 1:
        return JointLayers(apart, [], None, adapters)
    matrix, joined = _joined(parts)
    biases = [layer.base.bias for layer in known]
    bias = None
    if any(own is not None for own in biases):
        bias = matrix.new_zeros(len(matrix))
        for columns, own in zip(apart.outputs, biases, strict=True):
            if own is not None:
                joined.append(_become(own, bias[columns]))
    piece = Piece(lambda: matrix, bias, slice(0, len(matrix)))
    return JointLayers(_linears(known, (piece,)), joined, apart, adapters)


def _layer(module: nn.Module) -> _Layer | None:
    if isinstance(module, LoraLinear):
        if len(module.active_adapters) != 1 or module.lora_variant or type(module.base_layer) not in PLAIN:
            return None
        (name,) = module.active_adapters
        down, up = (matrices[name] for matrices in (module.lora_A, module.lora_B))
        return _Layer(module.base_layer, _weight(down), _weight(up), module.scaling[name], module)
    return _Layer(module, None, None, 1.0, None) if type(module) in PLAIN else None


def _weight(linear: Any) -> Tensor:
    weight: Tensor = linear.weight
    return weight


PLAIN = (nn.Linear, QuantizedLinear)


def _linears(layers: Sequence[_Layer], pieces: tuple[Piece, ...]) -> Linears:
    plain = [layer.base if isinstance(layer.base, nn.Linear) else None for layer in layers]
    return Linears(
        pieces=pieces,
        weights=tuple(None if base is None else base.weight for base in plain),
        biases=tuple(layer.base.bias for layer in layers),
        downs=tuple(layer.down for layer in layers),
        ups=tuple(layer.up for layer in layers),
        scales=tuple(layer.scale for layer in layers),
        widths=tuple(layer.base.out_features for layer in layers),
    )


def _pieces(layers: Sequence[_Layer]) -> tuple[Piece, ...]:
    """Return a piece for every weight and every adapter's first matrix."""
    pieces, start = [], 0

    def add(matrix: Callable[[], Tensor], bias: Tensor | None, num_rows: int) -> None:
        nonlocal start
        pieces.append(Piece(matrix, bias, slice(start, start + num_rows)))
        start += num_rows

    for layer in layers:
        add(functools.partial(getattr, layer.base, "weight"), layer.base.bias, layer.base.out_features)
    for layer in layers:
        if layer.down is not None:
            add(functools.partial(_itself, layer.down), None, len(layer.down))
    return tuple(pieces)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def _joined(parts: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Lay matrices (O_i, D) below one another in one, whose rows become their data."""
    matrix = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
    rows = matrix.split([len(part) for part in parts])
    return matrix, [_become(part, own) for part, own in zip(parts, rows, strict=True)]


@torch.no_grad()
def _become(parameter: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows.copy_(parameter)
    parameter.data = rows
    return parameter, rows
