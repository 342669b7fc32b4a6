#!/usr/bin/env bash
# Set-up, lint, types and all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One thread a process: several that spin for the same core are slower than one.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 "$@"
