"""People's verdicts on the pairs of an edit job: what they drop leaves the pairs, and does not come back."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.editing.job import PAIRS, VERDICTS, Job
from vapr.editing.pair_rows import read_table, write_table
from vapr.intervals import wilson
from vapr.verdicts import read_verdicts


def take_verdicts(job: Job, file: Path) -> int:
    """Remember the verdicts of a review page in the job's folder, and take dropped pairs out of its parts.

    A pair that is edited again later, by this job or in a new folder with the same settings, has the same id and is
    dropped again.

    Returns:
        How many pairs were taken out.

    Raises:
        UserError: naming file and line, if a verdict cannot be read.
    """
    verdicts = {**job.verdicts, **read_verdicts(file)}
    with written_whole(job.folder / VERDICTS) as stream:  # first: whatever is written from now on leaves them out
        for id, verdict in verdicts.items():
            stream.write(json.dumps({"id": id, "verdict": verdict}, ensure_ascii=False).encode() + b"\n")
    job.verdicts = verdicts
    return sum(_take_out(part, verdicts) for part in sorted((job.folder / PAIRS).glob("*.parquet")))


def _take_out(part: Path, verdicts: Mapping[str, str]) -> int:
    table = read_table(part)
    kept = [verdicts.get(id) != "drop" for id in table.column("id").to_pylist()]
    if all(kept):
        return 0
    write_table(part, table.filter(kept))
    return len(kept) - sum(kept)


def review(job: Job) -> dict[str, Any] | None:
    """Counts of the verdicts, and a 95 % interval for the share of pairs whose rejected answer is truly wrong."""
    if not job.verdicts:
        return None
    counts = Counter(job.verdicts.values())
    low, high = wilson(counts["keep"] / len(job.verdicts), len(job.verdicts))
    return {"kept": counts["keep"], "dropped": counts["drop"], "low": round(low, 4), "high": round(high, 4)}
