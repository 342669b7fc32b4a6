"""Rows as people have them: keys that are null, more columns, unequal shards, tables of other libraries, JSON in text."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.data.test_formats import ROWS
from tests.editing.edit_command import GOOD, edit, scan_of
from tests.editing.edit_command import pairs_of as edited_pairs
from vapr.cli import main
from vapr.data.convert import convert
from vapr.data.sources import read_pairs
from vapr.editing.config import SourceConfig as EditSource
from vapr.editing.rules.turns import InstructionData
from vapr.errors import BadRow, UserError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets.disable_progress_bars()

QUESTION, CHOSEN, REJECTED = "What is it?", "A red bus.", "A blue bus."
PROMPT = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},)


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (40, 56), "red").save(tmp_path / "big.png")
    return tmp_path


@pytest.fixture
def png(folder) -> bytes:
    return (folder / "big.png").read_bytes()


def write(folder: Path, rows: list, kind: str) -> Path:
    """The rows as JSON, or as the datasets library writes them: there every row has every key, null where it had none."""
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return file


def text_of(completion: tuple) -> str:
    return completion[-1]["content"][-1]["text"]


def assert_read(pair) -> None:
    assert pair.prompt == PROMPT and [image.name for image in pair.images] == ["big.png"]
    assert (text_of(pair.chosen), text_of(pair.rejected)) == (CHOSEN, REJECTED)


def turn(role: str, content: object, **more) -> dict:
    """A turn with keys of both customs: those of the other are null."""
    return {"from": None, "value": None, "role": role, "content": content, "loss": None, **more}


def talk(role: str, value: str) -> dict:
    return {"role": None, "content": None, "tool_calls": None, "from": role, "value": value}


PICTURES = {"images": ["big.png"]}
PARTS = [
    {"type": "image", "text": None, "image": None, "index": 0},
    {"type": "text", "text": QUESTION, "image": None, "index": None},
]
HALF_NULL = {
    "trl": {**PICTURES, "prompt": [turn("user", PARTS)], "chosen": [turn("assistant", CHOSEN)], "rejected": [turn("assistant", REJECTED)]},
    "trl, all in both": {**PICTURES, "prompt": None, "chosen": [turn("user", QUESTION), turn("assistant", CHOSEN)], "rejected": [turn("user", QUESTION), turn("assistant", REJECTED)]},
    "ms-swift": {**PICTURES, "messages": [turn("user", f"<image>{QUESTION}"), turn("assistant", CHOSEN)], "rejected_response": REJECTED, "rejected_messages": None},
    "ms-swift, messages": {**PICTURES, "messages": [turn("user", f"<image>{QUESTION}"), turn("assistant", CHOSEN)], "rejected_messages": [turn("user", f"<image>{QUESTION}"), turn("assistant", REJECTED)]},
    "llama-factory": {**PICTURES, "conversations": [talk("human", f"<image>{QUESTION}")], "chosen": talk("gpt", CHOSEN), "rejected": talk("gpt", REJECTED), "system": None},
    "llama-factory, roles": {**PICTURES, "conversations": [turn("user", f"<image>{QUESTION}")], "chosen": turn("assistant", CHOSEN), "rejected": turn("assistant", REJECTED)},
    "povid": {"image": "big.png", "conversations": [talk("human", f"<image>\n{QUESTION}"), talk("gpt", CHOSEN)], "rejected_conversations": [talk("human", f"<image>\n{QUESTION}"), talk("gpt", REJECTED)], "rejected": None},
    "llava": {"image": "big.png", "conversations": [talk("human", f"<image>\n{QUESTION}"), talk("gpt", CHOSEN)], "rejected": REJECTED, "rejected_conversations": None, "chosen": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", HALF_NULL)
def test_a_null_key_is_an_absent_one(folder, name, kind):
    [pair] = read_pairs(write(folder, [HALF_NULL[name]], kind))
    assert_read(pair)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_null_key_is_an_absent_one_in_mapped_columns(folder, kind):
    row = {
        "q": [turn("user", f"<image>{QUESTION}")],
        "a": CHOSEN,
        "b": [turn("assistant", REJECTED)],
        "pic": "big.png",
        "image": None,
    }
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "images": "pic"}  # fmt: skip
    [pair] = read_pairs(write(folder, [row], kind), columns=columns)
    assert_read(pair)


EDITED = {
    "messages": {**PICTURES, "messages": [turn("user", f"<image>{QUESTION}"), turn("assistant", CHOSEN)], "conversations": None},
    "parts": {**PICTURES, "messages": [turn("user", PARTS), turn("assistant", [{"type": "text", "text": CHOSEN, "image": None}])]},
    "conversations": {"image": "big.png", "conversations": [talk("human", f"<image>\n{QUESTION}"), talk("gpt", CHOSEN)], "messages": None},
    "prompt": {**PICTURES, "prompt": [turn("user", QUESTION)], "answer": turn("assistant", CHOSEN), "chosen": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("name", EDITED)
def test_a_null_key_is_an_absent_one_in_instruction_data(folder, name, kind):
    [[read]] = [InstructionData(str(write(folder, [EDITED[name]], kind)), EditSource()).turns(0)]
    assert (read.prompt, read.answer) == (PROMPT, CHOSEN) and [image.name for image in read.images] == ["big.png"]


def test_a_null_id_of_a_tar_sample_is_an_absent_one(folder, png):
    import tarfile

    row = {"id": None, "prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, data in (("a.json", json.dumps(row).encode()), ("a.png", png)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    [pair] = read_pairs(folder / "s.tar")
    assert pair.id == "a" and pair.images == (png,)


ROW = {**PICTURES, "prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize(
    "more",
    [
        {"idx": 3}, {"ids": [1, 2]}, {"subcategory": "x"}, {"weighted": True}, {"weights": 2}, {"categories": ["a"]},
        {"edit": 1}, {"promt": "x"}, {"chosen_": 1}, {"rejected_text": 1}, {"chosen_messages_": [1]}, {"imges": 2},
        {"n_images": 1}, {"": 1}, {"provenances": None, "x": {"deep": [None]}},
    ],
    ids=str,
)  # fmt: skip
def test_more_columns_never_stop_a_run(folder, more):
    (folder / "rows.jsonl").write_text(json.dumps({**ROW, **more}))
    pairs = read_pairs(folder / "rows.jsonl")
    assert_read(pairs[0])
    assert pairs.unused == Counter({key: 1 for key, value in more.items() if value is not None and key != "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": None, "rejectd": REJECTED}, "unknown key 'rejectd'; did you mean 'rejected'?"),
        ({"chosen": None, "choosen": CHOSEN}, "unknown key 'choosen'; did you mean 'chosen'?"),
        ({"prompt": None, "promt": QUESTION}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"images": None, "imges": ["big.png"]}, "unknown key 'imges'; did you mean 'images'?"),
        ({"images": None, "image1": "big.png"}, "unknown key 'image1'; did you mean 'images'?"),
    ],
    ids=str,
)
def test_a_near_miss_of_a_needed_key_that_is_missing_is_an_error(folder, changes, message):
    (folder / "rows.jsonl").write_text(json.dumps({**ROW, **changes}))
    with pytest.raises(UserError, match=rf"rows.jsonl:1: {message}".replace("?", r"\?")):
        read_pairs(folder / "rows.jsonl")


def test_rows_without_images_may_count_them(folder):
    (folder / "rows.jsonl").write_text(json.dumps({**ROW, "images": None, "n_images": 0}))
    assert read_pairs(folder / "rows.jsonl")[0].images == ()


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def shown(*arguments: object) -> dict:
    return json.loads(CliRunner().invoke(main, [*map(str, arguments), "--json"]).stdout)


def test_unused_columns_are_counted_and_named_once_in_every_command(folder, tiny):
    rows = [{**ROW, "id": str(n), "chosen": f"{CHOSEN} {n}", "idx": n} for n in range(2)]
    rows[1]["weighted"] = True
    rows.append({**ROW, "id": "2", "provenance": {"editor": "rules"}})
    file = write(folder, rows, "jsonl")
    (folder / "run.yaml").write_text(
        json.dumps({
            "run_dir": str(folder / "run"),
            "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", "lora": {"rank": 2}},
            "data": {"train": str(file), "workers": 0},
            "optim": {"max_steps": 1, "pairs_per_step": 2},
            "reference": {"cache_dir": str(folder / "reference")},
        })
    )  # fmt: skip
    told = "columns that no pair uses: idx (2 rows), weighted (1 row)"
    for arguments in (
        ("train", folder / "run.yaml"),
        ("data", folder / "run.yaml"),
        ("audit", file, "--out", folder / "a.html"),
        ("view", file, "--out", folder / "v.html"),
    ):
        code, output = invoke(*arguments)
        assert code in (0, 1) and " ".join(output.split()).count(told) == 1, output
    assert shown("data", folder / "run.yaml")["train"]["unused_columns"] == {
        "idx": 2,
        "weighted": 1,
    }
    audited = shown("audit", file)["sets"]
    assert [one["unused_columns"] for one in audited.values()] == [{"idx": 2, "weighted": 1}]
    code, output = invoke("convert", file, "--to", "trl", "--out", folder / "out.jsonl")
    assert code == 0 and "lost       'idx' of 2 pairs" in output and told not in output


def test_unused_columns_of_some_of_the_rows_say_so(folder):
    rows = [{**ROW, "id": str(n), "idx": n, f"more{n}": n} for n in range(40)]
    pairs = read_pairs(write(folder, rows, "jsonl"))
    told = ", ".join(["idx (40 rows)", *sorted(f"more{n} (1 row)" for n in range(40))][:10])
    assert pairs.notes == [f"columns that no pair uses: {told} and 31 more"]
    pairs.check(2)
    [line] = pairs.notes
    assert line.startswith("columns that no pair uses among the 3 rows checked: idx (3 rows), more0 (1 row), more1 (1")


def test_unused_columns_of_instruction_data_are_counted(folder):
    rows = [{**row, "image": "big.png", "idx": n} for n, row in enumerate(GOOD)]
    rows[0]["subcategory"] = "count"
    code, _ = edit(write(folder, rows, "jsonl"))
    assert code == 0 and scan_of(folder)["unused_columns"] == {"idx": 2, "subcategory": 1}
    assert len(edited_pairs(folder)) == 2
    result = CliRunner().invoke(main, ["edit", str(folder / "rows.jsonl"), "--out", str(folder / "out")])
    assert "not used    columns idx (2 rows), subcategory (1 row)" in result.stdout


def shard(folder: Path, name: str, rows: list, schema: dict | None = None) -> None:
    table = pa.Table.from_pylist(rows, pa.schema(schema) if schema else None)
    parquet.write_table(table, folder / name)


TEXTS = {"prompt": pa.string(), "chosen": pa.string(), "rejected": pa.string()}
PAIR = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("images", None, pa.null()), ("images", ["big.png"], pa.list_(pa.string()))),
        (("images", ["big.png"], pa.list_(pa.string())), ("images", None, pa.null())),
        (("category", None, pa.null()), ("category", "object", pa.string())),
        (("weight", 2, pa.int64()), ("weight", 0.5, pa.float64())),
        (("category", "object", pa.dictionary(pa.int32(), pa.string())), ("category", "count", pa.large_string())),
        (("images", "big.png", pa.string()), ("images", ["big.png"], pa.list_(pa.string()))),
        (("images", [{"bytes": b"x", "path": None}], pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))), ("images", {"path": "big.png"}, pa.struct({"path": pa.string()}))),
        (("idx", 1, pa.int64()), ("source", "coco", pa.string())),
    ],
    ids=str,
)  # fmt: skip
def test_shards_of_unequal_schemas_are_one_set(folder, first, second):
    (folder / "shards").mkdir()
    for place, (key, value, kind) in zip(("0", "1"), (first, second), strict=True):
        schema = TEXTS | {"id": pa.string(), key: kind}
        shard(folder / "shards", f"{place}.parquet", [{**PAIR, "id": place, key: value}], schema)
    (folder / "shards" / "big.png").write_bytes((folder / "big.png").read_bytes())
    pairs = read_pairs(folder / "shards")
    told = [pair.where for pair in pairs]
    assert told == [f"{folder}/shards/0.parquet:1", f"{folder}/shards/1.parquet:1"]
    for pair, (key, value, _) in zip(pairs, (first, second), strict=True):
        assert pair.chosen[0]["content"][0]["text"] == CHOSEN
        assert len(pair.images) == (key == "images" and value is not None)
        assert (pair.weight, pair.category) == ({"weight": value}.get(key, 1.0), {"category": value}.get(key))


def test_a_mapped_column_may_be_missing_from_some_of_the_shards(folder):
    shard(folder, "0.parquet", [{"q": QUESTION, "a": CHOSEN, "b": REJECTED}])
    shard(folder, "1.parquet", [{"q": QUESTION, "a": CHOSEN, "b": REJECTED, "kind": "count"}])
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "category": "kind"}
    assert [pair.category for pair in read_pairs(f"{folder}/*.parquet", columns=columns)] == [None, "count"]
    with pytest.raises(UserError, match=r"data.columns.images: .*parquet has no column 'pic'; there are a, b, kind, q"):
        read_pairs(f"{folder}/*.parquet", columns={**columns, "images": "pic"})


def test_the_damaged_shard_is_the_one_that_is_named(folder):
    for n in range(3):
        shard(folder, f"{n}.parquet", [{**PAIR, "id": f"{n}-{m}", "chosen": f"{CHOSEN} {m}"} for m in range(200)])
    whole = bytearray((folder / "1.parquet").read_bytes())
    whole[4:400] = bytes(396)
    (folder / "1.parquet").write_bytes(whole)
    with pytest.raises(UserError, match=r"1.parquet: cannot be read as a table"):
        read_pairs(f"{folder}/*.parquet")


def test_tables_with_json_features_are_decoded_as_the_library_decodes_them(folder):
    """Message parts that are dicts of different keys: datasets stores them as JSON text and says so in the schema."""
    row = {**PICTURES, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
           "chosen": [{"role": "assistant", "content": [{"type": "text", "text": CHOSEN}]}],
           "rejected": [{"role": "assistant", "content": REJECTED}]}  # fmt: skip
    write(folder, [row, row], "jsonl")
    read = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder))
    assert "Json" in str(read.features), "this version of datasets has no such feature; the test means nothing"
    read.to_parquet(folder / "table.parquet")
    read.save_to_disk(folder / "saved")
    for source in (folder / "table.parquet", folder / "saved"):
        pairs = read_pairs(source, image_root=folder)
        assert pairs.raw(0) == read[0]
        for pair in pairs:
            assert_read(pair)


def test_what_is_no_json_in_such_a_column_is_a_bad_row(folder):
    texts = pa.array([json.dumps([turn("user", QUESTION)]), "[{"], pa.string())
    column = pa.ExtensionArray.from_storage(pa.json_(), texts)
    answers = [pa.array([text] * 2) for text in (CHOSEN, REJECTED)]
    parquet.write_table(pa.table([column, *answers], ["prompt", "chosen", "rejected"]), folder / "rows.parquet")
    pairs = read_pairs(folder / "rows.parquet", on_bad_row="skip")
    assert len(list(pairs)) == 1
    [reason] = pairs.skipped.values()
    assert reason.startswith(f"{folder}/rows.parquet:2: 'prompt' holds what is not readable as JSON (")


def test_tables_of_json_without_the_librarys_notes(folder):
    storage = pa.array([json.dumps([turn("user", PARTS)])], pa.string())
    column = pa.ExtensionArray.from_storage(pa.json_(), storage)
    texts = [pa.array([text]) for text in (CHOSEN, REJECTED)]
    table = pa.table([column, *texts, pa.array([["big.png"]])], ["prompt", "chosen", "rejected", "images"])
    parquet.write_table(table, folder / "rows.parquet")
    assert_read(read_pairs(folder / "rows.parquet")[0])


RLHF_V = {
    "ds_name": "RLHF-V", "image": {"bytes": None, "path": "big.png"},
    "text": json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}),
    "origin_dataset": "VQAv2", "origin_split": '{"model": "Muffin", "type": "question answering"}', "idx": 7,
    "image_path": "x/big.png",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rlhf_v(folder, kind):
    pairs = read_pairs(write(folder, [RLHF_V], kind))
    assert pairs.sets[0].format == "rlhf-v" and pairs[0].id == "7"
    assert_read(pairs[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "'text' must be a JSON object with question, chosen and rejected, got 'no JSON'"),
        ("[1]", "'text' must be a JSON object with question, chosen and rejected"),
        ('{"question": "?"}', "'chosen' and 'rejected' are missing from 'text'; it has question"),
        ("[" * 100_000, "'text' must be a JSON object"),
        (json.dumps({"question": 7, "chosen": "A", "rejected": "B"}), "'prompt' must be text or a list of messages, got 7"),
    ],
    ids=["text", "list", "half", "deep", "number"],
)  # fmt: skip
def test_bad_rows_of_rlhf_v(folder, text, message):
    file = write(folder, [RLHF_V, {**RLHF_V, "text": text}], "jsonl")
    with pytest.raises(UserError, match="rows.jsonl:2: ") as error:
        read_pairs(file)
    assert message in str(error.value) and len(str(error.value)) < 400


def test_columns_go_down_into_json_text(folder):
    row = {"text": RLHF_V["text"], "pic": "big.png", "meta": '{"a": [{"b": "{\\"kind\\": \\"colour\\"}"}]}'}
    columns = {"prompt": "text.question", "chosen": "text.chosen", "rejected": "text.rejected", "images": "pic"}
    file = write(folder, [row], "jsonl")
    [pair] = read_pairs(file, columns={**columns, "category": "meta.a.0.b.kind"})
    assert_read(pair)
    assert pair.category == "colour"
    with pytest.raises(UserError, match=r"data.columns.prompt: .* has no column 'text.ask'; there are meta, pic, text"):
        read_pairs(file, columns={**columns, "prompt": "text.ask"})
    asked = EditSource(columns={"question": "text.question", "answer": "text.chosen", "images": "pic"})
    [read] = InstructionData(str(file), asked).turns(0)
    assert (read.prompt, read.answer) == (PROMPT, CHOSEN)


def said(role: str, *parts: dict) -> dict:
    return {"role": role, "content": list(parts), "loss_weight": 1.0 if role == "assistant" else 0.0}


def value(text: str, kind: str = "text") -> dict:
    return {"type": kind, "value": text}


ASKED = said("user", value("big.png", "image_url"), value(QUESTION))
V1 = {
    "chosen_messages": [said("system", value("Be brief.")), ASKED, said("assistant", value(CHOSEN))],
    "rejected_messages": [said("system", value("Be brief.")), ASKED, said("assistant", value(REJECTED))],
}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_llama_factorys_newer_shape(folder, kind):
    pairs = read_pairs(write(folder, [V1], kind))
    assert pairs.sets[0].format == "llama-factory-v1" and not pairs.unused
    [pair] = pairs
    assert pair.prompt == ({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *PROMPT)
    assert [image.name for image in pair.images] == ["big.png"]
    assert (text_of(pair.chosen), text_of(pair.rejected)) == (CHOSEN, REJECTED)


def test_llama_factorys_newer_shape_is_written_as_it_was_read(folder):
    (folder / "rows.jsonl").write_text(json.dumps({**V1, "id": "1"}))
    result = convert(read_pairs(folder / "rows.jsonl"), "llama-factory-v1", folder / "out.jsonl")
    assert json.loads((folder / "out.jsonl").read_text()) == {"id": "1", **V1}
    assert result["lost"] == {} and not (folder / "dataset_info.json").exists()


def test_llama_factorys_newer_shape_holds_other_images_for_the_rejected_side(folder):
    Image.new("RGB", (40, 56), "blue").save(folder / "other.png")
    other = said("user", value("other.png", "image_url"), value(QUESTION))
    row = {"id": "1", **V1, "rejected_messages": [V1["chosen_messages"][0], other, V1["chosen_messages"][2]]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    [pair] = read_pairs(folder / "rows.jsonl")
    assert pair.chosen == pair.rejected and pair.rejected_images == (folder / "other.png",)
    convert(read_pairs(folder / "rows.jsonl"), "llama-factory-v1", folder / "out.jsonl")
    assert json.loads((folder / "out.jsonl").read_text()) == row


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"loss_weight": 0.5}, "'rejected_messages' gives an answer the loss_weight 0.5; vapr scores answers whole"),
        ({"loss_weight": 0}, "'rejected_messages' gives an answer the loss_weight 0; vapr scores answers whole"),
        ({"content": [value("x", "video_url")]}, "'rejected_messages' holds a part of type 'video_url'"),
        ({"content": [{"type": "text", "value": None}]}, "'rejected_messages' holds a part of type 'text' without a value"),
        ({"content": [7]}, "'rejected_messages' holds a part that is no object: 7"),
        ({"role": "tool"}, "holds role 'tool'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rows_of_llama_factorys_newer_shape(folder, last, message):
    bad = {**V1, "rejected_messages": [*V1["rejected_messages"][:-1], {**V1["rejected_messages"][-1], **last}]}
    with pytest.raises(UserError, match="rows.jsonl:2: ") as error:
        read_pairs(write(folder, [V1, bad], "jsonl"))
    assert message in str(error.value)


def test_completions_of_several_turns_do_not_fit_llama_factorys_newer_shape(folder):
    two = [
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "C."},
    ]
    (folder / "rows.jsonl").write_text(json.dumps({**ROW, "chosen": two}))
    with pytest.raises(UserError, match="a completion of several turns does not fit this format"):
        convert(read_pairs(folder / "rows.jsonl"), "llama-factory-v1", folder / "out.jsonl")


def test_columns_of_types_that_the_library_cannot_hold_do_no_harm_until_they_are_needed(folder):
    pairs = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
    texts = {key: pa.array([text] * 2) for key, text in PAIR.items()}
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, b"y" * 16], pa.binary(16)))
    parquet.write_table(pa.table({**texts, "counts": pairs, "key": ids}), folder / "rows.parquet")
    read = read_pairs(folder / "rows.parquet")
    assert [text_of(pair.chosen) for pair in read] == [CHOSEN] * 2 and read.unused == {"counts": 2, "key": 2}
    parquet.write_table(pa.table({**texts, "id": ids}), folder / "rows.parquet")
    with pytest.raises(
        UserError, match=r"'id' must be text, got <extension<arrow.uuid>, which the datasets library can"
    ):
        read_pairs(folder / "rows.parquet")


ODD = [
    None, "", 0, -1, True, 1.5, 10**30, [], {}, [None], [[]], [{}], {"a": None}, {"": 1}, "x", "<image>", "\ud83d",
    '{"a": 1}', "null", "a" * 5_000, ["x", None], [{"role": "user", "content": "x"}], {"role": "assistant"},
    {"from": 7, "value": "x"}, [{"type": "image_url", "value": []}], {"bytes": "x", "path": 3}, ["\x00"], [[[[[[[]]]]]]],
]  # fmt: skip
"""What stands in the place of something else in people's files."""


