"""Preferences of a reference model with the image and without: how much of them the text alone explains."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vapr.audit.pair_table import PairTable
from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import find_model
from vapr.batches.packing import PackedBatch, fill_packs, pack
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.batches.workers import Workers, default_workers
from vapr.config import PackingConfig, PolicyConfig
from vapr.data.pair import Message, PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.intervals import MIN_GROUPS, bootstrap, percent
from vapr.model.logps import completion_sums
from vapr.model.policy import load_policy
from vapr.model.reference import Reference
from vapr.progress import Display

AT_ONCE = 32
"""Pairs tokenised ahead, and packed together."""

WITH_IMAGE, BLIND = 0, 1


class Scorer:
    """A reference model that gives log-probs of completions. Values come from and go to the reference cache.

    Args:
        model: folder or hub id; float32 on a CPU, bfloat16 on a GPU.

    Raises:
        UserError: if it is no model that vapr can run.
    """

    def __init__(self, model: str) -> None:
        try:
            folder = find_model(model).model
            processor = Processor(folder, load_model_config(folder))
            # Before anything is put on a GPU.
            self._workers = Workers(_TokenizedPairs(processor), _pack_views, default_workers())
            dtype: Any = "bfloat16" if torch.cuda.is_available() else "float32"
            self._policy = load_policy(PolicyConfig(model=model, dtype=dtype))
        except UserError as error:
            raise UserError(str(error).replace("policy.model:", "--model", 1)) from None
        if self._policy.merged is not None:
            print(f"merged     {self._policy.merged}", file=sys.stderr)
        self._reference = Reference(self._policy, None)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.close()

    def scores(self, pairs: Pairs, table: PairTable, rows: np.ndarray) -> "Scores":
        """Score the table's pairs ``rows``, (pairs,) int64; those that cannot be tokenised are left out and counted."""
        sums = np.full((len(rows), 2, 2), np.nan)
        tokens = np.zeros((len(rows), 2))
        skipped: dict[int, str] = {}
        with Display("score", len(rows), unit="pair") as display:
            starts = range(0, len(rows), AT_ONCE)
            numbers = table.numbers[rows]

            def views(chunk: int) -> list[tuple[int, int, PreferencePair]]:
                """Return place, view and pair of every pair of a chunk, and once more without its images."""
                shown = enumerate(numbers[starts[chunk] : starts[chunk] + AT_ONCE].tolist(), start=starts[chunk])
                both = [(place, pairs[number]) for place, number in shown]
                blind = [(place, BLIND, without_images(pair)) for place, pair in both if pair.images]
                return [*((place, WITH_IMAGE, pair) for place, pair in both), *blind]

            for chunk, (batches, refused) in zip(starts, self._workers.batches(views, 0, len(starts)), strict=True):
                skipped |= refused
                for view, batch in batches:
                    for pair, side_sums in zip(batch.pairs, self._score(batch), strict=True):
                        sums[pair.number, view] = side_sums
                        tokens[pair.number] = [path.token_weights.sum() for path in pair.paths]
                display.advance("", min(AT_ONCE, len(rows) - chunk))
        self._reference.flush()
        return Scores(rows, table.groups[rows], table.with_images[rows], sums, tokens, [*skipped.values()])

    def _score(self, cpu_batch: PackedBatch) -> np.ndarray:
        """Return the log-probs of chosen and rejected of every pair, (P, 2), in nats."""
        batch = cpu_batch.to(self._policy.device)
        with torch.no_grad():
            counted = self._reference.logps(batch) * batch.token_weights
            return completion_sums(counted, batch).double().cpu().numpy().reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class _TokenizedPairs(Dataset[tuple[int, int, TokenizedPair | UserError]]):
    """Tokenise a pair in a data worker; its number becomes its place among the pairs that are scored."""

    processor: Processor

    def __getitem__(self, item: tuple[int, int, PreferencePair]) -> tuple[int, int, TokenizedPair | UserError]:
        place, view, pair = item
        try:
            return place, view, dataclasses.replace(self.processor.tokenize_pair(pair), number=place)
        except UserError as error:
            return place, view, error


