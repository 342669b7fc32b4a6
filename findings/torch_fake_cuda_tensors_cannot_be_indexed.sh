#!/usr/bin/env bash
# torch 2.13.0, built without CUDA (what `pip install torch==2.13.0` gives depends on the index; the CPU build is needed).
#
# FakeTensorMode promises tensors of any device without that device. Arithmetic on fake tensors of a GPU works in a CPU
# build, a matrix product and torch.select do. Yet x[0] and x[0] = y raise "PyTorch is not linked with support for cuda
# devices", and so does x.copy_(y): Python's indexing and in-place copies take a device guard before they look at modes.
# So a model's forward pass that indexes cannot be traced for a GPU there; the same forward on fake CPU tensors can.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if torch.version.cuda is not None:
    raise SystemExit("this build knows CUDA; install the CPU build to see it")
with FakeTensorMode():
    x = torch.empty(4, 3, device="cuda")
    print((x @ x.T + 1).sum().device, torch.select(x, 0, 0).shape, "computed and selected")
    refused = []
    for name, call in {
        "x[0]": lambda: x[0],
        "x[0] = 1": lambda: x.__setitem__(0, 1.0),
        "x.copy_(x)": lambda: x.copy_(x),
        "x.mul_(2)": lambda: x.mul_(2),
    }.items():
        try:
            call()
            print(name, "works")
        except RuntimeError as error:
            print(name, "raises", error)
            refused.append(name)
    assert refused == ["x[0]", "x[0] = 1", "x.copy_(x)"], refused
    y = torch.empty(4, 3)
    y[0] = y[1]
    print("fake CPU tensors: all of it works")
PY
