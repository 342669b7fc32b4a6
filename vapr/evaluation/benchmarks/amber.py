"""AMBER's files: queries, annotations, the table of related objects, and results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Results
from vapr.evaluation.benchmarks.rows import read_json, read_objects, text_of
from vapr.evaluation.scoring.prediction import Prediction, Question

PLACES = ("image", "images")
"""Folders beside the annotations in which pictures may lie."""


def folder_of(path: Path) -> Path:
    """Return the folder with ``annotations.json``: the path, its ``data/``, or that of the file it names."""
    for folder in (path, path / "data", path.parent, path.parent.parent):
        if (folder / "annotations.json").is_file():
            return folder
    raise UserError(f"{path}: no annotations.json in it; give the folder data/ of junyangwang0410/AMBER")


def annotated(path: Path, query: str, generative: bool) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return the place, the query and the annotation of each question of one task.

    Args:
        path: AMBER's folder.
        query: name of the file of queries in ``query/``.
        generative: which annotations belong to the task.

    Raises:
        UserError: for files that are missing or cut short, and a query without annotation.
    """
    folder = folder_of(path)
    notes = {
        str(row["id"]): row
        for _, row in read_objects(folder / "annotations.json", ("id", "type", "truth"), "an annotation of AMBER")
        if (row["type"] == "generative") is generative
    }
    file = next((at for at in (folder / "query" / query, folder / query) if at.is_file()), folder / "query" / query)
    found = []
    for where, row in read_objects(file, ("id", "image", "query"), "a query of AMBER"):
        for key in ("image", "query"):
            text_of(row, key, where)
        if str(row["id"]) not in notes:
            raise UserError(f"{where}: query {row['id']} has no annotation of its task in {folder}/annotations.json")
        found.append((where, row, notes[str(row["id"])]))
    return found


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read the answers in AMBER's layout, a list of ``id`` and ``response``; those to its other task are left out."""
    by_id = {question.id: question for question in questions}
    other, predictions = 0, []
    for where, row in read_objects(path, ("id", "response"), "a result of AMBER"):
        number = str(row["id"])
        if number in by_id:
            predictions.append(Prediction.of(by_id[number], text_of(row, "response", where)))
        elif number.isdecimal() and 1 <= int(number) <= 15220:
            other += 1
        else:
            raise UserError(f"{where}: {json.dumps(row['id'])[:40]} is no id of AMBER (1 to 15220)")
    return Results(predictions, notes=[f"{other:,} answers are to AMBER's other task"] if other else [])


def relations(path: Path) -> dict[str, list[str]]:
    """Read ``relation.json``: each object, and the words for it or its parts that are no mistake where it is seen."""
    file = folder_of(path) / "relation.json"
    table = read_json(file)
    if not isinstance(table, dict) or not all(isinstance(words, list) for words in table.values()):
        raise UserError(f"{file}: not the table of AMBER, objects with lists of words")
    return {word: [str(one) for one in words] for word, words in table.items()}
