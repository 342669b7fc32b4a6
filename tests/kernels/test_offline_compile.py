"""Machine code of every kernel on every GPU generation, read where there is no GPU. Nothing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]
BF16, FP32 = "bfloat16", "float32"
DTYPES = {80: [BF16], 86: [BF16, FP32], 89: [BF16], 90: [BF16, FP32], 120: [BF16]}
"""By capability. fp32 is not compiled for all of them, because it takes as long again."""

TOYS = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

@triton.jit
def hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x))  # 512 numbers a thread, until the last one is there

@triton.jit
def matmul_kernel(a, b, c_ptr, K, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, 64):
        acc = tl.dot(a.load([0, k]), b.load([0, k]).T, acc)
    i = tl.arange(0, BLOCK)
    tl.store(c_ptr + i[:, None] * BLOCK + i[None, :], acc)

def copy(dtype, n):
    copy_kernel[(1,)](torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype), n, BLOCK=1024)

def hoard(dtype):
    hoarding_kernel[(1,)](torch.ones(16384), torch.ones(16384), BLOCK=16384, num_warps=1)

def matmul(dtype):
    a, b = (TensorDescriptor.from_tensor(torch.ones(128, 256, dtype=dtype), [128, 64]) for _ in range(2))
    matmul_kernel[(1,)](a, b, torch.ones(128, 128), 256, BLOCK=128, num_warps=8)

def refused(dtype):
    copy_kernel[(1,)](torch.ones(4), torch.ones(4), 4, BLOCK=1000)

import sys, json
sys.path[:0] = [{repository!r}, {repository!r} + "/kernels"]
from functools import partial
from bench.offline_compile import compile_case
calls = {{"wide": partial(copy, n=4096), "odd": partial(copy, n=4097), "hoard": hoard, "matmul": matmul,
         "refused": refused, "idle": lambda dtype: None}}
for name, call in calls.items():
    for row in compile_case(name, call, torch.bfloat16, 90, set()):
        print(json.dumps(row))
"""


def run_json(*command: str, cache: Path) -> list[dict]:
    """Rows that a process of its own prints; this one may have imported Triton as an interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    return rows


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS.format(repository=str(REPOSITORY)))
    return {row["case"]: row for row in run_json(str(folder / "toys.py"), cache=folder / "cache")}


def test_wide_and_narrow_accesses_are_told_apart(toys):
    assert toys["wide"]["wide_share"] == 1 and toys["wide"]["loads_wide"] >= 1 and toys["wide"]["stores_wide"] >= 1
    assert toys["odd"]["loads_wide"] == 0 and toys["odd"]["loads_narrow"] > 0


def test_spills_are_seen(toys):
    assert toys["hoard"]["spills"] > 0 and toys["hoard"]["stack"] + toys["hoard"]["local"] > 0
    assert toys["wide"]["spills"] == 0


def test_tensor_cores_and_copy_engine_are_seen(toys):
    row = toys["matmul"]
    assert row["matmul"] and row["hgmma"] > 0 and row["tma_loads"] > 0
    assert 2 * 128 * 64 * 2 <= row["shared"] <= row["shared_limit"]
    assert not toys["wide"]["matmul"]


def test_a_kernel_that_does_not_compile_is_a_row_with_the_reason(toys):
    assert toys["refused"]["problems"][0].startswith("CompilationError")
    assert toys["idle"]["problems"] == ["no kernel was launched"]


def test_what_a_kernel_must_not_do_is_named(toys):
    assert toys["wide"]["problems"] == []
    assert toys["matmul"]["problems"] == ["long sums stay in the tensor cores"]
    (spilling,) = toys["hoard"]["problems"]
    assert spilling.startswith(f"{toys['hoard']['spills']} spills")
    assert toys["odd"]["problems"] == ["0% of its bytes move by 128 bits"]


@pytest.mark.parametrize(("capability", "dtypes"), DTYPES.items(), ids=str)
def test_every_kernel_fits_its_gpu(capability, dtypes, tmp_path):
    command = ("-m", "bench.offline_compile", "--json", "--capabilities", str(capability), "--dtypes", *dtypes)
    rows = run_json(*command, cache=tmp_path)
    problems = [
        f"{row['case']} {row['dtype']}, {row.get('kernel', '')}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]
    assert not problems, "\n".join(problems)
    one_pass = {row["kernel"] for row in rows if row["case"] == "linear_logps one-pass" and row["dtype"] == BF16}
    assert ("_exp_logits_tma_kernel" in one_pass) == (capability == 90)
