"""The data set card of an edit job: what the pairs are and how they came about, every figure from the job's ledger."""

import html
import re
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from vapr.cache import written_whole

Ledger = dict[str, Any]

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
         (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (float("inf"), "n>1B"))  # fmt: skip
"""The hub's names of data set sizes, by the first number of rows that is too many."""


def write_card(folder: Path, ledger: Ledger) -> None:
    """Write ``folder/README.md``, whole or not at all; ``datasets.load_dataset(folder)`` then gives the pairs alone.

    Args:
        folder: the folder of an edit job, with the accepted pairs in ``pairs/*.parquet``.
        ledger: counts of rows, turns and pairs; tokens; seconds; shares (``accept_rate``, ``low``, ``high``) from 0 to
            1; ``rest``, what is still to be done, in seconds, GPU-hours and money. Names in it may be any text.

    Raises:
        UserError: if the file cannot be written.
    """
    header = yaml.safe_dump(_header(ledger), sort_keys=False, allow_unicode=True, width=float("inf"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(figure=_figure, percent=_percent, markdown=_markdown)
    text = environment.get_template("card.md.jinja").render(ledger=ledger)
    with written_whole(folder / "README.md") as file:
        file.write(f"---\n{header}---\n\n{text.strip()}\n".encode())


def _header(ledger: Ledger) -> dict[str, Any]:
    licence = ledger["source"]["licence"]
    return {
        **({"license": _one_line(licence)} if licence else {}),
        "task_categories": ["image-text-to-text"],
        "tags": ["dpo", "preference", "hard-negatives", "vapr"],
        "size_categories": [next(name for limit, name in SIZES if ledger["accepted"] < limit)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "pairs/*.parquet"}]}],
    }


def _figure(number: float | None) -> str:
    """Show counts whole, and measures to three digits or, from a thousand on, to whole numbers."""
    if number is None:
        return "-"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _markdown(text: str) -> str:
    """Return any text as one line of markdown that shows it and does nothing else, in a table too.

    GitHub's tables end a cell at a pipe even in code, and know no escape of a backslash before it: hence an entity.
    """
    text = html.escape(_one_line(text), quote=False).replace("|", "&#124;")
    return re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def _one_line(text: str) -> str:
    """Return the text with single spaces, and a mark in place of control characters and halves of characters."""
    letters = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in letters)
