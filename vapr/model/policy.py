"""Load a policy, freeze it, add LoRA, and run a PackedBatch through the modules of transformers.

T = packed tokens, V = vocabulary, D = hidden size.
"""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import ModelSource, find_model
from vapr.batches.packing import PackedBatch
from vapr.batches.processed_image import joined_pixels
from vapr.config import Checkpointing, PolicyConfig
from vapr.errors import UserError
from vapr.families import FAMILIES, family_name
from vapr.families.processed_image import ProcessedImage
from vapr.model import patches
from vapr.model.adapters import merge_adapter
from vapr.model.attention import choose_backend, segment_attention
from vapr.model.decoder import rotary_tables, run_decoder
from vapr.model.host_memory import keep_freed_memory
from vapr.model.passes import AT_ONCE, Passes
from vapr.model.quantized import Quantized, check_available, quantize
from vapr.model.tower_place import TowerPlace
from vapr.to_device import sent
from vapr_kernels import gather_rows


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
    left_unfused: tuple[str, ...]  # classes whose modules compute something else than patches.py writes out
    written_out: frozenset[int]  # numbers of the decoder layers that run as patches.py writes them out
    quantized: Quantized | None  # what is stored in 4 or 8 bits; None: nothing
    tower: TowerPlace  # where tower and projector are
    checkpointing: Checkpointing  # what of the decoder's layers a backward pass computes again
    passes: Passes = AT_ONCE  # through which everything runs that reads weights

    @property
    def device(self) -> torch.device:
        return self.head.device  # the tower may be elsewhere

    @property
    def decoder(self) -> Any:
        """Return the language model without its head."""
        return FAMILIES[self.family].decoder(self.base)

    @property
    def head(self) -> Tensor:
        """The LM head, shape (V, D)."""
        return self.base.get_output_embeddings().weight

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained by name, in a fixed order; tied weights appear once."""
        return trained_parameters(self.base)

    @property
    def operations(self) -> str:
        """Say what its layers, head and loss run on."""
        if not self.kernels:
            return "PyTorch's operations"
        if not self.left_unfused:
            return "fused kernels"
        return f"fused kernels except in {', '.join(self.left_unfused)} (the kernels compute something else)"

    @property
    def adapted(self) -> list[str]:
        """Return the names of the linear layers that have adapters, without their places."""
        layers = [name for name, module in self.base.named_modules() if isinstance(module, LoraLayer)]
        return sorted({name.rsplit(".", 1)[-1] for name in layers})

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the policy is its own reference, if it has adapters."""
        return self.adapters.disable_adapter() if self.adapters is not None else contextlib.nullcontext()


