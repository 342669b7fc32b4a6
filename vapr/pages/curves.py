"""The metrics of a run as curves, each with a sentence that says what it shows."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from vapr.pages.chart import Point, Series, line_chart

Rows = list[dict[str, Any]]

SIDES = ("chosen", "rejected")


class Curve(NamedTuple):
    """A chart: its lines as (key, name, colour class), and a sentence for a newcomer."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    meaning: str
    smooth: bool = True
    include: tuple[float, ...] = ()
    by_some_losses: bool = False  # other runs do not miss it


CURVES = (
    Curve(
        "loss", (("loss", "loss", "after"),),
        "What training minimises. The sigmoid loss starts at log 2 = 0.693, where policy and reference still agree; "
        "held-out loss that turns upwards means overfitting.",
    ),
    Curve(
        "rewards/accuracies", (("rewards/accuracies", "accuracy", "after"),),
        "Share of pairs whose margin is positive. Guessing gives 0.5; 1.0 early on means that the pairs are too easy.",
        include=(0.0, 1.0),
    ),
    Curve(
        "rewards/margins", (("rewards/margins", "margin", "after"),),
        "Chosen reward minus rejected reward, mean over the pairs: how far the policy moved towards the preference.",
        include=(0.0,),
    ),
    Curve(
        "rewards/image_margins", (("rewards/image_margins", "margin", "after"),),
        "Reward of the chosen completion under its own image minus that under a second one. Where it stays at 0 while "
        "rewards/margins grows, the preferences are learned from the text.",
        include=(0.0,), by_some_losses=True,
    ),
    Curve(
        "rewards/symmetric_margins", (("rewards/symmetric_margins", "margin", "after"),),
        "How much each of two images prefers its own answer to the other's, mean of both.",
        include=(0.0,), by_some_losses=True,
    ),
    Curve(
        "rewards/chosen, rewards/rejected", tuple((f"rewards/{side}", side, side) for side in SIDES),
        "Beta times the change of the log-prob against the reference. The lines should part; where chosen falls below "
        "zero as well, the policy makes both completions less likely.",
        include=(0.0,),
    ),
    Curve(
        "logps/chosen, logps/rejected", tuple((f"logps/{side}", side, side) for side in SIDES),
        "Log-probs of whole completions under the policy. That chosen falls together with rejected is a known effect "
        "of DPO; watch it, because answers get worse when it goes far.",
    ),
    Curve(
        "grad_norm", (("grad_norm", "gradient norm", "after"),),
        "Gradient norm before clipping. Rare peaks are harmless; for steady growth try a lower learning rate.",
        include=(0.0,),
    ),
    Curve(
        "lr", (("lr", "learning rate", "after"),),
        "Size of the optimizer's steps: a warm-up, then the decay that the config sets.",
        smooth=False, include=(0.0,),
    ),
    Curve(
        "pairs_per_second", (("pairs_per_second", "pairs/s", "after"),),
        "Speed of whole steps, waiting for data included. Dips: long answers, large images or a slow disk.",
        include=(0.0,),
    ),
    Curve(
        "tokens, tokens_saved", (("tokens", "computed", "after"), ("tokens_saved", "saved by sharing", "before")),
        "Tokens computed in a step, and those that were not because pairs share a prefix.",
        include=(0.0,),
    ),
    Curve(
        "peak_memory_mib", (("peak_memory_mib", "MiB", "after"),),
        "Largest memory so far, in MiB. It should level off soon; lower packing.max_tokens if it nears the limit.",
        smooth=False, include=(0.0,),
    ),
    Curve(
        "mfu", (("mfu", "mfu", "after"),),
        "Useful floating point work as a share of the device's peak; what sharing saves is not counted as work.",
        include=(0.0,),
    ),
)  # fmt: skip


def read_metrics(path: Path) -> tuple[Rows, Rows]:
    """Read the training and the evaluation objects of a metrics.jsonl; lines that are not whole are left out."""
    training: Rows = []
    evaluation: Rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the half-written last line of a killed run
            continue
        if not isinstance(row, dict) or number(row.get("step")) is None:
            continue
        if "loss" in row:
            training.append(row)
        elif any(key.startswith("eval/") for key in row):
            evaluation.append(row)
    return training, evaluation


class CurveBox(NamedTuple):
    """A curve as the page shows it."""

    title: str
    series: list[Series]
    svg: str
    meaning: str


def curve_boxes(training: Rows, evaluation: Rows) -> tuple[list[CurveBox], list[str]]:
    """Draw every curve that has a value; the second list names those without any."""
    boxes, absent = [], []
    for curve in CURVES:
        single = len(curve.lines) == 1
        series = [Series(name, colour, points(training, key)) for key, name, colour in curve.lines]
        series += [
            Series("held out" if single else f"{name}, held out", "held-out" if single else colour, dots, marks=True)
            for key, name, colour in curve.lines
            if (dots := points(evaluation, f"eval/{key}"))
        ]
        svg = line_chart(series, label=f"{curve.title} by step", include=curve.include, smooth=curve.smooth)
        if svg:
            meaning = curve.meaning + (_saved(training) if curve.title.startswith("tokens") else "")
            boxes.append(CurveBox(curve.title, series, svg, meaning))
        elif not curve.by_some_losses:
            absent.append(curve.title)
    return boxes, absent


def _saved(training: Rows) -> str:
    return f" Over the whole run sharing saved {saved_share(training):.1%} of the plain layout's tokens."


def saved_share(training: Rows) -> float:
    """Return the share of the plain layout's tokens that sharing prefixes saved."""
    tokens, saved = (sum(column(training, key)) for key in ("tokens", "tokens_saved"))
    return saved / max(1, tokens + saved)


def best_evaluation(evaluation: Rows) -> dict[str, Any] | None:
    """Return the evaluation with the lowest held-out loss, the first of equal ones; None if there is none."""
    scored = [row for row in evaluation if number(row.get("eval/loss")) is not None]
    return min(scored, key=lambda row: (row["eval/loss"], row["step"]), default=None)


def number(value: Any) -> float | None:
    """Return a finite number as float, and None for whatever else stands in a file."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def column(rows: Rows, key: str) -> list[float]:
    """Return a metric's values, without the missing ones."""
    return [value for row in rows if (value := number(row.get(key))) is not None]


def points(rows: Rows, key: str) -> list[Point]:
    """Return a metric by step, None where it is missing."""
    return [(float(row["step"]), number(row.get(key))) for row in rows]
