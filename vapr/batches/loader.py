"""Pairs in shuffled order -> steps of packed micro-batches. A place in the data is one integer: the step.

The order is a pure function of seed and epoch. Workers tokenise and process images ahead of the trainer and never
change the order.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vapr.batches.packing import PackedBatch, count_tokens, pack
from vapr.batches.tokenize import TokenizedPair
from vapr.batches.workers import Result, Workers
from vapr.config import Config, PackingConfig
from vapr.data.pair import PreferencePair
from vapr.data.pairs import NO_IMAGE, Pairs
from vapr.data.review_verdicts import read_verdicts
from vapr.data.sources import open_sets
from vapr.errors import BadRow, DroppedInReview, NoPair, UserError

LOOKAHEAD = 64
"""At least so many pairs, and one step, are in the making beyond the step in hand: what bounds the queues."""


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
        pairs: what :func:`vapr.data.pairs.read_pairs` gives, or a list.
        workers: tokenise them.
        packing: size of a pack and what is shared.
        pairs_per_step: pairs of one optimizer step.
        seed, shuffle: the order; without ``shuffle`` it is the file's.
        too_long, on_bad_row: ``error`` or ``skip``.
        dropped: ids of pairs that a review dropped; they are skipped.

    Attributes:
        skipped: reason by place in the file, for pairs left out.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        workers: Workers,
        packing: PackingConfig,
        *,
        pairs_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        too_long: str = "error",
        on_bad_row: str = "error",
        dropped: frozenset[str] = frozenset(),
    ) -> None:
        self.pairs = pairs
        self.pairs_per_step = pairs_per_step
        self.skipped: dict[str, str] = {}
        self._workers = workers
        self._packing = packing
        self._seed = seed
        self._shuffle = shuffle
        self._too_long = too_long
        self._on_bad_row = on_bad_row
        self._dropped = dropped
        self._weighted = True
        self._by_image = packing.share == "image" and shuffle
        self._epoch_order = (-1, np.empty(0, np.int64))

    @property
    def pairs_per_epoch(self) -> int:
        """Rows seen in an epoch: each set's number of rows times its weight."""
        return sum(round(size * weight) for size, weight in self._sets())

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.pairs_per_epoch // self.pairs_per_step)

    @property
    def digest(self) -> str:
        """Hash of the data and of what is dropped of it; a place in it means nothing in other data."""
        digest = self.pairs.digest if isinstance(self.pairs, Pairs) else ""
        if not self._dropped:
            return digest
        return hashlib.sha256(repr((digest, sorted(self._dropped))).encode()).hexdigest()

    @property
    def place(self) -> str:
        """Name of the data in this order: in it, a number of steps is always the same pairs."""
        order = (self._seed, self._shuffle, self._weighted, self._by_image)
        settings = (self.digest, self._packing, self.pairs_per_step, order)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    @property
    def image_backend(self) -> str:
        return self._workers.processor.image_backend

    def once(self, *, by_image: bool = False) -> "PairLoader":
        """The same, but an epoch sees every row once, whatever the weights of the sets.

        With ``by_image``, rows of one image stand together whatever is shared, so that no image is processed twice.
        """
        other = copy.copy(self)
        other.skipped = {}
        other._weighted = False
        other._by_image |= by_image
        other._epoch_order = (-1, np.empty(0, np.int64))
        return other

    def _sets(self) -> list[tuple[int, float]]:
        if isinstance(self.pairs, Pairs) and self._weighted:
            return self.pairs.weighted_sizes
        return [(len(self.pairs), 1.0)]

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch. With ``share: image``, rows of one image stay together."""
        random = np.random.default_rng([self._seed, epoch])
        members = self._members_of_epoch(epoch)
        if not self._by_image:
            return random.permutation(members) if self._shuffle else members
        groups = (self.pairs.image_groups() if isinstance(self.pairs, Pairs) else _image_groups(self.pairs))[members]
        groups = np.where(groups == NO_IMAGE, groups.max() + 1 + np.arange(len(members)), groups)
        rank = random.permutation(groups.max() + 1)
        return members[np.lexsort((random.random(len(members)), rank[groups]))]

    def _members_of_epoch(self, epoch: int) -> np.ndarray:
        """Rows of an epoch, source by source: all of them as often as the weight says, and some once more.

        Those are a window that moves on from epoch to epoch over one shuffled order after another.
        """
        members, start = [np.empty(0, np.int64)], 0
        for number, (size, weight) in enumerate(self._sets()):
            times, part = divmod(round(size * weight), size)
            members += [np.arange(start, start + size)] * times
            window = np.arange(epoch * part, (epoch + 1) * part)
            for cycle in np.unique(window // size):
                order = np.arange(size)
                if self._shuffle:
                    order = np.random.default_rng([self._seed, number, cycle, 1]).permutation(size)
                members.append(start + np.sort(order[window[window // size == cycle] % size]))
            start += size
        return np.concatenate(members)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps ``start`` to ``stop`` (not included), counted over epochs.

        Raises:
            UserError: for a pair that cannot be used or packed, unless it is to be skipped.
        """
        steps_ahead = 1 + -(-LOOKAHEAD // self.pairs_per_step)
        ahead: dict[int, list[tuple[int, Callable[[], Result] | UserError]]] = {}
        for step in range(start, stop):
            for n in range(step, min(step + steps_ahead, stop)):
                if n not in ahead:
                    ahead[n] = [(number, self._submit(number)) for number in self._members(n)]
            tokenized = []
            for number, task in ahead.pop(step):
                result = task if isinstance(task, UserError) else task()
                if isinstance(result, TokenizedPair):
                    tokenized.append(result)
                elif isinstance(result, NoPair) or (isinstance(result, BadRow) and self._on_bad_row == "skip"):
                    where = self.pairs.where(number) if isinstance(self.pairs, Pairs) else self.pairs[number].where
                    self.skipped[where] = str(result)
                else:
                    raise result
            yield self._pack(tokenized)

    def _members(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self.order(epoch)
        order = self._epoch_order[1]
        return order[within * self.pairs_per_step : (within + 1) * self.pairs_per_step].tolist()

    def hash_images(self, step: int, images: Any) -> None:
        """Add size and time of a step's image files to a hash: it changes when one of them is written again."""
        for number in self._members(step):
            try:
                pair = self.pairs[number]
                stats = [
                    image.stat() for image in (*pair.images, *(pair.rejected_images or ())) if isinstance(image, Path)
                ]
                images.update(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
            except (UserError, OSError) as error:
                images.update(str(error).encode(errors="replace"))

    def _submit(self, number: int) -> Callable[[], Result] | UserError:
        """Read row ``number`` and hand it to a worker; or what is wrong with it, told in its turn."""
        try:
            pair = self.pairs[number]
            if pair.id in self._dropped:
                raise DroppedInReview(f"{pair.where}: {DroppedInReview.MARK}row '{pair.id}'")
            return self._workers.submit(pair)
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


def open_loader(
    config: Config, name: Literal["train", "eval"], workers: Workers, say: Callable[[str], None] = print
) -> PairLoader:
    """Open the pairs of ``data.train`` or ``data.eval``, check the first of them, and put a loader in front.

    ``say`` is shown the files, their formats, how many of the checked rows have images, and what to know of the model's
    processor.
    """
    data = config.data
    sets = [part for source in data.sources(name) for part in open_sets(source)]
    pairs = Pairs(sets, data.on_bad_row)
    for size, weight in pairs.weighted_sizes:
        if round(size * weight) == 0:
            raise UserError(f"data.{name}: weight {weight:g} of {size:,} rows is less than one row an epoch; raise it")
    checked = pairs.check()
    for line in (*pairs.formats, checked, *pairs.notes, *pairs.warnings):
        say(f"{name:<10} {line}")
    if name == "train":
        for line in workers.processor.notes:
            say(f"{'processor':<10} {line}")
    return PairLoader(
        pairs,
        workers,
        config.packing,
        pairs_per_step=config.optim.pairs_per_step,
        seed=config.seed,
        shuffle=data.shuffle and name == "train",
        too_long=data.too_long,
        on_bad_row=data.on_bad_row,
        dropped=_dropped(data.verdicts, pairs, say) if name == "train" and data.verdicts else frozenset(),
    )


def warning_of_rows_in_both(train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> str | None:
    """What it means that pairs are held out and trained on; None if no file of ``held_out`` is one of ``train``."""
    count = held_out.rows_in(train) if isinstance(train, Pairs) and isinstance(held_out, Pairs) else 0
    if not count:
        return None
    return (
        f"{'warning':<10} data.eval: {count:,} of its rows are in data.train, too; eval/ figures of pairs that are "
        "trained on show what was learned by heart, not how the policy does on others; hold other pairs out"
    )


def _dropped(file: str, pairs: Pairs, say: Callable[[str], None]) -> frozenset[str]:
    """Ids that a file of verdicts drops from ``pairs``."""
    verdicts = read_verdicts(file)
    found = pairs.ids_among(verdicts)
    dropped = frozenset(id for id in found if verdicts[id] == "drop")
    unknown = len(verdicts) - len(found)
    say(
        f"{'verdicts':<10} {file}: {len(dropped):,} ids dropped, {len(found) - len(dropped):,} kept"
        + (f"; {unknown:,} of its ids match no pair" if unknown else "")
    )
    return dropped


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


def _image_groups(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """A number for each pair (n,), equal where pairs show the same first image; NO_IMAGE for those without."""
    numbers: dict[object, int] = {}
    first = [pair.images[0] if pair.images else None for pair in pairs]
    return np.array([NO_IMAGE if image is None else numbers.setdefault(image, len(numbers)) for image in first])
