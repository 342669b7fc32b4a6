"""Parts of a decoder layer, built by transformers and peft, for the scripts that time what vapr runs in their place.

All providers compute with the parameters of one layer. They are joined as training joins them, which changes neither
their names nor their shapes, and they are arguments, too: the truth is computed from those.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from bench.microbench import Shape, Sizes
from bench.workloads import SHAPES
from vapr.model.joint_layers import JointLayers, join
from vapr_kernels import lora_linear
from vapr_kernels.adapted_linears import Linears

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Part:
    """A norm of a decoder layer, and groups of its linear layers; those of a group read the same rows."""

    layer: Any
    norm: Any
    groups: tuple[JointLayers, ...]
    sequence: int
    """Tokens of a sequence, all of one length."""

    @property
    def eps(self) -> float:
        return self.norm.variance_epsilon

    @property
    def linears(self) -> tuple[Linears, ...]:
        return tuple(group.now() for group in self.groups)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The norm's weight, and those of group after group."""
        return (self.norm.weight, *(parameter for linears in self.linears for parameter in linears.parameters))

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> list[Linears]:
        """The groups with other values, in the order of ``parameters`` without the norm's; for naive twins only."""
        found, rest = [], list(parameters)
        for linears in self.linears:
            kinds = [tuple(rest.pop(0) for _ in linears.widths) for _ in range(4)]
            weights, biases, downs, ups = kinds
            found.append(replace(linears, pieces=(), weights=weights, biases=biases, downs=downs, ups=ups))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside of each sequence, as transformers calls PyTorch's: (T, W) and twice (T, G E)."""
        head = self.layer.self_attn.head_dim
        q, k, v = (x.view(-1, self.sequence, x.shape[1] // head, head).transpose(1, 2) for x in (q, k, v))
        grouped = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)  # (N, H, S, E)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def inputs(
    norm: str, groups: Sequence[Sequence[str]]
) -> Callable[[Shape, int, str, torch.device, torch.dtype], tuple[Any, ...]]:
    """What makes the arguments of a provider: x and residual (T, D), the part, and its parameters."""

    def make(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        layer = decoder_layer(shape, device, dtype)
        joint = [join([projection(layer, name) for name in group]) for group in groups]
        part = Part(
            layer, getattr(layer, norm), tuple(group for group in joint if group is not None),
            sequence_length(shape, rows),
        )  # fmt: skip
        x, residual = (
            torch.randn(rows, shape["D"], device=device, dtype=dtype).requires_grad_(name != "forward")
            for _ in range(2)
        )  # fmt: skip
        return x, residual, part, *part.parameters

    return make


def resident(arguments: tuple[Any, ...]) -> Iterable[Any]:
    """Of a provider's arguments, the parameters."""
    return arguments[3:]


def sequence_length(shape: Shape, rows: int) -> int:
    """The most tokens, up to S, that a sequence can have if all have as many."""
    return next(length for length in range(min(shape["S"], rows), 0, -1) if rows % length == 0)


def projection(layer: Any, name: str) -> nn.Module:
    return getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)


def decoder_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen layer of Qwen2.5 (``bias``) or Llama with random weights, and adapters on all of its linear layers."""
    config_class, layer_class = (Qwen2Config, Qwen2DecoderLayer) if shape["bias"] else (LlamaConfig, LlamaDecoderLayer)
    config: PreTrainedConfig = config_class(
        hidden_size=shape["D"], intermediate_size=shape["I"], num_hidden_layers=1, num_attention_heads=shape["H"],
        num_key_value_heads=shape["G"],
    )  # fmt: skip
    with torch.device(device):
        layer = layer_class(config, layer_idx=0).to(dtype).requires_grad_(False)
        lora = LoraConfig(r=shape["R"], lora_alpha=2 * shape["R"], target_modules=[*ATTENTION, *MLP], lora_dropout=0.0)
        layer = inject_adapter_in_model(lora, layer).to(dtype)
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.normal_(1, 0.1)
            elif "lora_B" in name:  # zeros as peft makes them, through which no gradient comes back
                parameter.normal_(0, 0.25 * parameter.shape[1] ** -0.5)
    return layer


def one_by_one(x: Tensor, linears: Linears) -> list[Tensor]:
    """Linear layers with their adapters on rows (T, D), each in a call of vapr's own."""
    layers = zip(linears.weights, linears.biases, linears.downs, linears.ups, linears.scales, strict=True)
    return [lora_linear(x, weight, bias, down, up, scale) for weight, bias, down, up, scale in layers]


def flops(rows: int, layers: Iterable[tuple[int, int]], rank: int, *, both: bool) -> float:
    """Operations of layers (input and output width) on rows.

    With ``both`` a frozen product counts once in each direction, and an adapter's once more, for its own gradient.
    """
    base = sum(width * out for width, out in layers)
    adapters = sum(rank * (width + out) for width, out in layers)
    return 2.0 * rows * ((2 if both else 1) * base + (3 if both else 1) * adapters)


def sizes(gpu: list[str], cpu: list[str]) -> dict[str, Sizes]:
    """A GPU's and a CPU's sizes: layers of the models that bench.train_step trains, by their names."""
    return {
        "gpu": Sizes(
            shapes={name: layer_shape(name, 1024) for name in gpu},
            rows=[2048, 8192], quick_shapes=gpu[:1], quick_rows=[4096],
        ),
        "cpu": Sizes(
            shapes={name: layer_shape(name, 384) for name in cpu},
            rows=[768, 3072], quick_shapes=cpu[:1], quick_rows=[768],
        ),
    }  # fmt: skip


def layer_shape(name: str, sequence: int) -> Shape:
    """Sizes of a model's decoder layers, and the S of :func:`sequence_length`."""
    model = SHAPES[name]
    return {
        "D": model.text["hidden_size"], "I": model.text["intermediate_size"], "H": model.text["num_attention_heads"],
        "G": model.text["num_key_value_heads"], "R": model.lora_rank, "S": sequence,
        "bias": int(model.family == "qwen2_5_vl"),
    }  # fmt: skip
