"""Names of the shapes that preference rows come in, and of the keys that ``columns`` can map."""

from typing import Literal, get_args

FormatName = Literal[
    "vapr", "trl", "llava", "povid", "ha-dpo", "seva", "rlaif-v", "rlhf-v", "vlfeedback", "llama-factory",
    "llama-factory-v1", "ms-swift", "mm-rlhf", "mmpr",
]  # fmt: skip
FORMAT_NAMES: tuple[str, ...] = get_args(FormatName)

MAPPED_KEYS = (
    "prompt", "chosen", "rejected", "images", "rejected_images", "id", "category", "weight", "edits", "beta", "margin",
)  # fmt: skip
"""What ``columns`` can name."""
