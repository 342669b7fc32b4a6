"""The page of vapr eval --compare: what it shows, that nothing is taken for HTML, and its filters in a browser."""

import json
import re
from collections import Counter

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.evaluation.compare.answers import row, rows_of, write
from tests.pages.test_review_sample import in_browser
from tests.pages.test_run_report import ATTACK, Parser, chromium, needs_chromium
from vapr.cli import main
from vapr.evaluation.compare.changes import SHOWN
from vapr.evaluation.compare.questions import LEAST, MOST


class Page(Parser):
    VOID = (*Parser.VOID, "input")


def vapr(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["eval", "--compare", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def kinds_on(page: str) -> Counter:
    """Count the kinds of the articles; with several models a question has one for each."""
    found = re.findall(r'<article [^>]*data-kinds="([^"]*)"', page)
    return Counter(kind for kinds in found for kind in kinds.split("|"))


@pytest.fixture
def two(tmp_path):
    """20 fixed, 15 broken, 3 unparsed, 2 parsed, 14 still wrong, 6 still right."""
    first = "-" * 20 + "+" * 15 + "++-" + "??" + "-" * 14 + "+" * 6
    second = "+" * 20 + "-" * 15 + "???" + "+-" + "-" * 14 + "+" * 6
    return [write(tmp_path / name, rows_of(marks)) for name, marks in (("a", first), ("b", second))]


def test_page_and_json_say_the_same(two, tmp_path):
    shown = vapr(*two, "--out", tmp_path / "page.html")
    assert f"wrote {tmp_path}/page.html and page.json" in shown
    page, result = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "page.json").read_text())
    assert json.loads(vapr(*two, "--json")) == result
    assert kinds_on(page) == {
        "fixed": MOST,
        "broken": MOST,
        "became unparsed": 3,
        "became parsed": 2,
        "still wrong": MOST,
    }
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["kinds"] == list(SHOWN)
    assert data["totals"] == {"pope": [dict(zip(SHOWN, (20, 15, 3, 2, 0, 14), strict=True))]}
    text = Page(page).text
    assert f"At most {MOST} questions of a kind and benchmark are shown, drawn with seed 0" in text
    assert "read as 'strict'" in text and "b against a" in text
    assert "3 (2 right before)" in text and "2 (1 right now)" in text
    assert text.count("Is there a thing") == sum(kinds_on(page).values())
    assert not re.search(r"https?:|url\(|@import|<link", page)


