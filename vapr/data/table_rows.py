"""Rows of parquet and Arrow files and of hub data sets by number: the only door to the datasets library.

Importing this takes seconds, and fails without the library, so :mod:`vapr.data.sources` does so only when needed.
"""

import itertools
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet as parquet

from vapr.cache import files_hash, user_cache
from vapr.data.remote import display_name
from vapr.errors import BadRow, UserError, one_line

if not sys.stderr.isatty():
    datasets.disable_progress_bars()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for the values of a column that cannot be read. It harms no pair but one that needs it."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind}, which the datasets library cannot hold>"


class Table:
    """Rows of a data set of the ``datasets`` library: Arrow files, memory-mapped. JSON in its columns is decoded.

    Args:
        dataset: the data set.
        digest: hash of its content.
        names: the files or data sets after which a row's place is named, with the number of rows of each.
        unreadable: columns that ``dataset`` leaves out.
    """

    def __init__(
        self, dataset: Any, digest: str, names: list[tuple[str, int]], unreadable: dict[str, Unreadable] | None = None
    ) -> None:
        self._rows = dataset.with_format("arrow")  # images stay encoded
        self._json = {name: feature for name, feature in dataset.features.items() if _holds_json(feature)}
        self.digest = digest
        self._unreadable = unreadable or {}
        self._names = [name for name, _ in names]
        self._starts = [0, *itertools.accumulate(size for _, size in names)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        try:
            row = self._rows[number].to_pylist()[0]
        except UnicodeDecodeError:
            raise BadRow("not UTF-8 text") from None
        for name, feature in self._json.items():
            try:
                row[name] = _decoded(row[name], feature)
            except (ValueError, RecursionError) as error:
                raise BadRow(f"'{name}' holds what is not readable as JSON ({one_line(error)})") from None
        return row | self._unreadable

    def where(self, number: int) -> str:
        part = bisect_right(self._starts, number, hi=len(self._names)) - 1
        return f"{self._names[part]}:{number - self._starts[part] + 1}"


def _holds_json(feature: Any) -> bool:
    """Return whether some of a column is JSON text, as ``datasets`` stores objects of different keys."""
    inside = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return type(feature).__name__ == "Json" or any(_holds_json(inner) for inner in inside if inner is not None)


def _decoded(value: Any, feature: Any) -> Any:
    """Decode the JSON in a value of a column."""
    if value is None:
        return None
    if type(feature).__name__ == "Json":
        return feature.decode_example(value)
    if isinstance(feature, dict):
        return {key: _decoded(inner, feature[key]) for key, inner in value.items()}
    if hasattr(feature, "feature") and isinstance(value, list):
        return [_decoded(inner, feature.feature) for inner in value]
    return value


def open_tables(files: list[Path]) -> list[Table]:
    """Open parquet and Arrow files as few tables, in order: a table has one schema, which its shards may not share.

    One shard may hold nothing but nulls where another has texts, or whole numbers where another has fractions.

    Raises:
        UserError: naming the file that cannot be read.
    """
    return [open_table(list(group)) for _, group in itertools.groupby(files, key=_kind_and_schema)]


def _kind_and_schema(file: Path) -> str:
    """Return the kind and schema of a file as text; its name if it cannot be read, which opening it will say."""
    try:
        schema = parquet.read_schema(file) if file.suffix == ".parquet" else _arrow_reader(file).schema
    except (pyarrow.ArrowException, OSError):
        return str(file)
    return f"{file.suffix} {schema.to_string(show_field_metadata=False, show_schema_metadata=False)}"


def _arrow_reader(file: Path) -> Any:
    """Open a file of Arrow's stream format, which ``datasets`` writes, or of its file format."""
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))


def open_table(files: list[Path]) -> Table:
    """Open parquet files, or Arrow files, of one schema as one table.

    ``datasets`` turns parquet into Arrow in its cache, once.

    Raises:
        UserError: naming the file that cannot be read.
    """
    is_parquet = files[0].suffix == ".parquet"
    sizes, parts = [], []
    for file in files:
        try:
            if is_parquet:
                size = parquet.read_metadata(file).num_rows
            else:
                parts.append(_open_arrow(file))
                size = len(parts[-1])
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable {file.suffix[1:]} file ({one_line(error)})") from None
        sizes.append((str(file), size))
    unreadable, options = _unreadable_columns(files[0]) if is_parquet else ({}, {})
    digest = files_hash(files, user_cache() / "index" / "files.json")
    names = [name for name, size in sizes if size]
    try:
        if parts:
            dataset = datasets.concatenate_datasets(parts)
        elif not names:
            dataset = datasets.Dataset.from_dict({})
        else:  # by content: the library itself would take a file of the same name and time for the same
            folder = str(user_cache() / "tables" / digest[:24])
            dataset = datasets.Dataset.from_parquet(names, cache_dir=folder, **options)
    except (pyarrow.ArrowException, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{_first_damaged(files)}: cannot be read as a table ({one_line(cause)})") from None
    return Table(dataset, digest, [(display_name(Path(name)), size) for name, size in sizes], unreadable)


def _unreadable_columns(file: Path) -> tuple[dict[str, Unreadable], dict[str, Any]]:
    """Find columns whose Arrow type has no counterpart in ``datasets``: maps, UUIDs.

    Returns:
        The columns, and the options of ``from_parquet`` that leave them out.
    """
    schema = parquet.read_schema(file)
    unreadable = {}
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([field]))
        except ValueError:
            unreadable[field.name] = Unreadable(str(field.type))
    kept = [field for field in schema if field.name not in unreadable]
    if not unreadable or not kept:
        return unreadable, {}
    features = datasets.Features.from_arrow_schema(pyarrow.schema(kept, metadata=schema.metadata))
    return unreadable, {"columns": list(features), "features": features}


def _first_damaged(files: list[Path]) -> Path:
    for file in files:
        try:
            for _ in parquet.ParquetFile(file).iter_batches() if file.suffix == ".parquet" else ():
                pass
        except (pyarrow.ArrowException, OSError):
            return file
    return files[0]


def _open_arrow(file: Path) -> Any:
    try:
        return datasets.Dataset.from_file(str(file))
    except pyarrow.ArrowInvalid:  # Arrow's file format instead of its stream format
        return datasets.Dataset(pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all())


def open_saved(folder: Path, split: str) -> Table:
    """Open a folder written by ``save_to_disk`` of the ``datasets`` library."""
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable saved data set ({one_line(error)})") from None
    return _one_split(dataset, str(folder), split)


def open_hub(name: str, subset: str | None, split: str) -> Table:
    """Load a data set of the Hugging Face hub, or of its cache on this machine.

    Raises:
        UserError: if there is none of that name, or it cannot be reached.
    """
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its network and parsers raise
        raise UserError(
            f"{name}: no such file or folder here, and the hub gave no data set of that name ({one_line(error)})"
        ) from None
    return _one_split(dataset, name, split)


def _one_split(dataset: Any, name: str, split: str) -> Table:
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{name}: no split '{split}'; there are {', '.join(dataset)}")
        dataset = dataset[split]
    return Table(dataset, dataset._fingerprint, [(name, len(dataset))])
