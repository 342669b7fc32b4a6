"""Says in one line what is wrong with a config: the key as the user wrote it, the value, the rule and the way out."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

SHAPES = {
    "data.train": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "data.eval": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
    "probe.data": "should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those",
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
    "gradient_checkpointing": "checkpointing",
    "train_dataset": "train", "eval_dataset": "eval", "save_steps": "every", "save_total_limit": "keep",
}  # fmt: skip
"""What peft, TRL and LLaMA-Factory call our keys."""

UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
WRONG_SHAPES = ("string_type", "list_type", "dataclass_type")
LIMITS = {"gt": "> {:,}", "ge": "at least {:,}", "lt": "below {:,}", "le": "at most {:,}", "min_length": "{:,} or more"}
BEYOND_LIMITS = (
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "string_too_short",
)  # fmt: skip


def first_mistake(config: Any, problems: Iterable[Any], raw: dict[str, Any]) -> str:
    """Return a sentence on one of the problems that pydantic found: the one that explains the others, if any does.

    Args:
        config: class of the config.
        problems: what ``ValidationError.errors()`` returns.
        raw: the plain data that no config could be made of.
    """
    located = [(*_as_written(problem, raw), problem) for problem in problems]
    # Where a key takes several shapes, the one that fits further is the one that was meant.
    longest = [keys for keys, *_ in located]
    meant = [one for one in located if not any(one[0] == keys[: len(one[0])] != keys for keys in longest)]
    # An unknown key explains the missing one it was meant to be: name it first.
    keys, given, problem = next((one for one in meant if one[2]["type"] in UNKNOWN), meant[0])
    key, kind = ".".join(map(str, keys)), problem["type"]
    if kind in UNKNOWN:
        return f"unknown key '{key}'; {_nearest_key(config, keys)}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])  # our own sentence, which names the key
    if kind in ("int_type", "float_type") and isinstance(given, bool):
        return f"{key}: should be a number, got {given} (YAML reads yes, no, on and off so, too)"
    if kind in BEYOND_LIMITS and key not in SHAPES and (field := _field_at(config, keys)[1]):
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
    if why := getattr(config, "NOT_KEYS", {}).get(".".join(map(str, keys))):
        return why
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
    limits = [(text, getattr(part, name, None)) for part in parts for name, text in LIMITS.items()]
    texts = dict.fromkeys(_in_words(text, limit) for text, limit in limits if limit is not None)
    return ("null or " if texts and type(None) in parts else "") + " and ".join(texts)


def _in_words(text: str, limit: Any) -> str:
    return "non-empty" if (text, limit) == (LIMITS["min_length"], 1) else text.format(limit)


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
