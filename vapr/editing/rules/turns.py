"""Rows of instruction data, as turns: an answer to edit, its question and everything before it."""

import hashlib
import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.data.pair import (
    Message,
    check_roles,
    image_source,
    messages_from,
    place_images,
    row_id,
    whole_text,
)  # fmt: skip
from vapr.data.pairs import NOTES
from vapr.data.row_values import image_list, images_of, map_columns, says_something, with_image_parts, without_nulls
from vapr.data.sources import check_columns, open_files
from vapr.data.text_rows import Rows
from vapr.editing.config import EditConfig, FilterConfig, SourceConfig
from vapr.errors import BadRow, UserError
from vapr.text import num_words


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of a row."""

    row: int  # number in the source
    number: int  # among the row's answers, from 0
    where: str  # "data.json:17", for messages
    source_id: str
    source: str
    licence: str | None
    images: tuple[Path | bytes, ...]  # those that the prompt shows
    image_names: tuple[str | bytes, ...]  # the same; a file's path as seen from the source, wherever that lies
    prompt: tuple[Message, ...]  # up to and including the question
    question: str
    answer: str
    truths: frozenset[int] = frozenset()  # hashes of the source's answers to this question, if it gives several
    boxes: Any = field(default=None, compare=False)  # as the row has them

    def digest(self) -> str:
        """sha256 of images, prompt and answer: what makes two turns duplicates. A file counts by its name."""
        return self.digests()[0]

    def digests(self) -> tuple[str, int]:
        """The digest, and a number that stands for images and question alone."""
        content = self._shown()
        asked = content.copy()
        asked.update(self.question.encode(errors="surrogatepass"))
        content.update(repr((self.prompt, self.answer)).encode(errors="surrogatepass"))
        return content.hexdigest(), int(asked.hexdigest()[:15], 16)

    def identity(self, rejected: str) -> int:
        """A number that stands for images, prompt and rejected answer: two pairs of the same number say the same."""
        content = self._shown()
        content.update(repr((self.prompt, rejected)).encode(errors="surrogatepass"))
        return int(content.hexdigest()[:15], 16)

    def _shown(self) -> "hashlib._Hash":
        content = hashlib.sha256()
        for name in self.image_names:
            content.update(name if isinstance(name, bytes) else f"{name}\0".encode(errors="surrogateescape"))
        return content


def bare(answer: str) -> str:
    """An answer without what does not make it another one: case, spacing and the point at its end."""
    return " ".join(answer.casefold().split()).rstrip(".")


def answer_hash(answer: str) -> int:
    """A number that stands for the bare answer."""
    return int(hashlib.sha256(bare(answer).encode(errors="surrogatepass")).hexdigest()[:15], 16)


class BadImage(BadRow):
    """A row one of whose images cannot be had: all of them, often, where the folder of the images is another."""


class InstructionData:
    """Rows of instruction data by number: LLaVA's ``conversations``, ``messages``, vapr rows, or mapped columns.

    Args:
        path: file, folder, glob or hub id, as ``vapr train`` reads them.
        source: how to read it.

    Raises:
        UserError: if nothing can be read there, or a mapped column is not there.
    """

    def __init__(self, path: str, source: SourceConfig) -> None:
        if source.image_root is not None and not Path(source.image_root).is_dir():
            raise UserError(f"source.image_root: {source.image_root}: no such folder")
        self.path = path
        self._config = source
        self._parts: list[tuple[Rows, Path]] = []
        for rows, folder, _, _ in open_files(path, source.split, source.subset, None):
            self._parts.append((rows, folder))
        if source.columns and any(len(rows) for rows, _ in self._parts):
            check_columns([rows for rows, _ in self._parts if len(rows)], source.columns, "source")
        self._starts = [0, *itertools.accumulate(len(rows) for rows, _ in self._parts)]
        if not len(self):
            raise UserError(f"{path}: no rows in it")
        root = source.image_root or os.path.commonpath([folder for _, folder in self._parts])
        self._roots = (f"{Path(root)}/", f"{Path(root).absolute()}/")
        self.digest = hashlib.sha256(repr([rows.digest for rows, _ in self._parts]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, number: int) -> tuple[Rows, Path, int]:
        part = bisect_right(self._starts, number) - 1
        return *self._parts[part], number - self._starts[part]

    def where(self, number: int) -> str:
        """The row's place, as ``data.json:17``."""
        rows, _, row = self._find(number)
        return rows.where(row)

    def extra_keys(self, number: int) -> list[str]:
        """Keys of a row that no turn takes anything from. Raises BadRow if the row cannot be decoded."""
        rows, _, row = self._find(number)
        columns = self._config.columns or {}
        used = {*KEYS_READ, *NOTES, *(place for column in columns.values() for place in (column, column.split(".")[0]))}
        return [key for key, value in rows[row].items() if key not in used and says_something(value)]

    def turns(self, number: int) -> list[Turn]:
        """Every answer of a row.

        Raises:
            BadRow: starting with the row's place.
        """
        rows, folder, row = self._find(number)
        where = rows.where(row)
        try:
            root, confined = folder, False
            if self._config.image_root is not None:
                root, confined = Path(self._config.image_root), True
            return list(self._read(rows[row], number, where, root, confined))
        except BadRow as error:
            raise type(error)(f"{where}: {error}") from None

    def _read(self, row: Any, number: int, where: str, root: Path, confined: bool) -> Iterator[Turn]:
        if columns := self._config.columns:
            row = map_columns(row, columns)
            if columns.keys() & set(QUESTIONS):  # which are meant, whatever else the row holds
                row = {key: value for key, value in row.items() if key in columns or key not in CONVERSATIONS}
        if not isinstance(row, dict):
            raise BadRow(f"a row must be an object, got {row!r:.60}")
        row = without_nulls(row)
        named = image_list(images_of(row))
        images = tuple(_image(image, root, confined) for image in named)
        messages = conversation(row, self._config.format)
        check_roles([*messages, *([] if messages[-1]["role"] == "user" else [{"role": "user"}])])
        parts = sum(part["type"] == "image" for message in messages for part in message["content"])
        if parts == 0:
            messages = place_images(messages, len(images))
        elif parts != len(images):
            raise BadRow(f"the conversation places {parts} image(s) but the row has {len(images)}")
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadRow("no answer in this row; there is nothing to edit")
        source_id = row_id(row, where)[:200] if "id" in row else f"row-{number + 1}"
        source, licence = self._source(row, named, where), self._licence(row)
        for count, place in enumerate(answers):
            prompt = messages[:place]
            shown = sum(part["type"] == "image" for message in prompt for part in message["content"])
            if any(part["type"] == "image" for part in messages[place]["content"]):
                raise BadRow("an answer holds an image part")
            yield Turn(
                row=number,
                number=count,
                where=where,
                source_id=source_id,
                source=source,
                licence=licence,
                images=images[:shown],
                image_names=tuple(map(self._name, images[:shown])),
                prompt=tuple(prompt),
                question=_text(prompt[-1]).strip(),
                answer=_text(messages[place]),
                boxes=row.get(BOXES),
            )

    def _name(self, image: Path | bytes) -> str | bytes:
        return (
            image if isinstance(image, bytes) else str(image).removeprefix(self._roots[0]).removeprefix(self._roots[1])
        )

    def _source(self, row: Mapping[str, Any], images: list[Any], where: str) -> str:
        if self._config.name is not None:
            return self._config.name
        for key in SOURCES:
            if isinstance(row.get(key), str) and row[key]:
                return whole_text(row[key], key)[:100]
        first = images[0].get("path") if images and isinstance(images[0], dict) else next(iter(images), None)
        if isinstance(first, str) and len(parts := Path(first).parts) > 1 and parts[0] != "/":
            return parts[0]
        return Path(where.rsplit(":", 1)[0]).name

    def _licence(self, row: Mapping[str, Any]) -> str | None:
        for key in ("licence", "license"):
            if not isinstance(row.get(key, ""), str):
                raise BadRow(f"'{key}' must be text, got {row[key]!r:.60}")
            if row.get(key):
                return whole_text(row[key], key)
        return self._config.licence


