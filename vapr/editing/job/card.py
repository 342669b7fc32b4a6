"""The data set card of an edit job: what the pairs are and how they came about, every figure from the job's ledger."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from vapr.cache import written_whole

Ledger = dict[str, Any]

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
         (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (float("inf"), "n>1B"))  # fmt: skip
"""The hub's names of data set sizes, by the first number of rows that is too many."""

COLUMNS = (
    ("id", "name of the pair, once in the set"),
    ("images", "the pictures: each a path, absolute or relative to this folder, or its encoded bytes"),
    ("prompt", "messages up to the question; image parts take `images` in order"),
    ("chosen", "the source's own answer, as messages"),
    ("rejected", "the edited copy of it, as messages"),
    ("category", "what the edit changed, as in the table above"),
    ("edits", "where chosen and rejected differ: characters `start` to `end` of the chosen text, `from` and `to`"),
    ("weight", "weight of the pair in the loss, where it has one"),
    ("checks", "what the checks of the job said of the pair"),
    ("source", "where the chosen answer is from"),
    ("licence", "licence of the source, where it is known"),
    ("provenance", "how the rejected answer was made"),
)


def write_card(folder: Path, ledger: Ledger) -> None:
    """Write ``folder/README.md``, whole or not at all; ``datasets.load_dataset(folder)`` then gives the pairs alone.

    Args:
        folder: of an edit job, with the accepted pairs in ``pairs/*.parquet``.
        ledger: counts of rows, turns and pairs; tokens; seconds; shares (``accept_rate``, ``low``, ``high``) from 0 to
            1; ``rest``, what is still to be done, in seconds, GPU-hours and money. Names in it may be any text.

    Raises:
        UserError: if the file cannot be written.
    """
    header = yaml.safe_dump(_header(ledger), sort_keys=False, allow_unicode=True, width=float("inf"))
    sections = (
        _what_it_is, _how_it_was_made, _counts, _categories, _polarity, _tokens_and_speed, _columns, _training,
        _limitations,
    )  # fmt: skip
    text = "\n\n".join("\n\n".join(section(ledger)) for section in sections)
    with written_whole(folder / "README.md") as file:
        file.write(f"---\n{header}---\n\n{text}\n".encode())


def _header(ledger: Ledger) -> dict[str, Any]:
    licence = ledger["source"]["licence"]
    return {
        **({"license": _one_line(licence)} if licence else {}),
        "task_categories": ["image-text-to-text"],
        "tags": ["dpo", "preference", "hard-negatives", "vapr"],
        "size_categories": [next(name for limit, name in SIZES if ledger["accepted"] < limit)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "pairs/*.parquet"}]}],
    }


def _what_it_is(ledger: Ledger) -> list[str]:
    about = (
        f"{_shown(ledger['accepted'])} preference pairs for aligning vision-language models. In each of them *chosen* "
        "is an answer of an instruction data set, and *rejected* a copy of it that was edited to carry a targeted "
        "error and to keep its style and length."
    )
    turns = ledger["turns"]
    left = _shown(turns["left"])
    unfinished = [f"**The job is not finished: {left} of {_shown(turns['total'])} turns are left.**"]
    return ["# Preference pairs with edited hard negatives", about, *(unfinished if turns["left"] else [])]


def _how_it_was_made(ledger: Ledger) -> list[str]:
    editor, source, decided = ledger["editor"], ledger["source"], ledger["decided_by"]
    keys = ("name", "revision", "engine", "prompt_hash", "seed", "temperature")
    rows = [(f"editor: {key.replace('_', ' ')}", str(editor[key])) for key in keys if editor[key] is not None]
    rows += [(f"source: {key}", source[key]) for key in ("path", "digest", "licence") if source[key] is not None]
    rows += [(f"category decided by {name}, turns", number) for name, number in decided.items()]
    return ["## How it was made", "Made with `vapr edit`.", _table(("what", "value"), rows)]


def _counts(ledger: Ledger) -> list[str]:
    source, turns = ledger["source"], ledger["turns"]
    rows: list[Sequence[Any]] = [("source rows", source["rows"])]
    rows += [("rows that could not be read", source["bad_rows"]), ("turns in them", source["turns"])]
    rows += [(f"filtered: {reason}", number) for reason, number in source["filtered"].items()]
    rows += [("eligible turns", source["eligible"]), ("turns of the job", turns["total"])]
    rows += [("turns done", turns["done"]), ("turns left", turns["left"])]
    rows.append(("accepted pairs", ledger["accepted"]))
    rows += [(f"rejected: {reason}", number) for reason, number in ledger["rejected"].items()]
    rows += [(f"failed: {reason}", number) for reason, number in ledger["failed"].items()]
    return ["## Counts", _table(("what", "number"), rows)]


