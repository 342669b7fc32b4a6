"""causal_attention against its peers on a CPU: one layer's attention over pairs that share their prompts.

A pair of P prompt, C chosen and R rejected tokens is packed as P + C + R tokens. The rejected answer is a branch that
forks off behind the prompt if it is short; else, and where nobody knows branches, the prompt's keys are gathered twice.

python -m bench.causal_attention
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gather_keys_values import key_rows
from bench.microbench import Op, Shape, Sizes, Work, main
from vapr.batches.sequences import SHORT_BRANCH
from vapr_kernels import causal_attention, naive
from vapr_kernels.causal_attention import NO_FORK


def lengths(shape: Shape, pairs: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each pair's two sequences: queries, their own keys, all keys, and where they fork off."""
    prompt, chosen, rejected = shape["P"], shape["C"], shape["R"]
    own = (prompt + chosen, rejected) * pairs
    return own, own, (prompt + chosen, prompt + rejected) * pairs, (NO_FORK, prompt) * pairs


def vapr(q: Tensor, k: Tensor, v: Tensor, shape: Shape, pairs: int) -> Tensor:
    """With branches where training has them."""
    if shape["R"] > SHORT_BRANCH:
        return gathered(q, k, v, shape, pairs)
    queries, own, _, forks = lengths(shape, pairs)
    return causal_attention(q, k, v, queries, own, scale=shape["E"] ** -0.5, forks=forks)


def gathered(q: Tensor, k: Tensor, v: Tensor, shape: Shape, pairs: int) -> Tensor:
    """Without branches."""
    queries, _, keys, _ = lengths(shape, pairs)
    k, v = (x.index_select(0, key_rows(shape, pairs)) for x in (k, v))
    return causal_attention(q, k, v, queries, keys, scale=shape["E"] ** -0.5)


def sdpa(q: Tensor, k: Tensor, v: Tensor, shape: Shape, pairs: int) -> Tensor:
    """One call of PyTorch's attention for each sequence."""
    queries, _, keys, _ = lengths(shape, pairs)
    k, v = (x.index_select(0, key_rows(shape, pairs)) for x in (k, v))
    outs = []
    for q_n, k_n, v_n in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        num_q, num_k = len(q_n), len(k_n)
        behind = None if num_q == num_k else torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q)
        q_n, k_n, v_n = (x.transpose(0, 1)[None] for x in (q_n, k_n, v_n))
        grouped = q_n.shape[1] > k_n.shape[1]
        out = F.scaled_dot_product_attention(q_n, k_n, v_n, behind, is_causal=behind is None, enable_gqa=grouped)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def eager(q: Tensor, k: Tensor, v: Tensor, shape: Shape, pairs: int) -> Tensor:
    """All scores of a sequence at once, and a mask."""
    queries, _, keys, _ = lengths(shape, pairs)
    k, v = (x.index_select(0, key_rows(shape, pairs)) for x in (k, v))
    return naive.causal_attention(q, k, v, queries, keys, scale=shape["E"] ** -0.5)


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    tokens = rows * (shape["P"] + shape["C"] + shape["R"])
    new = lambda heads: torch.randn(tokens, heads, shape["E"], device=device, dtype=dtype)
    q, k, v = (new(shape[heads]).requires_grad_(name != "forward") for heads in "HGG")
    return q, k, v, shape, rows


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Each query and the keys that it sees: two products forward and four backward, with no score computed again."""
    triangle = lambda tokens: tokens * (tokens + 1) / 2
    prompt, chosen, rejected = shape["P"], shape["C"], shape["R"]
    seen = triangle(prompt + chosen) + triangle(prompt + rejected) - triangle(prompt)
    products = 2 if name == "forward" else 6
    return Work(flops=2.0 * products * rows * seen * shape["H"] * shape["E"], count="4HE x scores")


def sizes(heads: Shape) -> dict[str, Shape]:
    """Prompt / chosen / rejected tokens: answers, captions, and prompts with a large image."""
    kinds = ((250, 20, 20), (300, 150, 150), (1500, 60, 60))
    return {
        f"{p} + {c} + {r}, {heads['H']} heads on {heads['G']}": {"P": p, "C": c, "R": r, **heads} for p, c, r in kinds
    }


SHAPES = {**sizes({"H": 5, "G": 1, "E": 64}), **sizes({"H": 4, "G": 4, "E": 64})}

OP = Op(
    name="causal_attention",
    rows_name="pairs",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: vapr, "vapr gathered": lambda: gathered,
        "sdpa": lambda: sdpa, "eager": lambda: eager,
    },
    inputs=inputs,
    work=work,
    truth=eager,
    resident=lambda arguments: (),
    dtype=torch.float32,
    gpu=Sizes(shapes=SHAPES, rows=[2], quick_shapes=[*SHAPES][:1], quick_rows=[2]),
    cpu=Sizes(shapes=SHAPES, rows=[2, 8], quick_shapes=[*SHAPES][:2], quick_rows=[4]),
)  # fmt: skip

if __name__ == "__main__":
    if torch.cuda.is_available():
        sys.exit("bench.causal_attention: it is what runs on a CPU; hide the GPU with CUDA_VISIBLE_DEVICES=")
    main(OP)
