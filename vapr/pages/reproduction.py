"""The page that scripts/reproduce.sh ends in: what the paper reports, and what was measured here."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vapr.audit.report_text import gate_text
from vapr.pages.chart import MINUS, readable
from vapr.pages.curves import Rows, column, saved_share
from vapr.pages.figures import setting
from vapr.pages.page import write_page

GAINS = {"llava": ("LLaVA-1.5", 6.5), "qwen2_vl": ("Qwen2-VL", 4.0), "qwen2_5_vl": ("Qwen2.5-VL", 1.5)}
"""Average gain of each family in percent, by the paper's abstract, which does not say whether relative or in points."""
PILLS = {"pass": "pass", "warn": "warn", "fail": "fail"}


class Reproduction(NamedTuple):
    """The results of all stages, as read from their files."""

    name: str
    model: str
    family: str
    config: dict[str, Any]  # of the run
    metrics: Rows
    ledger: dict[str, Any]
    audit: dict[str, Any] | None
    comparison: dict[str, Any] | None  # of vapr eval --compare, base first; None without benchmarks
    known: Sequence[str]  # names of all benchmarks that vapr reads
    seconds: dict[str, float]  # of each stage, all starts added up
    links: Sequence[tuple[str, str]]


def write_reproduction_page(path: Path, read: Reproduction) -> str:
    """Write the page; returns its headline."""
    measured = _measured(read.comparison)
    said = _headline(read, measured)
    write_page(
        path,
        "reproduction.html",
        name=read.name,
        headline=said,
        model=read.model,
        policy=read.comparison["policy"] if read.comparison else "strict",
        links=read.links,
        cards=_cards(read, measured),
        claims=_claims(read, measured),
        benchmarks=[_benchmark(one) for one in measured.values()],
        yes_rates=[row for one in measured.values() if (row := _yes_rates(one))],
        missing=_missing(read, measured),
        categories=_categories(read.ledger),
        gates=_gates(read.audit),
        facts=_facts(read),
    )
    return said


