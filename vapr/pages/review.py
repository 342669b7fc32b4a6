"""The review page: one file that shows pairs one by one, takes a verdict on each, and exports them."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.data.images import image_name, read_image
from vapr.data.pair import Message, PreferencePair
from vapr.data.pairs import Pairs, source_name
from vapr.errors import UserError
from vapr.pages.page import thumbnail, write_page
from vapr.pages.word_diff import Pieces, marked_words
from vapr.progress import Display

SIDES = ((200, 768), (1_000, 448))
"""Up to so many pairs, pictures with a longest side of so many pixels: few pairs can afford sharp ones."""
SMALLEST_SIDE = 320

LONGEST_VALUE = 4_000
"""Characters of a provenance value that the page holds."""

NAMED = ("checks", "source", "licence", "license", "audit_score", "provenance")
"""Columns shown whatever the format of the rows; of vapr's and TRL's, all others are as well."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The way in which the pairs of a page were chosen."""

    sizes: dict[str, int]
    """Pairs of each category in the whole set."""
    drawn: dict[str, int]
    """Pairs of each category on the page."""
    seed: int
    skipped: dict[str, str]
    """Rows that are no pair: reason by place."""


def write_review(out: Path, pairs: Pairs, numbers: Sequence[int], choice: Choice) -> dict[str, int]:
    """Write the page that shows rows ``numbers`` of ``pairs``, in that order.

    Returns:
        Counts: distinct ``pictures`` on the page, and ``unreadable`` ones named on it.
    """
    side = next((side for most, side in SIDES if len(numbers) <= most), SMALLEST_SIDE)
    pictures = _Pictures(side)
    shown = []
    with Display("pictures", len(numbers), unit="pair") as display:
        for number in numbers:
            shown.append(_shown(pairs[number], _extras(pairs, number), pictures))
            display.advance("")
    data: dict[str, Any] = {
        "title": ", ".join(dict.fromkeys(Path(source_name(part.rows)).name for part in pairs.sets)),
        "sizes": choice.sizes,
        "notes": _notes(choice, shown, pictures),
        "pairs": shown,
    }
    content = hashlib.sha256(json.dumps(data).encode())
    for picture in pictures.found:
        content.update(picture.encode())
    data["page"] = content.hexdigest()[:16]  # under this name a browser keeps the verdicts
    script = "".join((resources.files("vapr.pages") / name).read_text("utf-8") for name in ("estimate.js", "review.js"))
    write_page(out, "review.html", data=data, pictures=list(pictures.found), script=Markup(script))
    return {"pictures": len(pictures.found), "unreadable": len(pictures.problems)}


class _Pictures:
    """Small pictures, each held once however many pairs show it."""

    def __init__(self, side: int) -> None:
        self.found: dict[str, int] = {}  # data: URI -> its number, in order
        self.problems: dict[str, str] = {}  # what is wrong, by image
        self._side = side
        self._known: dict[object, int | None] = {}

    def add(self, source: Path | bytes, label: str) -> dict[str, Any]:
        """Return how the page refers to an image; one that cannot be read is named with its problem."""
        key = source if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
        name = str(source) if isinstance(source, Path) else ""
        if key not in self._known:
            try:
                uri = thumbnail(read_image(source), self._side)
                self._known[key] = self.found.setdefault(uri, len(self.found))
            except UserError as error:
                self._known[key] = None
                self.problems[str(key)] = str(error)
        number = self._known[key]
        if number is None:
            return {"label": label, "problem": self.problems[str(key)]}
        return {"label": label, "file": name or f"image {image_name(source)}", "picture": number}


def _notes(choice: Choice, shown: list[dict[str, Any]], pictures: _Pictures) -> list[str]:
    """Return sentences that tell the reader how the page came about."""
    total, size = sum(choice.sizes.values()), len(shown)
    if size == total:
        notes = [
            f"All {total:,} pairs, in a random order (seed {choice.seed}), so that the first ones are a fair sample."
        ]
    else:
        notes = [
            f"A random sample of {size:,} of {total:,} pairs (seed {choice.seed}), drawn category by category in "
            "proportion to size, small categories more than that; in a random order."
        ]
        if empty := [name or "no category" for name, number in choice.drawn.items() if not number]:
            notes.append(f"Categories without a pair in it: {', '.join(empty)[:500]}.")
    if choice.skipped:
        first = next(iter(choice.skipped.values()))
        notes.append(f"Rows that are no pair and are not here: {len(choice.skipped):,}; the first: {first}")
    if pictures.problems:
        notes.append(f"Pictures that cannot be read: {len(pictures.problems):,}; their pairs are here and say why.")
    if repeated := sum(count - 1 for count in Counter(pair["id"] for pair in shown).values()):
        notes.append(f"Pairs whose id another one here has too: {repeated:,}; they share one verdict.")
    return notes


