"""Questions that count only together: all of one picture, one question on two pictures, a group of four."""

from collections.abc import Callable, Hashable, Sequence

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Row
from vapr.evaluation.scoring.figures import Figure, numbered, share


def grouped(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """Return the rows of each group, in their order."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def all_right(groups: Sequence[Sequence[Row]], cluster: Callable[[Row], Hashable]) -> Figure:
    """Return the share of groups that are all answered right; ``cluster`` is what groups stand or fall with."""
    right = [all(row.right == 1 for row in group) for group in groups]
    return share(right, numbered([cluster(group[0]) for group in groups]))


def refuse_parts(groups: dict[Hashable, list[Row]], size: int, title: str, what: str) -> None:
    """Refuse groups with fewer or more questions than they have.

    Raises:
        UserError: naming the first such group.
    """
    for name, group in groups.items():
        if len(group) != size:
            raise UserError(
                f"{title}: {what} '{name}' has {len(group)} of its {size} answers, and they count only together; "
                "finish the run, or score whole groups with --partial"
            )
