"""Rows of one optimizer step -> its packed micro-batches: what a data worker does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import Dataset

from vapr.batches.packing import PackedBatch, count_tokens, fill_packs, pack
from vapr.batches.second_image import OtherViews
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.config import Config
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import BadRow, DroppedInReview, NoPair, UserError

Name = Literal["train", "eval"]

Place = tuple[Name, int]
"""A row: its set and its number there."""

Row = tuple[str, TokenizedPair | UserError]
"""Where a row is from, and its tokens or what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The micro-batches of one optimizer step, on the CPU, and what is counted over all of them.

    Where several processes train, the batches are this one's, and the counts those of all. A step whose pairs were all
    skipped has no batches, and no update.
    """

    batches: tuple[PackedBatch, ...]
    num_pairs: int
    num_chosen_tokens: float  # weighted by the tokens' weights
    num_tokens: int
    num_tokens_unshared: int

    @property
    def pairs(self) -> list[TokenizedPair]:
        return [pair for batch in self.batches for pair in batch.pairs]


@dataclass(frozen=True, slots=True, eq=False)
class MadeStep:
    """A step, or the error it ends the run with; and the pairs that were skipped before that."""

    step: Step | None
    skipped: Mapping[str, str]  # place in the file -> reason
    error: Any = None  # a UserError where there is no step


class StepMaker(Dataset[Row]):
    """Reads, checks, tokenises and packs rows. Errors are values here, so that they can be raised in their turn.

    Args:
        config: weights of tokens, packing, and what happens to rows that cannot be used.
        processor: tokenises.
        pairs: by the names that places give.
        dropped: ids of pairs that a review dropped, which are skipped; by the same names.
    """

    def __init__(
        self,
        config: Config,
        processor: Processor,
        pairs: Mapping[Name, Sequence[PreferencePair]],
        dropped: Mapping[Name, frozenset[str]],
    ) -> None:
        self.processor = processor
        self.pairs = pairs
        self.dropped = dropped
        self._config = config
        self._others = {name: OtherViews(config, processor, rows) for name, rows in pairs.items()}

    def __getitem__(self, place: Place) -> Row:
        name, number = place
        pairs = self.pairs[name]
        where = pairs.where(number) if isinstance(pairs, Pairs) else pairs[number].where
        try:
            pair = pairs[number]
            if pair.id in self.dropped[name]:
                raise DroppedInReview(f"{where}: {DroppedInReview.MARK}row '{pair.id}'")
            return where, self.processor.tokenize_pair(pair, self._config.token_weights, self._others[name])
        except UserError as error:
            return where, error
        except Exception as error:  # a fault of vapr's own, which is to name its row
            raise RuntimeError(f"at {where}: {error!r}") from error

    def make_step(self, rows: Sequence[Row]) -> MadeStep:
        """Fill packs with the rows of a step, and lay each out; the place of a row that ends the run goes first."""
        skipped: dict[str, str] = {}
        tokenized = []
        for where, result in rows:
            if isinstance(result, TokenizedPair):
                tokenized.append(result)
            elif isinstance(result, NoPair) or (isinstance(result, BadRow) and self._config.data.on_bad_row == "skip"):
                skipped[where] = str(result)
            else:
                return MadeStep(None, skipped, result)
        packing = self._config.packing
        fitting = []
        for pair in tokenized:
            num_tokens = count_tokens([pair], packing.share)
            if num_tokens <= packing.max_tokens:
                fitting.append(pair)
                continue
            reason = (
                f"{pair.where}: row '{pair.id}' has {num_tokens:,} tokens but packing.max_tokens is "
                f"{packing.max_tokens:,} (nothing is truncated)"
            )
            if self._config.data.too_long == "error":
                error = UserError(f"{reason}; raise it, or set data.too_long: skip")
                return MadeStep(None, skipped, error)
            skipped[pair.where] = reason
        batches = tuple(pack(members, packing.share) for members in fill_packs(fitting, packing))
        chosen_tokens = sum(float(pair.paths[0].token_weights.sum()) for pair in fitting)
        tokens = sum(batch.num_tokens for batch in batches), sum(batch.num_tokens_unshared for batch in batches)
        return MadeStep(Step(batches, len(fitting), chosen_tokens, *tokens), skipped)
