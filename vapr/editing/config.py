"""Every knob of an edit job: frozen dataclasses that check themselves, as :mod:`vapr.config` has them for a run."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vapr.config import STRICT_KEYS, check
from vapr.errors import UserError

COLUMNS = ("question", "answer", "images", "conversations", "messages", "system", "id", "source", "licence")
"""What ``source.columns`` can map."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the instruction data is read."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    columns: dict[str, str] | None = None
    """Of rows that are neither LLaVA's nor vapr's: {question: q, answer: a, images: img}; ``a.b.0`` goes down."""
    image_root: str | None = None
    """Images must lie inside this folder. Without it, relative paths start at the data file's folder."""
    format: Literal["auto", "llava", "messages", "prompt"] = "auto"
    """Shape of the rows: ``llava`` (``conversations``), ``messages``, or ``prompt`` (a prompt or question beside an
    answer); ``auto`` takes of these the first that a row has."""
    split: str = "train"
    """Of a hub data set or a folder of its shards."""
    subset: str | None = None
    """Of a hub data set."""
    name: str | None = None
    """What the source is called in pairs and counts. Without it: the row's own name of its source, else the first
    folder of its image path, else the data file."""
    licence: str | None = None
    """Of the source; written into every pair and the card. A row's own ``licence`` or ``license`` goes first."""

    def __post_init__(self) -> None:
        for key in self.columns or ():
            check(key in COLUMNS, "source.columns", f"a mapping of {', '.join(COLUMNS)}", f"'{key}'")


BOOKS = r"\b(title|author|genre) of this book\b|\bwho (wrote|is the author of) this book\b"


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which answers are left alone. Each reason is counted."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    no_image: bool = True
    """Leave out rows without an image: no picture could refute the edit."""
    coordinates: bool = True
    """Leave out boxes and points: [0.12, 0.3, 0.5, 0.8]."""
    letters: bool = True
    """Leave out answers that are the letter of an option."""
    min_answer_words: int = 1
    """Shorter answers are left out."""
    max_answer_words: int = 400
    """Longer answers are left out."""
    skip_questions: list[str] = dataclasses.field(default_factory=lambda: [BOOKS])
    """Regular expressions; questions that one of them is found in are left out. By default OCR-VQA's about books."""

    def __post_init__(self) -> None:
        check(self.min_answer_words >= 1, "filters.min_answer_words", "at least 1", self.min_answer_words)
        low, high = self.min_answer_words, self.max_answer_words
        check(high >= low, "filters.max_answer_words", "at least min_answer_words", high)
        for pattern in self.skip_questions:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"filters.skip_questions: {pattern!r} is no regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is edited, and how replacement values are chosen."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    categories: list[str] | None = None
    """Names of the categories to use; null: all."""
    add_categories: list[str] = dataclasses.field(default_factory=list)
    """YAML files of categories of your own; one of a known name replaces it."""
    balance: Literal["swap", "uniform"] = "swap"
    """Values of closed sets: ``swap``: two rows trade theirs, so that each value is as often chosen as rejected;
    ``uniform``: any other value of the set, which a text-only probe can learn."""
    turns_per_row: int | None = None
    """At most so many answers of a row are edited, the first ones; null: all."""

    def __post_init__(self) -> None:
        check(self.categories != [], "plan.categories", "null or at least one name", self.categories)
        check(self.turns_per_row is None or self.turns_per_row >= 1, "plan.turns_per_row", "1 or more, or null",
               self.turns_per_row)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """How the language model is asked."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    temperature: float = 0.7
    """Of sampling; each request has its own seed, 0 takes the likeliest token."""
    attempts: int = 3
    """Times an edit is asked for; from the second on the prompt says what was wrong with the last."""
    max_tokens: int = 512
    """Of a reply that holds edits. A whole rewritten answer may have as many more as the answer is long."""

    def __post_init__(self) -> None:
        check(0 <= self.temperature <= 2, "ask.temperature", "between 0 and 2", self.temperature)
        check(1 <= self.attempts <= 20, "ask.attempts", "between 1 and 20", self.attempts)
        check(self.max_tokens >= 16, "ask.max_tokens", "at least 16", self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What a pair must hold to be accepted."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    length_ratio: tuple[float, float] = (0.9, 1.1)
    """Words of rejected over words of chosen; one word of difference (of a trade, two) passes within
    ``hard_length_ratio``."""
    hard_length_ratio: tuple[float, float] = (0.8, 1.25)
    """Nothing outside passes."""
    max_edit_distance: float = 0.35
    """Word edit distance over the longer length. A rewrite may have twice as much."""
    short_answer_words: int = 8
    """Answers up to this long are exempt from the three limits above."""
    style: bool = True
    """Sentences, punctuation at the end, line breaks, lists, hedges, first person and the first letter's case agree."""
    wordnet: str | None = None
    """Folder of WordNet's ``data.noun`` and ``index.noun``, for synonyms and hypernyms beyond vapr's own list."""
    blind: bool = False
    """Ask the editor, without the image: could both answers be true of one image? Those that could are refused."""
    verifier: str | None = None
    """A vision-language model (as ``--editor`` names one) that looks at the image: chosen true, rejected false."""

    def __post_init__(self) -> None:
        for name in ("length_ratio", "hard_length_ratio"):
            low, high = getattr(self, name)
            check(0 < low <= 1 <= high, f"checks.{name}", "two numbers around 1", [low, high])
        check(0 < self.max_edit_distance <= 1, "checks.max_edit_distance", "> 0 and at most 1", self.max_edit_distance)
        check(self.short_answer_words >= 0, "checks.short_answer_words", "at least 0", self.short_answer_words)


