"""A policy of FakeTensors, which have shapes and dtypes but no memory, made by load_policy itself.

Everything runs as a GPU would run it: kernels, varlen attention, the tower's own operations. The tensors are of the
CPU all the same: a build of PyTorch without CUDA refuses to index fake tensors of a GPU, and autograd asks a GPU's
driver for streams.
"""

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes

from vapr.batches.processed_image import joined_pixels
from vapr.config import LossConfig, PolicyConfig
from vapr.errors import UserError
from vapr.families import FAMILIES, family_name
from vapr.model import attention, patches
from vapr.model import policy as policy_module
from vapr.model.joint_layers import part
from vapr.model.policy import Policy
from vapr.plan.shapes import build
from vapr.plan.trials import trials_of
from vapr_kernels import launch, matmul

# The package has functions of these names.
_HEAD = importlib.import_module("vapr_kernels.linear_logps")
_MLP = importlib.import_module("vapr_kernels.gated_mlp")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Choices:
    """The settings that decide how a pack is computed."""

    policy: PolicyConfig
    loss: tuple[LossConfig, ...]
    kernels: bool
    gpu: bool  # what a GPU would run; False: what a CPU does
    keep_logits: bool  # whether the exponentials of a trained head are kept for its gradient
    cached_features: bool  # whether the image features come from the cache, and no tower runs
    restored: bool = False  # whether weights are restored from fewer bits where they are used
    module_by_module: bool = False  # as under ZeRO 3


@contextlib.contextmanager
def faked(choices: Choices, fake: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Make every tensor fake, and take the choices that load_policy makes on a GPU.

    ``fake`` is given where a policy that was made in it runs again.

    Raises:
        UserError: for code that asks a tensor for its values.
    """
    tower_arguments = policy_module._tower_arguments
    fake = fake or FakeTensorMode(allow_non_fake_inputs=True)

    def arguments_of_real_sizes(policy: Any, images: Any) -> dict[str, Any]:
        with _disable_current_modes():
            return tower_arguments(policy, images)

    def pixels(images: Any, device: Any) -> Tensor:
        with _disable_current_modes():
            real = joined_pixels(images)
        if choices.gpu or real.is_meta:  # a GPU has a copy
            return torch.empty(real.shape, dtype=real.dtype)
        converted: Tensor = fake.from_tensor(real)
        return converted

    replaced: list[tuple[Any, str, Any]] = [
        (policy_module, "_tower_arguments", arguments_of_real_sizes),
        (policy_module, "_pixels", pixels),
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", _make_adapter_beside_its_layer),
        (nn.Module, "to", lambda module, *where, **options: module),  # built in the right place
        (_HEAD, "_budget", lambda device: 2**60 if choices.keep_logits else 1),
    ]
    if choices.restored:
        replaced.append((_MLP, "ROWS", 2**60))
    if not choices.gpu:
        replaced.append((attention, "varlen_attention", _attention_of_a_cpu))
    else:
        replaced.append((launch, "runs_triton", lambda x: choices.kernels))
        replaced.append((attention, "_attends_by_products", lambda q: False))  # fake tensors lie on a CPU
        replaced.append((matmul, "_onednn", lambda: None))
    forget = [value.cache_clear for value in vars(attention).values() if hasattr(value, "cache_clear")]
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        for clear in forget:  # of real masks, and then of fake ones
            clear()
            stack.callback(clear)
        stack.enter_context(mock.patch.dict(op_implementations_dict, {torch.ops.aten._grouped_mm.default: _grouped_mm}))
        try:
            yield stack.enter_context(fake)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"policy.model: {choices.policy.model} has no plan with transformers {transformers.__version__}, whose "
                f"code for it asks a tensor for its values ({error}); take another version, and in the place of "
                "policy.checkpointing: auto a level"
            ) from None


def _grouped_mm(fake: FakeTensorMode, op: Any, a: Tensor, b: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    """Return the output of experts' products, or the gradient of their weights; PyTorch's own knows bfloat16 alone."""
    with fake:
        return a.new_empty(len(a), b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offsets), len(a), b.shape[-1])


def _attention_of_a_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, *, scale: float) -> Tensor:
    """Attend inside of sequences that real ``bounds`` tell, in the shapes that it has and the products that it takes.

    A CPU would call PyTorch's attention once a sequence, which takes as many products and a minute.
    """
    with _disable_current_modes():
        lengths = tuple(bounds.diff().tolist())
    return attention.causal_attention(q, k, v, lengths, lengths, scale=scale)


def _make_adapter_beside_its_layer(layer: Any, adapter_name: str, device: Any = None) -> None:
    """Do what peft does by assigning to a parameter's data, which fake tensors refuse."""
    weight = layer.get_base_layer().weight
    for name in ("lora_A", "lora_B"):
        linear = getattr(layer, name)[adapter_name]
        linear.weight = nn.Parameter(torch.empty(linear.weight.shape, device=weight.device, dtype=weight.dtype))


def shortened(config: Any, num_layers: int) -> Any:
    """Return a config of fewer decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return config


def fake_policy(config: Any, choices: Choices) -> Policy:
    """Build the policy of a config of transformers inside of :func:`faked`; only reading its weights is replaced."""
    wanted = dataclasses.replace(choices.policy, base_weights="bfloat16", attention="auto")
    patch = patches.patch
    with _disable_current_modes():
        trials = trials_of(config)

    def patch_as_tried(base: Any, *arguments: Any, **options: Any) -> Any:
        with mock.patch.object(patches, "same_with", trials.told(base)):
            return patch(base, *arguments, **options)

    with (
        mock.patch.object(policy_module, "load_weights", lambda *arguments: _built(config, choices)),
        mock.patch.object(policy_module, "merge_adapter", lambda *arguments: ""),  # into weights of the same shapes
        mock.patch.object(patches, "patch", patch_as_tried),
        # The tower takes what a GPU takes in any case: transformers' own code loops over images.
        mock.patch.object(policy_module, "choose_backend", lambda *arguments, **options: "varlen"),
    ):
        policy = policy_module.load_policy(wanted, CPU, kernels="auto" if choices.kernels else "off")
    if choices.module_by_module:
        part(policy.decoder.layers)
    varlen = choices.gpu and wanted.dtype == "bfloat16" and choices.policy.attention != "sdpa"
    return dataclasses.replace(policy, attention_backend="varlen" if varlen else "sdpa")


def _built(config: Any, choices: Choices) -> transformers.PreTrainedModel:
    """Build the model; of a tower that will not run, one block of each list is enough."""
    base = build(config, choices.policy, CPU)
    if choices.cached_features:
        family = FAMILIES[family_name(config)]
        for tower in family.modules(base, family.tower):
            for blocks in [module for module in tower.modules() if isinstance(module, nn.ModuleList)]:
                del blocks[1:]
    return base
