"""Choose the questions that the page shows: of each kind of change a few, drawn at random."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from vapr.evaluation.benchmarks.benchmark import Row, options_of
from vapr.evaluation.compare.changes import SHOWN, kind
from vapr.evaluation.compare.measure import ScoredSet
from vapr.evaluation.compare.pictures import Pictures

MOST = 12
"""Questions of a kind that are shown of a benchmark, for all comparisons together; at least :data:`LEAST` for each."""

LEAST = 3

LONGEST = 2_000
"""Characters of a text that are shown."""


def draw(result: Mapping[str, Any], one: ScoredSet, pictures: Pictures) -> list[dict[str, Any]]:
    """Draw questions of a benchmark by kind of change, with texts, answers and pictures.

    Args:
        result: of :func:`vapr.evaluation.compare.measure.compare`.
        one: the benchmark's scored answers.
        pictures: where pictures are looked for.

    Returns:
        Plain data: ``set``, ``split``, ``id``, ``question``, ``options``, ``truth``, ``pictures``, and of each folder
        in ``answers`` its ``text``, what it was ``read`` as, its ``mark`` and its ``kind`` of change, which the first
        has not. They come in the order of the kinds.
    """
    name = str(one.shared.name)
    comparisons = result["benchmarks"][name]["comparisons"]
    most = most_shown(len(result["folders"]))
    chosen: dict[str, None] = {}
    for change in SHOWN:
        for compared in comparisons:
            ids = compared["changes"]["kinds"][change]["ids"]
            drawn = random.Random(f"{result['seed']} {name} {compared['name']} {change}").sample(
                ids, min(most, len(ids))
            )
            chosen |= dict.fromkeys(sorted(drawn, key=ids.index))
    places = {row.prediction.id: n for n, row in enumerate(one.rows[0])}
    rows = [[column[places[id_]] for column in one.rows] for id_ in chosen]
    return [_shown(name, answers, one, [folder["name"] for folder in result["folders"]], pictures) for answers in rows]


def most_shown(num_folders: int) -> int:
    """Return how many questions of a kind are drawn from a benchmark for each comparison."""
    return max(LEAST, MOST // (num_folders - 1))


def _shown(
    name: str, rows: Sequence[Row], one: ScoredSet, folders: Sequence[str], pictures: Pictures
) -> dict[str, Any]:
    first = rows[0]
    answers = [_answer(first, row, folder, n > 0) for n, (row, folder) in enumerate(zip(rows, folders, strict=True))]
    return {
        "set": name,
        "split": one.benchmark.split(first.prediction) or "",
        "id": first.prediction.id,
        "question": _cut(next((row.prediction.question for row in rows if row.prediction.question), "")),
        "options": [_cut(option) for option in options_of(first.prediction)],
        "truth": _cut(str(first.gold)),
        "pictures": pictures.of(first.prediction),
        "answers": answers,
    }


def _answer(first: Row, row: Row, folder: str, compared: bool) -> dict[str, Any]:
    read = row.reading
    if read.unparsed:
        mark = "unparsed"
    else:
        mark = "right" if row.right == 1 else "wrong" if row.right == 0 else f"{100 * row.right:.0f} % right"
    return {
        "name": folder,
        "text": _cut(row.prediction.prediction),
        "read": "" if read.unparsed or read.value is None else _cut(read.value),
        "mark": mark,
        "cut_off": bool(row.prediction.meta.get("cut_off")),
        "kind": kind(first, row) if compared else "",
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
