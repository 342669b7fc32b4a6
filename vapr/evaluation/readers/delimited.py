"""Rows of a TSV or CSV file whose fields may hold whole pictures, one in memory at a time."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vapr.errors import UserError

LONGEST_FIELD = (1 << 31) - 1
"""Pictures in base64 are longer than the 131,072 characters that are the library's limit by default."""


class Delimited:
    """A TSV or CSV file with a header; its ending tells which."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = "commas" if path.suffix.lower() == ".csv" else "tabs"
        csv.field_size_limit(LONGEST_FIELD)
        with self._open() as file:
            header = self._next(self._reader(_Lines(file, path)), f"{path}:1") or []
        self.columns = tuple(name.strip() for name in header)
        if len(self.columns) < 2 or len(set(self.columns)) < len(self.columns):
            raise UserError(
                f"{path}: the first line must name the columns, each once, with {self._name} between them; it is "
                f"{' '.join(header)[:60]!r}"
            )

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield place and values of each row, which are texts."""
        with self._open() as file:
            lines = _Lines(file, self.path)
            reader = self._reader(lines)
            self._next(reader, str(self.path))
            while True:
                where = f"{self.path}:{lines.number + 1}"
                row = self._next(reader, where)
                if row is None:
                    return
                if row and len(row) != len(self.columns):
                    raise UserError(
                        f"{where}: {len(row)} fields under {len(self.columns)} columns: the file is cut short or "
                        "damaged; fetch or write it again"
                    )
                if row:
                    yield where, dict(zip(self.columns, row, strict=True))

    def _open(self) -> IO[bytes]:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _reader(self, lines: "_Lines") -> Any:
        return csv.reader(lines, delimiter="," if self._name == "commas" else "\t", strict=True)

    def _next(self, reader: Any, where: str) -> list[str] | None:
        try:
            return next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{where}: not a row of fields with {self._name} between them ({error}): the file is cut short or "
                "damaged; fetch or write it again"
            ) from None


class _Lines:
    """Lines of a file as text, counted."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self._path}:{self.number}: not UTF-8 text; save the table as UTF-8") from None
