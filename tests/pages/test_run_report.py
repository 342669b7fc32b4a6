"""report.html of a run: every extreme shown, nothing from a file taken for HTML, readable in a real browser."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vapr.errors import UserError
from vapr.pages.chart import MINUS, readable
from vapr.pages.figures import reward_beta
from vapr.pages.page import thumbnail
from vapr.pages.run_report import ShownPair, write_run_report

ATTACK = "<script>document.title = 'owned'</script>"
CONFIG = {
    "run_dir": "runs/first",
    "policy": {"model": "some/model", "lora": None},
    "loss": [{"kind": "sigmoid", "beta": 0.1}],
    "optim": {"max_steps": 500},
}
PAIR = ShownPair(1.5, 7, "cat-1", "pairs.jsonl:17", "What is it?", "A grey cat.", "A grey dog.", ())


def row(step: int, **values: float | None) -> dict:
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "lr",
    )
    plain = {name: math.sin(step + n) for n, name in enumerate(names)}
    return {
        "step": step,
        "loss": 0.7 / step,
        **plain,
        "pairs": 2,
        "tokens": 60,
        "tokens_saved": 40,
        "pairs_per_second": 8.0,
        "mfu": None,
        "peak_memory_mib": 900.0,
        **values,
    }


def make_run(
    folder: Path, rows: list[dict], tail: str = "", config: dict = CONFIG, skipped: dict | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11.7", "versions": {"torch": "2.13.0", "torchvision": None}})
    )
    if skipped is not None:
        (folder / "skipped.json").write_text(json.dumps(skipped))
    return folder


class Parser(HTMLParser):
    """Tags and text of a page, and that every tag is closed in turn."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_what_a_file_says_is_text(tmp_path):
    pair = ShownPair(
        -1.0, 3, ATTACK, ATTACK, ATTACK, f"{ATTACK} yes", f"{ATTACK} no", ("data:image/jpeg;base64,AA",), ATTACK
    )
    config = {
        **CONFIG,
        "policy": {"model": ATTACK, "lora": {"rank": ATTACK}},
        "loss": [{"kind": ATTACK, "beta": ATTACK}],
    }
    run = make_run(
        tmp_path, [row(1), row(2)], config=config, skipped={ATTACK: ATTACK, "pairs.jsonl:2": f"{ATTACK} 'a'"}
    )
    (run / "environment.json").write_text(json.dumps({ATTACK: {ATTACK: ATTACK}}))
    page = write_run_report(run, [pair, PAIR], [ATTACK]).read_text()
    parsed = Parser(page)
    assert "script" not in parsed.tags and parsed.text.count(ATTACK) >= 15
    assert not re.search(r"https?:|url\(|@import|<link|<script", page)


def test_skipped_pairs_are_counted_by_reason(tmp_path):
    long = {
        f"pairs.jsonl:{n}": f"pairs.jsonl:{n}: row 'r{n}' has {9000 + n:,} tokens but packing.max_tokens is 8,192"
        for n in range(1, 71)
    }
    gone = {
        f"pairs.jsonl:{n}": f"pairs.jsonl:{n}: image '{name}' not found"
        for n, name in ((80, "a.png"), (81, "it's 2.png"))
    }
    run = make_run(
        tmp_path,
        [row(1)],
        skipped={
            **gone,
            **long,
            "pairs.jsonl:90": "pairs.jsonl:90: can't read '/im/a.png'",
            "pairs.jsonl:91": "pairs.jsonl:91: can't read '/im/b.png'",
        },
    )
    page = write_run_report(run, []).read_text()
    summaries = [html.unescape(re.sub(r"<[^>]+>", "", one)) for one in re.findall(r"<summary>.*?</summary>", page)]
    assert summaries == [
        "70 x row '…' has N tokens but packing.max_tokens is N",
        "2 x image '…' not found",
        "2 x can't read '…'",
    ]
    assert "74 pairs" in page
    assert "9,050 tokens" in page and "9,051 tokens" not in page and "and 20 more in skipped.json" in page
    (run / "skipped.json").unlink()
    assert "Nothing was skipped." in write_run_report(run, []).read_text()
    (run / "skipped.json").write_text('{"pairs.jsonl:')
    assert "skipped.json cannot be read." in write_run_report(run, []).read_text()