def _measured(comparison: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the benchmarks that were scored, with pictures."""
    found = comparison["benchmarks"] if comparison else {}
    return {name: one for name, one in found.items() if one["scored"] and not one["blind"]}


def _gain(measured: Mapping[str, Any]) -> float | None:
    """Return the mean difference in accuracy over benchmarks, in points, each counted once."""
    found = [one["comparisons"][0]["difference"]["value"] for one in measured.values()]
    return 100 * statistics.fmean(found) if found else None


def _headline(read: Reproduction, measured: Mapping[str, Any]) -> str:
    gain = _gain(measured)
    if gain is None:
        return f"{read.name}: aligned; nothing was measured, because no benchmark was given"
    count = f"{len(measured)} benchmark{'s' if len(measured) > 1 else ''}"
    return f"{read.name}: {_points(gain)} in accuracy on {count}"


def _cards(read: Reproduction, measured: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    family, stated = GAINS[read.family]
    gain = _gain(measured)
    return [
        ("Measured gain", _points(gain), f"mean of {', '.join(measured) or 'no benchmark'}"),
        ("The paper states", f"+{stated} %", f"{family}, average of its ten benchmarks"),
        ("Pairs", f"{read.ledger['accepted']:,}", f"made by {read.ledger['editor']['name']}; the paper has 30,000"),
        (
            "Told apart",
            _percent(_last(read.metrics, "rewards/accuracies")),
            "of the pairs of the last steps",
        ),
    ]


def _claims(read: Reproduction, measured: Mapping[str, Any]) -> list[list[str]]:
    """Return rows: what is spoken of, the paper's word with its place, and what was found here."""
    family, stated = GAINS[read.family]
    gain, rates = _gain(measured), [row for one in measured.values() if (row := _yes_rates(one))]
    here = "not measured" if gain is None else f"{_points(gain)} in accuracy, mean of {', '.join(measured)}"
    yes = "; ".join(f"{name} {before} → {now} (true: {truth})" for name, before, now, truth in rates)
    editor = read.ledger["editor"]["name"]
    by_model = "it is what was used" if editor != "rules" else "not measured: rules edited, no language model"
    return [
        ["average gain", f"+{stated} % for {family}, over sizes and ten benchmarks (abstract)", here],
        ["says “Yes”", "less often to binary questions (abstract)", yes or "not measured"],
        ["pairs", "30K edited by GPT-4o (abstract)", f"{read.ledger['accepted']:,} edited by {editor}"],
        ["with an open editor", "about 99 % of the performance (abstract)", by_model],
        ["objective", "DPO (abstract)", ", ".join(setting(read.config)[1:])],
        ["learning rate, batch, epochs", "not known here", _optimisation(read.config)],
    ]


def _optimisation(config: Mapping[str, Any]) -> str:
    optim = config["optim"]
    seen = f"{optim['max_steps']} steps" if optim["max_steps"] else f"epochs: {optim['epochs']}"
    return f"{optim['lr']:g}, {optim['pairs_per_step']} pairs a step, {seen}"


def _benchmark(one: Mapping[str, Any]) -> list[str]:
    before, now = one["models"][:2]
    change = one["comparisons"][0]["difference"]
    text = _signed(100 * change["value"])
    if change["interval"]:
        low, high = change["interval"]
        text += f" [{_signed(100 * low)}, {_signed(100 * high)}]" + (" not told apart" if low <= 0 <= high else "")
    unparsed = " → ".join(_percent(model["unparsed_rate"]["value"]) for model in (before, now))
    return [one["title"], f"{one['questions']:,}", *(_share(m["accuracy"]) for m in (before, now)), text, unparsed]


def _yes_rates(one: Mapping[str, Any]) -> list[str] | None:
    before, now = one["models"][:2]
    if before["yes_rate"]["value"] is None or before["gold_yes_rate"]["value"] is None:
        return None
    rates = (before["yes_rate"], now["yes_rate"], before["gold_yes_rate"])
    return [one["title"], *(_percent(rate["value"]) for rate in rates)]


def _missing(read: Reproduction, measured: Mapping[str, Any]) -> list[str]:
    """Return the benchmarks that vapr can read and that were not scored, with the reason where there is one."""
    why = {name: one.get("why") for name, one in (read.comparison or {"benchmarks": {}})["benchmarks"].items()}
    return [f"{name} ({why[name]})" if why.get(name) else name for name in read.known if name not in measured]


def _categories(ledger: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [name, f"{one['accepted']:,}", f"{one['turns']:,}"]
        for name, one in ledger["categories"].items()
        if one["turns"]
    ]
    return [*rows, ["all", f"{ledger['accepted']:,}", f"{ledger['turns']['done']:,}"]]  # fmt: skip


def _gates(audit: Mapping[str, Any] | None) -> list[tuple[str, str, str, str, str]]:
    sets = audit["sets"].values() if audit else ()
    return [
        (gate["name"], gate["status"], PILLS.get(gate["status"], ""), gate_text(gate), gate["why"])
        for one in sets
        for gate in one["gates"]
    ]


def _facts(read: Reproduction) -> list[tuple[str, str]]:
    steps = len(column(read.metrics, "loss"))
    size, saved = read.config["optim"]["pairs_per_step"], saved_share(read.metrics)
    peak, speed = column(read.metrics, "peak_memory_mib"), column(read.metrics, "pairs_per_second")
    margin = _last(read.metrics, "rewards/margins")
    return [
        ("policy", ", ".join(setting(read.config))),
        ("steps", f"{steps:,} of {size} pairs; {saved:.0%} of the tokens saved by sharing"),
        ("speed", f"{statistics.median(speed):.1f} pairs a second (median)" if speed else "not known"),
        ("peak memory", f"{max(peak) / 1024:.1f} GiB" if peak else "not known"),
        ("margin at the end", "not known" if margin is None else readable(margin)),
        *((f"time of {stage}", _time(seconds)) for stage, seconds in read.seconds.items()),
    ]


def _last(rows: Rows, key: str) -> float | None:
    """Return the mean over the last tenth of the steps, at least one."""
    values = column(rows, key)
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} hours"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", MINUS).replace(f"{MINUS}0.0", "+0.0")


def _points(gain: float | None) -> str:
    return "none" if gain is None else f"{_signed(gain)} points"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _share(figure: Mapping[str, Any]) -> str:
    text = _percent(figure["value"])
    if figure["interval"]:
        low, high = figure["interval"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text
