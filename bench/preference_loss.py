"""preference_loss against its peers: token log-probs to losses of pairs. Little work in few launches.

python -m bench.preference_loss
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.microbench import Op, Shape, Sizes, Work, compiled, main
from vapr.config import LossConfig
from vapr_kernels import naive, preference_loss
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.losses import Completions

TERMS = (LossConfig(),)
BETA = TERMS[0].beta


def vapr(logps: Tensor, reference: Tensor, completions: Completions) -> Tensor:
    return preference_loss(logps, reference, completions, TERMS, mean_chosen_length=1.0).losses


def eager(logps: Tensor, reference: Tensor, completions: Completions) -> Tensor:
    """The sigmoid loss alone, summed with scatter_add as trainers do."""
    c = completions
    sums = lambda x: x.new_zeros(len(c.ends)).scatter_add(0, c.completion, x * c.token_weights)
    log_ratios = sums(logps[c.counted.rows]) - sums(reference)
    return -F.logsigmoid(BETA * (log_ratios[c.chosen] - log_ratios[c.rejected])) * c.pair_weights


def truth(logps: Tensor, reference: Tensor, completions: Completions) -> Tensor:
    return naive.preference_loss(logps, reference, completions, TERMS, mean_chosen_length=1.0)[0]


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """``rows`` pairs whose completions have equally many tokens."""
    tokens = shape["tokens"]
    num = 2 * rows * tokens
    completion = torch.arange(2 * rows).repeat_interleave(tokens)
    completions = Completions(
        counted=RowIndex.build(torch.arange(num), num).to(device),
        token_weights=torch.ones(num, device=device),
        completion=completion.to(device),
        ends=torch.arange(1, 2 * rows + 1, device=device) * tokens,
        chosen=torch.arange(0, 2 * rows, 2, device=device),
        rejected=torch.arange(1, 2 * rows, 2, device=device),
        pair_weights=torch.ones(rows, device=device),
    )
    logps = -torch.rand(num, device=device, dtype=dtype)
    reference = logps + 0.1 * torch.randn(num, device=device, dtype=dtype)
    return logps.requires_grad_(name != "forward"), reference, completions


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Forward reads log-probs, the reference's and where they belong; backward writes a gradient."""
    num = 2 * rows * shape["tokens"]
    return Work(moved=num * (3 * element + 8) + (0 if name == "forward" else num * element))


OP = Op(
    name="preference_loss",
    rows_name="pairs",
    passes=("forward", "forward + backward"),
    providers={"vapr": lambda: vapr, "eager": lambda: eager, "torch.compile": compiled(eager)},
    inputs=inputs,
    work=work,
    truth=truth,
    dtype=torch.float32,
    gpu=Sizes(
        shapes={"20 tokens": {"tokens": 20}, "150 tokens": {"tokens": 150}},
        rows=[8, 64, 512], quick_shapes=["150 tokens"], quick_rows=[64],
    ),
    cpu=Sizes(
        shapes={"20 tokens": {"tokens": 20}, "150 tokens": {"tokens": 150}},
        rows=[8, 64], quick_shapes=["150 tokens"], quick_rows=[64],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
