"""The audit's figures in words and rows, for the terminal and the page."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.text import Text

from vapr.audit.gates import TOO_SMALL
from vapr.terminal import table_console, text_table

Result = Mapping[str, Any]

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", TOO_SMALL: "cyan", "not measured": "dim"}
SHOWN_NGRAMS = 8

PART_COLUMNS = ("", "pairs", "rejected longer", "length gap", "distance", "surface", "n-grams", "yes chosen")
KIND_COLUMNS = ("", "pairs", "share", "of the picture changed", "told by the picture alone")
MODEL_COLUMNS = ("with image", "blind")


class Row(NamedTuple):
    """A figure of one set; ``status`` is that of its gate, if it has one."""

    name: str
    text: str
    status: str = ""
    why: str = ""


def show(result: Result) -> None:
    """Print the audit: figures side by side, then the parts and the telling n-grams of each set."""
    sets: dict[str, Result] = result["sets"]
    console = table_console(len(sets))
    for name, one in sets.items():
        for line in (*(f"read {line}" for line in one["read"]), *one["notes"]):
            console.print(f"{name}: {line}", style="dim", markup=False)
    console.print(text_table(*figure_rows(sets, _with_status), gap=3))
    for name, one in sets.items():
        for title, key in (("category", "categories"), ("source", "sources"), ("editor", "editors")):
            parts = one[key]
            if parts:
                console.print(text_table(*part_rows(parts), title=f"{name}, by {title}"))
        if pictures := one["pictures"]:
            console.print(text_table(*kind_rows(pictures["kinds"]), title=f"{name}, rejected_images by category"))
            if top := (pictures["probe"] or {}).get("top"):
                told = ", ".join(entry["feature"] for entry in top["rejected"][:SHOWN_NGRAMS]) or "nothing"
                console.print(f"{name}: rejected pictures have more of: {told}", markup=False)
        if top := one["overall"]["ngrams"].get("top"):
            for side in ("chosen", "rejected"):
                told = ", ".join(repr(entry["feature"]) for entry in top[side][:SHOWN_NGRAMS]) or "nothing"
                console.print(f"{name}: marks {side}: {told}", markup=False)
        for row in summary(one):
            if row.why:
                console.print(Text(f"{name}: {row.name}: {row.status}: {row.why}", style=COLOURS[row.status]))
    console.print(Text(verdict(result), style="bold"))


def verdict(result: Result) -> str:
    """Return the outcome in one sentence."""
    sets = result["sets"]
    failing = {name: [gate["name"] for gate in one["gates"] if gate["status"] == "fail"] for name, one in sets.items()}
    failing = {name: gates for name, gates in failing.items() if gates}
    statuses = Counter(gate["status"] for one in sets.values() for gate in one["gates"])
    warnings = f"; {count} warning{'s' if count > 1 else ''}" if (count := statuses["warn"]) else ""
    if count := statuses[TOO_SMALL]:
        warnings += f"; too small to tell in {count} gate{'s' if count > 1 else ''}"
    if not failing:
        return f"{'no gate fails' if len(sets) == 1 else f'none of the {len(sets)} sets fails a gate'}{warnings}"
    if len(sets) == 1:
        gates = next(iter(failing.values()))
        return f"{len(gates)} gate{'s fail' if len(gates) > 1 else ' fails'} ({', '.join(gates)}){warnings}"
    return f"{len(failing)} of {len(sets)} sets fail ({', '.join(failing)}){warnings}"


def summary(one: Result) -> list[Row]:
    """Return the rows of one set: size, gates, and the figures that stand beside them."""
    overall = one["overall"]
    length, distance = overall["length"], overall["edit_distance"]
    skipped = one["skipped"]["rows"]
    rows = [
        Row("pairs", f"{one['pairs']:,}" + (f" ({skipped:,} rows skipped)" if skipped else "")),
        Row("seen by the probes", f"{one['probed']:,}" + (", drawn" if one["probed"] < one["pairs"] else "")),
        Row("images", f"{one['images']:,}" + _without_images(one)),
        *(Row(gate["name"], gate_text(gate), gate["status"], gate["why"]) for gate in one["gates"]),
        Row("words, chosen / rejected", f"{length['chosen_mean']:.1f} / {length['rejected_mean']:.1f}"),
        Row("length ratio", _spread(length["ratio"])),
        Row("ratio outside 0.9-1.1", f"{length['outside_0.9_1.1']:.1f} %"),
        Row("ratio outside 0.8-1.25", f"{length['outside_0.8_1.25']:.1f} %"),
        Row("edit distance", _spread(distance)),
        Row("above 0.35, long answers", _percent(distance["above_0.35"])),
        Row("AUC, surface / n-grams", f"{_auc(overall['surface'])} / {_auc(overall['ngrams'])}"),
        Row("near-duplicate rejected", _near(one["near_duplicates"])),
    ]
    if one["pictures"] is not None:
        rows.append(Row("pairs with rejected_images", _pictures(one["pictures"])))
    if one["model"] is not None:
        rows += _model_rows(one["model"])
    return rows


def _pictures(pictures: Result) -> str:
    seen = f" ({pictures['seen']:,} seen)" if pictures["seen"] < pictures["pairs"] else ""
    unreadable = pictures["unreadable"]
    return f"{pictures['pairs']:,}{seen}" + (f", {unreadable:,} unreadable" if unreadable else "")


def _without_images(one: Result) -> str:
    counts = {
        "pairs without": one["pairs_without_images"],
        "pairs whose files are missing": one["pairs_with_missing_images"],
    }
    said = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f" ({said})" if said else ""


def gate_text(gate: Result) -> str:
    """Return the value of a gate with its interval."""
    if gate["value"] is None:
        return "not measured"
    if gate["name"] == "gain by the image":
        return estimate(gate, " points")
    return estimate(gate)


def estimate(figure: Result, unit: str = " %") -> str:
    """Return a figure with its interval, as in ``61.0 % [58.3, 63.6]``."""
    if figure["value"] is None:
        return "none"
    interval = f" [{figure['interval'][0]:.1f}, {figure['interval'][1]:.1f}]" if figure["interval"] else ""
    return f"{figure['value']:.1f}{unit}{interval}".replace("-0.0", "0.0")


def _spread(quantiles: Result) -> str:
    """Return the median, and between which values nine tenths lie."""
    return f"{quantiles['median']:.2f} ({quantiles['p5']:.2f} to {quantiles['p95']:.2f})"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} %"


def _auc(probe: Result) -> str:
    return f"{probe['auc']:.3f}" if probe.get("auc") is not None else "none"


def _near(near: Result) -> str:
    if near["percent"] is None:
        return "none long enough"
    return f"{near['percent']:.1f} % ({near['found']:,} of {near['compared']:,})"


def _model_rows(model: Result) -> list[Row]:
    shown, blind = model["with_image"], model["blind"]
    rows = [
        Row("model prefers chosen", estimate(shown["accuracy"])),
        Row("prefers chosen blind", estimate(blind["accuracy"])),
        Row("per token, with image", estimate(shown["accuracy_per_token"])),
        Row("per token, blind", estimate(blind["accuracy_per_token"])),
        Row("nats a pair / a token", f"{_nats(shown['margin'])} / {_nats(shown['margin_per_token'])}"),
        Row("the same blind", f"{_nats(blind['margin'])} / {_nats(blind['margin_per_token'])}"),
    ]
    if skipped := model["skipped"]["rows"]:
        rows.append(Row("not scored", f"{skipped:,}; the first: {model['skipped']['first'][0]}"))
    return rows


def _nats(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def part_rows(parts: Mapping[str, Result]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return column heads and rows of a table of categories, sources or editors."""
    with_model = any("model" in part for part in parts.values())
    heads = PART_COLUMNS + (MODEL_COLUMNS if with_model else ())
    return heads, [_part_row(name, part, len(heads)) for name, part in parts.items()]


