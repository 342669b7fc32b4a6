"""What a study measures: answers to benchmarks and preferences of held-out pairs, model by model, question by question.

A measure of several seeds is the mean over them. Its interval adds up what comes from the questions (clustered by
picture) and what comes from the seeds (Student's t of their values), side by side as G. Y. Zou and A. Donner do (Stat.
Med. 27 (2008) 1693): the distances of a limit from the value add like the sides of a right angle.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.score import of_benchmark, score_rows
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.figures import NONE, Figure, share
from vapr.evaluation.scoring.paired import difference
from vapr.evaluation.scoring.prediction import read_predictions

PREFERENCES, ANSWERS = "held-out pairs", "held-out questions"
"""The measures of a probe: chosen likelier than rejected, and generated answers to yes/no questions."""

FIGURES = ("accuracy", "yes_rate", "gold_yes_rate", "unparsed_rate")


@dataclass(frozen=True, eq=False)
class Measured:
    """One model's answers to P questions.

    Attributes:
        questions: their names, (P,).
        pictures: what is asked about, (P,).
        right: in [0, 1], (P,).
        yes, gold_yes: 0 or 1 each, (P,); None unless every truth is yes or no.
        unparsed: 0 or 1 each, (P,); None where nothing is generated.
    """

    questions: tuple[str, ...]
    pictures: tuple[str, ...]
    right: np.ndarray
    yes: np.ndarray | None = None
    gold_yes: np.ndarray | None = None
    unparsed: np.ndarray | None = None

    def values(self, figure: str) -> np.ndarray | None:
        """Return one of :data:`FIGURES` of each question, (P,)."""
        return {
            "accuracy": self.right, "yes_rate": self.yes, "gold_yes_rate": self.gold_yes, "unparsed_rate": self.unparsed
        }[figure]  # fmt: skip


def of_bench(folder: Path, benchmark: Benchmark, policy: Policy) -> Measured:
    """Read a result folder's answers to a benchmark."""
    rows = score_rows(of_benchmark(read_predictions(folder), benchmark.name, str(folder)), benchmark, policy)
    asks_yes_or_no = all(row.gold in ("yes", "no") for row in rows)
    said = [row.reading.value for row in rows]

    def flags(holds: list[bool]) -> np.ndarray:
        return np.array(holds, float)

    return Measured(
        questions=tuple(row.prediction.id for row in rows),
        pictures=tuple(row.prediction.image for row in rows),
        right=np.array([row.right for row in rows], float),
        yes=flags([one == "yes" for one in said]) if asks_yes_or_no else None,
        gold_yes=flags([row.gold == "yes" for row in rows]) if asks_yes_or_no else None,
        unparsed=flags([row.reading.unparsed for row in rows]),
    )


def of_probes(run_dir: Path) -> dict[str, list[Measured]]:
    """Return what the first and the last probe of a run measured, by measure; empty if it has none."""
    files = sorted((run_dir / "probe").glob("step-*.json"), key=lambda file: int(file.stem[5:]))
    if not files:
        return {}
    ends = [json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1])]
    found = {PREFERENCES: [_preferences(probe) for probe in ends]}
    if any(answer["yes_or_no"] for answer in ends[0]["answers"]):
        found[ANSWERS] = [_answers(probe) for probe in ends]
    return found


def _preferences(probe: dict[str, Any]) -> Measured:
    rows = probe["preferences"]
    return Measured(
        tuple(row["where"] for row in rows), tuple(row["picture"] for row in rows),
        np.array([row["with_image"] for row in rows], float),
    )  # fmt: skip


def _answers(probe: dict[str, Any]) -> Measured:
    rows = [answer for answer in probe["answers"] if answer["yes_or_no"]]
    return Measured(
        questions=tuple(row["where"] for row in rows),
        pictures=tuple(row["picture"] for row in rows),
        right=np.array([row["read"] == row["gold"] for row in rows], float),
        yes=np.array([row["read"] == "yes" for row in rows], float),
        gold_yes=np.array([row["gold"] == "yes" for row in rows], float),
        unparsed=np.array([row["read"] is None for row in rows], float),
    )


def figures_of(seeds: Sequence[Measured], base: Measured | None = None) -> dict[str, Figure]:
    """Return :data:`FIGURES` of the models of several seeds, and with a base ``difference``, of accuracy to it.

    Raises:
        UserError: if the models were not asked the same questions.
    """
    models = [*seeds, *([base] if base is not None else [])]
    if any(model.questions != models[0].questions for model in models):
        raise UserError("the models were not asked the same questions; evaluate them again in a new folder")
    pictures = seeds[0].pictures
    figures: dict[str, Figure] = {}
    for name in FIGURES:
        values = [value for model in seeds if (value := model.values(name)) is not None]
        figures[name] = _with_seeds(share(np.mean(values, axis=0), pictures), values) if values else NONE
    if base is not None:
        mean = np.mean([model.right for model in seeds], axis=0)
        changes = [model.right - base.right for model in seeds]
        figures["difference"] = _with_seeds(difference(base.right, mean, pictures), changes, lowest=-1.0)
    return figures


def _with_seeds(figure: Figure, values: Sequence[np.ndarray], lowest: float = 0.0) -> Figure:
    """Widen the interval over questions by what the seeds' values (each (P,)) differ; one seed adds nothing."""
    means = [float(value.mean()) for value in values]
    if len(means) < 2 or figure.value is None or figure.interval is None:
        return figure
    reach = float(student.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means))
    low, high = (math.hypot(figure.value - end, reach) for end in figure.interval)
    return Figure(figure.value, (max(lowest, figure.value - low), min(1.0, figure.value + high)), figure.count)
