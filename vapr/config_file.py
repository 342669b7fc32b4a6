"""Reads a config from YAML and says in one line what is wrong with it. Both configs, of a run and of an edit job, are
frozen pydantic dataclasses: a field's type and limits stand where the field is, and its docstring is its documentation.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import pydantic
import yaml
from pydantic.fields import FieldInfo

from vapr.errors import UserError
from vapr.yaml_file import read_yaml

Section = TypeVar("Section")

SECTION = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Settings of every section: no unknown keys, no NaN."""


def _read_number(value: Any) -> Any:
    """Read text as a number (YAML 1.1 takes 1e-6, without a dot, for text), and 3.0 as the whole number it is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return int(value) if isinstance(value, float) and value.is_integer() else value


# pydantic's strict mode refuses true and false, which YAML makes of yes, no, on and off.
WholeNumber = Annotated[int, pydantic.Strict(), pydantic.BeforeValidator(_read_number)]
Number = Annotated[float, pydantic.Strict(), pydantic.BeforeValidator(_read_number)]


class ConfigFile:
    """A config that is read from a YAML file, and the sentences for what is not one."""

    WANTED: ClassVar[str]
    """What to give in place of data, a model or a folder; ``{line}`` is a whole run config in one line."""
    NOT_KEYS: ClassVar[Mapping[str, str]] = {}
    """Why some names are no keys."""

    @classmethod
    def load(cls, path: str | Path | None, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file (None: all defaults) and apply ``key.sub=value`` overrides.

        Raises:
            UserError: naming the file and the key, with the nearest known key for an unknown one.
        """
        raw = {} if path is None else cls.read(Path(path))
        for override in overrides:
            _apply_override(raw, override)
        return cls.parse(raw, where=str(path or "--set"))

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Read the mapping in a YAML file.

        Raises:
            UserError: naming the file, and saying what it is if it is data, a model or a run.
        """
        _refuse_other_things(path, cls.WANTED)
        raw = read_yaml(path)
        if not isinstance(raw, dict):
            raise UserError(f"{path}: a config is a mapping of keys to values (run_dir:, policy:, data:, ...)")
        return raw

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "config") -> Self:
        """Build a config from plain data; see :meth:`load` for the errors."""
        return parse_section(cls, raw, where)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as YAML and JSON hold it, with every key resolved."""
        return pydantic.TypeAdapter(type(self)).dump_python(self, mode="json")


def parse_section(section: type[Section], raw: dict[str, Any], where: str) -> Section:
    """Build one section of a config, or a whole one, from plain data.

    Raises:
        UserError: naming ``where`` and the key, with the nearest known key for an unknown one.
    """
    try:
        return pydantic.TypeAdapter(section).validate_python(raw)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(section, error.errors(), raw)}") from None


# What people have at hand where a config is wanted

DATA_FILES = (".jsonl", ".parquet", ".arrow", ".tar", ".csv", ".tsv")


def _refuse_other_things(path: Path, wanted: str) -> None:
    """Raise UserError for data, the folder of a model, or that of a run."""
    found, model, data = "holds data", "Qwen/Qwen2.5-VL-3B-Instruct", str(path)
    if path.is_dir():
        found = "is a folder"
        if (config := path / "config.yaml").is_file():
            raise UserError(f"{path}: is the folder of a run; its config is {config} (vapr train {config} --resume)")
        if (path / "config.json").is_file():
            found, model, data = "is a model's folder", str(path), "pairs.jsonl"
    elif path.suffix not in DATA_FILES and not _is_json_list(path):
        return
    example = {"run_dir": "runs/first", "policy": {"model": model}, "data": {"train": data}}
    raise UserError(f"{path}: {found}, but {wanted.replace('{line}', json.dumps(example, ensure_ascii=False))}")


def _is_json_list(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


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


# What is wrong, in the user's words

SHAPES = {
    "data.train": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "data.eval": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "loss": "should be a mapping such as {kind: sigmoid, beta: 0.1}, or a list of them",
    "trackers": "should be a list such as [tensorboard, wandb]",
    "policy.lora.targets": "should be all-linear, or a list of module names such as [q_proj, v_proj]",
    "data.columns": "should be a mapping such as {prompt: question, chosen: good, rejected: bad, images: image}",
    "source.columns": "should be a mapping such as {question: q, answer: a, images: img}",
}

NAMES_ELSEWHERE = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "target_modules": "targets",
    "lora_target": "targets", "lora_target_modules": "targets", "learning_rate": "lr", "lr_scheduler_type": "schedule",
    "num_train_epochs": "epochs", "max_grad_norm": "clip", "adam_epsilon": "eps", "output_dir": "run_dir",
    "model_name_or_path": "model", "torch_dtype": "dtype", "attn_implementation": "attention", "loss_type": "kind",
    "train_dataset": "train", "eval_dataset": "eval", "save_steps": "every", "save_total_limit": "keep",
}  # fmt: skip
"""What peft, TRL and LLaMA-Factory call our keys."""

UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
WRONG_SHAPES = ("string_type", "list_type", "dataclass_type")
LIMITS = {"gt": "> {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "min_length": "non-empty"}
BEYOND_LIMITS = (
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "string_too_short",
)  # fmt: skip


def _first_problem(config: Any, problems: Iterable[Any], raw: dict[str, Any]) -> str:
    located = [(_as_written(problem, raw), problem) for problem in problems]
    # Where a key takes several shapes, the one that fits further is the one that was meant.
    located = [
        ((keys, given), problem)
        for (keys, given), problem in located
        if not any(len(other) > len(keys) and other[: len(keys)] == keys for (other, _), _ in located)
    ]
    # An unknown key explains the missing one it was meant to be: name it first.
    (keys, given), problem = next((one for one in located if one[1]["type"] in UNKNOWN), located[0])
    key = ".".join(map(str, keys))
    kind = problem["type"]
    if kind in UNKNOWN:
        return f"unknown key '{key}'; {_nearest_key(config, keys)}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])  # our own sentence, which names the key
    if kind in ("int_type", "float_type") and isinstance(given, bool):
        return f"{key}: should be a number, got {given} (YAML reads yes, no, on and off so, too)"
    if kind in BEYOND_LIMITS and (field := _field_at(config, keys)[1]):
        return f"{key} must be {rule(field)}, got {given!r:.40}"
    return f"{key}: {_wanted_shape(key, problem, given)}, got {given!r:.40}"


def _as_written(problem: Any, raw: Any) -> tuple[list[Any], Any]:
    """Return the keys that lead to a problem, as the user wrote them, and the value there.

    pydantic's own location also names the alternatives that it tried, as in ``list[str]``, and the index of a single
    loss, which the user did not write.
    """
    keys, value = [], raw
    for part in problem["loc"]:
        index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if index or (isinstance(value, dict) and part in value):
            keys.append(part)
            value = value[part]
    if problem["type"] == "missing":
        keys.append(problem["loc"][-1])
    return keys, value


def _wanted_shape(key: str, problem: Any, given: Any) -> str:
    if shape := SHAPES.get(key.rstrip(".0123456789") if problem["type"] in WRONG_SHAPES else key):
        return shape
    if problem["type"] == "dataclass_type":
        return "a mapping of keys to values is needed here"
    if problem["type"] == "tuple_type":  # every one of ours is a pair of numbers
        return f"should be a list of 2, such as [{given}, {given}]"
    if problem["type"] == "list_type":
        parts = [part.strip() for part in given.split(",")] if isinstance(given, str) else [str(given)]
        return f"should be a list, such as [{', '.join(parts)}]"
    return problem["msg"].replace("Input should", "should")


def _nearest_key(config: Any, keys: list[Any]) -> str:
    section, _ = _field_at(config, keys[:-1])
    known, name = list(fields_of(section)), str(keys[-1])
    if len(keys) == 1 and name in getattr(config, "NOT_KEYS", ()):
        return config.NOT_KEYS[name]
    meant = NAMES_ELSEWHERE.get(name, name)
    if meant in known:
        return f"did you mean '{meant}'?"
    if len(places := [place for place in _all_keys(config) if place.rpartition(".")[2] == meant]) == 1:
        return f"did you mean '{places[0]}'?"
    return nearest(name, known, "known keys here")


def nearest(name: str, known: Iterable[str], listed_as: str = "known") -> str:
    """Return the known name that was probably meant, as a question, or the list of all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"{listed_as}: {', '.join(known)}"


def check_columns(columns: Iterable[str] | None, known: Iterable[str], where: str) -> None:
    """Raise ValueError for a column that is none of those ``known``; ``where`` is the key that maps them."""
    for key in columns or ():
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}'; {nearest(key, known)}")


# What a section's fields say of themselves; scripts/config_reference.py uses it, too


def fields_of(section: Any) -> dict[str, FieldInfo]:
    """Return the fields of a section by key."""
    return section.__pydantic_fields__


def mentioned(annotation: Any) -> Iterator[Any]:
    """Yield every type and limit that an annotation mentions, the outermost first."""
    yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "metadata", ())):
        yield from mentioned(part)


def sections_in(annotation: Any) -> list[Any]:
    """Return the sections that an annotation mentions, each once."""
    return list(dict.fromkeys(part for part in mentioned(annotation) if hasattr(part, "__pydantic_fields__")))


def rule(field: FieldInfo) -> str:
    """Return what a value must be, such as ``> 0 and at most 1``; empty if it has no limits."""
    parts = [*mentioned(field.annotation), *(part for limit in field.metadata for part in mentioned(limit))]
    limits: dict[str, None] = {}
    for part in parts:
        limits |= {
            text.format(_shown(getattr(part, name))): None for name, text in LIMITS.items() if hasattr(part, name)
        }
    return ("null or " if limits and type(None) in parts else "") + " and ".join(limits)


def _shown(limit: float) -> str:
    if isinstance(limit, int) and limit > 2**20 and limit.bit_count() == 1:
        return f"2^{limit.bit_length() - 1}"
    return f"{limit:,}" if limit >= 10_000 else f"{limit:g}"


def _field_at(section: Any, keys: list[Any]) -> tuple[Any, FieldInfo | None]:
    """Return the section and the field that keys lead to; indices and free names lead no further."""
    field = None
    for key in keys:
        if (found := fields_of(section).get(key)) is not None:
            field = found
            section = next(iter(sections_in(field.annotation)), section)
    return section, field


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in fields_of(section).items():
        yield f"{prefix}{name}"
        for below in sections_in(field.annotation):
            yield from _all_keys(below, f"{prefix}{name}.")
