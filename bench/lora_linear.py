"""lora_linear against peft's way, on the linear layers of a 7B model: base product, adapter, and their sum.

python -m bench.lora_linear
"""

from typing import Any

import torch

from bench.microbench import Op, Shape, Sizes, Work, compiled, main
from vapr_kernels import lora_linear, naive


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    width, out, rank = shape["D"], shape["O"], shape["R"]
    new = lambda *size: torch.randn(size, device=device, dtype=dtype)
    x, a, b = new(rows, width), new(rank, width).mul_(width**-0.5), new(out, rank)
    if name != "forward":
        x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    return x, new(out, width).mul_(width**-0.5), None, a, b, 2.0


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """The frozen product once each way, the adapter's forward, by the input and by itself."""
    base, adapter = rows * shape["D"] * shape["O"], rows * shape["R"] * (shape["D"] + shape["O"])
    both = name != "forward"
    return Work(flops=2.0 * ((2 if both else 1) * base + (3 if both else 1) * adapter), count="2T(DO+R(D+O))")


OP = Op(
    name="lora_linear",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: lora_linear, "peft": lambda: naive.lora_linear, "torch.compile": compiled(naive.lora_linear),
    },
    inputs=inputs,
    work=work,
    truth=naive.lora_linear,
    share_inputs=True,
    gpu=Sizes(
        shapes={"up, 7b": {"D": 3584, "O": 18944, "R": 128}, "down, 7b": {"D": 18944, "O": 3584, "R": 128}},
        rows=[2048, 8192], quick_shapes=["up, 7b", "down, 7b"], quick_rows=[8192],
    ),
    cpu=Sizes(
        shapes={"up": {"D": 320, "O": 1728, "R": 16}, "down": {"D": 1728, "O": 320, "R": 16}},
        rows=[256, 512], quick_shapes=["up"], quick_rows=[512],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
