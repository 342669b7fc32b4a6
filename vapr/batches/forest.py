"""Token paths -> radix trees of segments.

A path is one full token sequence: prompt and one completion. Paths that begin alike are merged, so that every token of
the tree is computed once. Two tokens are equal only if they have the same id and, inside an image, stand at the same
offset of the same image content.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vapr.batches.tokenize import TokenizedPair, TokenPath
from vapr.families.processed_image import places

NO_PARENT = -1


@dataclass(slots=True)
class Segment:
    """Tokens in a row that the same paths run through."""

    keys: np.ndarray  # of its tokens; see path_keys
    children: list[int]


def path_keys(path: TokenPath, image_numbers: dict[str, int]) -> np.ndarray:
    """One int64 per token: its id, or for an image token a negative number unique to (image content, offset)."""
    keys = path.input_ids.astype(np.int64)
    for image, runs in zip(path.images, path.image_runs, strict=True):
        number = image_numbers.setdefault(image.content_hash, len(image_numbers))
        keys[places(runs)] = -1 - (number * 2**32 + np.arange(image.num_tokens))
    return keys


def tree_groups(pairs: Sequence[TokenizedPair], share: str) -> list[list[int]]:
    """Numbers of the paths that share a tree: none, those of a pair, or of all pairs showing the same first image."""
    groups: dict[object, list[int]] = {}
    path = 0
    for number, pair in enumerate(pairs):
        images = pair.paths[0].images
        for _ in pair.paths:
            same_tree: object = path if share == "none" else number
            if share == "image" and images:
                same_tree = images[0].content_hash
            groups.setdefault(same_tree, []).append(path)
            path += 1
    return list(groups.values())


def _insert(segments: list[Segment], roots: list[int], keys: np.ndarray) -> None:
    """Walk down from ``roots`` as far as the tree agrees with ``keys``, split there, and hang up the rest."""
    siblings, start = roots, 0
    while start < len(keys):
        number = next((n for n in siblings if segments[n].keys[0] == keys[start]), None)
        if number is None:
            siblings.append(len(segments))
            segments.append(Segment(keys[start:], []))
            return
        segment = segments[number]
        length = min(len(segment.keys), len(keys) - start)
        differs = np.flatnonzero(segment.keys[:length] != keys[start : start + length])
        agreed = int(differs[0]) if len(differs) else length
        if len(differs):
            segments.append(Segment(segment.keys[agreed:], segment.children))
            segment.keys, segment.children = segment.keys[:agreed], [len(segments) - 1]
        # Else the path goes on below this segment, or ends inside it: predictions are listed, so no split is needed.
        start += agreed
        siblings = segment.children


def build_forest(groups: list[list[int]], keys: list[np.ndarray]) -> tuple[list[Segment], list[list[int]]]:
    """All segments, and the roots of each group's tree."""
    segments: list[Segment] = []
    roots: list[list[int]] = []
    for group in groups:
        roots.append([])
        for path in group:
            _insert(segments, roots[-1], keys[path])
    return segments, roots


def walk(segments: list[Segment], roots: list[int], keys: np.ndarray) -> list[tuple[int, int]]:
    """The segments a path runs through, each with the number of its tokens that belong to the path."""
    walked: list[tuple[int, int]] = []
    siblings, start = roots, 0
    while start < len(keys):
        number = next(n for n in siblings if segments[n].keys[0] == keys[start])
        length = min(len(segments[number].keys), len(keys) - start)
        walked.append((number, length))
        siblings, start = segments[number].children, start + length
    return walked


def depth_first(segments: list[Segment], roots: list[int]) -> tuple[list[int], list[int]]:
    """Segments in depth-first order and the parent of each (a position in that order)."""
    order: list[int] = []
    parents: list[int] = []
    stack = [(root, NO_PARENT) for root in reversed(roots)]
    while stack:
        segment, parent = stack.pop()
        order.append(segment)
        parents.append(parent)
        stack += [(child, len(order) - 1) for child in reversed(segments[segment].children)]
    return order, parents
