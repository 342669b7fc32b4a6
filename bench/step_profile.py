"""Where a training step's time goes, against what its arithmetic and its memory would take.

PyTorch's profiler says what ran, :mod:`bench.step_parts` what it was part of, :mod:`bench.step_ideal` how long it had
to take. Ranges for the profiler are put around vapr's functions from here, while a profile is taken; vapr has none.
"""

import contextlib
import dataclasses
import functools
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from bench.arms import VaprArm
from bench.record import copy_bandwidth, matmul_flops, record, synchronize
from bench.step_ideal import ideal_work, sizes_of
from bench.step_parts import (
    ATTENTION,
    DATA,
    HEAD,
    LOSS,
    OPTIMIZER,
    RANGE,
    ROTARY,
    TOWER,
    WHOLE,
    Event,
    Spent,
    add_up,
    part_named,
)
from vapr.batches.loader import PairLoader
from vapr.batches.steps import Step
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import read_shapes

STEP = "one step"
NODE = "autograd::engine::evaluate_function"
REPEATS = 3

FUNCTIONS = (
    ("vapr.model.policy", "_image_features", TOWER),
    ("vapr.model.logps", "linear_logps", HEAD),
    ("vapr.training.step", "preference_loss", LOSS),
    ("vapr_kernels.naive", "preference_loss", LOSS),
    ("vapr.training.step", "_totals", LOSS),
    ("vapr.model.attention", "_sdpa", ATTENTION),
    ("vapr.model.attention", "causal_attention", ATTENTION),
    ("vapr.model.attention", "_varlen", ATTENTION),
    ("vapr.model.attention", "rotate", ROTARY),
    ("vapr.model.attention", "gather_keys_values", ROTARY),
    ("vapr.model.attention", "gather_rows", ROTARY),
    ("vapr.model.decoder", "apply_rotary_pos_emb", ROTARY),
    ("vapr.model.policy", "rotary_tables", ROTARY),
)
"""Functions that a range is put around. One that is gone is left out: shapes tell most of the rest."""


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """One profiled step."""

    step: Step
    profiler: Any  # of PyTorch
    events: list[Event]
    seconds: float


