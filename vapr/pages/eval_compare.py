"""The page of vapr eval --compare: figures of several models with intervals, and the questions that changed."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from vapr.pages.compare import COLOURS
from vapr.pages.dots import Dot, dot_chart, shape
from vapr.pages.page import write_page
from vapr.pages.word_diff import word_diff

PILLS = {"fixed": "pass", "broken": "fail", "became unparsed": "warn"}
MARKS = {"right": "good", "wrong": "bad", "unparsed": "unparsed"}


class Plot(NamedTuple):
    """Groups of dots, values in percent; ``zero`` plots are of differences."""

    title: str
    note: str
    groups: Sequence[tuple[str, Sequence[Dot]]]
    zero: bool


class Table(NamedTuple):
    """A table with its title and what it means; a ``folded`` one is shown when it is asked for."""

    title: str
    note: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


def write_eval_compare_page(path: Path, page: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        page: ``models`` (names, the first is what the others are held against), ``policy``, ``cards``,
            ``explanations``, ``notes``, ``plots``, ``tables``, ``kinds`` (of change), ``totals`` (by
            benchmark, for each model but the first, of each kind), ``questions`` (what
            :func:`vapr.evaluation.compare.questions.draw` returns), ``drawn`` (how they were chosen) and ``commands``
            (what to run next).
    """
    script = (resources.files("vapr.pages") / "eval_compare.js").read_text("utf-8")
    write_page(
        path,
        "eval_compare.html",
        **page,
        charts=[_chart(plot) for plot in page["plots"]],
        colours=[COLOURS[n % len(COLOURS)] for n in range(len(page["models"]))],
        shape=shape,
        texts=_texts,
        pills=PILLS,
        marks=MARKS,
        filters={"kinds": page["kinds"], "totals": page["totals"]},
        script=Markup(script),
    )


def _chart(plot: Plot) -> tuple[str, str, Markup]:
    bounds = (-100.0, 100.0) if plot.zero else (0.0, 100.0)
    return plot.title, plot.note, dot_chart(plot.groups, label=plot.title, bounds=bounds, zero=plot.zero)


def _texts(answers: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Return the answers as HTML; words that the first model's answer lacks are marked in the others."""
    first = answers[0]["text"]
    return [word_diff(first, answer["text"])[1] if n else Markup.escape(first) for n, answer in enumerate(answers)]
