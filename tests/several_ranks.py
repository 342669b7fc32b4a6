"""Several processes that train together, as torchrun starts them, and what became of each."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# A server that has imported everything and run nothing: what ran a backward pass cannot be forked any more.
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.several_ranks", "vapr.training.trainer", "vapr.training.fill_caches"]
SERVER.set_forkserver_preload(PRELOADED)
SECONDS = 240.0


@dataclass
class Rank:
    """One process of several, running or ended."""

    process: BaseProcess
    folder: Path

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


def start(
    size: int, folder: Path, work: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
) -> list[Rank]:
    """Start ``work(*arguments)``, a function of a module, as ranks 0 to ``size``; their output goes to ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        own = folder / f"rank{rank}"
        own.mkdir(parents=True, exist_ok=True)
        here = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **here, **(env or {})}
        process = SERVER.Process(target=_run, args=(environment, own, work, arguments))
        process.start()
        ranks.append(Rank(process, own))
    return ranks


def end(ranks: list[Rank]) -> list[Rank]:
    """Wait for the processes; those that are left after the time are killed, and their exit code is -9."""
    for rank in ranks:
        rank.process.join(SECONDS)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
    return ranks


def run(
    size: int, folder: Path, work: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
) -> list[Rank]:
    """Start the ranks and wait for them."""
    return end(start(size, folder, work, *arguments, env=env))


def _run(environment: dict[str, str], folder: Path, work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Run the work where multiprocessing prints a traceback, and makes an exit code of how it ends."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr = ((folder / name).open("w", buffering=1) for name in ("out", "err"))
    work(*arguments)


def vapr(*arguments: object) -> None:
    """Run the command line."""
    from vapr.cli import main

    main([str(argument) for argument in arguments])


def config_file(config: Any, path: Path) -> Path:
    """Write a config as the YAML file that a command takes."""
    import yaml

    path.write_text(yaml.safe_dump(config.as_dict()))
    return path
