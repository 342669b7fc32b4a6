"""The data set card of an edit job: what the pairs are and how they came about, every figure from the job's ledger."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from vapr.cache import written_whole

Ledger = dict[str, Any]
Row = Sequence[Any]

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
    tables = {
        "how_it_was_made": _how_it_was_made(ledger),
        "counts": _counts(ledger),
        "categories": _categories(ledger),
        "polarity": [(name, n["rejected_yes"], n["rejected_no"]) for name, n in ledger["polarity"].items()],
        "tokens_and_speed": _tokens_and_speed(ledger),
    }
    text = environment.get_template("card.md").render(ledger=ledger, table=_table, **tables)
    with written_whole(folder / "README.md") as file:
        file.write(f"---\n{header}---\n\n{text.rstrip()}\n".encode())


def _header(ledger: Ledger) -> dict[str, Any]:
    licence = ledger["source"]["licence"]
    return {
        **({"license": _one_line(licence)} if licence else {}),
        "task_categories": ["image-text-to-text"],
        "tags": ["dpo", "preference", "hard-negatives", "vapr"],
        "size_categories": [next(name for limit, name in SIZES if ledger["accepted"] < limit)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "pairs/*.parquet"}]}],
    }


def _how_it_was_made(ledger: Ledger) -> list[Row]:
    editor, source, decided = ledger["editor"], ledger["source"], ledger["decided_by"]
    keys = ("name", "revision", "engine", "prompt_hash", "seed", "temperature")
    rows: list[Row] = [
        (f"editor: {key.replace('_', ' ')}", str(editor[key])) for key in keys if editor[key] is not None
    ]
    rows += [(f"source: {key}", source[key]) for key in ("path", "digest", "licence") if source[key] is not None]
    return rows + [(f"category decided by {name}, turns", number) for name, number in decided.items()]


def _counts(ledger: Ledger) -> list[Row]:
    source, turns = ledger["source"], ledger["turns"]
    return [
        ("source rows", source["rows"]),
        ("rows that could not be read", source["bad_rows"]),
        ("turns in them", source["turns"]),
        *((f"filtered: {reason}", number) for reason, number in source["filtered"].items()),
        ("eligible turns", source["eligible"]),
        ("turns of the job", turns["total"]),
        ("turns done", turns["done"]),
        ("turns left", turns["left"]),
        ("accepted pairs", ledger["accepted"]),
        *((f"rejected: {reason}", number) for reason, number in ledger["rejected"].items()),
        *((f"failed: {reason}", number) for reason, number in ledger["failed"].items()),
    ]


def _categories(ledger: Ledger) -> list[Row]:
    keys = ("turns", "accepted", "rejected", "failed")
    return [
        (name, *(counts[key] for key in keys), _percent(counts["accept_rate"]))
        for name, counts in ledger["categories"].items()
    ]


def _tokens_and_speed(ledger: Ledger) -> list[Row]:
    rows: list[Row] = [(f"{kind} tokens", number) for kind, number in ledger["tokens"].items()]
    rows += [("seconds", ledger["seconds"]), ("accepted pairs a second", ledger["accepted_per_second"])]
    rows += [(f"shards: {key}", number) for key, number in ledger["shards"].items()]
    if ledger["turns"]["left"]:
        rows += [(f"estimated for the rest: {key.replace('_', ' ')}", n) for key, n in ledger["rest"].items()]
    return [row for row in rows if row[1] is not None]


def _table(titles: Row, rows: Iterable[Row]) -> str:
    cells = [[_markdown(value) if isinstance(value, str) else _figure(value) for value in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]
    return "\n".join(lines) if cells else "None."


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
