"""Runs that are killed anywhere, on disks that are full or damaged: nothing is lost that was promised to be kept."""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.runs import final_bytes, losses
from tests.training import kills
from vapr.data.pairs import write_pairs
from vapr.model import sharded_cache
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
def test_kills_at_random_lines_leave_no_trace(short_run, tmp_path, monkeypatch, lora, photo_rows):
    """Twelve kills of a run, anywhere in four parts of the code; it is resumed after each, and begun anew when done."""
    monkeypatch.setattr(sharded_cache, "FLUSH_BYTES", 2000)  # several shards a step, so that kills fall between them
    whole, broken = short_run("whole", lora), short_run("broken", lora)
    lines = kills.count_lines(whole)
    expected = final_bytes(whole)
    assert expected and all(lines[kind] > 20 for kind in kills.FILES)
    draws = random.Random(f"{SEED} {lora}")
    num_killed = 0
    while num_killed < 12:
        kind = tuple(kills.FILES)[num_killed % 4]
        line = draws.randint(1, lines[kind])
        was_killed = kills.killed_at(kind, line, broken)
        num_killed += was_killed
        print(f"seed {SEED}: {kind}, line {line:,} of {lines[kind]:,}: {'killed' if was_killed else 'ended before'}")
        if not was_killed:
            assert final_bytes(broken) == expected
            assert kills.consumed(broken) == {row["id"]: 2 for row in photo_rows[:12]}
            shutil.rmtree(broken.run_dir), shutil.rmtree(broken.reference.cache_dir)
    kills.train_quietly(broken)
    assert final_bytes(broken) == expected and losses(broken) == losses(whole)
    assert kills.consumed(broken) == {row["id"]: 2 for row in photo_rows[:12]}
    assert list(read_ledger(Path(broken.run_dir))) == list(read_ledger(Path(whole.run_dir)))
