"""Every knob of a run: frozen dataclasses that check themselves, read from a YAML file by pydantic.

Unknown keys are errors. pydantic is imported only to read a file, so that everything below the command line runs where
it is not installed.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from vapr.format_names import FormatName, check_columns

STRICT_KEYS = {"extra": "forbid", "allow_inf_nan": False}
"""pydantic's settings for every section: no unknown keys, no NaN."""


TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def check(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule}, got {value}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on the linear layers of every trained part."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    rank: int = 128
    """Inner size of an adapter."""
    alpha: int = 256
    """Adapters are scaled by ``alpha / rank``."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """``all-linear``, or endings of module names such as ``[q_proj, v_proj]``."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, "policy.lora.rank", "at least 1", self.rank)
        check(self.alpha >= 1, "policy.lora.alpha", "at least 1", self.alpha)
        check(bool(self.targets), "policy.lora.targets", "all-linear or a list of names", self.targets)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Which parts of the model are trained. With ``lora`` a trained part gets adapters instead."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    language_model: bool = True
    """Embeddings, decoder layers and LM head."""
    projector: bool = False
    """What maps image features into the language model (Qwen: the merger)."""
    vision_tower: bool = False
    """The image encoder."""

    def __post_init__(self) -> None:
        if not (self.language_model or self.projector or self.vision_tower):
            raise ValueError("policy.train freezes every part; set at least one of them to true")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The model, and how it is held and run."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    model: str
    """Hub id or local folder, of a model or of a PEFT adapter (LoRA), which is then merged into its base."""
    base: str | None = None
    """Base of an adapter, if it is not what the adapter itself names; hub id or local folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. Trained weights keep an fp32 master copy whatever this says."""
    base_weights: Literal["bfloat16"] = "bfloat16"
    """Storage of a frozen base under LoRA. With ``dtype: float32`` the base is float32 as well."""
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"
    """``auto``: on a GPU in bfloat16 flash-attn where it imports, else PyTorch's varlen; everywhere else sdpa."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    """Left out: full fine-tuning of what ``train`` names."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of pairs of a mixture. What is left out here is taken from ``data``."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    path: str
    """File, folder, glob of files or hub id."""
    weight: float = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.25 a quarter of the rows, others each epoch."""
    format: Literal["auto"] | FormatName | None = None
    """As ``data.format``."""
    columns: dict[str, str] | None = None
    """As ``data.columns``."""
    image_root: str | None = None
    """As ``data.image_root``."""
    split: str = "train"
    """Of a hub data set or a folder of its shards."""
    subset: str | None = None
    """Of a hub data set; or the entry of a LLaMA-Factory ``dataset_info.json``."""

    def __post_init__(self) -> None:
        check(0 < self.weight <= 1000, "data: a set's weight", "> 0 and at most 1000", self.weight)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pairs and images are, and what happens to those that cannot be used."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    train: str | SourceConfig | list[str | SourceConfig]
    """File, folder, glob or hub id: jsonl, json, parquet, arrow or webdataset tar. Or a mapping with ``path``,
    ``weight`` and the like, or a list of those: a mixture."""
    eval: str | SourceConfig | list[str | SourceConfig] | None = None
    """Held-out pairs, scored every ``checkpoint.every`` steps and at the end."""
    format: Literal["auto"] | FormatName = "auto"
    """Shape of the rows; ``auto`` tells it from the first row and says which it took."""
    columns: dict[str, str] | None = None
    """Of any other shape: {prompt: question, chosen: good, rejected: bad, images: image}; ``a.b.0`` goes down."""
    image_root: str | None = None
    """Images must lie inside this folder. Without it, relative paths start at the data file's folder."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    """What processes images; part of every cache key. ``auto``: torchvision where it imports, else PIL."""
    shuffle: bool = True
    """Another order each epoch, from ``seed``. false: the file's order."""
    workers: int | None = None
    """Processes that decode images and tokenise; null: half of the CPU cores, at most 8; 0: none."""
    too_long: Literal["error", "skip"] = "error"
    """What happens to a pair that does not fit into a pack."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row or image that cannot be used."""
    verdicts: str | None = None
    """File of verdicts that a review page exported (``vapr view``): what it drops is not trained on."""

    def __post_init__(self) -> None:
        few = self.workers is None or 0 <= self.workers <= 128
        check(few, "data.workers", "null or at least 0 and at most 128", self.workers)
        for name in ("train", "eval"):
            check(getattr(self, name) not in ([], ""), f"data.{name}", "a file, folder or hub id", getattr(self, name))
        for source in (*self.sources("train"), *self.sources("eval")):
            check_columns(source.columns, source.format)

    def sources(self, name: Literal["train", "eval"]) -> list[SourceConfig]:
        """The sets of ``train`` or ``eval``, with what they leave out filled in."""
        given = getattr(self, name) or []
        listed = given if isinstance(given, list) else [given]
        sources = [SourceConfig(path=source) if isinstance(source, str) else source for source in listed]
        return [
            dataclasses.replace(
                source,
                format=source.format or self.format,
                columns=source.columns if source.columns is not None else self.columns,
                image_root=source.image_root or self.image_root,
            )
            for source in sources
        ]


