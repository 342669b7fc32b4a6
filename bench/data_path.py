"""How fast pairs come out of the data path, and whether start and memory grow with the file: vapr against TRL.

    python -m bench.data_path

Processors only, no model: nothing here needs a GPU. How to read the rows: bench/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table

from bench.data_arms import ARMS, PAIRS_PER_STEP, measure_arm
from bench.data_rows import DataFolder
from bench.record import REPOSITORY, record, version
from vapr.batches.workers import default_workers

COLUMNS = (
    "open_seconds_first", "first_step_seconds_first", "open_seconds", "first_step_seconds", "pairs_per_second",
    "resident_mib", "resident_growth_mib", "file_growth_mib",
)  # fmt: skip


def main() -> None:
    options = parse_options()
    if options.one:
        print(json.dumps(measure_arm(**json.loads(options.one))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = DataFolder(Path(folder), options.images)
        for num_rows in options.rows:
            file = data.write_rows(num_rows)
            for provider in options.providers:
                fields = {
                    **describe(data, file, num_rows, provider),
                    **run_case(provider, file, data.model, options.pairs),
                }
                rows.append(fields if options.quick else record("data_path", **fields))
                print(json.dumps(fields), flush=True)
            file.unlink()
    show(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=None, help="rows of each file; 1,000 to a million")
    parser.add_argument("--providers", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--pairs", type=int, default=None, help=f"pairs timed, in steps of {PAIRS_PER_STEP}")
    parser.add_argument("--images", type=int, default=None, help="distinct photographs")
    parser.add_argument("--quick", action="store_true", help="one small file and few pairs; nothing is recorded")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)  # what run_case starts
    options = parser.parse_args()
    options.rows = options.rows or ([1_000] if options.quick else [1_000, 10_000, 100_000, 1_000_000])
    options.pairs = options.pairs or PAIRS_PER_STEP * (4 if options.quick else 20)
    options.images = options.images or (100 if options.quick else 1_000)
    if options.pairs % PAIRS_PER_STEP:
        parser.error(f"--pairs must be a multiple of {PAIRS_PER_STEP}")
    return options


def describe(data: DataFolder, file: Path, num_rows: int, provider: str) -> dict[str, Any]:
    """What a row measured."""
    return {
        "rows": num_rows,
        "provider": provider,
        "file_mib": file.stat().st_size / 2**20,
        "images": len(data.photos),
        "image_kib": data.image_kib,
        "image_tokens": data.image_tokens,
        "workers": default_workers(),
        "pairs_per_step": PAIRS_PER_STEP,
    }


def run_case(provider: str, file: Path, model: Path, num_pairs: int) -> dict[str, Any]:
    """Measure one arm on one file: in a process that finds no index, then in another that finds the first one's.

    Raises:
        RuntimeError: with what the process said, if it failed.
    """
    if provider.startswith("trl"):
        for package in ("trl", "datasets"):
            if version(package) is None:
                return {"absent": f"{package} is not installed"}
    job = {"provider": provider, "file": str(file), "model": str(model)}
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        first = run_process({**job, "timed_steps": 0}, cache)
        again = run_process({**job, "timed_steps": num_pairs // PAIRS_PER_STEP}, cache)
    return {**{f"{name}_first": value for name, value in first.items()}, **again}


def run_process(job: dict[str, Any], cache: str) -> dict[str, Any]:
    """Run :func:`measure_arm` in a fresh process of this checkout whose caches all lie in ``cache``."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    caches = {"XDG_CACHE_HOME": cache, "HF_HOME": f"{cache}/hf", "HF_DATASETS_CACHE": f"{cache}/hf/datasets"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.data_path", "--one", json.dumps(job)],
        cwd=REPOSITORY,
        env={**os.environ, **caches, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{job['provider']} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="data path")
    for name in ("rows", "provider", *COLUMNS):
        table.add_column(name.replace("_", " "), justify="left" if name == "provider" else "right")
    for row in rows:
        cells = [f"{row[name]:,.2f}" if name in row else row.get("absent", "") for name in COLUMNS]
        table.add_row(f"{row['rows']:,}", row["provider"], *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
