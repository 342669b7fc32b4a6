"""Turn the tables of other tools into a benchmark's own files, which its own reader reads: one way to ask a question.

What is made lies in the user's cache folder: rows as JSON lines, pictures as files. The next time it is found there.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vapr.cache import file_identity, user_cache, written_whole
from vapr.data.text_rows import PICTURES
from vapr.errors import BadRow, UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.readers.pictures import LONGEST_INDEX, UNNAMED, encoded, resolve, save, several
from vapr.evaluation.readers.shape import Row, Shape, as_text
from vapr.evaluation.readers.tables import Table
from vapr.evaluation.scoring.prediction import Question

VERSION = 1
"""Raised when what is made of a table changes, so that older files in the cache are not taken for it."""


def questions_of_table(table: Table, shape: Shape, benchmark: Benchmark, *, pictures: bool) -> list[Question]:
    """Read the questions of a table.

    Args:
        table: of ``shape``.
        shape: names of its columns.
        benchmark: whose questions these are.
        pictures: whether pictures are to be written as files, which scoring does not need.

    Raises:
        UserError: naming the row that cannot be used.
    """
    known = f"{VERSION} {benchmark.name} {shape.title} {pictures} {_identity(table)}"
    folder = user_cache() / "benchmarks" / f"{benchmark.name}-{hashlib.sha256(known.encode()).hexdigest()[:24]}"
    done = folder / "places.json"
    if not done.is_file():
        places = write_own_files(table, shape, folder, pictures=pictures)
        with written_whole(done) as file:
            file.write(json.dumps(places).encode())
    return read_own_files(folder, json.loads(done.read_text()), shape, benchmark)


def questions_of_answers(table: Table, shape: Shape, benchmark: Benchmark) -> list[tuple[str, Question]]:
    """Return the questions that a table's answers are to, as far as its rows tell, each with the place of its row.

    A row of VLMEvalKit's POPE answers the same question in up to three splits, and makes as many.

    Raises:
        UserError: naming the row that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = write_own_files(table, shape, Path(folder), pictures=False)
        questions = read_own_files(Path(folder), places, shape, benchmark)
    where = [place for name, file in places.items() if name not in shape.beside for place in file]
    if len(where) != len(questions):
        raise UserError(f"{table.path}: {len(where):,} rows make {len(questions):,} questions of {benchmark.title}")
    return list(zip(where, questions, strict=True))


