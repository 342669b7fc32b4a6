"""One pass over a pair set: the audit's measures of every pair, in columns, and the texts of a sample."""

import hashlib
from collections.abc import Sequence
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
"""Meaning of a completion's ``polarity`` number."""

SOURCE_KEYS = ("source", "origin_dataset", "ds_name", "dataset")
"""Keys of a row that name where it is from, the first of them that holds text."""

NO_CATEGORY = NO_EDITOR = "(none)"


@dataclass(frozen=True, eq=False)
class PairTable:
    """The P readable pairs. Index 0 of the second axis is chosen, 1 is rejected."""

    numbers: np.ndarray  # (P,) rows in the data
    style: np.ndarray  # (P, 2, len(STYLE_KEYS)) float32
    characters: np.ndarray  # (P, 2)
    distance: np.ndarray  # (P,) edit distance in words
    polarity: np.ndarray  # (P, 2) index into SAYS
    groups: np.ndarray  # (P,) equal for pairs that share an image, or are linked by others; without, of one prompt
    questions: np.ndarray  # (P,) equal for pairs of the same images and prompt
    identities: np.ndarray  # (P,) equal for pairs of the same images, prompt and rejected text
    num_images: int  # distinct ones
    with_images: np.ndarray  # (P,) bool
    with_other_images: np.ndarray  # (P,) bool: the rejected side has images of its own
    missing_images: np.ndarray  # (P,) bool: the file of an image is not there
    categories: np.ndarray  # (P,) text
    sources: np.ndarray  # (P,) text
    editors: np.ndarray  # (P,) text: who has made the rejected answer, where the row says so
    sampled: np.ndarray  # indices of the pairs that probes and models see, ascending
    texts: list[tuple[str, str]]  # chosen and rejected of the sampled ones

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> np.ndarray:
        """Words of chosen and rejected, (P, 2) float64."""
        return self.style[:, :, STYLE_KEYS.index("words")].astype(float)

    @property
    def labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns whose values get figures of their own."""
        return self.categories, self.sources, self.editors


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
    groups, num_images = _Groups(), 0
    sampled, texts = [], []
    with Display("read", size, unit="row") as display:
        for number in range(size):
            pair = pairs.read(number)
            if isinstance(pair, PreferencePair):
                count = len(columns["numbers"])
                chosen, rejected = answer_text(pair.chosen), answer_text(pair.rejected)
                for side, text in enumerate((chosen, rejected)):
                    style[count, side] = list(style_vector(text).values())
                for name, value in _measure(pairs, number, pair, chosen, rejected).items():
                    columns[name].append(value)
                new = groups.add(_group_keys(pair))
                num_images += new if pair.images or pair.rejected_images else 0
                if number in drawn:
                    sampled.append(count)
                    texts.append((chosen, rejected))
            if (number + 1) % 500 == 0 or number + 1 == size:
                display.advance("", number % 500 + 1)
    count = len(columns["numbers"])
    if not count:
        first = next(iter(pairs.skipped.values()), "no rows")
        raise UserError(f"{pairs.formats[0] if pairs.sets else 'the set'}: holds no pair; the first: {first}")
    # Texts as objects: numpy would give every one the room of the longest.
    arrays = {name: np.array(values, object if name in TEXTS else None) for name, values in columns.items()}
    return PairTable(
        style=style[:count], groups=groups.of_pairs(), sampled=np.array(sampled, int), texts=texts,
        num_images=num_images, **arrays,
    )  # fmt: skip


TEXTS = ("categories", "sources", "editors")
COLUMNS = (
    "numbers", "characters", "distance", "polarity", "questions", "identities", "with_images",
    "with_other_images", "missing_images", *TEXTS,
)  # fmt: skip


class _Groups:
    """Puts pairs into groups: those that share a key belong together, and those that others link."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # key -> its number, in the order they come
        self._links: list[tuple[int, int]] = []
        self._first_keys: list[int] = []  # of each pair

    def add(self, keys: Sequence[int]) -> int:
        """Add a pair with its keys; return how many of them are new."""
        known = len(self._numbers)
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        self._links += [(numbers[0], number) for number in numbers]
        self._first_keys.append(numbers[0])
        return len(self._numbers) - known

    def of_pairs(self) -> np.ndarray:
        """Return the group of each pair (P,), numbered in the order of their first keys."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        size = len(self._numbers)
        ends = np.array(self._links).T
        graph = coo_array((np.ones(len(self._links)), (ends[0], ends[1])), shape=(size, size))
        return connected_components(graph, directed=False)[1][self._first_keys]


def _group_keys(pair: PreferencePair) -> list[int]:
    """Return what a pair must share with no pair of another fold: its images, or without any its prompt."""
    images = [_image_key(image) for image in (*pair.images, *(pair.rejected_images or ()))]
    return [_hash(image) for image in images] or [_hash(b"", _prompt(pair))]


def _measure(pairs: Pairs, number: int, pair: PreferencePair, chosen: str, rejected: str) -> dict[str, Any]:
    images = [_image_key(image) for image in pair.images]
    other_images = [_image_key(image) for image in pair.rejected_images or ()]
    prompt = _prompt(pair)
    row = pairs.raw(number)
    row = row if isinstance(row, dict) else {}
    return {
        "numbers": number,
        "characters": (len(chosen), len(rejected)),
        "distance": edit_distance(words(chosen), words(rejected)),
        "polarity": (_says(chosen), _says(rejected)),
        "questions": questions_hash(pair),
        "identities": _hash(*images, *other_images, prompt, rejected.encode()),
        "with_images": bool(images),
        "with_other_images": bool(pair.rejected_images),
        "missing_images": any(
            isinstance(image, Path) and not image.is_file() for image in (*pair.images, *(pair.rejected_images or ()))
        ),
        "categories": _printable(pair.category or NO_CATEGORY),
        "sources": _printable(_source(pairs, number, pair, row)),
        "editors": _printable(_editor(row)),
    }


def questions_hash(pair: PreferencePair) -> int:
    """Return a number that is equal for pairs of the same images and prompt."""
    return _hash(*map(_image_key, pair.images), _prompt(pair))


def _prompt(pair: PreferencePair) -> bytes:
    return "\n".join(f"{message['role']}: {_text(message)}" for message in pair.prompt).encode()


def answer_text(messages: tuple[Message, ...]) -> str:
    """Return the text of the assistant's turns, one below the other."""
    return "\n".join(_text(message) for message in messages if message["role"] == "assistant")


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def question(pair: PreferencePair) -> str:
    """Return the text of the prompt's last turn."""
    return _text(pair.prompt[-1]).strip()


def _says(text: str) -> int:
    return SAYS.index(polarity(text) or "neither")


def _source(pairs: Pairs, number: int, pair: PreferencePair, row: dict[str, Any]) -> str:
    """Return where a row is from: what it says itself, else the first folder of its image's path, else its file."""
    for name in (row.get(key) for key in SOURCE_KEYS):
        if isinstance(name, str) and name.strip():
            return name.strip()
    if pair.images and isinstance(pair.images[0], Path):
        folder = pairs.folder(number)
        if pair.images[0].is_relative_to(folder) and len(parts := pair.images[0].relative_to(folder).parts) > 1:
            return parts[0]
    return Path(pairs.where(number).rsplit(":", 1)[0]).name


def _editor(row: dict[str, Any]) -> str:
    """Return who has made the rejected answer, as the rows of ``vapr edit`` say it: a language model, or rules."""
    provenance = row.get("provenance")
    editor = provenance.get("editor") if isinstance(provenance, dict) else None
    return editor if isinstance(editor, str) and editor.strip() else NO_EDITOR


def _printable(label: str) -> str:
    """Replace the characters of a label that a terminal cannot take."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in label)


def _image_key(image: Path | bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else str(image).encode()


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)
