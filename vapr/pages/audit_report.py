"""The audit's page: verdict, gates, probes with their limits, lengths, telling n-grams, parts, duplicates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.audit.gates import IMAGE_GAP, NGRAM_LIMIT, NGRAM_WARNING, SURFACE_LIMIT
from vapr.audit.pair_table import SAYS
from vapr.audit.report_text import accuracy_text, estimate, figure_rows, gate_text, kind_rows, part_rows, verdict
from vapr.pages.bars import Bar, Limit, bar_chart, histogram
from vapr.pages.page import write_page
from vapr.pages.word_diff import word_diff

Result = Mapping[str, Any]

NGRAMS_SHOWN = 10
STYLE_SHOWN_FROM = 0.05
"""Percent of the pairs that must differ in a style feature for it to be listed."""

GUESS = Limit(50.0, "soft")


def write_audit_report(path: Path, result: Result) -> None:
    """Write the page of an audit's result (:func:`vapr.audit.measure.audit`), whole or not at all."""
    sets: Mapping[str, Result] = result["sets"]
    part_tables = [
        (title, [(name, part_rows(one[key])) for name, one in sets.items() if one[key]])
        for title, key in (("By category", "categories"), ("By source", "sources"), ("By editor", "editors"))
    ]
    pictures = [
        (name, kind_rows(one["pictures"]["kinds"])) for name, one in sets.items() if one["pictures"] is not None
    ]
    part_tables.append(("Rejected images, by category", pictures))
    heads, rows = figure_rows(sets)
    write_page(
        path,
        "audit_report.html",
        sets=sets,
        verdict=verdict(result),
        gate_text=gate_text,
        estimate=estimate,
        word_diff=word_diff,
        num_ngrams=NGRAMS_SHOWN,
        image_gap=IMAGE_GAP,
        probes=list(_probes(sets)),
        histograms=list(_histograms(sets)),
        style={name: _style_rows(one["style"]) for name, one in sets.items()},
        answering=[name for name, one in sets.items() if _answers(one["overall"]["polarity"]["counts"])],
        part_tables=part_tables,
        model=_model(sets),
        figures=(heads if len(sets) > 1 else ["", "value"], rows),
        read=list(_lines(sets)),
        settings=", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in result["settings"].items() if value is not None
        ),
    )


def _probes(sets: Mapping[str, Result]) -> Iterator[tuple[str, str, Markup]]:
    """Yield title, note and chart of both probes."""
    surface = (Limit(SURFACE_LIMIT, "bad"),)
    ngrams = (Limit(NGRAM_WARNING, "soft"), Limit(NGRAM_LIMIT, "bad"))
    for key, title, note, limits in (
        ("surface", "Surface probe", "Length, punctuation, casing, lists, hedges.", surface),
        ("ngrams", "N-gram probe", "Single words and two in a row.", ngrams),
    ):
        probes = {name: one["overall"][key] for name, one in sets.items()}
        bars = [Bar(name, probe["accuracy"], probe["interval"], accuracy_text(probe)) for name, probe in probes.items()]
        yield title, note, bar_chart(bars, (40.0, 100.0), (GUESS, *limits), title)


def _histograms(sets: Mapping[str, Result]) -> Iterator[tuple[str, str, Markup, str]]:
    """Yield the set's name, title, chart and note of each histogram."""
    for name, one in sets.items():
        lengths, distances = (one["histograms"][key] for key in ("length_difference", "edit_distance"))
        end = (lengths["edges"][-1] + lengths["edges"][-2]) / 2
        svg = histogram(lengths["edges"], lengths["counts"], (-end, 0.0, end), "length difference")
        note = "Right of zero: rejected is longer. The outermost bars hold what lies beyond, too."
        yield name, "Rejected minus chosen, in words", svg, note
        svg = histogram(distances["edges"], distances["counts"], (0.0, 0.5, 1.0), "edit distance")
        yield name, "Edit distance", svg, "0: the same words; 1: none in common."


def _style_rows(style: Result) -> list[list[str]]:
    return [
        [
            name.replace("_", " "),
            *(f"{value[key]:.2f}" for key in ("chosen_mean", "rejected_mean")),
            *(f"{value[key]:.1f} %" for key in ("more_in_chosen", "more_in_rejected")),
        ]
        for name, value in style.items()
        if value["more_in_chosen"] + value["more_in_rejected"] > STYLE_SHOWN_FROM
    ]


def _answers(counts: Mapping[str, Mapping[str, int]]) -> bool:
    """Tell whether any completion begins with yes or no."""
    return sum(counts[chosen][rejected] for chosen in SAYS for rejected in SAYS) != counts["neither"]["neither"]


def _model(sets: Mapping[str, Result]) -> Markup:
    """Draw how often the model prefers chosen with the image and without; empty if no model was asked."""
    bars = [
        Bar(f"{name}, {said}", figure["value"], figure["interval"], estimate(figure))
        for name, one in sets.items()
        if one["model"] is not None
        for view, said in (("with_image", "with image"), ("blind", "blind"))
        for figure in (one["model"][view]["accuracy"],)
    ]
    return bar_chart(bars, (0.0, 100.0), (GUESS,), "how often the model prefers chosen") if bars else Markup("")


def _lines(sets: Mapping[str, Result]) -> Iterator[str]:
    """Yield what was read, then the first rows that were skipped."""
    for one in sets.values():
        yield from one["read"]
    for one in sets.values():
        yield from (f"skipped: {line}" for line in one["skipped"]["first"])
