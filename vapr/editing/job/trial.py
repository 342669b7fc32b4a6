"""A trial of an edit job: some rows, edited and shown, of which nothing is written."""

import random
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any

from vapr.data.pair import Edit
from vapr.editing.draft.draft import Draft
from vapr.editing.job.scan import DUPLICATE, RowReader, unreadable_images
from vapr.editing.job.start import Start, check_model_names, open_editor
from vapr.editing.job.summary import list_commands, list_reasons
from vapr.editing.job.worker import batches_under_way
from vapr.editing.rules.turns import InstructionData, Turn
from vapr.errors import UserError, reason_kind
from vapr.interrupts import stopped_at_once
from vapr.llm.request import BatchUnderWay
from vapr.progress import Display


def trial(start: Start, limit: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Edit about so many rows, drawn by the job's seed, as one shard.

    Args:
        start: the job whose settings are tried; its folder is neither read nor written.
        limit: the number of rows to draw.
        say: shows a line about rows that cannot be read.

    Returns:
        ``rows``, ``answers`` (a mapping for each, see :func:`_describe`), and counts as in a job's ledger.

    Raises:
        UserError: if there is nothing to edit in those rows, and for everything that a job is stopped by.
        Stopped: after a signal.
    """
    if given := [name for name in ("target", "retry_failed", "ray", "verdicts", "push_to") if getattr(start, name)]:
        raise UserError(f"--limit: a trial has no --{given[0].replace('_', '-')}; leave one of them out")
    check_model_names(start)
    with stopped_at_once(lambda: "a trial keeps nothing"):
        data = InstructionData(start.source, start.config.source)
        rows = sorted(random.Random(start.config.seed).sample(range(len(data)), min(limit, len(data))))
        reader = RowReader(data, start.config)
        turns, filtered = _read(reader, rows)
        unreadable = _unreadable(reader, len(rows))
        if not turns:
            why = unreadable or [f"{count:,} x {reason}" for reason, count in filtered.most_common()]
            raise UserError(f"{start.source}: nothing to edit in {len(rows):,} rows: {'; '.join(why)}")
        for line in unreadable:
            say(line)
        with open_editor(start, keep=False) as editor, Display("edit", len(turns), unit="answer") as display:
            try:
                drafts, _ = editor.edit(turns, "trial", display)
            except BatchUnderWay as batches:
                raise batches_under_way(batches.lines) from None
        no_pair = Counter(reason_kind(draft.reason) for draft in drafts if draft.reason)
        return {
            "rows": len(rows),
            "filtered": dict(filtered.most_common()),
            "accepted": sum(draft.status == "accepted" for draft in drafts),
            "reasons": dict(no_pair.most_common()),
            "answers": [_describe(draft) for draft in drafts],
        }


def _read(reader: RowReader, rows: list[int]) -> tuple[list[Turn], Counter[str]]:
    """Return the turns to edit, and how often others are left out for which reason."""
    turns: dict[str, Turn] = {}
    filtered: Counter[str] = Counter()
    for row in rows:
        for turn, reason in reader.read(row):
            if reason is None and turn.digest() in turns:
                reason = DUPLICATE
            if reason is None:
                turns[turn.digest()] = turn
            else:
                filtered[reason] += 1
    bad_images = reader.bad_images
    filtered += Counter({"row cannot be read": reader.bad_rows - bad_images, "image cannot be read": bad_images})
    return list(turns.values()), filtered


def _unreadable(reader: RowReader, rows: int) -> list[str]:
    images = unreadable_images(rows, reader.bad_images, reader.first_bad_image)
    lines = [images] if images else []
    if others := reader.bad_rows - reader.bad_images:
        lines.append(f"{others:,} rows cannot be read; the first: {reader.first_other}")
    return lines


def _describe(draft: Draft) -> dict[str, Any]:
    plan = draft.plan
    return {
        "place": draft.turn.where,
        "category": plan.category.name if plan.category else None,
        "decided_by": plan.decided_by,
        "editor": "model" if plan.ask else "rules",
        "model": draft.model if plan.ask else None,
        "question": draft.turn.question,
        "chosen": draft.turn.answer,
        "rejected": draft.rejected,
        "picture": _picture_shown(draft) if draft.picture is not None else None,
        "edits": [[edit.start, edit.end, edit.to] for edit in draft.edits],
        "status": draft.status,
        "reason": draft.reason,
        "candidates": [[candidate.status, candidate.raw] for candidate in draft.candidates],
    }


def _picture_shown(draft: Draft) -> str:
    [verdict] = draft.verdicts
    changed = f": {verdict.value:.1%} {verdict.note}" if verdict.value is not None else f"; {verdict.note}"
    return f"{draft.why[0]}{changed}"


Paint = Callable[..., str]
"""Gives a text the colour ``fg`` on a terminal, as :func:`click.style` does."""


def show(result: dict[str, Any], start: Start, paint: Paint) -> str:
    """Return the trial as text: each answer with its words before and after, then counts and what comes next."""
    lines = [line for answer in result["answers"] for line in _answer_lines(answer, paint)]
    counted = f"{result['rows']:,} rows, {len(result['answers']):,} answers to edit; nothing was written"
    lines += ["", f"{'trial':<12}{counted}", f"{'accepted':<12}{result['accepted']:,} pairs"]
    lines += list_reasons("left out", result["filtered"]) + list_reasons("no pair", result["reasons"])
    job = f"vapr edit {shlex.quote(start.source)} --out {shlex.quote(str(start.folder))} ..."
    return "\n".join([*lines, list_commands([(job, "without --limit, to begin the job")])])


def _answer_lines(answer: dict[str, Any], paint: Paint) -> list[str]:
    about = f"{answer['category']}, by {answer['editor']}" if answer["category"] else "no category"
    lines = [f"{answer['place']}  {about}", f"  {'question':<10}{_one_line(answer['question'])}"]
    if answer["picture"] is not None:
        return [*lines, f"  {'answer':<10}{_one_line(answer['chosen'])}", f"  {'picture':<10}{answer['picture']}"]
    if answer["status"] == "accepted":
        edits = [Edit(begin, end, to) for begin, end, to in answer["edits"]]
        return [*lines, f"  {'answer':<10}{_one_line(word_diff(answer['chosen'], edits, paint))}"]
    return [*lines, f"  {'answer':<10}{_one_line(answer['chosen'])}", f"  {'no pair':<10}{answer['reason']}"]


def word_diff(answer: str, edits: list[Edit], paint: Paint) -> str:
    """Return the answer with what is taken away and put in: ``a [-red-]{+blue+} car``, in colour on a terminal."""
    pieces, at = [], 0
    for edit in edits:
        pieces.append(answer[at : edit.start])
        if old := answer[edit.start : edit.end]:
            pieces.append(paint(f"[-{old}-]", fg="red"))
        if edit.to:
            pieces.append(paint(f"{{+{edit.to}+}}", fg="green"))
        at = edit.end
    return "".join([*pieces, answer[at:]])


def _one_line(text: str) -> str:
    return " ".join(text.split())
