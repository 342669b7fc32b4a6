"""What users, files, disks and servers do wrong to ``vapr edit``: each one line, or a counted row with file and line."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow
import pyarrow.parquet as parquet

from tests.editing.edit_command import (
    GOOD,
    QUESTION,
    assert_refused,
    edit,
    ledger_of,
    pairs_of,
    row,
    scan_of,
    talk,
    write,
)
from tests.editing.edit_jobs import CATEGORY
from tests.training.test_bad_runs import small_disk  # noqa: F401 - a fixture
from vapr.cli import main

pytest_plugins = ["tests.editing.edit_command"]

# Rows


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("There are seven \ud83d cats."), "'conversations' holds half a character"),
        (row(id="\ud83d"), "'id' holds half a character"),
        (row(source="\ud83d"), "'source' holds half a character"),
        (row(licence="\ud83d"), "'licence' holds half a character"),
        (row(licence=["MIT"]), "'licence' must be text, got ['MIT']"),
        (row(id=["a"]), "'id' must be text, got ['a']"),
        (row(conversations=talk(("gpt", "Two."), ("human", QUESTION), ("gpt", "Six."))), "must be user and assistant in turn"),
        (row(conversations=talk(("human", QUESTION), ("human", "Please."), ("gpt", "Six."))), "must be user and assistant in turn"),
        (row(conversations=talk(("human", QUESTION))), "no answer in this row; there is nothing to edit"),
        (row(conversations=talk(("tool", QUESTION), ("gpt", "Six."))), "holds role 'tool'; known roles: system, user, assistant"),
        (row(conversations=[]), "'conversations' must be text or a list of messages, got []"),
        (row(conversations=[None]), "'conversations' holds a turn that is no object: None"),
        (row(conversations=talk(("human", 5), ("gpt", "Six."))), "holds a content that is neither text nor a list of parts: 5"),
        (row(conversations=talk(("human", None), ("gpt", "Six."))), "holds a message without role and content"),
        (row(conversations=talk(("human", "<image><image>\nHow many?"), ("gpt", "Six."))), "the conversation places 2 image(s) but the row has 1"),
        (row(image=["cat.png", "cat.png"]), "the conversation places 1 image(s) but the row has 2"),
        (row(image=None), "the conversation places 1 image(s) but the row has 0"),
        (row(conversations=talk(("human", "How many?"), ("gpt", "<image> Six."))), "an answer holds an image part"),
        (row(image="nowhere.png"), "image 'nowhere.png' not found (looked for"),
        (row(image="https://images.org/cat.png"), "is a URL; save it to a file first"),
        (row(image=7), "an image must be a path or {'bytes', 'path'}, got 7"),
        (row(image="a" * 5000), "is no path; save it to a file"),
        (row(image=str(Path("a\0b.png"))), "image 'a\0b.png' not found"),
        (row(images=["dog.png"]), "both 'images' and 'image' hold images; leave one out"),
        ({"id": "a", "image": "cat.png", "caption": "Six cats."}, "no conversations, messages, or prompt and answer; this row has id, image, caption"),
        (["not", "an", "object"], "a row must be an object, got ['not', 'an', 'object']"),
        (None, "a row must be an object, got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_row_is_counted_and_shown_with_its_line(folder, bad, message):
    source = write(folder, [GOOD[0], bad, GOOD[1]])
    code, stderr = edit(source)
    assert code == 0, stderr
    assert len(pairs_of(folder)) == 2  # the others are edited
    assert scan_of(folder)["bad_rows"] == 1
    [shown] = scan_of(folder)["first_bad_rows"]
    assert shown.startswith(f"{source}:2: ") and message in shown
    assert ledger_of(folder)["source"]["bad_rows"] == 1
    assert "| rows that could not be read | 1 |" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": ', "not valid JSON"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not readable as JSON (Exceeds the limit"),
        ('{"id": "é"}'.encode("latin-1"), "not UTF-8 text"),
    ],
    ids=["half a line", "deep", "huge number", "latin-1"],
)
def test_a_line_that_is_no_json_is_counted(folder, line, message):
    good = [json.dumps(row).encode() for row in GOOD]
    (folder / "sft.jsonl").write_bytes(b"\n".join([good[0], line, good[1]]) + b"\n")
    assert edit(folder / "sft.jsonl")[0] == 0
    [shown] = scan_of(folder)["first_bad_rows"]
    assert shown.startswith(f"{folder}/sft.jsonl:2: ") and message in shown
    assert len(pairs_of(folder)) == 2


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (row(" \n"), "empty answer"),
        ({**GOOD[0], "id": "c"}, "duplicate of an earlier answer"),
        ({"id": "c", "conversations": talk(("human", "Hi."), ("gpt", "Hello."))}, "no image"),
        (row("[0.1, 0.2, 0.3, 0.4]"), "coordinates in the answer"),
        (row("many " * 401), "answer longer than 400 words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_left_alone_is_counted(folder, left, reason):
    assert edit(write(folder, [*GOOD, left])) == (0, "")
    assert scan_of(folder)["filtered"] == {reason: 1} == ledger_of(folder)["source"]["filtered"]
    assert len(pairs_of(folder)) == 2


def test_spatial_pairs_come_with_a_word_on_what_llava_sees(folder):
    def placed(side: str) -> dict:
        asked = f"<image>\nIs the {side} cat on the left or right?"
        return row(id=side, conversations=talk(("human", asked), ("gpt", f"The cat is on the {side}.")))

    def said(rows: list[dict], out: str) -> str:
        started = ["edit", str(write(folder, rows)), "--out", str(folder / out)]
        return CliRunner().invoke(main, started).stdout

    assert "columns 80 to 559" not in said(GOOD, "counts")
    told = said([placed("left"), placed("right")], "places")
    assert "of 640 x 480, columns 80 to 559" in told and told.count("LLaVA-1.5") == 1


def test_odd_but_sound_rows_are_edited(folder):
    """NUL, line separators, and a last question without an answer are no fault."""
    odd = [row(id=n, conversations=talk(("human", f"{QUESTION}\0\u2028\x85{n}"), ("gpt", f"There are {number} cats."), ("human", "And dogs?")))
           for n, number in enumerate(("four", "five"))]  # fmt: skip
    assert edit(write(folder, odd), "--target", 1)[0] == 0
    assert len(pairs_of(folder)) == 1
    assert edit(folder / "sft.jsonl") == (0, "")  # takes the other up again, out of the rejects
    asked = [pair["prompt"][0]["content"][1]["text"] for pair in pairs_of(folder)]
    assert sorted(asked) == [f"How many cats are there?\0\u2028\x85{n}" for n in range(2)]


def test_images_out_of_their_root(folder):
    (folder / "inside").mkdir()
    shutil.copy(folder / "cat.png", folder / "inside" / "cat.png")
    (folder / "inside" / "link.png").symlink_to(folder / "cat.png")
    rows = [*GOOD, *(row(image=image, id=image) for image in ("../cat.png", str(folder / "cat.png"), "link.png"))]
    assert edit(write(folder, rows), "--set", f"source.image_root={folder / 'inside'}")[0] == 0
    shown = scan_of(folder)["first_bad_rows"]
    assert [line.partition(": image ")[0] for line in shown] == [f"{folder}/sft.jsonl:{n}" for n in (3, 4, 5)]
    assert all("lies outside" in line for line in shown)


# Sources


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: no rows in it"),
        ("x.jsonl", b"[1]\n[2]\n", "x.jsonl:1: a row must be an object, got [1] (none of the 2 rows can be read)"),
        ("x.jsonl", b"\0\1\2\n", "x.jsonl: not a text file"),
        ("x.json", b"[{}", "x.json:1: not valid JSON"),
        ("x.parquet", b"PAR1 but not really PAR1", "x.parquet: not a readable parquet file"),
        ("x.arrow", b"no arrow", "x.arrow: not a readable arrow file"),
        ("x.csv", b"a,b", "x.csv: unknown file type"),
        ("x.jsonl", json.dumps({"conversations": talk(("human", "Hi."), ("gpt", "Ho."))}).encode(), "x.jsonl: no answer to edit in it: 1 x no image; see filters"),
    ],
    ids=str,
)  # fmt: skip
def test_files(folder, name, content, message):
    (folder / name).write_bytes(content)
    assert_refused(message, folder / name)
    assert_refused(message, folder / name)  # and again: the folder is not spoilt
    assert edit(folder / "sft.jsonl") == (0, "")  # for others neither


def test_a_table_without_rows(folder):
    pytest.importorskip("datasets", reason="the datasets library is not installed")
    whole = table(folder, "parquet")
    rows = parquet.read_table(whole)
    (folder / "tables").mkdir()
    parquet.write_table(rows.slice(0, 0), folder / "tables" / "a.parquet")
    assert_refused("a.parquet: no rows in it", folder / "tables" / "a.parquet")
    shutil.copy(whole, folder / "tables" / "b.parquet")  # one of several may be empty
    columns = "source.columns={question: ask, answer: reply.text, images: image}"
    assert edit(folder / "tables", "--out", folder / "out", "--set", columns) == (0, "")
    assert len(pairs_of(folder)) == 2


@pytest.mark.parametrize("name", [b"g\xff.jsonl", b"g\xff/x.jsonl"], ids=["file", "folder"])
def test_a_source_whose_name_is_no_text(folder, name):
    file = folder / os.fsdecode(name)
    file.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "sft.jsonl", file)
    message = "the name of this file or of its folder is not UTF-8 text; rename it"
    assert_refused(f"{folder}/{name.decode(errors='backslashreplace')}: {message}", file, "--out", folder / "out")


def test_no_source(folder):
    assert_refused("nowhere.jsonl: no such file or folder", folder / "nowhere.jsonl")
    assert_refused("nowhere/*.jsonl: no .jsonl", folder / "nowhere" / "*.jsonl", "--out", folder / "out")


def table(folder: Path, suffix: str, images: str = "image") -> Path:
    """Rows as the hub's tables have them: pictures inside."""
    picture = {"bytes": (folder / "cat.png").read_bytes(), "path": None}
    rows = [
        {"ask": f"How many cats are {place}?", "reply": {"text": f"There are {n} cats."}, images: picture}
        for n, place in (("two", "here"), ("six", "there"))
    ]
    made = pyarrow.Table.from_pylist(rows)
    file = folder / f"x.{suffix}"
    if suffix == "parquet":
        parquet.write_table(made, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, made.schema) as stream:
            stream.write_table(made)
    return file


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_tables(folder, suffix):
    pytest.importorskip("datasets", reason="the datasets library is not installed")
    file = table(folder, suffix, "photo")
    columns = "source.columns={question: ask, answer: %s, images: %s}"
    assert_refused("this row has ask, reply, photo (source.columns can map other names", file)
    for key, column in (("answer", "reply.words"), ("answer", "replies"), ("images", "picture")):
        names = {"answer": "reply.text", "images": "photo", key: column}
        assert_refused(
            f"source.columns.{key}: {file} has no column '{column}'; there are ask, photo, reply",
            file, "--set", columns % (names["answer"], names["images"]),
        )  # fmt: skip
    assert edit(file, "--set", columns % ("reply.text", "photo")) == (0, "")
    assert {pair["rejected"][0]["content"][0]["text"] for pair in pairs_of(folder)} == {
        "There are two cats.", "There are six cats."
    }  # fmt: skip
    assert pairs_of(folder)[0]["images"][0]["bytes"] == (folder / "cat.png").read_bytes()


# Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("seed=-1", "seed must be at least 0 and below 2,147,483,648, got -1"),
        ("seed=yes", "seed: should be a number, got True (YAML reads yes, no, on and off so, too)"),
        ("plan.turns_per_row=on", "plan.turns_per_row: should be a number, got True"),
        ("ask.temperature=off", "ask.temperature: should be a number, got False"),
        ("checks.length_ratio=[yes, 1.1]", "checks.length_ratio.0: should be a number, got True"),
        ("turns_per_shard=0", "turns_per_shard must be at least 1 and at most 1,000,000, got 0"),
        ("editor=rules", "the editor is given on the command line, with --editor"),
        ("source.columns={qestion: q}", "source.columns: unknown key 'qestion'; did you mean 'question'?"),
        ("source.image_root=/nowhere", "source.image_root: /nowhere: no such folder"),
        ("plan.categories=[colour]", "plan.categories: no category 'colour'; there are action"),
        ("plan.categories=[]", "plan.categories must be null or non-empty, got []"),
        ("editors={a: 1}", "editors must be null or 2 or more, got {'a': 1}"),
        ("editors={a: 1, a: 2}", "the value is not valid YAML (key 'a' is given twice)"),
        ("plan.balance=none", "plan.balance: should be 'swap' or 'uniform', got 'none'"),
        ("plan.add_categories=[/nowhere.yaml]", "/nowhere.yaml: no such file"),
        ("filters.skip_questions=['(']", "filters.skip_questions: '(' is no regular expression"),
        ("checks.length_ratio=[1.1, 1.2]", "checks.length_ratio must be two numbers around 1"),
        ("checks.wordnet=/nowhere", "checks.wordnet: /nowhere: no WordNet there"),
        ("checks.blind=true", "checks.blind: the rules editor has no language model to ask"),
        ("checks.verifier=nowhere/model", "nowhere/model"),
        ("checks.verifier=http://127.0.0.1:9", "server http://127.0.0.1:9: not reachable"),
        ("ask.attempts=0", "ask.attempts must be at least 1 and at most 20, got 0"),
    ],
    ids=str,
)
def test_settings(folder, override, message):
    assert_refused(message, folder / "sft.jsonl", "--set", override)
    assert edit(folder / "sft.jsonl") == (0, "")  # the mistake does not claim the folder
    assert len(pairs_of(folder)) == 2


