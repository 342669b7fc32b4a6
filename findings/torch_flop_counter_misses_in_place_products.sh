#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# FlopCounterMode counts a matrix product by the name of its operation and counts nothing, without a word, where it does not
# know the name. It knows addmm and not addmm_, so the same product written in place is free. And on a CPU
# scaled_dot_product_attention takes an operation of its own, which is not in the table either: attention of a model costs
# nothing there, while the same call with the math backend is counted in full. So the FLOPs of one model differ with how its
# layers are written and with the backend that attention happens to take.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


a, b, out = torch.ones(32, 64), torch.ones(64, 16), torch.zeros(32, 16)
q = torch.ones(1, 4, 128, 32)


def attention_by_math():
    with sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(q, q, q)


counted = {
    "torch.addmm(out, a, b)": flops(lambda: torch.addmm(out, a, b)),
    "out.addmm_(a, b)": flops(lambda: out.addmm_(a, b)),
    "attention, math backend": flops(attention_by_math),
    "attention, as it comes": flops(lambda: scaled_dot_product_attention(q, q, q)),
}
for name, value in counted.items():
    print(f"{name:<26}{value:>12,}")
assert list(counted.values()) == [2 * 32 * 64 * 16, 0, 2 * 2 * 4 * 128 * 128 * 32, 0], counted
PY
