"""Open what ``data.train`` can name: files, folders, globs, hub data sets, LLaMA-Factory's dataset_info.json."""

import contextlib
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from vapr.config import SourceConfig
from vapr.data.formats import detect
from vapr.data.pair import encodable
from vapr.data.pairs import Pairs, PairSet, source_name
from vapr.data.remote import fetch_source, is_remote, is_url, local_place
from vapr.data.row_values import map_columns
from vapr.data.text_rows import Rows, open_rows
from vapr.errors import BadRow, UserError
from vapr.format_names import FORMAT_NAMES

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".tar")
TABLES = (".parquet", ".arrow")

SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.])")
"""As the hub names its shards: train-00000-of-00010.parquet. Rows to test on are not to be trained on."""

LLAMA_FACTORY_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
}  # fmt: skip
"""The tags of LLaVA's turns, which are LLaMA-Factory's defaults."""


def read_pairs(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    split: str = "train",
    subset: str | None = None,
    on_bad_row: str = "error",
    images_needed: bool = True,
) -> Pairs:
    """Open a file, a folder, a glob of files or a hub data set as pairs, and check its first rows.

    Args:
        source: .jsonl, .json, .parquet, .arrow or .tar; a folder of such files, read in name order (if it
            has ``pairs/``, only that); a folder that ``save_to_disk`` wrote, or one with LLaMA-Factory's
            ``dataset_info.json``; or a hub id.
        format: one of ``vapr.format_names.FORMAT_NAMES``, or ``auto``: told from the first row's keys.
        columns: names of columns for ``prompt``, ``chosen``, ``rejected``, ``images``, ...; ``a.b.0`` goes down.
        image_root: folder all images must lie in; by default paths start at the data file's folder.
        split, subset: of a hub data set; ``subset`` also picks an entry of a ``dataset_info.json``.
        on_bad_row: ``error`` raises at a bad row; ``skip`` leaves it out when iterating and notes it.
        images_needed: whether an image whose file is missing makes a row a bad one; texts can be read without.

    Raises:
        UserError: naming file and row.
    """
    if format not in ("auto", *FORMAT_NAMES):
        raise UserError(f"unknown format '{format}'; known: auto, {', '.join(FORMAT_NAMES)}")
    described = SourceConfig(
        path=str(source),
        format=cast(Any, format),  # checked above
        columns=dict(columns) if columns is not None else None,
        image_root=str(image_root) if image_root is not None else None,
        split=split,
        subset=subset,
    )
    pairs = Pairs(open_sets(described, images_needed=images_needed), on_bad_row)
    pairs.check()
    return pairs


def open_sets(source: SourceConfig, *, images_needed: bool = True) -> list[PairSet]:
    """Open the sets of one source: one for each file, or for all tables of a folder.

    Raises:
        UserError: naming the source, if nothing can be read there.
    """
    root = None
    if source.image_root is not None:
        root = local_place(source.image_root) if is_url(source.image_root) else Path(source.image_root)
    if root is not None and not is_remote(root) and not root.is_dir():
        raise UserError(f"data.image_root: {root}: no such folder")
    sets: list[PairSet] = []
    wanted = None if source.format == "auto" else source.format
    for rows, folder, given, mapped in open_files(source.path, source.split, source.subset, source.columns):
        if len(rows):
            name = wanted or given or ("columns" if source.columns else _detect(rows))
            confined = root is not None
            sets.append(PairSet(rows, name, mapped, root or folder, confined, source.weight, source, images_needed))
    if not sets:
        raise UserError(f"{source.path}: no pairs in it")
    if sets[0].columns:  # those of a source are the same for all of its files
        check_columns([part.rows for part in sets], sets[0].columns)
    return sets


def check_columns(parts: Sequence[Rows], columns: Mapping[str, str], section: str = "data") -> None:
    """Refuse a column that no row has: if it is one for images, the pairs would be trained on without them.

    It may be missing from some of the ``parts``, because not every shard of a set has each column.

    Raises:
        UserError: naming the key of ``section``.
    """
    seen: set[str] = set()
    found: set[str] = set()
    for rows in parts:
        for number in {*range(min(len(rows), 100)), *np.linspace(0, len(rows) - 1, 400).astype(int).tolist()}:
            with contextlib.suppress(BadRow, AttributeError):
                row = rows[number]
                seen |= row.keys()
                found |= {key for key, column in columns.items() if key in map_columns(row, {key: column})}
        if found == columns.keys():
            return
    for key, column in columns.items():
        if key not in found:
            raise UserError(
                f"{section}.columns.{key}: {source_name(parts[0])} has no column '{column}'; there are "
                f"{', '.join(sorted(seen)) or 'none'} (leave {key} out if no row has it)"
            )


def _detect(rows: Rows) -> str:
    """Return the format of the first row that can be decoded."""
    for number in range(min(len(rows), 10)):
        try:
            return detect(rows[number])
        except BadRow:
            continue
    return "vapr"


