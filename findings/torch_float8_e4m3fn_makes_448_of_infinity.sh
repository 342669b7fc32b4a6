#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# float8_e4m3fn has no infinity and one NaN. Casting an infinite float32 to it gives 448, its largest number, and so does any
# number that is too large; only NaN stays NaN. The other 8-bit type, float8_e5m2, keeps infinity. A weight that overflowed is
# an ordinary one after such a cast, and whoever looks for damage with isfinite has to do so before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import math
import torch

values = torch.tensor([math.inf, -math.inf, 1e30, math.nan, 448.0])
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    print(f"{str(dtype):<22}{values.tolist()} -> {values.to(dtype).float().tolist()}")
small = values.to(torch.float8_e4m3fn).float()
assert small[:3].tolist() == [448.0, -448.0, 448.0] and small[3].isnan() and small[4] == 448.0, small
assert values.to(torch.float8_e5m2).float()[:2].tolist() == [math.inf, -math.inf]
PY
