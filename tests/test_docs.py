"""The documentation says what is so: keys, links, configs and examples."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.study.config import StudyConfig

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIG = REPOSITORY / "docs" / "config.md"

CONTENT = "\n".join(file.read_text(encoding="utf-8") for file in DOCS)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def keys_of(value: object, prefix: str = "") -> list[str]:
    if isinstance(value, list):
        return [key for item in value for key in keys_of(item, prefix)]
    if not isinstance(value, dict) or not value:
        return []
    return [key for name, item in value.items() for key in (f"{prefix}{name}", *keys_of(item, f"{prefix}{name}."))]


@pytest.fixture(scope="module")
def config_reference():
    spec = importlib.util.spec_from_file_location("config_reference", REPOSITORY / "scripts" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_current(config_reference):
    text = CONFIG.read_text(encoding="utf-8")
    assert config_reference.replace_block(text, config_reference.render()) == text, (
        "run python scripts/config_reference.py --write docs/config.md"
    )


def test_the_edit_config_reference_is_current(config_reference):
    text = (REPOSITORY / "docs" / "edit.md").read_text(encoding="utf-8")
    assert config_reference.replace_block(text, config_reference.render("edit")) == text, (
        "run python scripts/config_reference.py --of edit --write docs/edit.md"
    )
    assert "|  |" not in config_reference.render("edit"), "a key without a docstring in vapr/editing/config.py"


def test_the_study_config_reference_is_current(config_reference):
    text = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    assert config_reference.replace_block(text, config_reference.render("study")) == text, (
        "run python scripts/config_reference.py --of study --write docs/study.md"
    )
    assert "|  |" not in config_reference.render("study"), "a key without a docstring in vapr/study/config.py"


def test_the_study_in_the_documents_is_accepted():
    [block] = [block for block in fenced(CONTENT, "yaml") if re.search(r"^base:", block, flags=re.MULTILINE)]
    study = StudyConfig.parse(yaml.safe_load(block))
    assert study.base_config().optim.lr == 5e-6


def test_the_script_writes_and_checks(tmp_path):
    page = tmp_path / "config.md"
    page.write_text("# Keys\n<!-- config:begin -->\nstale text\n<!-- config:end -->\nafter\n")

    def run(*arguments: str) -> int:
        script = REPOSITORY / "scripts" / "config_reference.py"
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, check=False).returncode

    assert run("--check", str(page)) == 1
    assert run("--write", str(page)) == 0
    assert run("--check", str(page)) == 0
    text = page.read_text()
    assert (
        text.startswith("# Keys\n")
        and text.endswith("after\n")
        and "stale text" not in text
        and "policy.lora.rank" in text
    )


def test_every_key_is_explained():
    raw = {
        "run_dir": "r",
        "policy": {"model": "m", "lora": {}},
        "data": {"train": [{"path": "p"}], "eval": [{"path": "p"}]},
    }
    text = CONFIG.read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    headings = set(re.findall(r"`([\w.]+)`", "".join(line for line in text.splitlines() if line.startswith("## "))))
    for key in keys_of(Config.parse(raw).as_dict()):
        name = key.replace("data.eval.", "data.train.")  # one table for both
        assert name in rows or name in headings, f"{key} is not in docs/config.md"
        assert name not in rows or not rows[name].endswith("|  |"), f"{key} has no docstring in vapr/config.py"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_point_to_something(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.exists(), f"{file.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{file.name} links to {target}"


def configs() -> list[str]:
    return [block for block in fenced(CONTENT, "yaml") if re.search(r"^policy:", block, flags=re.MULTILINE)]


@pytest.mark.parametrize("block", configs(), ids=lambda block: block.splitlines()[0])
def test_configs_are_accepted(block):
    Config.parse(yaml.safe_load(block))


def test_there_are_configs_to_check():
    assert configs()


ANSWERS = [
    ("mat.png", "What is the dog doing?", "It sleeps on a red mat.", "It sleeps on a blue mat."),
    ("mat.png", "Who is there?", "A dog and two cats.", "A dog and three cats."),
    ("table.png", "What is on the table?", "A cup of tea.", "A cup of milk."),
    ("table.png", "Is it empty?", "No, a cup is on it.", "No, a vase is on it."),
]


@pytest.fixture
def notebook_folder(tmp_path, monkeypatch) -> Path:
    """What the examples name: pairs.jsonl, its pictures, model."""
    for name in ("mat.png", "table.png"):
        Image.effect_noise((112, 84), 60).convert("RGB").save(tmp_path / name)
    names = ("prompt", "chosen", "rejected")
    rows = [
        {"id": f"row-{n}", "images": [image], **dict(zip(names, texts, strict=True))}
        for n, (image, *texts) in enumerate(ANSWERS, start=1)
    ]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    build_tiny_policy("qwen2_5_vl", tmp_path / "model", [text for _, *texts in ANSWERS for text in texts])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_notebook_examples_run(notebook_folder, capsys):
    blocks = fenced((REPOSITORY / "docs" / "notebook.md").read_text(encoding="utf-8"), "python")
    assert len(blocks) >= 10
    names: dict = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"docs/notebook.md, python block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "It sleeps on a red mat." in printed
    assert names["losses"].item() == pytest.approx(0.693147, abs=1e-5)
    assert [line["step"] for line in names["lines"]] == [1, 2, 3, 4]
    assert json.loads((names["final"] / "adapter_config.json").read_text())["r"] == 4
    assert all(p.grad is None or p.grad.isfinite().all() for p in names["policy"].trained_parameters().values())
    assert os.getcwd() == str(notebook_folder)


def said_by_the_code() -> list[str]:
    """Every text in vapr/, with a NUL for what is filled in."""
    texts = []
    for file in (REPOSITORY / "vapr").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def messages() -> list[str]:
    """Headings that are nothing but messages."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (`.+`)$", text, flags=re.MULTILINE)
    quoted = [message for heading in headings for message in heading.split(" or `")]
    return [message.strip("`") for message in quoted]


def test_messages_are_those_of_the_code():
    texts = said_by_the_code()
    assert len(messages()) >= 20
    for message in messages():
        pattern = ".*".join(re.escape(piece.strip()) for piece in message.split("..."))
        assert any(re.search(pattern, text, flags=re.DOTALL) for text in texts), f"nothing says: {message}"
