"""Drafts over --target: which ones are cut off, how the rejects keep them, and how a later round restores them.

Planned anew they would have other partners, or none, and a language model would be asked twice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.data.pair import Edit
from vapr.editing.draft.checks import Verdict
from vapr.editing.draft.draft import Draft, Picture
from vapr.editing.draft.trades import Plan, Trade
from vapr.editing.rules.categories import Categories, Value
from vapr.editing.rules.turns import Turn

OVER_TARGET = "more than --target asked for"


def cut_to(drafts: Sequence[Draft], most: int) -> None:
    """Keep ``most`` accepted drafts; those that traded values with one another stay or go together where they can.

    What is cut keeps its edits: the reject row holds them. First comes a half whose other half an odd target has taken.
    """
    accepted = [number for number, draft in enumerate(drafts) if draft.status == "accepted"]
    if len(accepted) <= most:
        return
    accepted.sort(key=lambda number: all(trade.partner is not None for trade in drafts[number].plan.trades))
    kept: set[int] = set()
    for number in accepted:
        group = _trading_group(number, drafts)
        if number not in kept and len(kept) + len(group) <= most:
            kept |= group
    for number in accepted:  # an odd place left is filled all the same: the target is a number of pairs
        if len(kept) < most:
            kept.add(number)
    for number in accepted:
        if number not in kept:
            drafts[number].status, drafts[number].reason = "over_target", OVER_TARGET


def _trading_group(number: int, drafts: Sequence[Draft]) -> set[int]:
    """Return a turn, those it trades with, those they trade with, and so on."""
    group, waiting = {number}, [number]
    while waiting:
        for trade in drafts[waiting.pop()].plan.trades:
            if trade.partner is not None and trade.partner.turn not in group:
                group.add(trade.partner.turn)
                waiting.append(trade.partner.turn)
    return group


def saved_draft(draft: Draft, drafts: Sequence[Draft]) -> dict[str, Any]:
    """Return what a reject row does not say already about a draft that was to be accepted.

    Args:
        draft: the draft to keep.
        drafts: all drafts of its unit.
    """
    return {
        "rejected": draft.rejected,
        "edits": [[edit.start, edit.end, edit.to] for edit in draft.edits],
        "checks": [[v.name, v.passed, v.value, v.note] for v in draft.verdicts],
        "why_wrong": draft.why,
        "asked": draft.plan.ask,
        "model": draft.model,
        "picture": None if draft.picture is None else _saved_picture(draft.picture),
        "trades": [
            {
                **trade_row(trade),
                "with": _place(drafts[trade.partner.turn].turn, trade.partner) if trade.partner else None,
            }
            for trade in draft.plan.trades
        ],
    }


def _saved_picture(picture: Picture) -> dict[str, Any]:
    return {"images": [str(image) for image in picture.images], "plan": picture.plan}


def trade_row(trade: Trade) -> dict[str, Any]:
    """Return a trade as a row holds it."""
    value = trade.value
    return {
        "set": value.set.name, "market": trade.market, "start": value.start, "value": value.text,
        "target": trade.target,
    }  # fmt: skip


def _place(turn: Turn, trade: Trade) -> list[int]:
    return [turn.row, turn.number, trade.value.start]


def restore_drafts(
    rows: Sequence[Mapping[str, Any]], turns: Sequence[Turn], categories: Categories, first: int
) -> list[Draft]:
    """Return drafts as an earlier round left them: accepted where they were over the target, else ended as they were.

    Args:
        rows: reject rows of the earlier round.
        turns: the turns of these rows.
        categories: the categories of the job.
        first: the number that the first of these drafts has in its unit.
    """
    drafts = [_draft(row, turn, categories, first + n) for n, (row, turn) in enumerate(zip(rows, turns, strict=True))]
    trades = {tuple(_place(draft.turn, trade)): trade for draft in drafts for trade in draft.plan.trades}
    for row, draft in zip(rows, drafts, strict=True):
        for kept, trade in zip(row["as_it_was"]["trades"] if draft.plan.trades else (), draft.plan.trades, strict=True):
            trade.partner = trades.get(tuple(kept["with"] or ()))  # None: an odd target has taken it already
    return drafts


def _draft(row: Mapping[str, Any], turn: Turn, categories: Categories, number: int) -> Draft:
    category = categories[row["category"]] if row["category"] is not None else None
    draft = Draft(
        turn, Plan(category, row["decided_by"]), attempts=row["attempts"], raw=row["raw"], refused=row["refused"],
        status=row["status"], reason=row["reason"], restored=True,
    )  # fmt: skip
    if kept := row.get("as_it_was"):
        assert category is not None
        draft.status, draft.reason = "accepted", None
        draft.rejected, draft.why = kept["rejected"], kept["why_wrong"]
        draft.edits = [Edit(*edit) for edit in kept["edits"]]
        draft.verdicts = [Verdict(*verdict) for verdict in kept["checks"]]
        draft.plan.ask, draft.model = kept["asked"], kept.get("model")
        if picture := kept.get("picture"):
            draft.picture = Picture(tuple(map(Path, picture["images"])), picture["plan"])
        sets = {closed.name: closed for closed in category.values}
        for trade in kept["trades"]:
            start, text, closed = trade["start"], trade["value"], sets[trade["set"]]
            value = Value(closed, start, start + len(text), text, closed.members[text.lower()])
            draft.plan.trades.append(Trade(number, value, trade["market"], frozenset(), target=trade["target"]))
    return draft
