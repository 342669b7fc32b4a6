"""The shapes preference rows come in, and what makes vapr's own row of each.

A format is a function from a row to a row with ``id, images, prompt, chosen, rejected`` (and ``rejected_images``,
``weight``, ``category``, ``edits`` where it has them), which :func:`vapr.data.pair.pair_from_row` checks.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from vapr.data.llama_factory import pair_of_messages
from vapr.data.row_values import json_object, refuse_instruction_data, refuse_near_misses, without_nulls
from vapr.errors import BadRow, NoPair
from vapr.format_names import MAPPED_KEYS

Row = dict[str, Any]

LIKE_IMAGES = (
    "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_id", "img", "imgs",
    "img_path", "picture", "pictures", "pixel_values",
)  # fmt: skip
"""Keys that no one means to train without."""

PLACEHOLDER = "<image>"


def detect(row: Any) -> str:
    """The name of a row's format, by its keys; ``vapr`` where none fits, whose check then says what is missing."""
    if not isinstance(row, dict):
        return "vapr"
    keys = {key for key, value in row.items() if value is not None}
    if "conversations" in keys:
        if "rejected_conversations" in keys:
            return "povid"
        return "llama-factory" if isinstance(row.get("rejected"), dict) else "llava"
    if "messages" in keys and keys & {"rejected_response", "rejected_messages", "rejected_images"}:
        return "ms-swift"
    if {"chosen_messages", "rejected_messages"} <= keys:
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


def as_vapr(row: Any, name: str) -> Any:
    """A row of format ``name`` as a row of vapr's own shape, not yet checked.

    Raises:
        BadRow: if keys of the format are missing or of the wrong type; NoPair if the row is sound but prefers nothing.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, got {row!r:.60}")
    row = without_nulls(row)
    if name in ("vapr", "llava"):
        refuse_instruction_data(row)
    for media in ("video", "videos", "audio", "audios"):
        if row.get(media):
            raise BadRow(f"'{media}' rows are not supported")
    return _READERS[name](row)


def map_columns(row: Any, columns: Mapping[str, str]) -> Row:
    """The row, and the keys of ``columns`` with what is found under its values.

    ``a.b.0`` goes down into objects, lists, and texts that hold them as JSON. What a row does not have is left out, as
    rows without images have none.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, got {row!r:.60}")
    mapped: Row = {}
    for key, column in columns.items():
        value: Any = row
        for part in [column] if column in row else column.split("."):
            try:
                value = json.loads(value) if isinstance(value, str) else value
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError, RecursionError):
                break
        else:
            mapped[key] = value
    return {**{key: value for key, value in row.items() if key not in columns}, **mapped}


_CONVERSATION_KEYS = frozenset({"conversations", "rejected_conversations", "system", "chosen", "rejected"})
_QUESTION_KEYS = frozenset({"prompt", "question", "chosen", "rejected"})
_KEYS_READ: dict[str, frozenset[str]] = {
    **dict.fromkeys(("vapr", "trl", "columns"), frozenset(MAPPED_KEYS)),
    **dict.fromkeys(("llava", "povid", "llama-factory"), _CONVERSATION_KEYS),
    **dict.fromkeys(("rlaif-v", "mmpr"), _QUESTION_KEYS | {"idx"}),
    "mm-rlhf": _QUESTION_KEYS,
    **dict.fromkeys(("ha-dpo", "seva"), frozenset({"image_id", "question", "chosen", "reject", "correct"})),
    "ms-swift": frozenset({"messages", "rejected_messages", "rejected_response", "rejected_images"}),
    "vlfeedback": frozenset({"prompt", "completions", "img_path"}),
    "rlhf-v": frozenset({"text", "image_path", "idx"}),
    "llama-factory-v1": frozenset({"chosen_messages", "rejected_messages"}),
}


def keys_read(name: str, columns: Mapping[str, str] | None) -> frozenset[str]:
    """Keys of a file's rows of format ``name`` whose values become part of a pair; ``columns`` rename some."""
    keys = _KEYS_READ[name] | {"id", "images", "image"}
    if not columns:
        return keys
    places = [place for column in columns.values() for place in (column, column.split(".")[0])]
    return (keys - columns.keys()) | frozenset(places)


