"""The processes that train one run together, and how they agree; a single process needs none of it.

``torchrun`` (or ``deepspeed``) starts one process for each GPU and numbers them: the ranks. Numbers and messages go
over gloo, gradients over NCCL where there are GPUs. What one rank finds wrong ends all of them with the same line,
which rank 0 shows; a rank that is killed or hangs is named by the others.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vapr.config import ParallelConfig
from vapr.errors import UserError, one_line
from vapr.interrupts import Stopped, TrainingStopped

Result = TypeVar("Result")
Problem = UserError | Stopped | torch.OutOfMemoryError

MISTAKE, NO_MEMORY = 2, -1
"""Codes by which ranks name a UserError and a GPU out of memory; other codes are exit codes."""

BUCKET_BYTES = 64 * 2**20
"""Tensors that are summed over ranks travel in buckets of about this size."""

BROKEN_COLLECTIVE = re.compile(r"gloo|NCCL|Connection|[Tt]imed out|Broken pipe|[Ss]ocket")
"""Words in the errors of broken collectives; PyTorch has no class of its own for those of gloo."""

SECONDS_TO_END = 2.0
"""A killed process's connections close before it has ended; so long it is waited for, to be named."""

FAILURE = "failure"
"""Key in the store of what ended a rank: exit code, a space, and the line for the user."""

ENDED = "ended"
"""Key in the store that says that rank 0 has nothing left to do but to show that line."""

GRACE = timedelta(seconds=20)
"""Longest that a rank which failed waits for rank 0 to notice."""


