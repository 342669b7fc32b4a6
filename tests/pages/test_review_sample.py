"""vapr view: which pairs are chosen, what the page holds, and what a browser does with keys, clicks and files."""

import html
import json
import re
import tempfile
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pages.test_run_report import chromium, needs_chromium
from tests.test_cli import assert_one_line_error, vapr
from vapr.data.pairs import write_pairs
from vapr.data.review_verdicts import read_verdicts
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.intervals import wilson
from vapr.pages import review_sample as view
from vapr.pages.review import marked

ATTACK = "</script ><img src=x onerror=\"document.title='owned'\"><!--<script>document.title='owned'</script>"
EXTRAS = {
    "source": "mix/vqa",
    "licence": "CC0-1.0",
    "checks": [{"name": "length ratio", "passed": True, "value": 1.0625, "note": None}, {"name": "colour changed", "passed": False, "value": None, "note": "near-synonym"}],
    "provenance": {"editor": "some/editor", "seed": 0, "attempts": 2, "plan": {"pair": "swap"}, "raw": None},
}  # fmt: skip


def row(number: int, category: str | None = "colour", **changes) -> dict:
    colours = ("red", "blue", "green", "white")
    left, right = colours[number % 4], colours[(number + 1) % 4]
    return {
        "id": f"pair-{number}", "prompt": f"What colour is car {number}?", "chosen": f"The car is {left}.",
        "rejected": f"The car is {right}.", "category": category, **changes,
    }  # fmt: skip


def build(folder: Path, rows: list[dict], **options) -> tuple[Path, dict]:
    write_pairs(folder / "pairs.jsonl", rows)
    out = folder / "page.html"
    return out, view.view(read_pairs(folder / "pairs.jsonl", on_bad_row="skip"), out, **options)


