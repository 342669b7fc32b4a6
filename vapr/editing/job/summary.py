"""The summary of an edit job as text: counts, the way out of each reason, and the commands that come next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapr.data.pairs import columns_told
from vapr.editing.draft import editor, picture_editor, trades
from vapr.editing.draft.own_checks import NO_VERDICT, OWN_CHECK, PATTERN
from vapr.editing.job.worker import DROPPED
from vapr.editing.rules import boxes
from vapr.llm.request import CUT_OFF

CROPPED = "LLaVA-1.5 sees the middle square of a picture (of 640 x 480, columns 80 to 559): mind the spatial pairs"
ANOTHER_EDITOR = "another --editor, or more ask.attempts"
NO_POINTS = "way out: another ask.judge; without points a candidate ranks last"
OWN = "mend the function of checks.python, then another --out"
WAYS_OUT = {
    trades.NO_PARTNER: "more rows, or plan.balance=uniform",
    trades.PARTNER_LOST: "more rows, or --retry-failed where its other half failed",
    trades.NEEDS_MODEL: "--editor MODEL",
    trades.NO_CATEGORY: "--editor MODEL, or a category of your own in plan.add_categories",
    trades.NEITHER: "none: it is no yes or no",
    "question longer than": "a shorter question",
    editor.SAME_PAIR: "none: once is enough",
    editor.TRUE_HERE: "none: it would be a true answer",
    DROPPED: "none: a person has said so",
    "length: ": "checks.length_ratio, or another --editor",
    "distance: ": "checks.max_edit_distance, or another --editor",
    "style: ": "checks.style=false, or another --editor",
    "blind check: ": "checks.blind=false, or another --editor",
    "verifier: ": "another checks.verifier",
    f"{NO_VERDICT}: no answer within": f"a higher checks.python_seconds, or {OWN}",
    NO_VERDICT: OWN,
    f"{OWN_CHECK}: ": "checks.python, or another --editor",
    f"{PATTERN}: ": "checks.patterns, or another --editor",
    CUT_OFF: "a higher ask.max_tokens, or another --editor",
    "prompt has": "a higher engine.max_model_len",
    picture_editor.NO_OTHER: "more rows, or mask, blur or crop in picture.change",
    picture_editor.DENIES: "picture.change=other",
    picture_editor.NO_REST: "mask or blur in picture.change",
    picture_editor.UNCHANGED: "another picture.change",
    boxes.NO_BOXES: "--column boxes=NAME, or picture.change=other",
    boxes.NOT_NAMED: "none: nobody knows where it is",
    "box outside of the picture": "picture.boxes and picture.relative say what the numbers are",
    "a box is four": "rows as docs/edit.md shows them",
    "boxes ": "rows as docs/edit.md shows them",
    "less of the picture": "picture.changed",
    "more of the picture": "picture.changed",
    "not answered in its batch": "--retry-failed sends it again",
    "HTTP": "the server's log, then --retry-failed",
    "no answer within": "a higher engine.timeout_seconds, then --retry-failed",
    "broken connection": "--retry-failed",
    "image cannot be read": "--image-root, the folder that image paths start at",
    "image ": "mend the picture, then --retry-failed",
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
"""The way out of a reason that begins so. Every other reason is a refused edit."""


def way_out(reason: str) -> str:
    """Say what can be done about a reason why an answer became no pair."""
    return next((way for begins, way in WAYS_OUT.items() if reason.startswith(begins)), ANOTHER_EDITOR)


def show(result: Mapping[str, Any]) -> str:
    """Return the ledger as text."""
    source, turns, tokens, rest = result["source"], result["turns"], result["tokens"], result["rest"]
    lines = [_line("source", f"{source['rows']:,} rows, {source['turns']:,} answers, {source['eligible']:,} to edit")]
    if source["bad_rows"]:
        lines.append(_line("unreadable", f"{source['bad_rows']:,} rows (scan.json names the first)"))
    if unused := source.get("unused_columns"):  # a job begun by an older version has not counted them
        lines.append(_line("not used", f"columns {columns_told(unused)}"))
    lines += list_reasons("left out", source["filtered"])
    lines.append(_line("done", f"{turns['done']:,} of {turns['total']:,} answers"))
    lines.append(_line("accepted", f"{result['accepted']:,} pairs"))
    for name, counts in result["categories"].items():
        if counts["turns"]:
            share = f"{counts['accepted']:>10,} of {counts['turns']:>10,}  {counts['accept_rate']:.1%}"
            lines.append(_line("", f"{name:<14}{share}"))
    if result["categories"].get("spatial", {}).get("accepted"):
        lines.append(_line("", CROPPED))
    if len(result["editors"]) > 1:
        for number, (name, counts) in enumerate(result["editors"].items()):
            share = f"{counts['accepted']:,} of {counts['turns']:,} accepted"
            lines.append(_line("" if number else "editors", f"{name}: {share}"))
    if result["candidates"] is not None:
        ends = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in result["candidates"].items())
        lines.append(_line("candidates", f"{sum(result['candidates'].values()):,}: {ends}"))
    if result["judge"] is not None and (prose := result["judge"].get("no_points")):
        lines.append(
            _line("judge", f"{prose:,} of {result['judge']['replies']:,} replies hold no points [{NO_POINTS}]")
        )
    for kind in ("rejected", "failed"):
        lines += list_reasons(kind, result[kind])
    if result["over_target"]:
        lines.append(_line("set aside", f"{result['over_target']:,} over the target; a larger one takes them up again"))
    for name, said in result["polarity"].items():
        counted = f"{said['rejected_yes']:,} rejected yes, {said['rejected_no']:,} rejected no"
        lines.append(_line("yes / no", f"{counted} ({name})"))
    if tokens["prompt"]:
        prompt = f"{tokens['prompt']:,} prompt ({tokens['cached']:,} cached)"
        lines.append(_line("tokens", f"{prompt}, {tokens['generated']:,} generated"))
    for name, model in result["models"].items():
        counted = f"{model['asked']:,} replies asked for, {model['found']:,} kept from before"
        cost = f", cost {model['cost']:,}" if model["cost"] is not None else ""
        lines.append(_line("model", f"{name}: {counted}{cost}"))
    if result["accepted_per_second"] is not None:
        lines.append(_line("speed", f"{result['accepted_per_second']:,} accepted pairs a second of work"))
    if turns["left"] and rest["seconds"] is not None:
        cost = f", cost {rest['cost']:,}" if rest["cost"] is not None else ""
        lines.append(_line("rest", f"{rest['seconds']:,} s of work, {rest['gpu_hours']:,} GPU-hours{cost}"))
    if redone := result["shards"]["redone"]:
        lines.append(_line("redone", f"{redone:,} shards that a killed worker had begun"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def list_reasons(kind: str, counts: Mapping[str, int]) -> list[str]:
    """Return a line for each reason: how often, and what can be done."""
    return [_line(kind, f"{count:,} x {reason} [way out: {way_out(reason)}]") for reason, count in counts.items()]


def next_commands(result: Mapping[str, Any], folder: Path) -> str:
    """Return the commands that come after a job has ended, one a line."""
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
    return list_commands(commands)


def list_commands(commands: list[tuple[str, str]]) -> str:
    """Return commands with what they do, below "next"."""
    width = max(len(command) for command, _ in commands)
    lines = [f"{command:<{width}}  # {what}" for command, what in commands]
    return "\n".join(_line("" if number else "next", line) for number, line in enumerate(lines))