def _extras(pairs: Pairs, number: int) -> dict[str, Any]:
    """Return the columns of a row that a pair has no place for."""
    row = pairs.raw(number)
    return {key: row[key] for key in dict.fromkeys((*NAMED, *pairs.extra_keys(number))) if row.get(key) is not None}


def _shown(pair: PreferencePair, extras: dict[str, Any], pictures: _Pictures) -> dict[str, Any]:
    """Return a pair as the page's script takes it: plain data, all of it text."""
    several = len(pair.images) > 1
    labels = [f"picture {n + 1}" if several else "" for n in range(len(pair.images))]
    chosen_only = [f"{label or 'picture'} of the chosen answer" for label in labels]
    images = [
        pictures.add(image, label)
        for image, label in zip(pair.images, labels if pair.rejected_images is None else chosen_only, strict=True)
    ]
    for label, image in zip(labels, pair.rejected_images or (), strict=False):
        images.append(pictures.add(image, f"{label or 'picture'} of the rejected answer"))
    chosen, rejected, exact = marked(pair)
    placed = _turns(pair.prompt, name_images=several or len(pair.prompt) > 1)
    extras = dict(extras)
    return {
        "id": pair.id,
        "category": pair.category or "",
        "source": _value(extras.pop("source")) if "source" in extras else "",
        "images": images,
        "context": placed[:-1],
        "question": placed[-1]["text"],
        "chosen": chosen,
        "rejected": rejected,
        "exact": exact,
        "checks": _checks(extras),
        "facts": [*_only_space(pair, chosen, rejected), *_facts(pair, extras)],
    }


def _turns(messages: tuple[Message, ...], *, name_images: bool) -> list[dict[str, str]]:
    """Return role and text of each message; where it matters, ``[picture 2]`` says where an image stands."""
    turns, number = [], 0
    for message in messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "image":
                number += 1
                text += f"[picture {number}] " if name_images else ""
            else:
                text += part["text"]
        turns.append({"role": message["role"], "text": text.strip()})
    return turns


def marked(pair: PreferencePair) -> tuple[Pieces, Pieces, bool]:
    """Return both completions in pieces, and whether the marks are exact: the row's edits, to the character.

    Without ``edits``, or where they do not turn the chosen text into the rejected one, words are compared.
    """
    sides = [[_turns((message,), name_images=False)[0] for message in side] for side in (pair.chosen, pair.rejected)]
    texts = ["".join(part["text"] for part in side[0]["content"]) for side in (pair.chosen, pair.rejected)]
    if pair.edits and len(pair.chosen) == len(pair.rejected) == 1:
        chosen, rejected, end = [], [], 0
        for edit in sorted(pair.edits, key=lambda edit: edit.start):
            same = (texts[0][end : edit.start], False)
            chosen += [same, (texts[0][edit.start : edit.end], True)]
            rejected += [same, (edit.to, True)]
            end = max(end, edit.end)
        rest = (texts[0][end:], False)
        if ["".join(text for text, _ in (*side, rest)) for side in (chosen, rejected)] == texts:
            return _non_empty([*chosen, rest]), _non_empty([*rejected, rest]), True
    whole = [
        "\n".join(turn["text"] if len(side) == 1 else f"{turn['role']}: {turn['text']}" for turn in side)
        for side in sides
    ]
    left, right = marked_words(*whole)
    return _non_empty(left), _non_empty(right), False


def _only_space(pair: PreferencePair, chosen: Pieces, rejected: Pieces) -> list[tuple[str, str]]:
    """Return a fact about a difference that no mark shows."""
    shown = pair.chosen == pair.rejected or any(marked for _, marked in (*chosen, *rejected))
    return [] if shown else [("difference", "in white space only")]


def _non_empty(pieces: Pieces) -> Pieces:
    return [(text, mark) for text, mark in pieces if text]


def _checks(extras: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the row's ``checks`` out of ``extras``; none if they have not the shape that vapr writes."""
    checks = _parsed(extras.get("checks"))
    if not isinstance(checks, list) or not all(isinstance(check, dict) and "name" in check for check in checks):
        return []
    del extras["checks"]
    return [
        {
            "name": _value(check["name"]),
            "passed": passed if isinstance(passed := check.get("passed"), bool) else None,
            "value": "" if check.get("value") is None else _value(check["value"]),
            "note": _value(check.get("note") or ""),
        }
        for check in checks
    ]


def _facts(pair: PreferencePair, extras: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of everything else that is known of a pair."""
    facts = [("place", pair.where)]
    if pair.weight != 1:
        facts.append(("weight", f"{pair.weight:g}"))
    for key, column in extras.items():
        value = _parsed(column)
        entries = value.items() if key == "provenance" and isinstance(value, dict) else [(key, value)]
        facts += [(str(name).replace("_", " "), _value(entry)) for name, entry in entries if entry is not None]
    return facts


def _parsed(value: Any) -> Any:
    """Parse JSON text, as which tables hold what has no fixed shape; leave other values as they are."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[:LONGEST_VALUE]} ... ({len(text) - LONGEST_VALUE:,} more characters)"
