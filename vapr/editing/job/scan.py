"""Reads a source once, at the start of a job: which turns are to edit, what is left out, and what cannot be read."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.cache import written_whole
from vapr.editing.config import EditConfig
from vapr.editing.job.json_files import write_json
from vapr.editing.rules.turns import BOXES, BadImage, InstructionData, Turn, answer_hash, to_edit
from vapr.errors import BadRow, UserError, one_line
from vapr.progress import Display

SCAN, TURNS, TRUTHS = "scan.json", "turns.npy", "truths.npy"
MAX_SHOWN_BAD_ROWS = 1_000
READ_AGAIN = "delete {} to have the source read again"
DUPLICATE = "duplicate of an earlier answer"


@dataclass
class Scan:
    """The content of scan.json."""

    rows: int
    turns: int
    eligible: int
    filtered: dict[str, int]
    bad_rows: int
    first_bad_rows: list[str]
    unused_columns: dict[str, int]
    bad_images: int = 0  # of the bad rows, those whose images cannot be read
    first_bad_image: str | None = None


class RowReader:
    """Reads the turns of rows, and counts the rows that cannot be read.

    Attributes:
        bad_rows: how many rows could not be read.
        first_bad_rows: the place and the fault of the first of them.
        bad_images: how many of them have images that cannot be read.
        first_bad_image, first_other: the place and the fault of the first of these, and of the first other one.
    """

    def __init__(self, data: InstructionData, config: EditConfig) -> None:
        self._data, self._config = data, config
        self.bad_rows = self.bad_images = 0
        self.first_bad_rows: list[str] = []
        self.first_bad_image: str | None = None
        self.first_other: str | None = None

    def read(self, row: int) -> list[tuple[Turn, str | None]]:
        """Return the turns of a row, each with the reason why it is not edited (None: it is); none of a bad row."""
        try:
            return list(to_edit(self._data.turns(row), self._config))
        except BadRow as error:
            self.bad_rows += 1
            if isinstance(error, BadImage):
                self.bad_images += 1
                self.first_bad_image = self.first_bad_image or str(error)
            else:
                self.first_other = self.first_other or str(error)
            if len(self.first_bad_rows) < MAX_SHOWN_BAD_ROWS:
                self.first_bad_rows.append(str(error))
            return []


def write_scan(folder: Path, data: InstructionData, config: EditConfig) -> None:
    """Read the source once; write turns.npy, truths.npy and, last, scan.json.

    Raises:
        UserError: if there is nothing to edit in it.
    """
    for half in (half for name in (TURNS, TRUTHS, SCAN) for half in folder.glob(f"{name}.*")):
        half.unlink(missing_ok=True)  # of a scan that was killed
    reader = RowReader(data, config)
    filtered: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    # The only things that grow with the source: 24 bytes a turn that is edited, 16 bytes any turn.
    places, digests = array("q"), array("q")
    questions, answers = array("q"), array("q")
    with Display("read source", len(data), unit="row") as display:
        for row in range(len(data)):
            if (row + 1) % 1000 == 0:
                display.advance("", 1000)
            turns = reader.read(row)
            if turns:
                unused.update(key for key in data.extra_keys(row) if key != BOXES or config.picture is None)
            for turn, reason in turns:
                digest, question = turn.digests()
                questions.append(question)  # of those left alone, too: what they say is true all the same
                answers.append(answer_hash(turn.answer))
                if reason is not None:
                    filtered[reason] += 1
                    continue
                places.extend((row, turn.number))
                digests.append(int(digest[:15], 16))
    if not digests:
        raise UserError(_nothing_to_edit(data.path, reader, len(data), filtered))
    _, first = np.unique(np.frombuffer(digests, np.int64), return_index=True)
    if len(first) < len(digests):
        filtered[DUPLICATE] = len(digests) - len(first)
    turns_to_edit = np.frombuffer(places, np.int64).reshape(-1, 2)[np.sort(first)]
    _save(folder / TURNS, turns_to_edit)
    _save(folder / TRUTHS, _asked_twice(np.frombuffer(questions, np.int64), np.frombuffer(answers, np.int64)))
    scan = Scan(
        len(data), len(questions), len(turns_to_edit), dict(filtered.most_common()), reader.bad_rows,
        reader.first_bad_rows, dict(sorted(unused.items())), reader.bad_images, reader.first_bad_image,
    )  # fmt: skip
    write_json(folder / SCAN, asdict(scan))


def _save(file: Path, numbers: np.ndarray) -> None:
    with written_whole(file) as stream:
        np.save(stream, numbers, allow_pickle=False)


def _nothing_to_edit(path: str | Path, reader: RowReader, rows: int, filtered: Counter[str]) -> str:
    images = unreadable_images(rows, reader.bad_images, reader.first_bad_image)
    if reader.bad_images == rows and images:
        return f"{path}: {images}"
    if reader.bad_rows == rows:
        return f"{reader.first_bad_rows[0]} (none of the {rows:,} rows can be read)"
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in filtered.most_common())
    where = f"{images}; no answer to edit in the others" if images else "no answer to edit in it"
    return f"{path}: {where}: {reasons}; see filters"


def unreadable_images(rows: int, bad_images: int, first: str | None) -> str | None:
    """Say how many rows have images that cannot be read, the first one's fault and the way out; None if all can."""
    if not bad_images:
        return None
    return (
        f"the images of {bad_images:,} of {rows:,} rows cannot be read; the first: {first}; --image-root names the "
        "folder that image paths start at"
    )


def unreadable_rows(scan: Mapping[str, Any]) -> list[str]:
    """Return the lines that a user has to read about a source before anything is done with it."""
    problem = unreadable_images(scan["rows"], scan["bad_images"], scan["first_bad_image"])
    lines = [problem] if problem else []
    if others := scan["bad_rows"] - scan["bad_images"]:
        lines.append(f"{others:,} of {scan['rows']:,} rows cannot be read; scan.json says why, row by row")
    return lines


def _asked_twice(questions: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return the questions that have several answers, sorted, and below them each answer.

    Args:
        questions: a hash of question and images, of every turn; int64, one dimension.
        answers: a hash of the answer of the same turns.

    Returns:
        int64 of two rows, questions and answers; nearly all questions have one answer and are left out.
    """
    _, which, counts = np.unique(questions, return_inverse=True, return_counts=True)
    repeated = counts[which] > 1
    both = np.unique(np.column_stack((questions[repeated], answers[repeated])), axis=0)
    _, which, counts = np.unique(both[:, 0], return_inverse=True, return_counts=True)
    return np.ascontiguousarray(both[counts[which] > 1].T)


def read_array(file: Path, shape: tuple[int | None, int | None]) -> np.ndarray:
    """Open an array of :func:`write_scan`, memory-mapped.

    Args:
        file: the file of the array.
        shape: the shape that it must have; None stands for any length.

    Returns:
        int64 of that shape.

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
    """The answers that all rows of a source give to a turn's question about the same images, as hashes."""

    def __init__(self, folder: Path) -> None:
        self._questions, self._answers = read_array(folder / TRUTHS, (2, None))

    def of(self, turn: Turn) -> frozenset[int]:
        """Return the answers to a turn's question, the turn's own included; none where all rows say the same."""
        question = turn.digests()[1]
        start, end = (np.searchsorted(self._questions, question, side) for side in ("left", "right"))
        return frozenset(self._answers[start:end].tolist())