def cells(page: str) -> list[list[str]]:
    """Rows of the page's first table."""
    table = re.search(r"<table.*?</table>", page, re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", one)] for one in rows]


def test_the_headline_agrees_with_the_metrics(tmp_path):
    """Rewards over beta, not a difference of log-probs, which are those of other pairs at the end than at the start."""
    rows = [
        row(
            n,
            **{
                "rewards/accuracies": 0.25 if n <= 50 else 0.75,
                "rewards/margins": n / 64,
                "rewards/chosen": -0.02,
                "rewards/rejected": -0.3,
                "logps/chosen": -100.0 + 50 * (n > 50),
                "pairs_per_second": float(n),
            },
        )
        for n in range(1, 101)
    ]
    held_out = {
        "eval/loss": 0.5,
        "eval/rewards/accuracies": 0.625,
        "eval/rewards/margins": 1.0,
        "eval/rewards/chosen": 0.01,
    }
    rows.insert(60, {"step": 60, **held_out})
    rows.append({"step": 100, **held_out, "eval/loss": 0.6, "eval/rewards/accuracies": 0.6})
    run = make_run(tmp_path / "my-run", rows, tail='{"step": 101, "loss": 0.1, "rewa')
    page = write_run_report(run, [PAIR]).read_text()
    text = Parser(page).text
    for fact in (
        "my-run: vapr run",
        "some/model · full fine-tuning · loss sigmoid (beta 0.1)",
        "first 20 steps chosen had the larger reward in 25% of the pairs, in the last 20 steps in 75%",
        "log-prob of chosen was lower by 0.2 than the reference's, that of rejected lower by 3.",
        "lowest at step 60 and has risen since",
        "100 of 500",
        "200 pairs",
        "Pairs/s50.5",
        "Saved by sharing40%",
        "saved 40.0%",
        "Without any value: mfu.",
        "kind: sigmoid",
        "torchvisionnone",
    ):
        assert fact in text, fact
    assert "<h1>my-run</h1>" in page
    assert cells(page) == [
        ["", "training, last 20 steps", "held out, step 100", "held out, step 60, the lowest loss"],
        ["accuracy", "75.0%", "60.0%", "62.5%"],
        ["margin", "1.414", "1", "1"],
        ["loss", readable(sum(0.7 / n for n in range(81, 101)) / 20), "0.6", "0.5"],
        ["chosen log-prob minus reference", f"{MINUS}0.2", "+0.1", "+0.1"],
        ["rejected log-prob minus reference", f"{MINUS}3", "none", "none"],
    ]
    assert "100 of 800" in Parser(write_run_report(run, [], num_steps=800).read_text()).text


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        (
            [{"kind": "sft", "weight": 0.1}, {"kind": "ipo", "beta": 0.5}],
            0.5,
        ),  # rewards are those of the first that prefers
        ([{"kind": "simpo", "beta": 2.0}], None),  # length-normalised log-probs, without a reference
        ([{"kind": "sft"}], None),
        ({"beta": 0.2}, 0.2),
        (None, None),
    ],
)
def test_only_rewards_against_a_reference_are_changes_of_log_probs(tmp_path, loss, beta):
    assert reward_beta({"loss": loss}) == beta
    page = write_run_report(make_run(tmp_path, [row(1), row(2)], config={**CONFIG, "loss": loss}), []).read_text()
    assert ("minus reference" in page) == ("than the reference's" in page) == (beta is not None)


def test_a_run_whose_best_is_its_last_says_so(tmp_path):
    rows = [row(1), {"step": 1, "eval/loss": 0.6}, row(2), {"step": 2, "eval/loss": 0.5}]
    page = write_run_report(make_run(tmp_path, rows), []).read_text()
    assert cells(page)[0] == ["", "training, last step", "held out, step 2, the lowest loss"]
    assert "lowest at the last evaluation" in page


def test_axes_are_named_and_legends_are_drawn(tmp_path):
    """Browsers print no backgrounds: what tells the lines apart must be drawn or written."""
    page = write_run_report(
        make_run(tmp_path, [row(1), row(2), {"step": 2, "eval/logps/chosen": -3.0}]), []
    ).read_text()
    charts = re.findall(r'<svg viewBox="0 0 340.*?</svg>', page)
    assert charts and all(re.search(r'<text class="axis"[^>]*>step</text>', chart) for chart in charts)
    legends = re.findall(r'<p class="legend">(.*?)</p>', page)
    assert len(legends) == len(charts)
    for entry in (entry for legend in legends for entry in legend.split("</span>")[:-1]):
        assert re.search(r'<svg class="swatch [a-z-]+".*<(line|circle) .*</svg>[a-zA-Z]', entry), entry
    assert not re.search(r"\.legend[^{]*\{[^}]*background", page)


def test_held_out_values_are_marks_of_their_own(tmp_path):
    page = write_run_report(
        make_run(tmp_path, [row(1), row(2), {"step": 2, "eval/loss": 0.5, "eval/logps/chosen": -3.0}]), []
    ).read_text()
    assert page.count('<g class="held-out"><circle class="mark"') == 1  # loss
    assert page.count('<g class="chosen"><circle class="mark"') == 1  # logps/chosen


