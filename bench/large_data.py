"""Measure whether a run's start and its host memory grow with the data or with the number of processes.

    python -m bench.large_data                # files of 1,000 and 1,000,000 rows
    python -m bench.large_data --quick        # small files; nothing is recorded

``vapr train`` of a tiny policy, started as a user starts it, with caches that know nothing and again with warm ones.
How to read the rows: bench/README.md.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import yaml
from PIL import Image

from bench.data_arms import resident_mib
from bench.record import REPOSITORY, record
from vapr.data.pairs import write_pairs
from vapr.demo.tiny_policy import build_tiny_policy

NUM_IMAGES = 100
PAIRS_PER_STEP = 16
STEPS = 40
SETTLED = 20
"""Steps after which memory is read."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [f"Is there a {word} in the picture?" for word in ("cat", "dog", "boat", "red", "blue")]
        build_tiny_policy("qwen2_5_vl", folder / "policy", texts)
        draws = np.random.default_rng(0)
        for n in range(NUM_IMAGES):
            Image.fromarray(draws.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{n}.png")
        for num_rows in options.rows:
            for kind in options.kinds:
                file = write_rows(folder, num_rows, kind)
                for ranks in options.ranks:
                    fields = {
                        "rows": num_rows, "kind": kind, "ranks": ranks, "file_mib": file.stat().st_size / 2**20,
                        "pairs_per_step": PAIRS_PER_STEP, **measure(folder, file, ranks),
                    }  # fmt: skip
                    print(json.dumps(fields if options.quick else record("large_data", **fields)), flush=True)
                file.unlink()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--kinds", nargs="+", choices=["jsonl", "parquet"], default=["jsonl", "parquet"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="small files, jsonl, one process; nothing is recorded")
    options = parser.parse_args()
    if options.quick:
        options.kinds, options.ranks = ["jsonl"], [1]
    options.rows = options.rows or ([700, 1_400] if options.quick else [1_000, 1_000_000])
    return options


def write_rows(folder: Path, num_rows: int, kind: str) -> Path:
    """Write a file of rows about the pictures."""
    file = folder / f"rows-{num_rows}.{kind}"
    if kind == "jsonl":
        write_pairs(file, rows(num_rows))
        return file
    import datasets

    cache = folder / "made"
    datasets.Dataset.from_generator(rows, gen_kwargs={"num_rows": num_rows}, cache_dir=str(cache)).to_parquet(str(file))
    return file


def rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Yield rows of about equal length."""
    for n in range(num_rows):
        yield {
            "id": f"row-{n:07}",
            "images": [f"{n % NUM_IMAGES}.png"],
            "prompt": [{"role": "user", "content": f"Is there a cat in picture {n:07}?"}],
            "chosen": [{"role": "assistant", "content": "No, there is a red boat in the picture."}],
            "rejected": [{"role": "assistant", "content": "Yes, there is a red cat in the picture."}],
        }


def measure(folder: Path, file: Path, ranks: int) -> dict[str, Any]:
    """Train twice with the same caches, empty at first; return seconds and MiB of both."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first = train(file, folder, Path(cache), ranks, "first")
        again = train(file, folder, Path(cache), ranks, "again")
    return {**{f"{name}_first": value for name, value in first.items()}, **again}


def train(file: Path, folder: Path, cache: Path, ranks: int, name: str) -> dict[str, Any]:
    """Run ``vapr train`` and watch it.

    Returns:
        ``first_step_seconds`` from the start of the process to the first step's line in metrics.jsonl, and
        ``resident_mib`` of a rank and its workers, the largest of them.
    """
    run = cache / name
    config = {
        "run_dir": str(run),
        "policy": {"model": str(folder / "policy"), "dtype": "float32", "lora": {"rank": 4}},
        "data": {"train": str(file), "workers": 1},
        "optim": {"pairs_per_step": PAIRS_PER_STEP, "max_steps": STEPS},
        "trackers": [],
    }
    (cache / "run.yaml").write_text(yaml.safe_dump(config))
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    began = time.perf_counter()
    processes = []
    with (cache / "log").open("w") as log:
        for rank, own in enumerate(launched(ranks)):
            command = [sys.executable, "-m", "vapr.cli", "train", str(cache / "run.yaml")]
            stderr = log if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env={**environment, **own}, stdout=stderr, stderr=stderr))
        seen = wait_for_lines(run / "metrics.jsonl", 1, processes)
        seconds = time.perf_counter() - began
        if seen:
            wait_for_lines(run / "metrics.jsonl", SETTLED, processes)
            memory = max(resident_mib(process.pid)["all"] for process in processes)
        codes = [process.wait() for process in processes]
    if any(codes) or not seen:
        raise RuntimeError(f"ended with {codes}:\n{(cache / 'log').read_text()[-3000:]}")
    return {"first_step_seconds": seconds, "resident_mib": memory}


def launched(ranks: int) -> list[dict[str, str]]:
    """Return what a launcher puts into the environment of each process; nothing for one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_for_lines(file: Path, count: int, processes: list[subprocess.Popen[bytes]]) -> bool:
    """Wait for so many lines of a file; False where the processes ended before."""
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    main()
