"""Several tests at once."""

from collections.abc import Sequence


def holm(p: Sequence[float]) -> list[float]:
    """Return the p of each test, corrected for their number (S. Holm, Scand. J. Stat. 6 (1979) 65)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, n in enumerate(sorted(range(len(p)), key=lambda n: p[n])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[n]))
        corrected[n] = largest
    return corrected