def test_an_editor_that_cannot_be_asked_does_not_claim_the_folder(folder):
    assert_refused("not reachable", folder / "sft.jsonl", "--editor", "http://127.0.0.1:9")
    assert_refused("nowhere/model", folder / "sft.jsonl", "--editor", "nowhere/model")
    assert edit(folder / "sft.jsonl", "--target", 1)[0] == 0
    message = "holds a job of other settings: editor is rules, not a server"
    assert_refused(message, folder / "sft.jsonl", "--editor", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.yaml: a config is a mapping of keys to values"),
        ("- seed\n", "x.yaml: a config is a mapping of keys to values"),
        ("seed: [\n", "x.yaml: not valid YAML"),
        ("seed: 1\nseed: 2\n", "x.yaml: not valid YAML: key 'seed' is given twice"),
        ("plan: {balance: swap, balance: uniform}\n", "key 'balance' is given twice"),
    ],
    ids=str,
)
def test_config_files(folder, content, message):
    (folder / "x.yaml").write_text(content)
    assert_refused(message, folder / "sft.jsonl", "--config", folder / "x.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("title: again", "not valid YAML: key 'title' is given twice"),
        ("aplies: []", "aplies: Extra inputs are not permitted"),
        ("mode: rewritten", "mode: Input should be 'edits' or 'rewrite'"),
        ("checks: [colour]", "checks.0: Input should be 'other_value'"),
        ("max_edits: 0", "max_edits: Input should be greater than or equal to 1"),
        ("min_edits: 3", "max_edits (1) is below min_edits (3)"),
        ("values_of: [colour]", "category 'mine': values_of names 'colour'; there are"),
        ("values: [{name: v, groups: [[a, b]], before: '('}]", "values.0.before: '(' is no regular expression"),
        ("values: [{name: v, groups: [[a, b]], before: 5}]", "values.0.before: Input should be a valid list"),
        ("values: [{name: v, groups: [[]]}]", "values.0.groups.0: List should have at least 1 item"),
        ("values: [{name: v, groups: [['', a]]}]", "values.0.groups.0.0: String should have at least 1 character"),
        ("examples: [{question: q, answer: a dog, edits: [{find: cat, replace: cow, why_wrong: w}]}]", "example: 'cat' must occur once in 'a dog'"),
        ("examples: [{question: q, answer: a dog}]", "an example needs 'edits'"),
        ("examples: [{question: q, answer: a dog, edits: [{find: dog}]}]", "examples.0.edits.0.replace: Field required"),
    ],
    ids=str,
)  # fmt: skip
def test_categories(folder, change, message):
    (folder / "mine.yaml").write_text(f"{CATEGORY}{change}\n")
    assert_refused(message, folder / "sft.jsonl", "--set", f"plan.add_categories=[{folder / 'mine.yaml'}]")