def trained_parameters(base: transformers.PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that are trained, by name."""
    return {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True, slots=True, eq=False)
class Modules:
    """A model as transformers and peft make it, nothing of it changed but the layers that are stored in fewer bits."""

    base: transformers.PreTrainedModel
    adapters: peft.PeftModel | None
    folder: Path
    source: ModelSource
    merged: str | None
    family: str
    quantized: Quantized | None


def load_modules(config: PolicyConfig, device: torch.device | None = None) -> Modules:
    """Load a model of a supported family into host memory, freeze what is not trained, and add adapters.

    With ``base_weights`` its frozen linear layers are quantised one by one on ``device`` (the host, unless given), and
    stay there.

    Raises:
        UserError: if the folder is no model, the architecture cannot be packed, weights are missing from it, or they
            cannot be stored as ``base_weights`` says.
    """
    check_available(config.base_weights)
    source = find_model(config.model, config.base)
    family = family_name(load_model_config(source.model))
    dtype = getattr(torch, config.dtype)
    base, merged = load_base(family, source, config.model, dtype)
    trained = _freeze(base, config, family)
    adapters = _add_lora(base, config, trained) if config.lora else None
    quantized = None
    if config.base_weights != "bfloat16":
        quantized = quantize(base, base.get_output_embeddings(), config.base_weights, device or torch.device("cpu"))
    folder = Path(str(cached_file(source.model, "config.json"))).parent
    return Modules(base, adapters, folder, source, merged, family, quantized)


def load_base(
    family: str, source: ModelSource, name: str, dtype: torch.dtype
) -> tuple[transformers.PreTrainedModel, str | None]:
    """Load a model as training begins with it, an adapter merged into it if it came with one.

    Returns:
        The model, and which adapter was merged and what rounding took; None: there is none.
    """
    base = load_weights(family, source, name, dtype)
    if source.adapter is None:
        return base, None
    return base, f"{source.adapter} into {source.base}: {merge_adapter(base, source.adapter, dtype)}"


def load_policy(
    config: PolicyConfig, device: torch.device | None = None, *, kernels: Literal["auto", "off"] = "auto"
) -> Policy:
    """Load a policy, and change its modules as :mod:`vapr.model.patches` says.

    Args:
        config: names the model, what is trained, and how attention runs. ``checkpointing: auto`` counts as none: who
            trains or fills caches has it resolved (:mod:`vapr.plan.checkpointing`).
        device: a GPU if there is one, unless given.
        kernels: ``auto`` runs fused Triton kernels where they can run, ``off`` PyTorch's operations everywhere.

    Raises:
        UserError: as :func:`load_modules`, or if an attention path cannot run here.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    if device.type == "cpu":
        keep_freed_memory()
    choose_backend(config.attention, device, dtype)  # refuses what cannot run here before weights are read
    modules = load_modules(config, device)
    base, family = modules.base, modules.family
    layers = FAMILIES[family].decoder(base).layers
    backend = choose_backend(
        config.attention, device, dtype, head_dim=max(layer.self_attn.head_dim for layer in layers),
        windows=any(FAMILIES[family].windows(base.config)),
    )  # fmt: skip
    nn.Module.to(base, device)
    kernels_run = kernels == "auto" and patches.kernels_run(device, dtype)
    written_out, left_unfused = patches.patch(base, family, backend, kernels=kernels_run, joint=kernels == "auto")
    if config.checkpointing == "full" and config.train.vision_tower:
        for tower in FAMILIES[family].modules(base, FAMILIES[family].tower):
            _compute_blocks_again(tower)
    base.train()
    return Policy(
        base=base, adapters=modules.adapters, folder=modules.folder, source=modules.source,
        merged=modules.merged, family=family, attention_backend=backend, kernels=kernels_run, dtype=dtype,
        vision_trained=config.train.projector or config.train.vision_tower,
        left_unfused=left_unfused, written_out=written_out, quantized=modules.quantized,
        tower=TowerPlace.of(base, family, device),
        checkpointing="none" if config.checkpointing == "auto" else config.checkpointing,
    )  # fmt: skip


def _compute_blocks_again(tower: nn.Module) -> None:
    """Let the backward pass of a trained tower compute its blocks again, in transformers' own code.

    Its ``gradient_checkpointing_enable`` would also ask for the gradient of what goes into the first block.
    """
    blocks: list[Any] = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in blocks:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def load_weights(family: str, source: ModelSource, name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Load the base's weights, all of them; those that an adapter will change keep the dtype of their file."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a log has no use for bars
    # A local folder is remembered by its whole path, so that the adapter finds its base from anywhere.
    place = str(Path(source.model).resolve()) if Path(source.model).is_dir() else source.model
    loaded: Any
    try:
        loaded = FAMILIES[family].model_class.from_pretrained(
            place, dtype="auto" if source.adapter is not None else dtype, attn_implementation="sdpa",
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        raise UserError(f"policy.model: {name} does not load ({' '.join(str(error).split())})") from None
    base: transformers.PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if absent := sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str):
        raise UserError(f"policy.model: {name} lacks weights or has wrong shapes, first {absent[0]}")
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"policy.model: {name} has an LM head with a bias, which vapr does not support")
    return base


def _freeze(base: transformers.PreTrainedModel, config: PolicyConfig, family: str) -> set[str]:
    """Freeze the parts that are not trained, and with LoRA all. Returns the names of the trained parts' parameters."""
    wanted: dict[str, bool] = dataclasses.asdict(config.train)
    trained = {name for name, _ in base.named_parameters() if wanted[FAMILIES[family].part_of(name)]}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(config.lora is None and name in trained)
    return trained


def lora_targets(base: transformers.PreTrainedModel, config: PolicyConfig, trained: set[str]) -> list[str]:
    """Return the names of the linear layers that get adapters: those wanted of the trained parts, never the LM head."""
    assert config.lora is not None
    head = base.get_output_embeddings()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" in trained
    ]
    if config.lora.targets != "all-linear":
        known, linear = linear, []
        for end in config.lora.targets:
            found = [name for name in known if name == end or name.endswith(f".{end}")]
            if not found:
                names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known}))
                raise UserError(f"policy.lora.targets: no trained linear layer is called '{end}'; there are {names}")
            linear += found
    return linear


