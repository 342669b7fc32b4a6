#!/usr/bin/env bash
# transformers 5.24.0 (the same in 5.17.0 and 5.23.0), torch 2.13.0.
#
# The first use of any model or processor class runs transformers' __init__ a second time and puts another module object
# into sys.modules["transformers"]. A module that did `import transformers` early and one that does it later then hold two
# different objects. Classes are the same on both, because submodules are shared; attributes that are set or patched are
# not: mock.patch("transformers.AutoConfig", ...) changes nothing for whoever imported earlier.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys
from unittest import mock

import transformers as early

print("before any class is used, the module imported is the one in sys.modules:", sys.modules["transformers"] is early)
early.LlamaForCausalLM
import transformers as late

print("after LlamaForCausalLM was looked up:", late is early)
print("the class is the same on both:", early.LlamaForCausalLM is late.LlamaForCausalLM)
with mock.patch("transformers.AutoConfig", "patched"):
    print("mock.patch seen by the late import:", late.AutoConfig == "patched", "- by the early one:", early.AutoConfig == "patched")
    assert late.AutoConfig == "patched" and early.AutoConfig != "patched"
assert late is not early and early.LlamaForCausalLM is late.LlamaForCausalLM
PY
