"""The checksums of a checkpoint's files, in the form that ``sha256sum -c SHA256SUMS`` reads."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vapr.cache import written_whole
from vapr.errors import UserError

NAME = "SHA256SUMS"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


def checksums(files: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files by name."""
    sums = {}
    for file in files:
        with file.open("rb") as stream:
            sums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the checksums of all files of a checkpoint beside them."""
    with written_whole(folder / NAME) as out:
        out.write("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def check_checksums(folder: Path) -> bool:
    """Read a checkpoint's files once and compare them with their sums; return False if an older version wrote none.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, cut short, changed or not listed.
        PermissionError: if a file may not be read.
    """
    listed = folder / NAME
    if not listed.exists():
        return False
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: known for known, _, name in (line.partition("  ") for line in lines)}
    for file in sorted([*folder.glob("*.safetensors"), folder / "state.json"]):
        if file.name not in sums:
            raise DamagedCheckpoint(f"{folder}: {NAME} lists no {file.name}")
    for name, known in sums.items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder}: {name or 'a file'} is missing")
        if checksums([folder / name]) != {name: known}:
            raise DamagedCheckpoint(f"{folder}: {name} is cut short or was changed")
    return True
