"""What a job has done, or would do, with one row: category, plan, prompt, reply, checks and verdict of each answer."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vapr.data.pair import Edit
from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.trades import Plan, Planner
from vapr.editing.job.claim import JOB, SHARDS
from vapr.editing.job.folder import CANDIDATES, PAIRS, PLANS, REJECTS, Unit
from vapr.editing.job.json_files import read_json
from vapr.editing.job.pair_rows import read_table
from vapr.editing.job.scan import DUPLICATE, SCAN, TURNS, read_array
from vapr.editing.job.start import Start, check_model_names
from vapr.editing.job.summary import way_out
from vapr.editing.job.trial import Paint, word_diff
from vapr.editing.job.worker import DROPPED
from vapr.editing.rules.categories import Categories, load_categories
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import InstructionData, Turn, to_edit
from vapr.errors import BadRow, UserError

DONE, NOT_YET, LEFT_OUT = "done", "not yet", "left out"
OTHER_PROMPTS = "prompts or categories have changed since: the prompt is as it would be now"


def explain(start: Start, wanted: str) -> dict[str, Any]:
    """Tell of one row what came of it in the job of ``start.folder``; without a job, what rules plan for it.

    Nothing is written and no model is asked. A job that is there is read with its own settings.

    Args:
        start: the job.
        wanted: the row: its place (``sft.jsonl:17``, or ``17`` where that is one row alone), its id or that of a pair.

    Returns:
        ``place``, ``note`` and ``answers``, a mapping for each answer of the row, whose ``state`` is ``done``, ``not
        yet`` or ``left out``.

    Raises:
        UserError: if there is no such row, it cannot be read, or the job is of other rows.
    """
    if given := [name for name in ("target", "retry_failed", "ray", "verdicts", "push_to") if getattr(start, name)]:
        raise UserError(f"--explain: shows one row, and takes no --{given[0].replace('_', '-')}; leave one of them out")
    check_model_names(start)
    described = read_json(start.folder / JOB) if (start.folder / JOB).exists() else None
    config = EditConfig.parse(described["config"], str(start.folder / JOB)) if described else start.config
    if config.picture is not None:
        raise UserError(
            "--explain: tells how answers are edited, and with picture they stay; look at --limit or vapr view"
        )
    data = InstructionData(start.source, config.source)
    if described and described["source"]["digest"] != data.digest:
        raise UserError(
            f"{start.folder}: is a job of other rows than {start.source} holds now; give it the same source"
        )
    categories = load_categories(config.plan.categories, config.plan.add_categories)
    row = _find(data, wanted)
    try:
        turns = list(to_edit(data.turns(row), config))
    except BadRow as error:
        raise UserError(f"{error}; such a row is counted as unreadable") from None
    job = _Records(start.folder, config) if described and (start.folder / SCAN).exists() else None
    wordnet = Path(config.checks.wordnet) if config.checks.wordnet else None
    planner = Planner(categories, Nouns(wordnet), config.plan.balance, has_model=bool(start.editors))
    answers = []
    for turn, reason in turns:
        unit = job.unit_of(turn) if job else None
        if reason is None and job and unit is None:
            reason = DUPLICATE
        if reason is not None:
            answers.append({**_begin(turn, LEFT_OUT), "status": LEFT_OUT, "reason": reason})
        elif job and (found := job.read(turn)) is not None:
            answers.append({**_begin(turn, DONE), **_as_done(turn, found, categories)})
        else:
            answers.append({**_begin(turn, NOT_YET), **_as_planned(turn, planner, categories)})
    changed = described and described["prompts"] != prompts.prompt_hash(categories, config.ask.rubric)
    return {"place": data.where(row), "note": OTHER_PROMPTS if changed else None, "answers": answers}


def _find(data: InstructionData, wanted: str) -> int:
    """Return the number of the row that is meant. Raises UserError."""
    places = [data.where(row) for row in range(len(data))]
    found = [row for row, place in enumerate(places) if place == wanted]
    found = found or [row for row, place in enumerate(places) if place.rpartition(":")[2] == wanted]
    found = found or [row for row, place in enumerate(places) if place.endswith(f"/{wanted}")]
    if len(found) > 1:
        raise UserError(f"--explain {wanted}: may be {places[found[0]]} or {places[found[1]]}; give the whole place")
    names = {wanted, re.sub(r"-\d+-[0-9a-f]{12}$", "", wanted)}
    for row in found or range(len(data)):
        if found or names & _ids(data, row):
            return row
    raise UserError(
        f"--explain {wanted}: no such row in {data.path}; give its place, as {places[0]}, or its id, or that of a pair"
    )


def _ids(data: InstructionData, row: int) -> set[str]:
    try:
        return {turn.source_id for turn in data.turns(row)}
    except BadRow:
        return set()


class _Records:
    """What the files of a job say of a turn."""

    def __init__(self, folder: Path, config: EditConfig) -> None:
        self._folder, self._config = folder, config
        self._turns = read_array(folder / TURNS, (None, 2))

    def unit_of(self, turn: Turn) -> int | None:
        """Return the number of the shard that a turn is in; None: it is in none."""
        places = np.flatnonzero((self._turns[:, 0] == turn.row) & (self._turns[:, 1] == turn.number))
        return int(places[0]) // self._config.turns_per_shard if len(places) else None

    def read(self, turn: Turn) -> dict[str, Any] | None:
        """Return the newest rows about a turn by kind of file; None if its shard is not finished."""
        shard, round = self.unit_of(turn), 0
        assert shard is not None
        found: dict[str, Any] = {}
        while (unit := Unit(shard, round)) and (self._folder / SHARDS / f"{unit.name}.json").exists():
            pair = self._pair(unit, turn)
            reject = next(self._lines(REJECTS, unit, turn), None)
            if pair or reject:  # a later round goes through some turns alone
                found |= {"pair": pair, "reject": reject}
            if planned := next(self._lines(PLANS, unit, turn), None):
                found[PLANS] = planned
            if candidates := list(self._lines(CANDIDATES, unit, turn)):
                found[CANDIDATES] = candidates
            round += 1
        return found if round else None

    def _lines(self, kind: str, unit: Unit, turn: Turn) -> Iterator[dict[str, Any]]:
        file = self._folder / kind / f"part-{unit.name}.jsonl"
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
            row = json.loads(line) if line else None
            if row and (row["row"], row["turn"]) == (turn.row, turn.number):
                yield row

    def _pair(self, unit: Unit, turn: Turn) -> dict[str, Any] | None:
        file = self._folder / PAIRS / f"part-{unit.name}.parquet"
        if not file.exists():
            return None
        table = read_table(file).drop_columns(["images"])
        for number, made in enumerate(table["provenance"].to_pylist()):
            if (made["place"], made["turn"]) == (turn.where, turn.number):
                return dict(table.slice(number, 1).to_pylist()[0])
        return None


def _begin(turn: Turn, state: str) -> dict[str, Any]:
    place = {"place": turn.where, "turn": turn.number, "source_id": turn.source_id, "state": state}
    return {**place, "question": turn.question, "chosen": turn.answer}


def _as_done(turn: Turn, found: Mapping[str, Any], categories: Categories) -> dict[str, Any]:
    """Tell what came of a turn."""
    planned, pair, reject = found.get(PLANS) or {}, found.get("pair"), found.get("reject")
    made = pair["provenance"] if pair else reject or {}
    asked = bool(planned.get("asked") and made.get("attempts"))
    trades = planned.get("trades", [])
    prompt = None
    if asked and planned["category"] in categories:
        begin = trades[0]["target"] if trades else None
        refused = made.get("refused") or ()
        prompt = prompts.edit_messages(categories[planned["category"]], turn, must_begin=begin, refused=refused)
    return {
        "category": planned.get("category"),
        "decided_by": planned.get("decided_by"),
        "plan": [{"value": t["value"], "target": t["target"], "market": t["market"]} for t in trades],
        "with": [place["place"] for place in planned.get("with", [])],
        "editor": made.get("editor"),
        "prompt": prompt,
        "attempts": made.get("attempts", 0),
        "refused": made.get("refused") or [],
        "reply": made.get("raw"),
        "candidates": [
            {key: row[key] for key in ("status", "reason", "points", "raw")} for row in found.get(CANDIDATES, ())
        ],
        "checks": (pair or reject or {}).get("checks", []),
        "rejected": pair["rejected"][0]["content"][0]["text"] if pair else None,
        "edits": [[edit["start"], edit["end"], edit["to"]] for edit in pair["edits"]] if pair else [],
        "status": "accepted" if pair else reject["status"] if reject else "rejected",
        "reason": None if pair else reject["reason"] if reject else DROPPED,
    }


def _as_planned(turn: Turn, planner: Planner, categories: Categories) -> dict[str, Any]:
    """Tell what rules plan for a turn, looked at alone: partners are found when its shard is planned."""
    plan = planner.by_rules(turn, 0)
    offers = [{"value": t.value.text, "targets": sorted(t.targets), "market": t.market} for t in plan.offers]
    prompt = None
    if plan.category is None and not plan.reason:
        prompt = prompts.label_messages(categories, turn)
    elif plan.ask and plan.category is not None and not offers and not plan.reason:
        prompt = prompts.edit_messages(plan.category, turn)
    return {
        "category": plan.category.name if plan.category else None,
        "decided_by": plan.decided_by or None,
        "plan": offers,
        "prompt": prompt,
        "status": NOT_YET,
        "reason": plan.reason or _next_step(plan),
    }


def _next_step(plan: Plan) -> str:
    if plan.category is None:
        return "the language model will be asked for its category"
    if plan.offers:
        return "it will look for an answer to trade values with" + (", and the model will write it" if plan.ask else "")
    return "the language model will be asked for an edit"


# Text


def show(result: Mapping[str, Any], paint: Paint) -> str:
    """Return the explanation as text, ``paint`` as of :func:`vapr.editing.job.trial.show`."""
    lines = [f"{result['place']}"]
    for answer in result["answers"]:
        lines += ["", *_answer_lines(answer, paint)]
    if result["note"]:
        lines += ["", _line("note", result["note"])]
    return "\n".join(lines)


def _answer_lines(answer: Mapping[str, Any], paint: Paint) -> list[str]:
    lines = [_line("answer", f"{answer['turn'] + 1} of row {answer['source_id']}, {answer['state']}")]
    lines += _block("question", answer["question"]) + _block("chosen", answer["chosen"])
    if answer["state"] != LEFT_OUT:
        decided = f", by {answer['decided_by']}" if answer["decided_by"] else ""
        lines.append(_line("category", f"{answer['category'] or 'none'}{decided}"))
        lines += _plan_lines(answer)
        for message in answer["prompt"] or ():
            lines += _block(f"{message['role']}:", message["content"])
    if answer["state"] == DONE:
        lines += _history_lines(answer)
    lines.append(_line("verdict", answer["status"] if answer["state"] == DONE else answer["reason"]))
    if answer["status"] == "accepted":
        edits = [Edit(*edit) for edit in answer["edits"]]
        lines += _block("pair", word_diff(answer["chosen"], edits, paint))
    elif answer["state"] == DONE:
        lines += [_line("because", answer["reason"]), _line("way out", way_out(answer["reason"]))]
    return lines


def _plan_lines(answer: Mapping[str, Any]) -> list[str]:
    lines = []
    for trade in answer["plan"]:
        to = trade.get("target") or " or ".join(trade.get("targets", ()))
        lines.append(f"{trade['value']} -> {to} (among {trade['market']})")
    if partners := answer.get("with"):
        lines.append(f"traded with {', '.join(partners)}")
    if answer.get("attempts"):
        lines.append(f"asked of {answer['editor']}, {answer['attempts']} times")
    return [_line("plan" if not number else "", line) for number, line in enumerate(lines or ["none"])]


def _history_lines(answer: Mapping[str, Any]) -> list[str]:
    lines = [line for reason in answer["refused"] for line in _block("refused", reason)]
    for candidate in answer["candidates"]:
        points = f", {candidate['points']} points" if candidate["points"] is not None else ""
        why = f" ({candidate['reason']})" if candidate["reason"] else ""
        lines += _block(
            "candidate", f"{candidate['status'].replace('_', ' ')}{points}{why}\n{candidate['raw'] or 'no text'}"
        )
    if not answer["candidates"] and answer["reply"] is not None:
        lines += _block("reply", answer["reply"])
    for number, check in enumerate(answer["checks"]):
        value = f" {check['value']:g}" if check["value"] is not None else ""
        passed = "passes" if check["passed"] else "refuses"
        said = f"{check['name']:<12}{passed}{value}{': ' if check['note'] else ''}{check['note']}"
        lines.append(_line("" if number else "checks", said))
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _block(name: str, text: str) -> list[str]:
    return [_line("" if number else name, line).rstrip() for number, line in enumerate(text.split("\n"))]
