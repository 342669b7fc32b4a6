"""What each writer makes of a pair, that it reads back equal, and what it refuses."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from vapr.cli import main
from vapr.data.convert import convert
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.data.sources import read_pairs
from vapr.data.writers import WRITER_NAMES, WRITERS
from vapr.errors import UserError

IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def message(role: str, *parts: dict) -> dict:
    return {"role": role, "content": list(parts)}


SHOWN = {
    "id": "shown", "images": ["cat.png"],
    "prompt": [message("user", IMAGE, text("Which colour?\n"))],
    "chosen": [message("assistant", text("It is\nred."))],
    "rejected": [message("assistant", text("It is\n“blue”."))],
}  # fmt: skip
TOLD = {**SHOWN, "id": "told", "images": [], "prompt": [message("user", text("Which colour has the sky?"))]}
LONG = {
    **SHOWN,
    "id": "long",
    "prompt": [*SHOWN["prompt"], message("assistant", text("Why?")), message("user", text("So."))],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (56, 40), "red").save(tmp_path / "cat.png")
    Image.new("RGB", (56, 40), "blue").save(tmp_path / "dog.png")
    return tmp_path


def pairs_of(folder: Path, *rows: dict) -> Pairs:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(folder / "in.jsonl")


def content(pair: PreferencePair) -> dict:
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in pair.images]
    return {"images": images, **{key: getattr(pair, key) for key in ("id", "prompt", "chosen", "rejected")}}


@pytest.mark.parametrize(("to", "suffix"), [(to, suffix) for to in WRITER_NAMES for suffix in WRITERS[to].suffixes])
def test_every_writer_is_read_back_equal(folder, to, suffix):
    rows = [SHOWN] if to == "rlaif-v" else [SHOWN, TOLD, LONG]
    before = pairs_of(folder, *rows)
    out = folder / "out" / f"rows{suffix}"
    assert convert(before, to, out) == {"written": len(rows), "skipped": {}, "lost": {}, "images": 0}
    assert [content(pair) for pair in read_pairs(out)] == [content(pair) for pair in before]


def test_a_llava_row(folder):
    assert convert(pairs_of(folder, LONG), "llava", folder / "out.json")["written"] == 1
    assert json.loads((folder / "out.json").read_text()) == [
        {
            "id": "long",
            "image": "cat.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?\n"},
                {"from": "gpt", "value": "Why?"},
                {"from": "human", "value": "So."},
                {"from": "gpt", "value": "It is\nred."},
            ],
            "rejected": "It is\n“blue”.",
        }
    ]


def test_an_rlaif_v_table_through_the_datasets_library(folder):
    datasets = pytest.importorskip("datasets")
    convert(pairs_of(folder, {**SHOWN, "category": "colour"}), "rlaif-v", folder / "out" / "rows.parquet")
    table = datasets.load_dataset(
        "parquet", data_files=str(folder / "out" / "rows.parquet"), split="train", cache_dir=str(folder / "cache")
    )
    [row] = table
    assert json.loads(row.pop("origin_split")) == {"id": "shown", "category": "colour"}
    assert row == {
        "ds_name": "vapr", "image": {"bytes": (folder / "cat.png").read_bytes(), "path": "cat.png"},
        "question": "Which colour?\n", "chosen": "It is\nred.", "rejected": "It is\n“blue”.", "origin_dataset": "",
        "idx": 0, "image_path": "cat.png",
    }  # fmt: skip
    assert table.column_names == [
        "ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path",
    ]  # fmt: skip
    picture = table.cast_column("image", datasets.Image())[0]["image"]
    assert picture.size == (56, 40) and picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_an_rlaif_v_line_names_its_image(folder):
    convert(pairs_of(folder, SHOWN), "rlaif-v", folder / "out.jsonl")
    row = json.loads((folder / "out.jsonl").read_text())
    assert row["image"] == {"bytes": None, "path": "cat.png"} and row["image_path"] == "cat.png"


def test_rlaif_v_keeps_id_and_category(folder):
    convert(pairs_of(folder, {**SHOWN, "category": "colour"}), "rlaif-v", folder / "out.parquet")
    [pair] = read_pairs(folder / "out.parquet")
    assert (pair.id, pair.category) == ("shown", "colour")


def test_rlaif_v_rows_keep_what_they_say_of_their_origin(folder):
    origin = {
        "ds_name": "RLAIF-V", "origin_dataset": "COCO", "origin_split": '{"model": "x", "type": "question"}', "idx": 7,
        "image_path": "./RLAIF-V_7.jpg",
    }  # fmt: skip
    row = {"image": {"path": "cat.png"}, "question": "What?", "chosen": "A.", "rejected": "B.", **origin}
    convert(pairs_of(folder, row), "rlaif-v", folder / "out.jsonl")
    written = json.loads((folder / "out.jsonl").read_text())
    assert {key: written[key] for key in origin} == origin


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ({"ds_name": "mine", "origin_split": '{"model": "x"}', "idx": 3}, {}),
        ({"ds_name": 1, "origin_split": "train", "idx": "003"}, {"ds_name": 1, "origin_split": 1, "idx": 1}),
        ({"idx": 2**63, "image_path": "\ud800.jpg", "licence": "MIT"}, {"idx": 1, "image_path": 1, "licence": 1}),
        ({"idx": True, "origin_split": "[1]"}, {"idx": 1, "origin_split": 1}),
    ],
    ids=["kept", "of other types", "not to be written", "no object"],
)
def test_an_origin_that_rlaif_v_cannot_hold_is_counted(folder, said, lost):
    assert convert(pairs_of(folder, {**SHOWN, **said}), "rlaif-v", folder / "out.parquet")["lost"] == lost
    row = read_pairs(folder / "out.parquet").raw(0)
    assert row["ds_name"] == ("mine" if said.get("ds_name") == "mine" else "vapr")
    assert row["idx"] == (3 if said["idx"] == 3 else 0)
    assert json.loads(row["origin_split"])["id"] == "shown"


PLACED = [message("user", text("See "), IMAGE, text("here: what is it?"))]
SYSTEM = [message("system", text("Be brief.")), *SHOWN["prompt"]]
TWO = {"images": ["cat.png", "dog.png"], "prompt": [message("user", IMAGE, IMAGE, text("Same?"))]}
TURNS = {
    "rejected": [message("assistant", text("No.")), message("user", text("No?")), message("assistant", text("Yes."))]
}


@pytest.mark.parametrize(
    ("to", "changes", "line"),
    [
        ("rlaif-v", TWO, "rlaif-v rows show one image; this pair has 2"),
        ("rlaif-v", {"images": [], "prompt": TOLD["prompt"]}, "rlaif-v rows show one image; this pair has 0"),
        ("rlaif-v", {"prompt": LONG["prompt"]}, "rlaif-v rows hold one question; this pair's prompt has 3 turns"),
        ("rlaif-v", {"prompt": SYSTEM}, "rlaif-v rows have no system turn"),
        ("rlaif-v", {"prompt": PLACED}, "rlaif-v rows show their image before the question"),
        ("rlaif-v", {"rejected_images": ["dog.png"]}, "rlaif-v rows have no place for 'rejected_images'"),
        ("rlaif-v", TURNS, "a completion of several turns does not fit this format"),
        ("rlaif-v", {"chosen": "An <image>."}, "'<image>' stands in a text"),
        ("llava", TWO, "llava rows show one image; this pair has 2"),
        ("llava", {"prompt": SYSTEM}, "llava rows have no system turn"),
        ("llava", {"rejected_images": ["dog.png"]}, "llava rows have no place for 'rejected_images'"),
        ("llava", TURNS, "a completion of several turns does not fit this format"),
        ("llava", {"rejected": "An <image>."}, "'<image>' stands in a text"),
        ("llama-factory", {"rejected": "A <video>."}, "'<video>' stands in a text"),
        ("ms-swift", {"prompt": [message("user", text("Hear <audio>"))]}, "'<audio>' stands in a text"),
    ],
)
def test_what_does_not_fit_is_refused_by_row(folder, to, changes, line):
    pairs = pairs_of(folder, SHOWN, {**SHOWN, "id": "2", **changes})
    out = folder / "out" / "rows.jsonl"
    with pytest.raises(UserError, match=f"in.jsonl:2: {line}.*--on-bad-row skip leaves such rows out"):
        convert(pairs, to, out)
    assert not list(out.parent.iterdir())
    pairs.on_bad_row = "skip"
    result = convert(pairs, to, out)
    assert result["written"] == 1 and list(result["skipped"]) == [f"{folder}/in.jsonl:2"]


def test_a_refused_row_leaves_no_image_behind(folder):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    Image.new("RGB", (56, 40)).save(file, "PNG")
    row = {**SHOWN, "images": [{"bytes": file.getvalue(), "path": None}], "chosen": "An <image>.", "rejected": "B."}
    parquet.write_table(pa.Table.from_pylist([row]), folder / "in.parquet")
    for to in ("llava", "povid", "rlaif-v", "llama-factory", "ms-swift"):
        suffix = WRITERS[to].suffixes[-1]
        with pytest.raises(UserError, match="stands in a text"):
            convert(read_pairs(folder / "in.parquet"), to, folder / to / f"rows{suffix}")
        assert not list((folder / to).iterdir())


def test_an_image_that_cannot_be_read_is_a_bad_row(folder, monkeypatch):
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    pairs = pairs_of(folder, SHOWN)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"in.jsonl:1: image '.*cat.png' cannot be read \(Permission denied\)"):
        convert(pairs, "rlaif-v", folder / "out.parquet")


EDITED = {
    "checks": [{"name": "length", "value": 0.5}],
    "source": {"id": "s1", "path": "llava.json"},
    "licence": "cc-by-4.0",
    "provenance": {"editor": "rules", "seed": 0},
}
EMPTY = {"checks": [], "source": {"id": None, "path": None}, "licence": None, "provenance": None}


@pytest.mark.parametrize("to", WRITER_NAMES)
def test_columns_of_structs_that_are_lost_are_counted(folder, to):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    in_tables = {**SHOWN, "images": [{"bytes": None, "path": "cat.png"}]}
    rows = [{**in_tables, **EDITED}, {**in_tables, "id": "2", **EMPTY}, {**in_tables, "id": "3", **EDITED}]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    for suffix in WRITERS[to].suffixes:
        result = convert(read_pairs(folder / "in.parquet"), to, folder / suffix / f"rows{suffix}")
        assert result["written"] == 3
        assert result["lost"] == {"checks": 2, "licence": 2, "provenance": 2, "source": 2}


@pytest.mark.parametrize("name", ["llava", "rlaif-v", "mapped"])
def test_columns_that_are_lost_are_counted_whatever_the_format(folder, name):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    more = {"source": "coco", "provenance": {"editor": "x"}, "category": "colour", "weight": 0.3, "nothing": None}
    row, columns, lost = {
        "llava": ({"image": "cat.png", "conversations": turns, "rejected": "B."}, None, set(more)),
        "rlaif-v": ({"image": {"path": "cat.png"}, "question": "Q?", "chosen": "A.", "rejected": "B."}, None, set(more)),
        "mapped": ({"pic": {"file": "cat.png"}, "q": "Q?", "chosen": "A.", "no": "B.", "score": 3},
                   {"images": "pic.file", "prompt": "q", "rejected": "no"}, {"source", "provenance", "score"}),
    }[name]  # fmt: skip
    (folder / "in.jsonl").write_text(json.dumps({**row, **more}))
    pairs = read_pairs(folder / "in.jsonl", columns=columns)
    assert convert(pairs, "vapr", folder / "out.jsonl")["lost"] == dict.fromkeys(lost - {"nothing"}, 1)


@pytest.mark.parametrize("to", ["llama-factory", "ms-swift", "llava"])
def test_line_breaks_beside_an_image_stay(folder, to):
    parts = [IMAGE, text(""), text("\nfoo\n"), text("\n\n"), text("")]
    before = pairs_of(folder, {**SHOWN, "prompt": [message("user", *parts)]})
    convert(before, to, folder / "out.json" if to != "ms-swift" else folder / "out.jsonl")
    [pair] = read_pairs(folder / ("out.json" if to != "ms-swift" else "out.jsonl"))
    assert pair.prompt[0]["content"] == [IMAGE, text("\nfoo\n\n\n")]


def test_povid_completions_that_begin_alike_are_refused(folder):
    first = [message("assistant", text("A.")), message("user", text("And?"))]
    row = {
        **TOLD,
        "chosen": [*first, message("assistant", text("B."))],
        "rejected": [*first, message("assistant", text("C."))],
    }
    with pytest.raises(UserError, match=r"in\.jsonl:1: povid takes what both sides begin with for the prompt"):
        convert(pairs_of(folder, row), "povid", folder / "out.json")


def test_an_id_beside_an_origin_that_has_one_is_kept(folder):
    row = {"id": "7", "idx": 7, "origin_split": '{"id": "x"}', "image": {"path": "cat.png"}, "question": "What?", "chosen": "A.", "rejected": "B."}  # fmt: skip
    convert(pairs_of(folder, row), "rlaif-v", folder / "out.jsonl")
    assert [pair.id for pair in read_pairs(folder / "out.jsonl")] == ["7"]


def test_a_failed_conversion_leaves_nothing_behind(folder):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture = {"bytes": (folder / "cat.png").read_bytes(), "path": None}
    rows = [{**SHOWN, "images": [picture]}, {**SHOWN, "id": "2", "images": [picture], "rejected": "An <image>."}]
    rows[0]["chosen"], rows[0]["rejected"], rows[1]["chosen"] = "A.", "B.", "A."
    parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    pairs = read_pairs(folder / "in.parquet", on_bad_row="skip")
    assert convert(pairs, "llava", folder / "good" / "rows.json")["images"] == 1
    with pytest.raises(UserError, match="stands in a text"):
        convert(read_pairs(folder / "in.parquet"), "llava", folder / "bad" / "rows.json")
    assert [file.name for file in (folder / "good").iterdir()] and not list((folder / "bad").iterdir())


@pytest.mark.parametrize(
    ("there", "line"),
    [
        ('{"rows": {"file_name": "other.json"}}', "describes a set 'rows' already"),
        ("[1]", "not an object of data sets"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_description_that_has_no_room_is_said_first(folder, there, line):
    pairs = pairs_of(folder, SHOWN)
    described = folder / "out" / "dataset_info.json"
    described.parent.mkdir()
    described.write_text(there) if there else described.mkdir()
    with pytest.raises(UserError, match=line):
        convert(pairs, "llama-factory", folder / "out" / "rows.json")
    assert list(described.parent.iterdir()) == [described] and (not there or described.read_text() == there)


def test_help_and_docs_name_every_format():
    helped = CliRunner().invoke(main, ["convert", "--help"], terminal_width=200).output
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = docs[docs.index("## Writing") : docs.index("## What cannot be used")]
    for name in WRITER_NAMES:
        assert name in helped
        assert f"| {name} | {', '.join(s[1:] for s in WRITERS[name].suffixes)} |" in table
