"""Which tokens of a completion the edit changed, and their weight."""

import difflib
import re

import numpy as np

from vapr.batches.continuation import Offsets
from vapr.data.pair import PreferencePair


def weigh_changes(
    token_weights: np.ndarray, pair: PreferencePair, side: str, text: str, offsets: Offsets, changed: float
) -> None:
    """Give the tokens of the edit their weight.

    Args:
        token_weights: (tokens,), written in place.
        pair, side: whose completion it is.
        text: the rendered completion. offsets: characters of its tokens.
        changed: the weight.
    """
    messages = getattr(pair, side)
    answer = "".join(part["text"] for part in messages[0]["content"])
    begin = max(text.find(answer.strip()) - (len(answer) - len(answer.lstrip())), 0)
    for start, end in changed_spans(pair, side):
        for n, (first, last) in enumerate(offsets):
            if first < begin + end and last > begin + start:
                token_weights[n] = changed


def changed_spans(pair: PreferencePair, side: str) -> list[tuple[int, int]]:
    """Character ranges of a completion that the edit changed: the row's ``edits``, or else a word-level diff."""
    texts = ["".join(part["text"] for part in messages[0]["content"]) for messages in (pair.chosen, pair.rejected)]
    spans = {"chosen": [], "rejected": []}  # type: dict[str, list[tuple[int, int]]]
    if pair.edits:
        shift = 0
        for edit in sorted(pair.edits, key=lambda edit: edit.start):
            spans["chosen"].append((edit.start, edit.end))
            spans["rejected"].append((edit.start + shift, edit.start + shift + len(edit.to)))
            shift += len(edit.to) - (edit.end - edit.start)
        return spans[side]
    words = [list(re.finditer(r"\s+|\w+|[^\w\s]", text)) for text in texts]
    before, after = ([word[0] for word in line] for line in words)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for operation, *bounds in matcher.get_opcodes():
        if operation == "equal":
            continue
        for name, line, (first, last) in zip(spans, words, (bounds[:2], bounds[2:]), strict=True):
            if first < last:
                spans[name].append((line[first].start(), line[last - 1].end()))
    return spans[side]
