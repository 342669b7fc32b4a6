"""What the demo's policies answered, as figures: right and garbled answers, the "Yes" bias, and which is better.

An answer is right if it gives the true value in any of the ordinary wordings. What is none of these, of no value, is
garbled: it counts as wrong, and is counted apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vapr.demo.datasets import Asked
from vapr.demo.questions import CATEGORIES, read_answer
from vapr.evaluation.scoring import yes_no
from vapr.evaluation.scoring.figures import share
from vapr.evaluation.scoring.paired import difference, mcnemar, sign_flip

SIGNIFICANT = 0.05


class Answers:
    """What one policy said to the held-out questions.

    Args:
        asked: the questions.
        texts: the answers, in the same order.
    """

    def __init__(self, asked: Sequence[Asked], texts: Sequence[str]) -> None:
        self.asked, self.texts = asked, texts
        self.said = [read_answer(one.question, text) for one, text in zip(asked, texts, strict=True)]
        self.right = np.array([said == one.question.truth for one, said in zip(asked, self.said, strict=True)])
        self.pictures = np.array([one.picture for one in asked])

    def of(self, category: str) -> np.ndarray:
        """Return which questions are of a category, (P,) bool; all of them for ``overall``."""
        return np.array([category in ("overall", one.question.category) for one in self.asked])

    def figures(self, seed: int) -> dict[str, Any]:
        """Return accuracy by category, garbled answers and the figures of the yes/no questions, as JSON holds them."""
        accuracy = {
            name: share(self.right[self.of(name)], self.pictures[self.of(name)]).as_dict()
            for name in ("overall", *CATEGORIES)
        }
        garbled = np.array([said is None for said in self.said])
        asked = np.flatnonzero(self.of("existence")).tolist()
        gold, said = [self.asked[n].question.truth for n in asked], [self.said[n] for n in asked]
        figures = yes_no.figures_of(gold, said, self.pictures[asked].tolist(), seed)
        return {
            "accuracy": accuracy,
            "garbled": {"answers": int(garbled.sum()), **share(garbled, self.pictures).as_dict()},
            "yes": yes_no.yes_bias(gold, said, figures),
            "words": float(np.mean([len(text.split()) for text in self.texts])),
        }


def compare(a: Answers, b: Answers, seed: int) -> dict[str, Any]:
    """Return how much more often b is right than a, and whether that is more than chance, by category.

    Differences are in shares, with intervals of a bootstrap over pictures; ``p`` is of a sign-flip test over pictures.
    """
    found = {}
    for name in ("overall", *CATEGORIES):
        chosen = a.of(name)
        before, after, pictures = a.right[chosen], b.right[chosen], a.pictures[chosen].tolist()
        counts = mcnemar(before, after)
        found[name] = {
            "difference": difference(before, after, pictures, seed).as_dict(),
            "fixed": counts["only_b"],
            "broken": counts["only_a"],
            "p": sign_flip(before, after, pictures, seed),
        }
    return found


def verdict(compared: Mapping[str, Any]) -> str:
    """Say whether b is better than a: ``better``, ``worse``, or ``no difference shown``."""
    if compared["p"] >= SIGNIFICANT:
        return "no difference shown"
    return "better" if compared["difference"]["value"] > 0 else "worse"


def distance(figures: Mapping[str, Any]) -> float:
    """Return how far the yes rate is from the truth, in shares."""
    return abs(float(figures["yes"]["gap"]["value"]))
