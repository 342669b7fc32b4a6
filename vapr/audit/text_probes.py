"""Text-only shortcut probes: how well a linear classifier that never sees an image tells chosen from rejected."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vapr.errors import UserError
from vapr.intervals import MIN_GROUPS, bootstrap, percent
from vapr.text import words

FOLDS = 5
MIN_PAIRS = 50
"""Below, or below :data:`vapr.intervals.MIN_GROUPS`, a cross-validated number says more about the split."""

TOP = 15

AUC_RESAMPLES = 200
"""An area takes longer than a mean, and no gate hangs on it."""


def require_scikit_learn() -> None:
    """Raise UserError if the audit's libraries are missing."""
    try:
        import datasketch  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the audit needs {error.name}; pip install 'vapr[audit]'") from None


def probe(
    differences: Any, groups: np.ndarray, names: Sequence[str], *, seed: int, scaled: bool, thorough: bool = True
) -> dict[str, Any]:
    """Fit a pairwise logistic regression, cross-validated by group.

    The model sees features(chosen) - features(rejected), half of the rows with the sign turned, and says which; no
    intercept, so that turning a row turns its score and nothing else. Folds keep groups whole (GroupKFold). L2 with
    C = 1. A pair whose features do not differ counts half right.

    Args:
        differences: features of P pairs, (P, features) float64, dense or sparse.
        groups: group of each pair (P,).
        names: of the features.
        seed: of the turned half and of the bootstrap.
        scaled: divide features by their spread in the training folds.
        thorough: with AUC (scores of all folds pooled, interval by a bootstrap over groups) and top features.

    Returns:
        ``accuracy`` in percent with its ``interval`` (:func:`vapr.intervals.percent`), ``pairs``, ``usable`` (features
        differ), ``groups``, and if thorough ``auc``, ``auc_interval`` and ``top``. With too few usable pairs or groups
        ``accuracy`` is None and ``why`` says so.
    """
    from sklearn.model_selection import GroupKFold

    usable = np.asarray((differences != 0).sum(axis=1)).ravel() > 0
    num_groups = len(np.unique(groups[usable]))
    result: dict[str, Any] = {"pairs": len(groups), "usable": int(usable.sum()), "groups": num_groups}
    if usable.sum() < MIN_PAIRS or num_groups < MIN_GROUPS:
        why = f"{usable.sum():,} pairs that differ, on {num_groups:,} images; needs {MIN_PAIRS} on {MIN_GROUPS}"
        return {**result, "accuracy": None, "interval": None, "why": f"too few: {why}"}
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], len(groups))
    scores = np.zeros(len(groups))
    for train, test in GroupKFold(FOLDS).split(differences, groups=groups):
        train = train[usable[train]]
        if len(np.unique(signs[train])) == 2:
            model = _fit(differences[train], signs[train], scaled)
            scores[test] = model.decision_function(differences[test])
    right = np.where(np.abs(scores) < 1e-12, 0.5, scores > 0)
    share = percent(right, groups)
    result |= {"accuracy": share["value"], "interval": share["interval"], "why": None}
    if thorough:
        result |= _auc(scores, groups, seed)
        result["top"] = _top(_fit(differences[usable], signs[usable], scaled), differences, names)
    return result


def _fit(differences: Any, signs: np.ndarray, scaled: bool) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(
        StandardScaler(with_mean=False) if scaled else "passthrough",
        LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000, tol=1e-6),
    )
    turned = (
        differences.multiply(signs[:, None]).tocsr() if hasattr(differences, "tocsr") else differences * signs[:, None]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where classes are told apart perfectly the last digits never settle
        return model.fit(turned, signs > 0)


def _auc(scores: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    """Take each pair once as it is and once turned: the area does not depend on which half was turned."""
    from sklearn.metrics import roc_auc_score

    both, truth = np.concatenate([scores, -scores]), np.repeat([1, 0], len(scores))

    def area(weights: np.ndarray) -> float:
        return float(roc_auc_score(truth, both, sample_weight=np.tile(weights, 2)))

    return {"auc": area(np.ones(len(scores))), "auc_interval": bootstrap(area, groups, seed, AUC_RESAMPLES)}


def _top(model: Any, differences: Any, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the features with the largest weights both ways, and in how many pairs each side has more of it."""
    weights = model[-1].coef_[0]
    more = [np.asarray((differences > 0).sum(axis=0)).ravel(), np.asarray((differences < 0).sum(axis=0)).ravel()]
    order = np.argsort(-weights, kind="stable")
    sides: dict[str, list[int]] = {"chosen": [int(n) for n in order[:TOP] if weights[n] > 0]}
    sides["rejected"] = [int(n) for n in order[::-1][:TOP] if weights[n] < 0]
    return {
        side: [
            {
                "feature": names[n],
                "weight": float(weights[n]),
                "more_in_chosen": int(more[0][n]),
                "more_in_rejected": int(more[1][n]),
            }
            for n in members
        ]
        for side, members in sides.items()
    }


def ngram_differences(chosen: Sequence[str], rejected: Sequence[str]) -> tuple[Any, list[str]]:
    """Count words, marks and pairs of them in chosen minus rejected: sparse (P, features) float64, and their names.

    Lower case, words as :func:`vapr.text.words` has them.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(ngram_range=(1, 2), tokenizer=words, token_pattern=None, dtype=np.float64)
    try:
        counts = vectorizer.fit_transform([*chosen, *rejected])
    except ValueError:  # no word at all
        from scipy.sparse import csr_matrix

        return csr_matrix((len(chosen), 0)), []
    differences = counts[: len(chosen)] - counts[len(chosen) :]
    differences.eliminate_zeros()
    return differences, list(vectorizer.get_feature_names_out())


def in_two_pairs(differences: Any, names: Sequence[str]) -> tuple[Any, list[str]]:
    """Keep only the features that set apart at least two pairs: one alone teaches nothing about another."""
    kept = np.flatnonzero(np.asarray((differences != 0).sum(axis=0)).ravel() >= 2)
    return differences[:, kept], [names[int(n)] for n in kept]
