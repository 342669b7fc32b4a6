"""The probes of a run as its report shows them: curves, a table with intervals, answers before and after."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.pages.chart import MINUS, Series, line_chart

NAMES = {
    "accuracy": "chosen likelier, with the image",
    "accuracy_blind": "chosen likelier, without it",
    "gap": "gap",
    "answers/accuracy": "answers right",
    "answers/yes_rate": "answers yes",
    "answers/gold_yes_rate": "truth is yes",
    "answers/unparsed_rate": "neither yes nor no",
}

CHARTS = (
    (
        "preferences", ("accuracy", "accuracy_blind"), ("after", "before"),
        "Share of pairs whose chosen answer the policy finds likelier than the rejected one. What it can tell without "
        "the image it has learned from the text alone.",
    ),
    (
        "answers to yes/no questions", ("answers/accuracy", "answers/yes_rate", "answers/gold_yes_rate"),
        ("after", "rejected", "before"),
        "Greedy answers. A policy without a bias says yes as often as it is true.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A question of the probe with what the policy answered, step by step."""

    question: str
    truth: str
    pictures: tuple[str, ...]
    """``data:`` URIs."""
    said: list[tuple[int, str]]

    @property
    def changes(self) -> list[tuple[str, str]]:
        """The first answer and the last, each after its step."""
        ends = self.said[:1] + self.said[1:][-1:]
        return [(f"step {step:,}", text) for step, text in ends]


@dataclass(frozen=True)
class ProbeSection:
    """What the template shows."""

    boxes: list[tuple[str, list[Series], Markup, str]]
    table: tuple[list[str], list[list[str]]]
    changed: str
    asked: Sequence[Shown]


def read_probes(run_dir: Path) -> list[dict[str, Any]]:
    """Read what the probes of a run found, by step; damaged files are left out."""
    found = []
    for file in (run_dir / "probe").glob("step-*.json"):
        try:
            probe = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(probe, dict) and {"step", "figures", "answers"} <= probe.keys():
            found.append(probe)
    return sorted(found, key=lambda probe: probe["step"])


def probe_section(run_dir: Path, last_step: int, asked: Sequence[Shown]) -> ProbeSection | None:
    """Return the section on the probes up to ``last_step``; None if there was none."""
    probes = [probe for probe in read_probes(run_dir) if probe["step"] <= last_step]
    if not probes:
        return None
    boxes = []
    for title, keys, colours, meaning in CHARTS:
        series = [
            Series(NAMES[key], colour, [(float(probe["step"]), _value(probe, key)) for probe in probes])
            for key, colour in zip(keys, colours, strict=True)
        ]
        if svg := line_chart(series, label=f"{title} by step", include=(0.0, 1.0)):
            boxes.append((title, series, svg, meaning))
    return ProbeSection(boxes, _table(probes), _changed(probes), asked)


def _value(probe: dict[str, Any], key: str) -> float | None:
    value = (probe["figures"].get(key) or {}).get("value")
    return None if value is None else float(value)


def _table(probes: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the figures of the first and the last probe, with their intervals."""
    ends = probes[:1] + probes[1:][-1:]
    rows = [[name, *(_text(probe, key) for probe in ends)] for key, name in NAMES.items() if key in ends[-1]["figures"]]
    rows.append(["seconds", *(f"{probe['seconds']:.1f}" for probe in ends)])
    return ["", *(f"step {probe['step']:,}" for probe in ends)], rows


def _text(probe: dict[str, Any], key: str) -> str:
    figure = probe["figures"].get(key) or {}
    if figure.get("value") is None:
        return "none"
    text = f"{figure['value']:.1%}"
    if figure.get("interval"):
        low, high = figure["interval"]
        text += f" [{low:.0%}, {high:.0%}]"
    return f"{text} of {figure['count']:,}".replace("-", MINUS)


def _changed(probes: list[dict[str, Any]]) -> str:
    """Say how many yes/no answers became right and how many wrong between the first probe and the last."""
    first, last = (
        {answer["where"]: answer["read"] == answer["gold"] for answer in probe["answers"] if answer["yes_or_no"]}
        for probe in (probes[0], probes[-1])
    )
    both = first.keys() & last.keys()
    if len(probes) < 2 or not both:
        return ""
    fixed = sum(last[place] and not first[place] for place in both)
    broken = sum(first[place] and not last[place] for place in both)
    return f"Of {len(both)} yes/no answers {fixed} became right and {broken} became wrong since the first probe."
