"""LLaMA-Factory's newer preference rows, which hold two whole conversations, read and written.

``{"chosen_messages": [...], "rejected_messages": [...]}``, where a message is ``{"role", "content": [parts],
"loss_weight"}`` and a part ``{"type": "text", "value": text}`` or ``{"type": "image_url", "value": image}``.
"""

from collections.abc import Sequence
from typing import Any

from vapr.errors import BadRow

Row = dict[str, Any]
SIDES = ("chosen_messages", "rejected_messages")


def pair_of_messages(row: Row) -> Row:
    """A row of vapr's own shape whose prompt is what both conversations begin with.

    Raises:
        BadRow: for a message or a part that vapr has no counterpart of.
    """
    if missing := [key for key in SIDES if key not in row]:
        raise BadRow(f"'{missing[0]}' is missing; this row has {', '.join(row)}")
    if named := next((key for key in ("images", "image") if row.get(key)), None):
        raise BadRow(
            f"'{named}' holds images, but these messages name theirs in parts {{'type': 'image_url', 'value'}}"
        )
    (chosen, images), (rejected, other_images) = (_conversation(row[key], key) for key in SIDES)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for key in SIDES:
        _check_weights(row[key][shared:], key)
    shaped: Row = {"id": row.get("id"), "images": images, "chosen": chosen, "rejected": rejected}
    if other_images != images:
        shaped["rejected_images"] = other_images
        if chosen == rejected:  # nothing but the images tells the sides apart, so every message but the last is prompt
            shaped |= {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return shaped


def _conversation(messages: Any, key: str) -> tuple[list[Row], list[Any]]:
    """The messages with parts as vapr has them, and the images that they show."""
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


def _check_weights(messages: Sequence[Row], key: str) -> None:
    """vapr has no weight of a turn: it scores all of an answer, and nothing of what the user says."""
    for message in messages:
        if message["role"] == "assistant" and message.get("loss_weight", 1) != 1:
            raise BadRow(
                f"'{key}' gives an answer the loss_weight {message['loss_weight']!r:.40}; vapr scores answers whole"
            )


def messages_of_side(prompt: Sequence[Row], answer: Row, images: Sequence[Any]) -> list[Row]:
    """A whole conversation: ``prompt``, which shows ``images``, and the answer, which alone is scored."""
    names = iter(images)
    return [
        *({"role": m["role"], "content": _parts(m, names), "loss_weight": 0.0} for m in prompt),
        {"role": answer["role"], "content": _parts(answer, names), "loss_weight": 1.0},
    ]


def _parts(message: Row, names: Any) -> list[Row]:
    return [
        {"type": "text", "value": part["text"]}
        if part["type"] == "text"
        else {"type": "image_url", "value": next(names)}
        for part in message["content"]
    ]
