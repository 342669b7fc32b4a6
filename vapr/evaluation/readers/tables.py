"""Open what benchmarks and results are kept in as rows: TSV, CSV, JSON, Excel, parquet, Arrow, hub data sets."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from vapr.data.sources import SPLIT_NAME
from vapr.data.text_rows import JsonLines, open_rows
from vapr.errors import BadRow, UserError, one_line
from vapr.evaluation.readers.delimited import Delimited

ARROW = (".parquet", ".arrow")
DELIMITED = (".tsv", ".csv")
DATASET_SUFFIXES = (*ARROW, *DELIMITED, ".xlsx")
"""Endings that only tables have; .json can be anything."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Table(Protocol):
    """Rows with named columns."""

    path: Path
    columns: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place of each row, as messages name it, and its values."""


class Numbered:
    """Rows that can be asked for by number: JSON, parquet, Arrow."""

    def __init__(self, path: Path, parts: Sequence[Any]) -> None:
        self.path = path
        self._parts = [part for part in parts if len(part)]
        self.columns = tuple(dict.fromkeys(key for part in self._parts for key in _object(part, 0)))
        self.digest = " ".join(part.digest for part in self._parts)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for part in self._parts:
            for number in range(len(part)):
                yield part.where(number), _object(part, number)


class Sheet:
    """The first sheet of an Excel file, whose first row names the columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns, self._rows = _read_sheet(path)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(self._rows):
            yield f"{self.path}:{number + 2}", row


class Together:
    """Tables that hold one benchmark, such as VLMEvalKit's files of the 2D and the 3D part of CV-Bench."""

    def __init__(self, path: Path, parts: Sequence[Table]) -> None:
        self.path, self.parts = path, parts
        self.columns = tuple(name for name in parts[0].columns if all(name in part.columns for part in parts))

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for part in self.parts:
            yield from part


def is_data_set(name: str) -> bool:
    """Return whether a name that is no file here can be one of a data set of the hub."""
    return HUB_NAME.fullmatch(name) is not None and Path(name).suffix not in (*DATASET_SUFFIXES, ".json", ".jsonl")


def open_table(path: Path, split: str | None = None) -> Table | None:
    """Open a file, a folder or a hub data set as one table; None if it is not of a kind that is a table.

    Args:
        path: a file by its ending; a folder with parquet or Arrow files at any depth, with .tsv or .csv files, or one
            that ``save_to_disk`` wrote; or ``owner/name`` of a data set of the hub, if nothing of that name is here.
        split: of a data set. Of shards that are named after splits, only those of this one are read.

    Raises:
        UserError: if it cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, split)
    if not path.exists():
        return _open_hub(path, split) if is_data_set(str(path)) else None
    if suffix in DELIMITED:
        return Delimited(path)
    if suffix == ".xlsx":
        return Sheet(path)
    if suffix in ARROW:
        return Numbered(path, _table_rows().open_tables([path]))
    if suffix in (".json", ".jsonl"):
        return _open_json(path)
    return None


def data_files(folder: Path) -> list[Path]:
    """Return the parquet and Arrow files of a folder, at any depth, in name order."""
    found = (file for suffix in ARROW for file in folder.rglob(f"*{suffix}"))
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _open_json(path: Path) -> Numbered | None:
    """Open JSON lines, or a list of objects; None for JSON of another shape."""
    if path.suffix.lower() == ".json":
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"{"):
            return _open_lines(path)
        if not start.startswith(b"["):
            return None
    rows = open_rows(path)
    return Numbered(path, [rows]) if len(rows) and isinstance(rows[0], dict) else None


def _open_lines(path: Path) -> Numbered | None:
    """Open JSON lines under the ending .json; None if the file is one object."""
    lines = JsonLines(path)
    try:
        return Numbered(path, [lines]) if len(lines) and isinstance(lines[0], dict) else None
    except BadRow:
        return None


def _open_folder(folder: Path, split: str | None) -> Table | None:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Numbered(folder, [_table_rows().open_saved(folder, split or "test")])
    files = data_files(folder)
    if not files:
        tables = sorted(file for suffix in DELIMITED for file in folder.glob(f"*{suffix}"))
        alone = not any(folder.glob("*.json*"))  # else the authors' own files are there
        return Together(folder, [Delimited(file) for file in tables]) if tables and alone else None
    if split is not None and all(SPLIT_NAME.match(file.name) for file in files):
        files = [file for file in files if file.name.startswith(split)]
        if not files:
            raise UserError(f"{folder}: no parquet or Arrow file of the split '{split}' in it; name the file itself")
    return Numbered(folder, _table_rows().open_tables(files))


def _open_hub(name: Path, split: str | None) -> Numbered:
    return Numbered(name, [_table_rows().open_hub(str(name), None, split or "test")])


def _table_rows() -> Any:
    """Import the door to the datasets library, which takes seconds and may not be installed."""
    try:
        from vapr.data import table_rows
    except ImportError:
        raise UserError("tables and hub data sets need the datasets library; pip install 'vapr[data]'") from None
    return table_rows


def _object(part: Any, number: int) -> dict[str, Any]:
    try:
        row = part[number]
    except BadRow as error:
        raise UserError(f"{part.where(number)}: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{part.where(number)}: a row must be an object with keys, this is {row!r:.40}")
    return row


def _read_sheet(path: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    try:
        import openpyxl
        from openpyxl.utils.escape import unescape
    except ImportError:
        raise UserError(f"{path}: Excel files need openpyxl; pip install 'vapr[eval]', or save it as .tsv") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = iter(book.worksheets[0].iter_rows(values_only=True))
        header = ["" if name is None else str(name).strip() for name in next(rows, ())]
        values = [[unescape(v) if isinstance(v, str) else v for v in row] for row in rows]
        book.close()
    except Exception as error:  # noqa: BLE001 - zip, XML and key errors of a damaged file, whatever the library raises
        raise UserError(
            f"{path}: not a readable Excel file, or cut short ({one_line(error)}); write it again"
        ) from None
    named = [number for number, name in enumerate(header) if name]
    if not named:
        raise UserError(f"{path}: its first row names no columns")
    objects = [
        {header[n]: row[n] if n < len(row) else None for n in named}
        for row in values
        if any(v is not None for v in row)
    ]
    return tuple(header[n] for n in named), objects
