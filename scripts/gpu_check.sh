#!/usr/bin/env bash
# What needs a GPU, in one command, without a network or an installation.
#
#   bash scripts/gpu_check.sh smoke     # every GPU path once: under two and a half minutes
#   bash scripts/gpu_check.sh full      # the same, then tests at real sizes and benchmarks: under ten minutes
#
# Rows, logs and the summary go to one archive, $OUT/gpu.tar.gz (OUT is bench/results/gpu by default), packed again after
# every part, so that a run cut short leaves what it had. Missing pure Python packages are taken from .whl/, a folder of
# wheels that scripts/fill_wheels.sh makes on a machine with a network. Failures and the table of results come last.
# On a copy of the working tree without its history, name the commit for the rows: COMMIT=$(git rev-parse --short=12 HEAD).
# Exits 1 if a part fails, 2 where it cannot begin.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
stage=${1:-}
if [ "$stage" != smoke ] && [ "$stage" != full ]; then
    echo "gpu_check: say which: bash scripts/gpu_check.sh smoke, or full"
    exit 2
fi
python=${PYTHON:-python3}
archive=${OUT:-$PWD/bench/results/gpu}
export OUT=$(mktemp -d)
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONWARNINGS=ignore
unset TRITON_INTERPRET # interpreted kernels on a GPU prove nothing

mkdir -p "$archive"
if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/vapr-site .whl/*.whl || exit 2
    export PYTHONPATH=$PYTHONPATH:/tmp/vapr-site
fi
"$python" - <<'PY' || exit 2
import sys
from importlib.util import find_spec

import torch  # whatever is wrong with it shows here

if not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA device that PyTorch can use; nothing to check here")
needed = (
    "transformers", "peft", "pydantic", "yaml", "click", "rich", "PIL", "skimage", "scipy", "rapidfuzz", "pytest", "xdist",
)
if missing := [name for name in needed if not find_spec(name)]:
    sys.exit(f"gpu_check: missing here: {' '.join(missing)}; add them to scripts/fill_wheels.sh and run it")
PY

summary=""
failed=0
part() { # part SECONDS NAME COMMAND...: run under a limit, keep the log, remember a failure, pack what there is
    local seconds=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    [ "$status" -eq 0 ] || failed=1
    tail -n "${LINES_SHOWN:-40}" "$OUT/$name.log"
    summary+="$name: exit $status after $((SECONDS - began)) s"$'\n'
    printf '%s' "$summary" >"$OUT/summary.txt"
    tar -czf "$archive/gpu.tar.gz" -C "$OUT" .
}

LINES_SHOWN=80 part 145 smoke "$python" scripts/gpu_smoke.py
if [ "$stage" = full ]; then
    # Of real size one after another: each wants the memory for itself.
    LINES_SHOWN=25 part 100 tests-real-sizes "$python" -m pytest -q --tb=line -rf -p no:cacheprovider \
        tests/kernels/test_gpu_kernels.py
    LINES_SHOWN=100 part 90 operations "$python" -m bench.operations --quick --no-plot
    LINES_SHOWN=25 part 120 tests "$python" -m pytest -q --tb=line -rf -p no:cacheprovider -n 8 -k "not pytorch" \
        tests/test_gpu.py tests/test_gpu_small_cards.py tests/kernels/test_preference_loss.py tests/kernels/test_gather_rows.py tests/kernels/test_layer_kernels.py \
        tests/kernels/test_linear_logps.py
    LINES_SHOWN=100 part 270 train-step "$python" -m bench.train_step --quick --rounds 3
    "$python" -m bench.goals "$OUT"
fi
grep -a -h -E '^(FAILED|ERROR)|: FAILED ' "$OUT"/*.log
printf '%s' "$summary"
exit "$failed"
