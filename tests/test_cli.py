"""The command line as a user meets it: quick help, one-line errors, exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from vapr.cli import main
from vapr.data.pairs import write_pairs


def vapr(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "40"}
    command = [sys.executable, "-m", "vapr.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def assert_one_line_error(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0], result.stderr


def test_help_needs_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from vapr.cli import main; "
        "print(CliRunner().invoke(main, ['--help']).output); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy', 'pydantic')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout and "export" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nope",), "No such option '--nope'. See "),
        (("scoer",), "No such command 'scoer'."),
        (("score",), "Missing argument 'FILE'. See "),
        (
            ("score", "f", "--bench", "pope", "--policy", "wrong"),
            "'wrong' is not one of 'official', 'strict', 'last-answer'.",
        ),
        (("eval", "m", "--limit", "0"), "Invalid value for '--limit': 0 is not in the range x>=1."),
        (("train", "c.yaml", "extra"), "Got unexpected extra argument (extra)"),
    ],
)
def test_a_mistaken_command_line_is_one_line(arguments, message):
    assert_one_line_error(vapr(*arguments), message)


@pytest.fixture
def run_yaml(tiny, photo_rows, photo_root, tmp_path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", photo_rows[:8])
    raw = {
        "run_dir": str(tmp_path / "run"),
        "policy": {"model": str(tiny("qwen2_vl")), "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root)},
        "optim": {"pairs_per_step": 4},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_train_resume_export(run_yaml, tmp_path):
    trained = vapr("train", str(run_yaml), "--set", "optim.lr=1e-3")
    assert trained.returncode == 0, trained.stderr
    assert "attention sdpa, PyTorch's operations, images by pil" in trained.stdout
    assert "largest |log-ratio| to the reference 0.00e+00" in trained.stderr
    assert "Traceback" not in trained.stderr and "Warning" not in trained.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert_one_line_error(
        vapr("train", str(run_yaml), "--set", "optim.lr=1e-3"), "holds a run; continue it with --resume"
    )
    again = vapr("train", str(run_yaml), "--set", "optim.lr=1e-3", "--resume")
    assert again.returncode == 0 and "this run is finished" in again.stdout
    exported = vapr("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2_vl"
    assert_one_line_error(vapr("export", str(tmp_path / "run"), "--out", str(tmp_path / "out")), "already exists")
    full = vapr(
        "export", str(tmp_path / "run"), "--out", str(tmp_path / "f"), "--dtype", "float32", "--checkpoint", "last"
    )
    assert full.returncode == 0 and "rounded once to float32" in full.stdout, full.stderr
    lost = vapr("train", str(run_yaml), "--resume", "--set", f"run_dir={tmp_path}/rum")
    assert_one_line_error(lost, f"rum does not exist, so there is nothing to resume; runs beside it: {tmp_path}/run")


def test_a_mistake_that_every_process_of_a_machine_finds_is_shown_by_the_first(tmp_path, monkeypatch):
    """The others wait, because a launcher ends all as soon as one has."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    shown = []
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        result = CliRunner().invoke(main, ["train", str(tmp_path / "absent.yaml")])
        assert result.exit_code == 2
        shown.append((result.stdout + result.stderr).count("absent.yaml"))
    assert shown == [1, 0] and len(waited) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.betta=1"], "unknown key 'loss.betta'; did you mean 'beta'?"),
        (["policy.model=/nowhere/model"], "policy.model: /nowhere/model: no such folder"),
        (["policy.model=."], "is a folder without config.json"),
        (["policy.attention=flash-attn"], "flash-attn needs a CUDA device"),
        (["policy.lora.targets=[k_prj]"], "no trained linear layer is called 'k_prj'; there are down_proj"),
        (["data.train=none.jsonl"], "none.jsonl: no such file or folder"),
        (["data.eval=none.jsonl"], "none.jsonl: no such file or folder"),
        (["data.image_root=/nowhere"], "data.image_root: /nowhere: no such folder"),
        (["data.image_backend=torchvision"], "torchvision does not import"),
        (["packing.max_tokens=10"], "packing.max_tokens is 10"),
        (["run_dir=/proc/run"], "run_dir: /proc/run cannot be written"),
    ],
    ids=str,
)
def test_mistakes(run_yaml, overrides, message):
    if overrides == ["data.image_backend=torchvision"]:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            pass
        else:
            pytest.skip("torchvision imports here")
    arguments = [argument for override in overrides for argument in ("--set", override)]
    assert_one_line_error(vapr("train", str(run_yaml), *arguments, cwd=run_yaml.parent), message)


