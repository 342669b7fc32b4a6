"""Runs that are killed anywhere, on disks that are full or damaged: nothing is lost that was promised to be kept."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import several_ranks
from tests.runs import final_bytes, losses
from tests.training import kills
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.model import sharded_cache
from vapr.training import checkpoint, disk_room, run_dir, trainer
from vapr.training.export import export
from vapr.training.ledger import read_ledger

SEED = int(os.environ.get("VAPR_KILL_SEED", "0"))
"""Another one kills at other moments."""


@pytest.fixture
def short_run(make_config, photo_rows, photo_root, tmp_path):
    """``short_run(name)``: six steps of four pairs in two epochs, a checkpoint every second step; its own cache."""

    def make(name: str, lora: bool = True, **changes):
        write_pairs(tmp_path / "pairs.jsonl", photo_rows[:12])
        data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "workers": 0}
        optim = {"lr": 1e-3, "pairs_per_step": 4, "epochs": 2}
        own = {"reference": {"cache_dir": str(tmp_path / f"{name} cache")}, "trackers": []}
        packing = {"max_tokens": 300}
        return make_config(name, lora=lora, **{"data": data, "optim": optim, "packing": packing, **own, **changes})

    return make


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_kills_at_random_lines_leave_no_trace(short_run, lora, photo_rows):
    """Kills of a run, anywhere in four parts of the code; it is resumed after each, and begun anew when it was ended."""
    whole, broken = short_run("whole", lora), short_run("broken", lora)
    lines = kills.count_lines(whole)
    expected = final_bytes(whole)
    assert expected and all(lines[kind] > 20 for kind in kills.FILES)
    draws = random.Random(f"{SEED} {lora}")
    num_killed = 0
    while num_killed < (8 if lora else 6):
        kind = tuple(kills.FILES)[num_killed % 4]
        line = draws.randint(1, lines[kind])
        was_killed = kills.killed_at(kind, line, broken)
        num_killed += was_killed
        print(f"seed {SEED}: {kind}, line {line:,} of {lines[kind]:,}: {'killed' if was_killed else 'ended before'}")
        if not was_killed:
            assert final_bytes(broken) == expected
            assert kills.consumed(broken) == {row["id"]: 2 for row in photo_rows[:12]}
            shutil.rmtree(broken.run_dir), shutil.rmtree(broken.reference.cache_dir)
    kills.count_lines(broken)  # not here: the bytes are those of processes that run nothing else
    assert final_bytes(broken) == expected and losses(broken) == losses(whole)
    assert kills.consumed(broken) == {row["id"]: 2 for row in photo_rows[:12]}
    assert list(read_ledger(Path(broken.run_dir))) == list(read_ledger(Path(whole.run_dir)))


def on_two_ranks(config, folder: Path, killed_rank: int = -1, deadly: tuple[str, int] | None = None):
    """Train on two ranks, one of which may be killed at a line; both have ended when this returns."""
    return several_ranks.run(2, folder, kills.train_as_rank, config, killed_rank, deadly)


def test_kills_of_one_of_two_ranks_leave_no_trace(short_run, tmp_path, photo_rows):
    """Eight kills of the first or the second rank; the other ends with a line, and both are started again."""
    whole, broken = short_run("whole"), short_run("broken")
    ranks = on_two_ranks(whole, tmp_path / "out")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    lines = [json.loads(rank.out.splitlines()[-1]) if rank.out else {} for rank in ranks]
    expected, ledger = final_bytes(whole), list(read_ledger(Path(whole.run_dir)))
    draws = random.Random(f"{SEED} two ranks")
    num_killed = 0
    while num_killed < 8:
        rank, kind = (
            num_killed % 2,
            tuple(kills.FILES)[num_killed // 2 % 3],
        )  # the model at the end is the first's alone
        line = draws.randint(1, lines[0][kind] // (1 + 2 * rank))
        ended = on_two_ranks(broken, tmp_path / "out", rank, (kind, line))
        codes = [one.code for one in ended]
        print(f"seed {SEED}: rank {rank}, {kind}, line {line:,}: {codes}")
        if codes == [0, 0]:
            assert final_bytes(broken) == expected and list(read_ledger(Path(broken.run_dir))) == ledger
            shutil.rmtree(broken.run_dir), shutil.rmtree(broken.reference.cache_dir)
            continue
        num_killed += 1
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, -signal.SIGKILL)
        if rank == 1:
            assert "was killed, or hangs" in ended[0].err or "lost each other" in ended[0].err
    if Path(broken.run_dir).exists():
        assert [one.code for one in on_two_ranks(broken, tmp_path / "out")] == [0, 0]
        assert final_bytes(broken) == expected and list(read_ledger(Path(broken.run_dir))) == ledger
    assert kills.consumed(whole) == {row["id"]: 2 for row in photo_rows[:12]}


def test_the_place_in_the_data_survives_another_number_of_ranks(short_run, tmp_path, photo_rows):
    """Killed on two ranks in the middle of the second epoch, ended by one: every step holds the rows it always holds."""
    whole, broken = short_run("whole"), short_run("broken")
    trainer_runs = several_ranks.run(1, tmp_path / "out", kills.train_as_rank, whole, -1, None)
    assert trainer_runs[0].code == 0
    ended = on_two_ranks(broken, tmp_path / "out", 0, ("checkpoints", 700))
    assert ended[0].code == -signal.SIGKILL
    [alone] = several_ranks.run(1, tmp_path / "out", kills.train_as_rank, broken, -1, None)
    assert alone.code == 0 and "none lost and none twice" in alone.out, alone.err
    assert kills.consumed(broken) == {row["id"]: 2 for row in photo_rows[:12]}
    for mine, other in zip(read_ledger(Path(broken.run_dir)), read_ledger(Path(whole.run_dir)), strict=True):
        assert sorted(mine["rows"]) == sorted(other["rows"])


def test_the_values_of_a_pack_are_written_together(short_run, monkeypatch):
    """Half of them would have the resumed run compute the other half in another layout, with other bytes."""
    monkeypatch.setattr(sharded_cache, "FLUSH_BYTES", 1)
    written, computed = [], []
    flush, compute = sharded_cache.ShardedCache.flush, trainer.Reference._compute
    monkeypatch.setattr(trainer.Reference, "_compute", lambda *a: computed.append(compute(*a)) or computed[-1])
    monkeypatch.setattr(
        sharded_cache.ShardedCache, "flush", lambda cache: written.append(len(cache._unsaved)) or flush(cache)
    )
    trainer.train(short_run("run"))
    assert [number for number in written if number] == [len(values) for values in computed]


@pytest.fixture
def unfinished(short_run):
    """A run whose model is not written yet, and the bytes it has to have."""
    config = short_run("run")
    trainer.train(config)
    expected = final_bytes(config)
    shutil.rmtree(Path(config.run_dir) / "final")
    return config, expected


def flip_a_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: flip_a_bit(folder / "weights.safetensors", -1), "weights.safetensors is cut short or was changed"),
        (lambda folder: flip_a_bit(folder / "optimizer.safetensors", -9), "optimizer.safetensors is cut short or was changed"),
        (lambda folder: flip_a_bit(folder / "state.json", 14), "state.json is cut short or was changed"),
        (lambda folder: os.truncate(folder / "optimizer.safetensors", 1000), "optimizer.safetensors is cut short"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda folder: (folder / "SHA256SUMS").write_text(""), "SHA256SUMS lists no optimizer.safetensors"),
        (lambda folder: flip_a_bit(folder / "SHA256SUMS", 1), "is cut short or was changed"),
        (lambda folder: [(folder / "SHA256SUMS").unlink(), os.truncate(folder / "state.json", 9)], "cannot be read"),
    ],
    ids=["a bit of a weight", "a bit of a moment", "the step", "cut short", "missing", "no sums", "a sum", "of an older version"],
)  # fmt: skip
def test_the_newest_whole_checkpoint_is_used(unfinished, capsys, damage, reason):
    config, expected = unfinished
    older, newest = checkpoint.list_checkpoints(Path(config.run_dir))
    damage(newest)
    capsys.readouterr()
    trainer.train(config, resume=True)
    said = capsys.readouterr().out
    assert f"checkpoint {newest}: " in said and reason in said and f"resuming after step 4 ({older.name})" in said
    assert "set aside as step-000006.damaged" in said and newest.with_suffix(".damaged").is_dir()
    assert final_bytes(config) == expected
    assert [folder.name for folder in checkpoint.list_checkpoints(Path(config.run_dir))] == [older.name, newest.name]


def test_damaged_weights_are_not_exported(unfinished, tmp_path):
    config, _ = unfinished
    flip_a_bit(checkpoint.list_checkpoints(Path(config.run_dir))[-1] / "weights.safetensors", -1)
    with pytest.raises(UserError, match="weights.safetensors is cut short or was changed; take another checkpoint"):
        export(Path(config.run_dir), tmp_path / "exported", say=lambda line: None)
    export(Path(config.run_dir), tmp_path / "exported", which="step-000004", say=lambda line: None)


def test_without_a_whole_checkpoint_the_run_begins_again_and_says_so(unfinished, capsys):
    config, expected = unfinished
    for folder in checkpoint.list_checkpoints(Path(config.run_dir)):
        (folder / "weights.safetensors").write_bytes(b"")
    trainer.train(config, resume=True)
    assert "no whole checkpoint; starting from the beginning" in capsys.readouterr().out
    assert final_bytes(config) == expected and len(losses(config)) == 6


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(unfinished):
    """It is whole, and hours of work: whoever runs this as another user is told."""
    config, _ = unfinished
    newest = checkpoint.list_checkpoints(Path(config.run_dir))[-1]
    (newest / "weights.safetensors").chmod(0)
    with kills.without_roots_rights(), pytest.raises(UserError, match=r"step-000006/weights.safetensors: cannot be read \(Permission denied\)"):  # fmt: skip
        trainer.train(config, resume=True)
    assert newest.is_dir()


def test_a_run_folder_that_may_not_be_written_is_named(unfinished):
    config, expected = unfinished
    checkpoints = Path(config.run_dir) / "checkpoints"
    shutil.rmtree(checkpoints / "step-000006")
    checkpoints.chmod(0o500)
    with (
        kills.without_roots_rights(),
        pytest.raises(UserError, match="checkpoints/step-.*: Permission denied; let this user"),
    ):
        trainer.train(config, resume=True)
    checkpoints.chmod(0o700)
    trainer.train(config, resume=True)
    assert final_bytes(config) == expected


def with_free(monkeypatch, free: int) -> None:
    """The disk has so many bytes free."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: usage._replace(free=free))


