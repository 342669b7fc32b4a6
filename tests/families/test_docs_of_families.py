"""docs/families.md names every family, and no other."""

import re
from pathlib import Path

from vapr.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_every_family_has_a_row():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)`", row)[-1] for row in rows[1 : rows.index(" `gemma3` ") + 1]]  # the first is the head
    assert sorted(named) == sorted(FAMILIES)
