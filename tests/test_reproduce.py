"""scripts/reproduce.sh: which recipe it takes, what it says of mistakes, and all of its stages on a tiny policy."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce.sh"
COLOURS, THINGS = ("red", "blue", "green", "yellow"), ("ball", "car", "cup", "hat")


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """``reproduce(argument, ..., gpu=MiB)`` -> the finished script, run in tmp_path, with this checkout's vapr first on
    PATH and no GPU but ``gpu``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    put(tools / "vapr", f'exec "{sys.executable}" -m vapr.cli "$@"\n')
    put(tools / "python", f'exec "{sys.executable}" "$@"\n')

    def run(*arguments: object, gpu: str = "") -> subprocess.CompletedProcess:
        put(tools / "nvidia-smi", f"printf '{gpu}'\n")
        path = f"{tools}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def put(file: Path, text: str) -> None:
    """Write a program; an earlier one of this name is replaced."""
    file.unlink(missing_ok=True)
    file.write_text(f"#!/bin/bash\n{text}")
    file.chmod(0o755)


def commands(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("   ")]


@pytest.mark.parametrize(
    ("gpu", "options", "recipe"),
    [
        ("24564\n24564\n", (), "lora_24gb"),  # two RTX 4090
        ("23034\n", (), "lora_24gb"),  # an L4
        ("49140\n", (), "lora_24gb"),  # an L40S: the recipe below it
        ("81559\n", (), "lora_80gb"),  # an H100
        ("143771\n24564\n", (), "lora_24gb"),  # the smaller of two different ones
        ("143771\n", ("--full",), "full_141gb"),  # an H200
        ("81559\n", ("--gpu-memory", "141"), "lora_141gb"),
        ("", ("--gpu-memory", "24"), "lora_24gb"),
    ],
)
def test_the_recipe_is_that_of_the_card(reproduce, gpu, options, recipe):
    done = reproduce("qwen2_5_vl_7b", "--data", "sft.json", "--dry-run", *options, gpu=gpu)
    [train] = [command for command in commands(done) if command.startswith("vapr train")]
    assert train.split()[2] == str(ROOT / "scripts" / "recipes" / f"qwen2_5_vl_7b_{recipe}.yaml")
    assert "float32" not in train


def test_a_dry_run_prints_every_command_and_runs_none(reproduce, tmp_path):
    done = reproduce(
        "llava_1_5_13b", "--data", "my sft.json", "--images", "img", "--bench", "pope=p", "--bench", "mmstar=m.tsv",
        "--gpu-memory", "80", "--set", "optim.lr=1e-6", "--editor", "http://host:8000", "--pairs", "500", "--limit", "9",
        "--out", "o", "--dry-run",
    )  # fmt: skip
    recipe = ROOT / "scripts" / "recipes" / "llava_1_5_13b_lora_80gb.yaml"
    edit, audit, train, evaluate, page = commands(done)
    assert edit == r"vapr edit my\ sft.json --out o/pairs --editor http://host:8000 --target 500 --image-root img"
    assert audit == "vapr audit o/pairs --out o/audit.html --json > o/audit.json"
    assert (
        train
        == f"vapr train {recipe} --set run_dir=o/llava_1_5_13b/aligned --set data.train=o/pairs --set optim.lr=1e-6"
    )
    assert evaluate == "vapr eval llava-hf/llava-1.5-13b-hf o/llava_1_5_13b/aligned --bench pope=p --bench mmstar=m.tsv --out o/llava_1_5_13b/eval --limit 9"  # fmt: skip
    assert page.endswith("reproduction.py page o llava_1_5_13b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ({"model_type": "llava", "text_config": {"hidden_size": 4097}}, "llava_1_5_13b"),
        ({"model_type": "qwen2_vl", "hidden_size": 1536}, "qwen2_vl_2b"),  # as transformers 4 wrote it
        ({"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 128}}, "qwen2_5_vl_3b"),
    ],
)
def test_a_folder_gets_the_recipe_of_the_next_larger_model(reproduce, tmp_path, config, recipe):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    done = reproduce("mine/", "--data", "sft.json", "--dry-run", gpu="")
    [train] = [command for command in commands(done) if command.startswith("vapr train")]
    assert f"/{recipe}_lora_80gb.yaml" in train
    assert "--set policy.model=mine/ --set policy.dtype=float32" in train
    assert "no GPU here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which model?"),
        (("qwen2_vl_2b",), "--data is missing"),
        (("qwen2_vl_2b", "--data"), "--data needs a value"),
        (("qwen2_vl_2b", "--data", "x", "--fast"), "unknown option --fast"),
        (("qwen2_vl_2b", "llava_1_5_7b", "--data", "x"), "two models"),
        (("qwen2_vl_2b", "--data", "x", "--limit", "0"), "--limit 0: give a whole number"),
        (("qwen2_vl_2b", "--data", "x", "--max-new-tokens", "1k"), "--max-new-tokens 1k: give a whole number"),
        (("qwen2_vl_2b", "--data", "x", "--pairs", "-3"), "--pairs -3: give a whole number"),
        (("qwen9", "--data", "x", "--gpu-memory", "24"), "qwen9 is no folder and none of llava_1_5_13b llava_1_5_7b "),
        (
            ("qwen2_5_vl_7b", "--data", "x", "--gpu-memory", "24", "--full"),
            "full fine-tuning of qwen2_5_vl_7b does not fit 24 GB",
        ),
        (("qwen2_5_vl_7b", "--data", "x", "--gpu-memory", "12"), "a GPU of 12 GiB is smaller than"),
        (("qwen2_5_vl_7b", "--data", "x", "--gpu-memory", "24GB"), "--gpu-memory 24GB: give a number"),
        (("tools", "--data", "x", "--gpu-memory", "24"), "tools: no config.json of a LLaVA-1.5"),
        (("qwen2_vl_2b", "--data", "x", "--recipe", "none.yaml"), "--recipe none.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line(reproduce, arguments, said):
    done = reproduce(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: reproduce.sh: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--set", "optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("--bench", "pope=nowhere", "nowhere"),
    ],
)
def test_a_mistake_of_a_later_stage_is_found_before_the_first(reproduce, tmp_path, option, value, said):
    done = reproduce("qwen2_vl_2b", "--data", "sft.json", option, value)
    assert done.returncode == 2 and "==" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("Error: ") and said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


