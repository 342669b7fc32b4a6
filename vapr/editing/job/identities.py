"""Identities of the pairs that a job has written already, as numbers: none shall be in its parts twice.

Only two answers to one question about the same images can become the same pair, so most sources have none.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vapr.cache import written_whole
from vapr.editing.draft.draft import Draft
from vapr.editing.job.claim import SHARDS
from vapr.editing.job.pair_rows import digest_of
from vapr.errors import UserError, one_line

IDENTITIES = "identities"


class Identities:
    """The identities in the finished units of a job, those of other workers included."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[tuple[Path, int], set[int]] = {}  # by file and its time of writing

    def read(self) -> set[int]:
        """Return all identities.

        Raises:
            UserError: if a file is damaged.
        """
        read = {}
        for file in (self._folder / IDENTITIES).glob("part-*.npy"):
            manifest = self._folder / SHARDS / f"{file.stem.removeprefix('part-')}.json"
            if manifest.exists():
                with contextlib.suppress(FileNotFoundError):  # its shard is being made again
                    key = file, file.stat().st_mtime_ns
                    read[key] = self._read[key] if key in self._read else _load(file, manifest)
        self._read = read
        return set().union(*read.values())


def _load(file: Path, manifest: Path) -> set[int]:
    try:
        return set(np.load(file, allow_pickle=False).tolist())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); restore it, or delete {manifest}") from None


def write_identities(path: Path, drafts: Sequence[Draft]) -> str | None:
    """Write the identities of drafts that are pairs, or will be by a larger target.

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
