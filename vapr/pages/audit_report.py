"""The audit's page: verdict, gates, probes with their limits, lengths, telling n-grams, parts, duplicates."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.audit.gates import IMAGE_GAP, NGRAM_LIMIT, NGRAM_WARNING, SURFACE_LIMIT
from vapr.audit.pair_table import SAYS
from vapr.audit.report_text import estimate, part_rows, summary, verdict
from vapr.pages.bars import Bar, Limit, bar_chart, histogram
from vapr.pages.page import folding_table, page, word_diff, write_page

Result = Mapping[str, Any]

NGRAMS_SHOWN = 10
STYLE_SHOWN_FROM = 0.05
"""Percent of the pairs that must differ in a style feature for it to be listed."""


def write_audit_report(path: Path, result: Result) -> None:
    """Write the page of an audit's result (:func:`vapr.audit.measure.audit`), whole or not at all."""
    sets = result["sets"]
    sections = (
        ("Gates", _gates(sets)),
        ("What the text alone gives away", _probes(sets)),
        ("Length and distance", _lengths(sets)),
        ("Words that mark a side", _each(sets, _ngrams)),
        ("Style", _each(sets, _style)),
        ("Yes and no", _each(sets, _polarity)),
        ("By category", _each(sets, lambda one: _parts(one["categories"]))),
        ("By source", _each(sets, lambda one: _parts(one["sources"]))),
        ("Duplicates", _each(sets, _duplicates)),
        ("With the image and without", _model(sets)),
        ("All figures", _figures(sets)),
        ("What was read", _read(result)),
    )
    body = f"<h1>vapr audit: {html.escape(verdict(result))}</h1>{_explained()}" + "".join(
        f"<h2>{title}</h2>{text}" for title, text in sections if text
    )
    write_page(path, page("vapr audit", body))


def _explained() -> str:
    return (
        "<p>A pair set should be won by looking at the image. Here is how far someone gets who never sees it. Values "
        "in brackets are 95 % intervals over images; a gate fails only if its whole interval lies beyond the limit.</p>"
    )


def _each(sets: Mapping[str, Result], section: Any) -> str:
    """A section's box of every set that has something to show; named if there are several sets."""
    shown = [(name, text) for name, one in sets.items() if (text := section(one))]
    return "".join(f'<div class="box tall">{_name(name, sets)}{text}</div>' for name, text in shown)


def _name(name: str, sets: Mapping[str, Result]) -> str:
    return f"<h3>{html.escape(name)}</h3>" if len(sets) > 1 else ""


def _gates(sets: Mapping[str, Result]) -> str:
    boxes = []
    for name, one in sets.items():
        rows = "".join(
            f'<tr><td><span class="pill {row.status.replace(" ", "-")}">{row.status}</span></td>'
            f"<td><b>{html.escape(row.name)}</b> {'' if row.text == row.status else html.escape(row.text)}"
            f'<div class="soft">{html.escape(limit)}{": " + html.escape(row.why) if row.why else ""}</div></td></tr>'
            for row, limit in _gate_rows(one)
        )
        boxes.append(f'<div class="box">{_name(name, sets)}<table class="gates">{rows}</table></div>')
    return f'<div class="curves two">{"".join(boxes)}</div>'


def _gate_rows(one: Result) -> list[tuple[Any, str]]:
    limits = {gate["name"]: gate["limit"] for gate in one["gates"]}
    return [(row, limits[row.name]) for row in summary(one) if row.name in limits]


def _probes(sets: Mapping[str, Result]) -> str:
    charts = (
        ("surface", "Surface probe", "Length, punctuation, casing, lists, hedges.", (Limit(SURFACE_LIMIT, "bad"),)),
        (
            "ngrams",
            "N-gram probe",
            "Single words and two in a row.",
            (Limit(NGRAM_WARNING, "soft"), Limit(NGRAM_LIMIT, "bad")),
        ),
    )
    boxes = []
    for key, title, note, limits in charts:
        bars = [_probe_bar(name, one["overall"][key]) for name, one in sets.items()]
        chart = bar_chart(bars, (40.0, 100.0), (Limit(50.0, "soft"), *limits), title)
        boxes.append(f'<div class="box"><h3>{title}</h3>{chart}<p>{note} Limits are drawn; 50 % is a guess.</p></div>')
    return f'<div class="curves two">{"".join(boxes)}</div>'


def _probe_bar(name: str, probe: Result) -> Bar:
    if probe["accuracy"] is None:
        return Bar(name, None, None, "too few pairs")
    return Bar(name, probe["accuracy"], probe["interval"], estimate({**probe, "value": probe["accuracy"]}))


def _lengths(sets: Mapping[str, Result]) -> str:
    boxes = []
    for name, one in sets.items():
        lengths, distances = (one["histograms"][key] for key in ("length_difference", "edit_distance"))
        end = (lengths["edges"][-1] + lengths["edges"][-2]) / 2
        charts = (
            (
                "Rejected minus chosen, in words",
                histogram(lengths["edges"], lengths["counts"], (-end, 0.0, end), "length difference"),
                "Right of zero: rejected is longer. The outermost bars hold what lies beyond, too.",
            ),
            (
                "Edit distance",
                histogram(distances["edges"], distances["counts"], (0.0, 0.5, 1.0), "edit distance"),
                "0: the same words; 1: none in common.",
            ),
        )
        boxes += [
            f'<div class="box">{_name(name, sets)}<h3>{title}</h3>{chart}<p>{note}</p></div>'
            for title, chart, note in charts
        ]
    return f'<div class="curves two">{"".join(boxes)}</div>'