def test_help_names_every_option(reproduce):
    done = reproduce("--help")
    assert done.returncode == 0
    options = {
        word for word in SCRIPT.read_text().replace("|", " ").split() if word.startswith("--") and word.isascii()
    }
    known = {"--full", "--dry-run", "--data", "--images", "--bench", "--out", "--editor", "--pairs", "--gpu-memory", "--recipe", "--set", "--limit", "--max-new-tokens"}  # fmt: skip
    assert known <= options and all(option in done.stdout for option in known)


def documented() -> list[str]:
    """The calls of the script in the documents, on one line each."""
    texts = [file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return sorted({line.split("#")[0].strip() for line in lines if line.startswith("bash scripts/reproduce.sh")})


@pytest.mark.parametrize("command", [command for command in documented() if "--help" not in command])
def test_calls_in_the_documents_are_understood(reproduce, command):
    arguments = shlex.split(command)[2:]
    assert len(commands(reproduce(*arguments, "--dry-run", "--gpu-memory", "24"))) == 5


@pytest.fixture
def instructions(tmp_path) -> Path:
    """48 questions about 24 pictures, and a POPE about four of them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "pope").mkdir()
    rows = []
    for n in range(24):
        colour, thing = COLOURS[n % 4], THINGS[n // 4 % 4]
        Image.new("RGB", (56 + n, 56), colour).save(tmp_path / "images" / f"{n}.png")
        there = n % 2 == 1
        asked = {
            f"What colour is the {thing}?": f"The {thing} is {colour}.",
            f"Is there a {thing if there else 'dog'} in the picture?": "Yes" if there else "No",
        }
        for question, answer in asked.items():
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{len(rows)}", "image": f"{n}.png", "conversations": turns})
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    for split in ("adversarial", "popular", "random"):
        with (tmp_path / "pope" / f"coco_pope_{split}.json").open("w") as file:
            for n, thing in enumerate(THINGS):
                text = f"Is there a {thing} in the {split} image?"
                row = {"question_id": n + 1, "image": f"{n}.png", "text": text, "label": "no"}
                file.write(json.dumps(row) + "\n")
    for n in range(4):
        Image.new("RGB", (60, 60), COLOURS[n]).save(tmp_path / "pope" / f"{n}.png")
    return tmp_path / "sft.json"


def test_all_stages_end_in_a_page_also_after_a_stop(reproduce, tiny, instructions, tmp_path):
    """The first start ends in the middle, as if training had been killed; the same command finishes."""
    model = tmp_path / "tiny"
    model.symlink_to(tiny("qwen2_5_vl"))
    command = (
        "tiny", "--data", instructions.name, "--images", "images", "--bench", "pope=pope", "--max-new-tokens", "4",
        "--set", "optim.pairs_per_step=16", "--set", "reference.cache_dir=cache",
    )  # fmt: skip
    vapr = tmp_path / "tools" / "vapr"
    whole = vapr.read_text().removeprefix("#!/bin/bash\n")
    put(vapr, f'[ "$1" != train ] || kill -9 $$\n{whole}')
    stopped = reproduce(*command)
    assert stopped.returncode == 137
    assert "== train ended with exit code 137" in stopped.stderr and "goes on from here" in stopped.stderr
    out = tmp_path / "reproduction"
    audited = (out / "audit.json").stat().st_mtime_ns
    parts = {path: path.stat().st_mtime_ns for path in (out / "pairs" / "pairs").iterdir()}

    put(vapr, whole)
    done = reproduce(*command)
    assert done.returncode == 0, done.stderr
    assert (out / "audit.json").stat().st_mtime_ns == audited and "== audit: done before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "pairs" / "pairs").iterdir()} == parts
    assert (out / "tiny" / "aligned" / "final" / "adapter_model.safetensors").is_file()
    comparison = json.loads((out / "tiny" / "eval" / "comparison.json").read_text())
    assert [one["name"] for one in comparison["folders"]] == ["tiny", "aligned"]

    page = (out / "tiny" / "reproduction.html").read_text()
    accepted = json.loads((out / "pairs" / "ledger.json").read_text())["accepted"]
    assert accepted == 48
    for said in ("+1.5 % for Qwen2.5-VL", "arXiv 2510.01700", "48 edited by rules", ">POPE<", "Not measured: amber-d"):
        assert said in page, said
    for link in ("../audit.html", "aligned/report.html", "eval/comparison.html"):
        assert f'href="{link}"' in page and (out / "tiny" / link).is_file()