LossKind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft"
]
OPTIONS_OF_KINDS = {"label_smoothing": ("sigmoid", "robust", "simpo"), "gamma": ("simpo",), "dpop_lambda": ("dpop",)}


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of a completion's tokens inside its log-prob (DDPO, arXiv 2312.00849)."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    changed: float = 1.0
    """Tokens inside an edit span."""
    unchanged: float = 1.0
    """All other tokens."""

    def __post_init__(self) -> None:
        check(self.changed >= 0, "loss.token_weights.changed", "at least 0", self.changed)
        check(self.unchanged >= 0, "loss.token_weights.unchanged", "at least 0", self.unchanged)
        if self.changed == 0 and self.unchanged == 0:
            raise ValueError("loss.token_weights are both 0; nothing would be learned")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """One loss. ``loss`` in the run config is one of these, or a list of them (their weighted sum)."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    kind: LossKind = "sigmoid"
    """``sigmoid`` is DPO, and ``dpo`` another name of it; ``sft`` learns the chosen completion alone. simpo, orpo and
    sft have no reference."""
    weight: float = 1.0
    """Factor of this term in a list."""
    beta: float = 0.1
    """Strength of the pull towards the reference. Larger stays closer."""
    label_smoothing: float = 0.0
    """Assumed share of swapped pairs (sigmoid: cDPO; robust: its unbiased form; simpo)."""
    gamma: float = 0.5
    """simpo: the margin that the length-normalised rewards are asked to keep."""
    dpop_lambda: float = 5.0
    """dpop: weight of the penalty on a chosen log-prob below the reference's."""
    sft_weight: float = 0.0
    """Adds this many times the ``sft`` loss of the chosen completion."""
    token_weights: TokenWeights = TokenWeights()

    def __post_init__(self) -> None:
        check(self.beta > 0, "loss.beta", "> 0", self.beta)
        check(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", "in [0, 0.5)", self.label_smoothing)
        for name in ("weight", "gamma", "dpop_lambda", "sft_weight"):
            check(getattr(self, name) >= 0, f"loss.{name}", "at least 0", getattr(self, name))
        for name, kinds in OPTIONS_OF_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"loss.{name} means nothing to {self.kind}; it belongs to {', '.join(kinds)}")

    @property
    def needs_reference(self) -> bool:
        return self.kind not in ("simpo", "orpo", "sft")


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Size of a forward pass and what is computed once in it."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    max_tokens: int = 8192
    """Packed tokens of one forward pass."""
    share: Literal["none", "pair", "image"] = "pair"
    """Paths that share equal beginnings: no two, those of a pair, or those of all pairs that show one image."""

    def __post_init__(self) -> None:
        check(self.max_tokens >= 1, "packing.max_tokens", "at least 1", self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and how much data a step and the run see."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    lr: float = 5e-6
    """Largest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Not applied to norms and biases."""
    clip: float | None = 1.0
    """Largest gradient norm; null switches clipping off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    pairs_per_step: int = 64
    """Pairs of one update, spread over as many forward passes as ``packing.max_tokens`` asks for."""
    epochs: int = 1
    """Times the data is seen."""
    max_steps: int | None = None
    """Steps of the whole run, however many epochs that is; null: ``epochs`` decide."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", "> 0", self.lr)
        check(0 <= self.warmup_ratio <= 1, "optim.warmup_ratio", "in [0, 1]", self.warmup_ratio)
        check(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        check(self.clip is None or self.clip > 0, "optim.clip", "> 0 or null", self.clip)
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "in [0, 1)", list(self.betas))
        check(self.eps > 0, "optim.eps", "> 0", self.eps)
        check(self.pairs_per_step >= 1, "optim.pairs_per_step", "at least 1", self.pairs_per_step)
        check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        check(self.max_steps is None or self.max_steps >= 1, "optim.max_steps", "at least 1 or null", self.max_steps)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The cache of reference log-probs."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    cache_dir: str | None = None
    """Where reference log-probs are kept; null: the user's cache folder."""
    tolerance: float | None = None
    """Largest |log-ratio| accepted before the first update; null: measured (see the log)."""

    def __post_init__(self) -> None:
        check(self.tolerance is None or self.tolerance > 0, "reference.tolerance", "> 0 or null", self.tolerance)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The cache of image features, for a frozen tower and projector. It needs much disk; its size is announced."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    cache: bool = False
    """Keep features on disk and find them again."""
    cache_dir: str | None = None
    """Where image features are kept; null: the user's cache folder."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Several GPUs. So far one process runs plain PyTorch, which has nothing to shard or offload."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    engine: Literal["auto", "torch"] = "auto"
    """Both mean plain PyTorch."""
    zero: Literal[0, 1, 2, 3] = 2
    """Means nothing yet."""
    offload: Literal["none"] = "none"
    """Means nothing yet."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often and how many."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    every: int = 100
    """Steps between two checkpoints (and evaluations); the last step is always saved."""
    keep: int = 3
    """Newest checkpoints that are kept; older ones are deleted."""
    best: bool = False
    """Also keep the checkpoint with the best held-out figure (``data.eval``)."""
    best_metric: Literal["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen"] = (
        "eval/loss"
    )
    """The figure that decides which is best: the smallest loss, or the largest of the others."""

    def __post_init__(self) -> None:
        check(self.every >= 1, "checkpoint.every", "at least 1", self.every)
        check(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. ``loss`` is a list of terms; in a file a single one needs no brackets."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    run_dir: str
    """Folder of the run: config, metrics, checkpoints, final model."""
    policy: PolicyConfig
    data: DataConfig
    seed: int = 0
    """Of the order of the pairs and of the adapters' first weights."""
    loss: list[LossConfig] = field(default_factory=lambda: [LossConfig()])
    """One loss, or a list of terms whose weighted sum is taken."""
    packing: PackingConfig = PackingConfig()
    optim: OptimConfig = OptimConfig()
    reference: ReferenceConfig = ReferenceConfig()
    features: FeaturesConfig = FeaturesConfig()
    kernels: Literal["auto", "off"] = "auto"
    """``auto``: fused Triton kernels where they run (a GPU, triton installed); ``off``: PyTorch's operations."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``."""

    def __post_init__(self) -> None:
        check(bool(self.run_dir), "run_dir", "a folder", repr(self.run_dir))
        check(0 <= self.seed < 2**63, "seed", "at least 0 and below 2^63", self.seed)
        check(len(set(self.trackers)) == len(self.trackers), "trackers", "names without repetition", self.trackers)
        if not self.loss:
            raise ValueError("loss: give one loss, or a list of at least one")
        if any(term.token_weights != self.token_weights for term in self.loss):
            raise ValueError("loss: token_weights must be the same in every term")
        if sum(term.weight for term in self.loss) == 0:
            raise ValueError("loss: every weight is 0; nothing would be learned")
        if self.checkpoint.best and self.data.eval is None:
            raise ValueError("checkpoint.best: held-out pairs decide which is best, and data.eval names none")
        if self.features.cache and (self.policy.train.projector or self.policy.train.vision_tower):
            raise ValueError("features.cache: the features change when policy.train names projector or vision_tower")

    @property
    def token_weights(self) -> TokenWeights:
        return self.loss[0].token_weights

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every key resolved: what config.yaml holds."""
        return dataclasses.asdict(self) | {"optim": dataclasses.asdict(self.optim) | {"betas": list(self.optim.betas)}}

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> "Config":
        """Read a YAML file and apply ``key.sub=value`` overrides.

        Raises:
            UserError: naming the file and the key, with the nearest known key for an unknown one.
        """
        from vapr.config_file import read_config  # knows this class

        return cls.parse(read_config(path, overrides), where=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "config") -> "Config":
        """Build a config from plain data; see :meth:`load` for the errors."""
        from vapr.config_file import parse_config

        return parse_config(cls, raw, where)