def _image(image: Any, root: Path, confined: bool) -> Path | bytes:
    try:
        return image_source(image, root, confined)
    except BadRow as error:
        raise BadImage(str(error)) from None


CONVERSATIONS = {"conversations": "llava", "messages": "messages"}
QUESTIONS = ("prompt", "question", "instruction")
ANSWERS = ("chosen", "answer", "completion", "response", "output")
BOXES = "boxes"
SOURCES = ("source", "ds_name", "origin_dataset", "dataset")
KEYS_READ = (*CONVERSATIONS, *QUESTIONS, *ANSWERS, *SOURCES, "system", "id", "images", "image", "licence", "license")


def conversation(row: Mapping[str, Any], format: str = "auto") -> list[Message]:
    """The row's messages, the answers included.

    Args:
        row: of the source.
        format: which of its keys hold them, as ``source.format`` says.

    Raises:
        BadRow: if none of these keys does.
    """
    for key, shape in CONVERSATIONS.items():
        if key in row and format in ("auto", shape):
            messages = messages_from(with_image_parts(row[key], key), key, "user")
            system = row.get("system")
            if isinstance(system, str) and system:
                messages = [*messages_from(system, "system", "system"), *messages]
            return messages
    questions = [key for key in QUESTIONS if key in row and format in ("auto", "prompt")]
    answers = [key for key in ANSWERS if key in row]
    if not questions or not answers:
        wanted = {"llava": "conversations", "messages": "messages", "prompt": "prompt and answer"}.get(
            format, "conversations, messages, or prompt and answer"
        )
        raise BadRow(
            f"no {wanted}; this row has {', '.join(map(str, row)) or 'nothing'} "
            "(source.columns can map other names: {question: q, answer: a, images: img})"
        )
    prompt = messages_from(with_image_parts(row[questions[0]], questions[0]), questions[0], "user")
    return [*prompt, *messages_from(row[answers[0]], answers[0], "assistant")]


