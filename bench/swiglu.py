"""swiglu against its peers, on the intermediate width of a 7B model.

python -m bench.swiglu
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.microbench import Compute, Op, Shape, Sizes, Work, compiled, main, needs_gpu
from vapr_kernels import naive, swiglu


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger() -> Compute:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    needs_gpu()
    return LigerSiLUMulFunction.apply


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    new = lambda: torch.randn(rows, shape["I"], device=device, dtype=dtype).requires_grad_(name != "forward")
    return new(), new()


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Forward reads 2 and writes 1; backward reads 3 and writes 2."""
    return Work(moved=rows * shape["I"] * element * (3 if name == "forward" else 3 + 5))


OP = Op(
    name="swiglu",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={"vapr": lambda: swiglu, "eager": lambda: eager, "torch.compile": compiled(eager), "liger": liger},
    inputs=inputs,
    work=work,
    truth=naive.swiglu,
    gpu=Sizes(
        shapes={"qwen2.5-vl-7b": {"I": 18944}, "qwen2.5-vl-3b": {"I": 11008}, "qwen2-vl-2b": {"I": 8960}},
        rows=[5760, 10400, 16800], quick_shapes=["qwen2.5-vl-7b"], quick_rows=[10400],
    ),
    cpu=Sizes(
        shapes={"wide": {"I": 2368}, "narrow": {"I": 592}},
        rows=[256, 512, 1024], quick_shapes=["wide"], quick_rows=[512],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
