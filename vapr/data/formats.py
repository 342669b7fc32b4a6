"""Turn rows of other projects' shapes into rows of vapr's own.

A format is a function from a row to a row with ``id, images, prompt, chosen, rejected`` (and ``rejected_images``,
``weight``, ``category``, ``edits`` where it has them), which :func:`vapr.data.pair.pair_from_row` checks. To add one,
write that function, list it in :data:`FORMATS`, tell it apart in :func:`detect`, and name it in
:mod:`vapr.format_names`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vapr.data.row_values import (
    OneOf,
    Row,
    are_missing,
    images_of,
    json_object,
    num_shared,
    refuse_instruction_data,
    require_keys,
    require_object,
    with_image_parts,
    without_nulls,
)
from vapr.errors import BadRow, NoPair
from vapr.format_names import MAPPED_KEYS

LIKE_IMAGES = (
    "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_id", "img", "imgs",
    "img_path", "picture", "pictures", "pixel_values",
)  # fmt: skip
"""Keys that no one means to train without."""

PAIR_IN_TEXT = frozenset({"question", "chosen", "rejected"})
"""Keys of the JSON object in the ``text`` of RLHF-V's rows."""

SIDES = ("chosen_messages", "rejected_messages")
"""Keys of LLaMA-Factory's newer rows, which hold two whole conversations."""


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows and the function that reads it."""

    read: Callable[[Row], Row]
    keys: frozenset[str]
    """Keys whose values become part of a pair, besides ``id``, ``images`` and ``image``."""


def detect(row: Any) -> str:
    """Return the name of a row's format, told by its keys; ``vapr`` if none fits: its check says what is missing."""
    if not isinstance(row, dict):
        return "vapr"
    keys = {key for key, value in row.items() if value is not None}
    if "conversations" in keys:
        if "rejected_conversations" in keys:
            return "povid"
        return "llama-factory" if isinstance(row.get("rejected"), dict) else "llava"
    if "messages" in keys and keys & {"rejected_response", "rejected_messages", "rejected_images"}:
        return "ms-swift"
    if keys.issuperset(SIDES):
        return "llama-factory-v1"
    if "text" in keys and not keys & {"chosen", "rejected"} and json_object(row["text"]).keys() >= PAIR_IN_TEXT:
        return "rlhf-v"
    if {"prompt", "completions"} <= keys:
        return "vlfeedback"
    if {"image_id", "question", "chosen", "reject"} <= keys:
        return "ha-dpo" if keys & {"correct", "answer"} else "seva"
    if {"question", "chosen", "rejected"} <= keys:
        return "rlaif-v" if keys & {"ds_name", "origin_dataset"} or isinstance(row.get("image"), dict) else "mmpr"
    texts = all(isinstance(row.get(key), str) for key in ("prompt", "chosen", "rejected"))
    if texts and keys & {"image", "video"} and "images" not in keys:
        return "mm-rlhf"
    if {"chosen", "rejected"} <= keys and ("image" in keys or not keys & {"id", "category", "edits", "provenance"}):
        return "trl"
    return "vapr"


def as_vapr(row: Any, name: str) -> Row:
    """Turn a row of format ``name`` into one of vapr's own shape, not yet checked.

    Raises:
        BadRow: if keys of the format are missing or of the wrong type; NoPair if the row is sound but prefers nothing.
    """
    require_object(row)
    row = without_nulls(row)
    if name in ("vapr", "llava"):
        refuse_instruction_data(row)
    for media in ("video", "videos", "audio", "audios"):
        if row.get(media):
            raise BadRow(f"'{media}' rows are not supported")
    return FORMATS[name].read(row)


def keys_read(name: str, columns: Mapping[str, str] | None) -> frozenset[str]:
    """Return the keys of a file's rows whose values become part of a pair; ``columns`` rename some."""
    keys = FORMATS[name].keys | {"id", "images", "image"}
    if not columns:
        return keys
    places = [place for column in columns.values() for place in (column, column.split(".")[0])]
    return (keys - columns.keys()) | frozenset(places)


def _plain(row: Row) -> Row:
    """Read a row of vapr or TRL."""
    images = images_of(row)
    for key in LIKE_IMAGES:
        if not images and row.get(key):
            raise BadRow(f"'{key}' looks like an image, but this format has 'images'; map it with data.columns")
    return {**{key: value for key, value in row.items() if key != "image"}, "images": images}


def _columns(row: Row) -> Row:
    """Read mapped columns. They come from anywhere: prompts may hold placeholders, and other columns mean nothing."""
    known = {key: value for key, value in row.items() if key in MAPPED_KEYS}
    return {**known, "images": images_of(row), "prompt": with_image_parts(row.get("prompt"), "prompt")}


