"""What an edit job has come to, as text: counts, the way out of each reason, and the commands that come next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapr.data.pairs import columns_told
from vapr.editing.draft import editor as edit
from vapr.editing.draft import trades as plan
from vapr.editing.job import worker as work
from vapr.editing.llm.request import CUT_OFF

CROPPED = "LLaVA-1.5 sees the middle square of a picture (of 640 x 480, columns 80 to 559): mind the spatial pairs"
ANOTHER_EDITOR = "another --editor, or more ask.attempts"
WAYS_OUT = {
    plan.NO_PARTNER: "more rows, or plan.balance=uniform",
    plan.PARTNER_LOST: "more rows, or --retry-failed where its other half failed",
    plan.NEEDS_MODEL: "--editor MODEL",
    plan.NO_CATEGORY: "--editor MODEL, or a category of your own in plan.add_categories",
    plan.NEITHER: "none: it is no yes or no",
    "question longer than": "a shorter question",
    edit.SAME_PAIR: "none: once is enough",
    edit.TRUE_HERE: "none: it would be a true answer",
    work.DROPPED: "none: a person has said so",
    "length: ": "checks.length_ratio, or another --editor",
    "distance: ": "checks.max_edit_distance, or another --editor",
    "style: ": "checks.style=false, or another --editor",
    "blind check: ": "checks.blind=false, or another --editor",
    "verifier: ": "another checks.verifier",
    CUT_OFF: "a higher ask.max_tokens, or another --editor",
    "prompt has": "a higher engine.max_model_len",
    "HTTP": "the server's log, then --retry-failed",
    "no answer within": "a higher engine.timeout_seconds, then --retry-failed",
    "broken connection": "--retry-failed",
    "image cannot be read": "--image-root, the folder that image paths start at",
    "row cannot be read": "see the lines above",
    "no image": "filters.no_image=false keeps them",
    "coordinates in the answer": "filters.coordinates=false keeps them",
    "the letter of an option": "filters.letters=false keeps them",
    "question like": "filters.skip_questions=[] keeps them",
    "answer shorter than": "filters.min_answer_words",
    "answer longer than": "filters.max_answer_words",
    "beyond plan.turns_per_row": "a higher plan.turns_per_row",
    "empty answer": "none: there is nothing to edit",
    "duplicate of an earlier answer": "none: once is enough",
}
"""What can be done about a reason that begins so. Every other one is a refused edit."""


def way_out(reason: str) -> str:
    """What can be done about a reason why an answer became no pair."""
    return next((way for begins, way in WAYS_OUT.items() if reason.startswith(begins)), ANOTHER_EDITOR)


def show(result: Mapping[str, Any]) -> str:
    """The ledger as text."""
    source, turns, tokens = result["source"], result["turns"], result["tokens"]
    lines = [f"{'source':<12}{source['rows']:,} rows, {source['turns']:,} answers, {source['eligible']:,} to edit"]
    if source["bad_rows"]:
        lines.append(f"{'unreadable':<12}{source['bad_rows']:,} rows (scan.json names the first)")
    if unused := source.get("unused_columns"):  # a job begun by an older version has not counted them
        lines.append(f"{'not used':<12}columns {columns_told(unused)}")
    lines += reasons("left out", source["filtered"])
    lines.append(f"{'done':<12}{turns['done']:,} of {turns['total']:,} answers")
    lines.append(f"{'accepted':<12}{result['accepted']:,} pairs")
    for name, counts in result["categories"].items():
        if counts["turns"]:
            lines.append(
                f"{'':<12}{name:<14}{counts['accepted']:>10,} of {counts['turns']:>10,}  {counts['accept_rate']:.1%}"
            )
    if result["categories"].get("spatial", {}).get("accepted"):
        lines.append(f"{'':<12}{CROPPED}")
    for kind in ("rejected", "failed"):
        lines += reasons(kind, result[kind])
    if result["over_target"]:
        lines.append(f"{'set aside':<12}{result['over_target']:,} over the target; a larger one takes them up again")
    for name, counts in result["polarity"].items():
        lines.append(
            f"{'yes / no':<12}{counts['rejected_yes']:,} rejected yes, {counts['rejected_no']:,} rejected no ({name})"
        )
    if tokens["prompt"]:
        lines.append(
            f"{'tokens':<12}{tokens['prompt']:,} prompt ({tokens['cached']:,} cached), "
            f"{tokens['generated']:,} generated"
        )
    if result["accepted_per_second"] is not None:
        lines.append(f"{'speed':<12}{result['accepted_per_second']:,} accepted pairs a second of work")
    if turns["left"] and result["rest"]["seconds"] is not None:
        rest = result["rest"]
        cost = f", cost {rest['cost']:,}" if rest["cost"] is not None else ""
        lines.append(f"{'rest':<12}{rest['seconds']:,} s of work, {rest['gpu_hours']:,} GPU-hours{cost}")
    if result["shards"]["redone"]:
        lines.append(f"{'redone':<12}{result['shards']['redone']:,} shards that a killed worker had begun")
    return "\n".join(lines)


def reasons(kind: str, counts: Mapping[str, int]) -> list[str]:
    """A line for each reason: how often, and what can be done."""
    return [f"{kind:<12}{count:,} x {reason} [way out: {way_out(reason)}]" for reason, count in counts.items()]


def next_commands(result: Mapping[str, Any], folder: Path) -> str:
    """The commands that come after a job has ended, one a line."""
    out = shlex.quote(str(folder))
    page = shlex.quote(f"{folder}-review.html")
    same = f"vapr edit ... --out {out}"
    commands = []
    if result["failed"]:
        commands.append((f"{same} --retry-failed", "ask again for what failed"))
    if result["turns"]["left"] or result["over_target"]:
        commands.append((f"{same} --target N", "more pairs; without --target all of them"))
    if result["accepted"]:
        commands += [
            (f"vapr view {out} --out {page}", "look at pairs; keep or drop"),
            (f"vapr audit {out}", "what gives rejected answers away without the image"),
            (f"vapr train run.yaml --set data.train={out}", "train on them"),
        ]
    elif not result["failed"]:
        commands.append((f"{same}-2 --editor MODEL", "a language model edits what rules leave alone"))
    return listed(commands)


def listed(commands: list[tuple[str, str]]) -> str:
    """Commands with what they do, below "next"."""
    width = max(len(command) for command, _ in commands)
    lines = [f"{command:<{width}}  # {what}" for command, what in commands]
    return "\n".join(f"{'' if number else 'next':<12}{line}" for number, line in enumerate(lines))
