"""Finds pairs whose texts say nearly the same as an earlier pair's, by the cosine of their embeddings.

What is compared is question, chosen and rejected text together. As in the audit's search, pairs of the same images and
prompt are alike by design, and short answers repeat by their nature: both are left alone.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vapr.audit.near_duplicates import MIN_WORDS
from vapr.audit.pair_table import answer_text, question, questions_hash
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError, one_line
from vapr.progress import Display
from vapr.text import num_words

AT_ONCE = 64
"""Texts that the encoder reads together."""
BLOCK, KEPT_BLOCK = 512, 8_192
"""Rows that are compared with so many kept ones at once: 16 MiB of cosines, however many pairs there are."""
LONGEST = 512
"""Tokens of a text that are read, where the encoder sets no limit of its own."""


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """The rows to leave out, and what was looked at."""

    compared: int
    cut: int  # texts longer than the encoder reads
    duplicate_of: dict[int, tuple[int, float]]  # row -> the earlier row that stays, and their cosine


class Encoder:
    """A text encoder of transformers: mean or first token of the last layer, as its ``1_Pooling`` says; else the mean.

    Raises:
        UserError: if it cannot be loaded, or pools in another way.
    """

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pooling = _pooling(model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self._model: Any = AutoModel.from_pretrained(model).eval().to(self._device)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--drop-near-duplicates {model}: no text encoder ({one_line(error)})") from None
        if self._tokenizer.pad_token is None:
            raise UserError(f"--drop-near-duplicates {model}: no text encoder; its tokenizer pads nothing")
        positions = getattr(self._model.config, "max_position_embeddings", None) or LONGEST
        self.longest = int(min(self._tokenizer.model_max_length, positions, LONGEST))
        self.size = int(self._model.config.hidden_size)
        self.cut = 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors of texts, (texts, size) float32; count those that are longer than is read."""
        whole = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        self.cut += sum(len(ids) > self.longest for ids in whole)
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        with self._torch.inference_mode():
            hidden = self._model(**inputs.to(self._device)).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        vectors = pooled.cpu().numpy()
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _pooling(model: str) -> Literal["mean", "cls"]:
    """Return how a sentence-transformers folder pools; others, and hub ids, by the mean."""
    file = Path(model) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads(file.read_text("utf-8"))
        modes = [key for key, on in content.items() if key.startswith("pooling_mode_") and on is True]
        if modes == ["pooling_mode_cls_token"]:
            return "cls"
        if modes == ["pooling_mode_mean_tokens"]:
            return "mean"
    raise UserError(f"{file}: pools neither by the mean nor by the first token; name another encoder")


def near_duplicates_of(pairs: Pairs, model: str, similarity: float) -> NearDuplicates:
    """Compare every pair's text with those of all earlier pairs that stay.

    Embeddings lie in a file, so memory does not grow with the pairs; the time grows with their square.

    Args:
        pairs: all rows; bad ones are errors, or left out if the pairs say so.
        model: folder or hub id of a text encoder.
        similarity: cosine from which on two texts are nearly the same.

    Raises:
        UserError: if the encoder cannot be loaded, or a row is bad.
    """
    encoder = Encoder(model)
    rows, asked = [], []
    with tempfile.TemporaryFile() as file:
        with Display("embed", len(pairs), unit="row") as display:
            for batch in _batches(pairs, display.advance):
                file.write(encoder.encode([text for _, _, text in batch]).tobytes())
                rows += [row for row, _, _ in batch]
                asked += [questions for _, questions, _ in batch]
        found: dict[int, tuple[int, float]] = {}
        if rows:
            file.flush()
            vectors = np.memmap(file, np.float32, "r", shape=(len(rows), encoder.size))
            with Display("compare", len(rows), unit="pair") as display:
                found = find(vectors, np.array(asked), similarity, lambda count: display.advance("", count))
    return NearDuplicates(len(rows), encoder.cut, {rows[n]: (rows[m], cosine) for n, (m, cosine) in found.items()})


def _batches(pairs: Pairs, advance: Callable[[str], None]) -> Iterator[list[tuple[int, int, str]]]:
    """Yield row, hash of images and prompt, and text of the pairs that are long enough, AT_ONCE of them."""
    batch: list[tuple[int, int, str]] = []
    for row in range(len(pairs)):
        pair = pairs.read(row)
        advance("")
        if not isinstance(pair, PreferencePair) or num_words(answer_text(pair.rejected)) < MIN_WORDS:
            continue
        text = "\n".join((question(pair), answer_text(pair.chosen), answer_text(pair.rejected)))
        batch.append((row, questions_hash(pair), text))
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def find(
    vectors: np.ndarray, asked: np.ndarray, similarity: float, advance: Callable[[int], None] = lambda count: None
) -> dict[int, tuple[int, float]]:
    """Return the rows that are alike an earlier row that stays, with the likest of those and the cosine.

    Args:
        vectors: unit vectors, (rows, size).
        asked: equal numbers for rows that are not compared with one another, (rows,).
        similarity: cosine from which on rows are alike.
        advance: told how many rows are through.
    """
    kept: list[int] = []
    found: dict[int, tuple[int, float]] = {}
    for start in range(0, len(vectors), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, len(vectors)))
        block = np.asarray(vectors[numbers])
        best, partner = np.full(len(numbers), -np.inf), np.full(len(numbers), -1)
        for first in range(0, len(kept), KEPT_BLOCK):
            others = np.array(kept[first : first + KEPT_BLOCK])
            cosines = block @ np.asarray(vectors[others]).T
            cosines[asked[numbers][:, None] == asked[others][None]] = -np.inf
            likest = cosines.argmax(axis=1)
            values = cosines[np.arange(len(numbers)), likest]
            better = values > best
            best[better], partner[better] = values[better], others[likest[better]]
        inside = block @ block.T
        inside[asked[numbers][:, None] == asked[numbers][None]] = -np.inf
        staying: list[int] = []
        for n, number in enumerate(numbers.tolist()):
            if staying:
                likest = staying[int(inside[n, staying].argmax())]
                if inside[n, likest] > best[n]:
                    best[n], partner[n] = inside[n, likest], numbers[likest]
            if best[n] >= similarity:
                found[number] = int(partner[n]), float(best[n])
            else:
                staying.append(n)
        kept += [int(numbers[n]) for n in staying]
        advance(len(numbers))
    return found
