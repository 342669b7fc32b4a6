"""Every Triton kernel compiled for every GPU generation, without a GPU: registers, spills, shared memory, SASS.

    python -m bench.offline_compile
    python -m bench.offline_compile --capabilities 90 --ops swiglu

There is no list of signatures here that could drift from the code. The operations are called as a training step calls
them, on small CPU tensors, while Triton believes that a GPU is there and compiles what it is asked to launch. Triton
specialises a kernel on dtypes, on the divisibility of sizes and addresses by 16 and on compile-time parameters; so few
rows and a narrow vocabulary compile to the very kernels of a 7B model, as long as widths that set block sizes are real.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel is never compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

import vapr_kernels
from bench.record import record
from vapr.config import LossConfig
from vapr_kernels import launch
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.losses import Completions

# What a block may use, and how many multiprocessors a launcher would find.
CHIPS = {
    80: {"chip": "A100", "shared_limit": 166_912, "num_sms": 108},
    86: {"chip": "A10, RTX 30", "shared_limit": 101_376, "num_sms": 84},
    89: {"chip": "L4, RTX 40", "shared_limit": 101_376, "num_sms": 128},
    90: {"chip": "H100, H200", "shared_limit": 232_448, "num_sms": 132},
    120: {"chip": "RTX 50", "shared_limit": 101_376, "num_sms": 170},
}
REGISTERS_PER_SM = 65_536
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes a thread moves by suffix of a SASS load or store; 4 without one."""

NARROW = {  # kernel: least share of its bytes in 128-bit accesses, where it cannot be 0.7 as elsewhere
    "_add_target_rows_kernel": 0.5,  # a number or two for every row
    "_target_logits_kernel": 0.5,  # a label and a logit for every row
    "_exp_rows_kernel": 0.6,  # a few numbers for every row, beside a row as long as the vocabulary
    "_settle_kernel": 0.0,  # a few numbers a row, and rows come in any number
    "_list_kernel": 0.0,
    "_gather_rows_bwd_kernel": 0.5,  # where each copy lies, written out for every step of an unrolled loop
    "_preference_loss_kernel": 0.0,  # tokens of one completion, which begins anywhere
    "_token_gradient_kernel": 0.0,  # tokens of any completion
}
NO_TMA = {"_exp_logits_kernel"}  # reads rows that are listed, so they lie anywhere

D, INTERMEDIATE, HEAD_DIM = 3584, 18944, 128  # Qwen2.5-VL-7B
VOCABULARY = 4368  # like its 152,064: divisible by 16, more than a block and a whole number of none
ROWS = 45  # rows come in any number

Row = dict[str, Any]


# What is compiled. Each case calls one operation forward and, where it has one, backward.


def _leaf(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=grad)


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def linear_logps(dtype: torch.dtype, *, mode: Any, hidden: bool = True, head: bool = False) -> None:
    x, w = _leaf(ROWS, D, dtype=dtype, grad=hidden), _leaf(VOCABULARY, D, dtype=dtype, grad=head)
    logps = vapr_kernels.linear_logps(x, w, torch.arange(ROWS), mode=mode)
    if hidden or head:
        _backward(logps)


def swiglu(dtype: torch.dtype) -> None:
    _backward(vapr_kernels.swiglu(_leaf(ROWS, INTERMEDIATE, dtype=dtype), _leaf(ROWS, INTERMEDIATE, dtype=dtype)))


def rms_norm(dtype: torch.dtype, *, width: int = D, trained: bool) -> None:
    weight = _leaf(width, dtype=dtype, grad=trained)
    _backward(vapr_kernels.rms_norm(_leaf(ROWS, width, dtype=dtype), weight, 1e-6))


def add_rms_norm(dtype: torch.dtype, *, width: int = D, trained: bool) -> None:
    x, residual = _leaf(ROWS, width, dtype=dtype), _leaf(ROWS, width, dtype=dtype)
    _backward(*vapr_kernels.add_rms_norm(x, residual, _leaf(width, dtype=dtype, grad=trained), 1e-6))


def rotary(dtype: torch.dtype) -> None:
    cos, sin = (_leaf(ROWS, HEAD_DIM, dtype=dtype, grad=False) for _ in range(2))
    _backward(vapr_kernels.rotary(_leaf(ROWS, 28, HEAD_DIM, dtype=dtype), cos, sin))


def gather_rows(dtype: torch.dtype) -> None:
    index = RowIndex.build(torch.cat([torch.arange(ROWS), torch.arange(ROWS // 2)]), ROWS)
    _backward(vapr_kernels.gather_rows(_leaf(ROWS, D, dtype=dtype), index))


def gather_keys_values(dtype: torch.dtype) -> None:
    k, v = (_leaf(ROWS, 4, HEAD_DIM, dtype=dtype) for _ in range(2))
    cos, sin = (_leaf(ROWS, HEAD_DIM, dtype=dtype, grad=False) for _ in range(2))
    index = RowIndex.build(torch.cat([torch.arange(ROWS), torch.arange(ROWS // 2)]), ROWS)
    _backward(*vapr_kernels.gather_keys_values(k, v, cos, sin, index))


def preference_loss(dtype: torch.dtype, images: bool = False) -> None:
    """Log-probs are fp32, whatever the model is. With ``images`` a pair has five paths, and its own beta."""
    num = 5 * ROWS if images else 2 * ROWS
    ends = torch.arange(num) + 1
    index = RowIndex.build(torch.arange(num), num)
    completions = Completions(
        counted=index, token_weights=torch.ones(num), completion=torch.arange(num), ends=ends,
        chosen=torch.arange(ROWS), rejected=torch.arange(ROWS, 2 * ROWS), pair_weights=torch.ones(ROWS),
        others=torch.arange(2 * ROWS, num).reshape(ROWS, 3) if images else None,
        betas=torch.ones(ROWS, 2) if images else None,
    )  # fmt: skip
    terms = [LossConfig(), *([LossConfig(kind="image"), LossConfig(kind="symmetric")] if images else [])]
    logps = _leaf(num, dtype=torch.float32)
    losses = vapr_kernels.preference_loss(logps, logps.detach(), completions, terms, mean_chosen_length=1.0)
    _backward(losses.losses)


CASES: dict[str, tuple[str, Callable[[torch.dtype], None]]] = {
    "linear_logps no-grad": ("linear_logps", partial(linear_logps, mode="auto", hidden=False)),
    "linear_logps one-pass": ("linear_logps", partial(linear_logps, mode="one-pass")),
    "linear_logps one-pass trained": ("linear_logps", partial(linear_logps, mode="one-pass", head=True)),
    "linear_logps recompute": ("linear_logps", partial(linear_logps, mode="recompute")),
    "linear_logps recompute trained": ("linear_logps", partial(linear_logps, mode="recompute", head=True)),
    "linear_logps chunked": ("linear_logps", partial(linear_logps, mode="chunked", head=True)),
    "swiglu": ("swiglu", swiglu),
    "rms_norm": ("rms_norm", partial(rms_norm, trained=False)),
    "rms_norm trained": ("rms_norm", partial(rms_norm, trained=True)),
    "add_rms_norm": ("add_rms_norm", partial(add_rms_norm, trained=False)),
    "add_rms_norm trained": ("add_rms_norm", partial(add_rms_norm, trained=True)),
    "add_rms_norm 1536": ("add_rms_norm", partial(add_rms_norm, width=1536, trained=True)),
    "rotary": ("rotary", rotary),
    "gather_rows": ("gather_rows", gather_rows),
    "gather_keys_values": ("gather_keys_values", gather_keys_values),
    "preference_loss": ("preference_loss", preference_loss),
    "preference_loss of images": ("preference_loss", partial(preference_loss, images=True)),
}


# How it is compiled.


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Any]]:
    """Launches compile for ``capability`` and run nothing; the list fills with the compiled kernels."""
    kernels: list[Any] = []
    launched = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launched(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        return kernel

    device = SimpleNamespace(
        # A JITFunction remembers what it compiled by device number: one number for each target.
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    with ExitStack() as stack:
        for owner, name, value in (
            (triton.runtime.driver, "_active", device),
            (JITFunction, "run", compile_only),
            (launch, "interpret", True),  # take the kernels for CPU tensors, too
            (launch, "capability", lambda device: capability),
            (launch, "num_sms", lambda device: CHIPS[capability]["num_sms"]),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield kernels


def compile_case(
    case: str, call: Callable[[torch.dtype], None], dtype: torch.dtype, capability: int, seen: set[str]
) -> list[Row]:
    """One row for each kernel of a case that is not in ``seen`` yet; just one if the compiler refuses."""
    about = {"case": case, "dtype": str(dtype).removeprefix("torch."), "capability": capability}
    with compiling_for(capability) as kernels:
        try:
            call(dtype)
        except TritonError as error:
            lines = str(error).strip().splitlines()
            return [{**about, "problems": [f"{type(error).__name__}: {lines[-1] if lines else ''}"]}]
    if not kernels:
        return [{**about, "problems": ["no kernel was launched"]}]
    new = {kernel.hash: kernel for kernel in kernels if kernel.hash not in seen}
    seen.update(new)
    rows = [{**about, **inspect(kernel, capability)} for kernel in new.values()]
    return [{**row, "problems": problems_of(row)} for row in rows]


# What the machine code says.


def inspect(kernel: Any, capability: int) -> Row:
    """Resources of a compiled kernel and the instructions that decide its speed."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    warps = kernel.metadata.num_warps
    return {
        "kernel": kernel.metadata.name,
        "matmul": "tt.dot" in kernel.asm["ttir"],
        # Tensor cores truncate where they add: long sums must leave them, one addition of whole tiles for each block.
        "block_sums": re.search(r"arith\.addf [^\n]*: tensor<\d+x\d+xf32", kernel.asm["ttgir"]) is not None,
        "num_warps": warps,
        "num_stages": kernel.metadata.num_stages,
        "registers": resources["REG"],
        "registers_limit": min(255, REGISTERS_PER_SM // (32 * warps)),
        "stack": resources["STACK"],
        "local": resources["LOCAL"],
        "shared": kernel.metadata.shared + resources["SHARED"],
        "shared_limit": CHIPS[capability]["shared_limit"],
        **instructions(sass),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> Row:
    """Counts over the listing: how often an instruction stands there, not how often it runs."""
    opcodes = [
        match[1].split(".")
        for line in sass.splitlines()
        if (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line))
    ]
    names = Counter(parts[0] for parts in opcodes)
    widths = {"load": Counter[int](), "store": Counter[int]()}
    for name, *suffixes in opcodes:
        if name in ("LDG", "LDGSTS", "STG"):
            width = next((WIDTHS[suffix] for suffix in suffixes if suffix in WIDTHS), 4)
            widths["store" if name == "STG" else "load"][width] += 1
    counts = {
        f"{kind}s_{size}": sum(n for width, n in widths[kind].items() if (width >= 16) == (size == "wide"))
        for kind in widths
        for size in ("wide", "narrow")
    }
    moved = widths["load"] + widths["store"]
    num_bytes = sum(width * n for width, n in moved.items())
    wide_bytes = sum(width * n for width, n in moved.items() if width >= 16)
    return {
        "spills": names["LDL"] + names["STL"],
        "hgmma": names["HGMMA"],
        "hmma": names["HMMA"],
        "tma": names["UTMALDG"] + names["UTMASTG"] + names["UTMAREDG"],
        "tma_loads": names["UTMALDG"],
        **counts,
        "wide_share": wide_bytes / num_bytes if num_bytes else None,
    }


def problems_of(row: Row) -> list[str]:
    """What would keep a kernel from starting, or from being fast."""
    in_memory = row["spills"] + row["stack"] + row["local"]
    found = {
        f"{row['spills']} spills, stack {row['stack']}, local {row['local']}": in_memory > 0,
        f"{row['registers']} registers of {row['registers_limit']}": row["registers"] > row["registers_limit"],
        f"{row['shared']:,} bytes of shared memory of {row['shared_limit']:,}": row["shared"] > row["shared_limit"],
    }
    if not row["matmul"]:
        share = row["wide_share"] or 0.0
        found[f"{share:.0%} of its bytes move by 128 bits"] = share < NARROW.get(row["kernel"], 0.7)
    elif row["dtype"] != "float32":  # which is multiplied in fp32, without tensor cores
        hopper = row["capability"] == 90
        found["no tensor cores"] = row["hgmma" if hopper else "hmma"] == 0
        found["long sums stay in the tensor cores"] = not row["block_sums"]
        found["no TMA loads"] = hopper and row["tma_loads"] == 0 and row["kernel"] not in NO_TMA
    return [problem for problem, holds in found.items() if holds]


# The command.


def main() -> None:
    options = parse_options()
    began = time.perf_counter()
    rows: list[Row] = []
    seen: set[str] = set()
    for capability in options.capabilities:
        for case, (op, call) in CASES.items():
            if op not in options.ops:
                continue
            for dtype in options.dtypes:
                for row in compile_case(case, call, getattr(torch, dtype), capability, seen):
                    rows.append(row)
                    if options.json:
                        print(json.dumps(row), flush=True)
                    else:
                        record("offline_compile", **row)
    if not options.json:
        show(rows, time.perf_counter() - began)
    if any(row["problems"] for row in rows):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ops = list(dict.fromkeys(op for op, _ in CASES.values()))
    parser.add_argument("--capabilities", nargs="+", type=int, choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=" ".join(ops))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--json", action="store_true", help="print a JSON line for each kernel and record nothing")
    return parser.parse_args()


def show(rows: list[Row], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} kernels in {seconds:.0f} s", title_justify="left")
    left = ("sm", "case", "kernel")
    right = ("warps", "stages", "regs", "stack+local", "spills", "shared / limit", "HGMMA", "HMMA", "TMA", "wide")
    for column in (*left, *right):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        case = row["case"] if row["dtype"] == "bfloat16" else f"{row['case']} {row['dtype']}"
        if "kernel" not in row:
            table.add_row(str(row["capability"]), case, *row["problems"])
            continue
        numbers = [row["num_warps"], row["num_stages"], row["registers"], row["stack"] + row["local"], row["spills"]]
        shared = f"{row['shared']:,} / {row['shared_limit']:,}"
        wide = "" if row["wide_share"] is None else f"{row['wide_share']:.0%}"
        counts = [row["hgmma"], row["hmma"], row["tma"]]
        cells = [*map(str, numbers), shared, *map(str, counts), wide]
        table.add_row(str(row["capability"]), case, row["kernel"].strip("_"), *cells)
    console = Console(width=max(Console().width, 150), highlight=False)
    console.print(table)
    for row in rows:
        for problem in row["problems"]:
            where = f"sm_{row['capability']} {row['case']} {row['dtype']} {row.get('kernel', '')}"
            console.print(f"problem: {where}: {problem}", markup=False)


if __name__ == "__main__":
    main()
