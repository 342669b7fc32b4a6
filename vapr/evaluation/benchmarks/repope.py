"""RePOPE: POPE's questions with the truth annotated anew; those whose truth is ambiguous are dropped."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks import pope
from vapr.evaluation.scoring.prediction import Question


def read(path: Path) -> list[Question]:
    """Read ``coco_repope_*.json`` (JSON lines) of a folder, or one of them."""
    files: Sequence[Path] = sorted(path.glob("*repope_*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no coco_repope_*.json in it; get them from YanNeu/RePOPE, annotations")
    return pope.read_files(files, path, "repope")


REPOPE = replace(
    pope.POPE,
    name="repope",
    title="RePOPE",
    source="YanNeu/RePOPE 1080bdf (arXiv 2504.15707); the rule is POPE's",
    read=read,
    read_results=partial(pope.read_results, drops=True),
    relabels="pope",
    note="Answers to POPE are scored with these truths; those to questions that RePOPE drops are left out and counted. "
    + pope.POPE.note,
)
