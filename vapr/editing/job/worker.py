"""One worker of a job: takes a unit, edits it, writes its files and its manifest, and so on until nothing is left."""

import contextlib
import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vapr.editing.draft.asker import Tokens
from vapr.editing.draft.draft import Draft
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.judges import JUDGE
from vapr.editing.draft.picture_editor import PictureEditor
from vapr.editing.job.claim import LEASES, WAIT_SECONDS
from vapr.editing.job.folder import CANDIDATES, PAIRS, PLANS, REJECTS, RETRIED, Job, Unit
from vapr.editing.job.identities import IDENTITIES, write_identities
from vapr.editing.job.leases import Lease, take
from vapr.editing.job.over_target import cut_to, restore_drafts
from vapr.editing.job.pair_rows import candidate_rows, pair_id, pair_row, plan_row, reject_row, write_lines, write_pairs
from vapr.editing.job.start import Start
from vapr.editing.rules.turns import Turn
from vapr.errors import reason_kind
from vapr.interrupts import Stopped
from vapr.llm.request import BatchUnderWay
from vapr.progress import Display
from vapr.text import polarity

DROPPED = "dropped in review"
LATER = 75
"""The exit code of a command that is to be run again later: EX_TEMPFAIL of sysexits.h."""
LINES_SHOWN = 3


class Worker:
    """A process that edits units of a job, beside other workers on the same folder.

    Args:
        start: what is to be done.
        job: the folder.
        editor: edits the turns of a unit.
        display: shows progress.
    """

    def __init__(self, start: Start, job: Job, editor: Editor | PictureEditor, display: Display) -> None:
        self.start, self.job, self.editor, self.display = start, job, editor, display
        self._at_server: dict[Unit, Sequence[str]] = {}

    def work(self) -> None:
        """Edit what is left until the target is reached, and wait for the units that other workers hold.

        Raises:
            Stopped: if nothing is left but what the server's batches are to bring.
        """
        left = self.job.units_left(retry_failed=self.start.retry_failed)
        while left:
            left = [unit for unit in left if not self._finish(unit) and unit not in self._at_server]
            if left:
                self.display.note(f"waiting for {len(left)} shards that other workers hold")
                time.sleep(WAIT_SECONDS)
        if self._at_server and not self._target_is_reached():
            raise batches_under_way([line for lines in self._at_server.values() for line in lines])

    def _finish(self, unit: Unit) -> bool:
        """Edit a unit unless that is done or not needed; return False if another worker has it."""
        if self.job.is_finished(unit) or self._target_is_reached():
            return True
        lease = take(self.job.folder / LEASES, unit.name)
        if lease is not None:
            with lease:
                if not self.job.is_finished(unit):  # in the meantime
                    try:
                        self._edit(unit, lease)
                    except BatchUnderWay as batches:
                        self._at_server[unit] = batches.lines
        return self.job.is_finished(unit)

    def _target_is_reached(self) -> bool:
        return self.start.target is not None and self.job.accepted >= self.start.target

    def _edit(self, unit: Unit, lease: Lease) -> None:
        """Edit the turns of one unit and write its pairs, rejects and plans, and last the manifest."""
        began = time.monotonic()
        if unit.round == 0:
            drafts, tokens = self._edit_turns(self.job.turns_of(unit.shard), unit)
        else:
            drafts, tokens = self._edit_again(unit)
        for draft in drafts:
            if draft.status == "accepted" and self.job.verdicts.get(pair_id(draft, self.editor.identity)) == "drop":
                draft.end("rejected", DROPPED)
        with self._alone_at_the_target():
            if not lease.held:
                return  # this process was taken for dead, and another one has the unit now
            self.job.remove_files(unit)
            if self.start.target is not None:
                cut_to(drafts, self.start.target - self.job.accepted)
            files = self._write_rows(unit, drafts)
            self.job.write_manifest({
                "unit": unit.name, "shard": unit.shard, "round": unit.round,
                **_counts(drafts),
                "tokens": _total(tokens),
                "models": {name: dataclasses.asdict(of_model) for name, of_model in tokens.items()},
                "seconds": round(time.monotonic() - began, 3),
                "num_gpus": self.editor.mix.num_gpus if self.editor.mix is not None else 0,
                "times_taken": lease.times_taken,
                "files": files,
            })  # fmt: skip
        if (
            isinstance(self.editor, Editor) and self.editor.note_counted is not None
        ):  # last: whoever is killed before counts it once all the same
            self.editor.note_counted(self._asked_for(unit))

    def _edit_turns(self, turns: Sequence[Turn], unit: Unit) -> tuple[list[Draft], dict[str, Tokens]]:
        how = (turns, unit.name, self.display, self.job.identities.read, unit.round)
        return (
            self.editor.edit(*how, self._asked_for(unit)) if isinstance(self.editor, Editor) else self.editor.edit(*how)
        )

    def _asked_for(self, unit: Unit) -> str:
        """Return who pays for the replies of a unit; of a job that an older version began, nobody knows."""
        return f"{self.job.id} {unit.name}" if self.job.id else ""

    def _edit_again(self, unit: Unit) -> tuple[list[Draft], dict[str, Tokens]]:
        """Edit anew what failed and what was lost with it, and restore what only the target was against.

        Where nothing failed, what has lost its partner stays lost unless --retry-failed asks: growing targets shall end
        with the pairs of one run without any.
        """
        rows = self.job.left_for(unit)
        retry_lost = self.start.retry_failed or any(row["status"] == "failed" for row in rows)
        to_edit: list[dict[str, Any]] = []
        to_restore: list[dict[str, Any]] = []
        for row in rows:
            stays = row.get("as_it_was") or (row["status"] == "partner_lost" and not retry_lost)
            (to_restore if stays else to_edit).append(row)
        turns = self.job.turns_at([(row["row"], row["turn"]) for row in (*to_edit, *to_restore)])
        edited, tokens = self._edit_turns(turns[: len(to_edit)], unit) if to_edit else ([], {})
        restored = restore_drafts(to_restore, turns[len(to_edit) :], self.editor.categories, len(to_edit))
        if restored:
            self.display.advance("", len(restored))
        return edited + restored, tokens

    @contextlib.contextmanager
    def _alone_at_the_target(self) -> Iterator[None]:
        """With a target, let only one worker at a time add pairs: two would fill the same places."""
        if self.start.target is None:
            yield
            return
        while (lease := take(self.job.folder / LEASES, "target")) is None:
            time.sleep(WAIT_SECONDS / 10)
        with lease:
            yield

    def _write_rows(self, unit: Unit, drafts: Sequence[Draft]) -> dict[str, str]:
        """Write the unit's files; return the sha256 of each."""
        folder, files = self.job.folder, {}
        rejects = [reject_row(draft, drafts) for draft in drafts if draft.status != "accepted"]
        plans = [plan_row(draft, drafts) for draft in drafts if not draft.restored]
        kinds = {REJECTS: rejects, PLANS: plans}
        if self.job.config.ask.candidates > 1:
            kinds[CANDIDATES] = [row for draft in drafts for row in candidate_rows(draft)]
        for kind, rows in kinds.items():
            name = f"{kind}/part-{unit.name}.jsonl"
            files[name] = write_lines(folder / name, rows)
        pairs = [pair_row(draft, self.editor.identity, folder) for draft in drafts if draft.status == "accepted"]
        if pairs:
            name = f"{PAIRS}/part-{unit.name}.parquet"
            files[name] = write_pairs(folder / name, pairs)
        name = f"{IDENTITIES}/part-{unit.name}.npy"
        if digest := write_identities(folder / name, drafts):
            files[name] = digest
        return files


