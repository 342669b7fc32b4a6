"""Turn pairs into rows of the shapes that other trainers read: the counterpart of :mod:`vapr.data.formats`.

A writer is a function of a pair, and of a function that says how the file names images. It raises
:class:`vapr.errors.BadRow` for a pair that the format cannot hold. :data:`WRITERS` lists them.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapr.data.formats import SIDES, origin_of
from vapr.data.pair import Message, PreferencePair, encodable
from vapr.data.row_values import PLACEHOLDER, Row
from vapr.errors import BadRow

OTHER_MEDIA = ("<video>", "<audio>")
"""Placeholders of LLaMA-Factory and ms-swift, like ``<image>``."""

ORIGIN_KEYS = frozenset({"ds_name", "origin_dataset", "origin_split", "idx", "image_path"})
"""Keys of RLAIF-V's rows that say where a row is from."""

Names = Callable[[tuple[Path | bytes, ...]], list[Any]]


@dataclass(frozen=True, slots=True)
class Writer:
    """A format that pairs are written in."""

    row: Callable[[PreferencePair, Names], Row]
    suffixes: tuple[str, ...]
    """Kinds of files that readers of the format take."""


def _vapr(pair: PreferencePair, names: Names) -> Row:
    row = _sides(pair, names)
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    if pair.weight != 1.0:
        row["weight"] = pair.weight
    if pair.beta is not None:
        row["beta"] = pair.beta
    if pair.margin:
        row["margin"] = pair.margin
    if pair.category is not None:
        row["category"] = pair.category
    if pair.edits:
        text = "".join(part["text"] for part in pair.chosen[0]["content"])
        row["edits"] = [{"start": e.start, "end": e.end, "from": text[e.start : e.end], "to": e.to} for e in pair.edits]
    return row


def _trl(pair: PreferencePair, names: Names) -> Row:
    _refuse_rejected_images(pair, "trl")
    return _sides(pair, names)


def _sides(pair: PreferencePair, names: Names) -> Row:
    sides = {key: [dict(message) for message in getattr(pair, key)] for key in ("prompt", "chosen", "rejected")}
    return {"id": pair.id, "images": names(pair.images), **sides}


def _llama_factory(pair: PreferencePair, names: Names) -> Row:
    _refuse_rejected_images(pair, "llama-factory")
    _refuse_other_media(pair, "llama-factory")
    return {
        "id": pair.id,
        "conversations": _llava_turns(pair.prompt),
        "chosen": _llava_turns([_only_turn(pair.chosen)])[0],
        "rejected": _llava_turns([_only_turn(pair.rejected)])[0],
        "images": names(pair.images),
    }


def _llama_factory_v1(pair: PreferencePair, names: Names) -> Row:
    images = names(pair.images)
    others = images if pair.rejected_images is None else names(pair.rejected_images)
    sides = zip(SIDES, (_only_turn(pair.chosen), _only_turn(pair.rejected)), (images, others), strict=True)
    return {"id": pair.id, **{key: _whole_conversation(pair.prompt, answer, shown) for key, answer, shown in sides}}


def _whole_conversation(prompt: Sequence[Message], answer: Message, images: Sequence[Any]) -> list[Row]:
    """Return LLaMA-Factory's messages: the prompt, which shows ``images``, and the answer, which alone is scored."""
    names = iter(images)

    def converted(message: Message, weight: float) -> Row:
        content = [
            {"type": "text", "value": part["text"]}
            if part["type"] == "text"
            else {"type": "image_url", "value": next(names)}
            for part in message["content"]
        ]
        return {"role": message["role"], "content": content, "loss_weight": weight}

    return [*(converted(message, 0.0) for message in prompt), converted(answer, 1.0)]


def _ms_swift(pair: PreferencePair, names: Names) -> Row:
    _refuse_other_media(pair, "ms-swift")
    chosen = [*pair.prompt, _only_turn(pair.chosen)]
    row: Row = {
        "id": pair.id,
        "messages": [{"role": message["role"], "content": _text(message["content"])} for message in chosen],
        "images": names(pair.images),
    }
    if pair.rejected != pair.chosen:
        row["rejected_response"] = _answer(pair.rejected)
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    return row


def _llava(pair: PreferencePair, names: Names) -> Row:
    _refuse_what_llava_lacks(pair, "llava")
    row = {
        "id": pair.id,
        "conversations": _llava_turns([*pair.prompt, _only_turn(pair.chosen)], own_line=True),
        "rejected": _answer(pair.rejected),
    }
    return {**row, "image": names(pair.images)[0]} if pair.images else row


def _povid(pair: PreferencePair, names: Names) -> Row:
    _refuse_what_llava_lacks(pair, "povid")
    prompt = _llava_turns(pair.prompt, own_line=True)
    if pair.chosen[0] == pair.rejected[0]:
        raise BadRow("povid takes what both sides begin with for the prompt, and these completions begin alike")
    row = {
        "id": pair.id,
        "conversations": prompt + _llava_turns(pair.chosen),
        "rejected_conversations": prompt + _llava_turns(pair.rejected),
    }
    return {**row, "image": names(pair.images)[0]} if pair.images else row


