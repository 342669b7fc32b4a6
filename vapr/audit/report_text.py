"""The audit's figures in words and rows, for the terminal and the page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vapr.audit.gates import TOO_SMALL

Result = Mapping[str, Any]

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", TOO_SMALL: "cyan", "not measured": "dim"}
SHOWN_NGRAMS = 8

PART_COLUMNS = ("", "pairs", "rejected longer", "length gap", "distance", "surface", "n-grams", "yes chosen")
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
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:  # a log has no edge
        console = Console(highlight=False, emoji=False, width=max(200, 30 + 45 * len(sets)))
    for name, one in sets.items():
        for line in one["read"]:
            console.print(f"{name}: read {line}", style="dim", markup=False)
        for line in one["notes"]:
            console.print(f"{name}: {line}", style="dim", markup=False)
    console.print(_side_by_side({name: summary(one) for name, one in sets.items()}))
    for name, one in sets.items():
        for title, parts in (("category", one["categories"]), ("source", one["sources"])):
            if parts:
                console.print(_parts_table(f"{name}, by {title}", parts))
        if top := one["overall"]["ngrams"].get("top"):
            for side in ("chosen", "rejected"):
                told = ", ".join(repr(entry["feature"]) for entry in top[side][:SHOWN_NGRAMS]) or "nothing"
                console.print(f"{name}: marks {side}: {told}", markup=False)
        for row in summary(one):
            if row.why and row.status in COLOURS:
                console.print(Text(f"{name}: {row.name}: {row.status}: {row.why}", style=COLOURS[row.status]))
    console.print(Text(verdict(result), style="bold"))


def verdict(result: Result) -> str:
    """What came out, in one sentence."""
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
    """The rows of one set: size, gates, and what stands beside them."""
    overall = one["overall"]
    length, distance = overall["length"], overall["edit_distance"]
    skipped = one["skipped"]["rows"]
    rows = [
        Row("pairs", f"{one['pairs']:,}" + (f" ({skipped:,} rows skipped)" if skipped else "")),
        Row("seen by the probes", f"{one['probed']:,}" + (", drawn" if one["probed"] < one["pairs"] else "")),
        Row("images", f"{one['images']:,}" + _without_images(one)),
        *(Row(gate["name"], _gate_text(gate), gate["status"], gate["why"]) for gate in one["gates"]),
        Row("words, chosen / rejected", f"{length['chosen_mean']:.1f} / {length['rejected_mean']:.1f}"),
        Row("length ratio", spread(length["ratio"])),
        Row("ratio outside 0.9-1.1", f"{length['outside_0.9_1.1']:.1f} %"),
        Row("ratio outside 0.8-1.25", f"{length['outside_0.8_1.25']:.1f} %"),
        Row("edit distance", spread(distance)),
        Row("above 0.35, long answers", _percent(distance["above_0.35"])),
        Row("AUC, surface / n-grams", f"{_auc(overall['surface'])} / {_auc(overall['ngrams'])}"),
        Row("near-duplicate rejected", _near(one["near_duplicates"])),
    ]
    if one["model"] is not None:
        rows += _model_rows(one["model"])
    return rows


def _without_images(one: Result) -> str:
    counts = {
        "pairs without": one["pairs_without_images"],
        "pairs whose files are missing": one["pairs_with_missing_images"],
    }
    said = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f" ({said})" if said else ""


def _gate_text(gate: Result) -> str:
    if gate["value"] is None:
        return "not measured"
    if gate["name"] == "gain by the image":
        return estimate(gate, " points")
    return estimate(gate)


def estimate(figure: Result, unit: str = " %") -> str:
    """``61.0 % [58.3, 63.6]``."""
    if figure["value"] is None:
        return "none"
    interval = f" [{figure['interval'][0]:.1f}, {figure['interval'][1]:.1f}]" if figure["interval"] else ""
    return f"{figure['value']:.1f}{unit}{interval}".replace("-0.0", "0.0")


def spread(quantiles: Result) -> str:
    """Median, and where nine tenths lie."""
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
    """Column heads and rows of a table of categories or sources."""
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
        _accuracy(part["surface"]),
        _accuracy(part["ngrams"]),
        estimate(part["polarity"]["yes_chosen"]),
    ]
    if "model" in part:
        cells += [estimate(part["model"][view]["accuracy"]) for view in ("with_image", "blind")]
    return cells


def _accuracy(probe: Result) -> str:
    return "too few pairs" if probe["accuracy"] is None else estimate({**probe, "value": probe["accuracy"]})


def _side_by_side(columns: Mapping[str, Sequence[Row]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    by_name = [{row.name: row for row in rows} for rows in columns.values()]
    for name in dict.fromkeys(name for rows in by_name for name in rows):
        table.add_row(name, *(_cell(rows.get(name)) for rows in by_name))
    return table


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text("")
    status = row.status.upper() if row.status == "fail" else row.status
    if not status or status == row.text:
        return Text(row.text, style=COLOURS.get(row.status, ""))
    return Text.assemble(row.text, " ", (status, COLOURS[row.status]))


def _parts_table(title: str, parts: Mapping[str, Result]) -> Table:
    heads, rows = part_rows(parts)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=Text(title), title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
