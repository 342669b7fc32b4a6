#!/usr/bin/env bash
# Tests and benchmarks that need a GPU, in one command and under ten minutes, without a network or an installation.
# Last comes what the kernels are meant to reach, and whether they did.
#
#   bash scripts/gpu_check.sh
#
# Rows go to the folder that OUT names (default bench/results/). Missing pure Python packages are taken from .whl/,
# a folder of wheels, where there is one. Exits 1 if a test fails or a benchmark breaks, 2 without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET # interpreted kernels on a GPU prove nothing

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no CUDA device that PyTorch can use; nothing to check here"
    exit 2
fi
if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/vapr-site .whl/*.whl || exit 2
    export PYTHONPATH=$PYTHONPATH:/tmp/vapr-site
fi
missing=$("$python" - <<'PY'
from importlib.util import find_spec
print(*(name for name in ("transformers", "peft", "yaml", "click", "rich", "PIL", "pytest") if not find_spec(name)))
PY
)
if [ -n "$missing" ]; then
    echo "gpu_check: these packages are missing here: $missing; carry their wheels in .whl/ (scripts/gpu_check.sh says how)"
    exit 2
fi
mkdir -p "$OUT"

part() { # part SECONDS NAME COMMAND...: run under a limit, keep the log, remember a failure
    local seconds=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n "${LINES_SHOWN:-60}"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 124 ] && echo "gpu_check: $name was stopped after $seconds s"
    summary+="$name: exit $status"$'\n'
    [ "$status" -eq 0 ] || failed=1
}

failed=0
summary=""
# Real sizes first; of the rest what launches kernels.
part 130 kernel-tests "$python" -m pytest -q -p no:cacheprovider -k "not pytorch" tests/test_gpu_kernels.py \
    tests/test_preference_loss.py tests/test_gather_rows.py tests/test_layer_kernels.py tests/test_linear_logps.py
part 100 gpu-tests "$python" -m pytest -m gpu -q -p no:cacheprovider
# One log for all operations; one that breaks does not keep the others from being measured.
kernels='status=0; for op in "${@:2}"; do "$1" -m "bench.$op" --quick || status=1; done; exit $status'
LINES_SHOWN=250 part 140 kernels bash -c "$kernels" kernels "$python" \
    linear_logps add_rms_norm swiglu rotary gather_keys_values preference_loss
part 140 train-step-quick "$python" -m bench.train_step --quick
part 60 train-step-four-per-image "$python" -m bench.train_step --quick --models qwen2.5-vl-3b --workloads four_per_image
"$python" scripts/render_results.py "$OUT"
"$python" -m bench.goals "$OUT"
printf '%s' "$summary"
exit "$failed"
