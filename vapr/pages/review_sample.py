"""Chooses the pairs of a review, all of them or a sample by category, and writes its page."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.pages.review import Choice, write_review
from vapr.progress import Display

LARGEST_WHOLE = 1_000
"""Pairs up to which a page shows all of them, and pairs of a sample whose size is not given."""

LEAST_PER_CATEGORY = 30
"""Pairs of a category in a sample, where it has so many and the sample has room: fewer say next to nothing."""


def view(pairs: Pairs, out: Path, *, sample: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write a page on which a person keeps or drops pairs. Rows that are no pair are left out and counted.

    Args:
        pairs: what to review; every row is read once.
        out: the page, .html; an older one is replaced.
        sample: how many pairs to draw, category by category; None: all of up to 1,000 pairs, else 1,000.
        seed: of the drawing and of the order on the page.

    Returns:
        ``pairs``, ``of``, ``categories`` (name: shown, of), ``pictures``, ``unreadable``, ``skipped``, ``bytes``.

    Raises:
        UserError: if there is no pair to show, or the page cannot be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"{out}: a page is written as .html")
    rows = _rows_by_category(pairs)
    sizes = {name: len(members) for name, members in rows.items()}
    total = sum(sizes.values())
    if total == 0:
        raise UserError(f"{out}: no pair to show; the first row: {next(iter(pairs.skipped.values()))}")
    wanted = min(sample or LARGEST_WHOLE, total)
    parts = shares(sizes, wanted)
    random = np.random.default_rng(seed)
    drawn = [random.choice(members, parts[name], replace=False) for name, members in rows.items()]
    order = random.permutation(np.concatenate(drawn)).tolist()
    choice = Choice(sizes=sizes, drawn=parts, seed=seed, skipped=dict(pairs.skipped))
    counts = write_review(out, pairs, order, choice)
    categories = {name: {"shown": parts[name], "of": size} for name, size in sizes.items()}
    return {
        "pairs": wanted, "of": total, "categories": categories, **counts, "skipped": dict(pairs.skipped),
        "bytes": out.stat().st_size,
    }  # fmt: skip


def show(result: dict[str, Any], formats: list[str], out: Path) -> str:
    """Return the result of :func:`view` as text."""
    lines = [f"read       {line}" for line in formats]
    counted = f"{result['pairs']:,} of {result['of']:,} pairs, {result['pictures']:,} pictures"
    lines.append(f"wrote      {out} ({counted}, {result['bytes'] / 2**20:.1f} MiB)")
    if result["pairs"] < result["of"]:
        parts = [f"{name or 'no category'} {n['shown']:,} of {n['of']:,}" for name, n in result["categories"].items()]
        lines.append(f"sample     by category: {', '.join(parts)}")
    if result["unreadable"]:
        lines.append(f"unreadable {result['unreadable']:,} pictures; the page names them")
    if skipped := result["skipped"]:
        lines.append(f"skipped    {len(skipped):,} rows; the first: {next(iter(skipped.values()))}")
    return "\n".join(lines)


def _rows_by_category(pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the row numbers (int64) of each category, by name; pairs without a category are under ''."""
    names: dict[str, int] = {}
    codes = np.full(len(pairs), -1, np.int32)
    with Display("read", len(pairs), unit="row") as display:
        for number in range(len(pairs)):
            pair = pairs.read(number)
            if isinstance(pair, PreferencePair):
                codes[number] = names.setdefault(pair.category or "", len(names))
            if (number + 1) % 1000 == 0:
                display.advance("", 1000)
    return {name: np.flatnonzero(codes == names[name]) for name in sorted(names)}


def shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Return how many of ``total`` pairs to draw from each category.

    In proportion to its size, but at least :data:`LEAST_PER_CATEGORY` (or all it has, or an equal part of ``total`` if
    that is less). What the small ones get beyond their share is taken from the others in proportion.

    Args:
        sizes: pairs of each category, at least 1.
        total: pairs in all, at most the sum of ``sizes``.
    """
    floor = {name: min(size, LEAST_PER_CATEGORY, total // len(sizes)) for name, size in sizes.items()}
    fixed: dict[str, int] = {}
    while True:
        free = {name: size for name, size in sizes.items() if name not in fixed}
        left = total - sum(fixed.values())
        ideal = {name: left * size / sum(free.values()) for name, size in free.items()}
        if not (small := [name for name in free if ideal[name] < floor[name]]):
            break
        fixed |= {name: floor[name] for name in small}
    parts = Counter({name: int(value) for name, value in ideal.items()})
    for name in sorted(ideal, key=lambda name: parts[name] - ideal[name])[: left - sum(parts.values())]:
        parts[name] += 1  # the largest remainders
    return {name: fixed.get(name, parts[name]) for name in sizes}
