"""People's verdicts on the pairs of an edit job: what they drop leaves the pairs, and does not come back."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.data.review_verdicts import read_verdicts
from vapr.editing.job.claim import SHARDS
from vapr.editing.job.folder import PAIRS, VERDICTS, Job
from vapr.editing.job.pair_rows import digest_of, read_table, write_table
from vapr.intervals import wilson


def apply_verdicts(job: Job, file: Path, say: Callable[[str], None]) -> None:
    """Remember people's verdicts in the job's folder, and take dropped pairs out of its parts.

    A pair that is edited again later, by this job or in a new folder with the same settings, has the same id and is
    dropped again.

    Args:
        job: the folder.
        file: the verdicts.
        say: shows a line on tasks without a verdict, and on verdicts of pairs that are not there.

    Raises:
        UserError: naming file and line, if a verdict cannot be read.
    """
    new = read_verdicts(file, say)
    parts = [(manifest, name) for manifest in job.manifests() for name in manifest["files"] if name.startswith(PAIRS)]
    unknown = new.keys() - job.verdicts.keys()
    for _, name in parts:
        unknown -= set(read_table(job.folder / name, ["id"]).column("id").to_pylist())
    if unknown:
        first = f"the first: '{min(unknown):.60}'"
        say(f"{file}: {len(unknown):,} of its ids match no pair that the job has made so far ({first})")
    verdicts = {**job.verdicts, **new}
    with written_whole(job.folder / VERDICTS) as stream:  # first: whatever is written from now on leaves them out
        for id, verdict in verdicts.items():
            stream.write(json.dumps({"id": id, "verdict": verdict}, ensure_ascii=False).encode() + b"\n")
    job.verdicts = verdicts
    for manifest, name in parts:
        _drop_pairs(job, manifest, name)


def _drop_pairs(job: Job, manifest: dict[str, Any], name: str) -> None:
    part = job.folder / name
    for half in (*part.parent.glob(f"{part.name}.*"), *(job.folder / SHARDS).glob(f"{manifest['unit']}.json.*")):
        half.unlink(missing_ok=True)  # of a review that was killed
    table = read_table(part)
    kept = [job.verdicts.get(id) != "drop" for id in table.column("id").to_pylist()]
    if all(kept):
        return

    def note(digest: str) -> None:
        # Before the part is replaced: whoever is killed in between leaves one that is as the manifest says, either way.
        manifest["files"][name], manifest["reviewed"] = digest_of(part), {name: digest}
        job.write_manifest(manifest)

    write_table(part, table.filter(kept), before_it_appears=note)


def count_verdicts(job: Job) -> dict[str, Any] | None:
    """Count the verdicts, with a 95 % interval for the share of pairs whose rejected answer is truly wrong."""
    if not job.verdicts:
        return None
    counts = Counter(job.verdicts.values())
    low, high = wilson(counts["keep"] / len(job.verdicts), len(job.verdicts))
    return {"kept": counts["keep"], "dropped": counts["drop"], "low": round(low, 4), "high": round(high, 4)}
