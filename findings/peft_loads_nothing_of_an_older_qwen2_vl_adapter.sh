#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# transformers 4.52 renamed Qwen2-VL's modules (model.layers became model.language_model.layers). An adapter saved before
# that is read by transformers' own from_pretrained, which knows the old names. peft's PeftModel.from_pretrained returns a
# model whose logits are those of the base to the last bit: no weight found its place, and a warning is all that says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

text = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
    rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
)
vision = dict(depth=1, num_heads=2, embed_dim=32, hidden_size=32)
torch.manual_seed(0)
Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).save_pretrained("base")
load = Qwen2VLForConditionalGeneration.from_pretrained
adapted = peft.get_peft_model(load("base"), peft.LoraConfig(r=2, target_modules=r".*layers.*q_proj"))
for name, parameter in adapted.named_parameters():
    if "lora_" in name:
        parameter.data.normal_()
adapted.save_pretrained("adapter")
file = "adapter/adapter_model.safetensors"
weights = {name.replace("model.language_model.", "model."): value for name, value in load_file(file).items()}
save_file(weights, file, {"format": "pt"})
print("names as before 4.52:", sorted(weights)[0])

ids = torch.arange(5, 20)[None]
with torch.no_grad():
    plain = load("base")(input_ids=ids).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        by_peft = peft.PeftModel.from_pretrained(load("base"), "adapter")(input_ids=ids).logits
    by_transformers = load("adapter")(input_ids=ids).logits
print("peft: logits are the base's:", torch.equal(by_peft, plain), "- warnings:", sum("missing" in str(w.message) for w in said))
print("transformers: logits are the base's:", torch.equal(by_transformers, plain))
assert torch.equal(by_peft, plain) and not torch.equal(by_transformers, plain)
PY
