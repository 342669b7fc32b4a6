"""Options that several commands share."""

from collections.abc import Callable
from functools import reduce, wraps
from pathlib import Path
from typing import Any, cast

import click

from vapr.errors import UserError

Command = Callable[..., None]

A_PATH = click.Path(path_type=Path)
INSTRUCTION_SHAPES = click.Choice(["auto", "llava", "messages", "prompt"])
AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)

config_argument = click.argument("config", type=A_PATH)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config, e.g. --set seed=1."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for programs.")
bad_row_option = click.option(
    "--on-bad-row", type=click.Choice(["error", "skip"]), default="error", show_default=True,
    help="What to do at a row that cannot be used: stop, or leave it out.",
)  # fmt: skip


def page_option(content: str) -> Callable[[Command], Command]:
    """Add ``--out``, an HTML page that the command can write."""

    def check(_context: click.Context, _option: click.Parameter, out: Path | None) -> Path | None:
        if out is not None and out.suffix != ".html":
            raise UserError(f"--out {out}: the page is HTML; give a name that ends in .html")
        return out

    return click.option("--out", type=A_PATH, callback=check, help=f"Write a page (.html) with {content}.")


def column_option(example: str) -> Callable[[Command], Command]:
    """Add ``--column KEY=COLUMN``, which becomes a mapping, or None if it is not given."""

    def read(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
        mapped = {}
        for text in given:
            key, equals, column = text.partition("=")
            if not equals or not key or not column:
                raise UserError(f"--column {text}: write --column prompt=question")
            mapped[key] = column
        return mapped or None

    return click.option(
        "--column", "columns", multiple=True, metavar="KEY=COLUMN", callback=read, help=f"Map a column, e.g. {example}."
    )


def together_as_rows(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options that say how rows are read; the command gets them as one mapping, ``rows``."""

    def add(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            names = ("format", "columns", "image_root", "split", "subset")
            command(rows={name: values.pop(name) for name in names}, **values)

        return reduce(lambda added, option: option(added), reversed(options), cast(Command, run))

    return add


image_root_option = click.option("--image-root", type=click.Path(), help="Folder the images must lie in.")
pair_options = together_as_rows(
    click.option("--format", default="auto", show_default=True, help="Format of the pairs."),
    column_option("prompt=question"),
    image_root_option,
    click.option("--split", default="train", show_default=True, help="Split of a hub data set."),
    click.option("--subset", help="Subset of a hub data set, or an entry of dataset_info.json."),
)
instruction_options = together_as_rows(
    click.option("--format", type=INSTRUCTION_SHAPES, help="Shape of the rows. [default: auto]"),
    column_option("answer=caption"),
    image_root_option,
    click.option("--split", help="Split of a hub data set. [default: train]"),
    click.option("--subset", help="Subset of a hub data set."),
)
