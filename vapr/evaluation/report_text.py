"""Scores for the terminal."""

from typing import Any

KEYS = ("accuracy", "precision", "recall", "f1", "yes_rate", "gold_yes_rate", "unparsed_rate")

BIAS = (
    ("yes rate", "yes_rate", 100), ("yes rate of the truth", "gold_yes_rate", 100), ("gap", "gap", 100),
    ("false yes (FPR)", "fpr", 100), ("missed yes (FNR)", "fnr", 100), ("unparsed", "unparsed_rate", 100),
    ("balanced accuracy", "balanced_accuracy", 100), ("F1 of yes", "f1", 100), ("F1 of no", "f1_no", 100),
    ("d'", "d_prime", 1), ("criterion", "criterion", 1),
)  # fmt: skip
"""What stands in the table of the yes-bias: name, key, and factor."""

LOGITS = (
    ("P(yes) - P(no)", "p_yes_minus_p_no", 1), ("accuracy, likelier of two", "accuracy_unshifted", 100),
    ("threshold of equal errors", "threshold_shift", 1), ("accuracy there", "accuracy_shifted", 100),
)  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """Return the figures of :func:`vapr.evaluation.score.score` as lines of a table."""
    if not result["scored"]:
        return f"{result['benchmark']}  not scored: {result['why']}"
    if result["policy"] == "judge":
        return _judged(result)
    asked = f" of {result['asked']:,}: partial" if result["partial"] else ""
    answers = f"{result['questions']:,} answers{asked}"
    lines = [f"{result['benchmark']}, read as '{result['policy']}', {answers}, shares in %"]
    parts = {"all": result, **result["splits"]}
    wide = max(15, *map(len, parts)) + 1
    lines.append(f"{'':{wide}}{'questions':>10}" + "".join(f"{key.removesuffix('_rate'):>11}" for key in KEYS))
    for name, part in parts.items():
        values = "".join(f"{'':>11}" if part[key] is None else f"{100 * part[key]:>11.2f}" for key in KEYS)
        lines.append(f"{name:{wide}}{part['questions']:>10,}{values}")
    if (interval := result["intervals"]["accuracy"]) is not None:
        lines.append("accuracy of all, 95 % interval [{:.2f}, {:.2f}]".format(*(100 * end for end in interval)))
    wide = max(29, *map(len, result["figures"]), 0) + 1
    for name, figure in result["figures"].items():
        lines.append(f"{name:{wide}}{_own(figure)}")
    lines += [_by_policy(policy, short) for policy, short in result["policies"].items()]
    if "yes_bias" in result:
        lines += ["", *_yes_bias(result)]
    return "\n".join(lines)


def _own(figure: dict[str, Any]) -> str:
    """Return a figure of the benchmark's own, in its own unit, with its interval."""
    if figure["value"] is None:
        return "none"
    interval = "" if figure["interval"] is None else "   [{:.4f}, {:.4f}]".format(*figure["interval"])
    return f"{figure['value']:.4f}{interval}"


def _by_policy(policy: str, short: dict[str, Any]) -> str:
    """Return what one policy makes of the same answers."""
    if "why" in short:
        return f"read as {policy:18}not possible: {short['why']}"
    yes = "" if short["yes_rate"] is None else f", yes {_percent(short['yes_rate'])}"
    guessed = f", guessed {short['guessed']:,}" if short["guessed"] else ""
    unparsed = _percent(short["unparsed_rate"])
    return f"read as {policy:18}accuracy {_percent(short['accuracy'])}{yes}, unparsed {unparsed}{guessed}"


def _yes_bias(result: dict[str, Any]) -> list[str]:
    """Return the figures of the leaning to "yes", with intervals."""
    bias = result["yes_bias"]
    lines = [
        f"yes-bias of {bias['questions']:,} answers, read as '{result['policy']}'",
        f"{'':26}{'':>9}   95 % interval",
    ]
    for name, key, factor in BIAS:
        lines.append(f"{name:26}{_with_interval(bias[key], factor)}")
    for name, moved in bias["unparsed_as"].items():
        said = {"drop": "unparsed left out", "yes": "unparsed taken for yes", "no": "unparsed taken for no"}[name]
        lines.append(f"{said:26}accuracy {_percent(moved['accuracy'])}, yes {_percent(moved['yes_rate'])}")
    if logits := bias.get("logits"):
        without = f" ({logits['without']:,} answers have no logits)" if logits["without"] else ""
        lines.append(f"at the first answer token, {logits['questions']:,} answers{without}")
        for name, key, factor in LOGITS:
            lines.append(f"{name:26}{_with_interval(logits[key], factor)}")
    return lines


def _with_interval(figure: dict[str, Any], factor: float) -> str:
    if figure["value"] is None:
        return f"{'none':>9}"
    value, *ends = (round(factor * x, 2) or 0.0 for x in (figure["value"], *(figure["interval"] or ())))  # no "-0.00"
    return f"{value:>9.2f}" + ("   [{:.2f}, {:.2f}]".format(*ends) if ends else "")


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f}"


def _judged(result: dict[str, Any]) -> str:
    """Return the figures of a set that a judge scored, each with its interval."""
    asked = f" of {result['asked']:,}: partial" if result["partial"] else ""
    lines = [f"{result['benchmark']}, judged by '{result['judge']['name']}', {result['questions']:,} answers{asked}"]
    for name, part in {"all": result, **result["splits"]}.items():
        unparsed = f"{100 * part['unparsed_rate']:.2f} % unparsed"
        lines.append(f"{name:26}{part['questions']:>8,} answers, {unparsed}")
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
