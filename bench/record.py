"""Timing of interleaved arms, and the rows of bench/results/.

numbers = measure({"vapr": step, "naive": other_step}, rounds=20, warmup=5, device=device)
record("my_bench", shape="short", provider="vapr", **numbers["vapr"].fields())
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RUN = uuid.uuid4().hex[:8]
"""Rows of one process share it: only their numbers may be divided by one another."""

PACKAGES = ("torch", "triton", "transformers", "trl", "peft")


@dataclass(slots=True)
class Timing:
    """Seconds of every timed step of one arm, and its peak memory."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None  # on the device, everything resident included; None on a CPU
    step_mib: float | None = None  # what a step adds to what was resident before it
    out_of_memory: bool = False

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)

    def fields(self) -> dict[str, Any]:
        """What a row says about it."""
        if self.out_of_memory:
            return {"absent": "out of memory"}
        p20, p50, p80 = percentiles(self.seconds)
        numbers = {"seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80, "timed": len(self.seconds)}
        return {**numbers, "peak_mib": self.peak_mib, "step_mib": self.step_mib}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def host_clock(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done a step, what the host does meanwhile included."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def device_clock(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a GPU works on a step. The host gets ahead of it first, so launching takes no part of them."""
    if device.type != "cuda":
        return host_clock(step, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    torch.cuda._sleep(10_000_000)  # cycles: about 5 ms
    start.record()
    step()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3


def measure(
    arms: Mapping[str, "Callable[[], Any] | Elsewhere"], *, rounds: int, warmup: int, device: torch.device,
    clock: Callable[[Callable[[], Any], torch.device], float] = host_clock,
) -> dict[str, Timing]:  # fmt: skip
    """Run every arm once a round, so that a busy machine is busy for all of them; the first arm changes each round.

    Memory is taken in the last warm-up round on a CPU (emptying the allocator would slow a timed step) and in every
    round on a GPU. An arm that runs out of GPU memory is dropped and says so. An arm in another process measures
    itself.
    """
    assert warmup > 0
    timings = {name: Timing() for name in arms}
    for number in range(warmup + rounds):
        names = list(arms)
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            timing = timings[name]
            if timing.out_of_memory:
                continue
            watch = device.type == "cuda" or number == warmup - 1
            try:
                arm = arms[name]
                one_step = arm.one_step if isinstance(arm, Elsewhere) else partial(step_here, arm)
                seconds = one_step(timing, device, clock, watch_memory=watch)
            except torch.OutOfMemoryError:
                timing.out_of_memory = True
                torch.cuda.empty_cache()
                continue
            if number >= warmup:
                timing.seconds.append(seconds)
    return timings


@runtime_checkable
class Elsewhere(Protocol):
    """An arm in another process. This one waits while it works, so nothing runs beside it."""

    def one_step(
        self, timing: Timing, device: torch.device, clock: Callable[[Callable[[], Any], torch.device], float], *,
        watch_memory: bool,
    ) -> float:  # fmt: skip
        """Do what :func:`step_here` does, there."""


def step_here(
    step: Callable[[], Any], timing: Timing, device: torch.device,
    clock: Callable[[Callable[[], Any], torch.device], float], *, watch_memory: bool,
) -> float:  # fmt: skip
    """Run one step; return its seconds, and note in ``timing`` what memory it took, if asked to."""
    before = _start_watching(device) if watch_memory else None
    seconds = clock(step, device)
    if before is not None:
        peak = _peak_mib(device)
        timing.step_mib = max(timing.step_mib or 0.0, peak - before)
        if device.type == "cuda":
            timing.peak_mib = max(timing.peak_mib or 0.0, peak)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_watching(device: torch.device) -> float | None:
    """Reset the high-water mark; returns the MiB in use now, None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that an earlier arm freed hides what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    except (OSError, AttributeError):
        return None
    return _status_mib("VmRSS")


def _peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status_mib("VmHWM")


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def matmul_flops(device: torch.device) -> dict[str, Any]:
    """The arithmetic ceiling, measured: a square matrix product on random data (bf16 on a GPU, fp32 on a CPU).

    On a CPU it is the faster of PyTorch's own and vapr's choice of a library.
    """
    from vapr_kernels.matmul import matmul  # an older build, for which this file keeps the time, has none

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = {"torch": lambda: a @ b, "vapr": lambda: matmul(a, b)}
    timings = measure(products, rounds=10, warmup=3, device=device, clock=device_clock)
    rates = {name: 2 * size**3 / timing.p50 / 1e12 for name, timing in timings.items()}
    about = {"matmul": f"{size}^3 {str(dtype).removeprefix('torch.')}", "matmul_tflops_of_torch": rates["torch"]}
    return {"matmul_tflops": max(rates.values()), **about}


def copy_bandwidth(device: torch.device) -> dict[str, Any]:
    """The memory ceiling, measured: a tensor copied to another, far larger than any cache; reads and writes count."""
    size = 2**30 if device.type == "cuda" else 2**27
    # Not zeros: a CPU's would be one page that nobody has written to.
    source, target = (torch.ones(size, device=device, dtype=torch.uint8) for _ in range(2))
    timing = measure(
        {"copy": lambda: target.copy_(source)}, rounds=10, warmup=3, device=device, clock=device_clock
    )["copy"]  # fmt: skip
    return {"copy_gb_per_second": 2 * size / timing.p50 / 1e9, "copy": f"{size >> 20} MiB"}


def record(bench: str, **fields: Any) -> dict[str, Any]:
    """Append one row to ``<bench>.jsonl`` in the folder that OUT names, or in bench/results/; returns the row."""
    row = {
        "bench": bench,
        "run": RUN,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        **fields,
    }
    folder = Path(os.environ.get("OUT") or REPOSITORY / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{bench}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def version(package: str) -> str | None:
    """Installed version, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """The GPU, or the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU {model}, {os.cpu_count()} cores"


def commit() -> str:
    """COMMIT where it is set (a copy of the working tree may come with an older git folder), else the checked-out
    commit, ``-dirty`` if tracked or new files differ from it."""
    if named := os.environ.get("COMMIT"):
        return named
    # A row just appended to bench/results must not make the next one dirty.
    status = _git("status", "--porcelain", "--", ".", ":!bench/results")
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None or status is None:
        return "unknown"
    return head + ("-dirty" if status else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
