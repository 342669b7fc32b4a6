"""Merges LoRA adapters into their base: in fp32, rounded once, and says what the rounding took.

A trained adapter is often small beside the weights it changes. Added in bf16 most of it vanishes, because a change
below half of bf16's resolution leaves the weight as it was. So each layer is merged in fp32 by PEFT's own code, one
layer at a time, and rounded to the wanted dtype afterwards.
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vapr.batches.model_folder import read_adapter_config
from vapr.errors import UserError, one_line

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base's weights, in ways that loading may not repeat exactly."""


NAMES_BEFORE_4_52 = {r"^model\.(?!language_model\.|visual\.)": "model.language_model.", r"^visual\.": "model.visual."}
"""Qwen's module names in adapters saved before transformers 4.52, to today's: PEFT knows LLaVA's old names alone."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Counts of a merge over all merged layers."""

    layers: int
    dtype: torch.dtype
    relative_error: float  # norm(rounded - weights - delta) / norm(delta)
    unchanged: float  # share of the weights that are what they were before

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.layers} layers in float32, rounded once to {dtype}: relative error of the merged delta "
            f"{self.relative_error:.1e}, {self.unchanged:.1%} of the weights unchanged"
        )


def merge_adapter(base: transformers.PreTrainedModel, folder: Path, dtype: torch.dtype) -> MergeReport:
    """Merge the LoRA adapter in ``folder`` into ``base``, whose parameters then have ``dtype``.

    rsLoRA, DoRA, biases, trained tokens and modules saved whole are PEFT's own work. Tied embeddings come apart where
    the adapter changes one of them.

    Raises:
        UserError: if it is another kind of adapter, or does not fit the base, or cannot be merged.
    """
    adapted = attach_adapter(base, folder)
    try:
        return merge_layers(adapted, dtype)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"policy.model: the adapter {folder} cannot be merged ({one_line(error)})") from None


def attach_adapter(base: transformers.PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Put the LoRA adapter in ``folder`` into the modules of ``base``, beside its weights.

    Raises:
        UserError: if it is another kind of adapter, or does not fit the base.
    """
    where = f"policy.model: the adapter {folder}"
    if (kind := read_adapter_config(folder)["peft_type"]) != "LORA":
        raise UserError(f"{where} is of PEFT's type {kind or 'unknown'}; vapr merges LORA alone: merge it with PEFT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: what matters of it is looked at below
            config = peft.LoraConfig.from_pretrained(str(folder))
            start = config.init_lora_weights
            if isinstance(start, str) and start.startswith(CHANGES_BASE):
                raise UserError(
                    f"{where} began as '{start}', which changes the base; convert it to plain LoRA with PEFT"
                )
            if getattr(config, "target_parameters", None):
                raise UserError(f"{where} changes single parameters (target_parameters); merge it with PEFT")
            config.inference_mode = True
            adapted = peft.PeftModel(base, config)
            names = NAMES_BEFORE_4_52 if base.config.model_type.startswith("qwen2") else None
            result = adapted.load_adapter(str(folder), "default", torch_device=str(base.device), key_mapping=names)
            if strange := sorted([*result.unexpected_keys, *result.missing_keys]):
                raise UserError(f"{where} does not fit its base: {len(strange)} weights without a place, {strange[0]}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} cannot be merged ({one_line(error)})") from None
    return adapted


@torch.no_grad()
def merge_layers(adapted: peft.PeftModel, dtype: torch.dtype) -> MergeReport:
    """Merge the active adapter into its base and take it out; every parameter of the base then has ``dtype``."""
    base: Any = adapted.get_base_model()
    owners = Counter(id(p) for module in adapted.modules() for p in module.parameters(recurse=False))
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    error = size = 0.0
    same = total = 0
    for layer in layers:
        target = layer.get_base_layer()
        if owners[id(target.weight)] > 1:  # tied: its twin does not change
            owners[id(target.weight)] -= 1
            target.weight = nn.Parameter(target.weight.clone(), requires_grad=False)
        before = target.weight.data
        layer.float()  # a new tensor, unless it is fp32: PEFT's safe merge does not write into that
        layer.merge(safe_merge=True)
        delta = _delta(layer, before)
        rounded = target.weight.data.to(dtype)
        error += _square(rounded.float() - before.float() - delta)
        size += _square(delta)
        same += int((rounded == before.to(dtype)).sum())
        total += rounded.numel()
        target.weight.data = rounded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that the layers are merged already
        adapted.merge_and_unload()  # takes the adapters out, and puts modules saved whole in their places
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    return MergeReport(len(layers), dtype, math.sqrt(error / size) if size else 0.0, same / total if total else 1.0)


def _delta(layer: Any, before: Tensor) -> Tensor:
    """Return what the adapter adds to ``before``, in fp32 and its shape."""
    (name,) = layer.merged_adapters
    if name in layer.lora_variant:  # DoRA scales the weights as well
        merged: Tensor = layer.get_base_layer().weight.data
        return merged - before.float()
    delta: Tensor = layer.get_delta_weight(name)
    return delta


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
