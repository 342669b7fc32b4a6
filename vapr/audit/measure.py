"""The bias audit of pair sets: how far the rejected text gives itself away to someone who never saw the image."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vapr.audit.gates import judge
from vapr.audit.near_duplicates import near_duplicates, repeated
from vapr.audit.pair_table import SAYS, PairTable, answer_text, question, read_table
from vapr.audit.pictures import measure_pictures
from vapr.audit.text_probes import FOLDS, in_two_pairs, ngram_differences, probe, require_scikit_learn
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.intervals import percent, relative_gap
from vapr.progress import Display
from vapr.text import STYLE_KEYS

MAX_PAIRS = 20_000
MAX_SHOWN = 40
"""Categories, sources and editors that get figures of their own: the largest."""

LONG_ANSWER = 8
"""Words above which editing.md's bound on the edit distance holds; short answers are exempt."""


def audit(
    sets: Mapping[str, Pairs], *, max_pairs: int = MAX_PAIRS, seed: int = 0, model: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure one or more pair sets and hold each against the gates (:mod:`vapr.audit.gates`).

    Args:
        sets: opened pairs by the name they are shown under.
        max_pairs: at most so many pairs of a set, drawn by ``seed``, are seen by probes, the search for near-duplicates
            and the model; everything else is measured on all.
        seed: of every draw.
        model: folder or hub id of a reference model, for log-probs with and without the image.
        limit: at most so many of the drawn pairs are scored by the model.

    Returns:
        Plain data: ``settings``, ``sets`` (figures by name, see ``docs/audit.md``) and ``failed`` (``set: gate``).

    Raises:
        UserError: for a bad row, a set without pairs, or a missing library.
    """
    require_scikit_learn()
    results = {}
    with _open_scorer(model) as scorer:
        for name, pairs in sets.items():
            table = read_table(pairs, max_pairs=max_pairs, seed=seed)
            scores = None
            if scorer is not None:
                scores = scorer.scores(pairs, table, _some(table.sampled, limit, seed))
            results[name] = _set_result(pairs, table, scores, seed)
            results[name]["gates"] = judge(results[name])
    settings = {"max_pairs": max_pairs, "seed": seed, "model": model, "limit": limit, "folds": FOLDS}
    failed = [
        f"{name}: {gate['name']}" for name, one in results.items() for gate in one["gates"] if gate["status"] == "fail"
    ]
    return {"settings": settings, "sets": results, "failed": failed}


def _open_scorer(model: str | None) -> contextlib.AbstractContextManager[Any]:
    if model is None:
        return contextlib.nullcontext()
    from vapr.audit.image_ablation import Scorer  # with torch, which the rest of the audit does without

    return Scorer(model)


def _some(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


def _set_result(pairs: Pairs, table: PairTable, scores: Any, seed: int) -> dict[str, Any]:
    with Display("probe", _num_parts(table), unit="part") as display:
        figures = partial(_figures, table, _Features(table), scores, seed, display)
        return {
            "read": pairs.formats,
            "notes": pairs.notes,
            "unused_columns": dict(sorted(pairs.unused.items())),
            "rows": len(pairs),
            "pairs": len(table),
            "images": table.num_images,
            "pairs_without_images": int((~table.with_images).sum()),
            "pairs_with_missing_images": int(table.missing_images.sum()),
            "probed": len(table.sampled),
            "skipped": {"rows": len(pairs.skipped), "first": list(pairs.skipped.values())[:3]},
            "overall": figures(np.arange(len(table)), thorough=True),
            "style": _style(table),
            "histograms": _histograms(table),
            "categories": _parts(table, table.categories, figures),
            "sources": _parts(table, table.sources, figures),
            "editors": _parts(table, table.editors, figures),
            "duplicates": _duplicates(pairs, table),
            "near_duplicates": _near_duplicates(pairs, table),
            "pictures": measure_pictures(pairs, table, seed),
            "model": scores.summary(seed) if scores is not None else None,
        }


class _Features:
    """The features of the sampled pairs that the probes see: chosen minus rejected."""

    def __init__(self, table: PairTable) -> None:
        style = table.style[table.sampled].astype(float)
        characters = table.characters[table.sampled]
        self.surface = np.column_stack([style[:, 0] - style[:, 1], characters[:, 0] - characters[:, 1]])
        self.surface_names = [*STYLE_KEYS, "characters"]
        self.ngrams, self.ngram_names = ngram_differences(*zip(*table.texts, strict=True))


def _figures(
    table: PairTable, features: _Features, scores: Any, seed: int, display: Display, rows: np.ndarray, *,
    thorough: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure what a set, a category and a source have alike. ``rows`` are indices into the table."""
    groups = table.groups[rows]
    places = np.flatnonzero(np.isin(table.sampled, rows))
    probed = table.groups[table.sampled[places]]
    ngrams, names = in_two_pairs(features.ngrams[places], features.ngram_names)
    figures = {
        "pairs": len(rows),
        "groups": len(np.unique(groups)),
        "length": _length(table.lengths[rows], groups),
        "edit_distance": _distance(table.distance[rows], table.lengths[rows]),
        "polarity": _polarity(table.polarity[rows], groups),
        "surface": probe(
            features.surface[places], probed, features.surface_names, seed=seed, scaled=True, thorough=thorough
        ),
        "ngrams": probe(ngrams, probed, names, seed=seed, scaled=False, thorough=thorough),
    }
    if scores is not None:
        figures["model"] = scores.figures(rows, seed)
    display.advance("")
    return figures


def _length(lengths: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    chosen, rejected = lengths[:, 0], lengths[:, 1]
    ratio = rejected / np.maximum(chosen, 1)
    return {
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        "gap": relative_gap(rejected, chosen, groups),
        "rejected_longer": percent(np.where(rejected == chosen, 0.5, rejected > chosen), groups),
        "equal": 100 * float(np.mean(rejected == chosen)),
        "ratio": _quantiles(ratio),
        "outside_0.9_1.1": 100 * float(np.mean((ratio < 0.9) | (ratio > 1.1))),
        "outside_0.8_1.25": 100 * float(np.mean((ratio < 0.8) | (ratio > 1.25))),
    }


def _distance(distance: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    long = distance[lengths[:, 0] > LONG_ANSWER]
    return {
        **_quantiles(distance),
        "same_text": int((distance == 0).sum()),
        "long_answers": len(long),
        "above_0.35": 100 * float(np.mean(long > 0.35)) if len(long) else None,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {"p5": float(low), "median": float(middle), "p95": float(high), "mean": float(values.mean())}


def _polarity(polarity: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Count ``counts[chosen][rejected]``, and among pairs that answer yes against no how often yes is chosen."""
    counts = {
        chosen: {
            rejected: int(((polarity[:, 0] == n) & (polarity[:, 1] == m)).sum()) for m, rejected in enumerate(SAYS)
        }
        for n, chosen in enumerate(SAYS)
    }
    opposed = (polarity > 0).all(axis=1) & (polarity[:, 0] != polarity[:, 1])
    return {"counts": counts, "yes_chosen": percent(polarity[opposed, 0] == SAYS.index("yes"), groups[opposed])}


def _style(table: PairTable) -> dict[str, dict[str, float]]:
    """Measure every style feature: means, and in how many percent of the pairs the two sides differ."""
    means = table.style.mean(axis=0, dtype=float)
    more = [100 * (table.style[:, side] > table.style[:, 1 - side]).mean(axis=0) for side in (0, 1)]
    return {
        key: {
            "chosen_mean": float(means[0, n]),
            "rejected_mean": float(means[1, n]),
            "more_in_chosen": float(more[0][n]),
            "more_in_rejected": float(more[1][n]),
        }
        for n, key in enumerate(STYLE_KEYS)
    }


def _histograms(table: PairTable) -> dict[str, dict[str, list[float]]]:
    """Count pairs between edges. Length differences beyond the last edges go into the outermost bins."""
    difference = table.lengths[:, 1] - table.lengths[:, 0]
    reach = max(5, min(60, int(np.percentile(np.abs(difference), 99)) + 1))
    step = max(1, -(-(2 * reach + 1) // 41))
    half = -(-reach // step)
    edges = (np.arange(-half, half + 2) - 0.5) * step
    inside = np.clip(difference, edges[0], edges[-1])
    lengths = np.histogram(inside, edges)
    distances = np.histogram(table.distance, np.linspace(0, 1, 21))
    named = {"length_difference": lengths, "edit_distance": distances}
    return {name: {"edges": edges.tolist(), "counts": counts.tolist()} for name, (counts, edges) in named.items()}


def _parts(table: PairTable, labels: np.ndarray, figures: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    """Return figures by label, the largest first; none where all have one label, as the overall figures say it all."""
    shown = _by_size(labels)
    parts: dict[str, Any] = {name: figures(np.flatnonzero(labels == name)) for name, _ in shown[:MAX_SHOWN]}
    if rest := shown[MAX_SHOWN:]:
        names = {name for name, _ in rest}
        rows = np.array([label in names for label in labels])
        others = {"pairs": int(rows.sum()), "names": len(rest)}
        parts["(others)"] = {**others, "polarity": _polarity(table.polarity[rows], table.groups[rows])}
    return parts


def _by_size(labels: np.ndarray) -> list[tuple[str, int]]:
    """Return the labels and how many pairs have each; none if there is only one."""
    counts = Counter(labels.tolist())
    return sorted(counts.items(), key=lambda one: (-one[1], one[0])) if len(counts) > 1 else []


def _num_parts(table: PairTable) -> int:
    return 1 + sum(min(len(_by_size(labels)), MAX_SHOWN) for labels in table.labels)


def _duplicates(pairs: Pairs, table: PairTable) -> dict[str, Any]:
    groups = repeated(table.identities)
    extra = sum(len(group) - 1 for group in groups)
    examples = [
        {"places": [pairs.where(int(table.numbers[n])) for n in group[:3]], **_shown(pairs, table, group[0])}
        for group in groups[:3]
    ]
    return {"extra": extra, "percent": 100 * extra / len(table), "examples": examples}


def _near_duplicates(pairs: Pairs, table: PairTable) -> dict[str, Any]:
    found = near_duplicates([rejected for _, rejected in table.texts], table.questions[table.sampled])
    examples = []
    for *two, similarity in found["examples"]:
        rows = [table.sampled[n] for n in two]
        places = [pairs.where(int(table.numbers[row])) for row in rows]
        examples.append({"places": places, "rejected": [table.texts[n][1] for n in two], "similarity": similarity})
    return {**found, "examples": examples}


def _shown(pairs: Pairs, table: PairTable, row: int) -> dict[str, str]:
    pair = pairs[int(table.numbers[row])]
    return {"question": question(pair), "rejected": answer_text(pair.rejected)}


def named(sources: Sequence[str], opened: Sequence[Pairs]) -> dict[str, Pairs]:
    """Return the sets by the shortest ends of their names that tell them apart.

    Raises:
        UserError: if one is given twice.
    """
    if len(set(sources)) < len(sources):
        raise UserError(f"{next(s for s in sources if sources.count(s) > 1)}: given twice; name each set once")
    for parts in range(1, 20):
        names = ["/".join(source.rstrip("/").split("/")[-parts:]) for source in sources]
        if len(set(names)) == len(names):
            return dict(zip(names, opened, strict=True))
    return dict(zip(sources, opened, strict=True))