def test_a_category_with_a_bad_rule(folder):
    (folder / "mine.yaml").write_text(CATEGORY.replace("what is it}", "'['}"))
    message = "mine.yaml: applies.0.question: '[' is no regular expression"
    assert_refused(message, folder / "sft.jsonl", "--set", f"plan.add_categories=[{folder / 'mine.yaml'}]")


# Folders and disks


def test_folders(folder):
    source = folder / "sft.jsonl"
    assert_refused("cat.png: cannot be made a folder (File exists)", source, "--out", folder / "cat.png")
    assert_refused("/proc/x: cannot be made a folder", source, "--out", "/proc/x")
    assert_refused("holds files but no edit job; give a new folder with --out", source, "--out", folder)
    assert_refused("/nowhere: no such file", source, "--verdicts", "/nowhere")
    (folder / "out" / "shards").mkdir()
    (folder / "out" / "shards" / "00000.json").write_text("{")
    assert_refused("00000.json: cannot be read", source)


def test_a_disk_that_may_only_be_read(folder, small_disk):  # noqa: F811 - the fixture
    source, out = folder / "sft.jsonl", small_disk / "out"
    assert edit(source, "--out", out, "--target", 1)[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_refused("cannot be written (Read-only file system)", source, "--out", out)
    assert_refused("cannot be made a folder (Read-only file system)", source, "--out", small_disk / "other")


def test_damaged_jobs(folder):
    source = folder / "sft.jsonl"
    assert edit(source, "--target", 1)[0] == 0
    for name in ("job.json", "scan.json", "shards/00000.json", "editor.json"):
        file = folder / "out" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert_refused(f"{file}: cannot be read", source)
        file.write_bytes(whole)
    assert edit(source) == (0, "")


@pytest.mark.parametrize("name", ["turns.npy", "truths.npy"])
def test_a_damaged_array_is_made_again(folder, name):
    source, file = folder / "sft.jsonl", folder / "out" / name
    assert edit(source, "--target", 1)[0] == 0
    whole, way_out = file.read_bytes(), f"delete {folder / 'out' / 'scan.json'} to have the source read again"
    for damaged in (b"", whole[:50], whole[:-8], whole.replace(b"i8", b"f8"), whole.replace(b"(2, ", b"(3, "), None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert_refused(f"{file}: cannot be read (", source)
        assert_refused(way_out, source)
    (folder / "out" / "scan.json").unlink()
    assert edit(source) == (0, "")
    assert file.read_bytes() == whole and len(pairs_of(folder)) == 2


@pytest.mark.parametrize("name", ["shards/00000.json", "scan.json", "editor.json"])
@pytest.mark.parametrize("damaged", ["{}", "[]", '"text"', "null", "", "typed", "another"])
def test_a_damaged_description(folder, name, damaged):
    source, file = folder / "sft.jsonl", folder / "out" / name
    assert edit(source)[0] == 0
    before = pairs_of(folder)
    whole = json.loads(file.read_text())
    made = {
        "typed": {key: [value] for key, value in whole.items()},
        "another": {**whole, "name": 5, "rows": None, "shard": 5},
    }
    file.write_text(json.dumps(made[damaged]) if damaged in made else damaged)
    assert_refused(f"{file}: ", source)
    if name == "editor.json":
        return  # who made the pairs is known to nobody else
    file.unlink()
    assert edit(source)[0] == 0
    assert pairs_of(folder) == before


def test_a_damaged_part(folder):
    assert edit(folder / "sft.jsonl")[0] == 0
    part = folder / "out" / "pairs" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    (folder / "verdicts.jsonl").write_text('{"id": "a", "verdict": "drop"}\n')
    assert_refused(
        "part-00000.parquet: is not as it was written; restore it",
        folder / "sft.jsonl",
        "--verdicts",
        folder / "verdicts.jsonl",
    )


def test_a_full_disk(folder, small_disk):  # noqa: F811 - the fixture
    numbers = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
    rows = [row(f"There are {numbers[n % 8]} cats.", id=n, conversations=talk(("human", f"{QUESTION} {n}"), ("gpt", f"There are {numbers[n % 8]} cats.")))
            for n in range(160)]  # fmt: skip
    source, out = write(folder, rows), small_disk / "out"
    for filler in (299_000, 280_000, 240_000):
        (small_disk / "filler").write_bytes(b"0" * filler)
        code, stderr = edit(source, "--out", out, "--set", "turns_per_shard=16")
        assert code == 2 and stderr.startswith("Error: ") and stderr.count("\n") == 1, stderr
        assert "No space left on device" in stderr or "written" in stderr
    assert not list(out.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert edit(source, "--out", out, "--set", "turns_per_shard=16") == (0, "")
    assert edit(source, "--set", "turns_per_shard=16") == (0, "")
    for name in ("pairs", "plans"):
        ours, theirs = (
            {file.name: file.read_bytes() for file in (at / name).iterdir()} for at in (out, folder / "out")
        )
        assert ours == theirs
