"""One process, and two under each engine, on the same pairs: seconds a step, bytes sent, bytes held by a rank.

    python -m bench.ranks

A small Qwen2.5-VL on a CPU over gloo. Bytes follow from shapes; seconds are those of this CPU, whose cores are shared.
Every weight is spread under ZeRO 3, however small. How to read the rows: bench/README.md.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from bench.record import percentiles, record
from bench.workloads import SHAPES, WORKLOADS, Subject
from vapr.config import Config
from vapr.families.processed_image import ProcessedImage
from vapr.training import engine_deepspeed, trainer
from vapr.training.engine import Engine

MODEL, WORKLOAD = "small-qwen2.5-vl", "answers"
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
    "reduce_scatter",
)  # fmt: skip
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "all-reduce": (2, {"engine": "all-reduce"}),
    **{f"ZeRO {stage}": (2, {"engine": "deepspeed", "zero": stage}) for stage in (1, 2, 3)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--quick", action="store_true", help="nothing is recorded")
    parser.add_argument("--inside", nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure_run(*map(Path, options.inside))
        return
    lines = ["| trained | arm | ms a step | MiB sent a step by a rank | MiB held by a rank |", "|" + " --- |" * 5]
    with tempfile.TemporaryDirectory() as name:
        for how in ("LoRA", "full"):
            subject = Subject(SHAPES[MODEL], Path(name) / how, torch.device("cpu"), lora=how == "LoRA")
            subject.model().save_pretrained(subject.folder)
            subject.pairs(WORKLOADS[WORKLOAD], options.pairs * options.steps)
            for arm, (size, parallel) in ARMS.items():
                measured = run_arm(subject, arm, size, parallel, options)
                fields = {"trained": how, "arm": arm, "ranks": size, "model": MODEL, "workload": WORKLOAD}
                fields |= {"pairs_per_step": options.pairs, **measured}
                print(json.dumps(fields if options.quick else record("ranks", **fields)), flush=True)
                cells = f"{1e3 * fields['seconds_p50']:.0f} | {fields['sent_mib']:.2f} | {fields['held_mib']:.1f}"
                lines.append(f"| {how} | {arm} | {cells} |")
    print("\n".join(lines))


def run_arm(
    subject: Subject, arm: str, size: int, parallel: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Train in processes of their own; return what rank 0 measured."""
    policy = subject.policy_config()
    run = subject.folder / arm.replace(" ", "-")
    lora = {"rank": policy.lora.rank, "alpha": policy.lora.alpha} if policy.lora else None
    config = {
        "run_dir": str(run),
        "policy": {"model": policy.model, "dtype": "float32", **({"lora": lora} if lora else {})},
        "data": {"train": str(subject.folder / f"{WORKLOAD}-0.jsonl"), "workers": 0},
        "packing": {"max_tokens": SHAPES[MODEL].max_tokens},
        "optim": {"pairs_per_step": options.pairs},
        "reference": {"cache_dir": str(subject.folder / "reference")},
        "parallel": parallel,
        "trackers": [],
    }
    file, out = run.with_suffix(".yaml"), run.with_suffix(".json")
    file.write_text(yaml.safe_dump(config))
    command = ["-m", "bench.ranks", "--inside", str(file), str(out)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"] if size > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def measure_run(config: Path, out: Path) -> None:
    """Train, and count in every step but the first two; on rank 0 write what was found."""
    sent = 0

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            nonlocal sent
            # Of a gather the output is the larger, of a reduction that scatters the input.
            sent += max(num_bytes(value) for value in (*tensors, *options.values()))
            return collective(*tensors, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name)))
    seconds: list[float] = []
    bytes_sent: list[int] = []
    held: list[int] = []
    began, before = time.perf_counter(), 0

    def measured_norm(engine: Any, gradient_norm: Callable[..., Tensor]) -> Tensor:
        held.append(live_bytes())
        return gradient_norm(engine)

    def measured_step(engine: Any, step: Callable[..., None]) -> None:
        nonlocal began, before
        step(engine)
        now = time.perf_counter()
        seconds.append(now - began)
        bytes_sent.append(sent - before)
        began, before = now, sent

    engine_deepspeed.KEPT_WHOLE = 0
    for kind in (Engine, engine_deepspeed.DeepSpeedEngine):
        kind.gradient_norm = lambda self, own=kind.gradient_norm: measured_norm(self, own)  # type: ignore[method-assign]
        kind.step = lambda self, own=kind.step: measured_step(self, own)  # type: ignore[method-assign]
    trainer.train(Config.load(config))
    if int(os.environ.get("RANK", 0)) == 0:
        p20, p50, p80 = percentiles(seconds[2:])
        times = {"seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80, "timed": len(seconds) - 2}
        counts = {"sent_mib": bytes_sent[-1] / 2**20, "held_mib": held[-1] / 2**20}
        out.write_text(json.dumps({**times, **counts}))


def num_bytes(value: Any) -> int:
    """Return the bytes of a tensor, or of a list of them."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0


def live_bytes() -> int:
    """Count the bytes of all tensors alive before an update but pictures: weights, gradients, optimizer state."""
    gc.collect()
    storages: dict[int, int] = {}
    pictures = set()
    for found in gc.get_objects():
        if type(found) is ProcessedImage:
            pictures.add(found.pixel_values.untyped_storage().data_ptr())
        elif issubclass(type(found), Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in storages.items() if place not in pictures)


if __name__ == "__main__":
    main()