def write_own_files(table: Table, shape: Shape, folder: Path, *, pictures: bool) -> dict[str, list[str]]:
    """Write a table's questions as the benchmark's own files.

    Returns:
        The place in the table of each line, by name of the file.
    """
    parts: Sequence[Table] = getattr(table, "parts", [table])
    rows = [row for part in parts for row in _without_pictures(part, shape, folder if pictures else None)]
    lines: dict[str, list[tuple[str, Row]]] = {}
    for where, row in rows:
        try:
            for name, own in shape.rows(row):
                lines.setdefault(name, []).append((where, own))
        except KeyError as error:
            raise UserError(f"{where}: no column {error}; {shape.title} has {', '.join(shape.needs)}") from None
        except (BadRow, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: not a row of {shape.title}: {error}") from None
    for name, found in lines.items():
        with written_whole(folder / name) as file:
            file.write(_text([own for _, own in found], shape.form).encode(errors="replace"))
    return {name: [where for where, _ in lines[name]] for name in sorted(lines, key=shape.order)}


def _text(rows: Sequence[Row], form: str) -> str:
    """Return the content of one of the authors' files."""
    if form == "tabs":
        cells = ([" ".join(str(value).split()) for value in row.values()] for row in rows)
        return "".join("\t".join(row) + "\n" for row in cells)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "[" + ",\n".join(texts) + "]\n" if form == "list" else "".join(f"{text}\n" for text in texts)


def read_own_files(folder: Path, places: dict[str, list[str]], shape: Shape, benchmark: Benchmark) -> list[Question]:
    """Read what :func:`write_own_files` wrote with the benchmark's own reader; what that refuses is named as it was."""
    if not places:
        return []
    (first, *others) = places
    at = folder if others or "/" in first or shape.form == "tabs" else folder / first
    try:
        return benchmark.read(at)
    except UserError as error:
        text = str(error)
        for name, where in places.items():
            line = re.compile(rf"{re.escape(str(folder / name))}(?::|, row )(\d+)")
            text = line.sub(lambda found, where=where: where[int(found[1]) - 1], text)  # type: ignore[misc]
            text = text.replace(str(folder / name), where[0].rpartition(":")[0])
        raise UserError(text.replace(str(folder), next(iter(places.values()))[0].rpartition(":")[0])) from None


def _without_pictures(table: Table, shape: Shape, folder: Path | None) -> list[tuple[str, Row]]:
    """Return the rows with the paths of their pictures, from ``folder`` on, written there if it is not None."""
    rows: list[tuple[str, Row]] = []
    own: dict[str, list[str]] = {}
    pointers: dict[str, tuple[str, str]] = {}
    pointing: list[tuple[Row, str, str]] = []
    seen: set[str] = set()
    for number, (where, row) in enumerate(table):
        index = as_text(row.get("index"))
        if index and index in seen:
            raise UserError(f"{where}: index {index} stands twice in {table.path}; keep one of the two")
        seen.add(index)
        for column in shape.pictures:
            held = row.get(column)
            short = held.strip() if isinstance(held, str) and len(held.strip()) <= LONGEST_INDEX else ""
            if short and index and not short.lower().endswith(PICTURES):
                pointers[index] = (short, where)
                pointing.append((row, column, index))
                continue
            if short or (column == "image" and column not in row):
                paths = _beside(table.path, short or row.get("image_path"))
            else:
                paths = _saved(row, column, f"{table.path.stem}-{index or number}", shape, folder, where)
            row[column] = _one_or_list(paths)
            if paths and index:
                own[index] = paths
        rows.append((where, row))
    found = resolve(own, pointers)
    for row, column, index in pointing:
        row[column] = _one_or_list(found[index])
    return rows


def _saved(row: Row, column: str, key: str, shape: Shape, folder: Path | None, where: str) -> list[str]:
    """Return the paths of a field's pictures, written under ``folder`` if it is not None."""
    paths = []
    for number, one in enumerate(several(row.get(column))):
        if isinstance(one, dict) and not one.get("bytes"):
            if one.get("path"):
                paths.append(str(one["path"]))
            continue
        name = shape.name(row, column, number) if shape.name else f"pictures/{UNNAMED}{_plain(key)}-{column}-{number}"
        if folder is not None:
            save(encoded(one, f"{where}: '{column}'"), folder / name)
        paths.append(name)
    return paths


def _beside(table: Path, given: object) -> list[str]:
    """Return the files that ``image_path`` names: whole, beside the table, or where VLMEvalKit puts pictures."""
    stem = table.stem.removesuffix("_local")
    paths = []
    for name in map(str, several(given)):
        places = [Path(name), table.parent / name, table.parent / "images" / stem / name]
        paths.append(str(next((place for place in places if place.is_file()), places[1]).absolute()))
    return paths


def _one_or_list(paths: Sequence[str]) -> str | list[str]:
    """Return one path as such, several as a list, none as an empty text."""
    return list(paths) if len(paths) > 1 else "".join(paths)


def _plain(key: str) -> str:
    """Return a key as the name of a file."""
    return re.sub(r"[^\w.-]", "_", key)[:100]


def _identity(table: Table) -> str:
    """Return a text that changes with the content of a table."""
    if parts := getattr(table, "parts", None):
        return "|".join(map(_identity, parts))
    return str(getattr(table, "digest", None) or file_identity(table.path))
