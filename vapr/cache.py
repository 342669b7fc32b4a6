"""The folder for what vapr can compute again, files known without reading them twice, and files written whole."""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vapr.errors import UserError


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/vapr``, by default ``~/.cache/vapr``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vapr"


def file_identity(path: Path) -> str:
    """Return a text that changes whenever the file is written again; of its times, ctime cannot be set back."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time make a file of the cache; other ranks wait instead of all making it.

    The lock goes with its process. Where a folder cannot be written or its disk knows no locks, nobody waits.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(path.with_name(f"{path.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def files_hash(files: list[Path], memory_file: Path) -> str:
    """Return the sha256 over names and contents of files.

    A file's own hash is remembered in ``memory_file`` by :func:`file_identity`, so that it is read once.

    Raises:
        UserError: if ``memory_file`` cannot be written.
    """
    identities = [file_identity(file) for file in files]
    memory = _remembered(memory_file)
    if not memory.keys() >= set(identities):
        with one_at_a_time(memory_file):
            memory = _remembered(memory_file)
            num_remembered = len(memory)
            for file, identity in zip(files, identities, strict=True):
                if identity not in memory:
                    with file.open("rb") as stream:
                        memory[identity] = hashlib.file_digest(stream, "sha256").hexdigest()
            if len(memory) > num_remembered:
                with written_whole(memory_file) as out:
                    out.write(json.dumps(memory).encode())
    named = (f"{file.name}:{memory[identity]}\n" for file, identity in zip(files, identities, strict=True))
    return hashlib.sha256("".join(named).encode()).hexdigest()


def _remembered(memory_file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(memory_file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def give_ordinary_permissions(file: Path) -> None:
    """Give a file the permissions that the umask asked for when its folder was made; safetensors' files are private."""
    file.chmod(file.parent.stat().st_mode & 0o666)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under its name complete or not at all; its folder is made if need be.

    Raises:
        UserError: if it cannot be written, a full disk included.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        hint = "; XDG_CACHE_HOME can name another folder" if path.is_relative_to(user_cache()) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){hint}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write JSON, whole or not at all.

    Raises:
        UserError: if it cannot be written.
        ValueError: for a number that is not finite, unless ``allow_nan``.
    """
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=allow_nan).encode() + b"\n")
