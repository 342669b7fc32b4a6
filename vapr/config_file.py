"""Reads a config file and says in one line what is wrong with it."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from vapr.errors import UserError
from vapr.formats import FORMAT_NAMES
from vapr.yaml_file import read_yaml

Parsed = TypeVar("Parsed")


def read_config(path: str | Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The mapping in a YAML file, with ``key.sub=value`` overrides applied.

    Raises:
        UserError: naming the file or the override.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values (run_dir:, policy:, data:, ...)")
    return apply_overrides(raw, overrides)


def apply_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The mapping, with ``key.sub=value`` overrides put in.

    Raises:
        UserError: naming the override.
    """
    for override in overrides:
        _apply_override(raw, override)
    return raw


def parse_config(config: type[Parsed], raw: dict[str, Any], where: str) -> Parsed:
    """Build the config dataclass from plain data.

    Raises:
        UserError: naming ``where`` and the key, with the nearest known key for an unknown one.
    """
    import pydantic

    if raw.get("kernels") is False:  # YAML reads a bare ``off`` as false
        raw = {**raw, "kernels": "off"}
    single_loss = isinstance(raw.get("loss"), dict)
    if single_loss:
        raw = {**raw, "loss": [raw["loss"]]}
    try:
        parsed = pydantic.TypeAdapter(config).validate_python(raw)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(config, error.errors(), single_loss)}") from None
    for key, value in _booleans_as_numbers(raw, parsed):
        key = key.replace("loss.0.", "loss.") if single_loss else key
        raise UserError(f"{where}: {key}: should be a number, got {value} (YAML reads yes, no, on and off so, too)")
    return parsed


def _booleans_as_numbers(raw: Any, parsed: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Where a config says true or false and something else was made of it: pydantic takes them for 1 and 0."""
    if isinstance(raw, bool) and not isinstance(parsed, bool):
        yield key, raw
    elif isinstance(raw, dict) and dataclasses.is_dataclass(parsed):
        for name in raw:
            yield from _booleans_as_numbers(raw[name], getattr(parsed, name), f"{key}.{name}".lstrip("."))
    elif isinstance(raw, list | tuple) and isinstance(parsed, list | tuple):
        for n, (given, made) in enumerate(zip(raw, parsed, strict=False)):
            yield from _booleans_as_numbers(given, made, f"{key}.{n}")


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


WRONG_SHAPES = ("string_type", "list_type", "dataclass_type")

SHAPES = {
    "data.train": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "data.eval": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "loss": "should be a mapping such as {kind: sigmoid, beta: 0.1}, or a list of them",
    "trackers": "should be a list such as [tensorboard, wandb]",
    "policy.lora.targets": "should be all-linear, or a list of module names such as [q_proj, v_proj]",
}


def _first_problem(config: Any, problems: list[Any], single_loss: bool) -> str:
    # Where a key takes several shapes, the one that fits further is the one that was meant.
    deepest = {p["loc"][:2]: max(len(q["loc"]) for q in problems if q["loc"][:2] == p["loc"][:2]) for p in problems}
    problems = [p for p in problems if p["type"] not in WRONG_SHAPES or len(p["loc"]) == deepest[p["loc"][:2]]]
    # An unknown key explains the missing one it was meant to be: name it first.
    problem = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    # pydantic names the alternatives it tried, as in "literal['all-linear']": no key of the user's.
    alternatives = [part for part in problem["loc"] if "[" in str(part) or part in ("str", "SourceConfig")]
    location = [part for part in problem["loc"] if part not in alternatives and not (single_loss and part == 0)]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key '{key}'; {_nearest_key(config, location)}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])  # our own sentence, which names the key
    if problem["type"] == "dataclass_type" and key not in SHAPES:
        return f"{key}: a mapping of keys to values is needed here, got {problem['input']!r:.40}"
    if key.startswith("data.") and key.endswith(".format"):
        return f"{key}: should be one of auto, {', '.join(FORMAT_NAMES)}, got {problem['input']!r:.40}"
    message = SHAPES.get(key) or problem["msg"].replace("Input should", "should")
    return f"{key}: {message}, got {problem['input']!r:.40}"


def _nearest_key(config: Any, location: list[Any]) -> str:
    section = config
    for part in location[:-1]:
        fields = {f.name: f for f in dataclasses.fields(section)}
        section = (_section_of(fields[part].type) if part in fields else None) or section
    known = [f.name for f in dataclasses.fields(section)]
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"


def _section_of(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg))), None)
