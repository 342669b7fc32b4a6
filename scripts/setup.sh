#!/usr/bin/env bash
# Makes .venv with everything development needs. Sourced by demo.sh and test.sh; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
# Reinstall only when the dependencies changed.
stamp=.venv/installed
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "setting up .venv (a few minutes the first time)"
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if ! command -v nvidia-smi > /dev/null; then
        # First and by this exact version: on a machine without a GPU anything looser may pull gigabytes of CUDA.
        "${pip[@]}" torch==2.13.0
    fi
    "${pip[@]}" -e '.[dev]'
    touch "$stamp"
fi
