"""Reads a config from YAML: what the config of a run and that of an edit job have in common.

Both are frozen pydantic dataclasses. The type and limits of a key stand at its field, and so does its documentation.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import pydantic
import yaml

from vapr.config_mistakes import first_mistake
from vapr.errors import UserError
from vapr.yaml_file import parse_yaml, read_yaml

Section = TypeVar("Section")

SECTION = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Settings of every section: no unknown keys, no NaN."""


def _read_number(value: Any) -> Any:
    """Read text as a number (YAML 1.1 takes 1e-6, without a dot, for text), and 3.0 as the whole number it is."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                value = kind(value)
                break
    return int(value) if isinstance(value, float) and value.is_integer() else value


# pydantic's strict mode refuses true and false, which YAML makes of yes, no, on and off.
WholeNumber = Annotated[int, pydantic.Strict(), pydantic.BeforeValidator(_read_number)]
Number = Annotated[float, pydantic.Strict(), pydantic.BeforeValidator(_read_number)]


class ConfigFile:
    """A config that is read from a YAML file, and the sentences for what is not one."""

    OTHER_THING: ClassVar[str]
    """What to say of data, a model or a folder in place of a config; ``{line}`` is a whole run config in one line."""
    NOT_KEYS: ClassVar[Mapping[str, str]] = {}
    """Why some names are no keys, by the name with those of its sections, ``a.b``."""

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
        _refuse_other_things(path, cls.OTHER_THING)
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
        raise UserError(f"{where}: {first_mistake(section, error.errors(), raw)}") from None


# What people have at hand where a config is wanted

DATA_FILES = (".jsonl", ".parquet", ".arrow", ".tar", ".csv", ".tsv")


def _refuse_other_things(path: Path, sentence: str) -> None:
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
    raise UserError(sentence.format(path=path, found=found, line=json.dumps(example, ensure_ascii=False)))


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
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        twice = getattr(error, "problem", None) or ""
        why = f" ({twice})" if twice.endswith("is given twice") else ""
        raise UserError(f"--set {override}: the value is not valid YAML{why}") from None
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
