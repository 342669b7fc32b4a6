"""Readers: vapr rows and TRL rows in jsonl, json and parquet; one line for every bad row."""

import json
from pathlib import Path

import pytest

from vapr.data.pair import Edit
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError

ROW = {
    "id": "a",
    "images": ["cat.png"],
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}],
    "chosen": [{"role": "assistant", "content": "Red."}],
    "rejected": [{"role": "assistant", "content": "Blue."}],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "cat.png").write_bytes(b"any")
    return tmp_path


def read_one(folder: Path, row: dict, **options):
    write_pairs(folder / "pairs.jsonl", [row])
    [pair] = read_pairs(folder / "pairs.jsonl", **options)
    return pair


def text(messages) -> str:
    return "".join(part.get("text", "<image>") for message in messages for part in message["content"])


def test_a_vapr_row(folder):
    edits = [{"start": 0, "end": 3, "from": "Red", "to": "Blue"}]
    pair = read_one(folder, {**ROW, "weight": 0.5, "category": "colour", "edits": edits, "provenance": {"x": 1}})
    assert pair.id == "a" and pair.weight == 0.5 and pair.category == "colour"
    assert pair.images == (folder / "cat.png",)
    assert pair.edits == (Edit(0, 3, "Blue"),)
    assert pair.where.endswith("pairs.jsonl:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"chosen": "Red.", "rejected": "Blue."},  # answers as plain text
        {"prompt": "Q?"},  # a question as plain text; the image goes before it
        {"prompt": [{"role": "user", "content": "Q?"}]},  # no image part: placed before the first user text
        {"images": None, "image": "cat.png"},  # TRL's single image
        {"images": [{"path": "cat.png", "bytes": None}]},
    ],
    ids=str,
)
def test_shapes_that_mean_the_same(folder, changes):
    pair = read_one(folder, {key: value for key, value in {**ROW, **changes}.items() if value is not None})
    assert text(pair.prompt) == "<image>Q?"
    assert (text(pair.chosen), text(pair.rejected)) == ("Red.", "Blue.")
    assert pair.images == (folder / "cat.png",)


def test_trl_rows_with_the_prompt_inside_both_conversations(folder):
    row = {key: [*ROW["prompt"], *ROW[key]] for key in ("chosen", "rejected")}
    pair = read_one(folder, {**row, "images": ["cat.png"]})
    assert (text(pair.prompt), text(pair.chosen), text(pair.rejected)) == ("<image>Q?", "Red.", "Blue.")


def test_json_parquet_and_folders_read_alike(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]
    flat = {**ROW, "prompt": [{"role": "user", "content": parts}], "images": [{"bytes": b"abc", "path": None}]}
    (folder / "a").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([flat]), folder / "a" / "one.parquet")
    (folder / "a" / "two.json").write_text(json.dumps([{**ROW, "id": "b", "images": ["../cat.png"]}]))
    pairs = read_pairs(folder / "a")
    assert [pair.id for pair in pairs] == ["a", "b"]
    assert pairs[0].images == (b"abc",)
    assert pairs[0].prompt == pairs[1].prompt and pairs[0].chosen == pairs[1].chosen


def test_an_edit_runs_folder_is_read_from_its_pairs(folder):
    """Rejects and ledgers beside ``pairs/`` are no pairs; image paths start at the folder itself."""
    (folder / "pairs").mkdir()
    (folder / "rejects.jsonl").write_text('{"reason": "too long"}\n')
    write_pairs(folder / "pairs" / "x.jsonl", [ROW])
    pairs = read_pairs(folder)
    assert [pair.images for pair in pairs] == [(folder / "cat.png",)]


