"""One pass over a pair set: what the audit measures of every pair, in columns, and the texts of a sample."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.display import Display
from vapr.errors import UserError
from vapr.pairs import Pairs
from vapr.preference_pair import Message, PreferencePair
from vapr.style import STYLE_KEYS, edit_distance, polarity, style_vector, words

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
    groups: np.ndarray  # (n,) equal for pairs of one first image; without images, of one prompt
    questions: np.ndarray  # (n,) equal for pairs of the same images and prompt
    identities: np.ndarray  # (n,) equal for pairs of the same images, prompt and rejected text
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
    groups: dict[int, int] = {}
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
                # Numbered as they come: folds and resamples, drawn by group, must not depend on where a folder lies.
                columns["groups"][-1] = groups.setdefault(columns["groups"][-1], len(groups))
                if number in drawn:
                    sampled.append(count)
                    texts.append((chosen, rejected))
            if (number + 1) % 500 == 0 or number + 1 == size:
                display.advance("", number % 500 + 1)
    count = len(columns["numbers"])
    if not count:
        first = next(iter(pairs.skipped.values()), "no rows")
        raise UserError(f"{pairs.formats[0] if pairs.sets else 'the set'}: holds no pair; the first: {first}")
    arrays = {name: np.array(values) for name, values in columns.items()}
    return PairTable(style=style[:count], sampled=np.array(sampled, int), texts=texts, **arrays)


COLUMNS = (
    "numbers", "characters", "distance", "polarity", "groups", "questions", "identities", "with_images",
    "missing_images", "categories", "sources",
)  # fmt: skip


def _measure(pairs: Pairs, number: int, pair: PreferencePair, chosen: str, rejected: str) -> dict[str, Any]:
    images = [_image_key(image) for image in pair.images]
    other_images = [_image_key(image) for image in pair.rejected_images or ()]
    asked = "\n".join(f"{message['role']}: {_text(message)}" for message in pair.prompt)
    return {
        "numbers": number,
        "characters": (len(chosen), len(rejected)),
        "distance": edit_distance(words(chosen), words(rejected)),
        "polarity": (_says(chosen), _says(rejected)),
        "groups": _hash(images[0]) if images else _hash(asked.encode()),
        "questions": _hash(*images, asked.encode()),
        "identities": _hash(*images, *other_images, asked.encode(), rejected.encode()),
        "with_images": bool(images),
        "missing_images": any(isinstance(image, Path) and not image.is_file() for image in pair.images),
        "categories": pair.category or NO_CATEGORY,
        "sources": _source(pairs, number, pair),
    }


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


def _image_key(image: Path | bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else str(image).encode()


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)
