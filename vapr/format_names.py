"""Names of the shapes that preference rows come in, and of the keys that ``columns`` can map."""

import difflib
from collections.abc import Mapping
from typing import Literal, get_args

FormatName = Literal[
    "vapr", "trl", "llava", "povid", "ha-dpo", "seva", "rlaif-v", "rlhf-v", "vlfeedback", "llama-factory",
    "llama-factory-v1", "ms-swift", "mm-rlhf", "mmpr",
]  # fmt: skip
FORMAT_NAMES: tuple[str, ...] = get_args(FormatName)

MAPPED_KEYS = ("prompt", "chosen", "rejected", "images", "rejected_images", "id", "category", "weight", "edits")
"""What ``columns`` can name."""


def check_columns(columns: Mapping[str, str] | None, format: str | None) -> None:
    """Raise ValueError for a key of ``columns`` that is none of :data:`MAPPED_KEYS`.

    With a format given, columns rename that format's own keys, which are not listed here.
    """
    if columns is None or format not in ("auto", None):
        return
    for key in columns:
        if key not in MAPPED_KEYS:
            close = difflib.get_close_matches(key, MAPPED_KEYS, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(MAPPED_KEYS)}"
            raise ValueError(f"data.columns: unknown key '{key}'; {hint}")
