"""add_rms_norm against its peers: the residual addition and the norm after it, on the hidden width of a 7B model.

python -m bench.add_rms_norm
"""

from typing import Any

import torch
from torch import Tensor

from bench.microbench import Compute, Op, Shape, Sizes, Work, compiled, main, needs_gpu
from vapr_kernels import add_rms_norm, naive

EPS = 1e-6


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers computes it."""
    total = residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(total.dtype), total


def liger() -> Compute:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    needs_gpu()
    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """``frozen weight``: as with adapters, where norms are not trained."""
    x, residual = (torch.randn(rows, shape["D"], device=device, dtype=dtype) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(shape["D"], device=device, dtype=dtype)
    with_grad = name != "forward"
    return (
        x.requires_grad_(with_grad),
        residual.requires_grad_(with_grad),
        weight.requires_grad_(name == "trained weight"),
    )


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Forward reads x and residual, writes y and their sum; backward reads both gradients and the sum, writes one."""
    return Work(moved=rows * shape["D"] * element * (4 if name == "forward" else 4 + 4))


OP = Op(
    name="add_rms_norm",
    rows_name="tokens",
    passes=("forward", "frozen weight", "trained weight"),
    providers={
        "vapr": lambda: lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        "eager": lambda: eager,
        "torch.compile": compiled(eager),
        "liger": liger,
    },
    inputs=inputs,
    work=work,
    truth=lambda x, residual, weight: naive.add_rms_norm(x, residual, weight, EPS),
    gpu=Sizes(
        shapes={"qwen2.5-vl-7b": {"D": 3584}, "qwen2.5-vl-3b": {"D": 2048}, "qwen2-vl-2b": {"D": 1536}},
        rows=[5760, 10400, 16800], quick_shapes=["qwen2.5-vl-7b"], quick_rows=[10400],
    ),
    cpu=Sizes(
        shapes={"wide": {"D": 1792}, "narrow": {"D": 448}},
        rows=[256, 512, 1024], quick_shapes=["wide"], quick_rows=[512],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
