#!/usr/bin/env bash
# transformers 5.17.0.
#
# The PIL image processors of Idefics2, Idefics3, Ovis2 and SmolVLM use nothing of torch or torchvision, but where one of
# them is missing, they "require" it: transformers searches the text of a file for "TorchvisionBackend", and there it
# stands in docstrings ("Mirrors TorchvisionBackend.pad."). AutoImageProcessor(backend="pil") finds no class either. The
# class imports and works from its module. 5.24.0 offers it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.17.0 pillow
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import importlib
import inspect

import numpy as np
import transformers

try:
    transformers.SmolVLMImageProcessorPil()
    raise SystemExit("it is there")
except ImportError as error:
    print("from transformers:", " ".join(str(error).split())[:90])
module = importlib.import_module("transformers.models.smolvlm.image_processing_pil_smolvlm")
lines = [line.strip() for line in inspect.getsource(module).splitlines() if "Torchvision" in line]
print("what the file says of it:", *lines, sep="\n  ")
assert all("import" not in line for line in lines)
out = module.SmolVLMImageProcessorPil()(np.zeros((40, 60, 3), np.uint8), return_tensors="np")
print("from its module:", out["pixel_values"].shape)
PY
