"""Dots with intervals: each stands where the axis says, inside the picture."""

import re

import pytest

from vapr.pages.chart import MINUS
from vapr.pages.dots import WIDTH, Dot, dot_chart


def drawn(svg):
    """Return the axis as a function from pixels to values, the dots' x, and the whiskers' ends."""
    ticks = re.findall(r'<line class="(?:rule|zero)" x1="([\d.]+)"[^>]*/><text [^>]*>([^<]*)<', svg)
    (x0, low), (x1, high) = [(float(x), float(text.replace(MINUS, "-"))) for x, text in (ticks[0], ticks[-1])]
    dots = [float(x) for x in re.findall(r"translate\(([\d.]+) ", svg)]
    whiskers = [tuple(map(float, ends)) for ends in re.findall(r'd="M([\d.]+) \d+H([\d.]+)', svg)]
    return lambda x: low + (x - x0) / (x1 - x0) * (high - low), dots, whiskers


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("values", [[12.5, 40.0], [0.0], [100.0], [99.96], [50.0, 50.0], [3.2, 3.3]])
def test_a_dot_stands_where_the_axis_says(values, zero):
    dots = [Dot(f"m{n}", n, value, (max(value - 3, 0), min(value + 2, 100)), "") for n, value in enumerate(values)]
    value_at, places, whiskers = drawn(dot_chart([("set", dots)], label="", bounds=(0.0, 100.0), zero=zero))
    assert [value_at(x) for x in places] == pytest.approx(values, abs=0.2)
    for (low, high), dot in zip(whiskers, dots, strict=True):
        assert (value_at(low), value_at(high)) == pytest.approx(dot.interval, abs=0.2)
        assert 0 <= low <= high <= WIDTH


def test_differences_show_zero_and_missing_values_have_no_dot():
    svg = dot_chart([("<set>", [Dot("a & b", 1, -4.0, (-5, -3), "x"), Dot("none", 2, None, None, "not scored")])],
                    label="<label>", bounds=(-100.0, 100.0), zero=True)  # fmt: skip
    assert svg.count('class="zero"') == 1 and svg.count("translate(") == 1
    assert "&lt;set&gt;" in svg and "a &amp; b" in svg and "&lt;label&gt;" in svg
    assert dot_chart([("set", [Dot("a", 0, None, None, "")])], label="", bounds=(0, 1)) == ""