class Ranks:
    """One process of a run, and its ways to talk to the others.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes.
        agreed: whether all ranks end now, for the same reason.
        lost: whether a rank did not answer, so that nothing more can be said to the others.
        shows: whether this rank shows why all end: the first one, or the next where the first is lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self.agreed = self.lost = False
        self.shows = self.is_first
        self._store = store
        self._calls = 0

    @property
    def is_first(self) -> bool:
        """Tell whether this is rank 0, which writes the run's files and prints."""
        return self.rank == 0

    def agree(self, work: Callable[[], Result]) -> Result:
        """Do work on every rank, and end all of them if it fails on one; the ranks do not talk inside.

        Raises:
            UserError, Stopped, torch.OutOfMemoryError: what the work raised, on every rank; of several the first's.
        """
        if self.size == 1:
            return work()
        problem: Problem | None = None
        result: Any = None
        try:
            result = work()
        except (UserError, Stopped, torch.OutOfMemoryError) as error:
            problem = error
        if self.gather([float(problem is not None)]).any():
            raise self._first_problem(problem) from None
        return result

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """Do work on rank 0, and then on the others, which find what it has made."""
        if self.size == 1:
            return work()
        result = self.agree(lambda: work() if self.is_first else None)
        others: Any = self.agree(lambda: None if self.is_first else work())
        return result if self.is_first else others  # type: ignore[return-value]

    def gather(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the numbers of every rank, (ranks, values) float64; each gives as many."""
        mine = np.asarray(values, np.float64)
        if self.size == 1:
            return mine[None]
        everyone = torch.empty(self.size * len(mine), dtype=torch.float64)
        self._collective(lambda: dist.all_gather_into_tensor(everyone, torch.from_numpy(mine)))
        return everyone.view(self.size, -1).numpy()

    def wait(self) -> None:
        """Wait until every rank has come to this call."""
        self.gather([0.0])

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks, one rank's after another's; each has (any number, columns) of them."""
        if self.size == 1:
            return rows
        counts = self.gather([len(rows)])[:, 0].astype(int)
        padded = np.zeros((counts.max(), rows.shape[1]))
        padded[: len(rows)] = rows
        everyone = self.gather(padded.reshape(-1)).reshape(self.size, *padded.shape)
        return np.concatenate([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def gather_objects(self, value: Result) -> list[Result]:
        """Return the plain data of every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._collective(lambda: dist.all_gather_object(values, value))
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of which each rank has the same, by their sums over the ranks."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._collective(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of which each rank has the same, by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                self._collective(lambda tensor=tensor: dist.broadcast(tensor, 0))  # type: ignore[misc]

    def _collective(self, collective: Callable[[], Any]) -> None:
        """Run a collective; if a rank does not answer, raise what ended it."""
        self._calls += 1
        try:
            self._store.set(f"calls/{self.rank}", str(self._calls))
            collective()
        except RuntimeError as error:
            self.lost = True
            raise self._cause_of(error) from None

    def _cause_of(self, error: Exception) -> UserError | Stopped:
        """Return the line that another rank left before it ended, or name the ranks that did not come."""
        try:
            if self._store.check([FAILURE]):
                code, _, line = self._store.get(FAILURE).decode().partition(" ")
                return UserError(line) if int(code) == MISTAKE else TrainingStopped(line, int(code))
            processes = [self._store.get(f"is/{rank}").decode() for rank in range(self.size)]
            behind = [rank for rank in range(self.size) if self._calls_of(rank) < self._calls]
            # One that is only slower than this one is behind as well, and one that was killed need not be.
            gone = _wait_for_gone(processes, 0.0 if behind else SECONDS_TO_END)
            absent = gone or behind
            self.shows = self.rank == min(set(range(self.size)) - set(absent))
            names = " and ".join(f"rank {rank} ({processes[rank]})" for rank in absent)
        except RuntimeError:  # the store was rank 0's, or the launcher's
            names = "rank 0, which holds the processes together,"
            self.shows = self.rank == 1
        if not names:
            return TrainingStopped(f"the ranks lost each other ({one_line(error)}); continue with --resume")
        return TrainingStopped(f"{names} was killed, or hangs; continue with --resume")

    def _calls_of(self, rank: int) -> int:
        key = f"calls/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _first_problem(self, problem: Problem | None) -> Problem:
        """Return the first rank's problem; where it is not rank 0's and not everybody's, the number is in front."""
        problems = self.gather_objects(None if problem is None else (_code_of(problem), str(problem)))
        self.agreed = True
        rank, (code, line) = next((rank, found) for rank, found in enumerate(problems) if found is not None)
        if rank > 0 and any(found != (code, line) for found in problems):
            line = f"rank {rank}: {line}"
        if code == NO_MEMORY:
            return torch.OutOfMemoryError(line)
        return UserError(line) if code == MISTAKE else TrainingStopped(line, code)

    def raise_first_of(self, problem: Problem | None) -> None:
        """End all ranks, which have agreed that one has failed, with the first rank's problem; None: not this one."""
        raise self._first_problem(problem) from None

    @contextlib.contextmanager
    def naming_lost_rank(self) -> Iterator[None]:
        """Let a library talk to the other ranks; if one does not answer it, raise an error that names that rank."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not BROKEN_COLLECTIVE.search(str(error)):
                raise
            self.wait()  # a rank that does not come to this is named
            raise TrainingStopped(f"the ranks lost each other ({one_line(error)}); continue with --resume") from None

    def tell(self, code: int, line: str) -> None:
        """Leave a line for the ranks that will wait for this one in vain."""
        with contextlib.suppress(RuntimeError):
            if not self._store.check([FAILURE]):
                self._store.set(FAILURE, f"{code} {line}")

    def let_first_end(self) -> None:
        """On rank 0 say that it ends; on the others wait for that, because launchers kill all once one has failed."""
        with contextlib.suppress(RuntimeError):
            if self.is_first:
                self._store.set(ENDED, "")
            elif not self.shows:
                self._store.wait([ENDED], GRACE)


def _this_process() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


def _wait_for_gone(processes: Sequence[str], seconds: float) -> list[int]:
    """Return which processes, as :func:`_this_process` names them, have ended on this machine, or are stopped."""
    end = time.monotonic() + seconds
    while not (gone := [number for number, process in enumerate(processes) if _is_gone(process)]):
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return gone


def _is_gone(process: str) -> bool:
    _, pid, host = process.replace(" of ", " ").split(" ", 2)
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZXTt"


def _code_of(problem: Problem) -> int:
    if isinstance(problem, Stopped):
        return problem.exit_code
    return MISTAKE if isinstance(problem, UserError) else NO_MEMORY


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def open_ranks(parallel: ParallelConfig) -> Iterator[Ranks]:
    """Join the processes that were started together; without a launcher this is the only one.

    Ranks other than 0 are silent inside, and end with an exit code alone, unless rank 0 is the one that was lost.

    Raises:
        UserError: if the launcher's settings make no sense here.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1 and parallel.engine != "deepspeed":
        yield Ranks()
        return
    ranks = _join(size, timedelta(seconds=parallel.timeout))
    failed = False
    with contextlib.ExitStack() as stack:
        if not ranks.is_first:
            nothing = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        try:
            ranks.agree(_take_device)
            yield ranks
            ranks.wait()  # nobody leaves while another still has something to say
        except (UserError, Stopped) as error:
            failed = True
            code = _code_of(error)
            ranks.tell(code, str(error) if ranks.is_first else f"rank {ranks.rank}: {error}")
            if ranks.shows:
                raise
            raise SystemExit(code) from None
        except BaseException as error:
            failed = isinstance(error, Exception)  # a second Ctrl-C waits for nobody
            ranks.tell(1, f"rank {ranks.rank} failed ({type(error).__name__}: {one_line(error)})")
            raise
        finally:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
            if failed or ranks.is_first:
                ranks.let_first_end()


def _join(size: int, timeout: timedelta) -> Ranks:
    if size == 1:  # one process may use an engine for several
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {**here, "MASTER_PORT": str(free.getsockname()[1])}
    rank = _number("RANK", None)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(f"WORLD_SIZE is {size}, but {missing[0]} is not set; start with torchrun or deepspeed")
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}; start with torchrun or deepspeed")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore("vapr", store)
        store.set(f"is/{rank}", _this_process())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {size} processes did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({one_line(error)}); start all of them within parallel.timeout"
        ) from None
    return Ranks(rank, size, store)


def _take_device() -> None:
    """Make the GPU of this process's number the current one."""
    if not torch.cuda.is_available():
        return
    local, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= found:
        raise UserError(f"more processes were started on {socket.gethostname()} than its {found} GPU(s); start {found}")
    torch.cuda.set_device(local)


def _number(name: str, default: int | None) -> int:
    """Read a number that a launcher sets in the environment."""
    text = os.environ.get(name, default)
    if text is None:
        raise UserError(f"WORLD_SIZE is set, but {name} is not; start with torchrun or deepspeed")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is '{text}' in the environment, which is no number") from None