def _need(row: Row, *keys: str) -> None:
    refuse_near_misses(row, keys)
    if missing := [key for key in keys if key not in row]:
        verb = "is" if len(missing) == 1 else "are"
        raise BadRow(f"{' and '.join(repr(key) for key in missing)} {verb} missing; this row has {', '.join(row)}")


def images_of(row: Row, *keys: str) -> Any:
    """The row's images, under ``images``, ``image`` or other keys.

    Raises:
        BadRow: if two of them hold images: it is not for us to choose.
    """
    given = [key for key in dict.fromkeys(("images", "image", *keys)) if row.get(key) not in (None, [], "")]
    values = [row[key] if isinstance(row[key], list) else [row[key]] for key in given]
    if any(value != values[0] for value in values):
        raise BadRow(f"both '{given[0]}' and '{given[1]}' hold images; leave one out")
    return row[given[0]] if given else None


def _plain(row: Row) -> Row:
    """vapr's and TRL's rows."""
    images = images_of(row)
    for key in LIKE_IMAGES:
        if not images and row.get(key):
            raise BadRow(f"'{key}' looks like an image, but this format has 'images'; map it with data.columns")
    return {**{key: value for key, value in row.items() if key != "image"}, "images": images}


def _columns(row: Row) -> Row:
    """Mapped columns come from anywhere: prompts may hold placeholders, and other columns mean nothing."""
    known = {key: value for key, value in row.items() if key in MAPPED_KEYS}
    return {**known, "images": images_of(row), "prompt": with_image_parts(row.get("prompt"), "prompt")}


def _conversations(row: Row) -> Row:
    """LLaVA's turns ``{"from", "value"}``, with the rejected answer in one of three places."""
    _need(row, "conversations")
    shaped = {"id": row.get("id"), "images": images_of(row)}
    turns = with_image_parts(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"'conversations' must be a list of turns, got {row['conversations']!r:.60}")
    if isinstance(row.get("system"), str) and row["system"]:
        turns = [{"role": "system", "content": row["system"]}, *turns]
    if "rejected_conversations" in row:
        other = with_image_parts(row["rejected_conversations"], "rejected_conversations")
        if isinstance(row.get("system"), str) and row["system"] and isinstance(other, list):
            other = [{"role": "system", "content": row["system"]}, *other]
        return {**shaped, "chosen": turns, "rejected": other}
    _need(row, "rejected")
    if "chosen" in row:
        return {**shaped, "prompt": turns, "chosen": row["chosen"], "rejected": row["rejected"]}
    return {**shaped, "prompt": turns[:-1], "chosen": turns[-1:], "rejected": row["rejected"]}


def _ms_swift(row: Row) -> Row:
    """The chosen answer ends ``messages``; the other side is a response, messages or other images, or several."""
    _need(row, "messages")
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


def _ha_dpo(row: Row) -> Row:
    if str(row.get("correct")).lower() == "true":
        raise NoPair("marked correct")
    return _seva(row)


def _seva(row: Row) -> Row:
    _need(row, "image_id", "question", "chosen", "reject")
    name = str(row["image_id"])
    prefixes = ("COCO_train2014_", "COCO_val2014_", "") if name.isdecimal() and len(name) <= 12 else ()
    numbered = [f"{prefix}{int(name):012d}.jpg" for prefix in prefixes]
    guesses = [name, f"{name}.jpg", f"{name}.png", f"VG_100K/{name}.jpg", f"VG_100K_2/{name}.jpg", *numbered]
    return {
        "id": row.get("id"),
        "images": images_of(row) or [OneOf(guesses)],
        "prompt": with_image_parts(row["question"], "question"),
        "chosen": row["chosen"],
        "rejected": row["reject"],
    }


def _question(row: Row) -> Row:
    """RLAIF-V and MMPR: a question with its image."""
    _need(row, "question", "chosen", "rejected")
    origin = origin_of(row) or {}
    category = origin.get("category")
    return {
        "id": row.get("id", origin.get("id", row.get("idx"))),
        "images": images_of(row),
        "prompt": with_image_parts(row["question"], "question"),
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "category": category if isinstance(category, str) else None,
    }


def origin_of(row: Row) -> Row | None:
    """What RLAIF-V's ``origin_split`` says, a JSON object in a text; None where there is none.

    vapr keeps a pair's id and category there, for which RLAIF-V's rows have no other place.
    """
    return json_object(row.get("origin_split")) or None


