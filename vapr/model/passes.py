"""Run whatever reads a policy's weights: at once, or together with the passes of other processes."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from vapr.families.processed_image import ProcessedImage

Result = TypeVar("Result")
Compute = Callable[[Sequence[ProcessedImage]], Tensor]
"""A pass; it takes images to run through the tower for nothing, because another process has some in this pass."""


class Passes(Protocol):
    """Runs the passes of a policy. An engine that spreads weights or gradients over processes brings its own."""

    def logps(self, compute: Compute, images: Sequence[ProcessedImage]) -> Tensor:
        """Compute log-probs; ``images`` are those that the tower sees in this pass."""

    def features(self, compute: Compute) -> Tensor:
        """Compute image features by themselves."""

    def together(
        self, work: Callable[[], Result], agree: Callable[[Callable[[], Result]], Result], passes: int = 0
    ) -> Result:
        """Do work that has passes in it on every rank, and wait at its end until all ranks have done theirs.

        Args:
            work: its number of passes, and what they are of, may differ between ranks.
            agree: ends all ranks where the work of one fails (``Ranks.agree``).
            passes: how many of them have a backward pass.
        """


class AtOnce:
    """Computes at once, because no other process takes part."""

    def logps(self, compute: Compute, images: Sequence[ProcessedImage]) -> Tensor:
        return compute(())

    def features(self, compute: Compute) -> Tensor:
        return compute(())

    def together(
        self, work: Callable[[], Result], agree: Callable[[Callable[[], Result]], Result], passes: int = 0
    ) -> Result:
        return agree(work)


AT_ONCE = AtOnce()
