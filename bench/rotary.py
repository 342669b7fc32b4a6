"""rotary against its peers: the query heads of one layer, rotated.

python -m bench.rotary
"""

from typing import Any

import torch
from torch import Tensor

from bench.microbench import Op, Shape, Sizes, Work, compiled, main
from vapr_kernels import naive, rotary


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers computes it."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]


def tables(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 to ``rows``; their second half repeats the first."""
    frequencies = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(rows, device=device)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(rows, shape["H"], shape["E"], device=device, dtype=dtype)
    return x.requires_grad_(name != "forward"), *tables(rows, shape["E"], device, dtype)


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """A pass reads and writes every head, and reads half of both tables."""
    a_pass = rows * (2 * shape["H"] * shape["E"] + shape["E"]) * element
    return Work(moved=a_pass if name == "forward" else 2 * a_pass)


OP = Op(
    name="rotary",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={"vapr": lambda: rotary, "eager": lambda: eager, "torch.compile": compiled(eager)},
    inputs=inputs,
    work=work,
    truth=naive.rotary,
    gpu=Sizes(
        shapes={"qwen2.5-vl-7b": {"H": 28, "E": 128}, "qwen2.5-vl-3b": {"H": 16, "E": 128}},
        rows=[5760, 10400, 16800], quick_shapes=["qwen2.5-vl-7b"], quick_rows=[10400],
    ),
    cpu=Sizes(
        shapes={"14 heads": {"H": 14, "E": 128}, "7 heads": {"H": 7, "E": 128}},
        rows=[256, 512, 1024], quick_shapes=["14 heads"], quick_rows=[512],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
