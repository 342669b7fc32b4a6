"""How the rows of a benchmark look in the files of other tools."""

import ast
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vapr.errors import BadRow

Row = dict[str, Any]
LETTERS = string.ascii_uppercase


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How one tool keeps a benchmark.

    Attributes:
        title: whose files look like that.
        needs: the columns by which they are told.
        rows: what the benchmark's authors would have written for a row: names of files and rows of them. Pictures are
            paths by then, from the folder of the files on.
        beside: names of those files that hold no question.
        order: of the files, by name, in which the benchmark reads them.
        form: how the authors' files hold rows: JSON lines, a JSON list, or cells with tabs between them.
        pictures: columns that hold pictures.
        name: the path of a picture, given row, column and number.
        split: of the data set on the hub.
    """

    title: str
    needs: tuple[str, ...]
    rows: Callable[[Row], Iterable[tuple[str, Row]]]
    beside: tuple[str, ...] = ()
    order: Callable[[str], Any] = str
    form: Literal["lines", "list", "tabs"] = "lines"
    pictures: tuple[str, ...] = ("image",)
    name: Callable[[Row, str, int], str] | None = None
    split: str | None = None

    def fits(self, columns: Iterable[str]) -> bool:
        return set(self.needs) <= set(columns)


def as_text(value: Any) -> str:
    """Return a cell as text: Excel and parquet hold numbers where others hold texts."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else str(int(value)) if value.is_integer() else str(value)
    return str(value).strip()


def as_number(value: Any) -> Any:
    """Return whole numbers as such, whatever a table made of them; other values as they are."""
    try:
        number = float(as_text(value))
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def as_list(value: Any) -> list[Any]:
    """Return a list that may be written as text, as MMMU's options are.

    Raises:
        BadRow: if it is something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(f"{value[:40]!r} is not a list of options such as ['red', 'blue']") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise BadRow(f"{str(value)[:40]!r} is not a list of options")
    return list(value)


def lettered(row: Row) -> list[str]:
    """Return the options in columns A, B, C, ..., up to the last that is not empty."""
    options = [as_text(row.get(letter)) for letter in LETTERS]
    while options and not options[-1]:
        options.pop()
    return options


def picked(row: Row, columns: Sequence[str]) -> Row:
    """Return those of the columns that the row has."""
    return {column: row[column] for column in columns if column in row}