def test_the_draw_does_not_depend_on_the_order_of_lines(two, tmp_path):
    vapr(*two, "--out", tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    for folder in two:
        lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
        (folder / "predictions.jsonl").write_text("".join(reversed(lines)))
    vapr(*two, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == before


def test_a_question_shows_every_models_answer(two, tmp_path):
    third = write(tmp_path / "c", rows_of("?" * 60))
    vapr(*two, third, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    most = max(LEAST, MOST // 2)
    counted = re.findall(r'data-kinds="([^"|]*)\|([^"]*)"', page)
    assert {kind for _, kind in counted} == {"became unparsed", "still unparsed"}
    assert Counter(kind for kind, _ in counted)["fixed"] >= most
    text = Page(page).text
    assert text.count("c: unparsed") == len(counted) and text.count("a: ") >= len(counted)
    assert "questions of a kind, model and benchmark" in text


def test_what_files_say_is_text(tmp_path):
    def attack(said):
        return [row(n, f"{said} {ATTACK}", question=f"{n} {ATTACK} </article>", meta={"split": f"{ATTACK}{n % 9}", "options": [ATTACK], "image": ATTACK})
                for n in range(20)]  # fmt: skip

    names = [write(tmp_path / f"{name}<script>", attack(said)) for name, said in (("a", "Yes,"), ("b", "No,"))]
    (names[0] / "evaluation.json").write_text(
        json.dumps({"questions": {"pope": {"given": ATTACK}}, "settings": {ATTACK: 1}, "model": {"given": ATTACK}})
    )
    (names[1] / "evaluation.json").write_text(json.dumps({"settings": {ATTACK: ATTACK}}))
    vapr(*names, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    parsed = Page(page)
    assert parsed.tags.count("script") == 2 and page.count("<script") == 2 == page.count("</script>")
    assert page.count("</article>") == len(re.findall("<article ", page)) == MOST
    assert parsed.text.count(ATTACK) > 50


def test_pictures_are_found_where_evaluation_says_or_beside_the_answers(two, tmp_path):
    shown = vapr(*two, "--out", tmp_path / "page.html")
    assert re.search(r"note: 41 questions of pope are shown without a picture: evaluation.json names no files", shown)
    for n in range(60):
        Image.new("RGB", (500, 20), "teal").save(two[0] / f"{n}.jpg")
    shown = vapr(*two, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "without a picture" not in shown and page.count('src="data:image/jpeg;base64,') == 41
    (two[0] / "3.jpg").write_bytes(b"no picture")
    for n in range(60):
        if n != 3:
            (two[0] / f"{n}.jpg").unlink()
    questions = tmp_path / "pope"
    questions.mkdir()
    lines = [
        {"question_id": n, "image": f"{n}.png", "text": f"Is there a thing{n} in the image?", "label": "yes"}
        for n in range(60)
    ]
    (questions / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for n in range(60):
        Image.new("RGB", (30, 30), "red").save(questions / f"{n}.png")
    for folder in two:
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        write(folder, [{**one, "id": one["id"].replace("q-", "random-")} for one in rows])
    (two[1] / "evaluation.json").write_text(json.dumps({"questions": {"pope": {"given": f"pope={questions}"}}}))
    assert "without a picture" not in vapr(*two, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count('src="data:image/jpeg;base64,') == 41
    (questions / "coco_pope_random.json").unlink()
    assert "pope are shown without a picture" in vapr(*two, "--out", tmp_path / "page.html")


def test_the_next_command_is_named(two, tmp_path):
    assert f"next  vapr eval --compare {two[0]} {two[1]} --policy strict --out comparison.html" in vapr(*two)
    third = write(tmp_path / "c", rows_of("?" * 60))
    shown = vapr(two[0], third)
    assert f"next  vapr eval --compare {two[0]} {third} --policy last-answer  (100.0% of c's answers to pope" in shown


def test_nothing_changed_is_a_page_too(tmp_path):
    names = [write(tmp_path / name, rows_of("++++")) for name in "ab"]
    vapr(*names, "--out", tmp_path / "page.html")
    assert "No question changed, and none is wrong." in Page((tmp_path / "page.html").read_text()).text


@needs_chromium
def test_filters_and_keys(two, tmp_path):
    third = write(tmp_path / "c", rows_of("?" * 60))
    page = tmp_path / "page.html"
    vapr(*two, third, "--out", page)
    counted = [kinds.split("|") for kinds in re.findall(r'data-kinds="([^"]*)"', page.read_text())]
    result = in_browser(page, """
      const shown = () => [...page.querySelectorAll('article')].filter((one) => !one.hidden).length;
      const focused = () => page.activeElement.dataset?.kinds;
      const seen = [shown()];
      key('1'); seen.push(shown());
      key('j'); const first = focused(); key('j'); key('k'); const back = focused() === first;
      key('3'); seen.push(shown());
      enter('model', '0', 'change'); seen.push(shown());
      const totals = [...page.querySelectorAll('[data-total]')].map((one) => one.textContent);
      key('0'); key('/'); const searching = page.activeElement.id;
      enter('search', 'thing7 ', 'input'); key('Escape'); seen.push(shown());
      return { seen, first, back, totals, searching, status: text('status'), hidden: el('filters').hidden };
    """)  # fmt: skip
    fixed = sum("fixed" in kinds for kinds in counted)
    unparsed = sum("became unparsed" in kinds for kinds in counted)
    assert result["seen"][:4] == [
        len(counted),
        fixed,
        unparsed,
        sum(kinds[0] == "became unparsed" for kinds in counted),
    ]
    assert result["first"].startswith("fixed") and result["back"] and result["searching"] == "search"
    assert result["totals"] == ["20", "15", "3", "2", "0", "14"]
    assert (
        result["seen"][4] <= 1 and result["status"] == f"{result['seen'][4]} of {len(counted)} questions on this page."
    )
    assert not result["hidden"]


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(two, tmp_path):
    vapr(*two, "--out", tmp_path / "page.html")
    shot = tmp_path / "shot.png"
    for width in (400, 1280):
        ran = chromium(
            tmp_path / "profile", tmp_path / "page.html", f"--screenshot={shot}", f"--window-size={width},2200"
        )
        assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
        assert len(Image.open(shot).convert("RGB").getcolors(1 << 20)) > 50
