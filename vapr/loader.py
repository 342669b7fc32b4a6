"""Pairs in shuffled order -> steps of packed micro-batches. A place in the data is one integer: the step.

The order is a pure function of seed and epoch. Tokenising and image processing run in threads ahead of the trainer and
never change the order.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vapr.config import PackingConfig, TokenWeights
from vapr.errors import UserError
from vapr.packing import PackedBatch, count_tokens, pack
from vapr.pairs import PreferencePair
from vapr.processor import Processor, TokenizedPair

WORKERS = 4
LOOKAHEAD = 2
"""Steps whose pairs are tokenised ahead of the one being trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The micro-batches of one optimizer step, on the CPU, and what is counted over all of them.

    A step whose pairs were all skipped has no batches, and no update.
    """

    batches: tuple[PackedBatch, ...]
    num_pairs: int
    num_chosen_tokens: float  # weighted by the tokens' weights

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def num_tokens_unshared(self) -> int:
        return sum(batch.num_tokens_unshared for batch in self.batches)

    @property
    def pairs(self) -> list[TokenizedPair]:
        return [pair for batch in self.batches for pair in batch.pairs]


class PairLoader:
    """Steps of ``pairs_per_step`` pairs; the last step of an epoch holds what is left.

    Args:
        pairs: all pairs, images undecoded.
        processor: tokenises them.
        packing: size of a pack and what is shared.
        pairs_per_step: pairs of one optimizer step.
        seed, shuffle: the order; without ``shuffle`` it is the file's.
        too_long, on_bad_row: ``error`` or ``skip``.
        token_weights: weights of changed and unchanged tokens.

    Attributes:
        skipped: reason by place in the file, for pairs left out.
    """

    def __init__(
        self,
        pairs: list[PreferencePair],
        processor: Processor,
        packing: PackingConfig,
        *,
        pairs_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        too_long: str = "error",
        on_bad_row: str = "error",
        token_weights: TokenWeights | None = None,
    ) -> None:
        self.pairs = pairs
        self.pairs_per_step = pairs_per_step
        self.skipped: dict[str, str] = {}
        self._processor = processor
        self._packing = packing
        self._seed = seed
        self._shuffle = shuffle
        self._too_long = too_long
        self._on_bad_row = on_bad_row
        self._token_weights = token_weights
        self._epoch_order: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.pairs_per_step)

    @property
    def digest(self) -> str:
        """Hash of the pairs and their order; a place in the data means nothing in other data."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else i.name for i in pair.images]
            digest.update(repr((pair.id, images, pair.prompt, pair.chosen, pair.rejected, pair.weight)).encode())
        return digest.hexdigest()

    def order(self, epoch: int) -> list[int]:
        """Pair numbers in the order of an epoch. With ``share: image``, pairs of one image stay together."""
        if not self._shuffle:
            return list(range(len(self.pairs)))
        random = np.random.default_rng([self._seed, epoch])
        if self._packing.share != "image":
            return random.permutation(len(self.pairs)).tolist()
        by_image: dict[object, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            by_image.setdefault(pair.images[0] if pair.images else number, []).append(number)
        groups = list(by_image.values())
        return [number for group in random.permutation(len(groups)) for number in random.permutation(groups[group])]

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps ``start`` to ``stop`` (not included), counted over epochs.

        Raises:
            UserError: for a pair that cannot be used or packed, unless it is to be skipped.
        """
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="vapr-data") as pool:
            ahead: dict[int, list] = {}
            try:
                for step in range(start, stop):
                    for n in range(step, min(step + LOOKAHEAD, stop)):
                        if n not in ahead:
                            ahead[n] = [(pair, pool.submit(self._tokenize, pair)) for pair in self._members(n)]
                    tokenized = []
                    for pair, future in ahead.pop(step):
                        result = future.result()
                        if isinstance(result, UserError):
                            if self._on_bad_row == "error":
                                raise result
                            self.skipped[pair.where] = str(result)
                        else:
                            tokenized.append(result)
                    yield self._pack(tokenized)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _members(self, step: int) -> list[PreferencePair]:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self.order(epoch)
        order = self._epoch_order[1]
        return [self.pairs[n] for n in order[within * self.pairs_per_step : (within + 1) * self.pairs_per_step]]

    def _tokenize(self, pair: PreferencePair) -> TokenizedPair | UserError:
        try:
            return self._processor.tokenize_pair(pair, self._token_weights)
        except UserError as error:
            return error

    def _pack(self, pairs: list[TokenizedPair]) -> Step:
        fitting = []
        for pair in pairs:
            num_tokens = count_tokens([pair], self._packing.share)
            if num_tokens <= self._packing.max_tokens:
                fitting.append(pair)
                continue
            reason = (
                f"{pair.where}: row '{pair.id}' has {num_tokens:,} tokens but packing.max_tokens is "
                f"{self._packing.max_tokens:,} (nothing is truncated)"
            )
            if self._too_long == "error":
                raise UserError(f"{reason}; raise it, or set data.too_long: skip")
            self.skipped[pair.where] = reason
        packs = fill_packs(fitting, self._packing)
        batches = tuple(pack(members, self._packing.share) for members in packs)
        chosen_tokens = sum(float(pair.paths[0].token_weights.sum()) for pair in fitting)
        return Step(batches, len(fitting), chosen_tokens)


def fill_packs(pairs: list[TokenizedPair], packing: PackingConfig) -> list[list[TokenizedPair]]:
    """Split pairs over packs of at most ``packing.max_tokens``: first-fit, longest first.

    With ``share: image`` the items are groups of pairs that show one image; a group too large for a pack is split.
    Which pack a pair lands in changes no result, only how full the packs are.
    """
    items = []  # (tokens, pairs)
    for group in _groups(pairs, packing.share):
        while group:
            take = len(group)
            while take > 1 and count_tokens(group[:take], packing.share) > packing.max_tokens:
                take = max(1, take // 2)
            items.append((count_tokens(group[:take], packing.share), group[:take]))
            group = group[take:]
    items.sort(key=lambda item: -item[0])  # stable: equal lengths keep their order
    packs: list[tuple[int, list[TokenizedPair]]] = []
    for num_tokens, members in items:
        for n, (used, packed) in enumerate(packs):
            if used + num_tokens <= packing.max_tokens:
                packs[n] = (used + num_tokens, packed + members)
                break
        else:
            packs.append((num_tokens, members))
    return [members for _, members in packs]


def _groups(pairs: list[TokenizedPair], share: str) -> list[list[TokenizedPair]]:
    groups: dict[object, list[TokenizedPair]] = {}
    for number, pair in enumerate(pairs):
        images = pair.paths[0].images
        groups.setdefault(images[0].content_hash if share == "image" and images else number, []).append(pair)
    return list(groups.values())
