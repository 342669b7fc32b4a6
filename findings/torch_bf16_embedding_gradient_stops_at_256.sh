#!/usr/bin/env bash
# torch 2.13.0 on a CPU.
#
# The gradient of an embedding in bfloat16 is added up in bfloat16, one occurrence after another: a token that occurs
# 4,000 times with a gradient of 1 each gets 256, because 256 + 1 rounds to 256. `weight[ids]` does the same.
# `weight.index_select(0, ids)`, which looks like the same operation, gives 4,000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PY'
import torch

torch.set_num_threads(1)
ids = torch.zeros(4000, dtype=torch.int64)
ways = {
    "nn.functional.embedding": lambda w: torch.nn.functional.embedding(ids, w),
    "weight[ids]": lambda w: w[ids],
    "weight.index_select(0, ids)": lambda w: w.index_select(0, ids),
}
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    for name, way in ways.items():
        weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
        way(weight).sum().backward()
        seen[dtype, name] = weight.grad[0].item()
        print(f"{str(dtype):16} {name:28} gradient of the token: {weight.grad[0].item():g}, should be 4000")
bf16 = [seen[torch.bfloat16, name] for name in ways]
assert bf16[:2] == [256.0, 256.0] and abs(bf16[2] - 4000) <= 16, bf16
assert all(seen[torch.float32, name] == 4000.0 for name in ways)
PY
