"""Read the verdicts of people: which pairs to keep and which to drop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vapr.data.annotated import Verdict, read_annotated
from vapr.data.annotation import RECORDS
from vapr.errors import UserError, one_line
from vapr.yaml_file import read_text


def _tell_nobody(line: str) -> None:
    """Do nothing: vapr's own files have a verdict in each line."""


def read_verdicts(path: str | Path, say: Callable[[str], None] = _tell_nobody) -> dict[str, Verdict]:
    """Return the verdict of each id in what a review page, Label Studio or Argilla exported.

    A review page writes one JSON object a line. Later lines replace earlier ones of the same id, so the files of
    several sittings can be joined end to end. Keys other than ``id`` and ``verdict`` mean nothing here; blank lines are
    skipped.

    Args:
        path: a file; or the folder that Argilla's ``Dataset.to_disk`` wrote.
        say: shows a line on what people were asked and have not decided.

    Raises:
        UserError: naming the file and, of a review page, the line.
    """
    if Path(path).is_dir():
        path = Path(path) / RECORDS
    text = read_text(path, f"verdicts: {path}")
    if text.lstrip().startswith("["):
        annotated = read_annotated(text, str(path))
        if (told := annotated.told()) is not None:
            say(f"{path}: {told}")
        return annotated.verdicts
    verdicts: dict[str, Verdict] = {}
    for number, line in enumerate(text.split("\n"), start=1):
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
