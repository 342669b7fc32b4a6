"""One pass over a pair set: what the audit measures of every pair, in columns, and the texts of a sample."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.data.pair import Message, PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.progress import Display
from vapr.text import STYLE_KEYS, edit_distance, polarity, style_vector, words

SAYS = ("neither", "yes", "no")
"""What a completion's ``polarity`` number means."""

SOURCE_KEYS = ("source", "origin_dataset", "ds_name", "dataset")
"""Keys of a row that name where it is from, the first of them that holds text."""

NO_CATEGORY = "(none)"


@dataclass(frozen=True, eq=False)
class PairTable:
    """n readable pairs. Index 0 of the second axis is chosen, 1 is rejected."""

    numbers: np.ndarray  # (n,) rows in the data
    style: np.ndarray  # (n, 2, len(STYLE_KEYS)) float32
    characters: np.ndarray  # (n, 2)
    distance: np.ndarray  # (n,) edit distance in words
    polarity: np.ndarray  # (n, 2) index into SAYS
    groups: np.ndarray  # (n,) equal for pairs that share an image, or are linked by others; without, of one prompt
    questions: np.ndarray  # (n,) equal for pairs of the same images and prompt
    identities: np.ndarray  # (n,) equal for pairs of the same images, prompt and rejected text
    num_images: int  # distinct ones
    with_images: np.ndarray  # (n,) bool
    missing_images: np.ndarray  # (n,) bool: the file of an image is not there
    categories: np.ndarray  # (n,) text
    sources: np.ndarray  # (n,) text
    sampled: np.ndarray  # indices of the pairs that probes and models see, ascending
    texts: list[tuple[str, str]]  # chosen and rejected of the sampled ones

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> np.ndarray:
        """Words of chosen and rejected, (n, 2)."""
        return self.style[:, :, STYLE_KEYS.index("words")].astype(float)


def read_table(pairs: Pairs, *, max_pairs: int, seed: int) -> PairTable:
    """Read every pair once. At most ``max_pairs`` of them, drawn by ``seed``, keep their texts.

    Raises:
        UserError: for a bad row (unless ``pairs`` skips them), or if no row is a pair.
    """
    generator = np.random.default_rng(seed)
    size = len(pairs)
    drawn = set(range(size) if size <= max_pairs else generator.choice(size, max_pairs, replace=False).tolist())
    style = np.empty((size, 2, len(STYLE_KEYS)), np.float32)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    linked, num_images = _Linked(), 0
    sampled, texts = [], []
    with Display("read", size, unit="row") as display:
        for number in range(size):
            pair = pairs.read(number)
            if isinstance(pair, PreferencePair):
                count = len(columns["numbers"])
                chosen, rejected = said(pair.chosen), said(pair.rejected)
                for side, text in enumerate((chosen, rejected)):
                    style[count, side] = list(style_vector(text).values())
                for name, value in _measure(pairs, number, pair, chosen, rejected).items():
                    columns[name].append(value)
                known = linked.count
                columns["groups"].append(linked.add(*_linked_by(pair)))
                num_images += linked.count - known if pair.images or pair.rejected_images else 0
                if number in drawn:
                    sampled.append(count)
                    texts.append((chosen, rejected))
            if (number + 1) % 500 == 0 or number + 1 == size:
                display.advance("", number % 500 + 1)
    count = len(columns["numbers"])
    if not count:
        first = next(iter(pairs.skipped.values()), "no rows")
        raise UserError(f"{pairs.formats[0] if pairs.sets else 'the set'}: holds no pair; the first: {first}")
    columns["groups"] = [linked.first(number) for number in columns["groups"]]
    # Texts as objects: numpy would give every one the room of the longest.
    arrays = {name: np.array(values, object if name in TEXTS else None) for name, values in columns.items()}
    return PairTable(style=style[:count], sampled=np.array(sampled, int), texts=texts, num_images=num_images, **arrays)


TEXTS = ("categories", "sources")
COLUMNS = (
    "numbers", "characters", "distance", "polarity", "groups", "questions", "identities", "with_images",
    "missing_images", *TEXTS,
)  # fmt: skip


class _Linked:
    """Numbers of things in the order they come, and which of them belong together."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._earlier: list[int] = []  # of each number, one that it belongs together with, or itself

    @property
    def count(self) -> int:
        return len(self._numbers)

    def add(self, *keys: int) -> int:
        """The first one's number; all of them belong together from now on."""
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        self._earlier.extend(range(len(self._earlier), len(self._numbers)))
        firsts = [self.first(number) for number in numbers]
        for number in firsts:
            self._earlier[number] = min(firsts)
        return numbers[0]

    def first(self, number: int) -> int:
        """The smallest of those that it belongs together with."""
        while (earlier := self._earlier[number]) != number:
            self._earlier[number] = self._earlier[earlier]
            number = earlier
        return number


def _linked_by(pair: PreferencePair) -> list[int]:
    """What a pair must share with no pair of another fold: its images, or without any its prompt."""
    images = [_image_key(image) for image in (*pair.images, *(pair.rejected_images or ()))]
    return [_hash(image) for image in images] or [_hash(b"", _asked(pair))]


def _measure(pairs: Pairs, number: int, pair: PreferencePair, chosen: str, rejected: str) -> dict[str, Any]:
    images = [_image_key(image) for image in pair.images]
    other_images = [_image_key(image) for image in pair.rejected_images or ()]
    asked = _asked(pair)
    return {
        "numbers": number,
        "characters": (len(chosen), len(rejected)),
        "distance": edit_distance(words(chosen), words(rejected)),
        "polarity": (_says(chosen), _says(rejected)),
        "questions": _hash(*images, asked),
        "identities": _hash(*images, *other_images, asked, rejected.encode()),
        "with_images": bool(images),
        "missing_images": any(
            isinstance(image, Path) and not image.is_file() for image in (*pair.images, *(pair.rejected_images or ()))
        ),
        "categories": _printable(pair.category or NO_CATEGORY),
        "sources": _printable(_source(pairs, number, pair)),
    }


def _asked(pair: PreferencePair) -> bytes:
    return "\n".join(f"{message['role']}: {_text(message)}" for message in pair.prompt).encode()


def said(messages: tuple[Message, ...]) -> str:
    """Text of the assistant's turns, one below the other."""
    return "\n".join(_text(message) for message in messages if message["role"] == "assistant")


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def question(pair: PreferencePair) -> str:
    """Text of the prompt's last turn."""
    return _text(pair.prompt[-1]).strip()


def _says(text: str) -> int:
    return SAYS.index(polarity(text) or "neither")


def _source(pairs: Pairs, number: int, pair: PreferencePair) -> str:
    """Where a row is from: what it says itself, else the first folder of its image's path, else its file."""
    row = pairs.raw(number)
    named = (row.get(key) for key in SOURCE_KEYS) if isinstance(row, dict) else ()
    for name in named:
        if isinstance(name, str) and name.strip():
            return name.strip()
    if pair.images and isinstance(pair.images[0], Path):
        folder = pairs.folder(number)
        if pair.images[0].is_relative_to(folder) and len(parts := pair.images[0].relative_to(folder).parts) > 1:
            return parts[0]
    return Path(pairs.where(number).rsplit(":", 1)[0]).name


def _printable(label: str) -> str:
    """The label as a terminal can take it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in label)


def _image_key(image: Path | bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else str(image).encode()


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)
