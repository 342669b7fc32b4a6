"""Every key of a run's config: frozen sections whose fields carry their own limits, read from a YAML file.

The strings below the fields are the documentation of the keys; docs/config.md is made from them.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, ConfigFile, Number, WholeNumber
from vapr.config_mistakes import check_columns
from vapr.format_names import MAPPED_KEYS, FormatName
from vapr.loss_config import LossConfig, SecondImageConfig, TokenWeights

Checkpointing = Literal["none", "attention", "mlp", "full"]
LEVELS: tuple[Checkpointing, ...] = get_args(Checkpointing)
"""Of ``policy.checkpointing``, in the order in which ``auto`` tries them."""
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on the linear layers of every trained part."""

    rank: WholeNumber = Field(default=128, ge=1)
    """Inner size of an adapter."""
    alpha: WholeNumber = Field(default=256, ge=1)
    """Adapters are scaled by ``alpha / rank``."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """``all-linear``, or endings of module names such as ``[q_proj, v_proj]``."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TrainConfig:
    """Which parts of the model are trained. With ``lora`` a trained part gets adapters instead."""

    language_model: bool = True
    """Embeddings, decoder layers and LM head."""
    projector: bool = False
    """What maps image features into the language model (Qwen: the merger)."""
    vision_tower: bool = False
    """The image encoder."""

    @model_validator(mode="after")
    def _train_something(self) -> Self:
        if not (self.language_model or self.projector or self.vision_tower):
            raise ValueError("policy.train freezes every part; set at least one of them to true")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PolicyConfig:
    """The model, and how it is held and run."""

    model: str
    """Hub id or local folder, of a model or of a PEFT adapter (LoRA), which is then merged into its base."""
    base: str | None = None
    """Base of an adapter, if it is not what the adapter itself names; hub id or local folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. Trained weights keep an fp32 master copy whatever this says."""
    base_weights: Literal["bfloat16", "nf4", "fp8", "int8"] = "bfloat16"
    """Storage of a frozen base under LoRA (docs/memory.md): nf4 (bitsandbytes) takes a quarter of the memory, fp8 and
    int8 half. bfloat16 leaves weights as they are: with ``dtype: float32`` the base is float32 as well."""
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"
    """``auto``: on a GPU in bfloat16 flash-attn where it imports, else PyTorch's varlen; everywhere else sdpa."""
    checkpointing: Literal[Checkpointing, "auto"] = "none"
    """What the backward pass computes again instead of keeping it, in each decoder layer: less memory, more time
    (docs/memory.md). ``attention``: norm, q, k, v and attention; ``mlp``: the gated MLP; ``full``: all of the layer
    but the MLP's last product, and the blocks of a trained tower. ``auto``: the first of none, attention, mlp and full
    with which ``vapr plan`` finds that a step fits the GPU."""
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    """Left out: full fine-tuning of what ``train`` names."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SourceConfig:
    """One set of pairs of a mixture. What is left out here is taken from ``data``."""

    path: str
    """File, folder, glob of files, URL or hub id."""
    weight: Number = Field(default=1.0, gt=0, le=1000)
    """How often each row is seen in an epoch: 2 is twice, 0.25 a quarter of the rows, others each epoch."""
    format: Literal["auto", FormatName] | None = None
    """Shape of the rows, as ``data.format``."""
    columns: dict[str, str] | None = None
    """Names of the columns, as ``data.columns``."""
    image_root: str | None = None
    """Folder of the images, as ``data.image_root``."""
    split: str = "train"
    """Split of a hub data set or of a folder of its shards."""
    subset: str | None = None
    """Subset of a hub data set, or the entry of a LLaMA-Factory ``dataset_info.json``."""


Source = Annotated[str, Field(min_length=1)] | SourceConfig
Sources = Source | Annotated[list[Source], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataConfig:
    """Where pairs and images are, and what happens to those that cannot be used."""

    train: Sources
    """File, folder, glob, URL or hub id: jsonl, json, parquet, arrow or webdataset tar. Or a mapping with ``path``,
    ``weight`` and the like, or a list of those: a mixture."""
    eval: Sources | None = None
    """Held-out pairs, scored every ``checkpoint.every`` steps and at the end."""
    format: Literal["auto", FormatName] = "auto"
    """Shape of the rows; ``auto`` tells it from the first row and says which it took."""
    columns: dict[str, str] | None = None
    """Names of the columns in rows of any other shape: {prompt: question, chosen: good, rejected: bad, images: image};
    ``a.b.0`` goes down."""
    image_root: str | None = None
    """Images must lie inside this folder or URL. Without it, relative paths start at the data file's folder."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    """What processes images; part of every cache key. ``auto``: torchvision where it imports, else PIL."""
    shuffle: bool = True
    """Another order each epoch, from ``seed``. false: the file's order."""
    workers: WholeNumber | None = Field(default=None, ge=0, le=128)
    """Processes that decode images and tokenise; null: half of the CPU cores, at most 8; 0: none."""
    too_long: Literal["error", "skip"] = "error"
    """What happens to a pair that does not fit into a pack."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row or image that cannot be used."""
    verdicts: str | None = None
    """Verdicts from a review page (``vapr view``), Label Studio or Argilla: what they drop is not trained on."""

    @model_validator(mode="after")
    def _map_known_columns(self) -> Self:
        for source in (*self.sources("train"), *self.sources("eval")):
            if source.format in ("auto", None):  # another format's own keys are renamed, which are not listed here
                check_columns(source.columns, MAPPED_KEYS, "data.columns")
        return self

    def sources(self, name: Literal["train", "eval"]) -> list[SourceConfig]:
        """Return the sets of ``train`` or ``eval``, with what they leave out filled in."""
        return self.filled(getattr(self, name) or [])

    def filled(self, given: Sources) -> list[SourceConfig]:
        """Return sets with what they leave out filled in."""
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


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PackingConfig:
    """Size of a forward pass and what is computed once in it."""

    max_tokens: WholeNumber = Field(default=8192, ge=1)
    """Packed tokens of one forward pass."""
    share: Literal["none", "pair", "image"] = "pair"
    """Paths that share equal beginnings: no two, those of a pair, or those of all pairs that show one image."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class OptimConfig:
    """AdamW, its schedule, and how much data a step and the run see."""

    lr: Number = Field(default=5e-6, gt=0)
    """Largest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Number = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Strength of AdamW's weight decay; it is not applied to norms and biases."""
    clip: Number | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null switches clipping off."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Number = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    pairs_per_step: WholeNumber = Field(default=64, ge=1)
    """Pairs of one update, spread over as many forward passes as ``packing.max_tokens`` asks for."""
    epochs: WholeNumber = Field(default=1, ge=1)
    """Times the data is seen."""
    max_steps: WholeNumber | None = Field(default=None, ge=1)
    """Steps of the whole run, however many epochs that is; null: ``epochs`` decide."""
    kind: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = "adamw"
    """How AdamW's moments are kept: in float32, or in 8 bits (needs bitsandbytes); paged ones move to host memory when
    the GPU's is full (docs/memory.md)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ReferenceConfig:
    """The cache of reference log-probs."""

    cache_dir: str | None = None
    """Where reference log-probs are kept; null: the user's cache folder."""
    tolerance: Number | None = Field(default=None, gt=0)
    """Largest |log-ratio| accepted before the first update; null: measured (see the log)."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class FeaturesConfig:
    """The cache of image features, for a frozen tower and projector. It needs much disk; its size is announced."""

    cache: bool = False
    """Keep features on disk and find them again; tower and projector are on the GPU only for those that are missing."""
    cache_dir: str | None = None
    """Where image features are kept; null: the user's cache folder."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ParallelConfig:
    """How several processes, one for each GPU, train together (docs/scale.md)."""

    engine: Literal["auto", "all-reduce", "deepspeed"] = "auto"
    """``all-reduce``: every process holds the whole model, and gradients are summed. ``deepspeed``: ZeRO spreads state
    over the processes. ``auto``: all-reduce under LoRA where the frozen model fits each GPU, else deepspeed."""
    zero: Literal[1, 2, 3] = 2
    """deepspeed: what is spread; 1: optimizer state, 2: gradients, too, 3: weights, too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """deepspeed: what is kept in host memory. ``optimizer``: its state, updated there; ``all``: weights, too (zero
    3)."""
    timeout: WholeNumber = Field(default=1800, ge=1)
    """Seconds that processes wait for one that does not come; then the run ends and names it."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.offload != "none" and self.engine != "deepspeed":
            raise ValueError(f"parallel.offload: {self.offload} is DeepSpeed's; set parallel.engine: deepspeed as well")
        if self.offload == "all" and self.zero != 3:
            raise ValueError(f"parallel.offload: all needs parallel.zero: 3, where weights are spread, not {self.zero}")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CheckpointConfig:
    """How often checkpoints are written, and which are kept."""

    every: WholeNumber = Field(default=100, ge=1)
    """Steps between two checkpoints (and evaluations); the last step is always saved."""
    keep: WholeNumber = Field(default=3, ge=1)
    """Newest checkpoints that are kept; older ones are deleted."""
    best: bool = False
    """Also keep the checkpoint with the best held-out figure (``data.eval``, or the probe's)."""
    best_metric: Literal[
        "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen",
        "probe/accuracy", "probe/gap", "probe/answers/accuracy",
    ] = "eval/loss"  # fmt: skip
    """The figure that decides which is best: the smallest loss, or the largest of the others."""

    @property
    def best_by_probe(self) -> bool:
        return self.best and self.best_metric.startswith("probe/")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ProbeConfig:
    """A look at the policy while it trains, on a small slice of held-out pairs that stays the same. It changes nothing
    of what is trained (docs/study.md)."""

    every: WholeNumber | None = Field(default=None, ge=1)
    """Steps between two probes; there is one before the first step and one after the last, too. null: no probe."""
    data: Sources | None = None
    """Held-out pairs that the slice is drawn from; null: ``data.eval``."""
    pairs: WholeNumber = Field(default=64, ge=1)
    """Pairs of which it is measured whether the policy finds chosen likelier, with the image and without."""
    questions: WholeNumber = Field(default=32, ge=0)
    """Questions answered whose chosen answer says yes or no: the yes rate, and how many are right."""
    shown: WholeNumber = Field(default=4, ge=0, le=32)
    """Questions of any kind answered besides; so many of both kinds are shown in the report."""
    max_new_tokens: WholeNumber = Field(default=64, ge=1)
    """Longest answer, in tokens."""


