"""Leases: files by which workers that share a folder, on one machine or many, take a shard each. No coordinator.

The n-th time a shard is taken, ``NAME.n`` is made, which only one process can do; the highest number holds the lease.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from vapr.errors import UserError

STALE_SECONDS = 120.0
"""A lease of another machine that was not renewed for so long is up for taking."""
RENEW_SECONDS = 15.0


class Lease:
    """The right to work on one thing, renewed in the background until it is given back.

    Attributes:
        times_taken: how often this lease was taken, this time included: more than once means that work was lost.
    """

    def __init__(self, file: Path, times_taken: int) -> None:
        self._file = file
        self.times_taken = times_taken
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="vapr-lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    @property
    def held(self) -> bool:
        """False once another process has taken the lease, because this one seemed to be gone."""
        return _newest(self._file.parent, self._file.name.rpartition(".")[0])[0] == self.times_taken

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing. The file stays: it counts, and a process that is gone holds nothing."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._write_free()

    def _write_free(self) -> None:
        # Written over in place: whoever reads half of it takes it for a lease of nobody, which it is.
        self._file.write_text(json.dumps({"free": True}))


def take(folder: Path, name: str) -> Lease | None:
    """Take a lease; return None if a living process holds it.

    Args:
        folder: the folder of the leases, which is made if need be.
        name: what the lease is on, without a point in it.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, newest = _newest(folder, name)
        if newest is not None and _is_held(newest):
            return None
        file = folder / f"{name}.{number + 1}"
        temporary = folder / f".{name}.{uuid.uuid4().hex}"
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "began": _start_of_process(os.getpid())}
        temporary.write_text(json.dumps(holder))
        try:
            os.link(temporary, file)  # whole or not at all, and only one process can
        except FileExistsError:
            return None
        finally:
            temporary.unlink(missing_ok=True)
        return Lease(file, number + 1)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def any_held(folder: Path, prefix: str) -> bool:
    """Return whether a living process holds a lease whose name begins so."""
    return any(_is_held(file) for file in folder.glob(f"{prefix}*"))


def _newest(folder: Path, name: str) -> tuple[int, Path | None]:
    found = [(int(file.suffix[1:]), file) for file in folder.glob(f"{name}.*") if file.suffix[1:].isdecimal()]
    return max(found, default=(0, None))


def _is_held(file: Path) -> bool:
    """Return whether the process that wrote a lease may still be at work."""
    try:
        holder = json.loads(file.read_text())
        age = time.time() - file.stat().st_mtime
    except (OSError, ValueError):
        return False
    if not isinstance(holder, dict) or holder.get("free"):
        return False
    began = holder.get("began")
    if holder.get("host") != socket.gethostname() or began is None:  # systems without /proc do not say when it began
        return age < STALE_SECONDS
    # A process id can have been given to another process since; its time of birth tells.
    return _start_of_process(int(holder.get("pid", 0))) == began


def _start_of_process(pid: int) -> str | None:
    """Return when a process of this machine was started; None if there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else f"{boot}:{fields[19]}"
