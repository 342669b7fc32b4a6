"""What a source holds: read once at the start of a job, into a few small files of its folder."""

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.cache import written_whole
from vapr.editing.config import EditConfig
from vapr.editing.rules.turns import BadImage, InstructionData, Turn, answer_hash, to_edit
from vapr.errors import BadRow, UserError, one_line
from vapr.progress import Display

SCAN, TURNS, TRUTHS = "scan.json", "turns.npy", "truths.npy"
SHOWN_BAD_ROWS = 1_000
READ_AGAIN = "delete {} to have the source read again"


@dataclass
class Scan:
    """What scan.json holds."""

    rows: int
    turns: int
    eligible: int
    filtered: dict[str, int]
    bad_rows: int
    first_bad_rows: list[str]
    unused_columns: dict[str, int]
    bad_images: int = 0  # of the bad rows, those whose images cannot be read
    first_bad_image: str | None = None


def write_scan(folder: Path, data: InstructionData, config: EditConfig) -> None:
    """Read the source once; write turns.npy, truths.npy and, last, scan.json.

    Raises:
        UserError: if there is nothing to edit in it.
    """
    for half in (half for name in (TURNS, TRUTHS, SCAN) for half in folder.glob(f"{name}.*")):
        half.unlink(missing_ok=True)  # of a scan that was killed
    left_out: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    bad_rows: list[str] = []
    bad_images, first_bad_image = 0, None
    # The only things that grow with the source: 24 bytes a turn that is edited, 16 bytes any turn.
    places, digests = array("q"), array("q")
    asked, answered = array("q"), array("q")
    num_turns = num_bad = 0
    with Display("read source", len(data), unit="row") as display:
        for row in range(len(data)):
            if (row + 1) % 1000 == 0:
                display.advance("", 1000)
            try:
                turns = data.turns(row)
            except BadRow as error:
                num_bad += 1
                if isinstance(error, BadImage):
                    bad_images += 1
                    first_bad_image = first_bad_image or str(error)
                if len(bad_rows) < SHOWN_BAD_ROWS:
                    bad_rows.append(str(error))
                continue
            unused.update(data.extra_keys(row))
            num_turns += len(turns)
            for turn, reason in to_edit(turns, config):
                digest, question = turn.digests()
                asked.append(question)  # of those left alone, too: what they say is true all the same
                answered.append(answer_hash(turn.answer))
                if reason is not None:
                    left_out[reason] += 1
                    continue
                places.extend((row, turn.number))
                digests.append(int(digest[:15], 16))
    if not digests:
        images = unreadable_images(len(data), bad_images, first_bad_image)
        if num_bad == len(data):
            why = f"{bad_rows[0]} (none of the {num_bad:,} rows can be read)"
            raise UserError(f"{data.path}: {images}" if bad_images == num_bad else why)
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in left_out.most_common())
        where = f"{images}; no answer to edit in the others" if images else "no answer to edit in it"
        raise UserError(f"{data.path}: {where}: {reasons}; see filters")
    _, first = np.unique(np.frombuffer(digests, np.int64), return_index=True)
    if len(first) < len(digests):
        left_out["duplicate of an earlier answer"] = len(digests) - len(first)
    turns_to_edit = np.frombuffer(places, np.int64).reshape(-1, 2)[np.sort(first)]
    with written_whole(folder / TURNS) as file:
        np.save(file, turns_to_edit, allow_pickle=False)
    with written_whole(folder / TRUTHS) as file:
        truths = _several(np.frombuffer(asked, np.int64), np.frombuffer(answered, np.int64))
        np.save(file, truths, allow_pickle=False)
    counts = {
        "rows": len(data), "turns": num_turns, "eligible": len(turns_to_edit), "filtered": dict(left_out.most_common()),
        "bad_rows": num_bad, "first_bad_rows": bad_rows, "unused_columns": dict(sorted(unused.items())),
        "bad_images": bad_images, "first_bad_image": first_bad_image,
    }  # fmt: skip
    with written_whole(folder / SCAN) as file:
        file.write(json.dumps(counts, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")


def unreadable_images(rows: int, bad_images: int, first: str | None) -> str | None:
    """How many rows have images that cannot be read, the first of them and why, and the way out; None if all can."""
    if not bad_images:
        return None
    return (
        f"the images of {bad_images:,} of {rows:,} rows cannot be read; the first: {first}; --image-root names the "
        "folder that image paths start at"
    )


def unreadable(scan: Mapping[str, Any]) -> list[str]:
    """What a user has to know of a source before anything is done with it, in lines."""
    problem = unreadable_images(scan["rows"], scan["bad_images"], scan["first_bad_image"])
    lines = [problem] if problem else []
    if others := scan["bad_rows"] - scan["bad_images"]:
        lines.append(f"{others:,} of {scan['rows']:,} rows cannot be read; scan.json says why, row by row")
    return lines


def _several(asked: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Questions that have several answers, sorted, and below them each answer; nearly all have one and are left out."""
    _, which, counts = np.unique(asked, return_inverse=True, return_counts=True)
    repeated = counts[which] > 1
    both = np.unique(np.column_stack((asked[repeated], answered[repeated])), axis=0)
    _, which, counts = np.unique(both[:, 0], return_inverse=True, return_counts=True)
    return np.ascontiguousarray(both[counts[which] > 1].T)


def read_array(file: Path, shape: tuple[int | None, int | None]) -> np.ndarray:
    """An array of :func:`write_scan`, memory-mapped.

    Args:
        file: that holds it.
        shape: that it must have; None: any length.

    Raises:
        UserError: if it is damaged.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        sizes = zip(array.shape, shape, strict=False)
        if array.ndim == 2 and array.dtype == np.int64 and all(wanted in (None, size) for size, wanted in sizes):
            return array
        found = f"{array.dtype} of shape {array.shape}"
    except (OSError, ValueError, EOFError) as error:
        found = one_line(error)
    way_out = READ_AGAIN.format(file.with_name(SCAN))
    raise UserError(f"{file}: cannot be read ({found}); restore it, or {way_out}")


class Truths:
    """Answers that other rows of the source give to a turn's question about the same images, by their hashes."""

    def __init__(self, folder: Path) -> None:
        self._asked, self._answered = read_array(folder / TRUTHS, (2, None))

    def of(self, turn: Turn) -> frozenset[int]:
        """Of all rows that ask so, the turn's own included; empty where all say the same."""
        question = turn.digests()[1]
        start, end = (np.searchsorted(self._asked, question, side) for side in ("left", "right"))
        return frozenset(self._answered[start:end].tolist())
