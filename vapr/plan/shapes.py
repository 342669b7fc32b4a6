"""The shapes of a model's weights, from its config alone: what is stored, trained and adapted. No weights are read."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn

from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import find_model
from vapr.config import PolicyConfig
from vapr.errors import UserError, one_line
from vapr.families import FAMILIES, family_name
from vapr.model import policy as policy_module
from vapr.model.policy import lora_targets

Part = Literal["language model", "embeddings and head", "image tower and projector"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the model; tied ones appear once."""

    name: str
    shape: tuple[int, ...]
    part: Part
    trained: bool  # changed itself, not through an adapter
    quantizable: bool  # of a frozen linear layer other than the head: what a base in nf4, fp8 or int8 stores as such

    @property
    def numel(self) -> int:
        return functools.reduce(int.__mul__, self.shape, 1)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, O outputs of D inputs, and the rank of its adapter (0: none)."""

    outputs: int
    inputs: int
    rank: int
    trained: bool

    @property
    def adapter(self) -> int:
        """Return the number of weights of its adapter."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """A model and what a run trains of it."""

    config: Any  # of transformers
    family: str
    weights: tuple[Weight, ...]
    linears: dict[str, Linear]  # by module name, all but the LM head
    head: tuple[int, int]  # V, D
    head_trained: bool
    trains_language_model: bool
    trains_tower: bool
    """Whether tower or projector change, themselves or through adapters."""

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def num_trained(self) -> int:
        """Return the number of trained values: adapters, or the trained weights themselves."""
        return self.num_adapter or sum(weight.numel for weight in self.weights if weight.trained)

    @property
    def num_adapter(self) -> int:
        return sum(linear.adapter for linear in self.linears.values())

    def count(self, part: Part | None = None) -> int:
        """Return the number of the model's own values, of one part or of all."""
        return sum(weight.numel for weight in self.weights if part in (None, weight.part))


def read_shapes(policy: PolicyConfig) -> Shapes:
    """Read the shapes of the model that ``policy`` names.

    Raises:
        UserError: if there is no such model, or no such layer to put an adapter on.
    """
    config = load_model_config(find_model(policy.model, policy.base).model)
    family = family_name(config)
    base = build(config, policy, torch.device("meta"))
    trained = policy_module._freeze(base, policy, family)
    targets = set(lora_targets(base, policy, trained)) if policy.lora else set()
    head = base.get_output_embeddings()
    own = set() if policy.lora else trained
    linears = {
        name: Linear(module.out_features, module.in_features, _rank(policy, name in targets), f"{name}.weight" in own)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    weights = tuple(
        Weight(name, tuple(weight.shape), _part(name, family), name in own, name.removesuffix(".weight") in linears)
        for name, weight in base.named_parameters()
    )
    return Shapes(
        config=config,
        family=family,
        weights=weights,
        linears=linears,
        head=(head.out_features, head.in_features),
        head_trained=bool(head.weight.requires_grad),
        trains_language_model=policy.train.language_model,
        trains_tower=policy.train.projector or policy.train.vision_tower,
    )


def build(config: Any, policy: PolicyConfig, device: torch.device) -> transformers.PreTrainedModel:
    """Build the model of a config with weights that hold nothing, on the device (``meta``: without memory).

    Raises:
        UserError: if transformers cannot build it.
    """
    model_class: Any = FAMILIES[family_name(config)].model_class
    try:
        with torch.device(device), _without_initial_weights():
            base: transformers.PreTrainedModel = model_class._from_config(
                config, dtype=getattr(torch, policy.dtype), attn_implementation="sdpa"
            )
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"policy.model: {policy.model}: its config.json makes no model ({one_line(error)})") from None
    return base


@contextlib.contextmanager
def _without_initial_weights() -> Iterator[None]:
    initialize = transformers.PreTrainedModel.initialize_weights
    transformers.PreTrainedModel.initialize_weights = lambda *arguments, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformers.PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]


def _rank(policy: PolicyConfig, adapted: bool) -> int:
    return policy.lora.rank if policy.lora is not None and adapted else 0


def _part(name: str, family: str) -> Part:
    if FAMILIES[family].part_of(name) != "language_model":
        return "image tower and projector"
    return "language model" if ".layers." in name else "embeddings and head"