def places(value: object, place: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, inner in inside for deeper in places(inner, (*place, key)))]


def with_odd(row: dict, place: tuple, odd: object) -> object:
    if not place:
        return odd
    copy = json.loads(json.dumps(row))
    node = copy
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = odd
    return copy


def odd_rows(row: dict) -> list:
    return [with_odd(row, place, odd) for place in places(row) for odd in ODD]


def assert_one_line(reason: str, place: str) -> None:
    assert reason.startswith(f"{place}: ") and "\n" not in reason and len(reason) < len(place) + 400


PLAIN_ROWS = {name: row for name, row in ROWS.items() if name != "rlaif-v"} | {
    "rlaif-v": {**ROWS["rlaif-v"], "image": {"bytes": None, "path": "cat.png"}}
}


@pytest.mark.parametrize("name", PLAIN_ROWS)
def test_an_odd_value_anywhere_is_a_pair_or_a_counted_row(folder, name):
    shutil.copy(folder / "big.png", folder / "cat.png")
    file = write(folder, odd_rows(PLAIN_ROWS[name]), "jsonl")
    for how in (
        {"format": name},
        {},
        {"columns": {"prompt": "question.a", "chosen": "chosen.0.content", "images": "0"}},
    ):
        try:
            pairs = read_pairs(file, on_bad_row="skip", **how)
        except UserError as error:  # a column that no row has
            assert "columns" in how and "has no column" in str(error)
            continue
        assert len(list(pairs)) + len(pairs.skipped) == len(pairs) > 100
        for place, reason in pairs.skipped.items():
            assert_one_line(reason, place)
        assert len(pairs.image_groups()) == len(pairs)


@pytest.mark.parametrize("name", EDITED)
def test_an_odd_value_anywhere_is_a_turn_or_a_counted_row_of_instruction_data(folder, name):
    data = InstructionData(str(write(folder, odd_rows(EDITED[name]), "jsonl")), EditSource())
    kept = 0
    for number in range(len(data)):
        try:
            kept += bool([turn.digests() for turn in data.turns(number)]) and data.extra_keys(number) is not None
        except BadRow as error:
            assert_one_line(str(error), data.where(number))
    assert kept > 10
