"""scripts/setup.sh with a stand-in for Python: what it makes, what it keeps, and what it mends. Nothing is downloaded."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in
    "-c "*version_info*) [ -n "$VERSION" ] && echo "$VERSION" ;;
    "-m venv "*) mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python" ;;
    *" install "*)
        if [ -e "$FAULT" ]; then
            fault=$(cat "$FAULT")
            rm "$FAULT"
            [ "$fault" = killed ] && kill -9 "$PPID"
            exit 1
        fi ;;
esac
"""


class Clone:
    """A checkout with the scripts alone, where python3 writes down how it is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.fault = folder.parent / "log", folder.parent / "fault"
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        bin_folder = folder.parent / "bin"
        bin_folder.mkdir()
        (bin_folder / "python3").write_text(STAND_IN)
        (bin_folder / "python3").chmod(0o755)
        self.path = f"{bin_folder}:/usr/bin:/bin"

    def setup(self, part: str, version: str = "True is 3.11.2") -> tuple[subprocess.CompletedProcess, list[str]]:
        """Run it; what came out, and the calls of Python that make or install."""
        self.log.write_text("")
        environment = {
            "PATH": self.path, "HOME": str(self.folder.parent), "LOG": str(self.log), "FAULT": str(self.fault),
            "VERSION": version,
        }  # fmt: skip
        command = ["bash", "-c", f"source scripts/setup.sh {part}; echo ready"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        calls = self.log.read_text().splitlines()
        return done, [call for call in calls if call.startswith("-m venv") or " install " in call]


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path / "clone")


def assert_made_anew(done: subprocess.CompletedProcess, calls: list[str], requirement: str = ".[data,audit]") -> None:
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "ready", "")
    assert calls[0] == "-m venv .venv"
    assert calls[-1].endswith(f"install --quiet --disable-pip-version-check -e {requirement}")


def test_what_is_installed_is_kept(clone):
    assert_made_anew(*clone.setup("demo"))
    done, calls = clone.setup("demo")
    assert (done.returncode, done.stdout, calls) == (0, "ready\n", [])


def test_the_demo_needs_less_than_the_tests(clone):
    clone.setup("demo")
    done, calls = clone.setup("dev")
    assert done.returncode == 0
    assert "-m venv .venv" not in calls and calls[-1].endswith("-e .[dev]")
    assert clone.setup("demo")[1] == clone.setup("dev")[1] == []


def test_torch_comes_first_and_by_its_exact_version(clone):
    """On a machine without a GPU; anything looser may pull gigabytes of CUDA."""
    if shutil.which("nvidia-smi", path=clone.path):
        pytest.skip("this machine has a GPU")
    _, calls = clone.setup("dev")
    assert [call.rsplit(" ", 1)[-1] for call in calls] == [".venv", "torch==2.13.0", ".[dev]"]


def test_an_installation_that_was_killed_is_made_anew(clone):
    clone.fault.write_text("killed")
    done, _ = clone.setup("demo")
    assert done.returncode == -9 and (clone.folder / ".venv").is_dir()
    (clone.folder / ".venv" / "half a package").touch()
    assert_made_anew(*clone.setup("demo"))
    assert not (clone.folder / ".venv" / "half a package").exists()
    assert clone.setup("demo")[1] == []


def test_an_addition_that_was_killed_does_not_leave_the_demo_half_made(clone):
    clone.setup("demo")
    clone.fault.write_text("killed")
    assert clone.setup("dev")[0].returncode == -9
    assert_made_anew(*clone.setup("demo"))


def test_an_installation_that_failed_goes_on_where_it_was(clone):
    clone.fault.write_text("no network")
    done, _ = clone.setup("demo")
    assert done.returncode == 1 and "ready" not in done.stdout
    done, calls = clone.setup("demo")
    assert done.returncode == 0
    assert "-m venv .venv" not in calls and calls[-1].endswith("-e .[data,audit]")


@pytest.mark.parametrize("damage", ["python gone", "dangling link", "empty folder"])
def test_an_environment_without_python_is_made_anew(clone, damage):
    clone.setup("demo")
    interpreter = clone.folder / ".venv" / "bin" / "python"
    interpreter.unlink()
    if damage == "dangling link":
        interpreter.symlink_to("/nowhere/python3")
    elif damage == "empty folder":
        shutil.rmtree(clone.folder / ".venv")
        (clone.folder / ".venv").mkdir()
    assert_made_anew(*clone.setup("demo"))


def test_changed_dependencies_are_installed(clone):
    clone.setup("demo")
    with (clone.folder / "pyproject.toml").open("a") as project:
        project.write("# one more\n")
    assert clone.setup("demo")[1][-1].endswith("-e .[data,audit]")


def test_a_folder_that_was_moved_is_installed_where_it_is(clone):
    clone.setup("demo")
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert clone.setup("demo")[1][-1].endswith("-e .[data,audit]")


@pytest.mark.parametrize(
    ("version", "found"),
    [("False is 3.10.13", "python3 is 3.10.13;"), ("", "python3 does not run;")],
    ids=["old", "broken"],
)
def test_a_python_that_is_too_old_is_one_line(clone, version, found):
    done, calls = clone.setup("demo", version)
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert len(done.stderr.splitlines()) == 1
    assert "needs Python 3.11 or newer" in done.stderr and found in done.stderr and "PYTHON=" in done.stderr
    assert not (clone.folder / ".venv").exists()
