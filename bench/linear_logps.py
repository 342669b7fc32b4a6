"""linear_logps against its peers: log-probs of labels under the LM heads of four models.

python -m bench.linear_logps
"""

from typing import Any

import torch
from torch import Tensor

from bench.microbench import Absent, Compute, Op, Shape, Sizes, Work, compiled, main, needs_gpu
from vapr_kernels import linear_logps, naive

MATMULS = {"no-grad": 1, "frozen head": 2, "trained head": 3}
"""Products of 2 N H V operations that a pass cannot do without: logits; by hidden states; by the head."""


def vapr(mode: Any) -> Compute:
    return lambda hidden, head, labels: linear_logps(hidden, head, labels, mode=mode)


def eager(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ head.T).float()
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def liger() -> Compute:
    """Its Triton kernels: chunks of rows; per-token results make it compute the logits again for the gradients."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    needs_gpu()
    return lambda hidden, head, labels: -liger_fused_linear_cross_entropy(hidden, head, labels, reduction="none")


def liger_hopper() -> Compute:
    """Its CuTe kernels: nothing of size V is stored, the backward pass computes the logits again."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Absent("needs a Hopper GPU")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _load_sm90_function as load

    load()  # says what is missing
    return lambda hidden, head, labels: -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, head, labels)


def trl() -> Compute:
    """What DPOTrainer's fused head calls; 32,768 columns at a time, as there."""
    from trl.kernels import ChunkedLogProbFunction

    return lambda hidden, head, labels: ChunkedLogProbFunction.apply(
        hidden, head, None, labels, 1.0, 32_768, None, 1.0, ()
    )[0]


def cce() -> Compute:
    """Apple's cut cross-entropy without its gradient filter."""
    try:
        from cut_cross_entropy.cce_utils import CCEPresets
    except ModuleNotFoundError as error:
        if error.name == "cut_cross_entropy":
            raise
        raise Absent("the cut_cross_entropy installed is not Apple's: it has no cce_exact") from None
    if "cce_exact" not in CCEPresets.names:
        raise Absent("the cut_cross_entropy installed has no cce_exact")
    from cut_cross_entropy import linear_cross_entropy

    needs_gpu()
    return lambda hidden, head, labels: -linear_cross_entropy(
        hidden, head, labels, reduction="none", impl="cce_exact"
    )  # fmt: skip


def inputs(shape: Shape, rows: int, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    hidden = torch.randn(rows, shape["H"], device=device, dtype=dtype)
    head = torch.randn(shape["V"], shape["H"], device=device, dtype=dtype).mul_(shape["H"] ** -0.5)
    labels = torch.randint(shape["V"], (rows,), device=device)
    return hidden.requires_grad_(name != "no-grad"), head.requires_grad_(name == "trained head"), labels


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    products = MATMULS[name]
    return Work(flops=2.0 * products * rows * shape["H"] * shape["V"], count=f"{2 * products}NHV")


def chunked_truth(arguments: tuple[Any, ...], douts: tuple[Tensor, ...] | None, chunk: int = 128) -> list[Tensor]:
    """The naive twin in fp64 on some rows at a time, so that it fits beside what is measured."""
    hidden, head, labels = arguments
    head64 = head.detach().double().requires_grad_(head.requires_grad)
    logps, dhidden = [], []
    for rows in torch.arange(len(hidden), device=hidden.device).split(chunk):
        x = hidden.detach()[rows].double().requires_grad_(douts is not None)
        out = naive.linear_logps(x, head64, labels[rows])
        logps.append(out.detach())
        if douts is not None:
            out.backward(douts[0][rows].double())
            dhidden.append(x.grad)
    grads = [] if douts is None else [torch.cat(dhidden)]
    return [torch.cat(logps), *grads, *([head64.grad] if head.requires_grad else [])]


OP = Op(
    name="linear_logps",
    rows_name="rows N",
    passes=tuple(MATMULS),
    providers={
        "vapr": lambda: vapr("auto"),
        "vapr one-pass": lambda: vapr("one-pass"),
        "vapr recompute": lambda: vapr("recompute"),
        "vapr chunked": lambda: vapr("chunked"),
        "vapr torch": lambda: vapr("torch"),
        "eager": lambda: eager,
        "torch.compile": compiled(eager),
        "liger": liger,
        "liger hopper": liger_hopper,
        "trl": trl,
        "cce exact": cce,
    },
    inputs=inputs,
    work=work,
    truth=naive.linear_logps,
    chunk_truth=chunked_truth,
    share_inputs=True,
    gpu=Sizes(
        shapes={
            "qwen2.5-vl-7b": {"H": 3584, "V": 152064},
            "qwen2.5-vl-3b": {"H": 2048, "V": 151936},
            "qwen2-vl-2b": {"H": 1536, "V": 151936},
            "llava-1.5-7b": {"H": 4096, "V": 32064},
        },
        rows=[512, 1024, 2048, 4096, 8192], quick_shapes=["qwen2.5-vl-7b"], quick_rows=[2048],
    ),
    cpu=Sizes(
        shapes={"many words": {"H": 192, "V": 15200}, "few words": {"H": 256, "V": 3200}},
        rows=[32, 128], quick_shapes=["few words"], quick_rows=[64],
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
