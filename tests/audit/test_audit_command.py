"""vapr audit as a command, and its page in a real browser."""

import builtins
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.audit.pair_sets import colour_rows, opened, row, swapped
from tests.pages.test_run_report import chromium, needs_chromium
from vapr.audit.measure import audit, named
from vapr.cli import main
from vapr.data.pairs import write_pairs
from vapr.intervals import percent
from vapr.pages.audit_report import write_audit_report


def vapr(*arguments: object):
    result = CliRunner().invoke(main, ["audit", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(picture_folder: Path, name: str, rows: list[dict]) -> Path:
    write_pairs(picture_folder / name, rows)
    return picture_folder / name


def test_exit_codes_and_json(picture_folder):
    good = written(picture_folder, "good.jsonl", colour_rows(300, swapped))
    bad = written(picture_folder, "bad.jsonl", [row(n, "It is red.", "It is very red.") for n in range(100)])
    fine = vapr(good)
    assert fine.exit_code == 0, fine.output
    assert "no gate fails" in fine.stdout
    failing = vapr(good, bad, "--json", "--seed", "3", "--max-pairs", "80")
    assert failing.exit_code == 1
    result = json.loads(failing.stdout)
    assert list(result["sets"]) == ["good.jsonl", "bad.jsonl"]
    assert result["settings"] == {"max_pairs": 80, "seed": 3, "model": None, "limit": None, "folds": 5}
    assert "bad.jsonl: rejected longer" in result["failed"]
    assert not any(line.startswith("good.jsonl: rejected") for line in result["failed"])
    table = vapr(good, bad).stdout
    line = next(line for line in table.splitlines() if line.startswith("rejected longer"))
    assert line.index("pass") < line.index("FAIL")
    assert "1 of 2 sets fail (bad.jsonl)" in table


def test_a_folder_of_vapr_edit(picture_folder, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "ledger.jsonl").write_text('{"not": "a pair"}\n')
    rows = [{k: v for k, v in r.items() if k != "images"} for r in colour_rows(80, swapped)]
    write_pairs(tmp_path / "pairs" / "pairs.jsonl", rows)
    assert f"{len(rows)} rows" in vapr(tmp_path).stdout


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], (), "no pairs in it"),
        ([row(0, "A.", "A.")], (), "the same text"),
        ([row(0, "A.", "A.")], ("--on-bad-row", "skip"), "holds no pair"),
        ([row(0, "A.", "B.")], ("--out", "page.pdf"), ".html"),
        ([row(0, "A.", "B.")], ("--column", "prompt"), "--column prompt"),
        ([row(0, "A.", "B.")], ("--format", "nonsense"), "nonsense"),
        ([row(0, "A.", "B.")], ("--model", "/no/such/model"), "--model"),
    ],
)
def test_mistakes_are_one_line(picture_folder, rows, arguments, message):
    result = vapr(written(picture_folder, "mistake.jsonl", rows), *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and message in lines[0], result.output
    assert "Traceback" not in result.stderr


def test_more_mistakes(picture_folder, monkeypatch):
    good = written(picture_folder, "good.jsonl", colour_rows(20, swapped))
    assert "twice" in vapr(good, good).stderr
    assert "no such file" in vapr(picture_folder / "absent.jsonl").stderr
    plain_import = builtins.__import__

    def without_sklearn(name, *rest):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    result = vapr(good)
    assert result.exit_code == 2 and "sklearn; pip install 'vapr[audit]'" in result.stderr


@pytest.mark.parametrize("rows", [[row(0, "A.", "B.")], [row(n, "...", "!") for n in range(60)], [row(n, "A b.", "B a.", category="one") for n in range(60)]])  # fmt: skip
def test_odd_sets_are_measured_all_the_same(picture_folder, rows, tmp_path):
    file = written(picture_folder, "odd.jsonl", rows)
    result = vapr(file, "--out", tmp_path / "page.html")
    assert result.exit_code in (0, 1) and (tmp_path / "page.html").exists()
    json.loads(vapr(file, "--json").stdout)


def test_texts_are_measured_without_the_image_files(picture_folder, tiny):
    rows = [row(n, "It is red.", "It is blue.") for n in range(60)]
    rows[3]["images"] = ["a/gone.png"]
    file = written(picture_folder, "gone.jsonl", rows)
    assert "(1 pairs whose files are missing)" in vapr(file).stdout
    refused = vapr(file, "--model", tiny("llava"))
    assert refused.exit_code == 2 and "gone.png' not found" in refused.stderr


def test_names_of_sets():
    assert list(named(["x/a.jsonl", "y/b.jsonl"], [1, 2])) == ["a.jsonl", "b.jsonl"]
    assert list(named(["x/pairs", "y/pairs"], [1, 2])) == ["x/pairs", "y/pairs"]


def test_bad_rows_are_counted(picture_folder):
    rows = [*colour_rows(80, swapped), {"id": "bad", "prompt": "What?", "chosen": "A."}]
    file = written(picture_folder, "skips.jsonl", rows)
    assert vapr(file).exit_code == 2
    assert "(1 rows skipped)" in vapr(file, "--on-bad-row", "skip").stdout


# --- the page

ATTACK = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def wide_page(picture_folder, tmp_path_factory) -> Path:
    """Words, names and texts as wide as they come, in two sets."""
    endless = "x" * 300
    rows = [
        row(n, f"Yes {ATTACK} {endless} {n % 7} a b c d e", f"No {endless} {n % 5} {ATTACK} f g h i j", category=(endless, ATTACK, "c")[n % 3], source=f"{endless}{n % 2}")
        for n in range(90)
    ]  # fmt: skip
    rows += [{**rows[0], "id": "twin"}]
    sets = {name: opened(picture_folder, rows, f"wide{n}.jsonl") for n, name in enumerate((endless, ATTACK))}
    result = audit(sets)
    view = {"accuracy": percent(np.ones(30), np.arange(30)), "accuracy_per_token": percent(np.ones(30), np.arange(30)), "margin": 1.0, "margin_per_token": 0.1}  # fmt: skip
    for one in result["sets"].values():
        one["model"] = {"with_image": view, "blind": view, "skipped": {"rows": 1, "first": [endless]}}
    path = tmp_path_factory.mktemp("page") / "audit.html"
    write_audit_report(path, result)
    return path


def test_the_page_needs_nothing_else(wide_page):
    text = wide_page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.findall(r"https?://|src=|url\(|@import", text)
    assert text.count("<svg") == 2 + 4 + 1


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(wide_page, tmp_path):
    ran = chromium(tmp_path / "profile", wide_page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,2200")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert len(Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1 << 20)) > 50


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_the_page_does_not_scroll_sideways(wide_page, tmp_path, width):
    tell = "<script>onload = () => parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "inner.html").write_text(wide_page.read_text().replace("</body>", f"{tell}</body>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<body><script>onmessage = (event) => {{ document.title = 'width ' + event.data }}</script><iframe src='inner.html' style='border:0' width={width} height=900></iframe>"
    )
    ran = chromium(tmp_path / "profile", outer, "--dump-dom", "--virtual-time-budget=5000")
    measured = re.search(r"<title>width (\d+)</title>", ran.stdout)
    assert measured and int(measured[1]) <= width