def _part_row(name: str, part: Result, width: int) -> list[str]:
    if "length" not in part:
        return [f"{name}: {part['names']:,} more", f"{part['pairs']:,}", *[""] * (width - 2)]
    cells = [
        name,
        f"{part['pairs']:,}",
        estimate(part["length"]["rejected_longer"]),
        estimate({**part["length"]["gap"], "interval": None}),
        f"{part['edit_distance']['median']:.2f}",
        accuracy_text(part["surface"]),
        accuracy_text(part["ngrams"]),
        estimate(part["polarity"]["yes_chosen"]),
    ]
    if "model" in part:
        cells += [estimate(part["model"][view]["accuracy"]) for view in ("with_image", "blind")]
    return cells


def kind_rows(kinds: Mapping[str, Result]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return column heads and rows of the table of pairs with ``rejected_images``, by category."""
    rows = []
    for name, kind in kinds.items():
        changed = kind["changed"]
        spread = f"{changed['median']:.1%} ({changed['p5']:.1%} to {changed['p95']:.1%})"
        rows.append([name, f"{kind['pairs']:,}", f"{kind['percent']:.1f} %", spread, accuracy_text(kind["probe"])])
    return KIND_COLUMNS, rows


def accuracy_text(probe: Result) -> str:
    """Return the accuracy of a probe with its interval."""
    return "too few pairs" if probe["accuracy"] is None else estimate({**probe, "value": probe["accuracy"]})


def figure_rows(
    sets: Mapping[str, Result], cell: Callable[[Row], str | Text] = lambda row: row.text
) -> tuple[list[str], list[list[str | Text]]]:
    """Return heads and rows of the table of all figures, with a column for each set; ``cell`` makes its cells."""
    columns = [{row.name: cell(row) for row in summary(one)} for one in sets.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return ["", *sets], [[name, *(column.get(name, "") for column in columns)] for name in names]


def _with_status(row: Row) -> Text:
    status = row.status.upper() if row.status == "fail" else row.status
    if not status or status == row.text:
        return Text(row.text, style=COLOURS.get(row.status, ""))
    return Text.assemble(row.text, " ", (status, COLOURS[row.status]))
