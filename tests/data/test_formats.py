"""Every format in its exact shape: told apart, read, trained on for a step, written back equal."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vapr.config import Config, SourceConfig
from vapr.data.convert import convert
from vapr.data.formats import detect
from vapr.data.pair import PreferencePair
from vapr.data.sources import open_sets, read_pairs
from vapr.data.writers import WRITER_NAMES, WRITERS
from vapr.errors import UserError
from vapr.format_names import FORMAT_NAMES
from vapr.training import trainer

QUESTION, CHOSEN, REJECTED = "What animal is this?", "A grey cat.", "A grey dog."


def said(text: str, rating: object, model: str) -> dict:
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {
        "model": model,
        "response": text,
        "annotations": {aspect: {"Rating": rating, "Rationale": "..."} for aspect in aspects},
    }


HUMAN = {"from": "human", "value": f"<image>\n{QUESTION}"}
ROWS = {
    "vapr": {
        "id": "1", "images": ["cat.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        "chosen": CHOSEN, "rejected": REJECTED,
        "edits": [{"start": 7, "end": 10, "from": "cat", "to": "dog"}], "category": "object",
    },
    "trl": {
        "images": ["cat.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": CHOSEN}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": REJECTED}]}],
    },
    "llava": {"id": "1", "image": "cat.png", "conversations": [HUMAN, {"from": "gpt", "value": CHOSEN}], "rejected": REJECTED},
    "povid": {
        "id": "1", "image": "cat.png",
        "conversations": [HUMAN, {"from": "gpt", "value": CHOSEN}],
        "rejected_conversations": [HUMAN, {"from": "gpt", "value": REJECTED}],
    },
    "ha-dpo": {"image_id": "cat", "question": QUESTION, "chosen": CHOSEN, "reject": REJECTED, "answer": "yes", "correct": False},
    "seva": {"chosen": CHOSEN, "reject": REJECTED, "question": QUESTION, "image_id": "cat.png"},
    "rlaif-v": {
        "ds_name": "RLAIF-V", "image": {"bytes": b"<png>", "path": "cat.png"}, "question": QUESTION, "chosen": CHOSEN,
        "rejected": REJECTED, "origin_dataset": "COCO", "origin_split": '{"model": "x", "type": "question"}', "idx": 1,
        "image_path": "cat.png",
    },
    "rlhf-v": {
        "ds_name": "RLHF-V", "image": {"bytes": None, "path": "cat.png"}, "idx": 1, "image_path": "cat.png",
        "text": json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}),
        "origin_dataset": "VQAv2", "origin_split": '{"model": "Muffin", "type": "question answering"}',
    },
    "vlfeedback": {
        "id": "1", "prompt": QUESTION, "models": ["a", "b", "c"], "img_path": "cat.png",
        "completions": [said("A cat?", "3", "a"), said(REJECTED, 1, "b"), said(CHOSEN, "5", "c"), said("", "1", "d")],
    },
    "llama-factory": {
        "conversations": [HUMAN], "chosen": {"from": "gpt", "value": CHOSEN}, "rejected": {"from": "gpt", "value": REJECTED},
        "images": ["cat.png"],
    },
    "llama-factory-v1": {
        f"{side}_messages": [
            {"role": "user", "loss_weight": 0.0, "content": [{"type": "image_url", "value": "cat.png"}, {"type": "text", "value": QUESTION}]},
            {"role": "assistant", "loss_weight": 1.0, "content": [{"type": "text", "value": answer}]},
        ]
        for side, answer in (("chosen", CHOSEN), ("rejected", REJECTED))
    },
    "ms-swift": {
        "messages": [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": CHOSEN}],
        "rejected_response": REJECTED, "images": ["cat.png"],
    },
    "mm-rlhf": {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED, "image": "cat.png", "chosen_score": 4.5},
    "mmpr": {"image": "cat.png", "question": f"<image>\n{QUESTION}", "chosen": CHOSEN, "rejected": REJECTED},
}  # fmt: skip


@pytest.fixture(scope="session")
def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 56), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, png) -> Path:
    (tmp_path / "cat.png").write_bytes(png)
    return tmp_path


def write(folder: Path, name: str, row: dict, png: bytes) -> Path:
    """A file with one row, in the container the format usually has."""
    if name == "rlaif-v":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        row = {**row, "image": {**row["image"], "bytes": png}}
        parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "rows.parquet")
        return folder / "rows.parquet"
    listed = name in ("llava", "povid", "ha-dpo", "seva", "llama-factory")
    file = folder / f"{name}{'.json' if listed else '.jsonl'}"
    file.write_text(json.dumps([row] if listed else row))
    return file


def content(pair: PreferencePair) -> dict:
    """What is trained on, images by content."""
    images = [i if isinstance(i, bytes) else i.read_bytes() for i in pair.images]
    fields = ("prompt", "chosen", "rejected", "weight", "edits", "category")
    others = pair.rejected_images
    shown = None if others is None else [i if isinstance(i, bytes) else i.read_bytes() for i in others]
    return {"images": images, "rejected_images": shown, **{name: getattr(pair, name) for name in fields}}


def test_there_is_a_row_of_every_format():
    assert set(ROWS) == set(FORMAT_NAMES)


@pytest.mark.parametrize("name", ROWS)
def test_told_apart_and_read(folder, png, name):
    file = write(folder, name, ROWS[name], png)
    [part] = open_sets(SourceConfig(path=str(file)))
    assert part.format == name and detect(ROWS[name]) == name
    [pair] = read_pairs(file)
    assert pair.prompt == ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},)
    assert pair.chosen == ({"role": "assistant", "content": [{"type": "text", "text": CHOSEN}]},)
    assert pair.rejected == ({"role": "assistant", "content": [{"type": "text", "text": REJECTED}]},)
    assert content(pair)["images"] == [png]


def config_for(tiny, data: object, tmp_path: Path, **changes) -> Config:
    raw = {
        "run_dir": str(tmp_path / "run"),
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": data, "workers": 0},
        "optim": {"pairs_per_step": 4, "max_steps": 1},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    return Config.parse({**raw, **changes})


@pytest.mark.parametrize("name", ROWS)
def test_trained_on_for_a_step_and_written_back_equal(folder, png, tiny, tmp_path, name):
    file = write(folder, name, ROWS[name], png)
    config = config_for(tiny, str(file), tmp_path)
    trainer.train(config)
    [entry] = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert entry["pairs"] == 1 and entry["loss"] == pytest.approx(0.6931, abs=1e-3)
    before = read_pairs(file)
    to = name if name in WRITER_NAMES else "vapr"
    in_tables = ".parquet" in WRITERS[to].suffixes
    out = folder / "out" / f"rows{'.parquet' if in_tables else WRITERS[to].suffixes[0]}"
    result = convert(before, to, out)
    after = read_pairs(out)
    assert [content(pair) for pair in after] == [content(pair) for pair in before]
    assert after.sets[0].format == (to if to != "trl" else "vapr")  # a TRL row with an id reads either way
    lost = {"ha-dpo": {"answer": 1}, "vlfeedback": {"models": 1}, "mm-rlhf": {"chosen_score": 1}}
    lost["rlhf-v"] = dict.fromkeys(("ds_name", "origin_dataset", "origin_split"), 1)
    assert result["written"] == 1 and result["lost"] == lost.get(name, {})


def message(role: str, *parts: str) -> dict:
    return {
        "role": role,
        "content": [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in parts],
    }


WIDE = {
    "id": "wide", "images": ["cat.png", "cat.png"],
    "prompt": [
        message("system", "Be brief."), message("user", "First:\n", "<image>", "then", "<image>", " which?"),
        message("assistant", "The second."), message("user", "Why?"),
    ],
    "chosen": [message("assistant", "It is\nclearer.")], "rejected": [message("assistant", "It is\nlarger.")],
}  # fmt: skip


@pytest.mark.parametrize(("to", "suffix"), [("vapr", ".jsonl"), ("vapr", ".json"), ("vapr", ".parquet"), ("trl", ".jsonl"), ("llama-factory", ".json"), ("llama-factory-v1", ".jsonl"), ("ms-swift", ".jsonl")])  # fmt: skip
def test_wide_rows_survive_every_writer_that_takes_them(folder, to, suffix):
    (folder / "in.jsonl").write_text(json.dumps(WIDE))
    pairs = read_pairs(folder / "in.jsonl")
    convert(pairs, to, folder / f"out{suffix}")
    assert [content(p) for p in read_pairs(folder / f"out{suffix}")] == [content(p) for p in pairs]


def test_what_a_format_cannot_hold_is_refused_or_counted(folder):
    (folder / "in.jsonl").write_text("\n".join(json.dumps(row) for row in (WIDE, {**ROWS["vapr"], "weight": 2})))
    with pytest.raises(UserError, match=r"in.jsonl:1: povid rows show one image; this pair has 2; --on-bad-row skip"):
        convert(read_pairs(folder / "in.jsonl"), "povid", folder / "out.json")
    assert not list(folder.glob("out*"))
    result = convert(read_pairs(folder / "in.jsonl", on_bad_row="skip"), "povid", folder / "out.json")
    assert result["written"] == 1 and list(result["skipped"]) == [f"{folder}/in.jsonl:1"]
    assert result["lost"] == {"weight": 1, "edits": 1, "category": 1}


def test_images_in_bytes_become_files_beside_a_text_file(folder, png):
    rows = read_pairs(write(folder, "rlaif-v", ROWS["rlaif-v"], png))
    assert convert(rows, "ms-swift", folder / "out.jsonl")["images"] == 1
    [row] = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert row["images"][0].startswith("out_images/") and (folder / row["images"][0]).read_bytes() == png


def test_converting_leaves_the_prompts_text_as_it_was(folder):
    (folder / "in.jsonl").write_text(json.dumps(ROWS["ms-swift"]))
    for to, key in (("ms-swift", "messages"), ("llama-factory", "conversations"), ("povid", "conversations")):
        convert(read_pairs(folder / "in.jsonl"), to, folder / f"{to}.json")
        [row] = json.loads((folder / f"{to}.json").read_text())
        first = row[key][0].get("content", row[key][0].get("value"))
        assert first == (f"<image>\n{QUESTION}" if to == "povid" else f"<image>{QUESTION}")  # LLaVA's own custom


def test_llama_factory_finds_the_written_file(folder):
    (folder / "in.jsonl").write_text(json.dumps(ROWS["vapr"]))
    convert(read_pairs(folder / "in.jsonl"), "llama-factory", folder / "lf" / "mine.json")
    info = json.loads((folder / "lf" / "dataset_info.json").read_text())
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    assert info == {"mine": {"file_name": "mine.json", "formatting": "sharegpt", "ranking": True, "columns": columns}}
    (folder / "lf" / "cat.png").write_bytes(b"any")
    [part] = open_sets(SourceConfig(path=str(folder / "lf")))
    assert part.format == "llama-factory" and part.as_vapr(0)["chosen"] == {"from": "gpt", "value": CHOSEN}


def test_dataset_info_with_columns_of_its_own(folder):
    row = {
        "talk": [HUMAN],
        "good": {"from": "gpt", "value": CHOSEN},
        "bad": {"from": "gpt", "value": REJECTED},
        "pics": ["cat.png"],
    }
    (folder / "mine.json").write_text(json.dumps([row]))
    columns = {"messages": "talk", "chosen": "good", "rejected": "bad", "images": "pics"}
    entry = {"file_name": "mine.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {"file_name": "x.json"}}))
    [pair] = read_pairs(folder)
    assert pair.chosen[0]["content"][0]["text"] == CHOSEN and len(pair.images) == 1
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "more": entry}))
    with pytest.raises(UserError, match=r"several preference sets; choose one with subset: mine, more"):
        read_pairs(folder)
    assert len(read_pairs(folder, subset="more")) == 1


def test_columns_map_anything(folder, png):
    row = {
        "meta": {"n": 7},
        "ask": f"{QUESTION}\n<image>",
        "answers": [{"text": CHOSEN}, {"text": REJECTED}],
        "pic": "cat.png",
    }
    (folder / "in.jsonl").write_text(json.dumps(row))
    columns = {
        "id": "meta.n",
        "prompt": "ask",
        "chosen": "answers.0.text",
        "rejected": "answers.1.text",
        "images": "pic",
    }
    [pair] = read_pairs(folder / "in.jsonl", columns=columns)
    assert pair.id == "7" and pair.prompt == (message("user", QUESTION, "<image>"),)
    assert content(pair)["images"] == [png]
    with pytest.raises(
        UserError,
        match=r"data.columns.images: .*in.jsonl has no column 'picture'; there are answers, ask, meta, pic .leave",
    ):
        read_pairs(folder / "in.jsonl", columns={**columns, "images": "picture"})


def test_a_row_without_a_preference_is_skipped_and_counted_even_where_bad_rows_are_errors(folder):
    rows = [{**ROWS["ha-dpo"], "correct": True}, ROWS["ha-dpo"]]
    (folder / "in.json").write_text(json.dumps(rows))
    pairs = read_pairs(folder / "in.json")
    assert len(list(pairs)) == 1
    assert pairs.skipped == {f"{folder}/in.json:1": f"{folder}/in.json:1: no preference: marked correct"}
    tied = {**ROWS["vlfeedback"], "completions": [said("A.", "4", "a"), said("B.", "4", "b"), said("C.", "N/A", "c")]}
    (folder / "tied.jsonl").write_text(json.dumps(tied))
    assert list(read_pairs(folder / "tied.jsonl")) == []


def test_the_mean_of_the_ratings_that_are_there_decides(folder):
    half = said("Half-rated.", "5", "x")
    half["annotations"]["Helpfulness"]["Rating"] = "N/A"
    half["annotations"]["Visual Faithfulness"]["Rating"] = "2"  # (5 + 2) / 2 = 3.5
    row = {**ROWS["vlfeedback"], "completions": [said("Three.", "3", "a"), half, said("Four.", "4", "b")]}
    as_columns = {key: [completion[key] for completion in row["completions"]] for key in row["completions"][0]}
    for completions in (row["completions"], as_columns):  # a list of structs may come as a struct of lists
        (folder / "in.jsonl").write_text(json.dumps({**row, "completions": completions}))
        [pair] = read_pairs(folder / "in.jsonl")
        assert [m[0]["content"][0]["text"] for m in (pair.chosen, pair.rejected)] == ["Four.", "Three."]


def test_ha_dpo_descriptions_are_the_cross_product(folder):
    (folder / "123.jpg").write_bytes(b"any")
    (folder / "desc_data.json").write_text(json.dumps({"123": {"chosen": ["A.", "B."], "rejected": ["C.", "D."]}}))
    pairs = list(read_pairs(folder / "desc_data.json"))
    texts = [(p.chosen[0]["content"][0]["text"], p.rejected[0]["content"][0]["text"]) for p in pairs]
    assert texts == [("A.", "C."), ("A.", "D."), ("B.", "C."), ("B.", "D.")]
    assert all(pair.images == (folder / "123.jpg",) and pair.prompt[0]["content"][1]["text"] for pair in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"rejected_response": [{"role": "assistant", "content": REJECTED}]},
        {"rejected_response": None, "rejected_messages": [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": REJECTED}]},
    ],
    ids=["as messages", "as a conversation"],
)  # fmt: skip
def test_ms_swift_rejects_in_several_ways(folder, changes):
    (folder / "in.jsonl").write_text(json.dumps({**ROWS["ms-swift"], **changes}))
    [pair] = read_pairs(folder / "in.jsonl")
    assert pair.prompt == (message("user", "<image>", QUESTION),) and pair.rejected == (message("assistant", REJECTED),)


def test_rejected_images_are_trained_on_and_written_back(folder, tiny, tmp_path):
    """The same answer, true of one picture and not of the other: only the image tells the sides apart."""
    Image.new("RGB", (56, 40), "red").save(folder / "other.png")
    row = {key: value for key, value in ROWS["ms-swift"].items() if key != "rejected_response"}
    (folder / "in.jsonl").write_text(json.dumps({**row, "rejected_images": ["other.png"]}))
    [pair] = read_pairs(folder / "in.jsonl")
    assert pair.chosen == pair.rejected and pair.rejected_images == (folder / "other.png",)
    config = config_for(tiny, str(folder / "in.jsonl"), tmp_path)
    trainer.train(config)
    [entry] = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert entry["logps/chosen"] != entry["logps/rejected"]
    convert(read_pairs(folder / "in.jsonl"), "ms-swift", folder / "out.jsonl")
    assert [content(p) for p in read_pairs(folder / "out.jsonl")] == [content(pair)]
    with pytest.raises(UserError, match="no place for 'rejected_images'"):
        convert(read_pairs(folder / "in.jsonl"), "llama-factory", folder / "out.json")


def test_webdataset_shards(folder, png):
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for key in ("a", "b"):
            row = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
            for name, data in (
                (f"x/{key}.json", json.dumps(row).encode()),
                (f"x/{key}.0.png", png),
                (f"x/{key}.1.png", png[::-1]),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pairs = list(read_pairs(folder / "shard-000.tar"))
    assert [pair.id for pair in pairs] == ["x/a", "x/b"]
    assert all(pair.images == (png, png[::-1]) for pair in pairs)
    (folder / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"bad.tar: not a readable tar file"):
        read_pairs(folder / "bad.tar")


def test_arrow_files_saved_sets_and_hub_shards(folder, png):
    datasets = pytest.importorskip("datasets")
    row = {
        "id": "1",
        "images": [{"bytes": png, "path": None}],
        "prompt": QUESTION,
        "chosen": CHOSEN,
        "rejected": REJECTED,
    }
    data = datasets.Dataset.from_list([row, {**row, "id": "2"}])
    data.save_to_disk(folder / "saved")
    assert [pair.id for pair in read_pairs(folder / "saved")] == ["1", "2"]
    arrow = next((folder / "saved").glob("*.arrow"))
    assert [pair.images for pair in read_pairs(arrow)] == [(png,), (png,)]
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(folder / "dict")
    assert [pair.id for pair in read_pairs(folder / "dict", split="test")] == ["2"]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        read_pairs(folder / "dict", split="dev")
    (folder / "hub").mkdir()
    data.to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    data.to_parquet(folder / "hub" / "test-00000-of-00001.parquet")
    assert len(read_pairs(folder / "hub")) == 2  # not the test rows
    assert len(read_pairs(f"{folder}/hub/*.parquet")) == 4 or len(read_pairs(f"{folder}/hub/*.parquet")) == 2


def test_placeholders_in_answers_are_not_images(folder):
    (folder / "in.jsonl").write_text(json.dumps({**ROWS["vapr"], "chosen": "Write <image> here.", "edits": None}))
    with pytest.raises(UserError, match="stands in a text, where this format would take it for an image"):
        convert(read_pairs(folder / "in.jsonl"), "ms-swift", folder / "out.jsonl")


PLAIN = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize("changes", [{"image": "cat.png"}, {"images": [], "image": "cat.png"}, {"images": ["cat.png"], "image": "cat.png"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["vapr", "trl", "povid", "mmpr", "mm-rlhf", "ms-swift", "vlfeedback", "llama-factory"])
def test_no_format_drops_an_image(folder, name, changes):
    row = {key: value for key, value in ROWS[name].items() if key not in ("images", "image", "img_path")}
    (folder / "in.jsonl").write_text(json.dumps({**row, **changes}))
    assert [pair.images for pair in read_pairs(folder / "in.jsonl", format=name)] == [(folder / "cat.png",)]


def test_two_kinds_of_images_are_no_guess(folder):
    (folder / "in.jsonl").write_text(json.dumps({**PLAIN, "images": ["cat.png"], "image": "dog.png"}))
    with pytest.raises(UserError, match="both 'images' and 'image' hold images; leave one out"):
        read_pairs(folder / "in.jsonl")


@pytest.mark.parametrize("name", ["trl", "mmpr", "rlaif-v", "ms-swift", "povid", "mm-rlhf"])
def test_rows_with_a_video_are_refused(folder, name):
    (folder / "in.jsonl").write_text(json.dumps({**ROWS[name], "image": None, "videos": ["a.mp4"]}))
    with pytest.raises(UserError, match=r"in.jsonl:1: 'videos' rows are not supported"):
        read_pairs(folder / "in.jsonl", format=name)


def test_columns_with_a_format_rename_its_keys_and_keep_the_rest(folder):
    row = {key: value for key, value in ROWS["mmpr"].items() if key != "question"}
    (folder / "in.jsonl").write_text(json.dumps({**row, "ask": QUESTION}))
    [pair] = read_pairs(folder / "in.jsonl", format="mmpr", columns={"question": "ask"})
    assert pair.images == (folder / "cat.png",)


def test_images_of_globbed_files_start_at_each_files_own_folder(folder, png):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(png)
        (folder / name / "p.jsonl").write_text(json.dumps({**PLAIN, "images": ["1.png"]}))
    assert [pair.images[0].parent.name for pair in read_pairs(f"{folder}/*/p.jsonl")] == ["a", "b"]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_images_of_a_tar_sample_keep_the_rows_order_or_that_of_their_numbers(folder, png):
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.json", json.dumps({**PLAIN, "images": ["a.y.png", "a.x.png"]}).encode())
        add(tar, "a.x.png", b"x")
        add(tar, "a.y.png", b"y")
        add(tar, "b.json", json.dumps(PLAIN).encode())
        for number in (0, 1, 10, 2):
            add(tar, f"b.{number}.png", str(number).encode())
        add(tar, "c.json", json.dumps({**ROWS["seva"], "image_id": "9"}).encode())
        add(tar, "c.png", png)
    assert [pair.images for pair in read_pairs(folder / "s.tar", format="trl", on_bad_row="skip")[:2]] == [
        (b"y", b"x"),
        (b"0", b"1", b"2", b"10"),
    ]
    assert read_pairs(folder / "s.tar", format="seva", on_bad_row="skip")[2].images == (png,)


def test_a_tar_sample_without_a_row_is_one_bad_row(folder, png):
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png)
        add(tar, "b.json", json.dumps(PLAIN).encode())
    with pytest.raises(UserError, match="s.tar:1: sample 'a' needs one .json member"):
        read_pairs(folder / "s.tar")
    assert [pair.id for pair in read_pairs(folder / "s.tar", on_bad_row="skip")] == ["b"]


def test_splits_are_not_mixed(folder):
    for name in ("train", "test"):
        (folder / f"{name}-00000-of-00001.jsonl").write_text(json.dumps({**PLAIN, "id": name}))
    assert [pair.id for pair in read_pairs(folder)] == ["train"]
    assert [pair.id for pair in read_pairs(folder, split="test")] == ["test"]
    with pytest.raises(UserError, match="no file of split 'validation'; there are test, train"):
        read_pairs(folder, split="validation")


def test_a_parquet_file_written_again_within_its_time_is_read_again(tmp_path):
    import os

    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for text in ("old", "new"):
        parquet.write_table(pa.Table.from_pylist([{**PLAIN, "chosen": text}]), tmp_path / "p.parquet")
        os.utime(tmp_path / "p.parquet", (1, 1))
        [pair] = read_pairs(tmp_path / "p.parquet")
        assert pair.chosen[0]["content"][0]["text"] == text


def test_other_peoples_columns_that_resemble_ours_are_no_mistake(folder):
    (folder / "in.jsonl").write_text(
        json.dumps({**PLAIN, "id": "1", "prompt_id": "x", "chosen_score": 3, "weights": 1})
    )
    assert read_pairs(folder / "in.jsonl").unused == {"prompt_id": 1, "chosen_score": 1, "weights": 1}
    (folder / "in.jsonl").write_text(json.dumps({**PLAIN, "id": "1", "ids": [1], "prompt_id": "x", "chosen_ids": [2]}))
    assert len(list(read_pairs(folder / "in.jsonl"))) == 1


def test_keys_that_convert_cannot_carry_are_counted(folder):
    (folder / "in.jsonl").write_text(json.dumps({**PLAIN, "id": "1", "provenance": {"a": 1}, "licence": "MIT"}))
    lost = convert(read_pairs(folder / "in.jsonl"), "vapr", folder / "out.jsonl")["lost"]
    assert lost == {"provenance": 1, "licence": 1}
