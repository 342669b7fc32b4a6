"""Edit jobs that survive: killed anywhere, stopped by a signal, taken up again, read by what comes after."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_jobs import (
    FORK,
    SECONDS,
    assert_nothing_lost,
    contents,
    done,
    ids_in,
    in_a_process,
    killed,
    manifests,
    pairs_in,
    parse,
    row,
    run_until,
    start_of,
    write_source,
)
from vapr.cache import written_whole
from vapr.data.sources import read_pairs
from vapr.editing.draft.editor import Editor
from vapr.editing.job import json_files, pair_rows, scan
from vapr.editing.job.run import run
from vapr.editing.job.start import Start
from vapr.errors import UserError

pytest_plugins = ["tests.editing.edit_jobs"]


# Killed


@pytest.mark.parametrize(
    ("module", "name", "times", "redone"),
    [
        ("vapr.editing.job.json_files", "os.link", 2, 0),  # before the folder is claimed
        ("vapr.editing.job.folder", "take", 1, 0),  # after it
        ("vapr.editing.job.scan", "to_edit", 20, 0),  # while the source is read
        ("vapr.editing.job.scan", "np.save", 1, 0),
        ("vapr.editing.job.scan", "np.save", 2, 0),
        ("vapr.editing.job.scan", "np.load", 1, 0),  # after the source was read
        ("vapr.editing.draft.editor", "Editor.edit", 2, 1),
        ("vapr.editing.job.worker", "write_lines", 4, 1),  # between rejects and plans
        ("vapr.editing.job.worker", "write_pairs", 2, 1),  # between plans and pairs
        ("vapr.editing.job.worker", "_counts", 2, 1),  # between pairs and manifest
        ("vapr.editing.job.leases", "Lease._write_free", 4, 0),  # between manifest and the end of the lease
        ("vapr.editing.job.run", "ledger", 1, 0),
    ],
)
def test_killed_and_run_again(source, unbroken, module, name, times, redone, out):
    start = start_of(source, out)
    killed(run_until, module, name, times, start)
    finished = len(list((start.folder / "shards").glob("*.json")))
    result = done(start)
    assert contents(start.folder) == contents(unbroken)
    assert_nothing_lost(start.folder)
    assert result["shards"] == {"total": 5, "done": 5, "redone": redone}
    again = {m["unit"]: m["times_taken"] for m in manifests(start.folder)}
    assert sum(times > 1 for times in again.values()) == redone
    assert finished == {"Editor.edit": 1, "write_lines": 1, "write_pairs": 1, "_counts": 1, "ledger": 5,
                        "Lease._write_free": 2}.get(name, 0)  # fmt: skip


def run_until_half_of(name: str, start: Start) -> None:
    """Run, and be killed when half of the first file of that name is on the disk."""

    @contextlib.contextmanager
    def half_written(path):
        with written_whole(path) as file:
            if path.name == name:
                file.write(b"PAR1 half of it")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            yield file

    for module in (scan, pair_rows, json_files):
        module.written_whole = half_written
    run(start, print)


@pytest.mark.parametrize(
    "name", ["turns.npy", "truths.npy", "scan.json", "part-00001.parquet", "part-00001.jsonl", "00001.json"], ids=str
)
def test_killed_in_the_middle_of_a_file(source, unbroken, name, out):
    start = start_of(source, out)
    killed(run_until_half_of, name, start)
    [half] = [file for file in start.folder.rglob("*.tmp") if file.parent.name != "leases"]
    assert half.read_bytes() == b"PAR1 half of it"
    done(start)
    assert contents(start.folder) == contents(unbroken)
    assert not list(start.folder.rglob("*.tmp"))


def test_killed_twice_in_one_shard_is_counted_twice(source, out):
    start = start_of(source, out)
    killed(run_until, "vapr.editing.job.worker", "_counts", 2, start)
    killed(run_until, "vapr.editing.job.worker", "_counts", 1, start)
    assert done(start)["shards"]["redone"] == 2


def test_a_part_of_a_killed_worker_does_not_outlive_a_rerun_that_accepts_nothing(source, monkeypatch, out):
    """An editor that is no function of its input, such as a server, may refuse the second time what it made before."""
    start = start_of(source, out)
    killed(run_until, "vapr.editing.job.worker", "_counts", 1, start)
    assert [file.name for file in (start.folder / "pairs").iterdir()] == ["part-00000.parquet"]
    edit = Editor.edit

    def refuses(editor, *arguments):
        drafts, tokens = edit(editor, *arguments)
        for draft in drafts:
            draft.end("rejected", "not this time")
        return drafts, tokens

    monkeypatch.setattr(Editor, "edit", refuses)
    assert done(start)["accepted"] == 0
    assert not list((start.folder / "pairs").glob("*"))


def test_parts_and_manifests_agree(unbroken):

    for manifest in manifests(unbroken):
        for name, digest in manifest["files"].items():
            assert hashlib.sha256((unbroken / name).read_bytes()).hexdigest() == digest
    assert sum(manifest["accepted"] for manifest in manifests(unbroken)) == len(pairs_in(unbroken)) > 40
    assert_nothing_lost(unbroken)


# Damaged


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-20] if how == "cut short" else whole[:100] + b"?" + whole[101:])


@pytest.mark.parametrize("how", ["gone", "cut short", "changed"])
@pytest.mark.parametrize("name", ["pairs/part-00001.parquet", "rejects/part-00000.jsonl", "plans/part-00004.jsonl"])
def test_a_damaged_part_is_said_and_made_again(source, unbroken, finished, name, how):
    damage(finished / name, how)
    with pytest.raises(UserError) as caught:
        done(start_of(source, finished))
    unit = name.rpartition("-")[2].partition(".")[0]
    problem = "is gone" if how == "gone" else "is not as it was written"
    manifest = finished / "shards" / f"{unit}.json"
    assert str(caught.value) == f"{finished / name}: {problem}; restore it, or delete {manifest} to have it made again"
    manifest.unlink()
    done(start_of(source, finished))
    assert contents(finished) == contents(unbroken)


@pytest.mark.parametrize("target", [None, 60])
def test_a_shard_made_again_takes_its_later_rounds_along(source, unbroken, out, target):
    for grown in (3, 5, None):
        done(start_of(source, out, target=grown))
    assert [manifest["unit"] for manifest in manifests(out)][:3] == ["00000-again1", "00000-again2", "00000"]
    (out / "pairs" / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet: is gone; .* delete .*/shards/00000.json to"):
        done(start_of(source, out))
    (out / "shards" / "00000.json").unlink()
    done(start_of(source, out, target=target))
    assert len(ids_in(out)) == (target or len(ids_in(unbroken))) and set(ids_in(out)) <= set(ids_in(unbroken))
    assert contents(out) == contents(unbroken) or target is not None
    assert_nothing_lost(out)


# Signals


def test_signals_stop_at_once_and_keep_finished_shards(source, unbroken, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        start = start_of(source, tmp_path / number.name)
        reading, writing = FORK.Pipe(duplex=False)
        process = in_a_process(command_that_signals_itself, number, start, writing)
        process.join(SECONDS)
        assert process.exitcode == 128 + number
        line = f"Stopped: {number.name}: 1 finished shards are kept; the same command goes on from there"
        assert reading.recv()[1:] == [line]  # the first is about an image that is not there
        assert (start.folder / "shards" / "00000.json").exists()
        assert done(start)["shards"] == {"total": 5, "done": 5, "redone": 1}
        assert contents(start.folder) == contents(unbroken)


def command_that_signals_itself(number: int, start: Start, writing) -> None:
    """``vapr edit`` that gets a signal while it edits its second shard."""
    from click.testing import CliRunner

    from vapr.cli import main

    edit, calls = Editor.edit, []

    def edit_and_signal(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return edit(*arguments)

    Editor.edit = edit_and_signal
    arguments = ["edit", start.source, "--out", str(start.folder), "--set", "turns_per_shard=16"]
    result = CliRunner().invoke(main, arguments)
    writing.send([line for line in result.stderr.splitlines() if not line.startswith("edit answer")])
    os._exit(result.exit_code)


# Other settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed is 0, not 3"),
        ({"turns_per_shard": 8}, "turns_per_shard is 16, not 8"),
        ({"plan": {"balance": "uniform"}}, "plan.balance is swap, not uniform"),
        ({"plan": {"categories": ["count"]}}, "prompts or categories have changed"),
        ({"checks": {"style": False}}, "checks.style is True, not False"),
        ({"filters": {"max_answer_words": 9}}, "filters.max_answer_words is 400, not 9"),
        ({"source": {"licence": "MIT"}}, "source.licence is None, not MIT"),
    ],
    ids=str,
)
def test_other_settings_do_not_go_on_with_a_job(source, change, message, out):
    start = start_of(source, out, target=1)
    done(start)
    with pytest.raises(UserError) as caught:
        done(replace(start, config=parse({"turns_per_shard": 16, **change})))
    assert message in str(caught.value) and "give another --out" in str(caught.value)


def test_an_edited_or_another_source_does_not_go_on_with_a_job(own_source, out):
    done(start_of(own_source, out, target=1))
    moved = own_source.rename(own_source.with_name("moved.jsonl"))
    done(replace(start_of(moved, out), target=20))  # the same rows under another name
    text = moved.read_text()
    moved.write_text(text.replace("page 63", "page 64"))
    with pytest.raises(UserError, match="the rows of the source have changed; use them, or give another --out"):
        done(start_of(moved, out))


def test_a_picture_that_is_gone_since_the_source_was_read(own_source, out):
    done(start_of(own_source, out, target=1))
    (own_source.parent / "page.png").unlink()
    with pytest.raises(UserError, match=r"sft.jsonl:\d+: image 'page.png' not found .* restore it"):
        done(start_of(own_source, out))


def test_what_could_not_begin_may_begin_otherwise(source, out):
    start = start_of(source, out, config=parse({"turns_per_shard": 16, "filters": {"min_answer_words": 100}}))
    with pytest.raises(UserError, match=r"no answer to edit in the others: .* x answer shorter than 100 words"):
        done(start)
    assert done(start_of(source, out))["turns"]["total"] == 65


# Rows that know of one another


@pytest.mark.parametrize("turns_per_shard", [2, 4, 8])
def test_what_another_row_says_of_the_same_image_is_never_rejected(tmp_path, turns_per_shard, out):
    """Whatever shard that row is in, and though its answer is not edited itself."""
    question, source = "What color is the car?", write_source(tmp_path, [])
    rows = [
        {**row(n, question, f"It is {colour}."), "image": f"{image}.png"}
        for n, (image, colour) in enumerate(
            [(0, "red"), (1, "blue"), (0, "blue"), (2, "red"), (3, "red"), (4, "blue"), (5, "red"), (6, "blue")]
        )
    ]
    left_out = [{"from": "human", "value": question}, {"from": "gpt", "value": "it is  blue"}]
    rows[4]["conversations"] += left_out  # picture 3 is red, and blue
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(7):
        shutil.copy(tmp_path / "page.png", tmp_path / f"{n}.png")
    done(start_of(source, out, config=parse({"turns_per_shard": turns_per_shard, "plan": {"turns_per_row": 1}})))
    edited = {Path(pair["images"][0]["path"]).name for pair in pairs_in(out)}
    assert not edited & {"0.png", "3.png"}
    assert edited == {"5.png", "6.png"} or turns_per_shard > 2


# What comes after


def test_the_folder_is_what_training_reads(unbroken):
    pairs = list(read_pairs(unbroken))
    assert [pair.id for pair in pairs] == ids_in(unbroken)
    assert pairs[0].images == (unbroken.parent / "page.png",) and pairs[0].edits


def test_the_folder_is_a_data_set(unbroken, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    rows = datasets.load_dataset(str(unbroken), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ids_in(unbroken) or list(rows["id"]) == ids_in(unbroken)


def test_pairs_do_not_depend_on_where_the_source_lies(source, unbroken, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    for file in (source, source.parent / "page.png"):
        shutil.copy(file, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    done(start_of(Path("elsewhere") / source.name, Path("out")))
    assert [what_it_says(pair) for pair in pairs_in(Path("out"))] == [what_it_says(pair) for pair in pairs_in(unbroken)]


def what_it_says(pair: dict) -> dict:
    return {key: pair[key] for key in ("id", "prompt", "chosen", "rejected", "category", "edits", "checks")}