def _refuse_what_llava_lacks(pair: PreferencePair, name: str) -> None:
    """Raise BadRow for several images or a system turn, which LLaVA's own trainer does not know."""
    _refuse_rejected_images(pair, name)
    if len(pair.images) > 1:
        raise BadRow(f"{name} rows show one image; this pair has {len(pair.images)}")
    _refuse_system_turn(pair, name)


def _rlaif_v(pair: PreferencePair, names: Names) -> Row:
    """Write a row for RLAIF-V, which puts the image before the question and a JSON object into ``origin_split``."""
    _refuse_rejected_images(pair, "rlaif-v")
    if len(pair.images) != 1:
        raise BadRow(f"rlaif-v rows show one image; this pair has {len(pair.images)}")
    _refuse_system_turn(pair, "rlaif-v")
    if len(pair.prompt) > 1:
        raise BadRow(f"rlaif-v rows hold one question; this pair's prompt has {len(pair.prompt)} turns")
    first, *question = pair.prompt[0]["content"]
    if first["type"] != "image":
        raise BadRow("rlaif-v rows show their image before the question; this pair's stands within or after it")
    texts = {
        "question": _text(question),
        "chosen": _answer(pair.chosen),
        "rejected": _answer(pair.rejected),
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


def keep_origin(row: Row, raw: Row) -> set[str]:
    """Copy what ``raw``, the row a pair was read from, says of its origin into its rlaif-v ``row``.

    Returns:
        Those of :data:`ORIGIN_KEYS` that are lost because their values do not fit RLAIF-V's columns.
    """
    said = {key: raw[key] for key in ORIGIN_KEYS if raw.get(key) is not None}
    kept = {key: value for key, value in said.items() if _fits_column_of(row[key], value)}
    before, ours = origin_of(raw), json.loads(row["origin_split"])
    if before is None:
        kept.pop("origin_split", None)
    if "id" not in (before or {}) and ours["id"] == str(kept.get("idx")):
        del ours["id"]
    row.update({**kept, "origin_split": json.dumps({**(before or {}), **ours})})
    return said.keys() - kept.keys()


def _fits_column_of(ours: Any, value: Any) -> bool:
    """Return whether a value can stand in the column of one of ours: UTF-8 text, or an int64."""
    if type(value) is not type(ours):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return encodable(value)


def _refuse_rejected_images(pair: PreferencePair, name: str) -> None:
    if pair.rejected_images is not None:
        raise BadRow(f"{name} rows have no place for 'rejected_images'")


def _refuse_other_media(pair: PreferencePair, name: str) -> None:
    for message in (*pair.prompt, *pair.chosen, *pair.rejected):
        for part in message["content"]:
            if found := next((media for media in OTHER_MEDIA if media in part.get("text", "")), None):
                raise BadRow(f"'{found}' stands in a text, where {name} would look for such a file")


def _refuse_system_turn(pair: PreferencePair, name: str) -> None:
    if pair.prompt[0]["role"] == "system":
        raise BadRow(f"{name} rows have no system turn")


def _only_turn(completion: tuple[Message, ...]) -> Message:
    if len(completion) > 1:
        raise BadRow("a completion of several turns does not fit this format; vapr, trl and povid can hold it")
    return completion[0]


def _answer(completion: tuple[Message, ...]) -> str:
    return _text(_only_turn(completion)["content"])


def _llava_turns(messages: Sequence[Message], *, own_line: bool = False) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [
        {"from": names[message["role"]], "value": _text(message["content"], own_line=own_line)} for message in messages
    ]


def _text(parts: Sequence[dict[str, str]], *, own_line: bool = False) -> str:
    """Join the texts of parts, with ``<image>`` for every image.

    Reading it again takes one line break beside a placeholder away, so one is added where the text has its own; with
    ``own_line``, LLaVA's custom, everywhere.
    """
    texts = (None if part["type"] == "image" else part["text"] for part in parts)
    text = ""
    for is_image, run in itertools.groupby((text for text in texts if text != ""), key=lambda text: text is None):
        piece = "".join(PLACEHOLDER if text is None else text for text in run)
        if not is_image and PLACEHOLDER in piece:
            raise BadRow(f"'{PLACEHOLDER}' stands in a text, where this format would take it for an image")
        touching = text[-1:] if is_image else piece[0]
        if text and (own_line or touching == "\n"):
            text += "\n"
        text += piece
    return text


WRITERS = {
    "vapr": Writer(_vapr, (".jsonl", ".json", ".parquet")),
    "trl": Writer(_trl, (".jsonl", ".json", ".parquet")),
    "llava": Writer(_llava, (".json", ".jsonl")),
    "llama-factory": Writer(_llama_factory, (".json", ".jsonl")),
    "llama-factory-v1": Writer(_llama_factory_v1, (".jsonl", ".json")),
    "ms-swift": Writer(_ms_swift, (".jsonl", ".json")),
    "povid": Writer(_povid, (".json",)),
    "rlaif-v": Writer(_rlaif_v, (".parquet", ".jsonl")),
}
WRITER_NAMES = tuple(WRITERS)
