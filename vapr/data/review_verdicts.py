"""Read the verdicts of a review: which pairs to keep and which to drop."""

import json
from pathlib import Path
from typing import Any, Literal

from vapr.errors import UserError, one_line
from vapr.yaml_file import read_text

Verdict = Literal["keep", "drop"]


def read_verdicts(path: str | Path) -> dict[str, Verdict]:
    """Return the verdict of each id in a file that a review page exported, one JSON object a line.

    Later lines replace earlier ones of the same id, so the files of several sittings can be joined end to end. Keys
    other than ``id`` and ``verdict`` mean nothing here; blank lines are skipped.

    Raises:
        UserError: naming file and line.
    """
    verdicts: dict[str, Verdict] = {}
    for number, line in enumerate(read_text(path, f"verdicts: {path}").split("\n"), start=1):
        if line.strip():
            verdicts.update([_verdict(line, f"{path}:{number}")])
    return verdicts


def _verdict(line: str, where: str) -> tuple[str, Verdict]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({one_line(error)}); export the verdicts again") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UserError(f"{where}: a verdict needs an 'id' that is text, got {line:.60}")
    if row.get("verdict") not in ("keep", "drop"):
        raise UserError(f"{where}: 'verdict' of '{row['id']}' must be keep or drop, got {row.get('verdict')!r:.40}")
    return row["id"], row["verdict"]
