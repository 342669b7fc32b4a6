"""Result folders made by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAID = {"+": ("Yes", "yes"), "-": ("No", "yes"), "?": ("Perhaps.", "yes")}
"""Right, wrong and unparsed, as answer and truth."""


def row(number: int, said: str, truth: str = "yes", **more: Any) -> dict[str, Any]:
    meta = {"split": "random", "image": f"{number}.jpg", **more.pop("meta", {})}
    return {
        "benchmark": "pope", "id": f"q-{number}", "question": f"Is there a thing{number} in the image?",
        "prediction": said, "answer": truth, "meta": meta, **more,
    }  # fmt: skip


def rows_of(marks: str, pictures: int | None = None) -> list[dict[str, Any]]:
    """Return an answer for each mark; with ``pictures``, so many that are asked about in turn."""
    meta = [{"image": f"{n % pictures}.jpg"} if pictures else {} for n in range(len(marks))]
    return [row(n, *SAID[mark], meta=meta[n]) for n, mark in enumerate(marks)]


def write(folder: Path, rows: Sequence[dict[str, Any]], name: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder
