"""The shared part of the scripts that time one operation: vapr's kernel against its peers.

A script says what its operation takes, who can compute it, and how much work that is (an :class:`Op`); ``main`` times
all providers side by side that agree with fp64, appends rows to bench/results/, prints a table and draws a plot.
How to read the rows, and how to add a provider: bench/README.md.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.record import REPOSITORY, copy_bandwidth, device_clock, matmul_flops, measure, record
from vapr_kernels import launch
from vapr_kernels.testing import in_dtype

Row = dict[str, Any]
Shape = dict[str, int]
Compute = Callable[..., Any]

FAILURES: tuple[type[Exception], ...] = (
    ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, OSError,
)  # fmt: skip
"""What a peer may raise where it does not work; it becomes the reason of an absent row."""
if launch.installed:
    from triton.errors import TritonError

    FAILURES += (TritonError,)

NO_GRADIENT = ("no-grad", "forward")
"""Passes without a backward pass; all others are timed forward and backward."""

AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest accepted ``relative_error`` by dtype, many times that of rounding. Whoever is further off does other work."""


class Absent(Exception):
    """A provider that cannot run here; says why."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a call has to do, whoever computes it."""

    flops: float = 0.0
    count: str = ""
    """How ``flops`` is counted, like 4NHV."""

    moved: int = 0
    """Bytes read and written, each once."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured on one kind of device."""

    shapes: dict[str, Shape]
    rows: list[int]
    quick_shapes: list[str]
    quick_rows: list[int]


@dataclass(frozen=True, kw_only=True)
class Op:
    name: str
    rows_name: str
    """What ``rows`` counts: the x axis of the plot."""

    passes: tuple[str, ...]
    providers: dict[str, Callable[[], Compute]]
    """By name, what makes the function that is timed, or raises :class:`Absent`. vapr's own begin with ``vapr``."""

    inputs: Callable[[Shape, int, str, torch.device, torch.dtype], tuple[Any, ...]]
    """Arguments for ``(shape, rows, pass)``; in a pass with gradients some require them."""

    work: Callable[[Shape, int, str, int], Work]
    """Work for ``(shape, rows, pass, bytes of an element)``."""

    truth: Compute
    """The naive twin, called in fp64."""

    gpu: Sizes
    cpu: Sizes
    dtype: torch.dtype | None = None
    """By default bf16 on a GPU and fp32 on a CPU."""

    chunk_truth: Callable[..., list[Tensor]] | None = None
    """Outputs and gradients in fp64 where the twin would not fit: (inputs, douts)."""

    share_inputs: bool = False
    """One set of inputs for all providers, where several would not fit. None of them may write to its inputs."""

    resident: Callable[[tuple[Any, ...]], Iterable[Any]] | None = None
    """Of the inputs, what is in memory for the whole step, such as weights. The rest that a forward pass keeps for the
    backward pass is counted; None: nothing is."""


@dataclass(eq=False)
class Calls:
    """Several calls of a provider one after another, each on other inputs: nothing is left in a cache from the last.

    Outputs are kept until the same inputs come again, so that memory of the last one is not written anew at once.
    """

    compute: Compute
    inputs: list[tuple[Any, ...]]
    douts: tuple[Tensor, ...] | None  # None: no gradients
    count: int = 1
    kept: dict[int, Any] = field(default_factory=dict)
    turn: int = 0

    def __call__(self) -> None:
        for _ in range(self.count):
            self.kept[self.turn] = run(self.compute, self.inputs[self.turn], self.douts)
            self.turn = (self.turn + 1) % len(self.inputs)


def run(compute: Compute, inputs: tuple[Any, ...], douts: tuple[Tensor, ...] | None) -> list[Tensor]:
    """Outputs, and the gradients by all inputs that require one."""
    if douts is None:
        with torch.no_grad():
            return as_list(compute(*inputs))
    outs = as_list(compute(*inputs))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(outs, leaves, [dout.to(out.dtype) for dout, out in zip(douts, outs, strict=True)])
    return [*(out.detach() for out in outs), *grads]


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def compiled(function: Compute) -> Callable[[], Compute]:
    """torch.compile of ``function``. On a CPU for all sizes at once, because the C++ compiler takes long."""
    return lambda: torch.compile(function, dynamic=not torch.cuda.is_available())


def needs_gpu() -> None:
    """For providers that compute on GPUs only."""
    if not torch.cuda.is_available():
        raise Absent("needs a GPU")