def batches_under_way(lines: Sequence[str]) -> Stopped:
    """Return the exception that ends the command until a server has answered batches."""
    shown = "; ".join(lines[:LINES_SHOWN]) + (f"; {len(lines) - LINES_SHOWN:,} more" if lines[LINES_SHOWN:] else "")
    return Stopped(f"{len(lines):,} batches are at the server; the same command takes what has come ({shown})", LATER)


def _total(tokens: Mapping[str, Tokens]) -> dict[str, int]:
    kinds = ("prompt", "cached", "generated")
    return {kind: sum(getattr(of_model, kind) for of_model in tokens.values()) for kind in kinds}


def _counts(drafts: Sequence[Draft]) -> dict[str, Any]:
    """Count how the drafts of a unit have ended, for its manifest."""
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    polarities: dict[str, Counter[str]] = defaultdict(Counter)
    editors: dict[str, Counter[str]] = defaultdict(Counter)
    for draft in drafts:
        if draft.editor is not None:
            editors[draft.editor].update(["turns", draft.status])
        name = draft.plan.category.name if draft.plan.category else "none"
        categories[name].update(["turns", draft.status])
        if draft.reason is not None:
            reasons[draft.status][reason_kind(draft.reason)] += 1
        if draft.status == "accepted" and draft.rejected is not None:
            said = polarity(draft.rejected)
            if said and {said, polarity(draft.turn.answer)} == {"yes", "no"}:
                polarities[draft.turn.source][f"rejected_{said}"] += 1
    statuses = Counter(draft.status for draft in drafts)
    candidates = [candidate for draft in drafts for candidate in draft.candidates]
    points = [verdict for candidate in candidates for verdict in candidate.verdicts if verdict.name == JUDGE]
    return {
        "turns": len(drafts),
        "accepted": statuses["accepted"],
        "over_target": statuses["over_target"],
        "to_retry": sum(statuses[status] for status in RETRIED),
        "reasons": {status: dict(counts.most_common()) for status, counts in sorted(reasons.items())},
        "categories": {name: dict(counts) for name, counts in sorted(categories.items())},
        "polarity": {source: dict(counts) for source, counts in sorted(polarities.items())},
        "decided_by": dict(
            Counter("model" if draft.plan.decided_by.startswith("model ") else "rules" for draft in drafts)
        ),
        "editors": {name: dict(counts) for name, counts in sorted(editors.items())},
        "candidates": dict(Counter(candidate.status for candidate in candidates).most_common()),
        "judge": {"replies": len(points), "no_points": sum(verdict.value is None for verdict in points)},
    }
