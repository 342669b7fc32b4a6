"""The page on growth: its fit, its plots and its sentences, on rows made up to follow a known law."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.growth import SWEEPS as MEASURED
from bench.growth import Point, StepArm, subject_of, timed
from bench.growth_page import BEGIN, END, SWEEPS, describe, draw, exponent, read_lines, sentence, write_page

REPOSITORY = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def row(value: int, seconds: float, **fields) -> dict:
    """A row of a step of 4 pairs."""
    return {
        "bench": "growth", "run": "aa", "device": "CPU x", "commit": "0123456789ab", "sweep": "image_tokens", "value": value,
        "pairs": 4, "tokens": 8 * value, "flops": 1000 * value**2, "seconds_p20": 0.9 * seconds, "seconds_p50": seconds,
        "seconds_p80": 1.1 * seconds, "seconds_per_pair": seconds / 4, **fields,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path) -> Path:
    """An older run, one whose seconds are values to the power of 1.5, and a point that ran out of memory."""
    folder = tmp_path / "results"
    folder.mkdir()
    rows = [row(n, 99.0, run="older") for n in (100, 400)]
    rows += [row(n, 0.004 * (n / 100) ** 1.5) for n in (400, 100, 1600)]
    rows += [{**{k: v for k, v in row(6400, 1.0).items() if not k.startswith("seconds")}, "absent": "out of memory"}]
    rows += [row(n, 2.0, sweep="pack_tokens", tokens=4000) for n in (1000, 2000)]
    (folder / "growth.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_the_exponent_of_a_power_is_found():
    x = [1, 2, 5, 30]
    assert exponent(x, [7 * value**1.25 for value in x]) == pytest.approx(1.25)
    assert exponent(x, [3.0] * 4) == pytest.approx(0)
    assert exponent([1, 10, 100], [1, 20, 100]) == pytest.approx(1), "the middle one pulls neither way"


def test_only_the_newest_run_counts(results):
    [line] = read_lines(results)["image_tokens"]
    assert line.values == [100, 400, 1600]
    assert line.seconds == pytest.approx([0.001, 0.008, 0.064])
    assert line.tokens == [200, 800, 3200]


def test_sentences_are_computed(results):
    lines = read_lines(results)
    assert sentence(lines["image_tokens"][0]) == (
        "CPU x, commit 01234567: from 100 to 1,600 a pair's time goes from 1 to 64 ms, as x to the power of 1.50. A pair's "
        "packed tokens go from 200 to 3,200: its time goes as tokens to the power of 1.50, its counted FLOPs of 2.00."
    )
    assert sentence(lines["pack_tokens"][0]) == (
        "CPU x, commit 01234567: from 1,000 to 2,000 a pair's time goes from 500 to 500 ms, as x to the power of 0.00; tokens "
        "and FLOPs a pair stay what they are (1,000 tokens)."
    )


def test_long_times_are_written_out(results):
    [line] = read_lines(results)["image_tokens"]
    assert "from 1 to 10,542 ms" in sentence(dataclasses.replace(line, seconds=[0.001, 0.1, 10.542]))


def test_a_power_law_is_a_straight_line_through_its_points(results):
    [sweep] = [sweep for sweep in SWEEPS if sweep.name == "image_tokens"]
    picture = ElementTree.fromstring(draw(sweep, read_lines(results)[sweep.name]))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in picture.iter(f"{SVG}circle")]
    assert len(dots) == 3
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x0 < x1 < x2 and y0 > y1 > y2, "more of it to the right, longer further up"
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.2)
    [dashed] = [path.get("d") for path in picture.iter(f"{SVG}path") if path.get("stroke-dasharray")]
    assert dashed == f"M{x0} {y0}L{x2} {y2}"
    assert {"100", "400", "1,600", "1", "50", "CPU x"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_the_page_is_written(results, tmp_path):
    page = tmp_path / "growth.md"
    page.write_text(f"# Title\n\n{BEGIN}\nstale\n{END}\nafter\n")
    files = write_page(tmp_path / "growth", results)
    assert {file.name for file in files} == {"growth.md", "image_tokens.svg", "pack_tokens.svg", "rows.svg"}
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith(f"{END}\nafter\n") and "stale" not in text
    assert "](growth/image_tokens.svg)" in text and "completion_tokens.svg" not in text
    assert text.count("Not measured yet.") == 2
    assert all(file.stat().st_size < 8_000 for file in files)


def test_the_page_in_the_documents_is_current():
    text = (REPOSITORY / "docs" / "growth.md").read_text()
    lines = read_lines(REPOSITORY / "bench" / "results")
    written = text.split(BEGIN)[1].split(END)[0].strip("\n")
    assert written == describe(lines, "growth"), "run python -m bench.growth --plot docs/growth"
    for sweep in SWEEPS:
        if lines[sweep.name]:
            assert (REPOSITORY / "docs" / "growth" / f"{sweep.name}.svg").read_text() == draw(sweep, lines[sweep.name])


def test_a_point_is_measured(tmp_path):
    """Two pairs about one picture of 4 tokens, packed as one tree: its tokens are counted once."""
    import torch

    from bench.arms import new_policy, vapr_config

    device, trained, arms = torch.device("cpu"), None, {}
    points = [Point(value=n, pairs=2, image=(2, 2), pairs_per_image=n, share="image") for n in (1, 2)]
    for point in points:
        subject = subject_of(point, tmp_path / str(point.value), device)
        trained = trained or new_policy(subject, vapr_config(subject, point.share, point.pairs))
        arms[str(point.value)] = StepArm(subject, point, trained)
    apart, together = timed("pairs_per_image", points, arms, 1, device)
    assert apart["tokens"] > together["tokens"] and apart["flops"] > together["flops"]
    assert apart["packs"] == together["packs"] == 1 and together["largest_pack"] == together["tokens"]
    assert together["seconds_per_pair"] == pytest.approx(together["seconds_p50"] / 2)


def test_every_sweep_has_a_plot_and_the_range_that_is_promised():
    assert {*MEASURED, "rows"} == {sweep.name for sweep in SWEEPS}
    values = {name: [point.value for point in points] for name, points in MEASURED.items()}
    assert (values["pack_tokens"][0], values["pack_tokens"][-1]) == (2_000, 32_000)
    assert (values["image_tokens"][0], values["image_tokens"][-1]) == (256, 3_968)
    assert (values["completion_tokens"][0], values["completion_tokens"][-1]) == (10, 1_000)
    assert values["pairs_per_image"] == [1, 2, 4, 8]
    for points in MEASURED.values():
        assert all(math.prod(point.image) >= 256 for point in points)
