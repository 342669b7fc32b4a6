"""Another commit of vapr in a folder of its own, for as long as it is measured."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.record import REPOSITORY


@contextmanager
def work_tree(commit: str, folder: Path) -> Iterator[Path]:
    """Check ``commit`` out into ``folder``, which must not exist; the work tree is removed in any case."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode:
        sys.exit(f"{commit}: {REPOSITORY} has no such commit; `git log --oneline` lists those it has")
    try:
        added = _git("worktree", "add", "--detach", str(folder), found.stdout.strip())
        if added.returncode:
            sys.exit(f"{commit}: no work tree of it: {added.stderr.strip().splitlines()[-1]}")
        yield folder
    finally:
        _git("worktree", "remove", "--force", "--force", str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
