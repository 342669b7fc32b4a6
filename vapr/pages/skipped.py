"""What a run left out, grouped by reason."""

import html
import json
from pathlib import Path

from vapr.errors import reason_kind

MAX_PLACES = 50
MAX_REASONS = 40


def skipped_section(path: Path) -> str:
    """The pairs that a skipped.json lists (place in the file -> reason), most frequent reason first."""
    head = "<h2>What was skipped</h2>"
    try:
        reasons = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        reasons = {}
    except (OSError, ValueError):
        reasons = None
    if not isinstance(reasons, dict):
        return f"{head}<p>skipped.json cannot be read.</p>"
    if not reasons:
        return f"{head}<p>Nothing was skipped.</p>"
    groups: dict[str, list[tuple[str, str]]] = {}
    for place, reason in reasons.items():
        bare = str(reason).removeprefix(f"{place}: ")
        groups.setdefault(reason_kind(bare), []).append((place, bare))
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    rest = sum(len(places) for _, places in ranked[MAX_REASONS:])
    more = f"<p>{rest:,} more, of {len(ranked) - MAX_REASONS:,} other kinds.</p>" if rest else ""
    shown = "".join(_reason(kind, places) for kind, places in ranked[:MAX_REASONS])
    counted = f"{len(reasons):,} pair{'' if len(reasons) == 1 else 's'}, by reason (open one for the places):"
    return f'{head}<p>{counted}</p><div class="box skipped">{shown}{more}</div>'


def _reason(kind: str, places: list[tuple[str, str]]) -> str:
    # A reason of its own reads better with its names and numbers.
    title = places[0][1] if len({reason for _, reason in places}) == 1 else kind
    items = "".join(f"<li>{html.escape(place)}: {html.escape(reason)}</li>" for place, reason in places[:MAX_PLACES])
    more = f"<li>and {len(places) - MAX_PLACES:,} more in skipped.json</li>" if len(places) > MAX_PLACES else ""
    return f"<details><summary><b>{len(places):,}</b> x {html.escape(title)}</summary><ul>{items}{more}</ul></details>"
