"""The slice of held-out pairs that a probe looks at: the same in every run on the same data, whatever its seed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vapr.audit.image_ablation import without_images
from vapr.batches.tokenize import Processor
from vapr.config import Config
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.data.sources import open_sets
from vapr.errors import BadRow, UserError
from vapr.evaluation.scoring.answers import yes_or_no

LOOKED_AT = 5_000
"""Rows read, at most, to find the questions."""


class Slice:
    """Pairs to score, and questions to answer.

    Attributes:
        rows: all held-out pairs.
        pairs: those to score.
        blind: the same without their images, by their number among ``pairs``; pairs that have no images, or whose two
            answers are the same text, are left out.
        questions: pairs whose chosen answer says yes or no, each question once.

    Raises:
        UserError: if a row of the slice cannot be used, unless such rows are skipped; or if none can.
    """

    def __init__(self, config: Config, processor: Processor) -> None:
        self._probe, self._processor = config.probe, processor
        sets = [part for source in config.probe_sources for part in open_sets(source)]
        self.rows = Pairs(sets, config.data.on_bad_row)
        self.pairs: list[PreferencePair] = []
        self.questions: list[PreferencePair] = []
        self._draw()
        if not self.pairs:
            raise UserError(f"probe.data: no pair can be used; the first: {next(iter(self.rows.skipped.values()))}")
        numbered = enumerate(self.pairs)
        self.blind = {n: without_images(pair) for n, pair in numbered if pair.images and pair.chosen != pair.rejected}

    def _draw(self) -> None:
        asked: set[str] = set()
        for number in np.random.default_rng(0).permutation(len(self.rows))[:LOOKED_AT].tolist():
            wants_pair = len(self.pairs) < self._probe.pairs
            wants_question = len(self.questions) < self._probe.questions
            if not (wants_pair or wants_question):
                return
            pair = self.rows.read(number)
            if not isinstance(pair, PreferencePair):
                continue
            question = repr((pair.prompt, [image_name(image) for image in pair.images]))
            wants_question &= question not in asked and said_in(pair) is not None
            if not (wants_pair or wants_question) or not self._is_usable(pair):
                continue
            if wants_pair:
                self.pairs.append(pair)
            if wants_question:
                self.questions.append(pair)
                asked.add(question)

    def _is_usable(self, pair: PreferencePair) -> bool:
        """Tokenise a pair before the training begins, so that a bad one is found now."""
        try:
            self._processor.tokenize_pair(pair)
        except BadRow as error:
            if self.rows.on_bad_row == "error":
                raise
            self.rows.skipped[pair.where] = str(error)
            return False
        return True

    def in_words(self) -> str:
        """Say what the slice holds, and what was not found."""
        fewer = ""
        if len(self.questions) < self._probe.questions:
            fewer = f" (of {self._probe.questions:,}; no more in {min(len(self.rows), LOOKED_AT):,} rows)"
        skipped = f"; {len(self.rows.skipped):,} rows skipped" if self.rows.skipped else ""
        return (
            f"every {self._probe.every:,} steps: {len(self.pairs):,} pairs, {len(self.blind):,} of them without the "
            f"image, too; {len(self.questions):,} yes/no questions{fewer}, "
            f"{[said_in(pair) for pair in self.questions].count('yes'):,} of them yes{skipped}"
        )


def said_in(pair: PreferencePair) -> str | None:
    """Return whether the chosen answer says ``"yes"`` or ``"no"``, None if neither."""
    return yes_or_no(text_of(pair.chosen), "strict")


def text_of(messages: Sequence[dict[str, Any]]) -> str:
    """Return the text of a completion's first turn."""
    return "".join(part.get("text", "") for part in messages[0]["content"])


def picture_of(pair: PreferencePair) -> str:
    """Return a name of the first picture, by which intervals are clustered; the pair's own if it has none."""
    return image_name(pair.images[0]) if pair.images else f"pair {pair.where}"


def image_name(image: Path | bytes) -> str:
    """Return an image's path, or a hash of its bytes."""
    return hashlib.sha256(image).hexdigest()[:16] if isinstance(image, bytes) else str(image)
