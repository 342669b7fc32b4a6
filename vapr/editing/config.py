"""Every key of an edit job's config: frozen sections whose fields carry their own limits, as in :mod:`vapr.config`.

The strings below the fields are the documentation of the keys; the tables of docs/edit.md are made from them.
"""

import dataclasses
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, ConfigFile, Number, WholeNumber, parse_section
from vapr.config_mistakes import check_columns
from vapr.llm.request import check_extra_body

COLUMNS = ("question", "answer", "images", "conversations", "messages", "system", "id", "source", "licence", "boxes")
"""What ``source.columns`` can map."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SourceConfig:
    """How the instruction data is read."""

    columns: dict[str, str] | None = None
    """Names of the columns in rows that are neither LLaVA's nor vapr's: {question: q, answer: a, images: img};
    ``a.b.0`` goes down."""
    image_root: str | None = None
    """Images must lie inside this folder. Without it, relative paths start at the data file's folder."""
    format: Literal["auto", "llava", "messages", "prompt"] = "auto"
    """Shape of the rows: ``llava`` (``conversations``), ``messages``, or ``prompt`` (a prompt or question beside an
    answer); ``auto`` takes of these the first that a row has."""
    split: str = "train"
    """Split of a hub data set or of a folder of its shards."""
    subset: str | None = None
    """Subset of a hub data set."""
    name: str | None = None
    """What the source is called in pairs and counts. Without it: the row's own name of its source, else the first
    folder of its image path, else the data file."""
    licence: str | None = None
    """Licence of the source, written into every pair and the card. A row's own ``licence`` or ``license`` goes
    first."""

    @model_validator(mode="after")
    def _map_known_columns(self) -> Self:
        check_columns(self.columns, COLUMNS, "source.columns")
        return self


