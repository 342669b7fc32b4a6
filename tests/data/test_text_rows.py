"""Rows by number: the index of a text file, streams of JSON, and what happens when a file changes under it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vapr.cache import user_cache
from vapr.data import text_rows as rows
from vapr.data.text_rows import open_rows
from vapr.errors import BadRow, UserError


@pytest.fixture
def index_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache() / "index"


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"n": 1}\n\n  \n{"n": 2}\r\n{"n": "3 \xc3\xa9"}'
    )  # BOM, blank lines, CRLF, no last newline
    read = open_rows(file)
    assert [read[n] for n in range(len(read))] == [{"n": 1}, {"n": 2}, {"n": "3 é"}]
    assert [read.where(n) for n in range(3)] == [f"{file}:1", f"{file}:4", f"{file}:5"]


def test_a_file_is_scanned_once(tmp_path, index_folder, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n{"n": 2}\n')
    digest = open_rows(file).digest
    assert len(list(index_folder.glob("*.npy"))) == 1
    monkeypatch.setattr(rows, "array", None)  # what a scan would need
    assert open_rows(file).digest == digest and len(open_rows(file)) == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(index_folder.parents[1]))
    file.write_text('{"n": 1}\n{"n": 3}\n{"n": 4}\n')  # changed: scanned again
    assert len(open_rows(file)) == 3 and open_rows(file).digest != digest


def test_the_digest_is_the_contents_not_the_names(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"n": 1}\n')
    assert open_rows(tmp_path / "a.jsonl").digest == open_rows(tmp_path / "b.jsonl").digest


def test_a_damaged_index_is_built_again(tmp_path, index_folder):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n{"n": 2}\n')
    open_rows(file)
    [index] = index_folder.glob("*.npy")
    index.write_bytes(index.read_bytes()[:50])
    assert open_rows(file)[1] == {"n": 2}


def test_rows_stay_on_disk(tmp_path, index_folder):
    """What is held of a file is a memory map of 24 bytes a row."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n' * 1000)
    read = open_rows(file)
    assert isinstance(read._index, np.memmap) and read._index.nbytes == 24 * 1000


def test_a_file_cut_short_while_it_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n{"n": 2}\n')
    read = open_rows(file)
    os.truncate(file, 12)
    assert read[0] == {"n": 1}
    with pytest.raises(UserError, match=r"a.jsonl: was cut short while it was being read; restore it") as error:
        read[1]
    assert not isinstance(error.value, BadRow)  # not one row's fault: skipping bad rows must not hide it


def test_a_list_of_rows_is_read_piece_by_piece(tmp_path, monkeypatch):
    values = [{"n": n, "text": 'é"]},[{' * n, "deep": [[{"x": [n]}]]} for n in range(300)]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(values, indent=2, ensure_ascii=False).encode())
    monkeypatch.setattr(json, "load", None)
    read = open_rows(tmp_path / "a.json")
    assert [read[n] for n in range(len(read))] == values
    assert read.where(7) == f"{tmp_path}/a.json:8"


def test_parquet_files_are_one_table(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table_rows = pytest.importorskip("vapr.data.table_rows")
    for name, values in (("a", [1, 2]), ("b", [3]), ("c", [4, 5])):
        parquet.write_table(pa.table({"n": values}), tmp_path / f"{name}.parquet", row_group_size=1)
    read = table_rows.open_table(sorted(tmp_path.glob("*.parquet")))
    assert [read[n]["n"] for n in range(len(read))] == [1, 2, 3, 4, 5]
    assert [read.where(n).rsplit("/", 1)[1] for n in range(5)] == [
        "a.parquet:1",
        "a.parquet:2",
        "b.parquet:1",
        "c.parquet:1",
        "c.parquet:2",
    ]


def test_an_index_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cache/vapr/index/.*: cannot be written"):
        open_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n,\n]', "a.json:3: not valid JSON"),
        ('[{"a": 1} {"b": 2}]', "a.json:1: not valid JSON (expected ',' or ']' at column 11)"),
        ('[{"a": 1},', "a.json:1: not valid JSON"),
        ('[{"a": "\n"}]', "a.json:1: not valid JSON (Invalid control character"),
        ("[" * 100_000, "a.json:1: maximum recursion depth exceeded"),
        ("[" + "9" * 5000 + "]", "a.json:1: Exceeds the limit"),
    ],
    ids=["comma at the end", "no comma", "no end", "control character", "deep", "huge number"],
)
def test_a_broken_list_is_named_by_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        open_rows(tmp_path / "a.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_list_holds_whatever_json_holds(tmp_path):
    text = '[ {"a": NaN, "b": 18446744073709551616, "c": "\\ud83d"} , 7, [ ] ]\n'
    (tmp_path / "a.json").write_text(text)
    first, *rest = [open_rows(tmp_path / "a.json")[n] for n in range(3)]
    assert first["b"] == 2**64 and first["c"] == "\ud83d" and first["a"] != first["a"] and rest == [7, []]


def test_a_damaged_copy_of_a_list_is_made_again(tmp_path, index_folder):
    (tmp_path / "a.json").write_text(json.dumps([{"n": n} for n in range(10)]))
    open_rows(tmp_path / "a.json")
    [copy] = index_folder.glob("*.jsonl")
    copy.write_text('{"n": 0}\n')
    assert len(open_rows(tmp_path / "a.json")) == 10


def test_elements_longer_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 7)
    values = [{"text": "x" * n} for n in range(40)] + [12345678901234, "a", None]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1))
    read = open_rows(tmp_path / "a.json")
    assert [read[n] for n in range(len(read))] == values
