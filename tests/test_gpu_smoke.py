"""The GPU's smoke test on a CPU: every check of scripts/gpu_smoke.py, small and interpreted, so that typing mistakes
show before a GPU is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vapr_kernels import launch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="here scripts/gpu_smoke.py itself is what runs")
@pytest.mark.skipif(not launch.installed, reason="triton is not installed")
def test_every_check_passes_on_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SMOKE_SECONDS": "1500"}
    command = [sys.executable, "scripts/gpu_smoke.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    passed, count = re.search(r"gpu_smoke: (\d+) of (\d+) checks passed", done.stdout).groups()
    assert passed == count and int(count) >= 29 and done.returncode == 0, done.stdout[-6000:]


def test_a_failing_check_is_shown_and_hides_none(tmp_path):
    """A check that raises is reported with its traceback; the others still run, and the exit status tells."""
    script = (REPOSITORY / "scripts" / "gpu_smoke.py").read_text()
    planted = 'CHECKS[:] = [("first", lambda: 1 / 0), ("second", lambda: "a note")]\n\n\ndef main() -> int:'
    copy = REPOSITORY / "scripts" / f"gpu_smoke_{os.getpid()}.py"  # it finds the repository by its own place
    copy.write_text(script.replace("def main() -> int:", planted))
    try:
        done = subprocess.run([sys.executable, copy], cwd=tmp_path, capture_output=True, text=True)
    finally:
        copy.unlink()
    assert done.returncode == 1
    assert "first: FAILED ZeroDivisionError: division by zero" in done.stdout
    assert "second: ok (a note)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("gpu_smoke: 1 of 2 checks passed")


@pytest.mark.parametrize("arguments", [[], ["everything"]], ids=["none", "unknown"])
def test_gpu_check_wants_a_stage(arguments):
    done = subprocess.run(["bash", "scripts/gpu_check.sh", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "gpu_check: say which: bash scripts/gpu_check.sh smoke, or full\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", "scripts/gpu_check.sh", "smoke"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu_check: no CUDA device that PyTorch can use; nothing to check here" in done.stderr