def _pack_views(
    views: Sequence[tuple[int, int, TokenizedPair | UserError]],
) -> tuple[list[tuple[int, PackedBatch]], dict[int, str]]:
    """Pack the pairs of a chunk, each view by itself; returns (view, batch), and what is wrong with others by place."""
    batches = []
    for view in (WITH_IMAGE, BLIND):
        tokenized = [pair for _, of, pair in views if of == view and isinstance(pair, TokenizedPair)]
        batches += [(view, pack(members)) for members in fill_packs(tokenized, PackingConfig())]
    return batches, {place: str(error) for place, _, error in views if isinstance(error, UserError)}


def without_images(pair: PreferencePair) -> PreferencePair:
    """Return the same pair, its prompt without the image parts."""
    return dataclasses.replace(
        pair, images=(), rejected_images=None, prompt=tuple(_without_images(message) for message in pair.prompt)
    )


def _without_images(message: Message) -> Message:
    texts = [part for part in message["content"] if part["type"] == "text"]
    return {**message, "content": texts or [{"type": "text", "text": ""}]}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs of P pairs: sums over the completion's tokens, in nats."""

    rows: np.ndarray  # (P,) indices into the table
    groups: np.ndarray  # (P,)
    with_images: np.ndarray  # (P,)
    sums: np.ndarray  # (P, 2, 2): with image and blind; chosen and rejected. NaN: not scored
    tokens: np.ndarray  # (P, 2)
    skipped: Sequence[str]

    def figures(self, rows: np.ndarray, seed: int) -> dict[str, Any]:
        """Return preference accuracies with and without the image, and their difference, of the table's pairs ``rows``.

        ``accuracy`` is how often chosen has the larger log-prob (equal ones count half), ``accuracy_per_token`` the
        same after division by the number of tokens; ``margin`` is the mean of logp(chosen) - logp(rejected) in nats,
        ``margin_per_token`` that of the log-probs a token. ``gap`` is accuracy with image minus blind, in points, over
        the pairs that have images; its interval is a bootstrap over images of both accuracies of the same pairs.
        """
        here = np.isin(self.rows, rows) & np.isfinite(self.sums[:, WITH_IMAGE]).all(axis=1)
        both = here & self.with_images & np.isfinite(self.sums[:, BLIND]).all(axis=1)
        shown = self._preference(here, WITH_IMAGE)
        result: dict[str, Any] = {"with_image": shown, "blind": self._preference(both, BLIND)}
        for key, by_token in (("gap", False), ("gap_per_token", True)):
            difference = self._right(both, WITH_IMAGE, by_token) - self._right(both, BLIND, by_token)
            result[key] = _points(difference, self.groups[both], seed)
        num_groups = len(np.unique(self.groups[both]))
        few = f"too few: {num_groups:,} images, needs {MIN_GROUPS}" if num_groups < MIN_GROUPS else None
        return {**result, "why": few}

    def summary(self, seed: int) -> dict[str, Any]:
        """Return the figures of all scored pairs, how many were asked for, and those left out."""
        skipped = {"rows": len(self.skipped), "first": list(self.skipped[:3])}
        return {"asked": len(self.rows), **self.figures(self.rows, seed), "skipped": skipped}

    def _margins(self, members: np.ndarray, view: int, by_token: bool) -> np.ndarray:
        sums = self.sums[members, view]
        sides = sums / self.tokens[members] if by_token else sums
        return sides[:, 0] - sides[:, 1]

    def _right(self, members: np.ndarray, view: int, by_token: bool) -> np.ndarray:
        margins = self._margins(members, view, by_token)
        return np.where(margins == 0, 0.5, margins > 0)

    def _preference(self, members: np.ndarray, view: int) -> dict[str, Any]:
        plain, by_token = (self._margins(members, view, each) for each in (False, True))
        groups = self.groups[members]
        return {
            "accuracy": percent(self._right(members, view, False), groups),
            "accuracy_per_token": percent(self._right(members, view, True), groups),
            "margin": float(plain.mean()) if len(plain) else None,
            "margin_per_token": float(by_token.mean()) if len(plain) else None,
        }


def _points(difference: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    if len(np.unique(groups)) < MIN_GROUPS:
        return {"value": None, "interval": None, "pairs": len(groups)}
    interval = bootstrap(lambda weights: float(weights @ difference / weights.sum()), groups, seed)
    return {"value": 100 * float(difference.mean()), "interval": [100 * x for x in interval], "pairs": len(groups)}