def _compiled(patterns: list[str], key: str) -> list[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression ({error})") from None
    return patterns


BOOKS = r"\b(title|author|genre) of this book\b|\bwho (wrote|is the author of) this book\b"


@dataclass(frozen=True, kw_only=True, config=SECTION)
class FilterConfig:
    """Which answers are left alone. Each reason is counted."""

    no_image: bool = True
    """Leave out rows without an image: no picture could refute the edit."""
    coordinates: bool = True
    """Leave out boxes and points: [0.12, 0.3, 0.5, 0.8]."""
    letters: bool = True
    """Leave out answers that are the letter of an option."""
    min_answer_words: WholeNumber = Field(default=1, ge=1)
    """Shorter answers are left out."""
    max_answer_words: WholeNumber = 400
    """Longer answers are left out."""
    skip_questions: list[str] = Field(default=[BOOKS])
    """Regular expressions; questions that one of them is found in are left out. By default OCR-VQA's about books."""

    @model_validator(mode="after")
    def _leave_a_range(self) -> Self:
        if self.max_answer_words < self.min_answer_words:
            raise ValueError(f"filters.max_answer_words must be at least min_answer_words, got {self.max_answer_words}")
        return self

    @field_validator("skip_questions")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        return _compiled(patterns, "filters.skip_questions")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PlanConfig:
    """What is edited, and how replacement values are chosen."""

    categories: list[str] | None = Field(default=None, min_length=1)
    """Names of the categories to use; null: all."""
    add_categories: list[str] = Field(default=[])
    """YAML files of categories of your own; one of a known name replaces it."""
    balance: Literal["swap", "uniform"] = "swap"
    """Values of closed sets: ``swap``: two rows trade theirs, so that each value is as often chosen as rejected;
    ``uniform``: any other value of the set, which a text-only probe can learn."""
    turns_per_row: WholeNumber | None = Field(default=None, ge=1)
    """At most so many answers of a row are edited, the first ones; null: all."""


Change = Literal["crop", "mask", "blur", "other"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PictureConfig:
    """Change the picture instead of the answer: pairs with ``rejected_images``, made by rules alone."""

    change: Annotated[list[Change], BeforeValidator(lambda one: [one] if isinstance(one, str) else one)] = Field(
        min_length=1
    )
    """``crop``, ``mask``, ``blur``: the region of the answer, which the row's ``boxes`` give, is cut away, painted over
    or blurred; ``other``: another row's picture, in which something else is true of the same thing. Of several each
    answer has one, drawn by ``seed`` from those that can be made."""
    boxes: Literal["xywh", "xyxy"] = "xywh"
    """Numbers of a box: left, top, width and height (COCO), or left, top, right and bottom."""
    relative: bool = False
    """Boxes are shares of width and height; false: pixels of the upright picture."""
    changed: tuple[Number, Number] = (0.005, 0.75)
    """crop, mask, blur: smallest and largest share of the picture that may change, or be cut away."""
    jpeg: WholeNumber | None = Field(default=None, ge=1, le=100)
    """Quality of new pictures as JPEG; null: PNG, larger, in which every other pixel is as it was."""

    @field_validator("changed")
    @classmethod
    def _are_shares(cls, changed: tuple[float, float]) -> tuple[float, float]:
        least, most = changed
        if not 0 <= least <= most <= 1:
            raise ValueError(f"picture.changed must be two shares, the smaller one first, got {[least, most]}")
        return changed


@dataclass(frozen=True, kw_only=True, config=SECTION)
class AskConfig:
    """How the language model is asked."""

    temperature: Number = Field(default=0.7, ge=0, le=2)
    """Temperature of sampling; each request has its own seed, 0 takes the likeliest token."""
    attempts: WholeNumber = Field(default=3, ge=1, le=20)
    """Times an edit is asked for; from the second on the prompt says what was wrong with the last."""
    max_tokens: WholeNumber = Field(default=512, ge=16)
    """Tokens of a reply that holds edits. A whole rewritten answer may have as many more as the answer is long."""
    candidates: WholeNumber = Field(default=1, ge=1, le=16)
    """Edits of an answer that are asked for each time, each sampled with its own seed; the best becomes the pair."""
    rubric: str | None = Field(default=None, min_length=1)
    """What makes one candidate better than another, in your words: a language model then gives each that passes 0 to
    10 points. null: the candidate that best keeps words and lengths in balance over the shard."""
    judge: str | None = Field(default=None, min_length=1)
    """The model (as ``--editor`` names one) that holds candidates against ``rubric``; null: the editor itself."""

    @model_validator(mode="after")
    def _rank_what_differs(self) -> Self:
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError("ask.candidates: at ask.temperature 0 all candidates of an answer are the same")
        if self.rubric is not None and self.candidates == 1:
            raise ValueError("ask.rubric ranks candidates, and ask.candidates is 1; ask for more")
        if self.judge is not None and self.rubric is None:
            raise ValueError("ask.judge needs ask.rubric: what it is to judge by")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CheckConfig:
    """What a pair must hold to be accepted."""

    length_ratio: tuple[Number, Number] = (0.9, 1.1)
    """Words of rejected over words of chosen; one word of difference (of a trade, two) passes within
    ``hard_length_ratio``."""
    hard_length_ratio: tuple[Number, Number] = (0.8, 1.25)
    """Nothing outside passes."""
    max_edit_distance: Number = Field(default=0.35, gt=0, le=1)
    """Word edit distance over the longer length. A rewrite may have twice as much."""
    short_answer_words: WholeNumber = Field(default=8, ge=0)
    """Answers up to this long are exempt from the three limits above."""
    style: bool = True
    """Sentences, punctuation at the end, line breaks, lists, hedges, first person and the first letter's case agree."""
    wordnet: str | None = None
    """Folder of WordNet's ``data.noun`` and ``index.noun``, for synonyms and hypernyms beyond vapr's own list."""
    blind: bool = False
    """Ask the editor, without the image: could both answers be true of one image? Those that could are refused."""
    verifier: str | None = None
    """A vision-language model (as ``--editor`` names one) that looks at the image: chosen true, rejected false."""
    patterns: list[str] = Field(default=[])
    """Regular expressions of your own, case ignored; rejected answers that one of them is found in are refused."""
    python: str | None = None
    """A check of your own, ``file.py:function``: it is given the pair as a dict, and returns True or None (passes),
    False, or a text that says why the pair is refused."""
    python_seconds: Number = Field(default=10.0, gt=0)
    """Longest time that your own check and patterns may take for a pair."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        return _compiled(patterns, "checks.patterns")

    @field_validator("python")
    @classmethod
    def _name_a_function(cls, python: str | None) -> str | None:
        if python is not None and not re.fullmatch(r".+\.py:[^\W\d]\w*", python):
            raise ValueError(f"checks.python must be file.py:function, got '{python}'")
        return python

    @field_validator("length_ratio", "hard_length_ratio")
    @classmethod
    def _lie_around_1(cls, ratio: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = ratio
        if not 0 < low <= 1 <= high:
            raise ValueError(f"checks.{info.field_name} must be two numbers around 1, got {[low, high]}")
        return ratio


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PriceConfig:
    """What a million tokens of a model cost."""

    prompt: Number = Field(ge=0)
    """Tokens of prompts."""
    cached: Number | None = Field(default=None, ge=0)
    """Tokens of prompts that were in the server's prefix cache; null: as ``prompt``."""
    generated: Number = Field(ge=0)
    """Tokens of replies, reasoning included."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EngineConfig:
    """What runs the language model: vLLM in this process, or an OpenAI-compatible server."""

    tensor_parallel: WholeNumber = Field(default=1, ge=1)
    """GPUs that one model is spread over. vLLM only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """``auto``: as the weights are stored; float32 on a machine without a GPU. vLLM only."""
    max_model_len: WholeNumber = Field(default=4096, ge=1)
    """Largest prompt and reply together, in tokens. vLLM only; a server has its own."""
    gpu_memory_utilization: Number = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and key-value cache, shared by editor and verifier. vLLM only."""
    enforce_eager: bool = False
    """Start without compiling and capturing graphs: sooner ready, slower afterwards. vLLM only; always so on a CPU."""
    concurrency: WholeNumber = Field(default=64, ge=1, le=1000)  # the openai package opens no more at once
    """Most requests in flight; half as many whenever the server refuses some (HTTP 429 or 503) or takes more than half
    of ``timeout_seconds``, and slowly more again. Server only."""
    timeout_seconds: Number = Field(default=120.0, gt=0)
    """Longest wait for a reply, the server's queue included. Server only."""
    tries: WholeNumber = Field(default=6, ge=1)
    """How often a request is sent before its row is given up. Server only."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Server only."""
    model: str | None = Field(default=None, min_length=1)
    """The model's name at the server; null: the only one that it lists. Server only."""
    omit: list[Literal["seed", "max_tokens", "temperature"]] = Field(default=[])
    """Parameters that are not sent, for a server that refuses them. Server only."""
    max_tokens_as: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which the limit of tokens is sent; newer models of OpenAI take only the second. Server only."""
    extra_body: dict[str, Any] | None = None
    """More keys of every request, as the server knows them: {chat_template_kwargs: {enable_thinking: false}}. Server
    only."""

    batch: bool = False
    """Send requests as files to the server's batch endpoint, which is cheaper and slower: the command ends, and
    the same command later takes the replies and goes on. Server only."""
    reasoning_tokens: WholeNumber = Field(default=0, ge=0)
    """Tokens that a model which reasons first may use for that, on top of those of each reply."""
    prices: dict[str, PriceConfig] = Field(default={})
    """What a million tokens cost, by model: {gpt-4o-mini: {prompt: 0.15, generated: 0.6}}, in any currency. Tokens of
    other models are counted alone."""
    cache_dir: str | None = None
    """Where replies are kept for all jobs; null: the user's cache folder."""

    @field_validator("extra_body")
    @classmethod
    def _leave_ours_alone(cls, body: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_extra_body(body, "engine")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EditConfig(ConfigFile):
    """An edit job. Everything but ``engine`` is fixed when it is begun: it decides what the pairs are."""

    OTHER_THING: ClassVar = (
        "{path}: {found}, but a config of vapr edit (YAML) is wanted here; docs/edit.md lists its keys, and the data "
        "is given by itself: vapr edit DATA --out DIR"
    )
    NOT_KEYS: ClassVar = {"editor": "the editor is given on the command line, with --editor; several are 'editors'"}

    seed: WholeNumber = Field(default=0, ge=0, lt=2**31)
    """Seed of who swaps with whom and of the model's sampling."""
    turns_per_shard: WholeNumber = Field(default=5_000, ge=1, le=1_000_000)
    """Answers planned together, written together, and lost together when a job is killed."""
    editors: dict[str, Number] | None = Field(default=None, min_length=2)
    """Several models (each as ``--editor`` names one) in place of ``--editor``, with their weights: {A: 2, B: 1} has A
    edit two of three answers. Which one an answer is given to follows from the answer and ``seed``."""
    source: SourceConfig = SourceConfig()
    filters: FilterConfig = FilterConfig()
    plan: PlanConfig = PlanConfig()
    picture: PictureConfig | None = None
    """Change the pictures of answers instead of the answers; null: answers are edited."""
    ask: AskConfig = AskConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("editors")
    @classmethod
    def _weigh(cls, editors: dict[str, float] | None) -> dict[str, float] | None:
        for name, weight in (editors or {}).items():
            if not weight > 0:
                raise ValueError(f"editors.{name}: a weight must be above 0, got {weight:g}")
        return editors

    @model_validator(mode="after")
    def _ask_nobody_about_pictures(self) -> Self:
        checks = self.checks
        given = {
            "editors": self.editors is not None,
            "ask.candidates": self.ask.candidates > 1,
            "checks.blind": checks.blind,
            "checks.verifier": checks.verifier is not None,
            "checks.patterns": bool(checks.patterns),
            "checks.python": checks.python is not None,
        }
        if self.picture is not None and any(given.values()):
            key = next(key for key, is_given in given.items() if is_given)
            raise ValueError(f"{key} is about edited answers, and with picture the answer stays; leave it out")
        return self

    def with_source(self, **given: Any) -> Self:
        """Return the config with those keys of ``source`` that the command line gives; None is not given.

        Raises:
            UserError: if a column is mapped that rows do not have.
        """
        keys = {key: value for key, value in given.items() if value is not None}
        source = parse_section(SourceConfig, dataclasses.asdict(self.source) | keys, "--column")
        return dataclasses.replace(self, source=source)
