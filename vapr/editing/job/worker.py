"""The loop of one worker: take a unit, edit it, write its files, note it as done; and again, until nothing is left."""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vapr.editing.draft.editor import Draft, Editor, Tokens, Told
from vapr.editing.job.claim import LEASES, SHARDS, WAIT_SECONDS
from vapr.editing.job.folder import PAIRS, PLANS, REJECTS, RETRIED, Job, Unit
from vapr.editing.job.leases import Lease, take
from vapr.editing.job.pair_rows import pair_id, pair_row, plan_row, reject_row, write_lines, write_pairs
from vapr.editing.job.published import IDENTITIES, write_identities
from vapr.editing.job.set_aside import take_up
from vapr.errors import reason_kind
from vapr.progress import Display
from vapr.text import polarity

OVER_TARGET = "more than --target asked for"
DROPPED = "dropped in review"


def work(
    job: Job, editor: Editor, identity: Mapping[str, Any], *, target: int | None, retry_failed: bool, display: Display
) -> None:
    """Do every unit that is left, sharing them with other workers of the same folder.

    Args:
        job: the folder.
        editor: edits a unit's turns.
        identity: of the editor, for provenance.
        target: stop when so many pairs are accepted; None: when all turns are done.
        retry_failed: also do again what failed in an earlier start.
        display: shows progress.
    """

    def told(turns: int, what: str) -> None:
        if turns:
            display.advance(what, turns)
        elif what:
            display.note(what)

    units = job.units(retry_failed=retry_failed)
    while units and (target is None or job.accepted < target):
        waiting = []
        for unit in units:
            if target is not None and job.accepted >= target:
                return
            if not do_unit(job, editor, identity, unit, target, told, retry_failed=retry_failed):
                waiting.append(unit)
        units = [unit for unit in waiting if job.manifest(unit) is None]
        if units:
            display.note(f"waiting for {len(units)} shards that other workers hold")
            time.sleep(WAIT_SECONDS)


def do_unit(
    job: Job, editor: Editor, identity: Mapping[str, Any], unit: Unit, target: int | None,
    told: Told = lambda turns, what: None, *, retry_failed: bool = False,
) -> bool:  # fmt: skip
    """Do a unit unless it is done; False if another worker holds it, or has taken it away from this one."""
    if job.manifest(unit) is not None or (target is not None and job.accepted >= target):
        return True
    lease = take(job.folder / LEASES, unit.name)
    if lease is None:
        return False
    with lease:
        if job.manifest(unit) is None:  # not finished in the meantime
            _edit_unit(job, editor, identity, unit, lease, target, told, retry_failed)
    return job.manifest(unit) is not None


def _edit_unit(
    job: Job, editor: Editor, identity: Mapping[str, Any], unit: Unit, lease: Lease, target: int | None,
    told: Told, retry_failed: bool,
) -> None:  # fmt: skip
    """Edit the turns of one unit and write its pairs, rejects and plans, and last the manifest that says it is done."""
    began = time.monotonic()
    if unit.round == 0:
        drafts, tokens = editor.edit(job.turns_of(unit.shard), unit.name, told, job.published.read)
    else:
        drafts, tokens = _edit_again(job, editor, unit, told, retry_failed)
    for draft in drafts:
        if draft.status == "accepted" and job.verdicts.get(pair_id(draft, identity)) == "drop":
            draft.end("rejected", DROPPED)
    with _count_of_accepted(job, target):
        if not lease.held:
            return  # this process was taken for dead, and another one has the unit now
        remove_files(job, unit)
        if target is not None:
            _cut_to(drafts, target - job.accepted)
        files = _write_rows(job, identity, unit, drafts)
        seconds = time.monotonic() - began
        gpus = editor.llm.num_gpus if editor.llm is not None else 0
        job.write_manifest(_manifest(unit, drafts, tokens, seconds, gpus, lease.times_taken, files))


def _edit_again(
    job: Job, editor: Editor, unit: Unit, told: Told, retry_failed: bool
) -> tuple[list[Draft], Tokens]:  # fmt: skip
    """Plan anew what failed and what was lost with it; take up as it was what only the target was against.

    Where nothing failed, what has lost its partner stays lost unless --retry-failed asks: growing targets shall end
    with the pairs of one run without any.
    """
    rows = job.left_for(unit)
    kept = set() if retry_failed or any(row["status"] == "failed" for row in rows) else {"partner_lost"}
    again: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    for row in rows:
        (left if row["status"] in kept or row.get("as_it_was") else again).append(row)
    turns = job.turns_at([(row["row"], row["turn"]) for row in (*again, *left)])
    drafts, tokens = editor.edit(turns[: len(again)], unit.name, told, job.published.read) if again else ([], Tokens())
    drafts += take_up(left, turns[len(again) :], editor.categories, len(again))
    told(len(left), "")
    return drafts, tokens


@contextlib.contextmanager
def _count_of_accepted(job: Job, target: int | None) -> Iterator[None]:
    """With a target, only one worker at a time adds pairs: two would fill the same places."""
    if target is None:
        yield
        return
    while (lease := take(job.folder / LEASES, "target")) is None:
        time.sleep(WAIT_SECONDS / 10)
    with lease:
        yield