def test_extremes_are_the_ends_in_order(tmp_path):
    pairs = [
        ShownPair(margin, 1, f"id{margin}", "pairs.jsonl:1", "q", "a", "b", ()) for margin in (0.5, -2.0, 3.0, -1.0)
    ]
    page = write_run_report(make_run(tmp_path, [row(1)]), pairs).read_text()
    largest, smallest = page.split("Smallest margins")
    assert re.findall(r"id(-?[\d.]+) ", largest.split("Largest margins")[1]) == ["3.0", "0.5"]
    assert re.findall(r"id(-?[\d.]+) ", smallest) == ["-2.0", "-1.0"]


@pytest.mark.parametrize("rows", [[], [row(1)], [row(1), row(2)], [dict.fromkeys(row(1), None) | {"step": n} for n in (1, 2, 3)], [{"step": 3, "eval/loss": 0.4}]], ids=["no step", "one step", "two steps", "null", "evaluation only"])  # fmt: skip
def test_short_and_empty_runs_have_a_page(tmp_path, rows):
    page = write_run_report(make_run(tmp_path, rows), [PAIR]).read_text()
    text = Parser(page).text
    assert ("No training step" in text) == (not any("loss" in one for one in rows))
    assert "nan" not in text.replace("finance", "") and "cat-1" in text


def test_missing_and_damaged_files_are_named(tmp_path):
    text = Parser(write_run_report(tmp_path, []).read_text()).text
    assert (
        "No training step" in text
        and "config.yaml cannot be read." in text
        and "environment.json cannot be read." in text
    )
    (tmp_path / "config.yaml").write_text("a: [1,")
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_bytes(b'[1]\n{"step": "x", "loss": 1}\n\xff\xfe\n')
    text = Parser(write_run_report(tmp_path, []).read_text()).text
    assert "No training step" in text and "a: [1," in text


def test_a_long_run_is_a_small_page_soon_written(tmp_path):
    rows = [row(n) for n in range(1, 20_001)] + [
        {"step": n, "eval/loss": 0.5 + n / 1e6} for n in range(100, 20_001, 100)
    ]
    run = make_run(tmp_path, rows)
    began = time.process_time()
    path = write_run_report(run, [])
    assert time.process_time() - began < 3
    assert path.stat().st_size < 1_500_000


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path, [row(1)])
    path = write_run_report(run, [])
    before = path.read_text()

    def full(number: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="report.html: cannot be written"):
        write_run_report(run, [PAIR])
    assert path.read_text() == before
    monkeypatch.undo()
    write_run_report(run, [PAIR])
    assert path.read_text() != before and not list(run.glob("*.tmp"))


def chromium(profile: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("chromium")
    assert found is not None
    command = (found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *flags, page.as_uri())  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """A run whose words and values are as wide as they come."""
    endless = "x" * 300
    picture = thumbnail(Image.new("RGB", (400, 300), "teal"))
    pairs = [
        ShownPair(
            float(n), 20_000, endless, endless, endless, f"{endless} a", f"{endless} b", (picture,) * (n + 1), endless
        )
        for n in (-2, 0, 1, 3)
    ]
    config = {**CONFIG, "run_dir": endless, "policy": {"model": endless}}
    rows = [row(n, loss=1e9 + n, **{"logps/chosen": -123456.789 * n}) for n in range(1, 60)] + [
        {"step": 30, "eval/loss": 1e9}
    ]
    run = make_run(
        tmp_path_factory.mktemp("wide"), rows, config=config, skipped={endless: endless, f"{endless}:1": f"'{endless}'"}
    )
    (run / "environment.json").write_text(json.dumps({endless: endless}))
    return write_run_report(run, pairs, [endless])


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(wide_run, tmp_path):
    shot = tmp_path / "shot.png"
    ran = chromium(tmp_path / "profile", wide_run, f"--screenshot={shot}", "--window-size=1280,2200")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    image = Image.open(shot)
    assert image.size == (1280, 2200) and len(image.convert("RGB").getcolors(1 << 20)) > 50


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_the_page_does_not_scroll_sideways(wide_run, tmp_path, width):
    # Chromium's own window is never narrower than 500 pixels, a frame inside it is.
    tell = "<script>onload = () => { for (const d of document.querySelectorAll('details')) d.open = true; parent.postMessage(document.documentElement.scrollWidth, '*') }</script>"
    (tmp_path / "inner.html").write_text(wide_run.read_text().replace("</body>", f"{tell}</body>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<body><script>onmessage = (event) => {{ document.title = 'width ' + event.data }}</script><iframe src='inner.html' style='border:0' width={width} height=900></iframe>"
    )
    ran = chromium(tmp_path / "profile", outer, "--dump-dom", "--virtual-time-budget=5000")
    measured = re.search(r"<title>width (\d+)</title>", ran.stdout)
    assert measured, ran.stdout[:300]
    assert int(measured[1]) <= width
