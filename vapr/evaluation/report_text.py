"""Scores for the terminal."""

from typing import Any

KEYS = ("accuracy", "precision", "recall", "f1", "yes_rate", "gold_yes_rate", "unparsed_rate")


def show(result: dict[str, Any]) -> str:
    """Return the figures of :func:`vapr.evaluation.score.score` as lines of a table."""
    if not result["scored"]:
        return f"{result['benchmark']}  not scored: {result['why']}"
    if result["policy"] == "judge":
        return _judged(result)
    lines = [f"{result['benchmark']}, read as '{result['policy']}', {result['questions']:,} answers, shares in %"]
    lines.append(f"{'':16}{'questions':>10}" + "".join(f"{key.removesuffix('_rate'):>11}" for key in KEYS))
    for name, part in {"all": result, **result["splits"]}.items():
        values = "".join(f"{'':>11}" if part[key] is None else f"{100 * part[key]:>11.2f}" for key in KEYS)
        lines.append(f"{name[:15]:16}{part['questions']:>10,}{values}")
    for name, figure in result["figures"].items():
        lines.append(f"{name:<26}{figure['value']:.4f}" if figure["value"] is not None else f"{name:<26}none")
    return "\n".join(lines)


def _judged(result: dict[str, Any]) -> str:
    """Return the figures of a set that a judge scored, each with its interval."""
    asked = f" of {result['asked']:,}: partial" if result["partial"] else ""
    lines = [f"{result['benchmark']}, judged by '{result['judge']['name']}', {result['questions']:,} answers{asked}"]
    for name, part in {"all": result, **result["splits"]}.items():
        unparsed = f"{100 * part['unparsed_rate']:.2f} % unparsed"
        lines.append(f"{name[:24]:26}{part['questions']:>8,} answers, {unparsed}")
        figures = dict(part["figures"])
        if part["accuracy"] is not None:
            figures = {"accuracy": {"value": part["accuracy"], "interval": part["intervals"]["accuracy"]}, **figures}
        for key, figure in figures.items():
            low, high = figure["interval"] or (None, None)
            interval = "" if low is None else f"  [{low:.2f}, {high:.2f}]"
            lines.append(f"  {key:<24}{figure['value']:>8.2f}{interval}" if figure["value"] is not None else f"  {key}")
    for problem, count in result["problems"].items():
        lines.append(f"left out: {count:,} x {problem}")
    return "\n".join([*lines, result["note"]] if result["note"] else lines)
