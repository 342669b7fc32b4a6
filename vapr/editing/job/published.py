"""Pairs that a job has written already, as numbers: none shall be in its parts twice."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vapr.cache import written_whole
from vapr.editing.draft.editor import Draft
from vapr.editing.job.claim import SHARDS
from vapr.editing.job.pair_rows import digest_of
from vapr.errors import UserError, one_line

IDENTITIES = "identities"


class Published:
    """Identities of pairs in the finished units of a job, of turns whose question the source answers in several ways.

    Only two answers to one question about the same images can become the same pair, so most sources have none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, int] = {}  # time of writing of each file that is read already
        self._known: set[int] = set()

    def read(self) -> set[int]:
        """All of them; files of other workers, too, that have come since."""
        found = {}
        for file in (self._folder / IDENTITIES).glob("part-*.npy"):
            finished = self._folder / SHARDS / f"{file.stem.removeprefix('part-')}.json"
            if finished.exists():
                with contextlib.suppress(FileNotFoundError):  # its shard is being made again
                    found[file] = file.stat().st_mtime_ns
        if self._files.items() - found.items():  # what was written is gone, or another now
            self._files, self._known = {}, set()
        for file in found.keys() - self._files.keys():
            try:
                self._known.update(np.load(file, allow_pickle=False).tolist())
            except (OSError, ValueError, EOFError) as error:
                again = self._folder / SHARDS / f"{file.stem.removeprefix('part-')}.json"
                raise UserError(f"{file}: cannot be read ({one_line(error)}); restore it, or delete {again}") from None
        self._files = found
        return self._known


def write_identities(path: Path, drafts: Sequence[Draft]) -> str | None:
    """Write the identities of drafts that are pairs now or by a larger target.

    Returns:
        The file's sha256; None where there are none, and no file.
    """
    identities = [
        draft.turn.identity(draft.rejected)
        for draft in drafts
        if draft.status in ("accepted", "over_target") and draft.rejected is not None and draft.turn.truths
    ]
    if not identities:
        return None
    with written_whole(path) as file:
        np.save(file, np.array(identities, np.int64), allow_pickle=False)
        file.flush()
        return digest_of(Path(file.name))
