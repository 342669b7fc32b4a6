"""Importing works beside Hugging Face's own ``kernels`` package, and each heavy dependency has one door."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "vapr").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_the_name_kernels_stays_hugging_faces():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
    from transformers import AutoProcessor  # noqa: F401


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("package", "doors"),
    [
        ("deepspeed", {"vapr/training/engine_deepspeed.py"}),
        ("bitsandbytes", {"vapr/model/quantized.py"}),
        ("vllm", {"vapr/editing/llm/vllm_offline.py", "vapr/evaluation/generation/vllm.py"}),
        ("openai", {"vapr/llm/server.py"}),
        (
            "click",
            {
                f"vapr/cli/{name}.py"
                for name in ("evaluation_commands", "main", "options", "pair_commands", "training_commands")
            },
        ),
        ("datasets", {"vapr/data/table_rows.py"}),
        ("fsspec", {"vapr/data/remote.py"}),
        ("pickle", set()),
    ],
)
def test_one_door_per_heavy_dependency(package, doors):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert all(any(user.startswith(door) for door in doors) for user in users), users


def test_training_starts_without_what_only_data_editing_and_audit_need():
    """Machines with a GPU often hold torch and transformers and little else."""
    missing = ("bitsandbytes", "datasets", "datasketch", "deepspeed", "inflect", "openai", "pyarrow", "rapidfuzz", "sklearn", "trl", "vllm")  # fmt: skip
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import vapr.training.trainer, vapr.training.fill_caches, vapr.pages.run_report"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr


def test_kernels_never_import_the_trainer():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "vapr" for name in imports(path)), path


def test_nothing_unpickles_or_runs_remote_code():
    for path in SOURCES:
        text = path.read_text()
        assert "torch.load" not in text, path
        assert text.count("trust_remote_code") == text.count("trust_remote_code=False"), path


def test_public_functions_are_documented():
    missing = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and path.name != "config.py" and not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.name}")
    assert missing == []
