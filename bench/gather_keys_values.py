"""gather_keys_values against its peers: the keys and values of one layer for attention over shared prefixes.

A pair of P prompt, C chosen and R rejected tokens is packed as P + C + R tokens and attends to P + C + P + R keys.

python -m bench.gather_keys_values
"""

from typing import Any

import torch
from torch import Tensor

from bench.microbench import Op, Shape, Sizes, Work, compiled, main
from bench.rotary import eager as rotate
from bench.rotary import tables
from vapr_kernels import gather_keys_values, naive
from vapr_kernels.gather_rows import RowIndex


def eager(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
    """Rotate, then copy. Autograd adds the gradients of copies with atomics, in any order."""
    return rotate(k, cos, sin)[index.rows], v[index.rows]


def index_select(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
    return rotate(k, cos, sin).index_select(0, index.rows), v.index_select(0, index.rows)


def key_rows(shape: Shape, pairs: int) -> Tensor:
    """Rows of packed tokens that the keys are, pair by pair: P + C, then P again, then R."""
    prompt, chosen, rejected = shape["P"], shape["C"], shape["R"]
    tokens = torch.arange(prompt + chosen + rejected)
    a_pair = torch.cat([tokens[: prompt + chosen], tokens[:prompt], tokens[prompt + chosen :]])
    return (torch.arange(pairs)[:, None] * len(tokens) + a_pair).reshape(-1)


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    tokens = rows * (shape["P"] + shape["C"] + shape["R"])
    new = lambda: torch.randn(tokens, shape["G"], shape["E"], device=device, dtype=dtype)
    k, v = (new().requires_grad_(name != "forward") for _ in range(2))
    index = RowIndex.build(key_rows(shape, rows), tokens).to(device)
    return k, v, *tables(tokens, shape["E"], device, dtype), index


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Forward reads every key and value once and writes every copy; backward reads the copies and writes the sums."""
    tokens, copies = rows * (shape["P"] + shape["C"] + shape["R"]), len(key_rows(shape, rows))
    a_pass = (2 * (tokens + copies) * shape["G"] * shape["E"] + tokens * shape["E"]) * element
    return Work(moved=a_pass if name == "forward" else 2 * a_pass)


def sizes(heads: Shape, scale: int) -> dict[str, Shape]:
    """Prompt / chosen / rejected tokens of the five kinds of pairs that are measured."""
    kinds = ((600, 60, 60), (1000, 150, 150), (1500, 300, 300), (1000, 40, 20), (300, 300, 300))
    return {
        f"{p} + {c} + {r}": {"P": p // scale, "C": c // scale, "R": r // scale, **heads} for p, c, r in kinds
    }  # fmt: skip


OP = Op(
    name="gather_keys_values",
    rows_name="pairs",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: gather_keys_values,
        "eager": lambda: eager,
        "index_select": lambda: index_select,
        "torch.compile": compiled(eager),
    },
    inputs=inputs,
    work=work,
    truth=naive.gather_keys_values,
    gpu=Sizes(
        shapes=sizes({"G": 4, "E": 128}, 1), rows=[4, 8, 16],
        quick_shapes=["1000 + 150 + 150"], quick_rows=[8],
    ),
    cpu=Sizes(
        shapes=sizes({"G": 4, "E": 128}, 10), rows=[2, 4],
        quick_shapes=["1000 + 150 + 150"], quick_rows=[4],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