def _conversations(row: Row) -> Row:
    """Read LLaVA's turns ``{"from", "value"}``, with the rejected answer in one of three places."""
    require_keys(row, "conversations")
    shaped = {"id": row.get("id"), "images": images_of(row)}
    turns = with_image_parts(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"'conversations' must be a list of turns, got {row['conversations']!r:.60}")
    text = row.get("system")
    system = [{"role": "system", "content": text}] if isinstance(text, str) and text else []
    turns = [*system, *turns]
    if "rejected_conversations" in row:
        other = with_image_parts(row["rejected_conversations"], "rejected_conversations")
        return {**shaped, "chosen": turns, "rejected": [*system, *other] if isinstance(other, list) else other}
    require_keys(row, "rejected")
    if "chosen" in row:
        return {**shaped, "prompt": turns, "chosen": row["chosen"], "rejected": row["rejected"]}
    return {**shaped, "prompt": turns[:-1], "chosen": turns[-1:], "rejected": row["rejected"]}


def _ms_swift(row: Row) -> Row:
    """Read ms-swift: ``messages`` end with the chosen answer; the other side is a response, messages or images."""
    require_keys(row, "messages")
    messages = with_image_parts(row["messages"], "messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRow("'messages' must be a list that ends with the chosen answer")
    shaped = {"id": row.get("id"), "images": images_of(row), "rejected_images": row.get("rejected_images")}
    if "rejected_messages" in row:
        other = with_image_parts(row["rejected_messages"], "rejected_messages")
        return {**shaped, "chosen": messages, "rejected": other}
    rejected = row.get("rejected_response")
    if rejected is None:
        if "rejected_images" not in row:
            raise BadRow("'rejected_response' is missing (or rejected_messages, or rejected_images)")
        rejected = messages[-1:]
    return {**shaped, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}


def _question(row: Row, asked: str = "question", rejected: str = "rejected") -> Row:
    """Read a question with a better and a worse answer, given the names of two of its keys."""
    require_keys(row, asked, "chosen", rejected)
    return {
        "id": row.get("id"),
        "images": images_of(row),
        "prompt": with_image_parts(row[asked], asked),
        "chosen": row["chosen"],
        "rejected": row[rejected],
    }


def _mm_rlhf(row: Row) -> Row:
    return _question(row, asked="prompt")


def _seva(row: Row) -> Row:
    """Read SeVa, whose ``image_id`` may be a path or the number of a picture of COCO or Visual Genome."""
    require_keys(row, "image_id", "question", "chosen", "reject")
    name = str(row["image_id"])
    prefixes = ("COCO_train2014_", "COCO_val2014_", "") if name.isdecimal() and len(name) <= 12 else ()
    numbered = [f"{prefix}{int(name):012d}.jpg" for prefix in prefixes]
    guesses = [name, f"{name}.jpg", f"{name}.png", f"VG_100K/{name}.jpg", f"VG_100K_2/{name}.jpg", *numbered]
    shaped = _question(row, rejected="reject")
    return {**shaped, "images": shaped["images"] or [OneOf(guesses)]}


def _ha_dpo(row: Row) -> Row:
    if str(row.get("correct")).lower() == "true":
        raise NoPair("marked correct")
    return _seva(row)


def _rlaif_v(row: Row) -> Row:
    """Read RLAIF-V or MMPR, with the id and category that vapr itself keeps in ``origin_split``."""
    shaped = _question(row)
    origin = origin_of(row) or {}
    category = origin.get("category")
    shaped["id"] = row.get("id", origin.get("id", row.get("idx")))
    return {**shaped, "category": category if isinstance(category, str) else None}


def origin_of(row: Row) -> Row | None:
    """Return what RLAIF-V's ``origin_split`` says, a JSON object in a text; None if there is none.

    vapr keeps a pair's id and category there, for which RLAIF-V's rows have no other place.
    """
    return json_object(row.get("origin_split")) or None


def _rlhf_v(row: Row) -> Row:
    """Read RLHF-V: an image, and a text that is a JSON object of the pair."""
    require_keys(row, "text")
    pair = json_object(row["text"])
    if not pair:
        raise BadRow(f"'text' must be a JSON object with question, chosen and rejected, got {row['text']!r:.60}")
    if missing := sorted(PAIR_IN_TEXT - pair.keys()):
        raise BadRow(f"{are_missing(missing)} from 'text'; it has {', '.join(pair)}")
    image = images_of(row) or row.get("image_path")
    return _rlaif_v({**row, "image": image, **{key: pair[key] for key in PAIR_IN_TEXT}})


def _vlfeedback(row: Row) -> Row:
    """Read VLFeedback: take the best- and the worst-rated completion, by the mean of the aspects that have a rating."""
    require_keys(row, "prompt", "completions")
    rated = _rated_completions(row["completions"])
    if len({rating for rating, _ in rated}) < 2:
        raise NoPair("fewer than two completions with different ratings")
    best, worst = max(rated, key=lambda entry: entry[0])[1], min(rated, key=lambda entry: entry[0])[1]
    if best == worst:
        raise NoPair("the best and the worst completion are the same text")
    shaped = _question({**row, "chosen": best, "rejected": worst}, asked="prompt")
    return {**shaped, "images": shaped["images"] or row.get("img_path")}


def _rated_completions(completions: Any) -> list[tuple[float, str]]:
    """Return rating and text of the completions that have both."""
    if isinstance(completions, dict) and all(isinstance(values, list) for values in completions.values()):
        # a list of structs, as older versions of the datasets library store it
        columns = zip(*completions.values(), strict=False)
        completions = [dict(zip(completions, values, strict=False)) for values in columns]
    if not isinstance(completions, list):
        raise BadRow(f"'completions' must be a list, got {completions!r:.60}")
    rated = []
    for completion in completions:
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise BadRow(f"'completions' holds one without a response: {completion!r:.60}")
        rating = _mean_rating(completion.get("annotations"))
        if not math.isnan(rating) and completion["response"].strip():
            rated.append((rating, completion["response"]))
    return rated


def _mean_rating(annotations: Any) -> float:
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        try:
            ratings.append(float(aspect["Rating"]))
        except (TypeError, KeyError, ValueError, OverflowError):  # "N/A"
            continue
    return sum(ratings) / len(ratings) if ratings else math.nan


def _llama_factory_v1(row: Row) -> Row:
    """Read LLaMA-Factory's two whole conversations; what both begin with is the prompt.

    A message is ``{"role", "content": [parts], "loss_weight"}`` and a part ``{"type": "text", "value": text}`` or
    ``{"type": "image_url", "value": image}``.
    """
    require_keys(row, *SIDES)
    if named := next((key for key in ("images", "image") if row.get(key)), None):
        raise BadRow(
            f"'{named}' holds images, but these messages name theirs in parts {{'type': 'image_url', 'value'}}"
        )
    (chosen, images), (rejected, other_images) = (_messages_and_images(row[key], key) for key in SIDES)
    shared = num_shared(chosen, rejected)
    for key in SIDES:  # vapr scores all of an answer, and nothing of what the user says
        for message in row[key][shared:]:
            if message["role"] == "assistant" and message.get("loss_weight", 1) != 1:
                weight = message["loss_weight"]
                raise BadRow(f"'{key}' gives an answer the loss_weight {weight!r:.40}; vapr scores answers whole")
    shaped: Row = {"id": row.get("id"), "images": images, "chosen": chosen, "rejected": rejected}
    if other_images != images:
        shaped["rejected_images"] = other_images
        if chosen == rejected:  # nothing but the images tells the sides apart, so every message but the last is prompt
            shaped |= {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return shaped


def _messages_and_images(messages: Any, key: str) -> tuple[list[Row], list[Any]]:
    """Return the messages with parts as vapr has them, and the images that they show."""
    if not isinstance(messages, list):
        raise BadRow(f"'{key}' must be a list of messages, got {messages!r:.60}")
    images: list[Any] = []
    converted = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str | list):
            raise BadRow(f"'{key}' holds a message without role and content: {message!r:.60}")
        content = message["content"]
        if isinstance(content, list):
            content = [_part(part, key, images) for part in content]
        converted.append({"role": message["role"], "content": content})
    return converted, images


def _part(part: Any, key: str, images: list[Any]) -> Row:
    """Convert a part of a message; append its image to ``images`` if it shows one."""
    if not isinstance(part, dict):
        raise BadRow(f"'{key}' holds a part that is no object: {part!r:.60}")
    kind = part.get("type")
    if kind not in ("text", "image_url"):
        raise BadRow(f"'{key}' holds a part of type {kind!r:.40}; vapr knows text and image_url")
    if "value" not in part:
        raise BadRow(f"'{key}' holds a part of type '{kind}' without a value")
    if kind == "text":
        return {"type": "text", "text": part["value"]}
    images.append(part["value"])
    return {"type": "image"}


_MAPPED = Format(_columns, frozenset(MAPPED_KEYS))
_LLAVA = Format(_conversations, frozenset({"conversations", "rejected_conversations", "system", "chosen", "rejected"}))
_ASKED = frozenset({"prompt", "question", "chosen", "rejected"})
_BY_IMAGE_ID = frozenset({"image_id", "question", "chosen", "reject", "correct"})

FORMATS = {
    "vapr": Format(_plain, _MAPPED.keys),
    "trl": Format(_plain, _MAPPED.keys),
    "columns": _MAPPED,
    "llava": _LLAVA,
    "povid": _LLAVA,
    "llama-factory": _LLAVA,
    "llama-factory-v1": Format(_llama_factory_v1, frozenset(SIDES)),
    "ms-swift": Format(_ms_swift, frozenset({"messages", "rejected_messages", "rejected_response", "rejected_images"})),
    "ha-dpo": Format(_ha_dpo, _BY_IMAGE_ID),
    "seva": Format(_seva, _BY_IMAGE_ID),
    "rlaif-v": Format(_rlaif_v, _ASKED | {"idx"}),
    "mmpr": Format(_rlaif_v, _ASKED | {"idx"}),
    "rlhf-v": Format(_rlhf_v, frozenset({"text", "image_path", "idx"})),
    "mm-rlhf": Format(_mm_rlhf, _ASKED),
    "vlfeedback": Format(_vlfeedback, frozenset({"prompt", "completions", "img_path"})),
}
"""Every format by its name; ``columns`` is what ``data.columns`` makes of a row."""
