"""Loads a policy, freezes it, adds LoRA, and runs a PackedBatch through transformers' own modules."""

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vapr.batches.families import FAMILIES, load_model_config
from vapr.batches.model_folder import ModelSource, find_model
from vapr.batches.packing import PackedBatch
from vapr.batches.tokenize import ProcessedImage
from vapr.config import PolicyConfig
from vapr.errors import UserError
from vapr.model import attention, fused
from vapr.model.adapters import merge_adapter
from vapr.model.fused_tower import fuse_tower
from vapr.model.last_layer import trim_last_layer
from vapr_kernels import lora_linear
from vapr_kernels.gather_rows import gather_rows

# Pixels that come from a worker process are read-only, and only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """The model being trained. With LoRA, ``adapters_off`` turns it into its own reference."""

    base: transformers.PreTrainedModel  # its linear layers hold the adapters, if there are any
    adapters: peft.PeftModel | None
    folder: Path  # where config and weights were read from
    source: ModelSource
    merged: str | None  # which adapter was merged into these weights, and what rounding took; None: there is none
    family: str
    attention_backend: str
    kernels: bool  # whether layers, head and loss run fused Triton kernels
    dtype: torch.dtype
    vision_trained: bool  # whether tower or projector change
    left_unfused: tuple[str, ...] = ()  # classes whose modules compute something else than the kernels

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def head(self) -> Tensor:
        """The LM head, shape (V, D)."""
        return self.base.get_output_embeddings().weight

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in a fixed order; tied weights appear once."""
        return {name: p for name, p in self.base.named_parameters() if p.requires_grad}

    @property
    def operations(self) -> str:
        """What its layers, head and loss run on, for people."""
        if not self.kernels:
            return "PyTorch's operations"
        if not self.left_unfused:
            return "fused kernels"
        return f"fused kernels except in {', '.join(self.left_unfused)} (the kernels compute something else)"

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return self.adapters.disable_adapter() if self.adapters is not None else contextlib.nullcontext()


def load_policy(
    config: PolicyConfig, device: torch.device | None = None, *, kernels: Literal["auto", "off"] = "auto"
) -> Policy:
    """Load a model of a supported family, freeze what is not trained, add adapters.

    ``kernels``: ``auto`` runs fused Triton kernels where they can run, ``off`` PyTorch's operations everywhere.

    Raises:
        UserError: if the folder is no model, the architecture cannot be packed, or weights are missing from it.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a log has no use for bars
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = find_model(config.model, config.base)
    model_config = load_model_config(source.model)
    dtype = getattr(torch, config.dtype)
    backend = attention.choose_backend(config.attention, device, dtype)
    model_class, tower, projector = FAMILIES[model_config.model_type]
    base = _load_weights(model_class, source, config.model, dtype)
    merged = None
    if source.adapter is not None:
        merged = f"{source.adapter} into {source.base}: {merge_adapter(base, source.adapter, dtype)}"
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"policy.model: {config.model} has an LM head with a bias, which vapr does not support")
    _use_attention(base, backend, tower)
    _disable_dropout(base)
    if tower == "visual":
        convolution = base.model.visual.patch_embed.proj
        convolution.forward = types.MethodType(_patches_by_matmul, convolution)
    parts = {
        part: _part_modules(base, part, tower, projector) for part in ("language_model", "projector", "vision_tower")
    }
    trained = [name for part, names in parts.items() if getattr(config.train, part) for name in names]
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(config.lora is None and name in trained)
    adapters = _add_lora(base, config, trained) if config.lora else None
    torch.nn.Module.to(base, device)
    layers = base.model.language_model.layers
    kernels_run = kernels == "auto" and fused.kernels_run(device, dtype)
    left_unfused: tuple[str, ...] = ()
    if kernels_run:
        positions = _rotary_positions(model_config.model_type, torch.arange(fused.ROWS, device=device).expand(3, -1))
        tables = base.model.language_model.rotary_emb(torch.empty(0, device=device, dtype=dtype), positions)
        left_unfused = fused.fuse(base, layers, tables)
        if backend != "sdpa" and tower == "visual":
            left_unfused += tuple(fuse_tower(base.model.visual))
    trim_last_layer(layers[-1])
    if config.gradient_checkpointing:
        newer_name = getattr(base, "activation_checkpointing_enable", None)  # the older one is deprecated
        (newer_name or base.gradient_checkpointing_enable)({"use_reentrant": False})
    base.train()
    folder = Path(str(cached_file(source.model, "config.json"))).parent
    vision_trained = config.train.projector or config.train.vision_tower
    family = model_config.model_type
    return Policy(
        base, adapters, folder, source, merged, family, backend, kernels_run, dtype, vision_trained, left_unfused
    )


