"""AMBER, discriminative: 14,216 yes/no questions on existence, attributes and relations. "No" is the positive class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks.amber import PLACES, annotated, folder_of, read_results
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Row, yes_no_gold
from vapr.evaluation.benchmarks.rows import picture
from vapr.evaluation.scoring import yes_no
from vapr.evaluation.scoring.answers import Policy, yes_or_no
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

KINDS = {
    "discriminative-hallucination": ("existence", "existence"),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", "relation"),
    "relation": ("relation", "relation"),
}
"""Split and kind of each type of the annotations."""


def read(path: Path) -> list[Question]:
    """Read ``query/query_discriminative.json`` and ``annotations.json``; pictures lie beside them, or in ``image/``."""
    folder = folder_of(path)
    questions = []
    for where, query, note in annotated(path, "query_discriminative.json", generative=False):
        if note["type"] not in KINDS:
            raise UserError(f"{where}: annotation {note['id']} is of type {note['type']!r}, none of AMBER's")
        split, kind = KINDS[note["type"]]
        questions.append(
            Question(
                benchmark="amber-d", id=str(query["id"]), question=query["query"], answer=note["truth"],
                meta={"split": split, "kind": kind, "image": query["image"]},
                images=(picture(folder, query["image"], PLACES),),
            )
        )  # fmt: skip
    check_ids(questions, path)
    return questions


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no. The official rule knows exactly "Yes" and "No", and counts all else as wrong."""
    if policy != "official":
        return Reading(yes_or_no(prediction.prediction, policy))
    return Reading({"Yes": "yes", "No": "no"}.get(prediction.prediction))


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return precision, recall and F1 of "no", F1 of each kind of question, and the official figures in percent."""
    found = _of_no(rows, ("precision_no", "recall_no", "f1_no"))
    for kind in ("state", "number", "action"):
        those = [row for row in rows if row.prediction.meta.get("kind") == kind]
        if 0 < len(those) < len(rows):
            found[f"f1_no_{kind}"] = _of_no(those, ("f1_no",))["f1_no"]
    return found | _official(rows)


def _of_no(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Figure]:
    gold, said = [str(row.gold) for row in rows], [row.reading.value for row in rows]
    return yes_no.figures_of(gold, said, [row.prediction.image for row in rows], only=names)


def _official(rows: Sequence[Row]) -> dict[str, Figure]:
    """Return the figures as AMBER prints them.

    Its counts begin at 0.001 where they divide, shares are rounded to a tenth of a percent before F1 is taken of them,
    and F1 has another 0.0001 below the line, 0.001 for existence alone. They have no intervals: the same figures
    without these quirks have.
    """
    no, said_no = [row for row in rows if row.gold == "no"], [row for row in rows if row.reading.value == "no"]
    both = sum(row.gold == "no" for row in said_no)
    accuracy = round(sum(row.right for row in rows) / (len(rows) + 0.001) * 100, 1)
    precision, recall = (round(both / (len(of) + 0.001) * 100, 1) for of in (said_no, no))
    below = 0.001 if {row.prediction.split for row in rows} == {"existence"} else 0.0001
    f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + below) * 100, 1)
    values = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return {f"official_{name}": Figure(value, None, len(rows)) for name, value in values.items()}


AMBER_D = Benchmark(
    name="amber-d",
    title="AMBER (discriminative)",
    source="junyangwang0410/AMBER 534babf, inference.py, Apache-2.0",
    read=read,
    gold=yes_no_gold,
    read_answer=read_answer,
    figures=figures,
    headline="f1_no",
    read_results=read_results,
    note="Here f1, precision and recall are of 'yes', as for other sets; AMBER's are those of 'no' among the figures. "
    "Its printed figures, with their rounding and offsets, are the official_ ones, in percent.",
)