PAIR_IN_TEXT = frozenset({"question", "chosen", "rejected"})
"""Keys of the JSON object in the ``text`` of RLHF-V's rows."""


def _rlhf_v(row: Row) -> Row:
    """RLHF-V: an image, and a text that is a JSON object of the pair."""
    _need(row, "text")
    pair = json_object(row["text"])
    if not pair:
        raise BadRow(f"'text' must be a JSON object with question, chosen and rejected, got {row['text']!r:.60}")
    if missing := sorted(PAIR_IN_TEXT - pair.keys()):
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(f"'{key}'" for key in missing)
        raise BadRow(f"{names} {verb} missing from 'text'; it has {', '.join(pair)}")
    image = images_of(row) or row.get("image_path")
    return _question({**row, "image": image, **{key: pair[key] for key in PAIR_IN_TEXT}})


class OneOf(tuple[str, ...]):
    """Names under which an image may lie: data sets that give an id leave open how its file is called."""


def _mm_rlhf(row: Row) -> Row:
    _need(row, "prompt", "chosen", "rejected")
    return {
        "id": row.get("id"),
        "images": images_of(row),
        "prompt": with_image_parts(row["prompt"], "prompt"),
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    }


def _vlfeedback(row: Row) -> Row:
    """The best- and the worst-rated completion, by the mean of the aspects that have a rating."""
    _need(row, "prompt", "completions")
    completions = row["completions"]
    if isinstance(completions, dict) and all(isinstance(values, list) for values in completions.values()):
        # a list of structs, as older versions of the datasets library store it
        completions = [
            dict(zip(completions, values, strict=False)) for values in zip(*completions.values(), strict=False)
        ]
    if not isinstance(completions, list):
        raise BadRow(f"'completions' must be a list, got {completions!r:.60}")
    rated = []
    for completion in completions:
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise BadRow(f"'completions' holds one without a response: {completion!r:.60}")
        rating = _mean_rating(completion.get("annotations"))
        if not math.isnan(rating) and completion["response"].strip():
            rated.append((rating, completion["response"]))
    if len({rating for rating, _ in rated}) < 2:
        raise NoPair("fewer than two completions with different ratings")
    best, worst = max(rated, key=lambda entry: entry[0])[1], min(rated, key=lambda entry: entry[0])[1]
    if best == worst:
        raise NoPair("the best and the worst completion are the same text")
    return {
        "id": row.get("id"),
        "images": images_of(row) or row.get("img_path"),
        "prompt": with_image_parts(row["prompt"], "prompt"),
        "chosen": best,
        "rejected": worst,
    }


def _mean_rating(annotations: Any) -> float:
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        try:
            ratings.append(float(aspect["Rating"]))
        except (TypeError, KeyError, ValueError, OverflowError):  # "N/A"
            continue
    return sum(ratings) / len(ratings) if ratings else math.nan


def with_image_parts(value: Any, key: str) -> Any:
    """Text, or turns of text, with every ``<image>`` turned into an image part.

    One line break next to a placeholder belongs to it: chat templates write their own.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": _split(value)}] if PLACEHOLDER in value else value
    if not isinstance(value, list):
        return value
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow(f"'{key}' holds a turn that is no object: {turn!r:.60}")
        role, text = ("from", "value") if "from" in turn else ("role", "content")
        content = turn.get(text)
        if isinstance(content, str) and PLACEHOLDER in content:
            content = _split(content)
        turns.append({"role": turn.get(role), "content": content})
    return turns


def _split(text: str) -> list[dict[str, str]]:
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


_READERS: dict[str, Callable[[Row], Row]] = {
    "vapr": _plain,
    "trl": _plain,
    "columns": _columns,
    "llava": _conversations,
    "povid": _conversations,
    "llama-factory": _conversations,
    "ms-swift": _ms_swift,
    "ha-dpo": _ha_dpo,
    "seva": _seva,
    "llama-factory-v1": pair_of_messages,
    "rlaif-v": _question,
    "rlhf-v": _rlhf_v,
    "mmpr": _question,
    "mm-rlhf": _mm_rlhf,
    "vlfeedback": _vlfeedback,
}
