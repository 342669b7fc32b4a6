"""What the pages share: charts that keep every extreme, differences, thumbnails, nothing taken for HTML."""

import base64
import html
import io
import math
import re
from itertools import pairwise

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from vapr.pages.chart import MAX_POINTS, MINUS, Series, line_chart, readable, running_mean, thinned
from vapr.pages.page import thumbnail
from vapr.pages.word_diff import word_diff

ATTACK = "<script>document.title = 'owned'</script>"


def places(svg: str, kind: str = "mean") -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    return [
        [tuple(map(float, place.split(","))) for place in points.split()]
        for points in re.findall(rf'<polyline class="{kind}" points="([^"]*)"', svg)
    ]


def test_a_chart_keeps_the_extremes_of_many_points():
    values = [math.sin(n / 500) for n in range(20_000)]
    values[7_777], values[12_345] = 9.0, -4.0
    svg = line_chart([Series("", "after", list(enumerate(values)))], label="")
    (line,) = places(svg)
    assert len(line) <= MAX_POINTS
    left, right = line[0][0], line[-1][0]
    for n, place in ((7_777, min(line, key=lambda p: p[1])), (12_345, max(line, key=lambda p: p[1]))):
        assert place[0] == pytest.approx(left + (right - left) * n / 19_999, abs=0.1)
    (thick,) = places(line_chart([Series("", "after", list(enumerate(values)))], label="", smooth=True))
    assert min(y for _, y in thick) > min(y for _, y in line) + 20  # a mean has no such peak


def test_a_value_stands_where_the_axis_says():
    svg = line_chart([Series("", "after", [(1, 0.3), (2, 1.7), (3, -0.9)])], label="")
    ticks = {
        float(text.replace(MINUS, "-")): float(y) - 4
        for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', svg)
    }
    (low, low_y), (high, high_y) = min(ticks.items()), max(ticks.items())
    assert low <= -0.9 and high >= 1.7
    for value, (_, y) in zip((0.3, 1.7, -0.9), places(svg)[0], strict=True):
        assert y == pytest.approx(low_y + (value - low) / (high - low) * (high_y - low_y), abs=0.11)


def test_thinned_points_keep_gaps_and_stay_few():
    values = [None if 600 <= n < 640 or n % 997 == 0 else float(n % 13) for n in range(20_000)]
    few = thinned(list(enumerate(values)))
    assert len(few) <= MAX_POINTS
    assert few[0] == (0, None) and few[-1] == (19_999, values[-1])
    assert any(value is None for x, value in few if 600 <= x < 640)
    assert thinned([(n, 1.0) for n in range(MAX_POINTS)]) == [(n, 1.0) for n in range(MAX_POINTS)]


def test_a_gap_breaks_the_line_and_a_lone_value_is_a_dot():
    svg = line_chart(
        [Series("", "after", [(1, 1.0), (2, 2.0), (3, None), (4, 1.5), (5, math.nan), (6, 1.0), (7, 3.0)])], label=""
    )
    assert [len(line) for line in places(svg)] == [2, 2]
    assert svg.count("<circle") == 1
    assert running_mean([(0, 1.0), (1, None), (2, 3.0)], 1) == [(0, 1.0), (1, None), (2, 3.0)]


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0], [-3.0], [2.0] * 50, [0.0] * 50, [1e308, -1e308], [1e308, -1e308] * 20, [1e-320, 2e-320], [5e-6, 1e-9], [1.0, 1.0 + 1e-15], [-1e9, 3.0], [math.inf, 1.0], [99_999.0, 100_001.0], [1000.001, 1000.002]],
    ids=lambda values: f"{len(values)} from {values[0]:g}",
)  # fmt: skip
def test_any_value_is_drawn_inside_the_box(values):
    for smooth in (False, True):
        svg = line_chart([Series("", "after", list(enumerate(values, 1)))], label="", smooth=smooth)
        assert "nan" not in svg and "inf" not in svg
        _, _, width, height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())
        for x, y in [place for kind in ("mean", "step") for line in places(svg, kind) for place in line]:
            assert 0 <= x <= width and 0 <= y <= height
        labels = re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]*)<', svg)
        assert len(labels) >= 3
        assert max(float(x) for x, anchor, _ in labels if anchor == "end") < width / 3  # leaves room for the line
        for x, anchor, text in labels:  # 7 pixels hold any character of the axis
            assert float(x) - 7 * len(text) * (1 if anchor == "end" else 0.5) >= -2
            assert float(x) + 7 * len(text) * (0 if anchor == "end" else 0.5) <= width + 2
        shown = [text for _, anchor, text in labels if anchor == "end"]
        assert len(set(shown)) == len(shown)


def test_numbers_are_readable():
    shown = {
        5e-6: "5e-6",
        0.69314718: "0.6931",
        9999.0: "9999",
        61234.5: "61.23k",
        108_100_000: "108.1M",
        0: "0",
        1e20: "1e20",
    }
    assert {value: readable(value).replace(MINUS, "-") for value in shown} == shown


def test_differing_words_are_marked_and_everything_is_escaped():
    assert word_diff("A red cup, here.", "A blue cup, here.") == (
        "A <mark>red</mark> cup, here.",
        "A <mark>blue</mark> cup, here.",
    )
    assert word_diff("two cats", "two  cats") == ("two cats", "two  cats")
    assert word_diff("yes it is", "yes") == ("yes <mark>it is</mark>", "yes")
    assert word_diff("马是黑的", "马是白的") == ("马是<mark>黑</mark>的", "马是<mark>白</mark>的")
    for chosen, rejected in (
        (ATTACK, "no"),
        (f"a {ATTACK} & b", f"a {ATTACK} & c"),
        ("x " * 3000, f"y {ATTACK} " * 3000),
    ):
        for original, shown in zip((chosen, rejected), word_diff(chosen, rejected), strict=True):
            bare = re.sub(r"</?mark>", "", shown)
            assert "<" not in bare and html.unescape(bare) == original


@pytest.mark.parametrize(
    ("mode", "colour"),
    [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("L", 255), ("CMYK", (0, 0, 0, 0)), ("RGB", (255, 255, 255))],
)
def test_a_thumbnail_is_a_small_jpeg_in_the_colours_a_model_sees(mode, colour):
    kind, data = thumbnail(Image.new(mode, (1000, 50), colour)).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and image.format == "JPEG"
    hidden_is_shown = mode in ("RGBA", "LA") and Version(transformers.__version__) < Version("5.21")
    assert image.size == (360, 18) and image.getpixel((5, 5)) == ((0, 0, 0) if hidden_is_shown else (255, 255, 255))
    assert Image.open(io.BytesIO(base64.b64decode(thumbnail(Image.new("RGB", (30, 20))).split(",")[1]))).size == (
        30,
        20,
    )


@pytest.mark.parametrize(("first", "last"), [(1, 2), (1, 5), (1, 7), (1, 854), (3, 999), (1, 20_000), (9_999, 10_001), (19_990, 20_010), (123_456, 987_654), (1, 3_000_000)])  # fmt: skip
def test_labels_of_steps_do_not_meet(first, last):
    svg = line_chart([Series("", "after", [(first, -0.001), (last, 1e5)])], label="")
    labels = [(float(x), text) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)<', svg)]
    assert len(labels) >= 2
    for (x, text), (next_x, next_text) in pairwise(labels):
        assert x + 3.5 * len(text) + 6 < next_x - 3.5 * len(next_text)
