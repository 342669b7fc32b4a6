"""Read the data's rows and packs once, as training reads them. Loads no weights.

T = packed tokens, L = predictions, P = pairs.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vapr.batches.loader import PairLoader, open_loaders
from vapr.batches.packing import PackedBatch, count_tokens, pack
from vapr.batches.tokenize import TokenizedPair
from vapr.config import Config
from vapr.errors import UserError, reason_kind
from vapr.families.processed_image import ProcessedImage
from vapr.progress import Display

LONGEST = 5
LIMIT = 1000
"""Rows that are read where a data set has more, unless asked otherwise."""


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """What of an image decides what it costs."""

    pixels: tuple[int, ...]  # their shape
    layout: tuple[int, ...] | None
    num_tokens: int

    @classmethod
    def of(cls, image: ProcessedImage) -> "ImageSizes":
        return cls(tuple(image.pixel_values.shape), image.layout, image.num_tokens)

    def without_pixels(self) -> ProcessedImage:
        """Return an image of these sizes whose pixels take no memory."""
        return ProcessedImage(torch.empty(self.pixels, device="meta"), self.layout, self.num_tokens, "")


@dataclass(frozen=True, slots=True)
class PackSizes:
    """The sizes of one pack that decide what it costs."""

    tokens: int  # T
    predicting: int  # tokens that predict something
    predictions: int  # L
    lengths_q: tuple[int, ...]  # queries of each attention sequence
    lengths_k: tuple[int, ...]  # its keys
    last_lengths_q: tuple[int, ...]  # its queries in the last layer
    both_ways: tuple[bool, ...] | None  # whether its queries see later ones; None: none does
    images: tuple[ImageSizes, ...]  # its distinct images

    @classmethod
    def of(cls, batch: PackedBatch) -> "PackSizes":
        return cls(
            tokens=batch.num_tokens,
            predicting=len(batch.predicting),
            predictions=len(batch.labels),
            lengths_q=batch.attention.lengths_q,
            lengths_k=batch.attention.lengths_k,
            last_lengths_q=batch.last_queries.lengths,
            both_ways=batch.attention.both_ways,
            images=tuple(ImageSizes.of(image) for image in batch.images),
        )


@dataclass(frozen=True, slots=True)
class StepSizes:
    """One optimizer step."""

    packs: tuple[PackSizes, ...]
    num_pairs: int
    tokens_saved: int

    @property
    def tokens(self) -> int:
        return sum(pack.tokens for pack in self.packs)


@dataclass(slots=True)
class Reading:
    """The rows, steps and packs that were read."""

    rows: int = 0  # of the data
    pairs_per_epoch: int = 0
    steps_per_epoch: int = 0
    rows_read: int = 0
    whole: bool = True  # whether every step of an epoch was read
    steps: list[StepSizes] = field(default_factory=list)
    longest: list[tuple[int, str, str]] = field(default_factory=list)  # packed tokens of the pair, place, id
    largest: PackedBatch | None = None  # the pack with most tokens
    other_pairs: list[TokenizedPair] = field(default_factory=list)  # a few that are not in it
    skipped: dict[str, str] = field(default_factory=dict)  # reason by place
    sets: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_pairs(self) -> int:
        return sum(step.num_pairs for step in self.steps)

    @property
    def packs(self) -> list[PackSizes]:
        return [pack for step in self.steps for pack in step.packs]

    @property
    def too_long(self) -> dict[str, str]:
        """Return the rows that fit no pack, by place."""
        return {place: line for place, line in self.skipped.items() if "packing.max_tokens is" in line}

    def unusable(self) -> list[dict[str, Any]]:
        """Count the other skipped rows by reason, with the first of each."""
        grouped: dict[str, list[str]] = {}
        for place, line in self.skipped.items():
            if place not in self.too_long:
                grouped.setdefault(reason_kind(line.removeprefix(f"{place}: ")), []).append(line)
        return [{"rows": len(lines), "first": lines[0]} for lines in grouped.values()]


def read_packs(config: Config, limit: int = LIMIT) -> Reading:
    """Read the first steps of a run, at most about ``limit`` rows: what a run sees, in its order.

    Rows that cannot be used and pairs that fit no pack are counted, whatever the config does with them.

    Raises:
        UserError: if the data or the model's processor cannot be opened, or no row can be used.
    """
    data = dataclasses.replace(config.data, on_bad_row="skip", too_long="skip", eval=None)
    reading = Reading()
    with open_loaders(dataclasses.replace(config, data=data), ["train"], say=lambda line: None) as loaders:
        loader = loaders["train"]
        reading.rows, reading.pairs_per_epoch = len(loader.pairs), loader.pairs_per_epoch
        reading.steps_per_epoch = loader.steps_per_epoch
        stop = min(loader.steps_per_epoch, config.optim.max_steps or loader.steps_per_epoch)
        if loader.pairs_per_epoch > limit:
            stop = min(stop, -(-limit // loader.pairs_per_step))
        reading.whole = stop >= min(loader.steps_per_epoch, config.optim.max_steps or loader.steps_per_epoch)
        with Display("read train", stop) as display:
            for step in loader.steps(0, stop):
                _add(reading, step.batches, config.packing.share)
                reading.steps.append(
                    StepSizes(
                        tuple(PackSizes.of(batch) for batch in step.batches), step.num_pairs,
                        step.num_tokens_unshared - step.num_tokens,
                    )
                )  # fmt: skip
                display.advance(f"{reading.num_pairs:,} pairs, {len(loader.skipped):,} skipped")
        _finish(reading, loader)
    if not reading.num_pairs:
        raise UserError(f"data.train: no pair could be used; the first: {next(iter(reading.skipped.values()), 'none')}")
    return reading


def _add(reading: Reading, batches: Sequence[PackedBatch], share: str) -> None:
    for batch in batches:
        for pair in batch.pairs:
            entry = (count_tokens([pair], share), pair.where, pair.id)
            push = heapq.heappush if len(reading.longest) < LONGEST else heapq.heappushpop
            push(reading.longest, entry)
        largest = reading.largest
        if largest is None or batch.num_tokens > largest.num_tokens:
            reading.largest, batch = batch, largest if largest is not None else batch
        if batch is not reading.largest and len(reading.other_pairs) < 8:
            reading.other_pairs += batch.pairs[:8]


def _finish(reading: Reading, loader: PairLoader) -> None:
    reading.skipped = dict(loader.skipped)
    reading.rows_read = reading.num_pairs + len(loader.skipped)
    reading.sets = list(getattr(loader.pairs, "formats", []))
    reading.notes = [*getattr(loader.pairs, "notes", []), *loader.processor.notes]
    reading.longest.sort(reverse=True)


def two_sizes(reading: Reading, share: str) -> tuple[PackedBatch, PackedBatch]:
    """Return two packs of different sizes, to predict the memory of any size from; the larger one comes second."""
    largest = reading.largest
    assert largest is not None
    pairs = list(largest.pairs)
    if len(pairs) > 1:
        return pack(pairs[: len(pairs) // 2], share), largest
    return largest, pack([*pairs, *(reading.other_pairs or pairs)], share)
