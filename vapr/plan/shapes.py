"""The shapes of a model's weights, from its config alone: what is stored, trained and adapted. No weights are read."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
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
from vapr.model import patches
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
    padded: int  # values that it is stored in where kernels want the tower's frozen MLPs wider; see vapr.model.patches
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
    policy: PolicyConfig
    family: str
    weights: tuple[Weight, ...]
    linears: dict[str, Linear]  # by module name, all but the LM head
    experts: dict[str, Linear]  # likewise: routers, and the experts that a token is sent to as one layer
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
    trains_tower = policy.train.projector or policy.train.vision_tower
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
    padded = {} if trains_tower else _padded(base)
    weights = tuple(
        Weight(
            name, tuple(weight.shape), _part(name, family), name in own, padded.get(weight, weight.numel()),
            name.removesuffix(".weight") in linears,
        )
        for name, weight in base.named_parameters()
    )  # fmt: skip
    return Shapes(
        config=config,
        policy=policy,
        family=family,
        weights=weights,
        linears=linears,
        experts=_experts(weights, linears, config.get_text_config(), family),
        head=(head.out_features, head.in_features),
        head_trained=bool(head.weight.requires_grad),
        trains_language_model=policy.train.language_model,
        trains_tower=trains_tower,
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


def _experts(
    weights: Sequence[Weight], linears: Mapping[str, Linear], text: Any, family: str
) -> dict[str, Linear]:  # fmt: skip
    """Find the matrices of decoder layers that are parameters by themselves: (O, D), or (experts, O, D)."""
    found = {}
    for weight in weights:
        name = weight.name.removesuffix(".weight")
        if len(weight.shape) > 1 and name not in linears and decoder_place(name, family) is not None:
            *experts, outputs, inputs = weight.shape
            chosen = text.num_experts_per_tok if experts else 1
            found[name] = Linear(outputs * chosen, inputs, 0, weight.trained)
    return found


def _padded(base: Any) -> dict[nn.Parameter, int]:
    """Return the numbers of values of those weights that kernels keep wider than they are."""
    tower, found = getattr(base.model, "visual", None), {}
    for mlp in [] if tower is None else patches.odd_mlps(tower):
        inner = mlp.down_proj.in_features
        for weight in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters(), mlp.down_proj.weight):
            found[weight] = weight.numel() // inner * patches.padded_width(inner)
    return found


def decoder_place(name: str, family: str) -> tuple[int, str] | None:
    """Return the number of the decoder layer that a module or parameter is in, and its name there; None: in none."""
    layers = f"model.{FAMILIES[family].language_model}.layers."
    if not name.startswith(layers):
        return None
    number, _, rest = name.removeprefix(layers).partition(".")
    return int(number), rest


def _part(name: str, family: str) -> Part:
    if FAMILIES[family].part_of(name) != "language_model":
        return "image tower and projector"
    return "embeddings and head" if decoder_place(name, family) is None else "language model"
