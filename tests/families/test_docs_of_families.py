"""docs/families.md and README name every family and no other, and README says of each what its code says."""

import importlib.util
import re
from pathlib import Path

from vapr.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"


def test_every_family_has_a_row():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)`", row)[-1] for row in rows[1 : rows.index(" `gemma3` ") + 1]]  # the first is the head
    assert sorted(named) == sorted(FAMILIES)


def test_the_table_in_the_readme_is_current():
    spec = importlib.util.spec_from_file_location("family_table", ROOT / "scripts" / "family_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = script.render()
    assert script.replace_block(text, table) == text, "run python scripts/family_table.py --write README.md"
    assert all(f"(`{family}`)" in table for family in FAMILIES)
