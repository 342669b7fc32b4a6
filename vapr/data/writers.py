"""The shapes in which other trainers take preference rows: what makes a row of each of a pair.

The counterpart of :mod:`vapr.data.formats`. A writer is a function of a pair, and of a function that says how the file
names images. It raises :class:`vapr.errors.BadRow` for a pair that the format cannot hold.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from vapr.data.formats import PLACEHOLDER, Row, origin_of
from vapr.data.llama_factory import messages_of_side
from vapr.data.pair import Message, PreferencePair, encodable
from vapr.errors import BadRow

WriterName = Literal["vapr", "trl", "llava", "llama-factory", "llama-factory-v1", "ms-swift", "povid", "rlaif-v"]
WRITER_NAMES: tuple[str, ...] = get_args(WriterName)

SUFFIXES_OF_FORMATS = {
    "vapr": (".jsonl", ".json", ".parquet"),
    "trl": (".jsonl", ".json", ".parquet"),
    "llava": (".json", ".jsonl"),
    "llama-factory": (".json", ".jsonl"),
    "llama-factory-v1": (".jsonl", ".json"),
    "ms-swift": (".jsonl", ".json"),
    "povid": (".json",),
    "rlaif-v": (".parquet", ".jsonl"),
}

OTHER_MEDIA = ("<video>", "<audio>")
"""Placeholders of LLaMA-Factory and ms-swift, like ``<image>``."""

Names = Callable[[tuple[Path | bytes, ...]], list[Any]]


def _vapr(pair: PreferencePair, names: Names) -> Row:
    row = _sides(pair, names)
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    if pair.weight != 1.0:
        row["weight"] = pair.weight
    if pair.category is not None:
        row["category"] = pair.category
    if pair.edits:
        text = "".join(part["text"] for part in pair.chosen[0]["content"])
        row["edits"] = [{"start": e.start, "end": e.end, "from": text[e.start : e.end], "to": e.to} for e in pair.edits]
    return row


def _trl(pair: PreferencePair, names: Names) -> Row:
    _same_images(pair, "trl")
    return _sides(pair, names)


def _sides(pair: PreferencePair, names: Names) -> Row:
    sides = {key: [dict(message) for message in getattr(pair, key)] for key in ("prompt", "chosen", "rejected")}
    return {"id": pair.id, "images": names(pair.images), **sides}


def _llama_factory(pair: PreferencePair, names: Names) -> Row:
    _same_images(pair, "llama-factory")
    _no_other_media(pair, "llama-factory")
    return {
        "id": pair.id,
        "conversations": _llava_turns(pair.prompt),
        "chosen": _llava_turns(_one_answer(pair.chosen))[0],
        "rejected": _llava_turns(_one_answer(pair.rejected))[0],
        "images": names(pair.images),
    }


def _llama_factory_v1(pair: PreferencePair, names: Names) -> Row:
    images = names(pair.images)
    others = images if pair.rejected_images is None else names(pair.rejected_images)
    [chosen], [rejected] = _one_answer(pair.chosen), _one_answer(pair.rejected)
    return {
        "id": pair.id,
        "chosen_messages": messages_of_side(pair.prompt, chosen, images),
        "rejected_messages": messages_of_side(pair.prompt, rejected, others),
    }


def _ms_swift(pair: PreferencePair, names: Names) -> Row:
    _no_other_media(pair, "ms-swift")
    chosen = [*pair.prompt, *_one_answer(pair.chosen)]
    row: Row = {
        "id": pair.id,
        "messages": [{"role": message["role"], "content": _text([message])} for message in chosen],
        "images": names(pair.images),
    }
    if pair.rejected != pair.chosen:
        row["rejected_response"] = _text(_one_answer(pair.rejected))
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    return row


def _llava(pair: PreferencePair, names: Names) -> Row:
    _fits_llava(pair, "llava")
    row = {
        "id": pair.id,
        "conversations": _llava_turns((*pair.prompt, *_one_answer(pair.chosen)), own_line=True),
        "rejected": _text(_one_answer(pair.rejected)),
    }
    return {**row, "image": names(pair.images)[0]} if pair.images else row


def _povid(pair: PreferencePair, names: Names) -> Row:
    _fits_llava(pair, "povid")
    prompt = _llava_turns(pair.prompt, own_line=True)
    if pair.chosen[0] == pair.rejected[0]:
        raise BadRow("povid takes what both sides begin with for the prompt, and these completions begin alike")
    row = {
        "id": pair.id,
        "conversations": prompt + _llava_turns(pair.chosen),
        "rejected_conversations": prompt + _llava_turns(pair.rejected),
    }
    return {**row, "image": names(pair.images)[0]} if pair.images else row


def _fits_llava(pair: PreferencePair, name: str) -> None:
    """LLaVA's own trainer knows one image at most, and no system turn."""
    _same_images(pair, name)
    if len(pair.images) > 1:
        raise BadRow(f"{name} rows show one image; this pair has {len(pair.images)}")
    _no_system_turn(pair, name)


