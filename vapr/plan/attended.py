"""How many (query, key) attend in a pack, of those that attention is handed."""

from collections import Counter
from collections.abc import Iterable, Sequence


def attended(
    lengths_q: Sequence[int], lengths_k: Sequence[int], both_ways: Sequence[bool] | None, windows: Iterable[int | None]
) -> int:
    """Count the (query, key) that attend, over all layers.

    Args:
        lengths_q: queries of each sequence; they are the last of its tokens.
        lengths_k: its keys.
        both_ways: of each sequence, whether its queries see later ones; None: none does.
        windows: of each layer, how many keys up to its own a query sees; None: all.
    """
    sequences = list(zip(lengths_q, lengths_k, both_ways or [False] * len(lengths_q), strict=True))
    return sum(
        layers * sum(_up_to_its_own(q, k, window) + both * q * (q - 1) // 2 for q, k, both in sequences)
        for window, layers in Counter(windows).items()
    )


def _up_to_its_own(q: int, k: int, window: int | None) -> int:
    """Sum the keys that each of the last ``q`` of ``k`` tokens sees of itself and those before it."""
    if window is None or window >= k:
        return q * k - q * (q - 1) // 2
    fewer = max(window - (k - q), 0)  # queries so near to the beginning that they see less than a window
    return q * window - fewer * (fewer - 1) // 2
