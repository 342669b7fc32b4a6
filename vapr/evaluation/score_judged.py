"""Score what judges said of answers: the same object as of answers that rules read."""

from collections.abc import Mapping, Sequence
from typing import Any

from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.scoring.figures import NONE, Figure, share
from vapr.evaluation.scoring.prediction import Prediction
from vapr.evaluation.scoring.review import Review, count_problems
from vapr.evaluation.scoring.verdicts import Verdict

UNREADABLE = "no verdict could be read from it"
Judgement = tuple[Prediction, Verdict | None]


def judgements(
    predictions: Sequence[Prediction], benchmark: Benchmark, reviews: Mapping[str, Review]
) -> list[Judgement]:
    """Return those predictions that have a review, each with its verdict; None if it failed or says none."""
    assert benchmark.judged is not None
    read = benchmark.judged.read_review
    found = [(prediction, reviews[prediction.id]) for prediction in predictions if prediction.id in reviews]
    return [(prediction, None if said.review is None else read(said.review)) for prediction, said in found]


def figures_of(rows: Sequence[Judgement], benchmark: Benchmark, seed: int, common: Sequence[str]) -> dict[str, Any]:
    """Return the common figures, of which a judge gives few, and the benchmark's own; those of verdicts only."""
    assert benchmark.judged is not None
    kept = [(prediction, verdict) for prediction, verdict in rows if verdict is not None]
    own: dict[str, Figure] = {}
    if kept:
        own = dict(benchmark.judged.figures([p for p, _ in kept], [verdict for _, verdict in kept], seed))
    figures = dict.fromkeys(common, NONE) | {"accuracy": own.pop("accuracy", NONE)}
    images = [prediction.image for prediction, _ in rows]
    figures["unparsed_rate"] = share([verdict is None for _, verdict in rows], images)
    return {
        "questions": len(rows),
        "unparsed": len(rows) - len(kept),
        "guessed": 0,
        **{name: figure.value for name, figure in figures.items()},
        "intervals": {name: figure.as_dict()["interval"] for name, figure in figures.items()},
        "figures": {name: figure.as_dict() for name, figure in own.items()},
    }


def problems_of(rows: Sequence[Judgement], reviews: Mapping[str, Review]) -> dict[str, int]:
    """Count the reviews without a verdict by what is wrong with them."""
    without = [reviews[prediction.id] for prediction, verdict in rows if verdict is None]
    return count_problems(UNREADABLE if r.review is not None else r.problem or "no review" for r in without)


def judge_of(rows: Sequence[Judgement], reviews: Mapping[str, Review]) -> dict[str, Any]:
    """Return who wrote the reviews, and under which settings."""
    review = reviews[rows[0][0].id]
    return {"name": review.judge, "settings": dict(review.settings)}