def data_of(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


# ---- choosing


def test_a_sample_is_shared_out_by_hand():
    assert view.shares({"a": 6_000, "b": 3_000, "c": 1_000}, 1_000) == {"a": 600, "b": 300, "c": 100}
    assert view.shares({"a": 600, "b": 300, "c": 100}, 100) == {"a": 40, "b": 30, "c": 30}  # c and then b get their 30
    assert view.shares({"a": 900, "b": 95, "c": 5}, 200) == {"a": 165, "b": 30, "c": 5}
    assert view.shares({"a": 90, "b": 10}, 10) == {"a": 5, "b": 5}  # 30 each do not fit: an equal part is the floor
    assert view.shares({"a": 5, "b": 5, "c": 90}, 2) == {"a": 0, "b": 0, "c": 2}
    assert view.shares({"a": 7, "b": 2}, 9) == {"a": 7, "b": 2}
    for seed in range(200):
        random = np.random.default_rng(seed)
        sizes = {str(n): int(size) for n, size in enumerate(random.integers(1, 300, random.integers(1, 30)))}
        total = int(random.integers(1, sum(sizes.values()) + 1))
        parts = view.shares(sizes, total)
        assert sum(parts.values()) == total and all(0 <= parts[name] <= size for name, size in sizes.items())
        assert all(parts[name] >= min(size, 30, total // len(sizes)) for name, size in sizes.items())


def test_all_pairs_or_a_stratified_sample(tmp_path):
    rows = [row(n, "rare" if n % 20 == 0 else "common") for n in range(1_100)]
    page, result = build(tmp_path, rows)
    assert result["categories"] == {"common": {"shown": 950, "of": 1_045}, "rare": {"shown": 50, "of": 55}}
    shown = data_of(page)
    assert shown["sizes"] == {"common": 1_045, "rare": 55} and len({pair["id"] for pair in shown["pairs"]}) == 1_000
    assert "A random sample of 1,000 of 1,100 pairs (seed 0)" in shown["notes"][0]
    first = page.read_bytes()
    assert build(tmp_path, rows)[0].read_bytes() == first
    assert build(tmp_path, rows, seed=1)[0].read_bytes() != first
    page, result = build(tmp_path, rows, sample=200)
    assert result["categories"]["rare"] == {"shown": 30, "of": 55}
    page, _ = build(tmp_path, rows[:50])
    shown = data_of(page)
    assert sorted(pair["id"] for pair in shown["pairs"]) == sorted(one["id"] for one in rows[:50])
    assert [pair["id"] for pair in shown["pairs"]] != [one["id"] for one in rows[:50]]  # shuffled
    assert shown["notes"] == ["All 50 pairs, in a random order (seed 0), so that the first ones are a fair sample."]


# ---- what the page holds


def test_a_page_holds_what_is_known_of_a_pair(tmp_path):
    page, _ = build(tmp_path, [row(1, **EXTRAS), row(2, None, provenance=json.dumps({"editor": "other"}))])
    one, two = sorted(data_of(page)["pairs"], key=lambda pair: pair["id"])
    assert (one["source"], one["category"], one["question"]) == ("mix/vqa", "colour", "What colour is car 1?")
    assert one["chosen"] == [["The car is ", False], ["blue", True], [".", False]]
    assert one["rejected"] == [["The car is ", False], ["green", True], [".", False]]
    assert one["checks"] == [
        {"name": "length ratio", "passed": True, "value": "1.0625", "note": ""},
        {"name": "colour changed", "passed": False, "value": "", "note": "near-synonym"},
    ]
    facts = dict(one["facts"])
    assert facts["place"].endswith("pairs.jsonl:1") and facts["licence"] == "CC0-1.0"
    assert (facts["editor"], facts["attempts"], facts["plan"]) == ("some/editor", "2", '{\n "pair": "swap"\n}')
    assert "raw" not in facts
    assert (two["category"], two["source"], two["checks"]) == ("", "", []) and dict(two["facts"])["editor"] == "other"


def test_edits_are_marked_to_the_character(tmp_path):
    chosen, rejected = "Two redwood trees.", "Two bluewood trees."
    edits = [{"start": 4, "end": 7, "from": "red", "to": "blue"}]
    same = {"prompt": "q", "category": None}
    write_pairs(tmp_path / "pairs.jsonl", [
        {**same, "id": "a", "chosen": chosen, "rejected": rejected, "edits": edits},
        {**same, "id": "b", "chosen": chosen, "rejected": "Two bluewood bushes.", "edits": edits},
        {**same, "id": "c", "chosen": chosen, "rejected": rejected},
        {**same, "id": "d", "chosen": "0123456789", "rejected": "XY789", "edits": [
            {"start": 0, "end": 5, "from": "01234", "to": "X"}, {"start": 3, "end": 7, "from": "3456", "to": "Y"}]},
    ])  # fmt: skip
    exact, wrong, none, overlapping = (marked(pair) for pair in read_pairs(tmp_path / "pairs.jsonl"))
    tail = ("wood trees.", False)
    assert exact == ([("Two ", False), ("red", True), tail], [("Two ", False), ("blue", True), tail], True)
    assert wrong[2] is False and [text for text, mark in wrong[1] if mark] == ["bluewood bushes"]
    assert none[2] is False and [text for text, mark in none[0] if mark] == ["redwood"]
    assert overlapping == ([("0123456789", True)], [("XY789", True)], False)


def test_pictures_are_held_once_labelled_and_missed_aloud(tmp_path):
    Image.new("RGB", (900, 300), "teal").save(tmp_path / "a.png")
    Image.new("RGB", (300, 900), "navy").save(tmp_path / "b.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    two = [{"type": "text", "text": "Left"}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    context = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello?"}]},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    page, result = build(tmp_path, [
        row(0, images=["a.png"]), row(1, images=["a.png"]), row(2, images=["copy.png"]),
        row(3, images=["a.png", "b.png"], prompt=[{"role": "user", "content": two}]),
        row(4, images=["a.png"], rejected_images=["b.png"]),
        row(5, images=["broken.png"]), row(6, images=["broken.png"]),
        row(7, images=["a.png"], prompt=context), row(8, images=["gone.png"]), row(9),
    ])  # fmt: skip
    assert (result["pairs"], result["pictures"], result["unreadable"]) == (9, 2, 1)
    assert [line.split(": ", 1)[1] for line in result["skipped"].values()] == [
        f"image 'gone.png' not found (looked for {tmp_path / 'gone.png'})"
    ]
    assert page.read_text().count("data:image/jpeg;base64,") == 2
    data = data_of(page)
    shown = {pair["id"]: pair for pair in data["pairs"]}
    assert [image["label"] for image in shown["pair-3"]["images"]] == ["picture 1", "picture 2"]
    assert shown["pair-3"]["question"] == "Left[picture 1] and[picture 2]"
    assert [image["label"] for image in shown["pair-4"]["images"]] == ["picture of the chosen answer", "picture of the rejected answer"]  # fmt: skip
    assert shown["pair-0"]["images"][0]["picture"] == shown["pair-2"]["images"][0]["picture"]
    assert "is not an image file" in shown["pair-5"]["images"][0]["problem"]
    assert [turn["text"] for turn in shown["pair-7"]["context"]] == ["[picture 1] Hello?", "Hello."]
    assert any("Pictures that cannot be read: 1" in note for note in data["notes"])
    assert any("Rows that are no pair and are not here: 1" in note for note in data["notes"])


def test_an_editing_jobs_folder_and_other_formats_are_read(tmp_path):
    from vapr.data.convert import convert

    (tmp_path / "job" / "pairs").mkdir(parents=True)
    write_pairs(tmp_path / "rows.jsonl", [row(n) for n in range(3)])
    convert(read_pairs(tmp_path / "rows.jsonl"), "vapr", tmp_path / "job" / "pairs" / "part-0.parquet")
    assert view.view(read_pairs(tmp_path / "job", on_bad_row="skip"), tmp_path / "job.html")["pairs"] == 3
    convert(read_pairs(tmp_path / "rows.jsonl"), "povid", tmp_path / "povid.json")
    assert view.view(read_pairs(tmp_path / "povid.json", on_bad_row="skip"), tmp_path / "povid.html")["pairs"] == 3


def test_the_page_fetches_nothing_and_its_files_are_packaged(tmp_path):
    page, _ = build(tmp_path, [row(1)])
    text = page.read_text()
    assert not re.search(r"https?:|url\(|@import|<link|<script src|innerHTML|insertAdjacentHTML|document\.write", text)
    assert "default-src 'none'; img-src data:" in text
    patterns = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vapr"]  # fmt: skip
    for file in resources.files("vapr.pages").iterdir():
        if file.is_file() and not file.name.endswith(".py"):
            assert f"pages/*.{file.name.rsplit('.')[-1]}" in patterns, file.name


def test_mistakes_are_one_line(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", [row(1)])
    with pytest.raises(UserError, match=r"pairs\.jsonl: a page is written as \.html"):
        view.view(read_pairs(tmp_path / "pairs.jsonl"), tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "bad.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match=r"no pair to show; the first row: .*bad\.jsonl:1: 'chosen' and 'rejected'"):
        view.view(read_pairs(tmp_path / "bad.jsonl", on_bad_row="skip"), tmp_path / "page.html")


def test_the_command_says_what_it_wrote(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", [row(n, "a" if n < 60 else "b") for n in range(80)] + [{"prompt": "q"}])
    ran = vapr("view", "pairs.jsonl", "--out", "page.html", "--sample", "40", "--seed", "3", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    read, wrote, sample, skipped = ran.stdout.splitlines()
    assert read == "read       pairs.jsonl (81 rows, format vapr)"
    assert re.fullmatch(r"wrote      page\.html \(40 of 80 pairs, 0 pictures, 0\.\d MiB\)", wrote)
    assert sample == "sample     by category: a 20 of 60, b 20 of 20"
    assert skipped.startswith("skipped    1 rows; the first: pairs.jsonl:81: 'chosen' and 'rejected' are missing")
    result = json.loads(vapr("view", "pairs.jsonl", "--out", "page.html", "--json", cwd=tmp_path).stdout)
    assert result["pairs"] == 80 and result["bytes"] == (tmp_path / "page.html").stat().st_size
    assert_one_line_error(vapr("view", "none.jsonl", "--out", "page.html", cwd=tmp_path), "none.jsonl: no such file")
    mapped = vapr("view", "pairs.jsonl", "--out", "page.html", "--column", "prompt", cwd=tmp_path)
    assert_one_line_error(mapped, "--column prompt: write --column prompt=question")


# ---- in a browser

HELPERS = """
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const frame = document.querySelector('iframe');
let page, win;
const arrive = () => { win = frame.contentWindow; page = win.document; };
const el = (id) => page.getElementById(id);
const key = (name, more = {}) => (page.activeElement ?? page.body).dispatchEvent(
  new win.KeyboardEvent('keydown', { key: name, bubbles: true, cancelable: true, ...more }));
const enter = (id, value, kind) => { el(id).value = value; el(id).dispatchEvent(new win.Event(kind, { bubbles: true })); };
const id = () => el('review').hidden ? null : page.querySelector('#pair .id').textContent;
const text = (name) => el(name).textContent;
const reload = async () => { const loaded = new Promise((done) => { frame.onload = done; }); win.location.reload(); await loaded; arrive(); };
async function exported() {
  let blob, name; const url = win.URL.createObjectURL, click = win.HTMLAnchorElement.prototype.click;
  win.URL.createObjectURL = (given) => { blob = given; return url.call(win.URL, given); };
  win.HTMLAnchorElement.prototype.click = function () { name = this.download; };
  el('export').click(); win.URL.createObjectURL = url; win.HTMLAnchorElement.prototype.click = click;
  if (name !== 'verdicts.jsonl') throw new Error(name);
  return await blob.text();
}
async function give(name, content) {
  const files = new win.DataTransfer(); files.items.add(new win.File([content], name));
  el('file').files = files.files; el('file').dispatchEvent(new win.Event('change'));
  // Reading a file is real work that the browser's virtual time does not wait for; other reads of the kind do.
  for (let n = 0; n < 50000 && !el('status').textContent.match(/import/); n += 1) await new win.Blob([content]).text();
}
"""


def in_browser(page: Path, script: str, width: int = 1280, height: int = 800) -> dict:
    """Run a script beside the page in a frame; what it returns. The browser must not complain of anything."""
    outer = page.with_name("outer.html")
    outer.write_text(
        f"<pre id=result></pre><iframe src='{page.name}' style='border:0' width={width} height={height}></iframe>"
        f"<script>{HELPERS} async function run() {{ {script} }}\nframe.onload = async () => {{ frame.onload = null; arrive(); let result;"
        "try { result = await run() } catch (error) { result = { failed: String(error.stack) } }"
        "document.getElementById('result').textContent = JSON.stringify(result) }</script>"
    )
    profile = Path(tempfile.mkdtemp(dir=page.parent))
    ran = chromium(profile, outer, "--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=20000", f"--window-size={max(width, 500)},{height}")  # fmt: skip
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found and found[1], ran.stdout[:2000]
    result = json.loads(html.unescape(found[1]))
    assert "failed" not in result, result
    return result


@pytest.fixture
def ten(tmp_path):
    """A page of six pairs of one category and four of another, two sources."""
    rows = [row(n, "colour" if n < 6 else "count", source="web" if n % 2 else "own") for n in range(10)]
    page, _ = build(tmp_path, rows)
    return page


def order_of(page: Path) -> list[str]:
    return [pair["id"] for pair in data_of(page)["pairs"]]


@needs_chromium
def test_keys_decide_move_and_take_back(ten):
    order = order_of(ten)
    result = in_browser(ten, """
      const seen = [id()];
      for (const name of ['k', 'D', 's', 'ArrowRight', 'j', 'ArrowLeft']) { key(name); seen.push(id()); }
      const counts = [text('headline')]; const widths = [...el('progress').children].map((bar) => bar.style.width);
      key('k', { ctrlKey: true }); key('k', { repeat: true }); key('x'); counts.push(text('headline'));
      key('u'); const back = [id(), text('status')]; counts.push(text('headline'));
      key('u'); key('u'); key('u'); counts.push(text('headline'));
      const disabled = el('undo').disabled;
      key('?'); key('k'); const open = el('keys').open; el('keys-close').click();
      return { seen, counts, widths, back, disabled, open, after: text('headline'), at: id() };
    """)  # fmt: skip
    assert result["seen"] == [*order[:4], order[4], order[5], order[4]]
    assert result["counts"][0].startswith("1 kept, 1 dropped, 1 unsure, 7 open · truly wrong 50.0 %")
    assert result["widths"] == ["10%", "10%", "10%"]
    assert result["counts"][1] == result["counts"][0]
    assert result["back"] == [order[2], f"{order[2]}: taken back."]
    assert result["counts"][2].startswith("1 kept, 1 dropped, 0 unsure, 8 open")
    assert result["counts"][3].startswith("0 kept, 0 dropped, 0 unsure, 10 open. Target: at least 95 % truly wrong")
    assert result["disabled"] and result["open"] and result["after"] == result["counts"][3]
    assert result["at"] == order[0]


@needs_chromium
def test_buttons_do_what_the_keys_do(ten):
    order = order_of(ten)
    result = in_browser(ten, """
      el('keep').click(); el('drop').click(); el('unsure').click(); el('next').click(); el('previous').click();
      const there = id(); el('previous').click(); const pressed = ['keep', 'drop', 'unsure'].map((name) => el(name).getAttribute('aria-pressed'));
      const chip = page.querySelector('.chips .unsure').textContent; el('undo').click();
      return { there, pressed, chip, at: id(), counts: text('headline') };
    """)  # fmt: skip
    assert result["there"] == order[3] and result["pressed"] == ["false", "false", "true"]
    assert result["chip"] == "unsure" and result["at"] == order[2]
    assert result["counts"].startswith("1 kept, 1 dropped, 0 unsure, 8 open")


@needs_chromium
def test_filters_choose_what_is_shown(ten):
    order, data = order_of(ten), data_of(ten)
    counted = [pair["id"] for pair in data["pairs"] if pair["category"] == "count"]
    result = in_browser(ten, """
      const walk = () => { const seen = [id()]; while (!el('next').disabled) { key('j'); seen.push(id()); } return seen; };
      const options = [...el('category').options].map((option) => option.textContent);
      enter('category', 'count', 'change'); const first = id(); while (!el('previous').disabled) key('ArrowLeft');
      const counted = walk(); const place = text('place'); enter('source', 'web', 'change'); while (!el('previous').disabled) key('ArrowLeft');
      const both = walk(); el('clear').click(); while (!el('previous').disabled) key('ArrowLeft'); const all = walk();
      enter('verdict', 'open', 'change'); while (!el('previous').disabled) key('ArrowLeft');
      key('k'); key('d'); const open = [id(), text('place')];
      enter('verdict', 'keep', 'change'); const kept = walk(); enter('verdict', 'unsure', 'change');
      const none = [id(), el('nothing').hidden, el('review').hidden, el('keep').disabled, text('place')]; key('k');
      el('clear').click(); enter('search', 'CAR 7?', 'input'); const found = walk();
      return { options, counted, place, both, all, open, kept, none, found, counts: text('headline') };
    """)  # fmt: skip
    assert result["options"] == ["every category", "colour (6)", "count (4)"]
    assert result["counted"] == counted and result["place"] == "Pair 4 of 4 that fit (10 in all)"
    assert result["both"] == [name for name in counted if int(name[-1]) % 2]
    assert result["all"] == order
    assert result["open"] == [order[2], "Pair 1 of 8 that fit (10 in all)"]
    assert result["kept"] == [order[0]]
    assert result["none"] == [None, False, True, True, "0 of 10 pairs"]
    assert result["found"] == ["pair-7"]
    assert result["counts"].startswith("1 kept, 1 dropped, 0 unsure, 8 open")


@needs_chromium
def test_verdicts_and_notes_outlive_a_reload_and_are_exported(ten, tmp_path):
    order = order_of(ten)
    result = in_browser(ten, """
      key('n'); const typing = page.activeElement.id; key('k'); enter('note', ' it is  "tan" ', 'change'); key('Enter');
      key('k'); key('d'); key('s'); key('n'); enter('note', 'only a note', 'change'); el('note').blur();
      await reload();
      const at = id(), counts = text('headline'); const note = (el('next').click(), el('previous').click(), el('note').value);
      return { typing, at, counts, note, file: await exported(), said: text('status') };
    """)  # fmt: skip
    assert result["typing"] == "note" and result["at"] == order[3] and result["note"] == "only a note"
    assert result["counts"].startswith("1 kept, 1 dropped, 1 unsure, 7 open")
    data = data_of(ten)
    categories = {pair["id"]: pair["category"] for pair in data["pairs"]}
    assert [json.loads(line) for line in result["file"].splitlines()] == [
        {"id": order[0], "verdict": "keep", "note": 'it is  "tan"', "category": categories[order[0]], "page": data["page"]},
        {"id": order[1], "verdict": "drop", "category": categories[order[1]], "page": data["page"]},
    ]  # fmt: skip
    assert result["said"] == "2 verdicts in verdicts.jsonl. 2 unsure or only noted pairs are not in it."
    (tmp_path / "verdicts.jsonl").write_text(result["file"])
    assert read_verdicts(tmp_path / "verdicts.jsonl") == {order[0]: "keep", order[1]: "drop"}


@needs_chromium
def test_earlier_verdicts_are_imported(ten):
    earlier = [{"id": "pair-3", "verdict": "drop", "note": "blurred"}, {"id": "pair-4", "verdict": "keep"}, {"id": "elsewhere", "verdict": "keep"}, {"id": "pair-4", "verdict": "drop"}]  # fmt: skip
    lines = "\ufeff" + "\n".join(json.dumps(line) for line in earlier) + "\n\n"
    result = in_browser(ten, f"""
      enter('search', 'pair-4', 'input'); enter('note', 'mine', 'change'); el('clear').click();
      enter('search', 'pair-3', 'input'); key('k'); el('clear').click();
      await give('verdicts.jsonl', {json.dumps(lines)}); const said = text('status'), counts = text('headline'), file = await exported();
      key('u'); const back = text('headline');
      el('status').textContent = ''; await give('bad.jsonl', '{{"id": "pair-1", "verdict": "keep"}}\\n{{"id": 1}}\\n');
      return {{ said, counts, file, back, bad: text('status'), last: text('headline') }};
    """)  # fmt: skip
    assert (
        result["said"] == "2 verdicts imported, 1 of them in place of others; 1 are of pairs that are not on this page."
    )
    assert result["counts"].startswith("0 kept, 2 dropped, 0 unsure, 8 open")
    assert {(one["id"], one["verdict"], one.get("note")) for one in map(json.loads, result["file"].splitlines())} == {("pair-3", "drop", "blurred"), ("pair-4", "drop", "mine")}  # fmt: skip
    assert result["back"].startswith("1 kept, 0 dropped, 0 unsure, 9 open")
    assert result["bad"] == "Nothing imported: line 2 of bad.jsonl is no verdict."
    assert result["last"] == result["back"]


@needs_chromium
def test_without_storage_the_page_says_so(ten):
    """As in browsers that keep nothing for a file: the page's own policy is taken out to put such a browser in front."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", ten.read_text())
    denied = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied') } })"
    ten.write_text(text.replace("<body>", f"<body><script>{denied}</script>"))
    result = in_browser(
        ten, "key('k'); return { hidden: el('warning').hidden, said: text('warning'), counts: text('headline') }"
    )
    assert result["hidden"] is False and "This browser keeps nothing for this page" in result["said"]
    assert result["counts"].startswith("1 kept")
    assert "Export them" in result["said"]


@needs_chromium
def test_the_estimate_on_the_page_weighs_categories(tmp_path):
    """Of 300 and 100 pairs 10 each are judged: 10 of 10 and 5 of 10 kept. By hand: 0.75 * 1 + 0.25 * 0.5 = 87.5 %. That is
    worth 1 / (0.75^2 / n + 0.25^2 / m) decisions, where n = 10 * 299 / 290 and m = 10 * 99 / 90: the sets are finite."""
    rows = [row(n, "a" if n < 300 else "b") for n in range(400)]
    page, _ = build(tmp_path, rows, sample=80)
    result = in_browser(page, """
      const judge = (category, keys) => { enter('category', category, 'change'); while (!el('previous').disabled) key('ArrowLeft'); for (const name of keys) key(name); };
      judge('a', 'kkkkkkkkkk'); const part = (el('estimate').open = true, await wait(50), text('estimates'));
      judge('b', 'kkkkkddddd'); await wait(50);
      return { part, headline: text('headline'), rows: [...page.querySelectorAll('#estimates tr')].map((line) => [...line.children].map((cell) => cell.textContent)) };
    """)  # fmt: skip
    n, m = 10 * 299 / 290, 10 * 99 / 90
    bounds = [wilson(*case) for case in ((0.875, 1 / (0.75**2 / n + 0.25**2 / m)), (1.0, n), (0.5, m))]
    shown = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in bounds]
    assert result["headline"] == f"15 kept, 5 dropped, 0 unsure, 60 open · truly wrong 87.5 % ({shown[0]}): below the target so far"  # fmt: skip
    assert result["rows"][1:] == [["a", "300", "10", "0", "40", "100.0 %", shown[1]], ["b", "100", "5", "5", "20", "50.0 %", shown[2]]]  # fmt: skip
    assert "it speaks for 75.0 % of the set" in result["part"]


@needs_chromium
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("kkkkkkkkkk", "truly wrong 100.0 % (100.0 to 100.0 %): meets the target"),
        ("kkkkkkkkkd", "truly wrong 90.0 % (90.0 to 90.0 %): misses the target"),
        (
            "kkkkkkkkks",
            "truly wrong 100.0 % (93.6 to 100.0 %): meets the target",
        ),  # one of the four counts is unsure: 3 * 3 / 1 / 0.4^2 decisions
    ],
)
def test_a_finite_set_fully_judged_asks_for_nothing_more(ten, keys, said):
    script = f"for (const name of '{keys}') key(name); el('estimate').open = true; await wait(50); return {{ headline: text('headline'), estimates: text('estimates') }}"
    result = in_browser(ten, script)
    assert result["headline"].endswith(said) and "more" not in result["headline"]
    assert ("every pair is decided" in result["estimates"]) == ("s" not in keys)


@needs_chromium
def test_a_sample_fully_judged_does_not_ask_for_what_it_has_not(tmp_path):
    page, _ = build(tmp_path, [row(n, "one") for n in range(400)], sample=30)
    asked = "const said = []; for (let n = 0; n < 30; n += 1) { key('k'); said.push(text('headline')); } return said;"
    said = in_browser(page, asked)
    assert re.search(r"about \d+ more decisions like these, of which this page has 5$", said[24])
    assert re.search(r": on target, but not certain: a sample of about \d+ more pairs would tell$", said[-1])


@needs_chromium
def test_intervals_are_wilsons(tmp_path):
    from scipy.stats import binomtest

    cases = [(0, 1), (1, 1), (0, 40), (40, 40), (7, 9), (95, 100), (380, 400), (999, 1_000)]
    shares = [(1.0, 44), (1.0, 45), (0.96, 100), (0.5, 10), (0.9, 1_000), (0.96, 1_000)]
    script = (resources.files("vapr.pages") / "estimate.js").read_text()
    page = tmp_path / "page.html"
    page.write_text(f"<script>{script} window.Estimate = Estimate</script>")
    result = in_browser(page, f"""return {{
      bounds: {json.dumps(cases)}.map(([k, n]) => win.Estimate.wilson(k / n, n)),
      words: {json.dumps(shares)}.map(([share, number]) => win.Estimate.inWords({{ share, number }})) }}""")  # fmt: skip
    for (k, n), bound in zip(cases, result["bounds"], strict=True):
        expected = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert bound == pytest.approx([expected.low, expected.high], abs=1e-12)
    low = [binomtest(round(share * n), n).proportion_ci(method="wilson").low for share, n in shares]
    assert low[0] < 0.92 <= low[1] and low[2] < 0.92 <= low[5]  # the facts behind the words
    assert result["words"][0] == "on target so far, but not yet certain: about 1 more decisions like these"
    assert result["words"][1] == "meets the target" == result["words"][5]
    assert result["words"][2].startswith("on target so far") and result["words"][3] == "misses the target" == result["words"][4]  # fmt: skip


@needs_chromium
def test_odd_checks_and_odd_space_are_shown_all_the_same(tmp_path):
    checks = [{"name": "x", "passed": float("nan"), "value": float("inf")}, {"name": "y", "passed": "no"}]
    page, _ = build(tmp_path, [row(1, "one", checks=checks, chosen="A  cat.", rejected="A cat.")])
    shown = in_browser(page, "page.querySelector('#more details').open = true; return page.body.innerText;")
    assert "· x" in shown and "· y" in shown and "difference\tin white space only" in shown


@needs_chromium
def test_what_a_row_says_is_text(tmp_path):
    hostile = {
        "id": ATTACK, "source": ATTACK, "licence": ATTACK, "checks": [{"name": ATTACK, "passed": True, "value": ATTACK, "note": ATTACK}],
        "provenance": {ATTACK: ATTACK}, ATTACK: ATTACK, "prompt": ATTACK, "chosen": f"{ATTACK} yes", "rejected": f"{ATTACK} no",
    }  # fmt: skip
    page, _ = build(tmp_path, [row(1, ATTACK, **hostile), row(2, "__proto__", id="__proto__")])
    result = in_browser(page, """
      enter('search', 'onerror', 'input'); page.querySelector('#more details').open = true; el('estimate').open = true; await wait(50);
      const shown = page.body.innerText; key('k'); el('clear').click(); enter('search', '__proto__', 'input'); key('d'); await wait(200);
      return { shown, title: page.title, scripts: page.scripts.length, images: page.querySelectorAll('img').length, file: await exported() };
    """)  # fmt: skip
    assert result["title"] == "Review: pairs.jsonl"
    assert result["scripts"] == 2 and result["images"] == 1  # the data, the page's script; the picture that enlarges
    assert result["shown"].count(ATTACK) >= 9
    verdicts = {one["id"]: (one["verdict"], one["category"]) for one in map(json.loads, result["file"].splitlines())}
    assert verdicts == {ATTACK: ("keep", ATTACK), "__proto__": ("drop", "__proto__")}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 pairs on 200 noisy pictures."""
    folder = tmp_path_factory.mktemp("thousand")
    random = np.random.default_rng(0)
    for n in range(200):
        small = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg")
    return build(
        folder, [row(n, "even" if n % 2 else "odd", images=[f"{n % 200}.jpg"], **EXTRAS) for n in range(1_000)]
    )


@needs_chromium
def test_a_thousand_pairs_show_one_at_a_time(thousand):
    page, result = thousand
    assert (result["pairs"], result["pictures"]) == (1_000, 200)
    assert page.stat().st_size < 12 * 2**20
    result = in_browser(page, """
      const nodes = () => page.querySelectorAll('body *:not(script)').length;
      await page.querySelector('#pictures img').decode(); const width = page.querySelector('#pictures img').naturalWidth;
      const before = nodes(); for (let n = 0; n < 999; n += 1) key(n % 50 ? 'k' : 'd');
      return { before, after: nodes(), images: page.querySelectorAll('#pictures img').length, headline: text('headline'), place: text('place'), width };
    """)  # fmt: skip
    assert result["images"] == 1 and result["before"] < 250 and abs(result["after"] - result["before"]) < 10
    assert result["headline"].startswith("979 kept, 20 dropped, 0 unsure, 1 open")
    assert result["headline"].endswith("meets the target") and result["place"] == "Pair 1,000 of 1,000"
    assert result["width"] == 448


@pytest.fixture
def wide(tmp_path):
    """Words, names and values as wide as they come."""
    endless = "x" * 300
    Image.new("RGB", (2_000, 40), "teal").save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"")
    checks = [{"name": endless, "passed": None, "value": 1e300, "note": endless}]
    rows = [
        row(n, f"{n}{endless}", id=f"{n}{endless}", source=endless, checks=checks, provenance={endless: endless}, prompt=endless, chosen=f"{endless} a", rejected=f"{endless} b", images=["wide.png", "broken.png", "wide.png"])
        for n in range(3)
    ]  # fmt: skip
    return build(tmp_path, rows)[0]


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 768, 1366])
def test_the_page_does_not_scroll_sideways(wide, width):
    result = in_browser(wide, """
      for (const one of page.querySelectorAll('details')) one.open = true; key('k'); el('previous').click(); await wait(100);
      const buttons = ['keep', 'drop', 'unsure', 'undo', 'next', 'previous'].map((name) => { const box = el(name).getBoundingClientRect(); return [box.width, box.height, box.left, box.right]; });
      return { inner: win.innerWidth, width: page.documentElement.scrollWidth, buttons };
    """, width=width, height=844)  # fmt: skip
    assert result["inner"] == width and result["width"] <= width
    for across, high, left, right in result["buttons"]:
        assert left >= 0 and right <= width and high >= 38 and across >= 38
        assert width > 720 or high >= 44


LONG = "There is a wooden bench with a red back to the left of the entrance, and two people in dark coats walk by. " * 6


@needs_chromium
@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({}, [(640, 480)]),
        ({"prompt": LONG, "chosen": f"{LONG}It is red.{LONG}", "rejected": f"{LONG}It is blue.{LONG}"}, [(480, 640)]),
        ({"category": "c" * 60, "chosen": LONG, "rejected": f"No. {LONG}"}, [(640, 480), (200, 900), (640, 480)]),
        ({"prompt": [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}, {"role": "user", "content": "And now?"}]}, []),
    ],
    ids=["short", "long", "several pictures", "turns"],
)  # fmt: skip
def test_a_phone_shows_both_answers_without_scrolling(tmp_path, changes, pictures):
    for n, size in enumerate(pictures):
        Image.new("RGB", size, "teal").save(tmp_path / f"{n}.png")
    rows = [row(n, **{"images": [f"{m}.png" for m in range(len(pictures))], **EXTRAS, **changes}) for n in range(3)]
    page, _ = build(tmp_path, rows)
    result = in_browser(page, """
      const box = (one) => { const { top, bottom } = one.getClientRects()[0]; return [top, bottom]; }; // of a text its first line
      key('u'); key('k'); await Promise.all([...page.querySelectorAll('#pictures img')].map((one) => one.decode()));
      const answers = [...page.querySelectorAll('.answer')].map((one) => [...box(one), ...box(one.querySelector('mark') ?? one)]);
      return { answers, bar: box(page.querySelector('.bottom')), scroll: win.scrollY, width: page.documentElement.scrollWidth, pictures: el('pictures').getBoundingClientRect().height,
        keep: text('keep'), drop: text('drop'), status: text('status') };
    """, width=375, height=667)  # fmt: skip
    assert result["scroll"] == 0 and result["width"] <= 375 and len(result["answers"]) == 2
    for top, bottom, mark_top, mark_bottom in result["answers"]:
        assert 0 <= top < bottom <= result["bar"][0] and bottom - top >= 40
        assert top <= mark_top + 1 and mark_bottom - 1 <= bottom
    assert result["bar"][1] <= 667 and (not pictures or result["pictures"] >= 100)
    assert "rejected is wrong" in result["keep"] and "rejected could be true" in result["drop"]
    assert result["status"].endswith(": rejected is wrong.")


@needs_chromium
def test_a_picture_enlarges_on_a_click(thousand):
    page, _ = thousand
    result = in_browser(page, """
      const small = page.querySelector('#pictures button'); const before = small.getBoundingClientRect().width; small.click();
      await wait(50); const large = el('large').open, width = el('large-picture').getBoundingClientRect().width, same = el('large-picture').src === small.firstChild.src;
      key('k'); const counts = text('headline'); el('large-picture').click();
      return { before, large, width, same, counts, closed: !el('large').open };
    """)  # fmt: skip
    assert result["large"] and result["closed"] and result["same"] and result["width"] > 2 * result["before"] > 0
    assert result["counts"].startswith("0 kept")


@needs_chromium
def test_a_browser_opens_the_file_itself_without_a_complaint(ten, tmp_path):
    ran = chromium(tmp_path / "profile", ten, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1366,860")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert Image.open(tmp_path / "shot.png").size == (1366, 860)