def test_a_run_that_never_took_a_step_can_be_started_again(run_yaml, tmp_path):
    assert_one_line_error(vapr("train", str(run_yaml), "--set", "packing.max_tokens=10"), "max_tokens")
    assert vapr("train", str(run_yaml)).returncode == 0


def test_export_of_what_is_no_run(tmp_path):
    assert_one_line_error(vapr("export", str(tmp_path), "--out", str(tmp_path / "out")), "no run (no config.yaml in")


def test_a_config_that_is_not_there():
    assert_one_line_error(vapr("train", "/nowhere/run.yaml"), "/nowhere/run.yaml")


def test_data_prepare_convert(run_yaml, tmp_path, photo_root):
    shown = vapr("data", str(run_yaml))
    assert shown.returncode == 0 and "usable pairs" in shown.stdout and "share: pair saves" in shown.stdout, (
        shown.stderr
    )
    machine = vapr("data", str(run_yaml), "--json")
    assert json.loads(machine.stdout)["train"]["pairs"] == 8
    long = vapr("data", str(run_yaml), "--json", "--set", "packing.max_tokens=40")
    counts = json.loads(long.stdout)["train"]
    assert long.returncode == 2 and counts["pairs"] + counts["skipped"]["rows"] == 8 and counts["skipped"]["rows"] > 0
    assert "vapr train would stop at" in long.stderr and "data.too_long: skip leaves them out" in long.stderr
    assert vapr("data", str(run_yaml), "--set", "packing.max_tokens=40", "--set", "data.too_long=skip").returncode == 0

    prepared = vapr("prepare", str(run_yaml), "--json")
    assert json.loads(prepared.stdout)["reference"]["computed"] == 16, prepared.stderr
    trained = vapr("train", str(run_yaml))
    assert "0 computed" in trained.stdout and "report.html" in trained.stdout, trained.stderr

    pairs, out = str(tmp_path / "pairs.jsonl"), str(tmp_path / "trl.parquet")
    converted = vapr("convert", pairs, "--to", "trl", "--out", out, "--image-root", str(photo_root))
    assert converted.returncode == 0 and "8 pairs, format trl" in converted.stdout, converted.stderr
    assert "lost       'edits' of" in converted.stdout


def test_convert_needs_no_torch(tmp_path):
    write_pairs(tmp_path / "in.jsonl", [{"prompt": "Q?", "chosen": "A.", "rejected": "B."}])
    code = (
        "import sys; from click.testing import CliRunner; from vapr.cli import main; "
        f"r = CliRunner().invoke(main, ['convert', '{tmp_path}/in.jsonl', '--to', 'povid', '--out', '{tmp_path}/o.json']); "
        "sys.exit(r.exit_code or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_older_runs_go_on(run_yaml, tmp_path):
    """Their config.yaml lacks keys that came later."""

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    old = tmp_path / "old"
    run("train", run_yaml, "--set", f"run_dir={old}")
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["parallel"], config["policy"]["base_weights"], config["optim"]["kind"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert "finished" in run("train", run_yaml, "--resume", "--set", f"run_dir={old}")
    run("export", old, "--out", tmp_path / "exported")


def test_names_for_notebooks_load_on_demand():
    code = "import sys, vapr; assert 'torch' not in sys.modules; vapr.read_pairs, vapr.Config; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    import vapr as package

    assert all(callable(getattr(package, name)) for name in dir(package) if name != "__version__")
