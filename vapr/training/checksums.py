"""The checksums of a checkpoint's files, in the form that ``sha256sum -c SHA256SUMS`` reads."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vapr.cache import written_whole
from vapr.errors import UserError

NAME = "SHA256SUMS"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


def write_checksums(folder: Path) -> None:
    """List the sha256 of every file of a checkpoint in its folder."""
    lines = [f"{_sha256(file)}  {file.relative_to(folder)}\n" for file in sorted(folder.rglob("*")) if file.is_file()]
    with written_whole(folder / NAME) as out:
        out.write("".join(lines).encode())


def check_checksums(folder: Path, needed: Sequence[str]) -> None:
    """Read a checkpoint's files once and compare them with their checksums; checkpoints of older versions have none.

    ``needed`` are the names of files that must be among them.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, cut short or changed.
        UserError: if a file cannot be read for another reason, such as missing permissions.
    """
    try:
        if not (folder / NAME).exists():
            return
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
        sums = {name: known for known, _, name in (line.partition("  ") for line in lines)}
        if unlisted := [name for name in needed if name not in sums]:
            raise DamagedCheckpoint(f"{folder}: {NAME} lists no {unlisted[0]}")
        for name, known in sums.items():
            if not (folder / name).is_file():
                raise DamagedCheckpoint(f"{folder}: {name or 'a file'} is missing")
            if _sha256(folder / name) != known:
                raise DamagedCheckpoint(f"{folder}: {name} is cut short or was changed")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
