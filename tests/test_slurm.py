"""scripts/slurm.sh with stand-ins for SLURM: two "nodes" on this machine, whose torchruns find one another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_INS = {
    "scontrol": '#!/bin/bash\n[ "$*" = "show hostnames node[1-2]" ] && printf "localhost\\nlocalhost\\n"\n',
    # Both nodes at once, as SLURM does; with the first that fails the step has failed.
    "srun": '#!/bin/bash\necho "$@" >> "$LOG"\nwhile [[ $1 == --* ]]; do shift; done\n"$@" & "$@" & wait -n && wait -n\n',
    "torchrun": f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    "vapr": f"#!{sys.executable}\nimport os, sys\nsaid = [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')]\nos.write(1, ' '.join([*said, *sys.argv[1:], chr(10)]).encode())\n",
}


@pytest.fixture
def submit(tmp_path):
    """``submit(argument, ..., **variables of SLURM)`` -> the finished job, and how srun was called."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, str]:
        log = tmp_path / "log"
        log.write_text("")
        of_slurm = {
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "6", **variables,
        }  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**kept, **of_slurm, "PATH": path, "LOG": str(log)}
        command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        return done, log.read_text()

    return run


def test_every_gpu_of_every_node_gets_a_process_of_one_run(submit):
    done, called = submit("run.yaml", "--set", "parallel.zero=3")
    assert done.returncode == 0, done.stderr
    expected = [f"{rank} {rank % 2} 4 3 train run.yaml --set parallel.zero=3 " for rank in range(4)]
    assert sorted(done.stdout.splitlines()) == expected
    assert "--kill-on-bad-exit=1" in called and "--cpus-per-task=6" in called


@pytest.mark.parametrize(("restarts", "given"), [("1", ()), ("1", ("--resume",)), ("0", ())])
def test_a_job_that_slurm_starts_again_resumes(submit, tmp_path, restarts, given):
    (tmp_path / "torchrun").write_text("#!/bin/bash\n")
    (tmp_path / "torchrun").chmod(0o755)
    done, called = submit("run.yaml", *given, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == 0, done.stderr
    assert called.count("--resume") == (restarts == "1" or bool(given))


def test_a_job_without_config_says_so(submit):
    done, called = submit()
    assert (done.returncode, called) == (2, "")
    assert done.stderr.startswith("Error: slurm.sh: which config?")