def _ngrams(one: Result) -> str:
    top = one["overall"]["ngrams"].get("top")
    if top is None:
        return f'<p class="soft">{html.escape(one["overall"]["ngrams"]["why"])}</p>'
    columns = []
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        rows = "".join(
            f"<tr><td><code>{html.escape(entry['feature'])}</code></td><td>{entry[f'more_in_{side}']:,}</td>"
            f"<td>{entry[f'more_in_{other}']:,}</td></tr>"
            for entry in top[side][:NGRAMS_SHOWN]
        )
        columns.append(
            f'<div class="answer {side}"><table class="figures"><tr><th>speaks for {side}</th><th>pairs</th>'
            f"<th>for {other}</th></tr>{rows}</table></div>"
        )
    return (
        f'<div class="answers">{"".join(columns)}</div><p class="soft">The largest weights of the n-gram probe. '
        "<i>pairs</i>: how often the side it speaks for has more of it; then, how often the other one has.</p>"
    )


def _style(one: Result) -> str:
    rows = [
        (
            name.replace("_", " "),
            *(f"{value[key]:.2f}" for key in ("chosen_mean", "rejected_mean")),
            *(f"{value[key]:.1f} %" for key in ("more_in_chosen", "more_in_rejected")),
        )
        for name, value in one["style"].items()
        if value["more_in_chosen"] + value["more_in_rejected"] > STYLE_SHOWN_FROM
    ]
    if not rows:
        return '<p class="soft">Chosen and rejected have the same style, feature by feature.</p>'
    return folding_table(("", "chosen", "rejected", "more in chosen", "more in rejected"), rows)


def _polarity(one: Result) -> str:
    counts = one["overall"]["polarity"]["counts"]
    opposed = one["overall"]["polarity"]["yes_chosen"]
    if sum(counts[a][b] for a in SAYS for b in SAYS) == counts["neither"]["neither"]:
        return ""
    rows = [
        (f"chosen: {a}", *(f"{counts[a][b]:,}" for b in ("yes", "no", "neither"))) for a in ("yes", "no", "neither")
    ]
    said = (
        f"Where one side says yes and the other no, yes is chosen in {estimate(opposed)} of {opposed['pairs']:,} pairs."
    )
    none = "No pair answers yes against no."
    return _table(("", "rejected: yes", "no", "neither"), rows) + f"<p>{said if opposed['pairs'] else none}</p>"


def _parts(parts: Mapping[str, Result]) -> str:
    if not parts:
        return ""
    heads, rows = part_rows(parts)
    return folding_table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<table class="figures short"><tr>{head}</tr>{body}</table>'


def _duplicates(one: Result) -> str:
    repeated, near = one["duplicates"], one["near_duplicates"]
    said = f"<p>{repeated['extra']:,} pairs repeat images, prompt and rejected text of another.</p>"
    for example in repeated["examples"]:
        places = " · ".join(example["places"])
        said += (
            f'<div class="answer rejected"><div class="soft">{html.escape(places)}</div>'
            f'<div class="q">{html.escape(example["question"])}</div>{html.escape(example["rejected"])}</div>'
        )
    if near["percent"] is None:
        return said
    said += (
        f"<p>{near['found']:,} of {near['compared']:,} rejected texts of eight words or more are nearly the same as "
        "one under another image or prompt.</p>"
    )
    for example in near["examples"][:3]:
        texts = word_diff(*example["rejected"])
        answers = "".join(
            f'<div class="answer rejected"><div class="soft">{html.escape(place)}</div>{text}</div>'
            for place, text in zip(example["places"], texts, strict=True)
        )
        said += f'<div class="answers">{answers}</div>'
    return said


def _model(sets: Mapping[str, Result]) -> str:
    bars = []
    for name, one in sets.items():
        if one["model"] is not None:
            for view, said in (("with_image", "with image"), ("blind", "blind")):
                figure = one["model"][view]["accuracy"]
                bars.append(Bar(f"{name}, {said}", figure["value"], figure["interval"], estimate(figure)))
    if not bars:
        return ""
    chart = bar_chart(bars, (0.0, 100.0), (Limit(50.0, "soft"),), "how often the model prefers chosen")
    return (
        f'<div class="box bars">{chart}<p class="soft">How often the reference model gives chosen the larger log-prob. '
        f"The image should add at least {IMAGE_GAP:g} points.</p></div>"
    )


def _figures(sets: Mapping[str, Result]) -> str:
    columns = [{row.name: row.text for row in summary(one)} for one in sets.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    heads = ["", *(sets if len(sets) > 1 else ["value"])]
    return f'<div class="box tall">{folding_table(heads, rows)}</div>'


def _read(result: Result) -> str:
    settings = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in result["settings"].items() if value is not None
    )
    lines = [line for one in result["sets"].values() for line in one["read"]]
    lines += [f"skipped: {line}" for one in result["sets"].values() for line in one["skipped"]["first"]]
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="box"><ul class="plain">{listed}</ul><p class="soft">{html.escape(settings)}</p></div>'
