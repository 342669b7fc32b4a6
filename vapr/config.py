"""Every knob of a run: a frozen pydantic model of the YAML file. Unknown keys are errors."""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

from vapr.errors import UserError


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class LoraConfig(_Part):
    """LoRA adapters (arXiv 2106.09685) on the linear layers of every trained part."""

    rank: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """``all-linear``, or endings of module names such as ``[q_proj, v_proj]``."""


class TrainConfig(_Part):
    """Which parts of the model are trained. With ``lora`` a trained part gets adapters instead."""

    language_model: bool = True
    """Embeddings, decoder layers and LM head."""
    projector: bool = False
    vision_tower: bool = False


class PolicyConfig(_Part):
    model: str
    """Hub id or local folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. Trained weights keep an fp32 master copy whatever this says."""
    base_weights: Literal["bfloat16"] = "bfloat16"
    """Storage of a frozen base under LoRA. With ``dtype: float32`` the base is float32 as well."""
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"
    gradient_checkpointing: bool = False
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _something_is_trained(self) -> "PolicyConfig":
        if not (self.train.language_model or self.train.projector or self.train.vision_tower):
            raise ValueError("policy.train freezes every part; set at least one of them to true")
        return self


class DataConfig(_Part):
    train: str
    """File or folder of pairs: jsonl, json or parquet."""
    eval: str | None = None
    """Held-out pairs, scored every ``checkpoint.every`` steps and at the end."""
    format: Literal["auto", "vapr", "trl"] = "auto"
    image_root: str | None = None
    """Images must lie inside this folder. Without it, relative paths start at the data file's folder."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    shuffle: bool = True
    too_long: Literal["error", "skip"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"


LossKind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft"
]


class TokenWeights(_Part):
    """Weights of a completion's tokens inside its log-prob (DDPO, arXiv 2312.00849)."""

    changed: float = Field(1.0, ge=0)
    """Tokens inside an edit span."""
    unchanged: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _not_both_zero(self) -> "TokenWeights":
        if self.changed == 0 and self.unchanged == 0:
            raise ValueError("loss.token_weights are both 0; nothing would be learned")
        return self


class LossConfig(_Part):
    """One loss. ``loss`` in the run config is one of these, or a list of them (their weighted sum)."""

    kind: LossKind = "sigmoid"
    weight: float = Field(1.0, ge=0)
    """Factor of this term in a list."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference. Larger stays closer."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of swapped pairs (sigmoid: cDPO; robust: its unbiased form)."""
    gamma: float = Field(0.5, ge=0)
    """simpo: the margin that the length-normalised rewards are asked to keep."""
    dpop_lambda: float = Field(5.0, ge=0)
    """dpop: weight of the penalty on a chosen log-prob below the reference's."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds this many times the ``sft`` loss of the chosen completion."""
    token_weights: TokenWeights = TokenWeights()

    @property
    def needs_reference(self) -> bool:
        return self.kind not in ("simpo", "orpo", "sft")


class PackingConfig(_Part):
    max_tokens: int = Field(8192, ge=1)
    """Packed tokens of one forward pass."""
    share: Literal["none", "pair", "image"] = "pair"


class OptimConfig(_Part):
    lr: float = Field(5e-6, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; null switches clipping off."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    pairs_per_step: int = Field(64, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must lie in [0, 1)")
        return betas


class ReferenceConfig(_Part):
    cache_dir: str | None = None
    """Where reference log-probs are kept; null: the user's cache folder."""
    tolerance: float | None = Field(None, gt=0)
    """Largest |log-ratio| accepted before the first update; null: measured (see the log)."""


class ParallelConfig(_Part):
    engine: Literal["auto", "torch"] = "auto"
    zero: Literal[0, 1, 2, 3] = 2
    """DeepSpeed stage on several GPUs; a single process has nothing to shard."""
    offload: Literal["none"] = "none"


class CheckpointConfig(_Part):
    every: int = Field(100, ge=1)
    keep: int = Field(3, ge=1)


class Config(_Part):
    run_dir: str
    seed: int = Field(0, ge=0)
    policy: PolicyConfig
    data: DataConfig
    loss: LossConfig | list[LossConfig] = LossConfig()
    packing: PackingConfig = PackingConfig()
    optim: OptimConfig = OptimConfig()
    reference: ReferenceConfig = ReferenceConfig()
    kernels: Literal["auto", "off"] = "auto"
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("loss", mode="before")
    @classmethod
    def _one_loss_or_a_list(cls, loss: Any) -> Any:
        # Validated here, not by the union, whose errors would name both alternatives.
        if loss == []:
            raise ValueError("give one loss, or a list of at least one")
        if isinstance(loss, list):
            return [term if isinstance(term, LossConfig) else LossConfig.model_validate(term) for term in loss]
        return loss if isinstance(loss, LossConfig) else LossConfig.model_validate(loss)

    @model_validator(mode="after")
    def _token_weights_agree(self) -> "Config":
        if len({term.token_weights for term in self.losses}) > 1:
            raise ValueError("loss: token_weights must be the same in every term")
        if sum(term.weight for term in self.losses) == 0:
            raise ValueError("loss: every weight is 0; nothing would be learned")
        return self

    @property
    def losses(self) -> list[LossConfig]:
        """The terms of the weighted sum, one or more."""
        return self.loss if isinstance(self.loss, list) else [self.loss]

    @property
    def token_weights(self) -> TokenWeights:
        return self.losses[0].token_weights

    @classmethod
    def load(cls, path: Path, overrides: tuple[str, ...] = ()) -> "Config":
        """Read a YAML file and apply ``key.sub=value`` overrides.

        Raises:
            UserError: naming the file and the key, with the nearest known key for an unknown one.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a text file ({error})") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: a config is a mapping of keys to values (run_dir:, policy:, data:, ...)")
        for override in overrides:
            _apply_override(raw, override)
        return cls.parse(raw, where=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "config") -> "Config":
        """Build a config from plain data; see :meth:`load` for the errors."""
        try:
            return cls.model_validate(raw)
        except pydantic.ValidationError as error:
            raise UserError(f"{where}: {_first_problem(error)}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write --set key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = raw
    part: str | int
    for depth, part in enumerate([*parents, last]):
        name = ".".join(parents[:depth])
        if isinstance(node, list):
            if not str(part).isdigit() or int(part) >= len(node):
                raise UserError(f"--set {override}: '{name}' is a list of {len(node)}; write an index")
            part = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"--set {override}: '{name}' has no keys below it")
        if depth == len(parents):
            node[part] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]


def _first_problem(error: pydantic.ValidationError) -> str:
    problems = error.errors()
    # An unknown key explains the missing one it was meant to be: name it first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{path}'; {_nearest_key(problem['loc'])}"
    if problem["type"] == "missing":
        return f"'{path}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if message.startswith(("Input", "Unable")) else message
    given = problem.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool | type(None)) else ""
    return f"{path}: {message}{shown}" if path else f"{message}"


def _nearest_key(location: tuple[int | str, ...]) -> str:
    model: type[pydantic.BaseModel] = Config
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_of(model.model_fields[part].annotation) or model
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"


def _model_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _model_of(arg))), None)
