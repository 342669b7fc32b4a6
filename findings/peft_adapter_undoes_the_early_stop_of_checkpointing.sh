#!/usr/bin/env bash
# torch 2.13.0 (CPU), transformers 5.24.0, peft 0.21.2.
#
# torch.utils.checkpoint stops computing a layer again as soon as it has all that the backward pass wants. A decoder layer ends
# with its MLP's down projection, of which only the input is wanted, so that product, as large as gate's or up's, is not
# repeated. One would guess that an adapter on it changes next to nothing: its rank is 8. But peft runs the base layer before
# the adapter, and what the adapter's second matrix reads comes after that. So the stop comes after the base layer's product
# as well, and every checkpointed layer multiplies by the whole down projection once more, for an output that is thrown away.
# Adapters on gate and up alone leave the stop where it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

TOKENS, HIDDEN, WIDE, RANK = 32, 64, 256, 8
config = Qwen2Config(hidden_size=HIDDEN, intermediate_size=WIDE)


def computed_again(targets):
    """FLOPs that checkpointing adds to a step of a frozen MLP with adapters."""
    torch.manual_seed(0)
    mlp = Qwen2MLP(config).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets), mlp)
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    counts = []
    for run in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=False)):
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


product = 2 * TOKENS * HIDDEN * WIDE  # of gate, up or down
narrow = 2 * TOKENS * RANK * (HIDDEN + WIDE)  # of an adapter
without = computed_again(["gate_proj", "up_proj"])
with_one = computed_again(["gate_proj", "up_proj", "down_proj"])
print(f"adapters on gate and up:       {without:>10,} FLOPs computed again")
print(f"adapters on gate, up and down: {with_one:>10,}")
print(f"of these the base layer's:     {product:>10,}")
assert without == 2 * product + 2 * narrow, without
assert with_one == without + product + 2 * TOKENS * RANK * WIDE, with_one
PY
