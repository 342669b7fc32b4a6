"""A run in a few words and figures: its setting and how it went, for its report and for comparing runs."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from vapr.loss_config import REFERENCE_FREE
from vapr.pages.chart import readable
from vapr.pages.curves import SIDES, Rows, column, number


class Figure(NamedTuple):
    """A row of a table: its name, the metric, the function that writes a value, and the divisor of the metric."""

    name: str
    key: str
    show: Callable[[float], str]
    divisor: float = 1.0

    def mean(self, rows: Rows, prefix: str = "") -> float | None:
        """Return the mean over rows of metrics.jsonl, None without a value; ``prefix`` is ``eval/`` for evaluations."""
        values = column(rows, f"{prefix}{self.key}")
        return statistics.fmean(values) / self.divisor if values else None

    def text(self, rows: Rows, prefix: str = "") -> str:
        value = self.mean(rows, prefix)
        return "none" if value is None else self.show(value)


def figures_of(config: dict[str, Any]) -> list[Figure]:
    """Return the figures that are shown of a run with this config.

    The change of log-probs is the rewards over beta: policy and reference on the same pairs.
    """
    figures = [
        Figure("accuracy", "rewards/accuracies", "{:.1%}".format),
        Figure("margin", "rewards/margins", readable),
        Figure("loss", "loss", readable),
    ]
    if beta := reward_beta(config):
        figures += [Figure(f"{side} log-prob minus reference", f"rewards/{side}", signed, beta) for side in SIDES]
    return figures


def signed(value: float) -> str:
    """Write a readable number with its sign."""
    return f"+{readable(value)}" if value > 0 else readable(value)


def setting(config: dict[str, Any]) -> list[str]:
    """Return model, trained part and loss of a config, in a few words each."""
    lora = at(config, "policy", "lora")
    how = f"LoRA, rank {at(config, 'policy', 'lora', 'rank')}" if lora else "full fine-tuning"
    model = str(at(config, "policy", "model") or "unknown model")
    return [part for part in (model, how if config else "", _loss(config)) if part]


def reward_beta(config: dict[str, Any]) -> float | None:
    """Return beta of the loss whose rewards are logged; None where these do not compare with a reference."""
    terms = [term for term in _terms(config) if term.get("kind") != "sft"]
    terms = [term for term in terms if term.get("kind") not in ("anchor", "image")] or terms
    if not terms or terms[0].get("kind") in REFERENCE_FREE:
        return None
    return number(terms[0].get("beta"))


def _loss(config: dict[str, Any]) -> str:
    named = [
        (f"{term['weight']:g} x " if number(term.get("weight", 1)) not in (None, 1) else "")
        + f"{term.get('kind')} (beta {term.get('beta')})"
        + (f" + {term['sft_weight']} x sft" if term.get("sft_weight") else "")
        for term in _terms(config)
    ]
    return f"loss {' + '.join(named)}" if named else ""


def _terms(config: dict[str, Any]) -> list[dict[str, Any]]:
    terms = config.get("loss")
    return [term for term in (terms if isinstance(terms, list) else [terms]) if isinstance(term, dict)]


def mapping(text: str | None) -> dict[str, Any]:
    """Parse YAML or JSON; empty if it is no mapping."""
    try:
        value = yaml.safe_load(text or "")
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return {}
    return value if isinstance(value, dict) else {}


def at(config: dict[str, Any], *keys: str) -> Any:
    """Return the value under nested keys; None where there is nothing."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a config by dotted keys, such as ``loss.0.beta``."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(n): item for n, item in enumerate(value)}
    if isinstance(value, dict) and value:
        return {key: one for name, item in value.items() for key, one in flat(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
