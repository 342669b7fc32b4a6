"""Scores for the terminal."""

from typing import Any

KEYS = ("accuracy", "precision", "recall", "f1", "yes_rate", "gold_yes_rate", "unparsed_rate")


def show(result: dict[str, Any]) -> str:
    """Return the figures of :func:`vapr.evaluation.score.score` as lines of a table."""
    if not result["scored"]:
        return f"{result['benchmark']}  not scored: {result['why']}"
    lines = [f"{result['benchmark']}, read as '{result['policy']}', {result['questions']:,} answers, shares in %"]
    lines.append(f"{'':16}{'questions':>10}" + "".join(f"{key.removesuffix('_rate'):>11}" for key in KEYS))
    for name, part in {"all": result, **result["splits"]}.items():
        values = "".join(f"{'':>11}" if part[key] is None else f"{100 * part[key]:>11.2f}" for key in KEYS)
        lines.append(f"{name[:15]:16}{part['questions']:>10,}{values}")
    for name, figure in result["figures"].items():
        lines.append(f"{name:<26}{figure['value']:.4f}" if figure["value"] is not None else f"{name:<26}none")
    return "\n".join(lines)