def _rlaif_v(pair: PreferencePair, names: Names) -> Row:
    """RLAIF-V's trainer puts the image before the question, and takes ``origin_split`` for a JSON object."""
    _same_images(pair, "rlaif-v")
    if len(pair.images) != 1:
        raise BadRow(f"rlaif-v rows show one image; this pair has {len(pair.images)}")
    _no_system_turn(pair, "rlaif-v")
    if len(pair.prompt) > 1:
        raise BadRow(f"rlaif-v rows hold one question; this pair's prompt has {len(pair.prompt)} turns")
    first, *question = pair.prompt[0]["content"]
    if first["type"] != "image":
        raise BadRow("rlaif-v rows show their image before the question; this pair's stands within or after it")
    texts = {
        "question": _text([{"content": question}]),
        "chosen": _text(_one_answer(pair.chosen)),
        "rejected": _text(_one_answer(pair.rejected)),
    }
    category = {} if pair.category is None else {"category": pair.category}
    [image] = names(pair.images)
    image = image if isinstance(image, dict) else {"bytes": None, "path": image}
    return {
        "ds_name": "vapr",
        "image": image,
        **texts,
        "origin_dataset": "",
        "origin_split": json.dumps({"id": pair.id, **category}),
        "idx": pair.number,
        "image_path": image["path"],
    }


ORIGIN_KEYS = frozenset({"ds_name", "origin_dataset", "origin_split", "idx", "image_path"})
"""What RLAIF-V's rows say of where they are from."""


def keep_origin(row: Row, raw: Row) -> set[str]:
    """Put what ``raw``, the row a pair was read from, says of its origin into its rlaif-v ``row``.

    Returns:
        Those of :data:`ORIGIN_KEYS` that are not as RLAIF-V has them, and are lost.
    """
    said = {key: raw[key] for key in ORIGIN_KEYS if raw.get(key) is not None}
    kept = {key: value for key, value in said.items() if _like(row[key], value)}
    before, ours = origin_of(raw), json.loads(row["origin_split"])
    if before is None:
        kept.pop("origin_split", None)
    if "id" not in (before or {}) and ours["id"] == str(kept.get("idx")):
        del ours["id"]
    row.update({**kept, "origin_split": json.dumps({**(before or {}), **ours})})
    return said.keys() - kept.keys()


def _like(ours: Any, value: Any) -> bool:
    """Whether the value can stand in a column of ours: UTF-8 text, or an int64."""
    if type(value) is not type(ours):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return encodable(value)


def _same_images(pair: PreferencePair, name: str) -> None:
    if pair.rejected_images is not None:
        raise BadRow(f"{name} rows have no place for 'rejected_images'")


def _no_other_media(pair: PreferencePair, name: str) -> None:
    for message in (*pair.prompt, *pair.chosen, *pair.rejected):
        for part in message["content"]:
            if found := next((media for media in OTHER_MEDIA if media in part.get("text", "")), None):
                raise BadRow(f"'{found}' stands in a text, where {name} would look for such a file")


def _no_system_turn(pair: PreferencePair, name: str) -> None:
    if pair.prompt[0]["role"] == "system":
        raise BadRow(f"{name} rows have no system turn")


def _one_answer(completion: tuple[Message, ...]) -> tuple[Message, ...]:
    if len(completion) > 1:
        raise BadRow("a completion of several turns does not fit this format; vapr, trl and povid can hold it")
    return completion


def _llava_turns(messages: tuple[Message, ...], *, own_line: bool = False) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": _text([message], own_line=own_line)} for message in messages]


def _text(messages: Any, *, own_line: bool = False) -> str:
    """Text of messages with ``<image>`` for every image part, as :func:`vapr.data.formats.with_image_parts` reads it.

    That takes one line break beside a placeholder away, so one is added where the text has its own; with ``own_line``,
    LLaVA's custom, everywhere.
    """
    runs: list[str | None] = []  # texts, and None for an image
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "image":
            runs.append(None)
        elif part["text"] and runs and runs[-1] is not None:
            runs[-1] += part["text"]
        elif part["text"]:
            runs.append(part["text"])
    if any(PLACEHOLDER in run for run in runs if run is not None):
        raise BadRow(f"'{PLACEHOLDER}' stands in a text, where this format would take it for an image")
    text = ""
    for before, run in zip([None, *runs], runs, strict=False):
        if text and (before is None) != (run is None):
            touching = run[:1] if run is not None else text[-1:]
            text += "\n" if own_line or touching == "\n" else ""
        text += PLACEHOLDER if run is None else run
    return text


WRITERS: dict[str, Callable[[PreferencePair, Names], Row]] = {
    "vapr": _vapr,
    "trl": _trl,
    "llava": _llava,
    "llama-factory": _llama_factory,
    "llama-factory-v1": _llama_factory_v1,
    "ms-swift": _ms_swift,
    "povid": _povid,
    "rlaif-v": _rlaif_v,
}
