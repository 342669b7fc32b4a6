"""Finds pairs that are there twice, and rejected texts that are nearly so."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vapr.text import words

SIMILAR = 0.8
"""Jaccard similarity of two texts' sets of three words in a row, from which they are near-duplicates."""

MIN_WORDS = 8
"""Shorter answers repeat by their nature."""

MAX_CANDIDATES = 50
"""Looked at for one text. Where thousands are alike, all are found; what each is alike to need not be."""

EXAMPLES = 5


def repeated(identities: np.ndarray) -> list[list[int]]:
    """Return groups of two or more indices with the same identity (P,), the largest groups first."""
    order = np.argsort(identities, kind="stable")
    borders = np.flatnonzero(np.diff(identities[order])) + 1
    groups = [group.tolist() for group in np.split(order, borders) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def near_duplicates(texts: Sequence[str], questions: np.ndarray) -> dict[str, Any]:
    """Find texts that have a near-duplicate under another question or image. Edits of one answer are alike by design.

    Candidates come from MinHash with locality-sensitive hashing (datasketch) and are confirmed exactly.

    Args:
        texts: the rejected text of P pairs.
        questions: equal numbers for pairs of the same images and prompt, (P,).

    Returns:
        ``compared`` (texts of at least :data:`MIN_WORDS` words), ``found`` of them, ``percent`` and ``examples``:
        ``(index, index, similarity)``.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        rows_of[text].append(number)
    shingles = {text: found for text in rows_of if len(found := _shingles(text)) >= MIN_WORDS - 2}
    flagged: set[int] = set()
    examples: list[tuple[int, int, float]] = []
    asked = {text: {int(questions[n]) for n in rows_of[text]} for text in shingles}
    for first, second, similarity in _alike(shingles):
        if asked[first] == asked[second] and len(asked[first]) == 1:
            continue
        for these, others in ((first, second), (second, first)):
            flagged.update(n for n in rows_of[these] if len(asked[others]) > 1 or questions[n] not in asked[others])
        if len(examples) < EXAMPLES:
            examples.append((*_under_two_questions(rows_of[first], rows_of[second], questions), similarity))
    compared = sum(len(rows_of[text]) for text in shingles)
    return {
        "compared": compared,
        "found": len(flagged),
        "percent": 100 * len(flagged) / compared if compared else None,
        "examples": examples,
    }


def _under_two_questions(first: list[int], second: list[int], questions: np.ndarray) -> tuple[int, int]:
    """Return one index of each whose questions differ; not all of both lists have one question."""
    for n, m in ((first[0], m) for m in second):
        if questions[n] != questions[m]:
            return n, m
    return next(n for n in first if questions[n] != questions[second[0]]), second[0]


def _shingles(text: str) -> frozenset[bytes]:
    lower = [word.lower() for word in words(text) if word[0].isalnum()]
    return frozenset(" ".join(lower[n : n + 3]).encode() for n in range(len(lower) - 2))


def _alike(shingles: dict[str, frozenset[bytes]]) -> Iterator[tuple[str, str, float]]:
    """Yield each text with itself, and every two texts that are similar enough."""
    from datasketch import MinHash, MinHashLSH

    texts = list(shingles)
    # With 21 bands of 6 rows, 998 of 1,000 texts at SIMILAR are found; what is too far apart is sorted out below.
    index = MinHashLSH(num_perm=126, params=(21, 6))
    sketches = MinHash.generator(shingles.values(), num_perm=126)
    for number, (text, sketch) in enumerate(zip(texts, sketches, strict=True)):
        yield text, text, 1.0
        for known in sorted(index.query(sketch))[:MAX_CANDIDATES]:
            other = texts[known]
            shared = len(shingles[text] & shingles[other])
            similarity = shared / (len(shingles[text]) + len(shingles[other]) - shared)
            if similarity >= SIMILAR:
                yield other, text, similarity
        index.insert(number, sketch)
