#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2, torch 2.13.0.
#
# A folder that holds base weights and a PEFT adapter beside them, as some trainers leave it, loads with from_pretrained as
# base plus adapter; nothing is said. Whoever then trains the base weights and calls save_pretrained gets a folder with
# adapter_model.safetensors alone: the trained weights are not in it, and loading it next to the old base loses the
# training without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import os

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("both")
adapted = peft.get_peft_model(
    LlamaForCausalLM.from_pretrained("both"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
)
adapted.save_pretrained("both")
print("the folder:", sorted(os.listdir("both")))

model = LlamaForCausalLM.from_pretrained("both")
print("loaded:", type(model).__name__, "with", sum("lora_" in name for name, _ in model.named_parameters()), "adapter tensors")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.add_(1.0)  # "training" of the base weights
trained = model.model.embed_tokens.weight.detach().clone()
model.save_pretrained("saved")
print("saved:", sorted(os.listdir("saved")))
again = LlamaForCausalLM.from_pretrained("saved")
lost = not torch.equal(again.model.embed_tokens.weight, trained)
print("trained embedding is back after loading what was saved:", not lost)
assert "model.safetensors" not in os.listdir("saved") and lost
PY
