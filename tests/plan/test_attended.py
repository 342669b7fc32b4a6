"""Counted (query, key) against masks that are written out."""

import pytest
import torch

from vapr.plan.attended import attended


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 40])
@pytest.mark.parametrize("both", [False, True])
def test_those_that_attend_are_those_of_the_mask(window, both):
    lengths = [(1, 1), (4, 4), (3, 7), (7, 7), (2, 12), (5, 6), (6, 20)]
    seen = 0
    for q, k in lengths:
        query, key = torch.arange(k - q, k)[:, None], torch.arange(k)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        seen += int((mask | (both & (key >= k - q) & (key > query))).sum())
    windows = [window, window, None]
    whole = attended(*zip(*lengths, strict=True), [both] * len(lengths), [None])
    assert attended(*zip(*lengths, strict=True), [both] * len(lengths), windows) == 2 * seen + whole
    assert whole == sum(q * k - (not both) * q * (q - 1) // 2 for q, k in lengths)