def main(op: Op, arguments: list[str] | None = None) -> list[Row]:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = op.gpu if on_gpu else op.cpu
    options = parse_options(op, sizes, arguments)
    if not on_gpu:
        torch.set_num_threads(options.threads)
    if arguments is None:  # a process of its own: what was imported is not to be searched for garbage again and again
        gc.freeze()
    ceilings = {**matmul_flops(device), **copy_bandwidth(device)}
    computes, absent = load(op, options.providers)
    rows: list[Row] = []
    for shape in options.shapes:
        left_out = dict(absent)
        for number in options.rows:
            for name in op.passes:
                case = {"shape": shape, "rows": number, "pass": name}
                check = number == options.rows[0]
                here = {name: compute for name, compute in computes.items() if name not in left_out}
                found = run_case(op, case, sizes.shapes[shape], here, left_out, ceilings, device, options, check)
                left_out |= {row["provider"]: row["absent"] for row in found if "absent" in row and "max_error" in row}
                rows += found
    show(op, rows)
    if not options.no_plot:
        draw(op, rows, options.plot)
    if broken := sorted({row["provider"] for row in rows if row["provider"].startswith("vapr") and "absent" in row}):
        sys.exit(f"bench.{op.name}: {', '.join(broken)} did not run; the table says why")
    return rows


def parse_options(op: Op, sizes: Sizes, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{op.name}", description=f"Time {op.name} and its peers.")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"of: {' '.join(sizes.shapes)}")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help=f"of: {', '.join(op.providers)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help=f"{op.rows_name}; default: {sizes.rows}")
    parser.add_argument("--rounds", type=int, help="timed samples of every provider")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="where the plots go; default: beside the rows")
    parser.add_argument("--no-plot", action="store_true", help="rows and table only")
    options = parser.parse_args(arguments)
    for what, known in (("shapes", sizes.shapes), ("providers", op.providers)):
        for name in getattr(options, what) or ():
            if name not in known:
                print(f"bench.{op.name}: no {what[:-1]} {name!r}; there are {', '.join(known)}", file=sys.stderr)
                sys.exit(2)
    if options.rows and min(options.rows) < 1:
        print(f"bench.{op.name}: --rows must be positive, got {min(options.rows)}", file=sys.stderr)
        sys.exit(2)
    options.shapes = options.shapes or (sizes.quick_shapes if options.quick else list(sizes.shapes))
    options.rows = sorted(options.rows or (sizes.quick_rows if options.quick else sizes.rows))
    options.providers = options.providers or list(op.providers)
    options.rounds = options.rounds or (10 if torch.cuda.is_available() and not options.quick else 5)
    options.plot = options.plot or Path(os.environ.get("OUT") or REPOSITORY / "bench" / "results") / "plots"
    return options


def load(op: Op, names: list[str]) -> tuple[dict[str, Compute], dict[str, str]]:
    """Functions of the providers that are there, and why the others are not."""
    computes, absent = {}, {}
    for name in names:
        try:
            computes[name] = op.providers[name]()
        except ModuleNotFoundError as error:
            absent[name] = f"{error.name} is not installed"
        except (Absent, ImportError) as error:
            absent[name] = first_line(error)
    return computes, absent


def run_case(
    op: Op, case: Row, shape: Shape, computes: dict[str, Compute], absent: dict[str, str], ceilings: Row,
    device: torch.device, options: argparse.Namespace, check: bool,
) -> list[Row]:  # fmt: skip
    """Rows of all providers for one shape, number of rows and pass."""
    if device.type == "cuda":
        torch._dynamo.reset()  # torch.compile: one program for each case, and no limit to how many
    dtype = op.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    work = op.work(shape, case["rows"], case["pass"], dtype.itemsize)
    about = {**case, "dtype": str(dtype).removeprefix("torch."), **shape}
    torch.manual_seed(0)
    inputs = op.inputs(shape, case["rows"], case["pass"], device, dtype)
    douts = None if case["pass"] in NO_GRADIENT else make_douts(op, inputs)
    truth = fp64_truth(op, inputs, douts) if check else None
    arms: dict[str, Calls] = {}
    errors: dict[str, Row] = {}
    kept: dict[str, Row] = {}
    reasons = dict(absent)
    for name, compute in computes.items():
        try:
            calls = Calls(compute, [inputs] if op.share_inputs else input_sets(inputs, device), douts)
            first = run(compute, calls.inputs[0], douts)
            errors[name] = errors_of(first, truth) if truth is not None else {}
            if not errors[name].get("relative_error", 0.0) <= AGREEMENT[dtype]:
                reasons[name] = f"computes something else: relative error {errors[name]['relative_error']:.1e}"
                continue
            if op.resident is not None and douts is not None:
                kept[name] = {"kept_bytes": kept_bytes(compute, inputs, op.resident(inputs))}
            calls.count = calls_per_sample(calls, device)
        except FAILURES as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            reasons[name] = "out of memory" if out_of_memory else f"{type(error).__name__}: {first_line(error)}"
            continue
        arms[name] = calls
    timings = measure(arms, rounds=options.rounds, warmup=2, device=device, clock=device_clock)
    rows = []
    for name in [name for name in options.providers if name in reasons or name in arms]:
        fields: Row = {"absent": reasons[name], **errors.get(name, {})} if name in reasons else timings[name].fields()
        if name in arms and timings[name].seconds:
            count = arms[name].count
            for key in ("seconds_p20", "seconds_p50", "seconds_p80"):
                fields[key] /= count
            fields |= {"calls_per_sample": count, **rates(work, fields["seconds_p50"], ceilings), **errors[name]}
            fields |= kept.get(name, {})
        rows.append(record(op.name, **about, provider=name, **ceilings, **fields))
    del arms, inputs, truth
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def input_sets(inputs: tuple[Any, ...], device: torch.device) -> list[tuple[Any, ...]]:
    """As many copies of the inputs as it takes to outgrow the last cache several times, and never the originals."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 * 2**20
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    copy = lambda x: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
    return [tuple(copy(x) for x in inputs) for _ in range(max(1, min(8, -(-4 * cache // size))))]


def make_douts(op: Op, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Gradients of the outputs, fp32; the same for all providers."""
    with torch.no_grad():
        shapes = [out.shape for out in as_list(op.truth(*inputs))] if op.chunk_truth is None else [inputs[0].shape[:1]]
    device = next(x.device for x in inputs if isinstance(x, Tensor))
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def fp64_truth(op: Op, inputs: tuple[Any, ...], douts: tuple[Tensor, ...] | None) -> list[Tensor]:
    if op.chunk_truth is not None:
        return op.chunk_truth(inputs, douts)
    return run(op.truth, in_dtype(inputs, torch.float64), douts)