def _categories(ledger: Ledger) -> list[str]:
    keys = ("turns", "accepted", "rejected", "failed")
    rows = [
        (name, *(counts[key] for key in keys), _percent(counts["accept_rate"]))
        for name, counts in ledger["categories"].items()
    ]
    return ["## Categories", _table(("category", *keys, "accept rate"), rows)]


def _polarity(ledger: Ledger) -> list[str]:
    about = (
        "Pairs of yes/no questions by what the rejected answer says. Where one side prevails, training on the pairs "
        "can teach the model to say the other."
    )
    rows = [(name, side["rejected_yes"], side["rejected_no"]) for name, side in ledger["polarity"].items()]
    return ["## Yes and no", about, _table(("source", "rejected says yes", "rejected says no"), rows)]


def _tokens_and_speed(ledger: Ledger) -> list[str]:
    rows: list[Sequence[Any]] = [(f"{kind} tokens", number) for kind, number in ledger["tokens"].items()]
    rows += [("seconds", ledger["seconds"]), ("accepted pairs a second", ledger["accepted_per_second"])]
    rows += [(f"shards: {key}", number) for key, number in ledger["shards"].items()]
    if ledger["turns"]["left"]:
        rows += [(f"estimated for the rest: {key.replace('_', ' ')}", n) for key, n in ledger["rest"].items()]
    return ["## Tokens and speed", _table(("what", "number"), [row for row in rows if row[1] is not None])]


def _columns(_: Ledger) -> list[str]:
    return [
        "## Columns",
        "\n".join(("| column | meaning |", "| --- | --- |", *(f"| `{c}` | {m} |" for c, m in COLUMNS))),
    ]


def _training(_: Ledger) -> list[str]:
    config = (
        "run_dir: runs/mine\npolicy:\n  model: Qwen/Qwen2.5-VL-3B-Instruct\n  lora: {rank: 128, alpha: 256}\n"
        "data:\n  train: path/to/this/folder"
    )
    return [
        "## How to train on it",
        f"```yaml\n# run.yaml\n{config}\n```",
        "```\nvapr train run.yaml\n```",
        'The rows alone: `datasets.load_dataset("path/to/this/folder", split="train")`.',
    ]


def _limitations(ledger: Ledger) -> list[str]:
    licence = ledger["source"]["licence"]
    verifier, blind_check = ledger["verifier"], ledger["blind_check"]
    points = [
        _reviewed(ledger["review"]),
        f"An image verifier has checked the negatives: {_escaped(verifier)}."
        if verifier
        else "No image verifier has checked whether the negatives are wrong of their pictures.",
        f"Check without the image: {_escaped(blind_check)}."
        if blind_check
        else "It was not checked whether the sides can be told apart without the image.",
        "The chosen answers are the source's own, with the mistakes that it has.",
        f"The source's licence was given as {_escaped(licence)}; its pictures may have others."
        if licence
        else "The source's licence was not given; find it out before passing the pairs on.",
    ]
    return ["## Limitations", "\n".join(f"- {point}" for point in points)]


def _reviewed(review: dict[str, Any] | None) -> str:
    if review is None:
        return "No human has checked the negatives."
    counts = f"A human has checked a sample: {_shown(review['kept'])} pairs kept, {_shown(review['dropped'])} dropped."
    bounds = f"from {_percent(review['low'])} to {_percent(review['high'])}"
    return f"{counts} The share of negatives that are truly wrong is estimated {bounds} (Wilson interval)."


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [_line(map(_cell, row)) for row in rows]
    return "\n".join([_line(titles), _line("---" for _ in titles), *lines]) if lines else "None."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return _escaped(value) if isinstance(value, str) else _shown(value)


def _shown(number: float | None) -> str:
    """Counts whole, measures to three digits or, from a thousand on, to whole numbers."""
    if number is None:
        return "-"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _escaped(text: str) -> str:
    """Any text as one line of markdown that shows it and does nothing else, in a table too.

    GitHub's tables end a cell at a pipe even in code, and know no escape of a backslash before it: hence an entity.
    """
    text = html.escape(_one_line(text), quote=False).replace("|", "&#124;")
    return re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def _one_line(text: str) -> str:
    """The text with single spaces, and with a mark in place of control characters and halves of characters."""
    letters = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in letters)