def profile_step(arm: VaprArm, loader: PairLoader, about: dict[str, Any], trace: Path | None = None) -> None:
    """Profile a few steps; record and print the parts of the shortest: what other processes took is not in it.

    Args:
        arm: starts again at the first row.
        loader: of its pairs, as a run has it.
        about: what its rows say was measured.
        trace: file that the step's Chrome trace is written to.
    """
    device = arm.policy.device
    plain, profiles, products, copies = [], [], [], []
    arm.start(prebuilt=False, loader=loader)
    arm()  # warms up
    for _ in range(min(REPEATS, (arm.num_steps - 1) // 2)):
        synchronize(device)
        began = time.perf_counter()
        arm()
        synchronize(device)
        plain.append(time.perf_counter() - began)
        profiles.append(take_profile(arm, device))
        products.append(matmul_flops(device))
        copies.append(copy_bandwidth(device))
    fastest = (
        max(products, key=lambda one: one["matmul_tflops"]),
        max(copies, key=lambda one: one["copy_gb_per_second"]),
    )
    ceiling = fastest[0] | fastest[1]
    shortest = min(profiles, key=lambda one: one.seconds)
    packs = [PackSizes.of(batch) for batch in shortest.step.batches]
    shapes = read_shapes(arm.config.policy)
    spent = add_up(shortest.events, sizes_of(shapes, packs))
    ideal = {
        part: work.seconds(ceiling["matmul_tflops"], ceiling["copy_gb_per_second"])
        for part, work in ideal_work(shapes, packs, arm.policy.dtype.itemsize).items()
    }
    rows = part_rows(spent, ideal)
    whole = {"step_seconds": shortest.seconds, "step_seconds_unprofiled": min(plain)}
    for row in rows:
        record("train_step_profile", **about, arm="vapr shared cached", **row, **whole, **ceiling)
    show(rows, about, whole, ceiling)
    if trace is not None:
        shortest.profiler.export_chrome_trace(str(trace))


def take_profile(arm: VaprArm, device: torch.device) -> Profile:
    """Take one step under the profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiled = profile(activities=activities, record_shapes=True)
    with ranges(arm) as steps, profiled as profiler, record_function(STEP):
        arm()
        synchronize(device)
    recorded = profiler.events()
    (step,) = (e for e in recorded if e.name == STEP and _on_host(e))
    seconds = step.cpu_time_total / 1e6
    events = kernels_of(recorded, step) if device.type == "cuda" else operators_of(step)
    return Profile(steps[-1], profiler, events, seconds)


@contextlib.contextmanager
def ranges(arm: VaprArm) -> Iterator[list[Step]]:
    """Put ranges around vapr's functions and the arm's data. Yields a list to which each step is added."""
    taken: list[Step] = []
    own = arm.steps

    def watched() -> Iterator[Step]:
        while True:
            with record_function(RANGE + DATA):
                step = next(own)
            taken.append(step)
            yield step

    places: list[tuple[Any, str, str]] = [(importlib.import_module(m), name, part) for m, name, part in FUNCTIONS]
    places += [(arm.engine, name, OPTIMIZER) for name in ("gradient_norm", "step")]
    places.append((arm.reference, "logps", LOSS))
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, _ranged(getattr(owner, name), part)))
        arm.steps = watched()
        try:
            yield taken
        finally:
            arm.steps = own


def _ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(RANGE + part):
            return function(*arguments, **options)

    return run


def operators_of(step: Any) -> list[Event]:
    """Return the own time of all that ran on the step's thread; together it is the step's."""
    return [
        Event(e.name, e.self_cpu_time_total / 1e6, _shapes(e), under, backward) for e, under, backward in _walk([step])
    ]


def kernels_of(recorded: Any, step: Any) -> list[Event]:
    """Return the kernels of a GPU by the operators that launched them, and the time in which none ran.

    That is the host's: it waited for data, or was not fast enough.
    """
    inside = [e for e in recorded if step.time_range.start <= e.time_range.start <= step.time_range.end]
    on_host = [e for e in inside if _on_host(e)]
    roots = [step, *(e for e in on_host if e.cpu_parent is None and e is not step)]  # autograd has threads of its own
    events = [
        Event(e.name, kernel.duration / 1e6, _shapes(e), under, backward, kernel.name)
        for e, under, backward in _walk(roots)
        for kernel in e.kernels
    ]
    events += _unlinked([e for e in inside if not _on_host(e)], events)
    idle = max(0.0, step.cpu_time_total / 1e6 - sum(event.seconds for event in events))
    waited = sum(e.cpu_time_total for e in on_host if e.name == RANGE + DATA) / 1e6
    events.append(Event("GPU without work, host waits for data", min(idle, waited), under=DATA))
    events.append(Event("GPU without work", idle - min(idle, waited)))
    return events


def _unlinked(on_gpu: list[Any], linked: list[Event]) -> list[Event]:
    """Return what ran on the GPU and no operator says that it launched it, one event a kernel's name."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for e in on_gpu:
        if not (e.is_user_annotation or e.name == STEP or e.name.startswith(RANGE)):
            seconds[e.name] += e.time_range.elapsed_us() / 1e6
    for event in linked:
        seconds[event.kernel] -= event.seconds
    return [Event(name, left, kernel=name) for name, left in seconds.items() if left > 1e-9]


def _on_host(e: Any) -> bool:
    return str(e.device_type.name) == "CPU"


def _walk(roots: list[Any]) -> Iterator[tuple[Any, str, bool]]:
    """Yield each operator, the part that it ran under ("" where none says), and whether it ran in a backward pass.

    A node of the backward pass belongs to what made it: of all operators that carry its number, the last to begin.
    """
    made: dict[int, str] = {}
    left = [(root, "", False) for root in reversed(roots)]
    while left:
        e, under, backward = left.pop()
        if e.name.startswith(NODE):
            under, backward = made.get(e.sequence_nr, ""), True
        if under not in WHOLE:
            under = part_named(e.name) or under
        if not backward and e.sequence_nr >= 0:
            made[e.sequence_nr] = under
        yield e, under, backward
        left += [(child, under, backward) for child in reversed(e.cpu_children)]


def _shapes(e: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(n for n in shape if isinstance(n, int)) for shape in e.input_shapes or ())


def part_rows(spent: dict[str, Spent], ideal: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Return what is recorded of each part, largest gap first."""
    whole = sum(one.seconds for one in spent.values())
    rows = [
        {
            "part": part,
            "seconds": one.seconds,
            "seconds_forward": one.forward,
            "seconds_backward": one.backward,
            "share": one.seconds / whole,
            "ideal_seconds": sum(ideal[part]),
            "ideal_seconds_forward": ideal[part][0],
            "ideal_seconds_backward": ideal[part][1],
            "gap_seconds": one.seconds - sum(ideal[part]),
            "operators": dict(sorted(one.operators.items(), key=lambda item: -item[1])[:5]),
        }
        for part, one in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["gap_seconds"])


def largest_gap(rows: list[dict[str, Any]]) -> str:
    """Name the part that is farthest from its ideal."""
    first = rows[0]
    whole = sum(row["seconds"] for row in rows)
    return f"largest gap: {first['part']}, {1e3 * first['gap_seconds']:.0f} ms of {1e3 * whole:.0f} above its ideal"


def show(rows: list[dict[str, Any]], about: dict[str, Any], whole: dict[str, float], ceiling: dict[str, Any]) -> None:
    """Print the parts of a step."""
    table = Table(
        title=f"{about['model']} {about['workload']}: a step of {1e3 * whole['step_seconds']:.0f} ms "
        f"({1e3 * whole['step_seconds_unprofiled']:.0f} without the profiler); ideal at {ceiling['matmul_tflops']:.3g} "
        f"TFLOP/s and {ceiling['copy_gb_per_second']:.3g} GB/s",
        title_justify="left",
    )
    table.add_column("part")
    for column in ("ms", "forward", "backward", "share", "ideal", "gap"):
        table.add_column(column, justify="right")
    table.add_column("most of it")
    total = {key: sum(row[key] for row in rows) for key, value in rows[0].items() if isinstance(value, float)}
    for row in [*rows, {"part": "step", "operators": {}, **total}]:
        keys = ("seconds", "seconds_forward", "seconds_backward")
        ms = [f"{1e3 * row[key]:.1f}" for key in keys]
        operators = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in list(row["operators"].items())[:3])
        table.add_row(
            row["part"], *ms, f"{row['share']:.0%}", f"{1e3 * row['ideal_seconds']:.1f}",
            f"{1e3 * row['gap_seconds']:.1f}", operators,
        )  # fmt: skip
    console = Console(width=max(Console().width, 150))
    console.print(table)
    console.print(largest_gap(rows))
