"""COUNTED teaches PyTorch's FlopCounterMode operations that it does not know.

They are vapr's head, attention on a CPU and over sequences of different lengths, a product that is added in place (an
adapter's second), and those of experts.
"""

from typing import Any

import torch


def _head_flops(
    hidden: Any,
    head: Any,
    labels: Any,
    reference: Any,
    product: str,
    gradient: str,
    with_dx: bool,
    *rest: Any,
    **out: Any,
) -> int:
    """Count vapr::linear_logps: the logits, and their gradient in the hidden states where it is finished at once."""
    products = 1 + (with_dx and gradient in ("dx", "keep"))
    return 2 * hidden[0] * head[0] * head[1] * products


def _head_backward_flops(
    dout: Any, hidden: Any, head: Any, labels: Any, table: Any, exps: Any, product: str, with_dx: bool,
    with_dhead: bool, **out: Any,
) -> int:  # fmt: skip
    """Count its backward pass: logits again unless they were kept, and the gradients that were not finished."""
    again = exps[0] != hidden[0]
    return 2 * hidden[0] * head[0] * head[1] * (int(again) + int(with_dx) + int(with_dhead))


def _attention_flops(
    q: Any, k: Any, v: Any, lengths_q: Any, lengths_k: Any, scale: Any, both_ways: Any = None, window: Any = None,
    forks: Any = None, **out: Any,
) -> int:  # fmt: skip
    above = [max(fork, 0) for fork in forks] if forks else [0] * len(lengths_q)
    seen = zip(lengths_q, above, lengths_k, strict=True)
    return 2 * 2 * q[1] * q[2] * sum(num_q * (fork + num_k) for num_q, fork, num_k in seen)


def _attention_backward_flops(
    dout: Any, q: Any, k: Any, v: Any, lengths_q: Any, lengths_k: Any, scale: Any, *see: Any, **out: Any
) -> int:
    return _attention_flops(q, k, v, lengths_q, lengths_k, scale, *see) // 2 * 5


def _sdpa_flops(q: Any, k: Any, v: Any, *rest: Any, **out: Any) -> int:
    return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def _sdpa_backward_flops(dout: Any, q: Any, k: Any, v: Any, *rest: Any, **out: Any) -> int:
    return 5 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def _added_product_flops(out: Any, a: Any, b: Any, **rest: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _grouped_product_flops(a: Any, b: Any, *rest: Any, **out: Any) -> int:
    """Count the products of experts: rows (S, D) and experts (E, D, O), or (D, S) and (S, O) for their gradient."""
    return 2 * a[0] * a[1] * b[-1]


def _onednn_product_flops(x: Any, w: Any, *rest: Any, **out: Any) -> int:
    return 2 * x[0] * x[1] * w[0]


COUNTED = {
    torch.ops.mkldnn._linear_pointwise: _onednn_product_flops,
    torch.ops.aten.addmm_: _added_product_flops,
    torch.ops.aten._grouped_mm: _grouped_product_flops,
    torch.ops.vapr.linear_logps: _head_flops,
    torch.ops.vapr.linear_logps_backward: _head_backward_flops,
    torch.ops.vapr.causal_attention: _attention_flops,
    torch.ops.vapr.causal_attention_bwd: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}
"""For FlopCounterMode's ``custom_mapping``."""
