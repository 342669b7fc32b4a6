"""This build against another commit of vapr: whole commands on the same files, in turn, in one run.

    python -m bench.against 5b60c84

Each build runs in processes of its own, from a work tree of its commit. The first of the two changes every round, so
that a busy machine is busy for both; a case's ratio is the median of the rounds' ratios. How to read the rows:
bench/README.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench import editing_rows
from bench.data_rows import DataFolder
from bench.record import REPOSITORY, record
from bench.work_tree import work_tree
from vapr.demo.tiny_policy import build_tiny_policy

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
PAIRS_PER_STEP = 16
STEPS_AN_EPOCH = 5
EDIT_ROWS = 4_000


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with work_tree(options.commit, folder / "against") as tree:
            for case, run in cases(folder).items():
                if case in options.cases:
                    compare(case, run, {"vapr": REPOSITORY, f"vapr {options.commit}": tree}, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--cases", nargs="+", default=["train", "train image", "edit", "start"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="record nothing")
    return parser.parse_args()


def compare(
    case: str, run: Callable[[Path, Path], dict[str, float]], trees: dict[str, Path], options: argparse.Namespace
) -> None:
    """Run a case with each build in turn; print and record its rates and their ratio."""
    rates: dict[str, list[float]] = {name: [] for name in trees}
    losses: dict[str, float] = {}
    for number in range(options.rounds):
        for name in list(trees) if number % 2 else reversed(trees):
            with tempfile.TemporaryDirectory() as out:
                got = run(trees[name], Path(out))
            rates[name].append(got["rate"])
            losses.setdefault(name, got.get("loss", 0.0))
            print(f"{case}: {name} {got['rate']:.2f} a second", flush=True)
    ours, theirs = rates.values()
    if len({round(loss, 5) for loss in losses.values()}) > 1:
        sys.exit(f"{case}: the builds do not compute the same: {losses}")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{case}: {ratio:.3f} of the rate of {options.commit}", flush=True)
    for name, values in rates.items():
        fields = {"case": case, "provider": name, "rate_p50": statistics.median(values), "rounds": len(values)}
        if not options.quick:
            record("against", **fields, ratio=ratio if name == "vapr" else None, against=options.commit)


def cases(folder: Path) -> dict[str, Callable[[Path, Path], dict[str, float]]]:
    """Make what the cases read; each takes a build's tree and an empty folder and returns its rate."""
    data = DataFolder(folder, PAIRS_PER_STEP * STEPS_AN_EPOCH // 2)
    rows = data.write_rows(PAIRS_PER_STEP * STEPS_AN_EPOCH)
    policy = build_tiny_policy("qwen2_5_vl", folder / "policy", data.words * 20, **SIZES)
    images = editing_rows.write_images(folder, 100)
    instructions = editing_rows.write_rows(folder / "edit.jsonl", editing_rows.rows(EDIT_ROWS, images))
    config: dict[str, Any] = {
        "policy": {"model": str(policy), "dtype": "float32", "lora": {"rank": 16, "alpha": 32}},
        "data": {"train": str(rows), "workers": 1},
        "optim": {"pairs_per_step": PAIRS_PER_STEP, "epochs": 3},
        "packing": {"max_tokens": 4096},
    }
    return {
        "train": lambda tree, out: train(tree, out, config),
        "train image": lambda tree, out: train(tree, out, config | {"packing": {"max_tokens": 4096, "share": "image"}}),
        "edit": lambda tree, out: edit(tree, out, instructions),
        "start": lambda tree, out: start(tree),
    }


def train(tree: Path, out: Path, config: dict[str, Any]) -> dict[str, float]:
    """Pairs a second of the steps whose reference is cached, and the last loss."""
    file = out / "run.yaml"
    file.write_text(json.dumps({**config, "run_dir": str(out / "run"), "reference": {"cache_dir": str(out / "cache")}}))
    vapr(tree, "train", str(file))
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    cached = lines[STEPS_AN_EPOCH + 1 :]
    return {"rate": statistics.median(line["pairs_per_second"] for line in cached), "loss": lines[-1]["loss"]}


def edit(tree: Path, out: Path, rows: Path) -> dict[str, float]:
    """Rows a second of the rules editor, its start included."""
    return {"rate": EDIT_ROWS / vapr(tree, "edit", str(rows), "--out", str(out / "job"))}


def start(tree: Path) -> dict[str, float]:
    """Starts of ``vapr --help`` a second."""
    return {"rate": 1 / vapr(tree, "--help")}


def vapr(tree: Path, *arguments: str) -> float:
    """Run a command of the build in ``tree``; return its seconds."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "vapr.cli", *arguments], cwd=tree, env=environment, check=True, capture_output=True
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
