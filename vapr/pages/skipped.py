"""The pairs that a run left out, grouped by reason."""

import json
from pathlib import Path
from typing import NamedTuple

from vapr.errors import reason_kind

MAX_PLACES = 50
MAX_REASONS = 40


class Reason(NamedTuple):
    """Pairs that were left out for one kind of reason; ``places`` lists the first of them, with the exact reason."""

    title: str
    total: int
    places: list[tuple[str, str]]

    @property
    def rest(self) -> int:
        """Number of pairs that are not listed."""
        return self.total - len(self.places)


class Skipped(NamedTuple):
    """All pairs that were left out: ``groups`` are the most frequent reasons, ``rest`` pairs have other ones."""

    total: int
    groups: list[Reason]
    rest: int
    other_kinds: int


def read_skipped(path: Path) -> Skipped | None:
    """Read a skipped.json (place in the file -> reason). None means that it cannot be read; no file is no pair."""
    try:
        reasons = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        reasons = {}
    except (OSError, ValueError):
        return None
    if not isinstance(reasons, dict):
        return None
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for place, reason in reasons.items():
        bare = str(reason).removeprefix(f"{place}: ")
        by_kind.setdefault(reason_kind(bare), []).append((place, bare))
    groups = [
        # A reason that is always the same reads better with its names and numbers.
        Reason(places[0][1] if len({one for _, one in places}) == 1 else kind, len(places), places[:MAX_PLACES])
        for kind, places in sorted(by_kind.items(), key=lambda group: -len(group[1]))
    ]
    rest = sum(group.total for group in groups[MAX_REASONS:])
    return Skipped(len(reasons), groups[:MAX_REASONS], rest, len(groups) - MAX_REASONS)
