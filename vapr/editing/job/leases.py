"""Leases: files by which workers that share a folder, on one machine or many, take a shard each. No coordinator.

The n-th time a shard is taken, ``NAME.n`` is made, which only one process can do; the highest number holds the lease.
"""

import contextlib
import json
import os
import socket
import threading
import time
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
    """Take a lease; None if a living process holds it.

    Args:
        folder: of the leases; made if need be.
        name: of the thing, without a point in it.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, holder = _newest(folder, name)
        if holder is not None and _living(holder):
            return None
        file = folder / f"{name}.{number + 1}"
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())})
        temporary = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        temporary.write_text(text)
        try:
            os.link(temporary, file)  # whole or not at all, and only one process can
        except FileExistsError:
            return None
        finally:
            temporary.unlink(missing_ok=True)
        return Lease(file, number + 1)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def anyone(folder: Path, prefix: str) -> bool:
    """Whether a living process holds a lease whose name begins so."""
    return any(_living(file) for file in folder.glob(f"{prefix}*"))


def _newest(folder: Path, name: str) -> tuple[int, Path | None]:
    found = [(int(file.suffix[1:]), file) for file in folder.glob(f"{name}.*") if file.suffix[1:].isdecimal()]
    return max(found, default=(0, None))


def _living(file: Path) -> bool:
    """Whether the process that wrote the lease may still be at work."""
    try:
        holder = json.loads(file.read_text())
        age = time.time() - file.stat().st_mtime
    except (OSError, ValueError):
        return False
    if not isinstance(holder, dict) or holder.get("free"):
        return False
    if holder.get("host") != socket.gethostname() or holder.get("began") is None:  # systems without /proc say nothing
        return age < STALE_SECONDS
    # A process id can have been given to another process since; its time of birth tells.
    began = _began(int(holder.get("pid", 0)))
    return began is not None and began == holder.get("began")


def _began(pid: int) -> str | None:
    """When a process of this machine was started; None if there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else f"{boot}:{fields[19]}"