Losses = Annotated[list[LossConfig], BeforeValidator(lambda loss: [loss] if isinstance(loss, dict) else loss)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Config(ConfigFile):
    """A run. ``loss`` is a list of terms; in a file a single one needs no brackets."""

    OTHER_THING: ClassVar = (
        "{path}: {found}, but a run config (YAML) is wanted here; write this line into run.yaml and give that: {line}"
    )
    NOT_KEYS: ClassVar = {
        "policy.gradient_checkpointing": "it is now policy.checkpointing: true -> full, false -> none, auto -> auto"
    }
    run_dir: str = Field(min_length=1)
    """Folder of the run: config, metrics, checkpoints, final model."""
    policy: PolicyConfig
    data: DataConfig
    seed: WholeNumber = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of the pairs and of the adapters' first weights."""
    loss: Losses = Field(default=[LossConfig()])
    """One loss, or a list of terms whose weighted sum is taken."""
    packing: PackingConfig = PackingConfig()
    optim: OptimConfig = OptimConfig()
    reference: ReferenceConfig = ReferenceConfig()
    features: FeaturesConfig = FeaturesConfig()
    # YAML reads a bare ``off`` as false.
    kernels: Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = (
        "auto"
    )
    """``auto``: fused Triton kernels where they run (a GPU, triton installed); ``off``: PyTorch's operations."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()
    trackers: list[TrackerName] = Field(default=["tensorboard"])
    """Where metrics go besides metrics.jsonl: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must be names without repetition, got {self.trackers}")
        if not self.loss:
            raise ValueError("loss: give one loss, or a list of at least one")
        if any(term.token_weights != self.token_weights for term in self.loss):
            raise ValueError("loss: token_weights must be the same in every term")
        if any(term.second_image != self.second_image for term in self.loss if term.kind == "image"):
            raise ValueError("loss: second_image must be the same in every image term; a pair gets one second image")
        if sum(term.weight for term in self.loss) == 0:
            raise ValueError("loss: every weight is 0; nothing would be learned")
        if self.checkpoint.best and self.data.eval is None and not self.checkpoint.best_by_probe:
            raise ValueError("checkpoint.best: held-out pairs decide which is best, and data.eval names none")
        self._agree_on_probe()
        if self.policy.base_weights != "bfloat16" and self.policy.lora is None:
            raise ValueError(
                f"policy.base_weights: {self.policy.base_weights} is for a frozen base under LoRA; give policy.lora, "
                "or leave it out"
            )
        if self.features.cache and (self.policy.train.projector or self.policy.train.vision_tower):
            raise ValueError("features.cache: the features change when policy.train names projector or vision_tower")
        return self

    def _agree_on_probe(self) -> None:
        every = self.probe.every
        if every is not None and not (self.probe.data or self.data.eval):
            raise ValueError("probe.every: a probe needs held-out pairs; name them in probe.data or data.eval")
        if self.checkpoint.best_by_probe and (every is None or self.checkpoint.every % every):
            raise ValueError(
                f"checkpoint.best_metric: {self.checkpoint.best_metric} is known where a probe was taken; set "
                "probe.every so that checkpoint.every is a multiple of it"
            )
        for source in self.probe_sources:
            if source.format in ("auto", None):
                check_columns(source.columns, MAPPED_KEYS, "probe.data.columns")

    @property
    def probe_sources(self) -> list[SourceConfig]:
        """Return the sets that the probe's pairs are drawn from."""
        return self.data.filled(self.probe.data or self.data.eval or []) if self.probe.every else []

    @property
    def token_weights(self) -> TokenWeights:
        return self.loss[0].token_weights

    @property
    def second_image(self) -> SecondImageConfig | None:
        """Return how the second image of an ``image`` term is made, None without such a term."""
        return next((term.second_image for term in self.loss if term.kind == "image"), None)

    @property
    def swaps_images(self) -> bool:
        """Tell whether a term shows each answer of a pair the other's images."""
        return any(term.kind == "symmetric" for term in self.loss)
