#!/usr/bin/env bash
# mlflow-skinny 3.17.2.
#
# The small distribution of mlflow cannot log a run with its own defaults: it chooses a SQLite file as the tracking store,
# and SQLite stores are a part that only the full distribution holds. Naming a folder instead is refused as well, unless an
# environment variable allows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow-skinny==3.17.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os

import mlflow


def tried(name):
    try:
        mlflow.set_experiment("first")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
        return False
    print(f"{name}: works")
    return True


by_default = tried("by default")
mlflow.set_tracking_uri("file:./runs")
in_a_folder = tried("file:./runs")
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
allowed = tried("file:./runs with MLFLOW_ALLOW_FILE_STORE=true")
assert (by_default, in_a_folder, allowed) == (False, False, True)
PY
