"""What :mod:`vapr.model.patches` decides by trying modules on numbers, decided where there are none.

Fake tensors have no values to compare. A decoder of the same classes, as deep but narrow, has some.
"""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from vapr.families import FAMILIES, family_name
from vapr.model import patches
from vapr.model.joint_layers import JointDecoderLayer
from vapr.plan.block_flops import INTO_ATTENTION, INTO_MLP, OUT_OF_MLP, Role
from vapr_kernels import launch

NARROW = {"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 8, "vocab_size": 64}
"""Sizes in a text config on which nothing else depends. Heads keep theirs, by which rotary positions are divided."""


@dataclass(frozen=True, slots=True)
class Trials:
    """Which modules of a decoder compute what patches.py writes out."""

    verdicts: dict[tuple[str, str], list[bool]] = field(default_factory=dict)
    """By the name of the trial and of the module, in the order of trials."""
    written_out: frozenset[int] = frozenset()  # numbers of the decoder layers that are written out
    joint: dict[int, frozenset[Role]] = field(default_factory=dict)  # what of their linear layers is joined
    alike: bool = True  # whether all layers have the same parameters

    def told(self, base: nn.Module) -> Callable[..., tuple[list[Any], list[str]]]:
        """Return what stands for ``same_with`` while ``base`` is patched: it knows the answers.

        Of a module outside of the decoder it says that it computes the same.
        """
        names = {module: name for name, module in base.named_modules()}
        answers = {key: iter(given) for key, given in self.verdicts.items()}

        def same_with(forward: Any, modules: Iterable[Any], attempt: Any, own: Any) -> tuple[list[Any], list[str]]:
            same: list[Any] = []
            left: list[Any] = []
            for module in modules:
                agrees = next(answers.get((_name_of(attempt), names[module]), iter(())), True)
                (same if agrees else left).append(module)
            return same, list(dict.fromkeys(type(module).__name__ for module in left))

        return same_with


def _name_of(attempt: Any) -> str:
    return str(getattr(attempt, "func", attempt).__name__)


def trials_of(config: Any) -> Trials:
    """Try the decoder of a config of transformers. Answers are remembered."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _REMEMBERED:
        _REMEMBERED[key] = _tried(config)
    return _REMEMBERED[key]


_REMEMBERED: dict[str, Trials] = {}


@torch.no_grad()
def _tried(config: Any) -> Trials:
    family, config = FAMILIES[family_name(config)], _narrowed(config)
    with torch.device("meta"):
        base = family.model_class._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    unreal = family.decoder(base)
    decoder = type(unreal)(unreal.config).train()
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
        weight.normal_(1.0 if weight.ndim == 1 else 0.0, scale, generator=generator)
    base.model.set_submodule(family.language_model, decoder)
    names = {module: name for name, module in base.named_modules()}
    verdicts: dict[tuple[str, str], list[bool]] = {}
    same_with = patches.same_with

    def seen(forward: Any, modules: Iterable[Any], attempt: Any, own: Any) -> tuple[list[Any], list[str]]:
        modules = [module for module in modules if not any(weight.is_meta for weight in module.parameters())]
        same, left = same_with(forward, modules, attempt, own)
        for module in modules:
            verdicts.setdefault((_name_of(attempt), names[module]), []).append(module in same)
        return same, left

    naive = mock.patch.object(launch, "runs_triton", lambda x: False)  # which compute the same on any machine
    with naive, mock.patch.object(patches, "same_with", seen):
        written_out, _ = patches.patch(base, family_name(config), "sdpa", kernels=True)
    joint = {number: _joined(layer.joint) for number, layer in enumerate(decoder.layers)}
    sizes = {tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in decoder.layers}
    return Trials(verdicts, written_out, joint, alike=len(sizes) == 1)


def _joined(joint: JointDecoderLayer | None) -> frozenset[Role]:
    if joint is None:
        return frozenset()
    of_mlp: list[Role] = [] if joint.gate_up is None else [INTO_MLP, OUT_OF_MLP]  # experts are not joined
    return frozenset([INTO_ATTENTION, *of_mlp])


def _narrowed(config: Any) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads = 1 if text.num_attention_heads == text.num_key_value_heads else 2
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = heads * head_size(text), heads, 1
    text.pad_token_id = None
    for name, size in NARROW.items():
        if getattr(text, name, None):
            setattr(text, name, min(size, getattr(text, name)))
    return config


def head_size(text: Any) -> int:
    """Return the size of a head of attention, by a text config."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
