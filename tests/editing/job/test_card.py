"""The card of an edit job: a header that the datasets library obeys, and the ledger's figures, whatever the names are."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from vapr.config import Config
from vapr.data.convert import convert
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.editing.job.card import write_card
from vapr.errors import UserError

LEDGER = {
    "editor": {"name": "Qwen3-8B", "revision": "b968826d", "engine": "vllm 0.30.1", "prompt_hash": "5f1e", "seed": 12345, "temperature": 0.7},
    "source": {
        "path": "/data/llava.json", "digest": "9c2a", "rows": 5120, "turns": 7411, "eligible": 6300,
        "filtered": {"no image": 1001, "box answer": 110}, "bad_rows": 13, "licence": "cc-by-4.0",
    },
    "turns": {"total": 6300, "done": 6300, "left": 0},
    "accepted": 4242, "rejected": {"same_meaning": 1203, "length": 555}, "failed": {"no JSON": 300},
    "categories": {
        "colour": {"turns": 4000, "accepted": 3000, "rejected": 900, "failed": 100, "accept_rate": 0.75},
        "count": {"turns": 2300, "accepted": 1242, "rejected": 858, "failed": 200, "accept_rate": 0.54},
    },
    "editors": {"Qwen3-8B": {"turns": 6000, "accepted": 4200, "rejected": 1500, "failed": 300, "accept_rate": 0.7}},
    "candidates": {"chosen": 4200, "not_chosen": 5013}, "judge": {"model": "Qwen3-8B", "replies": 8400, "no_points": 17},
    "polarity": {"llava.json": {"rejected_yes": 210, "rejected_no": 211}},
    "decided_by": {"rules": 6001, "model": 299},
    "tokens": {"prompt": 1234567, "cached": 1100000, "generated": 98765},
    "models": {"Qwen3-8B": {"asked": 6011, "found": 289, "prompt": 1234567, "cached": 1100000, "generated": 98765, "cost": 0.4321}},
    "seconds": 1830.4, "accepted_per_second": 2.318,
    "shards": {"total": 7, "done": 7, "redone": 1},
    "rest": {"seconds": None, "gpu_hours": None, "cost": None, "price_per_gpu_hour": None},
    "review": {"kept": 194, "dropped": 6, "low": 0.9361, "high": 0.9862},
    "picture_changes": None, "verifier": "Qwen2.5-VL-7B, asked twice", "blind_check": "61 of 100 pairs told apart",
}  # fmt: skip


def card(folder: Path, ledger: dict) -> tuple[dict, str]:
    """Header and text of the card that is written."""
    write_card(folder, ledger)
    empty, header, text = re.split(r"^---\n", (folder / "README.md").read_text(), maxsplit=2, flags=re.MULTILINE)
    assert empty == ""
    return yaml.safe_load(header), text


def tables(text: str) -> list[list[list[str]]]:
    """Tables of rows of cells as a markdown library renders them, without marks."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level > 2 and found:
            assert all(child.type in ("text", "text_special", "code_inline") for child in token.children), token.content
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def figures(text: str) -> dict[str, list[str]]:
    return {name: values for table in tables(text) for name, *values in table[1:]}