def _add_lora(base: transformers.PreTrainedModel, config: PolicyConfig, trained: set[str]) -> peft.PeftModel:
    """Add adapters in the compute dtype to the linear layers that :func:`lora_targets` names."""
    assert config.lora is not None
    linear = lora_targets(base, config, trained)
    lora = peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=linear, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft 0.21 asks for what transformers renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # Without autocast adapters have the compute dtype: their fp32 master copy lives in the optimizer.
        return peft.get_peft_model(base, lora, autocast_adapter_dtype=False)


def hidden_states(
    policy: Policy, batch: PackedBatch, features: Tensor | None = None, spare: Sequence[ProcessedImage] = ()
) -> Tensor:
    """Return the last hidden states, after the final norm, of the packed tokens that predict something.

    Args:
        batch: on the policy's device.
        features: what :func:`image_features` returns for its images, if known already.
        spare: images that run through the tower with weight 0, where other processes have some in this pass.

    Returns:
        Shape (predicting tokens, D), in the policy's dtype, in the order of ``batch.predicting``.
    """
    family, decoder = FAMILIES[policy.family], policy.decoder
    embeds = _embed(decoder.get_input_embeddings(), batch.input_ids)  # (T, D)
    deep: tuple[Tensor, ...] = ()
    if batch.images:
        features = _image_features(policy, batch.images) if features is None else features
        rows = gather_rows(features.to(embeds.dtype), batch.image_features)
        first, *deep = rows.split(embeds.shape[1], dim=1)
        embeds = embeds.index_copy(0, batch.image_tokens, first)
    if spare:
        embeds = embeds + 0.0 * _image_features(policy, spare).sum()
    return run_decoder(
        decoder,
        embeds,
        rotary_tables(decoder, batch.position_ids[: family.position_axes]),
        functools.partial(segment_attention, segments=batch.attention, backend=policy.attention_backend),
        batch,
        written_out=policy.written_out,
        kernels=policy.kernels,
        windows=family.windows(policy.base.config),
        checkpointing=policy.checkpointing,
        deep=deep,
    )


def _embed(embedding: nn.Embedding, input_ids: Tensor) -> Tensor:
    """Return the embeddings of tokens, (T, D), whose gradient does not lose what many equal tokens add up to.

    On a CPU nn.Embedding adds gradients in the dtype of its weight, where a sum of ones stops at 256 in bf16;
    index_select adds in fp32.
    """
    if embedding.weight.is_cuda:
        return embedding(input_ids)
    embeds = embedding.weight.index_select(0, input_ids)
    if embedding.padding_idx is not None:  # nn.Embedding gives it no gradient
        embeds = torch.where((input_ids == embedding.padding_idx)[:, None], embeds.detach(), embeds)
    scale = getattr(embedding, "embed_scale", None)  # of Gemma
    return embeds if scale is None else embeds * scale.to(embeds.dtype)


def image_features(policy: Policy, images: Sequence[ProcessedImage]) -> Tensor:
    """Return the features of images laid end to end, (sum of their tokens, D), those of deeper layers beside them.

    The tower runs once for all of them.

    They are in the policy's dtype, and carry a gradient only if tower or projector are trained.
    """
    return policy.passes.features(lambda spare: _image_features(policy, images))


def _image_features(policy: Policy, images: Sequence[ProcessedImage]) -> Tensor:
    model = policy.base.model
    with policy.tower, torch.set_grad_enabled(torch.is_grad_enabled() and policy.vision_trained):
        pixels = _pixels(images, policy.device).to(policy.dtype)
        return FAMILIES[policy.family].features(model, pixels, **_tower_arguments(policy, images))


def _pixels(images: Sequence[ProcessedImage], device: torch.device) -> Tensor:
    """Pixels of images laid end to end on the device, where they may be already. Data workers have joined them."""
    return sent(joined_pixels(images), device)


def _tower_arguments(policy: Policy, images: Sequence[ProcessedImage]) -> dict[str, Any]:
    return FAMILIES[policy.family].tower_arguments(policy.base.model, images, policy.device)


@contextlib.contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """Evaluate the policy: no gradients, no checkpointing."""
    policy.base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.base.train()
