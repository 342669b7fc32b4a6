"""Compare result folders: every benchmark and split, the first folder being what the others are held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Row
from vapr.evaluation.compare.doubts import doubts
from vapr.evaluation.compare.folders import ResultFolder
from vapr.evaluation.compare.holm import holm
from vapr.evaluation.compare.paired_sets import bias_differences, paired
from vapr.evaluation.compare.shared import SharedSet, join
from vapr.evaluation.score import score, score_rows
from vapr.evaluation.scoring.answers import Policy

SPLIT_KEYS = ("accuracy", "yes_rate", "gold_yes_rate", "unparsed_rate")


@dataclass(frozen=True)
class ScoredSet:
    """A benchmark's shared questions, and the scored answers of each folder in the same order."""

    shared: SharedSet
    benchmark: Benchmark
    rows: tuple[list[Row], ...]


def compare(
    folders: Sequence[ResultFolder], policy: Policy = "strict", seed: int = 0
) -> tuple[dict[str, Any], list[ScoredSet]]:
    """Compare folders on the questions that all of them answer.

    Returns:
        What JSON holds, and the scored answers behind it. The former has ``folders``, ``notes`` (what is not compared,
        in sentences), ``tests`` (over how many p is corrected) and ``benchmarks``: of each the ``models``' figures,
        the ``comparisons`` with the first (:func:`vapr.evaluation.compare.paired_sets.paired`) and, by name,
        ``splits`` with the same.

    Raises:
        UserError: if the folders cannot be compared.
    """
    shared_sets, notes = join(folders)
    scored, benchmarks = [], {}
    for shared in shared_sets:
        scores, benchmark = _scores(shared, folders, policy, seed), shared.benchmark
        if benchmark is None or not all(one["scored"] for one in scores):
            benchmarks[str(shared.name)] = _not_scored(shared, folders, scores)
            continue
        rows = tuple(score_rows(answers, benchmark, policy) for answers in shared.answers)
        scored.append(ScoredSet(shared, benchmark, rows))
        benchmarks[str(shared.name)] = _measured(scored[-1], folders, scores, seed)
    tested = [one for part in benchmarks.values() for one in part["comparisons"]]
    for one, corrected in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = corrected
    result = {
        "policy": policy,
        "seed": seed,
        "first": folders[0].name,
        "folders": [{"name": folder.name, "path": str(folder.path), "model": folder.model} for folder in folders],
        "notes": [*notes, *doubts(shared_sets, folders, benchmarks)],
        "tests": len(tested),
        "benchmarks": benchmarks,
    }
    return result, scored


def _scores(shared: SharedSet, folders: Sequence[ResultFolder], policy: Policy, seed: int) -> list[dict[str, Any]]:
    """Return each folder's score; of a benchmark that vapr does not know, that it is not scored."""
    if shared.benchmark is None:
        why = "no benchmark of this name, perhaps a judge set of your own"
        return [{"scored": False, "why": why} for _ in folders]
    results = []
    for folder, answers in zip(folders, shared.answers, strict=True):
        try:
            results.append(score(answers, shared.benchmark, policy, seed=seed))
        except UserError as error:
            raise UserError(f"{folder.path}: {error}") from None
    return results


def _not_scored(
    shared: SharedSet, folders: Sequence[ResultFolder], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "title": _title(shared),
        "blind": shared.name.blind,
        "scored": False,
        "why": next(one["why"] for one in scores if not one["scored"]),
        "questions": len(shared.answers[0]),
        "models": [{"name": folder.name, "stored": _stored(folder, str(shared.name))} for folder in folders],
        "comparisons": [],
        "splits": {},
    }


def _stored(folder: ResultFolder, name: str) -> dict[str, Any] | None:
    """Return the headline figure of a set that a judge scored before, None if it did not."""
    stored = folder.scores.get(name)
    if not isinstance(stored, dict) or not stored.get("scored"):
        return None
    headline, judge = str(stored.get("headline", "accuracy")), stored.get("judge")
    try:
        return {
            "name": headline,
            "questions": int(stored.get("questions") or 0),
            "judge": judge.get("name") if isinstance(judge, dict) else None,
            **_figure(stored, headline),
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        file = folder.path / "scores.json"
        raise UserError(f"{file}: '{name}' is no score as vapr writes it; score the folder again") from None


def _measured(
    one: ScoredSet, folders: Sequence[ResultFolder], scores: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    benchmark = one.benchmark
    numbers: dict[str, list[int]] = {}
    for n, row in enumerate(one.rows[0]):
        if (split := benchmark.split(row.prediction)) is not None:
            numbers.setdefault(split, []).append(n)
    splits = {}
    for split, members in numbers.items():
        rows = [[column[n] for n in members] for column in one.rows]
        models = [
            {"name": folder.name, **{key: _figure(result["splits"][split], key) for key in SPLIT_KEYS}}
            for folder, result in zip(folders, scores, strict=True)
        ]
        splits[split] = {
            "questions": len(members), "models": models, "comparisons": _comparisons(rows, folders, seed, whole=False)
        }  # fmt: skip
    models = [_model(folder.name, result) for folder, result in zip(folders, scores, strict=True)]
    comparisons = _comparisons(one.rows, folders, seed, whole=True)
    for compared, model in zip(comparisons, models[1:], strict=True):
        compared["headline"] = _headline_difference(benchmark.headline, models[0], model, compared)
    return {
        "title": _title(one.shared),
        "blind": one.shared.name.blind,
        "scored": True,
        "headline": benchmark.headline,
        "questions": len(one.rows[0]),
        "models": models,
        "comparisons": comparisons,
        "splits": splits,
        "note": benchmark.note,
    }


def _comparisons(
    rows: Sequence[Sequence[Row]], folders: Sequence[ResultFolder], seed: int, *, whole: bool
) -> list[dict[str, Any]]:
    """Compare every folder but the first with it; ``whole`` sets get their yes bias compared, too."""
    return [
        {
            "name": folder.name,
            **paired(rows[0], other, seed),
            **({"yes_bias": bias_differences(rows[0], other, seed)} if whole else {}),
        }
        for folder, other in zip(folders[1:], rows[1:], strict=True)
    ]


def _headline_difference(
    headline: str, first: Mapping[str, Any], other: Mapping[str, Any], compared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how much the headline figure differs; a benchmark's own has no paired interval."""
    if headline == "accuracy":
        return {key: compared["difference"][key] for key in ("value", "interval")}
    if headline in compared["yes_bias"] and headline not in other["figures"]:
        return {key: compared["yes_bias"][headline][key] for key in ("value", "interval")}
    before, now = first["headline"]["value"], other["headline"]["value"]
    return {"value": None if None in (before, now) else now - before, "interval": None}


def _model(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        **{key: _figure(result, key) for key in SPLIT_KEYS},
        "headline": _figure(result, result["headline"]),
        "unparsed": result["unparsed"],
        "guessed": result["guessed"],
        "figures": result["figures"],
        "yes_bias": result.get("yes_bias"),
        "policies": result["policies"],
    }


def _figure(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return value and interval of a benchmark's own figure, or of a common one."""
    own = result.get("figures", {}).get(name)
    if own is not None:
        return {"value": own["value"], "interval": own["interval"]}
    return {"value": result.get(name), "interval": result.get("intervals", {}).get(name)}


def _title(shared: SharedSet) -> str:
    title = shared.benchmark.title if shared.benchmark else shared.name.benchmark
    return f"{title}, without pictures" if shared.name.blind else title