def test_the_header(tmp_path):
    assert card(tmp_path, LEDGER)[0] == {
        "license": "cc-by-4.0",
        "task_categories": ["image-text-to-text"],
        "tags": ["dpo", "preference", "hard-negatives", "vapr"],
        "size_categories": ["1K<n<10K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "pairs/*.parquet"}]}],
    }
    unknown = {**LEDGER, "source": {**LEDGER["source"], "licence": None}}
    header, text = card(tmp_path, unknown)
    assert "license" not in header and "licence was not given" in text


@pytest.mark.parametrize(
    ("accepted", "size"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (30_000_000, "10M<n<100M"), (2 * 10**9, "n>1B")],
)  # fmt: skip
def test_sizes_as_the_hub_names_them(tmp_path, accepted, size):
    assert card(tmp_path, {**LEDGER, "accepted": accepted})[0]["size_categories"] == [size]


def test_the_figures_are_those_of_the_ledger(tmp_path):
    _, text = card(tmp_path, LEDGER)
    shown = figures(text)
    expected = {
        "editor: name": "Qwen3-8B", "editor: revision": "b968826d", "editor: engine": "vllm 0.30.1", "editor: prompt hash": "5f1e",
        "editor: seed": "12345", "editor: temperature": "0.7", "source: path": "/data/llava.json", "source: digest": "9c2a",
        "source: licence": "cc-by-4.0", "category decided by rules, turns": "6,001", "category decided by model, turns": "299",
        "source rows": "5,120", "rows that could not be read": "13", "turns in them": "7,411", "eligible turns": "6,300",
        "filtered: no image": "1,001", "filtered: box answer": "110", "turns of the job": "6,300", "turns done": "6,300",
        "turns left": "0", "accepted pairs": "4,242", "rejected: same_meaning": "1,203", "rejected: length": "555",
        "failed: no JSON": "300", "prompt tokens": "1,234,567", "cached tokens": "1,100,000", "generated tokens": "98,765",
        "Qwen3-8B: replies asked for": "6,011", "Qwen3-8B: replies kept from before": "289", "Qwen3-8B: cost": "0.432",
        "seconds": "1,830", "accepted pairs a second": "2.32", "shards: total": "7", "shards: done": "7", "shards: redone": "1",
        "candidates: chosen": "4,200", "candidates: not chosen": "5,013", "judge: replies": "8,400", "judge: no points": "17",
    }  # fmt: skip
    assert {name: values[0] for name, values in shown.items() if name in expected} == expected
    assert shown["colour"] == ["4,000", "3,000", "900", "100", "75.0%"]
    assert shown["count"] == ["2,300", "1,242", "858", "200", "54.0%"]
    assert shown["llava.json"] == ["210", "211"]
    assert shown.keys() - expected.keys() - {"colour", "count", "llava.json"} == {
        "id", "images", "prompt", "chosen", "rejected", "category", "edits", "weight", "checks", "source", "licence", "provenance",
    }  # fmt: skip
    assert "4,242 preference pairs" in text and "not finished" not in text
    assert "194 pairs kept, 6 dropped" in text and "from 93.6% to 98.6% (Wilson interval)" in text
    assert "An image verifier has checked the negatives: Qwen2.5-VL-7B, asked twice." in text
    assert "Check without the image: 61 of 100 pairs told apart." in text


def test_what_nobody_checked_is_said(tmp_path):
    _, text = card(tmp_path, {**LEDGER, "review": None, "verifier": None, "blind_check": None})
    assert "No human has checked the negatives." in text
    assert "No image verifier has checked whether the negatives are wrong" in text
    assert "It was not checked whether the sides can be told apart without the image." in text


def test_a_job_that_is_not_finished_says_what_is_left(tmp_path):
    rest = {"seconds": 912.6, "gpu_hours": 0.2535, "cost": None, "price_per_gpu_hour": None}
    _, text = card(tmp_path, {**LEDGER, "turns": {"total": 6300, "done": 5000, "left": 1300}, "rest": rest})
    assert "The job is not finished: 1,300 of 6,300 turns are left." in text
    shown = figures(text)
    assert shown["estimated for the rest: seconds"] == ["913"]
    assert shown["estimated for the rest: gpu hours"] == ["0.254"]
    assert not any("rest: cost" in name or "price" in name for name in shown)


def test_an_empty_job_of_the_rules(tmp_path):
    ledger = {
        **LEDGER, "editor": {**dict.fromkeys(LEDGER["editor"]), "name": "rules"}, "accepted": 0, "rejected": {}, "failed": {},
        "categories": {"colour": {"turns": 0, "accepted": 0, "rejected": 0, "failed": 0, "accept_rate": None}}, "polarity": {},
        "tokens": dict.fromkeys(LEDGER["tokens"], 0), "seconds": 0.0, "accepted_per_second": None,
    }  # fmt: skip
    header, text = card(tmp_path, ledger)
    shown = figures(text)
    assert header["size_categories"] == ["n<1K"] and shown["accepted pairs"] == ["0"] and shown["seconds"] == ["0"]
    assert shown["colour"] == ["0", "0", "0", "0", "-"]
    assert shown["editor: name"] == ["rules"] and not any(name.startswith("editor: rev") for name in shown)
    assert "accepted pairs a second" not in shown and "None" not in text.replace("None.", "")


HOSTILE = (
    "a|b", "a\\|b", "ends in \\", "`code` | ``", "---", "x\n---\ny: 1", "x\r\n\r\n# Heading", "| --- |", "*b* _i_ __b__ a_b",
    "<script>alert(1)</script>", "&lt;&#124;", "[link](http://x.y) ![i](x)", "~~gone~~ $x$", "license: mit", "『色』 😀",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_they_are_and_do_nothing(tmp_path, name):
    ledger = copy.deepcopy(LEDGER)
    ledger["editor"]["name"] = ledger["source"]["path"] = ledger["source"]["licence"] = name
    ledger["source"]["filtered"] = ledger["rejected"] = ledger["failed"] = {name: 77}
    ledger["categories"] = {name: LEDGER["categories"]["colour"]}
    ledger["polarity"] = {name: {"rejected_yes": 1, "rejected_no": 2}}
    ledger["verifier"] = ledger["blind_check"] = name
    header, text = card(tmp_path, ledger)
    line = " ".join(name.split())
    assert header == {**card(tmp_path, LEDGER)[0], "license": line}
    plain = card(tmp_path, LEDGER)[1]
    assert [len(table[0]) for table in tables(text)] == [len(table[0]) for table in tables(plain)]
    *_, categories, polarity, _, _ = tables(text)
    assert categories[1:] == [[line, "4,000", "3,000", "900", "100", "75.0%"]] and polarity[1:] == [[line, "1", "2"]]
    shown = figures(text)
    assert shown["editor: name"] == shown["source: path"] == [line]
    assert shown[f"filtered: {line}"] == shown[f"rejected: {line}"] == shown[f"failed: {line}"] == ["77"]
    points = [token for token in MarkdownIt("commonmark").enable("strikethrough").parse(text) if token.type == "inline"]
    [said] = [token for token in points if token.content.startswith("An image verifier")]
    assert said.children[0].type == "text" and all(child.type in ("text", "text_special") for child in said.children)
    assert "".join(child.content for child in said.children) == f"An image verifier has checked the negatives: {line}."


def test_what_cannot_be_written_is_marked(tmp_path):
    _, text = card(tmp_path, {**LEDGER, "polarity": {"a\ud800\0b": {"rejected_yes": 1, "rejected_no": 2}}})
    assert figures(text)["a\ufffd\ufffdb"] == ["1", "2"]


def test_the_datasets_library_loads_exactly_the_pairs(tmp_path):
    datasets = pytest.importorskip("datasets")
    job = tmp_path / "job"
    job.mkdir()
    for part in (0, 1):
        Image.new("RGB", (56, 40), "red").save(tmp_path / f"{part}.png")
        rows = [
            {"id": f"{part}-{n}", "images": [f"{part}.png"], "prompt": "Which colour?", "chosen": f"Red, {n}.", "rejected": f"Blue, {n}.", "category": "colour"}
            for n in range(3)
        ]  # fmt: skip
        write_pairs(tmp_path / "rows.jsonl", rows)
        convert(read_pairs(tmp_path / "rows.jsonl"), "vapr", job / "pairs" / f"part-{part:05d}.parquet")
        write_pairs(job / "rejects" / f"part-{part:05d}.jsonl", [{"id": "reject", "reason": "length"}])
    (job / "ledger.json").write_text(json.dumps(LEDGER))
    write_pairs(job / "rejects.jsonl", [{"id": "reject", "reason": "length"}])
    (job / "plan.jsonl").write_text('{"id": "plan"}\n')
    write_card(job, {**LEDGER, "accepted": 6})
    loaded = datasets.load_dataset(str(job), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"]["id"][:] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert loaded["train"][4]["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "Red, 1."}]}]
    assert [pair.id for pair in read_pairs(job)] == loaded["train"]["id"][:]


def test_the_config_it_shows_is_one(tmp_path):
    _, text = card(tmp_path, LEDGER)
    [block] = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert Config.parse(yaml.safe_load(block)).data.train == "path/to/this/folder"


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"README.md: cannot be written \(No space left on device\)"):
        write_card(tmp_path, LEDGER)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
