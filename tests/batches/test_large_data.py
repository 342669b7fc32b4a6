"""Neither the start of a run nor what it holds in memory grows with its data, or with the number of processes, but for 8 bytes a row."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vapr.batches.loader import open_loaders
from vapr.config import Config
from vapr.data import table_rows, text_rows
from vapr.data.pairs import CHECKED_AT_START

SMALL, LARGE = 10_000, 100_000
PAIRS_PER_STEP = 64


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory) -> Path:
    """``small`` and ``large`` as jsonl and parquet: rows of text, all of the same length."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("rows")
    row = {"id": "row-{:07}", "prompt": "Is it {:07}?", "chosen": "Yes, it is {:07}.", "rejected": "No, it is not."}
    line = json.dumps(row).replace("{:07}", "%07d") + "\n"
    for name, size in (("small", SMALL), ("large", LARGE)):
        (folder / f"{name}.jsonl").write_text("".join(line % (n, n, n) for n in range(size)))
        numbers = [f"{n:07}" for n in range(size)]
        columns = {key: [text.replace("{:07}", number) for number in numbers] for key, text in row.items()}
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def config_of(tiny, file: Path, **changes) -> Config:
    return Config.parse({
        "run_dir": "unused",
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32"},
        "data": {"train": str(file), "workers": 0},
        "optim": {"pairs_per_step": PAIRS_PER_STEP},
        **changes,
    })  # fmt: skip


def first_step(config: Config, **rank):
    """Open the data and take the first step; returns the loader, still open, and the step."""
    with open_loaders(config, say=lambda line: None, **rank) as loaders:
        step = next(loaders["train"].steps(0, 1))
        return loaders["train"], step


@pytest.fixture
def rows_read(monkeypatch) -> Counter:
    """Counts the rows that are read of files, by the kind of file."""
    counts: Counter = Counter()
    for kind in (text_rows.JsonLines, table_rows.Table):
        real = kind.__getitem__

        def counted(self, number, real=real, name=kind.__name__):
            counts[name] += 1
            return real(self, number)

        monkeypatch.setattr(kind, "__getitem__", counted)
    return counts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_as_many_rows_are_read_before_the_first_step_of_large_data(rows_folder, tiny, rows_read, kind):
    read = {}
    for name in ("small", "large"):
        first_step(config_of(tiny, rows_folder / f"{name}.{kind}"))
        read[name] = sum(rows_read.values())
        rows_read.clear()
    assert read["small"] == read["large"] <= 2 * (CHECKED_AT_START + 1) + PAIRS_PER_STEP + 1  # for the format, as well


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_held_is_eight_bytes_a_row(rows_folder, tiny, kind):
    """Python's and NumPy's own memory; the files and their index are mapped, and belong to the system."""
    held, peak = {}, {}
    for name in ("small", "large"):
        config = config_of(tiny, rows_folder / f"{name}.{kind}")
        first_step(config)  # makes the index
        tracemalloc.start()
        loader, _ = first_step(config)
        held[name], peak[name] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(loader.pairs) == {"small": SMALL, "large": LARGE}[name]
    slack = 200_000  # caches of Python's own
    assert held["large"] - held["small"] <= 8 * (LARGE - SMALL) + slack
    assert peak["large"] - peak["small"] <= 32 * (LARGE - SMALL) + slack  # while an epoch's order is drawn


def test_a_rank_reads_its_share_alone(rows_folder, tiny, rows_read):
    config = config_of(tiny, rows_folder / "large.jsonl")
    taken = []
    for rank in range(4):
        with open_loaders(config, say=lambda line: None, rank=rank, num_ranks=4) as loaders:
            rows_read.clear()
            step = next(loaders["train"].steps(7, 8))
            assert sum(rows_read.values()) == PAIRS_PER_STEP // 4
            taken += [pair.number for pair in step.pairs]
            assert sorted(taken) != sorted(loaders["train"].members(7).tolist()) or rank == 3
    assert sorted(taken) == sorted(loaders["train"].members(7).tolist())


def test_the_order_of_an_epoch_is_drawn_once(rows_folder, tiny, monkeypatch):
    """Although steps of the next one are made ahead, and the ledger asks for those of the one before."""
    config = config_of(tiny, rows_folder / "small.jsonl")
    with open_loaders(config, say=lambda line: None) as loaders:
        loader = loaders["train"]
        drawn = []
        real = type(loader).order
        monkeypatch.setattr(type(loader), "order", lambda self, epoch: drawn.append(epoch) or real(self, epoch))
        last = loader.steps_per_epoch - 1
        for step in (last, last + 1, last, last + 2, last - 1, last + 3):
            loader.members(step)
        assert drawn == [0, 1]
        epoch = np.concatenate([loader.members(step) for step in range(loader.steps_per_epoch)])
        assert np.array_equal(np.sort(epoch), np.arange(SMALL))