def open_files(
    source: str, split: str, subset: str | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[Rows, Path, str | None, Mapping[str, str] | None]]:
    """Yield rows, the folder where relative image paths start, the format if the source says it, and renamed columns.

    Raises:
        UserError: naming the source, if nothing can be read there.
    """
    if is_url(source):
        source = fetch_source(source, lambda names: _names_of_split(names, source, split))
    path = Path(source).expanduser()
    if path.name == "dataset_info.json" or (
        (path / "dataset_info.json").is_file() and not (path / "state.json").is_file()
    ):
        folder = path.parent if path.name == "dataset_info.json" else path
        yield _llama_factory(folder, subset)
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield _table_rows().open_saved(path, split), path, None, columns
    elif path.exists() or any(c in source for c in "*?["):
        for folder, files in _pair_files(path, source, split):
            for rows in _open_alike(files):
                yield rows, folder, None, columns
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and Path(source).suffix not in SUFFIXES:
        yield _table_rows().open_hub(source, subset, split), Path(), None, columns
    else:
        raise UserError(f"{source}: no such file or folder")


def _table_rows() -> Any:
    """Import the door to the datasets library, which takes seconds and may not be installed."""
    try:
        from vapr.data import table_rows
    except ImportError:
        raise UserError("tables and hub data sets need the datasets library; pip install 'vapr[data]'") from None
    return table_rows


def _open_alike(files: Sequence[Path]) -> Iterable[Rows]:
    """Open files that are all tables, or all texts."""
    return _table_rows().open_tables(files) if files[0].suffix in TABLES else map(open_rows, files)


def _pair_files(path: Path, source: str, split: str) -> list[tuple[Path, list[Path]]]:
    """Return the files to read, tables and texts apart, each group with the folder where relative image paths start."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown file type; use {', '.join(SUFFIXES)}")
        files = [path]
    elif path.is_dir():
        folder = path / "pairs" if (path / "pairs").is_dir() else path
        files = _of_split(folder.glob("*"), source, split)
    else:
        files = _of_split((Path(file) for file in glob.glob(str(path))), source, split)

    for file in files:
        if not encodable(str(file.resolve())):
            name = os.fsencode(file).decode(errors="backslashreplace")
            raise UserError(f"{name}: the name of this file or of its folder is not UTF-8 text; rename it")

    def kind(file: Path) -> tuple[bool, Path]:
        return file.suffix in TABLES, path if path.is_dir() else file.parent

    return [(folder, list(group)) for (_, folder), group in itertools.groupby(files, key=kind)]


def _of_split(found: Iterable[Path], source: str, split: str) -> list[Path]:
    """Return the pair files in name order; if every one is named after a split, only those of ``split``."""
    files = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file() and file.name[0] != ".")
    if not files:
        raise UserError(f"{source}: no {', '.join(SUFFIXES)} file there")
    wanted = set(_names_of_split([file.name for file in files], source, split))
    return [file for file in files if file.name in wanted]


def _names_of_split(names: Sequence[str], source: str, split: str) -> list[str]:
    """Return the names of pair files; if every one is named after a split, only those of ``split``."""
    names = [name for name in names if Path(name).suffix in SUFFIXES]
    splits = [match[0] if (match := SPLIT_NAME.match(name)) else None for name in names]
    if None in splits:
        return names
    wanted = [name for name, there in zip(names, splits, strict=True) if there == split]
    if names and not wanted:
        there = ", ".join(sorted({name for name in splits if name}))
        raise UserError(f"{source}: no file of split '{split}'; there are {there} (set split, or name the file)")
    return wanted


def _llama_factory(folder: Path, subset: str | None) -> tuple[Rows, Path, str, Mapping[str, str] | None]:
    """Open the preference set that a ``dataset_info.json`` describes, as :func:`open_files` yields it."""
    file = folder / "dataset_info.json"
    ranked = _ranked_entries(file)
    if not ranked:
        raise UserError(f'{file}: no entry with "ranking": true; name the pair file itself if there is one')
    if subset is None and len(ranked) > 1:
        raise UserError(f"{file}: several preference sets; choose one with subset: {', '.join(ranked)}")
    name = subset or next(iter(ranked))
    if name not in ranked:
        raise UserError(f"{file}: no preference set '{name}'; there are {', '.join(ranked)}")
    entry = ranked[name]
    if entry.get("formatting", "alpaca") != "sharegpt":
        raise UserError(f"{file}: '{name}' is not in sharegpt formatting; name its file and map it with data.columns")
    if "file_name" not in entry:
        raise UserError(f"{file}: '{name}' has no file_name; download it first")
    tags = {key: tag for key, tag in (entry.get("tags") or {}).items() if tag is not None}
    if other_tags := [key for key, tag in tags.items() if LLAMA_FACTORY_TAGS.get(key) != tag]:
        raise UserError(f"{file}: '{name}' has tags other than LLaVA's ({', '.join(other_tags)}); convert it first")
    given = {key: column for key, column in (entry.get("columns") or {}).items() if column is not None}
    columns = {"conversations": given.pop("messages", "conversations"), **given}
    data = folder / entry["file_name"]
    if not data.is_file():
        raise UserError(f"{file}: '{name}' names {data}, which is not there")
    [rows] = _open_alike([data])
    with contextlib.suppress(BadRow, IndexError):
        columns |= {"id": "id"} if "id" in rows[0] else {}
    return rows, folder, "llama-factory", columns


def _ranked_entries(file: Path) -> dict[str, Any]:
    """Read the preference sets of a ``dataset_info.json``, by name."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        ranked = {name: entry for name, entry in entries.items() if entry.get("ranking")}
        for entry in ranked.values():
            columns, tags = (entry.get(key) or {} for key in ("columns", "tags"))
            texts = [entry.get("file_name", ""), *columns.values(), *tags.values()]
            if not all(isinstance(text, str) for text in texts if text is not None):
                raise ValueError("file_name, columns and tags must be names")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a readable dataset_info.json ({error})") from None
    return ranked
