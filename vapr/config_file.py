"""Reads a config file and says in one line what is wrong with it."""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from vapr.errors import UserError
from vapr.format_names import FORMAT_NAMES
from vapr.yaml_file import read_yaml

Parsed = TypeVar("Parsed")


DATA_FILES = (".jsonl", ".parquet", ".arrow", ".tar", ".csv", ".tsv")


def read_config(path: str | Path, overrides: tuple[str, ...], *, of_edit: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, with ``key.sub=value`` overrides applied.

    Args:
        path: of the file.
        overrides: of its keys.
        of_edit: whether it is the config of an edit job, not of a run; for messages.

    Raises:
        UserError: naming the file or the override, and what the file is if it is data, a model or a run.
    """
    _refuse_other_things(Path(path), of_edit)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values (run_dir:, policy:, data:, ...)")
    return apply_overrides(raw, overrides)


def _refuse_other_things(path: Path, of_edit: bool) -> None:
    """Raise UserError for data, a model's folder or a run's: what people have at hand where a config is wanted."""
    found = "holds data"
    model, data = "Qwen/Qwen2.5-VL-3B-Instruct", str(path)
    if path.is_dir():
        found = "is a folder"
        if (path / "config.yaml").is_file() and not of_edit:
            config = path / "config.yaml"
            raise UserError(f"{path}: is the folder of a run; its config is {config} (vapr train {config} --resume)")
        if (path / "config.json").is_file():
            found, model, data = "is a model's folder", str(path), "pairs.jsonl"
    elif path.suffix not in DATA_FILES and not _is_json_list(path):
        return
    if of_edit:
        way_out = "docs/edit.md lists its keys, and the data is given by itself: vapr edit DATA --out DIR"
        raise UserError(f"{path}: {found}, but a config of vapr edit (YAML) is wanted here; {way_out}")
    line = json.dumps(
        {"run_dir": "runs/first", "policy": {"model": model}, "data": {"train": data}}, ensure_ascii=False
    )
    raise UserError(
        f"{path}: {found}, but a run config (YAML) is wanted here; write this line into run.yaml and give that: {line}"
    )


def _is_json_list(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


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
    if isinstance(raw.get("loss"), list):
        raw = {**raw, "loss": [_known_loss(term) for term in raw["loss"]]}
    try:
        parsed = pydantic.TypeAdapter(config).validate_python(raw)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(config, error.errors(), single_loss)}") from None
    for key, value in _booleans_as_numbers(raw, parsed):
        key = key.replace("loss.0.", "loss.") if single_loss else key
        raise UserError(f"{where}: {key}: should be a number, got {value} (YAML reads yes, no, on and off so, too)")
    return parsed


def _known_loss(term: Any) -> Any:
    """A loss term in which the name that most people have for the sigmoid loss is ours."""
    return {**term, "kind": "sigmoid"} if isinstance(term, dict) and term.get("kind") == "dpo" else term


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


def _first_problem(config: Any, problems: list[Any], single_loss: bool) -> str:
    # Where a key takes several shapes, the one that fits further is the one that was meant.
    deepest = {p["loc"][:2]: max(len(q["loc"]) for q in problems if q["loc"][:2] == p["loc"][:2]) for p in problems}
    problems = [p for p in problems if p["type"] not in WRONG_SHAPES or len(p["loc"]) == deepest[p["loc"][:2]]]
    # An unknown key explains the missing one it was meant to be: name it first.
    of_first = [p for p in problems if p["loc"][:2] == problems[0]["loc"][:2] and p["type"] not in WRONG_SHAPES]
    problem = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), [*of_first, *problems][0])
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
    wrong_item = problem["type"] == "literal_error" and isinstance(problem["loc"][-1], int)  # of a list as it should be
    shape = None if wrong_item else SHAPES.get(key.rstrip(".0123456789"))
    if problem["type"] == "dataclass_type" and not shape:
        return f"{key}: a mapping of keys to values is needed here, got {problem['input']!r:.40}"
    if key.startswith("data.") and key.endswith(".format"):
        return f"{key}: should be one of auto, {', '.join(FORMAT_NAMES)}, got {problem['input']!r:.40}"
    if problem["type"] in ("list_type", "tuple_type") and not shape:
        return f"{key}: {_as_a_list(problem)}, got {problem['input']!r:.40}"
    message = shape or problem["msg"].replace("Input should", "should")
    return f"{key}: {message}, got {problem['input']!r:.40}"


def _as_a_list(problem: Any) -> str:
    """How the value that was given would be written as the list that is wanted."""
    given = problem["input"]
    if problem["type"] == "tuple_type":  # every one of ours is a pair of numbers
        return f"should be a list of 2, such as [{given}, {given}]"
    parts = [part.strip() for part in given.split(",")] if isinstance(given, str) else [str(given)]
    return f"should be a list, such as [{', '.join(parts)}]"


def _nearest_key(config: Any, location: list[Any]) -> str:
    section = config
    for part in location[:-1]:
        fields = {f.name: f for f in dataclasses.fields(section)}
        section = (_section_of(fields[part].type) if part in fields else None) or section
    known = [f.name for f in dataclasses.fields(section)]
    meant = NAMES_ELSEWHERE.get(str(location[-1]), str(location[-1]))
    if meant in known:
        return f"did you mean '{meant}'?"
    if len(places := [place for place in _all_keys(config) if place.rpartition(".")[2] == meant]) == 1:
        return f"did you mean '{places[0]}'?"
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        yield f"{prefix}{field.name}"
        if below := _section_of(field.type):
            yield from _all_keys(below, f"{prefix}{field.name}.")


def _section_of(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg))), None)