def _write_rows(job: Job, identity: Mapping[str, Any], unit: Unit, drafts: Sequence[Draft]) -> dict[str, str]:
    """The unit's files, each with its sha256."""
    files = {}
    for folder, lines in (
        (REJECTS, [reject_row(draft, drafts) for draft in drafts if draft.status != "accepted"]),
        (PLANS, [plan_row(draft, drafts) for draft in drafts if not draft.taken_up]),
    ):
        name = f"{folder}/part-{unit.name}.jsonl"
        files[name] = write_lines(job.folder / name, lines)
    rows = [pair_row(draft, identity, job.folder) for draft in drafts if draft.status == "accepted"]
    if rows:
        name = f"{PAIRS}/part-{unit.name}.parquet"
        files[name] = write_pairs(job.folder / name, rows)
    name = f"{IDENTITIES}/part-{unit.name}.npy"
    if digest := write_identities(job.folder / name, drafts):
        files[name] = digest
    return files


def remove_files(job: Job, unit: Unit) -> None:
    """Take away what a killed worker has left of a unit: parts that no manifest names, and halves of files.

    Where a deleted manifest has the shard made again, its later rounds go too, for they took up what this one had left;
    manifests first.
    """
    for folder in (SHARDS, PAIRS, REJECTS, PLANS, IDENTITIES):
        for file in (job.folder / folder).glob(f"*{unit.shard:05d}*"):
            found = Unit.named(file.name.removeprefix("part-").partition(".")[0])
            if found is not None and found.shard == unit.shard and found.round >= unit.round:
                file.unlink(missing_ok=True)


def remove_unfinished(job: Job) -> None:
    """Take away the pairs of units that are not finished and that nobody will finish now: a target is reached."""
    for part in (job.folder / PAIRS).glob("*"):
        unit = Unit.named(part.name.removeprefix("part-").partition(".")[0])
        if unit is not None and job.manifest(unit) is None and (lease := take(job.folder / LEASES, unit.name)):
            with lease:
                if job.manifest(unit) is None:
                    remove_files(job, unit)


def _manifest(
    unit: Unit, drafts: Sequence[Draft], tokens: Tokens, seconds: float, gpus: int, times_taken: int,
    files: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    by_category: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    polarities: dict[str, Counter[str]] = defaultdict(Counter)
    for draft in drafts:
        name = draft.plan.category.name if draft.plan.category else "none"
        by_category[name].update(["turns", draft.status])
        if draft.reason is not None:
            reasons[draft.status][reason_kind(draft.reason)] += 1
        if draft.status == "accepted" and draft.rejected is not None:
            said = polarity(draft.rejected)
            if said and {said, polarity(draft.turn.answer)} == {"yes", "no"}:
                polarities[draft.turn.source][f"rejected_{said}"] += 1
    decided_by = Counter("model" if draft.plan.decided_by.startswith("model ") else "rules" for draft in drafts)
    statuses = Counter(draft.status for draft in drafts)
    return {
        "unit": unit.name,
        "shard": unit.shard,
        "round": unit.round,
        "turns": len(drafts),
        "accepted": statuses["accepted"],
        "over_target": statuses["over_target"],
        "to_retry": sum(statuses[status] for status in RETRIED),
        "reasons": {status: dict(counts.most_common()) for status, counts in sorted(reasons.items())},
        "categories": {name: dict(counts) for name, counts in sorted(by_category.items())},
        "polarity": {source: dict(counts) for source, counts in sorted(polarities.items())},
        "decided_by": dict(decided_by),
        "tokens": {"prompt": tokens.prompt, "cached": tokens.cached, "generated": tokens.generated},
        "seconds": round(seconds, 3),
        "num_gpus": gpus,
        "times_taken": times_taken,
        "files": dict(files),
    }


def _cut_to(drafts: Sequence[Draft], most: int) -> None:
    """Keep ``most`` accepted drafts; those that traded values with one another stay or go together where they can.

    What is cut keeps its edits: the reject row holds them. First comes a half whose other half an odd target has taken.
    """
    accepted = [number for number, draft in enumerate(drafts) if draft.status == "accepted"]
    if len(accepted) <= most:
        return
    accepted.sort(key=lambda number: all(trade.partner is not None for trade in drafts[number].plan.trades))
    kept: set[int] = set()
    for number in accepted:
        group = _traders(number, drafts)
        if number not in kept and len(kept) + len(group) <= most:
            kept |= group
    for number in accepted:  # an odd place left is filled all the same: the target is a number of pairs
        if len(kept) < most:
            kept.add(number)
    for number in accepted:
        if number not in kept:
            drafts[number].status, drafts[number].reason = "over_target", OVER_TARGET


def _traders(number: int, drafts: Sequence[Draft]) -> set[int]:
    """A turn, those it trades with, those they trade with, and so on."""
    group, waiting = {number}, [number]
    while waiting:
        for trade in drafts[waiting.pop()].plan.trades:
            if trade.partner is not None and trade.partner.turn not in group:
                group.add(trade.partner.turn)
                waiting.append(trade.partner.turn)
    return group
