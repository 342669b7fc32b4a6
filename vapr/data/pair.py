"""PreferencePair, and the checks that make one from a row of vapr's own shape."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.data.remote import display_name, is_remote, is_url, join, local_place
from vapr.data.row_values import PLACEHOLDER, OneOf, are_missing, image_list, num_shared, refuse_near_misses
from vapr.errors import BadRow

Message = dict[str, Any]
"""``{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, ...]}``"""


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters ``start:end`` of the chosen text, which the rejected text replaces with ``to``."""

    start: int
    end: int
    to: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a chosen and a rejected completion. Images stay undecoded: paths or encoded bytes."""

    id: str
    images: tuple[Path | bytes, ...]  # in the order of the prompt's image parts
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    weight: float = 1.0
    edits: tuple[Edit, ...] = ()
    category: str | None = None
    rejected_images: tuple[Path | bytes, ...] | None = None  # where the rejected completion is about other images
    beta: float | None = None  # in place of the loss's
    margin: float = 0.0  # how clearly chosen is better; ``loss.margin_weight`` says what it does
    where: str = field(default="", compare=False)  # "pairs.jsonl:17", for error messages
    number: int = field(default=-1, compare=False)  # the row's number in the data read


KNOWN_KEYS = frozenset({
    "id", "images", "image", "rejected_images", "prompt", "chosen", "rejected", "weight", "edits", "category",
    "provenance", "beta", "margin",
})  # fmt: skip
"""Other keys may be there and mean nothing to training."""


def pair_from_row(
    row: dict[str, Any], *, root: Path, confined: bool, where: str, number: int = -1, images_needed: bool = True
) -> PreferencePair:
    """Check a row of vapr's own shape and make a pair of it.

    Args:
        row: ``id, images, prompt, chosen, rejected`` and the optional keys; texts, one message or lists of messages.
        root: folder that relative image paths start at.
        confined: whether every image must lie inside ``root``.
        where: the row's place in its file, for messages.
        number: the row's number in the data.
        images_needed: whether an image whose file is missing makes the row a bad one.

    Raises:
        BadRow: saying what is wrong.
    """
    row = {key: value for key, value in row.items() if value is not None}  # null means absent, as in parquet
    prompt, chosen, rejected = _conversation(row)
    images = image_list(row.get("images"))
    other_images = image_list(row["rejected_images"]) if "rejected_images" in row else None
    if other_images is not None and len(other_images) != len(images):
        raise BadRow(f"'rejected_images' has {len(other_images)} image(s) but 'images' has {len(images)}")
    check_roles(prompt)
    _check_completions(chosen, rejected, same_images=other_images in (None, images))
    prompt = place_images(prompt, len(images))

    def sources(images: list[Any]) -> tuple[Path | bytes, ...]:
        return tuple(image_source(image, root, confined, images_needed, urls=True) for image in images)

    return PreferencePair(
        id=row_id(row, where),
        images=sources(images),
        prompt=tuple(prompt),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        rejected_images=None if other_images is None else sources(other_images),
        weight=_number("weight", row.get("weight", 1.0)),
        beta=_beta(row.get("beta")),
        margin=_number("margin", row.get("margin", 0.0)),
        edits=_edits(row.get("edits"), chosen),
        category=_category(row.get("category")),
        where=where,
        number=number,
    )


def _conversation(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return prompt, chosen and rejected as messages; their order is not yet checked."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    # TRL's implicit prompt: chosen and rejected are whole conversations that begin alike.
    implicit = "prompt" not in row and not missing and all(isinstance(row[k], list) for k in ("chosen", "rejected"))
    if "prompt" not in row and not implicit:
        missing.insert(0, "prompt")
    others = {key: value for key, value in row.items() if key not in KNOWN_KEYS}
    refuse_near_misses(others, missing)
    if not image_list(row.get("images")) and "image" not in row:  # else no image would be missed
        pictures = {key: value for key, value in others.items() if value and isinstance(value, str | list | dict)}
        refuse_near_misses(pictures, ("images", "image"))
    if missing:
        raise BadRow(
            f"{are_missing(missing)}; a pair needs prompt, chosen and rejected (this row has "
            f"{', '.join(row) or 'nothing'}; data.columns can map other names)"
        )
    chosen = messages_from(row["chosen"], "chosen", "assistant")
    rejected = messages_from(row["rejected"], "rejected", "assistant")
    if not implicit:
        return messages_from(row["prompt"], "prompt", "user"), chosen, rejected
    shared = num_shared(chosen, rejected)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if shared == 0:
        raise BadRow("'prompt' is missing, and chosen and rejected do not begin with the same messages")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def whole_text(value: str, key: str) -> str:
    """Return the text. Raise BadRow, naming ``key``, if it cannot be written as UTF-8."""
    if not encodable(value):
        raise BadRow(f"'{key}' holds half a character (a lone surrogate, from a cut emoji)")
    return value


def encodable(text: str) -> bool:
    """Return whether the text can be written as UTF-8: it holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _category(category: Any) -> str | None:
    if category is not None and not isinstance(category, str):
        raise BadRow(f"'category' must be text, got {category!r:.60}")
    return None if category is None else whole_text(category, "category")