def test_null_means_absent(folder):
    row = {**ROW, "id": None, "weight": None, "edits": [{"start": 0, "end": 3, "from": None, "to": "Tan"}]}
    pair = read_one(folder, row)
    assert pair.weight == 1.0 and pair.edits == (Edit(0, 3, "Tan"),) and pair.id.endswith("pairs.jsonl:1")


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": ...}, "'chosen' is missing; a pair needs prompt, chosen and rejected"),
        ({"chosen": ..., "rejected": ...}, "'chosen' and 'rejected' are missing"),
        ({"prompt": ..., "chosen": "x", "rejected": "y"}, "'prompt' is missing"),
        ({"prompt": ...}, "do not begin with the same messages"),
        ({"chosen": "  "}, "'chosen' is empty"),
        ({"rejected": []}, "'rejected' must be text or a list of messages"),
        ({"chosen": 5}, "'chosen' must be text or a list of messages, got 5"),
        ({"rejected": ROW["chosen"]}, "chosen and rejected are the same text"),
        ({"chosen": user("x")}, "'chosen' must begin with an assistant message"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "'chosen' holds an image part"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}, "neither text nor image"),
        ({"prompt": [{"content": "x"}]}, "a message without role and content"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"prompt": user("a", "b")}, "user and assistant in turn and end with user, got user, user"),
        ({"prompt": [*ROW["prompt"], {"role": "assistant", "content": "x"}]}, "end with user"),
        ({"prompt": user([{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Q"}])}, "an image part with 'path'"),
        ({"prompt": user([{"type": "image"}, {"type": "image"}])}, "places 2 image(s) but the row has 1"),
        ({"images": []}, "places 1 image(s) but the row has 0"),
        ({"images": ["dog.png"]}, "image 'dog.png' not found"),
        ({"images": [7]}, "an image must be a path"),
        ({"id": ["a"]}, "'id' must be text"),
        ({"weight": -1}, "'weight' must be a number of at least 0, got -1"),
        ({"rejected": ..., "rejectd": "x"}, "unknown key 'rejectd'; did you mean 'rejected'?"),
        ({"weight": "heavy"}, "'weight' must be a number"),
        ({"edits": [{"start": 0, "end": 99, "to": "x"}]}, "within the chosen text"),
        ({"edits": [{"start": 0, "end": 3, "from": "Tan", "to": "x"}]}, "'from' is 'Tan' but the chosen text has 'Red'"),
        ({"edits": "Red"}, "'edits' must be a list, got 'Red'"),
        ({"edits": [{"start": 0.0, "end": 3.0, "to": "x"}]}, "an edit needs start, end and to"),
        ({"images": ["data:image/png;base64," + "A" * 5000]}, "is a URL; save it to a file first"),
        ({"prompt": user("<image>\nQ?")}, "'prompt' holds '<image>' as text; write an image part"),
        ({"chosen": "Red \ud83d"}, "'chosen' holds half a character"),
        ({"weight": 10**400}, "'weight' is too large"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rows_are_named(folder, changes, message):
    good = {**ROW, "id": "good"}
    bad = {key: value for key, value in {**ROW, **changes}.items() if value is not ...}
    (folder / "pairs.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")  # escapes as they come
    with pytest.raises(UserError) as error:
        read_pairs(folder / "pairs.jsonl")
    assert str(error.value).startswith(f"{folder}/pairs.jsonl:2: ")
    assert message in str(error.value) and "\n" not in str(error.value)
    pairs = read_pairs(folder / "pairs.jsonl", on_bad_row="skip")
    assert [pair.id for pair in pairs] == ["good"]
    assert list(pairs.skipped) == [f"{folder}/pairs.jsonl:2"] and message in pairs.skipped[f"{folder}/pairs.jsonl:2"]


def test_ids_are_unique(folder):
    write_pairs(folder / "pairs.jsonl", [ROW, ROW])
    with pytest.raises(UserError, match=r"pairs.jsonl:2: id 'a' was already used at .*pairs.jsonl:1"):
        read_pairs(folder / "pairs.jsonl")


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/hostname"])
def test_images_stay_inside_image_root(folder, outside):
    (folder / "inside").mkdir()
    (folder / "secret.png").write_bytes(b"x")
    write_pairs(folder / "pairs.jsonl", [{**ROW, "images": [outside]}])
    with pytest.raises(UserError, match=r"lies outside data\.image_root"):
        read_pairs(folder / "pairs.jsonl", image_root=folder / "inside")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id"', "a.jsonl:1: 'prompt' and"),
        ("a.jsonl", b'{"half": ', "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"\xff\xfe\x01\n", "a.jsonl:1: not UTF-8 text"),
        ("a.jsonl", b"", "no pairs in it"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: a row must be an object"),
        ("a.json", b'{"rows": []}', "one list of rows"),
        ("a.json", b'[\n{"id":\n', "a.json:3: not valid JSON"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.csv", b"x", "unknown file type"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.parquet, \.arrow, \.tar file there"):
        read_pairs(tmp_path)