def _text(message: Message) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


NUMBER = r"[-+]?\d*\.?\d+"
COORDINATES = re.compile(
    rf"[\[(<{{]\s*{NUMBER}(?:\s*[,;\s]\s*{NUMBER}){{3}}\s*[\])>}}]|<box>|<loc\w*>|<point", re.IGNORECASE
)
POINT = re.compile(r"[\[(]\s*0?\.\d+\s*,\s*0?\.\d+\s*[\])]")
LETTER = re.compile(r"\s*(?:(?:the )?(?:answer|option)(?: is)?:? )?\(?[A-H]\)?[.:]?\s*", re.IGNORECASE)
OPTIONS = re.compile(r"(?:^|[\s(])A[.):]\s.*(?:^|[\s(])B[.):]\s|option'?s? letter|correct (?:option|choice)", re.DOTALL)


def to_edit(turns: Sequence[Turn], config: EditConfig) -> Iterator[tuple[Turn, str | None]]:
    """The turns of a row, each with the reason why it is not edited; None if it is."""
    kept = 0
    for turn in turns:
        reason = why_left_out(turn, config.filters)
        if reason is None and config.plan.turns_per_row is not None and kept == config.plan.turns_per_row:
            reason = "beyond plan.turns_per_row"
        kept += reason is None
        yield turn, reason


def why_left_out(turn: Turn, filters: FilterConfig) -> str | None:
    """Why a turn is not edited, in words that are the same for all turns of that kind; None if it is."""
    if not turn.answer.strip():
        return "empty answer"
    if filters.no_image and not turn.images:
        return "no image"
    if filters.coordinates and (COORDINATES.search(turn.answer) or POINT.search(turn.answer)):
        return "coordinates in the answer"
    if (
        filters.letters
        and LETTER.fullmatch(turn.answer)
        and (OPTIONS.search(turn.question) or turn.answer.strip() != "A")
    ):
        return "the letter of an option"
    for pattern in filters.skip_questions:
        if re.search(pattern, turn.question, re.IGNORECASE):
            return f"question like {pattern}"
    count = num_words(turn.answer)
    if count < filters.min_answer_words:
        return f"answer shorter than {filters.min_answer_words} words"
    if count > filters.max_answer_words:
        return f"answer longer than {filters.max_answer_words} words"
    return None
