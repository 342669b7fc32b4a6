"""A result folder: answers appended as they come, and the finished file, which appears whole."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from vapr.errors import UserError
from vapr.evaluation.scoring.prediction import Prediction, Question, read_predictions, write_predictions

Key = tuple[str, str]
"""Name of a benchmark, id of a question."""


class FolderLock:
    """Makes a folder that one process at a time may write to; the lock goes with the process.

    Args:
        folder: of results.
        option: the option or key that names it, for messages.

    Raises:
        UserError: if it cannot be written, or another process writes to it.
    """

    def __init__(self, folder: Path, option: str = "--out") -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"{option}: {folder} cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{option}: {folder} is in use by another vapr process; wait for it") from None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Journal:
    """Answers of one model in ``NAME.jsonl``, and those on their way there in ``NAME.partial.jsonl``.

    Args:
        folder: the result folder.
        name: ``predictions``, or ``predictions.blind``.

    Attributes:
        answered: what is in the two files.
        dropped: half-written lines that were dropped: what a killed process was writing.

    Raises:
        UserError: if one of the files is damaged.
    """

    def __init__(self, folder: Path, name: str = "predictions") -> None:
        self.file = folder / f"{name}.jsonl"
        self.partial = folder / f"{name}.partial.jsonl"
        self.dropped = 0
        finished = read_predictions(self.file) if self.file.is_file() else []
        self.answered: dict[Key, Prediction] = {_key(one): one for one in finished}
        self._finished = list(self.answered)
        self._stream: IO[bytes] | None = None
        if self.partial.is_file():
            self._drop_half_a_line()
            self.answered |= {_key(one): one for one in read_predictions(self.partial)}

    def _drop_half_a_line(self) -> None:
        content = self.partial.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.dropped = 1
            with self.partial.open("r+b") as file:
                file.truncate(whole)

    def forget(self, keys: Iterable[Key]) -> int:
        """Drop answers of a batch that is not complete, to be given again. Returns how many there were."""
        gone = [key for key in keys if self.answered.pop(key, None) is not None]
        if gone:
            finished = set(self._finished)
            kept = [one for key, one in self.answered.items() if key not in finished]
            write_predictions(self.partial, kept)
        return len(gone)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Append answers; they are on the disk when this returns.

        Raises:
            UserError: if they cannot be written.
        """
        text = "".join(f"{one.as_json()}\n" for one in predictions).encode(errors="backslashreplace")
        try:
            if self._stream is None:
                self._stream = self.partial.open("ab")
            self._stream.write(text)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror}); answers so far are kept") from None
        self.answered |= {_key(one): one for one in predictions}

    def finish(self, questions: Sequence[Question]) -> list[Prediction]:
        """Write the finished file: what it held before, then the answers in the order of the questions.

        Returns:
            The answers to the questions.
        """
        asked = [(question.benchmark, question.id) for question in questions]
        order = dict.fromkeys([*self._finished, *asked])
        if list(order) != self._finished or self.partial.is_file():
            write_predictions(self.file, [self.answered[key] for key in order])
        self.close()
        self.partial.unlink(missing_ok=True)
        self._finished = list(order)
        return [self.answered[key] for key in asked]

    def close(self) -> None:
        """Close the file of answers on their way."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _key(prediction: Prediction) -> Key:
    return prediction.benchmark, prediction.id


def questions_hash(questions: Sequence[Question]) -> str:
    """Return a hash of all that questions hold; of a picture's file count its name and its size."""
    digest = hashlib.sha256()
    for one in questions:
        images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else _name_and_size(i) for i in one.images]
        row = [one.benchmark, one.id, one.question, one.answer, dict(one.meta), images]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode(errors="backslashreplace") + b"\n")
    return digest.hexdigest()


def _name_and_size(file: Path) -> tuple[str, int]:
    return file.name, file.stat().st_size if file.is_file() else -1
