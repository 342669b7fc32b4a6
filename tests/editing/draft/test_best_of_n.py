"""Best of three against one candidate, in the audit: a stand-in editor that likes some words more than others."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install 'vapr[audit]')")

from tests.editing.draft.test_candidates import Model, edit_to, edited, turn
from vapr.audit.text_probes import in_two_pairs, ngram_differences, probe

WORDS = (
    "belt", "bowl", "cane", "coin", "drum", "fork", "lamp", "mask", "vase", "rope", "flag", "knife", "spoon", "shovel",
    "hammer", "bucket", "ladder", "candle", "mirror", "guitar",
)  # fmt: skip
LIKED = [1 / (rank + 1) for rank in range(len(WORDS))]
"""How often the stand-in takes each word: the first twenty times as often as the last, as language models do."""


def favourites(request) -> str:
    """An edit by the words that the stand-in likes; the same request gives the same."""
    answer = json.loads(request.messages[-1]["content"].split("\n")[0])["answer"]
    old = next(word for word in WORDS if f" {word} " in answer)
    others = [(word, weight) for word, weight in zip(WORDS, LIKED, strict=True) if word != old]
    words, weights = zip(*others, strict=True)
    return edit_to(random.Random(request.seed).choices(words, weights)[0], old)


def accuracy(candidates: int, *settings: str) -> tuple[float, int]:
    """Accuracy of the audit's n-gram probe in percent, and the number of pairs."""
    draws = random.Random(1)
    turns = [turn(n, f"The man holds a {draws.choice(WORDS)} over there.") for n in range(400)]
    drafts = edited(Model(edits=favourites), turns, f"ask.candidates={candidates}", *settings)
    texts = [(draft.turn.answer, draft.rejected) for draft in drafts if draft.status == "accepted"]
    ngrams, names = in_two_pairs(*ngram_differences(*zip(*texts, strict=True)))
    found = probe(ngrams, np.arange(len(texts)), names, seed=0, scaled=False, thorough=False)
    return found["accuracy"], len(texts)


def test_best_of_three_gives_away_less():
    (one, pairs_of_one), (three, pairs_of_three) = accuracy(1), accuracy(3)
    print(f"n-gram probe: one candidate {one:.1f} % of {pairs_of_one}, best of three {three:.1f} % of {pairs_of_three}")
    assert pairs_of_one > 350 and pairs_of_three >= pairs_of_one
    assert one > 70  # the gate of the audit fails
    assert three < one - 10