def test_the_predicted_size_is_that_of_what_is_written(unfinished, capsys, monkeypatch, short_run):
    config, _ = unfinished
    newest = checkpoint.list_checkpoints(Path(config.run_dir))[-1]
    tensors = {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}
    size = sum(tensor.numel() * 4 for name, tensor in tensors.items() if not name.startswith("random.") and tensor.ndim)
    trainer.train(config, resume=True)
    final = sum(t.numel() * 4 for t in load_file(Path(config.run_dir) / "final" / "adapter_model.safetensors").values())
    with_free(monkeypatch, 3 * size + final - 1)  # two are kept while the third is written
    other = short_run("other")
    with pytest.raises(UserError) as refused:
        trainer.train(other)
    assert f"run_dir: 3 checkpoints of {disk_room.in_units(size)} and the final model of " in str(refused.value)
    assert "make room, lower checkpoint.keep, or give another run_dir" in str(refused.value)
    assert not (Path(other.run_dir) / "checkpoints").exists()
    with_free(monkeypatch, 3 * size + final)
    trainer.train(other)


def test_a_disk_that_fills_up_is_noticed_before_a_checkpoint_is_written(short_run, monkeypatch):
    config, whole = short_run("run"), short_run("whole")
    trainer.train(whole)
    real, taken = trainer.Engine.step, []

    def step(engine):
        real(engine)
        taken.append(1)
        if len(taken) == 3:
            with_free(monkeypatch, 20_000)

    monkeypatch.setattr(trainer.Engine, "step", step)
    with pytest.raises(UserError) as told:
        trainer.train(config)
    assert "step-000004: a checkpoint of " in str(told.value) and "does not fit the 19.5 KiB that are free" in str(
        told.value
    )
    assert str(told.value).endswith("; the 2 steps before it are saved, continue with --resume")
    assert [folder.name for folder in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    trainer.train(config, resume=True)
    assert final_bytes(config) == final_bytes(whole)


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "SHA256SUMS"])
def test_a_disk_that_is_full_all_the_same_leaves_the_last_checkpoint(short_run, monkeypatch, file):
    """Another process may take the room while a checkpoint is written."""
    config, whole = short_run("run"), short_run("whole")
    trainer.train(whole)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-000004.tmp" in path and Path(path).name.startswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        trainer.train(config)
    assert [folder.name for folder in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(os, "fsync", fsync)
    trainer.train(config, resume=True)
    assert final_bytes(config) == final_bytes(whole)


def test_the_ledger_tells_what_was_lost_or_taken_twice(unfinished, capsys):
    config, _ = unfinished
    path = Path(config.run_dir) / "consumed.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[1], *lines[3:]]))  # step 3 lost, step 2 twice
    trainer.train(config, resume=True)
    assert "ledger     warning: in 2 of 6 steps, the first 2, the pairs of" in capsys.readouterr().out


def test_the_ledger_has_the_skipped_rows_too(short_run, photo_rows, tmp_path, capsys):
    config = short_run("run")
    rows = [dict(row) for row in photo_rows[:12]]
    del rows[5]["chosen"]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_row="skip"))
    trainer.train(config)
    entries = list(read_ledger(Path(config.run_dir)))
    assert Counter(row for entry in entries for row in entry.get("skipped", [])) == {5: 2}
    assert Counter(row for entry in entries for row in entry["rows"]) == {row: 2 for row in range(12) if row != 5}
    assert "6 steps took 22 pairs and skipped 2 rows, 2 epochs, none lost and none twice" in capsys.readouterr().out


def test_the_documents_list_what_a_resumed_run_may_change():
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    section = page.split("### What a resumed run may change")[1].split("Any other key")[0].split(":")[0]
    gone = {"policy.gradient_checkpointing"}  # a key of older runs
    assert set(re.findall(r"`([\w.]+)`", section)) == set(run_dir.MAY_CHANGE) - gone
