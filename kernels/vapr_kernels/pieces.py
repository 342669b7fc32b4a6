"""Rows that are worked on a piece at a time, because what is made of them is wide."""


def piece_rows(num_rows: int, most: int, multiple_of: int) -> int:
    """Return how many rows a piece has: at most ``most``, and as many in each of as few pieces as that allows.

    It is a multiple of ``multiple_of``, and so at least that, even where ``most`` is less.
    """
    most = max(most // multiple_of, 1) * multiple_of
    num_pieces = max(-(-num_rows // most), 1)
    return max(-(-num_rows // (num_pieces * multiple_of)), 1) * multiple_of