def _load_weights(
    model_class: type[transformers.PreTrainedModel], source: ModelSource, name: str, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """Load the base's weights, all of them; those that an adapter will change keep the dtype of their file."""
    # A local folder is remembered by its whole path, so that the adapter finds its base from anywhere.
    place = str(Path(source.model).resolve()) if Path(source.model).is_dir() else source.model
    loaded: Any
    try:
        loaded = model_class.from_pretrained(
            place, dtype="auto" if source.adapter is not None else dtype, attn_implementation="sdpa",
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        raise UserError(f"policy.model: {name} does not load ({' '.join(str(error).split())})") from None
    base: transformers.PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if absent := sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str):
        raise UserError(f"policy.model: {name} lacks weights or has wrong shapes, first {absent[0]}")
    return base


def _use_attention(base: transformers.PreTrainedModel, backend: str, tower: str) -> None:
    base.model.language_model.config._attn_implementation = attention.LANGUAGE_MODEL
    if backend != "sdpa" and tower == "visual":  # Qwen's tower has windows; its SDPA path loops over them
        base.model.visual.config._attn_implementation = attention.VISION_TOWER


def _patches_by_matmul(convolution: nn.Conv3d, patches: Tensor) -> Tensor:
    """Qwen's patch embedding has one output position a patch: a matrix product, which Conv3d computes more slowly on a
    CPU. (patches, channels, time, height, width) -> (patches, D)"""
    return nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def _disable_dropout(base: nn.Module) -> None:
    """Dropout would make shared and separate sequences differ by construction."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def _part_modules(base: transformers.PreTrainedModel, part: str, tower: str, projector: str) -> list[str]:
    """Names of the parameters of a part; every parameter belongs to exactly one."""

    def part_of(name: str) -> str:
        if name.startswith(f"model.{projector}."):
            return "projector"
        return "vision_tower" if name.startswith(f"model.{tower}.") else "language_model"

    return [name for name, _ in base.named_parameters() if part_of(name) == part]


def _add_lora(base: transformers.PreTrainedModel, config: PolicyConfig, trained: list[str]) -> peft.PeftModel:
    assert config.lora is not None
    head = base.get_output_embeddings()
    in_trained_part = set(trained)
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" in in_trained_part
    ]
    if config.lora.targets != "all-linear":
        wanted = config.lora.targets
        known = linear
        linear = [name for name in linear if any(name == end or name.endswith(f".{end}") for end in wanted)]
        for end in wanted:
            if not any(name == end or name.endswith(f".{end}") for name in linear):
                names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known}))
                raise UserError(f"policy.lora.targets: no trained linear layer is called '{end}'; there are {names}")
    lora = peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=linear, lora_dropout=0.0)
    # Adapters in the compute dtype: their fp32 master copy lives in the optimizer.
    with warnings.catch_warnings():  # peft 0.21 asks for what transformers renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapters = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    layers: list[Any] = [module for module in base.modules() if isinstance(module, peft.tuners.lora.Linear)]
    for layer in layers:
        layer.forward = types.MethodType(_adapted, layer)
    return adapters


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """Forward of a linear layer with vapr's own adapter, without peft's passes over the output."""
    if layer.disable_adapters:
        return layer.base_layer(x)
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, layer.scaling[name])


def hidden_states(policy: Policy, batch: PackedBatch, features: Tensor | None = None) -> Tensor:
    """Last hidden states, after the final norm, of every packed token that predicts something, shape (T, D).

    Other rows hold nothing of use: the last layer skips them.

    Args:
        batch: on the policy's device.
        features: what :func:`image_features` gives for its images, if known already.
    """
    model = policy.base.model
    embeds = _embed(model.get_input_embeddings(), batch.input_ids)  # (T, D)
    if batch.images:
        features = image_features(policy, batch.images) if features is None else features
        embeds = embeds.index_copy(0, batch.image_tokens, gather_rows(features.to(embeds.dtype), batch.image_features))
    out = model.language_model(
        inputs_embeds=embeds[None],
        position_ids=_rotary_positions(policy.family, batch.position_ids),
        use_cache=False,
        segments=batch.attention,
        backend=policy.attention_backend,
        predicting=batch.predicting,
    )
    return out.last_hidden_state[0]


def _embed(embedding: nn.Embedding, input_ids: Tensor) -> Tensor:
    """Embeddings of tokens, (T, D), whose gradient does not lose what many equal tokens add up to.

    On a CPU nn.Embedding adds gradients in the dtype of its weight, where a sum of ones stops at 256 in bf16;
    index_select adds in fp32.
    """
    if embedding.weight.is_cuda:
        return embedding(input_ids)
    embeds = embedding.weight.index_select(0, input_ids)
    if embedding.padding_idx is not None:  # nn.Embedding gives it no gradient
        embeds = torch.where((input_ids == embedding.padding_idx)[:, None], embeds.detach(), embeds)
    return embeds


def _rotary_positions(family: str, position_ids: Tensor) -> Tensor:
    """Positions (3, T) as the family's language model takes them: three axes, or for LLaVA one."""
    return position_ids[:1] if family == "llava" else position_ids[:, None]


def image_features(policy: Policy, images: Sequence[ProcessedImage]) -> Tensor:
    """Features of images laid end to end, (sum of their tokens, D). The tower runs once."""
    model = policy.base.model
    with torch.set_grad_enabled(torch.is_grad_enabled() and policy.vision_trained):
        pixels = _pixels(images, policy.device).to(policy.dtype)
        if policy.family == "llava":
            return torch.cat(list(model.get_image_features(pixels).pooler_output))
        return model.visual(pixels, **_tower_layout(model.visual, images, policy.device)).pooler_output


def _pixels(images: Sequence[ProcessedImage], device: torch.device) -> Tensor:
    """Pixels of images laid end to end on the device, in fp32. Each goes there by itself: joining and casting them on
    the host first takes three times as long as the transfer."""
    first = images[0].pixel_values
    pixels = torch.empty(sum(len(image.pixel_values) for image in images), *first.shape[1:], device=device)
    start = 0
    for image in images:
        pixels[start : start + len(image.pixel_values)] = torch.from_numpy(image.pixel_values)
        start += len(image.pixel_values)
    return pixels


def _tower_layout(tower: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
    """Sizes of images for Qwen's tower, and what it derives from them: positions, windows, bounds of its attention.

    Computed on the host, where the sizes are; the tower itself would wait for the device at each of them.
    """
    grid = torch.tensor([image.grid_thw for image in images])  # (images, 3)
    bounds = get_vision_cu_seqlens(grid)
    positions = get_vision_position_ids(grid, tower.spatial_merge_size)
    layout = {"grid_thw": grid, "position_ids": positions, "cu_seqlens": bounds}
    longest = {"max_seqlen": int(bounds.diff().max())}
    if hasattr(tower, "window_size"):
        sizes = (tower.spatial_merge_size, tower.window_size, tower.patch_size)
        layout["window_index"], windows = get_vision_window_index(grid, *sizes)
        layout["cu_window_seqlens"] = windows
        longest["max_window_seqlen"] = int(windows.diff().max())
    return {name: value.to(device) for name, value in layout.items()} | longest


@contextlib.contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """Evaluation: no gradients, no checkpointing."""
    policy.base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.base.train()