def errors_of(got: list[Tensor], truth: list[Tensor]) -> Row:
    """Largest absolute error of the first output; largest relative error, by the norm, of outputs and gradients."""
    relative = [float((g.double() - t).norm() / t.norm().clamp(min=1e-300)) for g, t in zip(got, truth, strict=True)]
    return {"max_error": float((got[0].double() - truth[0]).abs().max()), "relative_error": max(relative)}


def kept_bytes(compute: Compute, inputs: tuple[Any, ...], resident: Iterable[Any]) -> int:
    """Bytes of all memory that autograd keeps of a forward pass for the backward pass, but not of what is resident.

    A tensor that is part of a larger one keeps all of it.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute(*inputs)
    for x in resident:
        if isinstance(x, Tensor):
            kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def calls_per_sample(calls: Calls, device: torch.device) -> int:
    """Short calls are timed several at a time: a clock is read too coarsely for one."""
    device_clock(calls, device)
    seconds = device_clock(calls, device)
    return max(1, min(8, int(2e-3 / max(seconds, 1e-9))))


def rates(work: Work, seconds: float, ceilings: Row) -> Row:
    """What the least work comes to per second, and its share of what this device was measured to do."""
    if work.flops:
        rate = work.flops / seconds / 1e12
        return {"flops": work.count, "tflops": rate, "ceiling_share": rate / ceilings["matmul_tflops"]}
    rate = work.moved / seconds / 1e9
    return {"moved_bytes": work.moved, "gb_per_second": rate, "ceiling_share": rate / ceilings["copy_gb_per_second"]}


def show(op: Op, rows: list[Row]) -> None:
    console = Console(width=max(Console().width, 160), highlight=False)
    here = {row["provider"] for row in rows if "absent" not in row}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = Table(title=f"{op.name}: {shape}", title_justify="left")
        left = (op.rows_name, "pass", "provider")
        unit = "TFLOP/s" if any("tflops" in row for row in rows) else "GB/s"
        kept = ("MiB kept",) if op.resident is not None else ()
        memory = ("MiB of a call", *kept)
        for column in (*left, "ms p20/p50/p80", unit, "of ceiling", *memory, "max error", "relative error"):
            table.add_column(
                column,
                justify="left" if column in left[1:] else "right",
                no_wrap=column in (*left[1:], "ms p20/p50/p80"),
            )
        before = None
        for row in (row for row in rows if row["shape"] == shape and row["provider"] in here):
            case = (row["rows"], row["pass"])
            if before not in (None, case):
                table.add_section()
            before = case
            name = f"{row['pass']}, {row['flops']}" if "flops" in row else row["pass"]
            table.add_row(f"{row['rows']:,}", name, row["provider"], *cells(op, row))
        console.print(table)
    for name, reason in {row["provider"]: row["absent"] for row in rows if row["provider"] not in here}.items():
        console.print(f"{name} is absent: {reason}", markup=False)


def cells(op: Op, row: Row) -> list[str]:
    if "absent" in row:
        return [row["absent"]]
    milliseconds = "/".join(f"{1e3 * row[f'seconds_{p}']:.3g}" for p in ("p20", "p50", "p80"))
    rate = row.get("tflops", row.get("gb_per_second"))
    memory = ["" if row["step_mib"] is None else f"{row['step_mib']:,.0f}"]
    if op.resident is not None:
        memory.append(f"{row['kept_bytes'] / 2**20:,.2f}" if "kept_bytes" in row else "")
    errors = [f"{row[key]:.1e}" if key in row else "" for key in ("max_error", "relative_error")]
    return [milliseconds, f"{rate:.4g}", f"{row['ceiling_share']:.0%}", *memory, *errors]


def draw(op: Op, rows: list[Row], folder: Path) -> None:
    if not any("ceiling_share" in row for row in rows):
        return
    try:
        from bench.plots import draw_op
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed")
        return
    for file in draw_op(op.name, op.rows_name, rows, folder):
        print(f"plot: {file}")