SAMPLING = ("seed", "max_tokens", "temperature")
"""What a request says of the sampling, and ``engine.omit`` can leave out."""
FIXED = ("model", "messages", "response_format")
"""What ``engine.extra_body`` cannot replace."""
CONNECTIONS = 1000
"""The openai package opens no more at once."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs the language model: vLLM in this process, or an OpenAI-compatible server."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    tensor_parallel: int = 1
    """GPUs that one model is spread over. vLLM only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """``auto``: as the weights are stored; float32 on a machine without a GPU. vLLM only."""
    max_model_len: int = 4096
    """Largest prompt and reply together, in tokens. vLLM only; a server has its own."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights and key-value cache, shared by editor and verifier. vLLM only."""
    enforce_eager: bool = False
    """Start without compiling and capturing graphs: sooner ready, slower afterwards. vLLM only; always so on a CPU."""
    concurrency: int = 64
    """Requests in flight. Server only."""
    timeout_seconds: float = 120.0
    """Longest wait for a reply, the server's queue included. Server only."""
    tries: int = 6
    """How often a request is sent before its row is given up. Server only."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Server only."""
    model: str | None = None
    """The model's name at the server; null: the only one that it lists. Server only."""
    omit: list[Literal["seed", "max_tokens", "temperature"]] = dataclasses.field(default_factory=list)
    """Parameters that are not sent, for a server that refuses them. Server only."""
    extra_body: dict[str, Any] | None = None
    """More keys of every request, as the server knows them: {chat_template_kwargs: {enable_thinking: false}}. Server
    only."""

    def __post_init__(self) -> None:
        check(self.tensor_parallel >= 1, "engine.tensor_parallel", "at least 1", self.tensor_parallel)
        check(self.max_model_len >= 1, "engine.max_model_len", "at least 1", self.max_model_len)
        share = 0 < self.gpu_memory_utilization <= 1
        check(share, "engine.gpu_memory_utilization", "> 0 and at most 1", self.gpu_memory_utilization)
        few = 1 <= self.concurrency <= CONNECTIONS
        check(few, "engine.concurrency", f"at least 1 and at most {CONNECTIONS}", self.concurrency)
        check(self.timeout_seconds > 0, "engine.timeout_seconds", "> 0", self.timeout_seconds)
        check(self.tries >= 1, "engine.tries", "at least 1", self.tries)
        check(self.model != "", "engine.model", "a name or null", repr(self.model))
        for key in self.extra_body or ():
            check(key not in FIXED, "engine.extra_body", f"keys other than {', '.join(FIXED)}", f"'{key}'")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """An edit job. Everything but ``engine`` is fixed when it is begun: it decides what the pairs are."""

    __pydantic_config__: ClassVar = STRICT_KEYS

    seed: int = 0
    """Of who swaps with whom and of the model's sampling."""
    turns_per_shard: int = 5_000
    """Answers planned together, written together, and lost together when a job is killed."""
    source: SourceConfig = SourceConfig()
    filters: FilterConfig = FilterConfig()
    plan: PlanConfig = PlanConfig()
    ask: AskConfig = AskConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**31, "seed", "at least 0 and below 2^31", self.seed)
        check(1 <= self.turns_per_shard <= 1_000_000, "turns_per_shard", "1 to 1,000,000", self.turns_per_shard)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every key resolved."""
        return dataclasses.asdict(self)

    def with_source(self, **given: Any) -> "EditConfig":
        """The config with those keys of ``source`` that are given on the command line; None is not given.

        Raises:
            UserError: if a column is mapped that rows do not have.
        """
        changes = {key: value for key, value in given.items() if value is not None}
        try:
            return dataclasses.replace(self, source=dataclasses.replace(self.source, **changes))
        except ValueError as error:
            raise UserError(str(error)) from None

    @classmethod
    def load(cls, path: str | Path | None, overrides: tuple[str, ...] = ()) -> "EditConfig":
        """Read a YAML file (None: all defaults) and apply ``key.sub=value`` overrides.

        Raises:
            UserError: naming the file and the key, with the nearest known key for an unknown one.
        """
        from vapr.config_file import apply_overrides, parse_config, read_config

        raw = apply_overrides({}, overrides) if path is None else read_config(path, overrides, of_edit=True)
        if "editor" in raw:
            raise UserError(f"{path or '--set'}: the editor is given on the command line, with --editor")
        return parse_config(cls, raw, str(path or "--set"))
