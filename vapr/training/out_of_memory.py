"""Halve packs that do not fit the GPU's memory, and do the step that they were part of again.

A failed backward pass leaves a gradient to which only some parts were added. Undoing that would need a copy of the
gradients before every pack. A step that begins again with its first pack has exactly the gradient of its packs, and
costs at most one step each time that packs get smaller.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from vapr.batches.packing import PackedBatch, fill_packs, pack
from vapr.config import PackingConfig
from vapr.model.sharded_cache import ShardedCache

T = TypeVar("T")


class CacheCounts:
    """What caches have counted so far, so that pairs used again are not counted twice."""

    def __init__(self, *caches: ShardedCache | None) -> None:
        self._before = [(cache, cache.hits + cache.misses) for cache in caches if cache is not None]

    def restore(self) -> None:
        """Take back what was counted since; what was computed stays so."""
        for cache, before in self._before:
            cache.hits -= cache.hits + cache.misses - before


class FittingPacks:
    """The limit on packs that the GPU's memory sets, found out on the way.

    Args:
        share: as in ``packing.share``.
        say: called with a line when packs get smaller.
        halves: False where other ranks wait in the middle of a pass, so that it cannot be run again.
    """

    def __init__(self, share: str = "pair", say: Callable[[str], None] = print, *, halves: bool = True) -> None:
        self.max_tokens: int | None = None
        """Most tokens of a pack; None: no pack was too large. A pair that is longer has a pack of its own."""
        self.say = say
        self._share, self._halves = share, halves

    def each(
        self, batches: Sequence[PackedBatch], use: Callable[[Any], T], again: Callable[[], None],
        hand_over: Callable[[Sequence[PackedBatch]], Iterator[Any]] = iter,
    ) -> list[T]:  # fmt: skip
        """Call ``use`` with every pack, in halves where one does not fit.

        Args:
            batches: on the CPU.
            use: called with packs of all their pairs, each pair in one of them.
            again: called before all packs are used once more, because one did not fit. It has to forget what ``use``
                did.
            hand_over: makes of packs on the CPU, one by one, what ``use`` takes.

        Returns:
            What ``use`` returned for each pack.

        Raises:
            torch.OutOfMemoryError: if a single pair does not fit, or packs are not to be halved.
        """
        while True:
            results: list[T] = []
            packs = self._limited(batches)
            handed_over = hand_over(packs)
            try:
                for pack_ in handed_over:
                    results.append(use(pack_))
                return results
            except torch.OutOfMemoryError:
                failed = packs[len(results)]
                if failed.num_pairs == 1 or not self._halves:
                    raise
            # Only here the failed pack is gone: the exception holds on to all its tensors.
            del handed_over, pack_  # and one that was copied ahead
            self._halve(failed)
            results.clear()
            again()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _limited(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Return the packs, those over the limit split; the others stay as they are."""
        if self.max_tokens is None:
            return list(batches)
        packing = PackingConfig(max_tokens=self.max_tokens, share=self._share)  # type: ignore[arg-type]
        packs = []
        for batch in batches:
            if batch.num_tokens <= self.max_tokens or batch.num_pairs == 1:
                packs.append(batch)
            else:
                packs += [pack(members, self._share) for members in fill_packs(list(batch.pairs), packing)]
        return packs

    def _halve(self, failed: PackedBatch) -> None:
        self.max_tokens = -(-failed.num_tokens // 2)
        self.say(
            f"a pack of {failed.num_tokens:,} tokens ({failed.num_pairs} pairs) does not fit the GPU's memory: packs "
            f"have at most {self.max_tokens:,} from now on, and the step begins again; set packing.max_tokens to that"
        )
