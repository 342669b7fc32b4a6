"""Pairs in shuffled order -> steps of packed micro-batches. A place in the data is one integer: the step.

The rows of a step are a pure function of seed, epoch and step. Workers read, tokenise and pack them ahead of the
training and never change the order.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import find_model
from vapr.batches.steps import Name, Place, Step, StepMaker
from vapr.batches.tokenize import Processor
from vapr.batches.workers import Workers, default_workers
from vapr.config import Config
from vapr.data.pair import PreferencePair
from vapr.data.pairs import NO_IMAGE, Pairs
from vapr.data.review_verdicts import read_verdicts
from vapr.data.sources import open_sets
from vapr.errors import UserError

LOOKAHEAD = 64
"""At least so many pairs, and a step for each worker, are in the making beyond the step in hand."""

RECENT_IMAGES_BYTES = 512 * 2**20
"""Processed images remembered by all workers together."""


class PairLoader:
    """Steps of ``optim.pairs_per_step`` pairs; the last step of an epoch holds what is left.

    Args:
        config: seed, packing and pairs of a step; ``data.shuffle`` is for training pairs alone.
        name: ``train`` or ``eval``.
        maker: reads and packs the rows.
        workers: the processes that run it.
        rank, num_ranks: which part of every step's rows this process reads, and of how many.

    Attributes:
        skipped: reason by place in the file, for pairs left out.
        messages: lines to be shown, each the first time a loss is left out for a reason.
    """

    def __init__(
        self, config: Config, name: Name, maker: StepMaker, workers: Workers, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.pairs = maker.pairs[name]
        self.pairs_per_step = config.optim.pairs_per_step
        self.processor = maker.processor
        self.skipped: dict[str, str] = {}
        self._name = name
        self._workers = workers
        self._part = rank, num_ranks
        self._packing = config.packing
        self._seed = config.seed
        self._views = (config.second_image, config.swaps_images)
        self.messages: list[str] = []
        self._left_out: set[str] = set()
        self._shuffle = config.data.shuffle and name == "train"
        self._dropped = maker.dropped[name]
        self._sets = self.pairs.weighted_sizes if isinstance(self.pairs, Pairs) else [(len(self.pairs), 1.0)]
        self._weighted = True
        self._by_image = config.packing.share == "image" and self._shuffle
        self._orders: dict[int, np.ndarray] = {}  # of the epochs in use: one ends while the next is made ahead

    @property
    def pairs_per_epoch(self) -> int:
        """Return the number of rows seen in an epoch: each set's number of rows times its weight."""
        return sum(round(size * weight) for size, weight in self._sets)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.pairs_per_epoch // self.pairs_per_step)

    @property
    def digest(self) -> str:
        """Return a hash of the data and of what is dropped of it; a place in it means nothing in other data."""
        digest = self.pairs.digest if isinstance(self.pairs, Pairs) else ""
        if not self._dropped:
            return digest
        return hashlib.sha256(repr((digest, sorted(self._dropped))).encode()).hexdigest()

    @property
    def place(self) -> str:
        """Return a name of this process's data in this order: in it, a number of steps is always the same pairs."""
        order = (self._seed, self._shuffle, self._weighted, self._by_image)
        views = () if self._views == (None, False) else self._views
        part = () if self._part == (0, 1) else self._part
        settings = (self.digest, self._packing, self.pairs_per_step, order, *views, *part)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    @property
    def retrieves_images(self) -> bool:
        """Tell whether the second image of a row is that of another row."""
        second, _ = self._views
        return second is not None and second.make == "retrieved"

    @property
    def image_backend(self) -> str:
        return self.processor.image_backend

    def once(self, *, by_image: bool = False) -> "PairLoader":
        """Return a copy in which an epoch sees every row once, whatever the weights of the sets.

        With ``by_image``, rows of one image stand together whatever is shared, so that no image is processed twice.
        """
        other = copy.copy(self)
        other.skipped = {}
        other._sets, other._weighted = [(len(self.pairs), 1.0)], False
        other._by_image |= by_image
        other._orders = {}
        return other

    def order(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch in their order, (rows,) int64: a pure function of seed and epoch.

        With ``share: image``, rows of one image stay together.
        """
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
        for number, (size, weight) in enumerate(self._sets):
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
        """Yield steps ``start`` to ``stop`` (not included), counted over epochs.

        Raises:
            UserError: for a pair that cannot be used or packed, unless it is to be skipped; for a killed worker.
        """
        for made in self._workers.batches(self._places, start, stop):
            self.skipped.update(made.skipped)
            if made.step is None:
                raise made.error
            self._note_left_out(made.step)
            yield made.step

    def _note_left_out(self, step: Step) -> None:
        for pair in step.pairs:
            for reason in self._left_out.symmetric_difference(pair.left_out) - self._left_out:
                self._left_out.add(reason)
                kind, why = reason.split(": ", 1)
                self.messages.append(
                    f"{pair.where}: no {kind} loss for row '{pair.id}' and its like: {why} (said once; {kind}_pairs in "
                    "metrics.jsonl counts the others)"
                )

    def _places(self, step: int) -> list[Place]:
        return [(self._name, number) for number in self._mine(step)]

    def members(self, step: int) -> np.ndarray:
        """Return the row numbers of a step, counted from 0 over epochs, (at most pairs_per_step,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = self.order(epoch)
        return self._orders[epoch][within * self.pairs_per_step : (within + 1) * self.pairs_per_step]

    def _mine(self, step: int) -> list[int]:
        """Return the row numbers of a step that are this process's; neighbours stay together."""
        rank, num_ranks = self._part
        part: list[int] = np.array_split(self.members(step), num_ranks)[rank].tolist()
        return part

    def close(self) -> None:
        """End the workers, which other loaders may share."""
        self._workers.close()

    def hash_images(self, step: int, images: Any) -> None:
        """Add size and time of a step's image files to a hash: it changes when one of them is written again."""
        for number in self._mine(step):
            try:
                pair = self.pairs[number]
                stats = [
                    image.stat() for image in (*pair.images, *(pair.rejected_images or ())) if isinstance(image, Path)
                ]
                images.update(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
            except (UserError, OSError) as error:
                images.update(str(error).encode(errors="replace"))


@contextlib.contextmanager
def open_loaders(
    config: Config, names: Sequence[Name] | None = None, say: Callable[[str], None] = print, *, rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[dict[Name, PairLoader]]:  # fmt: skip
    """Open ``data.train`` and, where there is one, ``data.eval``, check their first pairs, and start the workers.

    No weights are loaded. Workers are forked here, so open the loaders before anything is put on a GPU. ``say`` is
    shown the files, their formats, how many of the checked rows have images, and what to know of the model's processor.
    Of several processes each reads its part of every step.

    Raises:
        UserError: for a mistake in data or model, or if a step has fewer pairs than there are processes.
    """
    if config.optim.pairs_per_step < num_ranks:
        raise UserError(
            f"optim.pairs_per_step: {config.optim.pairs_per_step} cannot be dealt to {num_ranks} processes; raise it, "
            "or start fewer"
        )
    processor = open_processor(config)
    pairs: dict[Name, Sequence[PreferencePair]] = {}
    dropped: dict[Name, frozenset[str]] = {}
    for name in names or (("train", "eval") if config.data.eval else ("train",)):
        pairs[name] = opened = _open_pairs(config, name, say)
        if name == "train":
            for line in processor.notes:
                say(f"{'processor':<10} {line}")
        verdicts = config.data.verdicts if name == "train" else None
        dropped[name] = _dropped(verdicts, opened, say) if verdicts else frozenset()
    maker = StepMaker(config, processor, pairs, dropped)
    with start_workers(config, maker) as workers:
        yield {name: PairLoader(config, name, maker, workers, rank, num_ranks) for name in pairs}


def open_processor(config: Config) -> Processor:
    """Load the tokenizer and image processor of ``policy.model``; pixels come in ``policy.dtype``."""
    model = find_model(config.policy.model, config.policy.base).model
    dtype = getattr(torch, config.policy.dtype)
    return Processor(model, load_model_config(model), config.data.image_backend, dtype)


def start_workers(config: Config, maker: StepMaker) -> Workers:
    """Start the processes of a run, or with ``data.workers: 0`` none."""
    count = default_workers() if config.data.workers is None else config.data.workers
    maker.processor.remember_images(RECENT_IMAGES_BYTES // max(count, 1))
    prefetch = -(-LOOKAHEAD // (config.optim.pairs_per_step * max(count, 1)))
    return Workers(maker, maker.make_step, count, prefetch)


def load_pairs(config: Config, pairs: Sequence[PreferencePair], processor: Processor) -> PairLoader:
    """Put a loader in front of pairs that are at hand, in place of those that ``data.train`` names."""
    maker = StepMaker(config, processor, {"train": pairs}, {"train": frozenset()})
    return PairLoader(config, "train", maker, start_workers(config, maker))


def _open_pairs(config: Config, name: Name, say: Callable[[str], None]) -> Pairs:
    pairs = Pairs([part for source in config.data.sources(name) for part in open_sets(source)], config.data.on_bad_row)
    for size, weight in pairs.weighted_sizes:
        if round(size * weight) == 0:
            raise UserError(f"data.{name}: weight {weight:g} of {size:,} rows is less than one row an epoch; raise it")
    checked = pairs.check()
    for line in (*pairs.formats, checked, *pairs.notes, *pairs.warnings):
        say(f"{name:<10} {line}")
    return pairs


def warning_of_rows_in_both(
    train: Sequence[PreferencePair], held_out: Sequence[PreferencePair], key: str = "data.eval"
) -> str | None:
    """Warn of pairs that are held out and trained on; None if no file of ``held_out`` is one of ``train``.

    ``key`` of the config names the held-out pairs.
    """
    count = held_out.rows_in(train) if isinstance(train, Pairs) and isinstance(held_out, Pairs) else 0
    if not count:
        return None
    figures = "eval/" if key == "data.eval" else "probe/"
    return (
        f"{'warning':<10} {key}: {count:,} of its rows are in data.train, too; {figures} figures of pairs that are "
        "trained on show what was learned by heart, not how the policy does on others; hold other pairs out"
    )


def _dropped(file: str, pairs: Pairs, say: Callable[[str], None]) -> frozenset[str]:
    """Ids that a file of verdicts drops from ``pairs``."""
    verdicts = read_verdicts(file, lambda line: say(f"{'verdicts':<10} {line}"))
    found = pairs.ids_among(verdicts)
    dropped = frozenset(id for id in found if verdicts[id] == "drop")
    unknown = len(verdicts) - len(found)
    say(
        f"{'verdicts':<10} {file}: {len(dropped):,} ids dropped, {len(found) - len(dropped):,} kept"
        + (f"; {unknown:,} of its ids match no pair" if unknown else "")
    )
    return dropped


def _image_groups(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """A number for each pair (n,), equal where pairs show the same first image; NO_IMAGE for those without."""
    numbers: dict[object, int] = {}
    first = [pair.images[0] if pair.images else None for pair in pairs]
    return np.array([NO_IMAGE if image is None else numbers.setdefault(image, len(numbers)) for image in first])
