"""Drafts as rows on disk: accepted ones as parquet, the others and the plans as JSON lines."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.data.pair import Message
from vapr.editing.draft.draft import RULES, Draft
from vapr.editing.draft.mix import identity_of
from vapr.editing.job.over_target import saved_draft, trade_row
from vapr.editing.rules.turns import Turn
from vapr.errors import UserError, one_line


def pair_id(draft: Draft, editor: Mapping[str, Any]) -> str:
    """Return the id of a pair: the source's id, the number of the answer, and a hash of row, plan and editor."""
    plan, editor = draft.plan, identity_of(editor, draft.model)
    content: list[Any] = [draft.turn.digest(), plan.category.name if plan.category else None, plan.must_begin]
    if plan.ask:
        content += [editor["name"], editor["revision"], editor["prompt_hash"]]
    elif draft.picture is not None:
        content += [image.name for image in draft.picture.images]
    else:
        content += [(trade.value.start, trade.value.text, trade.target) for trade in plan.trades]
    return f"{draft.turn.source_id}-{draft.turn.number}-{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}"


def pair_row(draft: Draft, editor: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an accepted draft as a row of vapr's own shape, with checks, source, licence and provenance."""
    turn, plan = draft.turn, draft.plan
    assert draft.rejected is not None
    editor = identity_of(editor, draft.model)
    who = {key: editor[key] if plan.ask else None for key in ("revision", "engine")}
    return {
        "id": pair_id(draft, editor),
        "images": [_image(image, folder) for image in turn.images],
        **({"rejected_images": [_image(image, folder) for image in draft.picture.images]} if draft.picture else {}),
        "prompt": [_message(message) for message in turn.prompt],
        "chosen": [_answer(turn.answer)],
        "rejected": [_answer(draft.rejected)],
        "category": draft.category.name,
        "edits": [
            {"start": e.start, "end": e.end, "from": turn.answer[e.start : e.end], "to": e.to} for e in draft.edits
        ],
        "checks": [{"name": v.name, "passed": v.passed, "value": v.value, "note": v.note} for v in draft.verdicts],
        "source": turn.source,
        "licence": turn.licence,
        "provenance": {
            "editor": editor["name"] if plan.ask else RULES,
            **who,
            "prompt_hash": editor["prompt_hash"],
            "seed": editor["seed"],
            "decided_by": plan.decided_by,
            "attempts": draft.attempts,
            "refused": draft.refused,
            "raw": draft.raw,
            "why_wrong": draft.why,
            "source_id": turn.source_id,
            "place": turn.where,
            "turn": turn.number,
            "plan": json.dumps(_planned(draft), ensure_ascii=False),
        },
    }


def _planned(draft: Draft) -> Any:
    return draft.picture.plan if draft.picture is not None else [trade_row(trade) for trade in draft.plan.trades]


def _message(message: Message) -> dict[str, Any]:
    return {
        "role": message["role"],
        "content": [{"type": p["type"], "text": p.get("text")} for p in message["content"]],
    }


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _image(image: Path | bytes, folder: Path) -> dict[str, Any]:
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    path, root = os.path.abspath(image), os.path.abspath(folder)
    return {"bytes": None, "path": os.path.relpath(path, root) if path.startswith(root + os.sep) else path}


def plan_row(draft: Draft, drafts: Sequence[Draft]) -> dict[str, Any]:
    """Return what was planned for a turn, and with which turns it traded."""
    plan = draft.plan
    partners = [_place(drafts[t.partner.turn].turn) for t in plan.trades if t.partner is not None]
    return {
        **_place(draft.turn),
        "category": plan.category.name if plan.category else None,
        "decided_by": plan.decided_by,
        "asked": plan.ask,
        "trades": [trade_row(trade) for trade in plan.trades],
        "with": partners,
        **({"picture": draft.picture.plan} if draft.picture is not None else {}),
    }


def reject_row(draft: Draft, drafts: Sequence[Draft]) -> dict[str, Any]:
    """Return a turn that became no pair, and why; if only the target was against it, with all that makes it a pair."""
    return {
        **_place(draft.turn),
        "status": draft.status,
        "reason": draft.reason,
        "source_id": draft.turn.source_id,
        "category": draft.plan.category.name if draft.plan.category else None,
        "decided_by": draft.plan.decided_by,
        "question": draft.turn.question,
        "answer": draft.turn.answer,
        "editor": draft.editor,
        "attempts": draft.attempts,
        "refused": draft.refused,
        "raw": draft.raw,
        "checks": [{"name": v.name, "passed": v.passed, "value": v.value, "note": v.note} for v in draft.verdicts],
        "as_it_was": saved_draft(draft, drafts) if draft.status == "over_target" else None,
    }


def candidate_rows(draft: Draft) -> list[dict[str, Any]]:
    """Return every edit that was asked for a turn, the chosen one first, and why the others were not."""
    ranked = sorted(draft.candidates, key=lambda candidate: candidate.status != "chosen")
    return [
        {
            **_place(draft.turn),
            "editor": one.model,
            "attempt": one.attempts,
            "status": one.status,
            "reason": one.reason,
            "points": one.score,
            "raw": one.raw,
        }
        for one in ranked
    ]


def _place(turn: Turn) -> dict[str, Any]:
    return {"place": turn.where, "row": turn.row, "turn": turn.number}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON lines, whole or not at all; return the file's sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace")
    with written_whole(path) as file:
        file.write(text)
    return hashlib.sha256(text).hexdigest()


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write pairs as parquet, whole or not at all; return the file's sha256.

    Raises:
        UserError: if pyarrow is missing or the file cannot be written.
    """
    return write_table(path, _pyarrow().Table.from_pylist(list(rows), _schema(_pyarrow(), rows)))


def write_table(path: Path, table: Any, before_it_appears: Callable[[str], object] = str) -> str:
    """Write an Arrow table as parquet, whole or not at all; return the file's sha256.

    Args:
        path: the file to write.
        table: the Arrow table.
        before_it_appears: called with the sha256 before the file is there under its name.
    """
    with written_whole(path) as file:
        _pyarrow().parquet.write_table(table, file, compression="zstd")
        file.flush()
        digest = digest_of(Path(file.name))
        before_it_appears(digest)
    return digest


def digest_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a part, or some of its columns, as an Arrow table. Raises UserError if it is damaged."""
    with _readable(path):
        return _pyarrow().parquet.read_table(path, columns=columns)


def num_rows(path: Path) -> int:
    """Return the number of pairs in a part, without reading them. Raises UserError if it is damaged."""
    with _readable(path):
        return int(_pyarrow().parquet.read_metadata(path).num_rows)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, _pyarrow().ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it, or begin again elsewhere") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("vapr edit writes parquet, which needs pyarrow; pip install 'vapr[data]'") from None
    return pyarrow


def _schema(pa: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    text, number = pa.string(), pa.int64()
    part = pa.struct({"type": text, "text": text})
    messages = pa.list_(pa.struct({"role": text, "content": pa.list_(part)}))
    provenance = {
        "editor": text, "revision": text, "engine": text, "prompt_hash": text, "seed": number, "decided_by": text,
        "attempts": number, "refused": pa.list_(text), "raw": text, "why_wrong": pa.list_(text),
        "source_id": text, "place": text, "turn": number, "plan": text,
    }  # fmt: skip
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": text}))
    return pa.schema({
        "id": text, "images": images, **({"rejected_images": images} if "rejected_images" in rows[0] else {}),
        "prompt": messages, "chosen": messages, "rejected": messages, "category": text,
        "edits": pa.list_(pa.struct({"start": number, "end": number, "from": text, "to": text})),
        "checks": pa.list_(pa.struct({"name": text, "passed": pa.bool_(), "value": pa.float64(), "note": text})),
        "source": text, "licence": text, "provenance": pa.struct(provenance),
    })  # fmt: skip
