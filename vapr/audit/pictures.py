"""Pairs with ``rejected_images``: how much of a picture changed, and whether a rejected one gives itself away alone.

A text probe says nothing of pairs whose answers are one text. What can be learned of them without comparing pictures is
which one looks tampered with: blurred, painted over, smaller.
"""

from typing import Any

import numpy as np
from PIL import Image

from vapr.audit.pair_table import PairTable
from vapr.audit.text_probes import probe
from vapr.data.images import as_rgb, read_image
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.progress import Display

MAX_PICTURES = 2_000
"""Pairs whose pictures are read, drawn at random: two pictures of each are decoded."""

LEVELS = 8
"""Steps of 255 from which on a pixel counts as another one: JPEG moves most of them a little."""

CELLS = 16
"""A picture is looked at in a grid of so many by so many cells."""
DARK, FLAT = 8.0, 1.0
"""Mean below which a cell is black, and spread below which nothing is in it."""

FEATURES = (
    "pixels", "width by height", "brightness", "contrast", "saturation", "sharpness", "sharpness of the dullest tenth",
    "black cells", "empty cells", "cells like the mean",
)  # fmt: skip


def picture_features(picture: Image.Image) -> np.ndarray:
    """Return what can be told of an RGB picture without knowing what it shows: a number for each of FEATURES."""
    width, height = picture.size
    colours = np.asarray(picture, np.float32)
    grey = colours.mean(axis=-1)
    steps = np.zeros_like(grey)
    steps[:, 1:] += np.abs(np.diff(grey, axis=1))
    steps[1:] += np.abs(np.diff(grey, axis=0))
    mean, square, sharpness = (_in_cells(values) for values in (grey, grey**2, steps))
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    like_mean = (np.abs(mean - grey.mean()) < FLAT) & (spread < FLAT)
    return np.array([
        np.log(width * height), np.log(width / height), grey.mean(), grey.std(),
        (colours.max(axis=-1) - colours.min(axis=-1)).mean(), sharpness.mean(), np.quantile(sharpness, 0.1),
        (mean < DARK).mean(), (spread < FLAT).mean(), like_mean.mean(),
    ])  # fmt: skip


def _in_cells(values: np.ndarray) -> np.ndarray:
    """Return the mean of each cell of a picture's values (height, width)."""
    edges = [np.linspace(0, side, min(CELLS, side), endpoint=False).astype(int) for side in values.shape]
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.float64), edges[0], axis=0), edges[1], axis=1)
    sizes = [np.diff([*edge, side]) for edge, side in zip(edges, values.shape, strict=True)]
    return sums / np.outer(*sizes)


def changed_share(one: Image.Image, other: Image.Image) -> float:
    """Return the share of pixels that differ between two RGB pictures; 1 where their sizes do."""
    if one.size != other.size:
        return 1.0
    difference = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
    return float((difference.max(axis=-1) >= LEVELS).mean())


def measure_pictures(pairs: Pairs, table: PairTable, seed: int) -> dict[str, Any] | None:
    """Read the pictures of the pairs that have ``rejected_images``, of at most MAX_PICTURES drawn by ``seed``.

    Returns:
        ``pairs`` with such images, ``seen`` and ``unreadable`` (of those drawn), ``first_unreadable``, ``probe`` (of
        features of the pictures of both sides, see :func:`vapr.audit.text_probes.probe`) and ``kinds``: by category
        ``pairs``, ``percent`` of the pairs seen, ``changed`` (quantiles of the share of pixels) and ``probe``. None for
        a set without such images.
    """
    rows = np.flatnonzero(table.with_other_images)
    if not len(rows):
        return None
    drawn = rows
    if len(rows) > MAX_PICTURES:
        drawn = np.sort(np.random.default_rng(seed).choice(rows, MAX_PICTURES, replace=False))
    seen, differences, shares, problems = [], [], [], []
    with Display("pictures", len(drawn), unit="pair") as display:
        for row in drawn.tolist():
            try:
                difference, share = _compare(pairs[int(table.numbers[row])])
            except UserError as error:
                problems.append(str(error))
            else:
                seen.append(row)
                differences.append(difference)
                shares.append(share)
            display.advance("")
    found = {
        "pairs": len(rows), "seen": len(seen), "unreadable": len(problems),
        "first_unreadable": problems[0] if problems else None,
    }  # fmt: skip
    if not seen:
        return {**found, "probe": None, "kinds": {}}
    kept, features, changed = np.array(seen), np.array(differences), np.array(shares)
    names = table.categories[kept]

    def figures(places: np.ndarray, *, thorough: bool) -> dict[str, Any]:
        return probe(features[places], table.groups[kept[places]], FEATURES, seed=seed, scaled=True, thorough=thorough)

    kinds = {}
    for name in sorted(set(names.tolist())):
        places = np.flatnonzero(names == name)
        low, middle, high = np.percentile(changed[places], [5, 50, 95])
        kinds[name] = {
            "pairs": len(places),
            "percent": 100 * len(places) / len(kept),
            "changed": {"p5": float(low), "median": float(middle), "p95": float(high)},
            "probe": figures(places, thorough=False),
        }
    return {**found, "probe": figures(np.arange(len(kept)), thorough=True), "kinds": kinds}


def _compare(pair: PreferencePair) -> tuple[np.ndarray, float]:
    """Return the features of a pair's images minus those of its rejected ones, and the share that changed."""
    assert pair.rejected_images is not None
    own, other = ([as_rgb(read_image(image)) for image in side] for side in (pair.images, pair.rejected_images))
    features = [sum(map(picture_features, side)) for side in (own, other)]
    shares = [changed_share(*both) for both in zip(own, other, strict=True)]
    return np.asarray(features[0] - features[1]), float(np.mean(shares))