def row_id(row: dict[str, Any], where: str) -> str:
    """Return a row's ``id`` as text, or its place if it has none. Raise BadRow if it cannot be an id."""
    given = where.rsplit("/", 1)[-1] if row.get("id") is None else row["id"]
    if not isinstance(given, str | int):
        raise BadRow(f"'id' must be text, got {given!r}")
    try:
        text = str(given)
    except ValueError:
        raise BadRow("'id' is a number of thousands of digits") from None
    return whole_text(text, "id")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise BadRow(f"'{key}' must be a number of at least 0, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise BadRow(f"'{key}' is too large") from None


def _beta(beta: Any) -> float | None:
    if beta is not None and _number("beta", beta) == 0:
        raise BadRow("'beta' must be above 0, got 0")
    return None if beta is None else float(beta)


ROLES = {"human": "user", "gpt": "assistant"}
"""LLaVA's names."""


def messages_from(value: Any, key: str, role: str) -> list[Message]:
    """Turn plain text into one message, and contents into lists of parts, which every chat template accepts.

    Raises:
        BadRow: naming ``key``.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{key}' must be text or a list of messages, got {value!r:.60}")
    messages = []
    for message in value:
        if isinstance(message, dict) and message.get("from") is not None:
            message = {"role": message["from"], "content": message.get("value")}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise BadRow(f"'{key}' holds a message without role and content: {message!r:.60}")
        name = ROLES.get(message["role"], message["role"])
        if name not in ("system", "user", "assistant"):
            raise BadRow(f"'{key}' holds role {name!r:.40}; known roles: system, user, assistant")
        messages.append({"role": name, "content": _parts(message["content"], key)})
    return messages


def _parts(content: Any, key: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRow(f"'{key}' holds a content that is neither text nor a list of parts: {content!r:.60}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": whole_text(part["text"], key)})
        elif kind == "image":
            inline = [name for name in ("image", "url", "path", "base64") if part.get(name)]
            if inline:
                raise BadRow(f"'{key}' holds an image part with '{inline[0]}'; put images into the row's 'images' list")
            parts.append({"type": "image"})
        else:
            raise BadRow(f"'{key}' holds a part that is neither text nor image: {part!r:.60}")
    return parts


def _check_completions(chosen: list[Message], rejected: list[Message], *, same_images: bool) -> None:
    """Raise BadRow for completions whose turns are out of order, empty, with images, or (of one prompt) the same."""
    for key, completion in (("chosen", chosen), ("rejected", rejected)):
        speakers = [message["role"] for message in completion]
        if speakers != ["assistant", *["user", "assistant"] * (len(speakers) // 2)]:
            raise BadRow(
                f"'{key}' must begin with an assistant message, go on in turns and end with one, got "
                f"{', '.join(speakers) or 'nothing'}"
            )
        if any(part["type"] == "image" for message in completion for part in message["content"]):
            raise BadRow(f"'{key}' holds an image part; images belong in the prompt")
        if not any(part["text"].strip() for message in completion for part in message["content"]):
            raise BadRow(f"'{key}' is empty")
    if chosen == rejected and same_images:
        raise BadRow("chosen and rejected are the same text; there is nothing to prefer")


def check_roles(prompt: list[Message]) -> None:
    """Raise BadRow unless an optional system message, then user and assistant in turn make the prompt, user last."""
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadRow(f"'prompt' must be user and assistant in turn and end with user, got {', '.join(roles)}")


def place_images(prompt: list[Message], num_images: int) -> list[Message]:
    """Return the prompt with the images before the first user text, if no part of it places them.

    Raises:
        BadRow: if the number of image parts is not that of the images.
    """
    if num_images and any(PLACEHOLDER in part.get("text", "") for message in prompt for part in message["content"]):
        raise BadRow("'prompt' holds '<image>' as text; write an image part {\"type\": \"image\"} in its place")
    num_parts = sum(part["type"] == "image" for message in prompt for part in message["content"])
    if num_parts == 0 and num_images:
        first = [message["role"] for message in prompt].index("user")
        placed = {**prompt[first], "content": [{"type": "image"}] * num_images + prompt[first]["content"]}
        return [*prompt[:first], placed, *prompt[first + 1 :]]
    if num_parts != num_images:
        raise BadRow(f"the prompt places {num_parts} image(s) but the row has {num_images} in 'images'")
    return prompt


def image_source(image: Any, root: Path, confined: bool, needed: bool = True, *, urls: bool = False) -> Path | bytes:
    """Return an image's file, or its encoded bytes. With ``urls`` it may be a URL, fetched when it is read.

    Raises:
        BadRow: if it is neither, lies outside ``root`` where ``confined`` to it, or is ``needed`` and not there.
    """
    if isinstance(image, OneOf):
        for name in image:
            with contextlib.suppress(BadRow):
                return image_source(name, root, confined, urls=urls)
        image = image[0]  # and say that it is not there
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), bytes) and image["bytes"]:
            return image["bytes"]
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise BadRow(f"an image must be a path or {{'bytes', 'path'}}, got {image!r:.60}")
    if image.startswith("data:") or (is_url(image) and not urls):
        raise BadRow(f"image {image!r:.60} is a URL; save it to a file first, or give its bytes in parquet")
    path = local_place(image) if is_url(image) else join(root, image)
    if not encodable(str(path)):
        raise BadRow(f"image {image!r:.60}: its path is not UTF-8; rename the file or its folder")
    try:
        outside = confined and not path.resolve().is_relative_to(root.resolve())
        found = is_remote(path) or path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL: base64 or a data URL instead of a path
        raise BadRow(f"image {image!r:.60} is no path; save it to a file, or give its bytes in parquet") from None
    if outside:
        raise BadRow(f"image '{image}' lies outside data.image_root ({display_name(root)})")
    if not found and needed:
        raise BadRow(f"image '{image}' not found (looked for {path})")
    return path


def _edits(edits: Any, chosen: list[Message]) -> tuple[Edit, ...]:
    if not edits:
        return ()
    if not isinstance(edits, list):
        raise BadRow(f"'edits' must be a list, got {edits!r:.60}")
    text = "".join(part["text"] for part in chosen[0]["content"])
    spans = []
    for edit in edits:
        try:
            span = Edit(start=edit["start"], end=edit["end"], to=edit["to"])
            whole = isinstance(span.start, int) and isinstance(span.end, int)
            valid = whole and 0 <= span.start <= span.end <= len(text) and isinstance(span.to, str)
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise BadRow(f"an edit needs start, end and to within the chosen text, got {edit!r:.80}")
        if edit.get("from") not in (None, text[span.start : span.end]):
            said, there = edit["from"], text[span.start : span.end]
            raise BadRow(f"edit says 'from' is {said!r:.80} but the chosen text has {there!r:.80}")
        whole_text(span.to, "edits")
        spans.append(span)
    return tuple(spans)
