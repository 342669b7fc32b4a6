"""What the pages share: style, frame, pictures as text, marked differences, writing whole or not at all."""

import base64
import difflib
import hashlib
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vapr.cache import written_whole
from vapr.data.images import as_rgb

CSS = """
:root { color-scheme:light dark; --ink:#1b2430; --soft:#5b6777; --line:#dde3ea; --card:#fff; --page:#f4f6f9;
  --before:#9aa7b8; --after:#1f6feb; --held-out:#8a3ffc; --chosen:#1f6feb; --rejected:#c2570c; --good:#1a7f4b;
  --bad:#b3261e; --code:#eaeef3; --chosen-mark:#cfe2ff; --rejected-mark:#ffdcc2;
  --font:system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
@media screen and (prefers-color-scheme: dark) { :root { --ink:#e4e9f0; --soft:#9eabba; --line:#2f3947; --card:#182029;
  --page:#0f151c; --before:#7d8b9d; --after:#5b9dff; --held-out:#c39bff; --chosen:#5b9dff; --rejected:#f0883e;
  --good:#4cc38a; --bad:#ff8a80; --code:#26303c; --chosen-mark:#1d447c; --rejected-mark:#6b3410; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 var(--font); -webkit-text-size-adjust:100%; }
main { max-width:1120px; margin:0 auto; padding:28px 18px 60px; }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 6px; overflow-wrap:anywhere; }
h2 { font-size:1.15rem; margin:34px 0 10px; }
p { margin:6px 0 12px; max-width:75ch; overflow-wrap:anywhere; }
.soft { color:var(--soft); font-size:.92rem; overflow-wrap:anywhere; }
.cards { display:grid; gap:14px; grid-template-columns:repeat(auto-fit, minmax(240px, 1fr)); }
.card, .box, .item { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px;
  min-width:0; }
.cards.narrow { grid-template-columns:repeat(auto-fill, minmax(300px, 1fr)); }
.big { font-size:1.75rem; font-weight:650; white-space:nowrap; }
.big i { font-style:normal; color:var(--soft); font-weight:400; }
svg { display:block; width:100%; height:auto; }
svg text { font:12px var(--font); fill:var(--ink); }
svg .rule { stroke:var(--line); } svg .zero { stroke:var(--soft); }
svg .step { fill:none; stroke:var(--colour); stroke-width:1; opacity:.38; }
svg .mean { fill:none; stroke:var(--colour); stroke-width:2; stroke-linejoin:round; }
svg .dot { fill:var(--colour); } svg .mark { fill:var(--colour); stroke:var(--card); }
.rejected .mean { stroke-dasharray:6 3; }
.rejected .mark { fill:var(--card); stroke:var(--colour); stroke-width:2; }
.before { --colour:var(--before); } .after { --colour:var(--after); } .held-out { --colour:var(--held-out); }
.chosen { --colour:var(--chosen); } .rejected { --colour:var(--rejected); }
.bars { max-width:720px; }
.curves { display:grid; gap:14px; grid-template-columns:repeat(auto-fill, minmax(min(310px, 100%), 1fr)); }
.curves.two { grid-template-columns:repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
.curves .box { padding:14px 14px 12px; }
.curves svg { max-width:480px; }
.curves p { margin:8px 0 0; font-size:.86rem; line-height:1.4; color:var(--soft); }
.legend { margin:0 0 8px; font-size:.9rem; }
.curves .legend { margin:0 0 6px; color:var(--ink); }
.legend span { margin-right:14px; white-space:nowrap; }
svg.swatch { display:inline-block; width:26px; height:10px; margin-right:5px; }
svg .axis { text-anchor:middle; fill:var(--soft); }
.grid { display:grid; gap:12px; grid-template-columns:repeat(auto-fill, minmax(280px, 1fr)); }
.item { display:flex; gap:12px; padding:12px; font-size:.9rem; line-height:1.4; }
.item img { width:96px; height:96px; border-radius:6px; flex:none; }
.q { font-weight:600; margin:2px 0 8px; overflow-wrap:anywhere; white-space:pre-line; }
.right { color:var(--good); } .wrong { color:var(--bad); }
.pair { display:flex; gap:18px; margin-bottom:14px; }
.pair .pictures { flex:0 0 220px; display:flex; flex-wrap:wrap; gap:8px; align-content:flex-start; }
.pair img { max-width:100%; height:auto; border-radius:6px; display:block; }
.pair img:not(:only-child) { max-width:106px; }
.pair .said { flex:1; min-width:0; }
.pair .answers { display:grid; gap:12px; grid-template-columns:repeat(auto-fit, minmax(min(260px, 100%), 1fr)); }
.pair .answer { border-left:4px solid var(--colour); padding:2px 0 2px 12px; max-height:22rem; overflow:auto;
  overflow-wrap:anywhere; white-space:pre-wrap; font-size:.95rem; }
.pair .answer .soft { white-space:normal; }
mark { color:inherit; border-radius:3px; padding:0 1px; font-weight:600; }
.chosen mark { background:var(--chosen-mark); } .rejected mark { background:var(--rejected-mark); }
table { border-collapse:collapse; width:100%; font-size:.92rem; }
td, th { text-align:left; padding:6px 10px 6px 0; border-bottom:1px solid var(--line); vertical-align:top; }
tr:last-child > * { border-bottom:0; }
th, td { overflow-wrap:anywhere; } th { width:18%; min-width:8.5em; }
code, pre { background:var(--code); border-radius:4px; font-size:.88em; }
code { padding:1px 5px; overflow-wrap:anywhere; }
pre { margin:0; padding:14px 16px; border-radius:8px; overflow-x:auto; line-height:1.45; }
.tall { margin:0 0 14px; }
.tall h3, .curves h3 { font-size:.95rem; margin:0 0 4px; font-weight:600; overflow-wrap:anywhere; }
.gates td:first-child { width:9.4em; } .gates .soft { font-size:.86rem; }
.pill { display:inline-block; border-radius:9px; padding:0 9px; font-size:.82rem; font-weight:600; white-space:nowrap;
  color:var(--card); background:var(--soft); }
.pill.pass { background:var(--good); } .pill.warn { background:var(--rejected); } .pill.fail { background:var(--bad); }
svg .whisker { fill:none; stroke:var(--ink); stroke-width:1.6; }
.figures th { width:auto; min-width:0; font-weight:600; color:var(--soft); }
.answer .figures th, .short th { overflow-wrap:normal; }
.figures { font-size:.88rem; }
.answers { display:grid; gap:12px; grid-template-columns:repeat(auto-fit, minmax(min(280px, 100%), 1fr));
  margin:0 0 10px; }
.tall .answer { border-left:4px solid var(--colour); padding:2px 0 2px 12px; overflow-wrap:anywhere;
  white-space:pre-line; font-size:.92rem; margin:0 0 8px; min-width:0; }
.plain { margin:0; padding:0; list-style:none; overflow-wrap:anywhere; }
@media screen and (max-width:760px) { .folds tr:first-child { display:none; } .folds tr, .folds td { display:block; }
  .folds tr { border-bottom:1px solid var(--line); padding:6px 0; } .folds td { border:0; padding:1px 0; }
  .folds td:first-child { font-weight:600; } .folds td:not(:first-child)::before { content:attr(data-of) ": ";
  color:var(--soft); } }
details { margin:8px 0 0; font-size:.9rem; }
summary { cursor:pointer; overflow-wrap:anywhere; }
details ul { margin:8px 0 0; padding-left:20px; overflow-wrap:anywhere; }
@media print { .pill { border:1px solid; background:none !important; color:var(--ink); }
  mark { text-decoration:underline; } .box, .card, .pair, .curves > *, tr { break-inside:avoid; }
  main { max-width:none; } body { background:none; } h2, h3 { break-after:avoid; } }
@media (max-width:640px) { main { padding:20px 14px 44px; } .box, .card { padding:14px; }
  .pair { flex-direction:column; gap:10px; } .pair .pictures { flex:none; } .pair img:only-child { max-height:260px; }
  .cards.narrow { grid-template-columns:repeat(2, minmax(0, 1fr)); gap:10px; }
  .narrow .big { white-space:normal; font-size:1.4rem; } }
"""

MAX_THUMBNAIL_SIDE = 360
MAX_COMPARED = 1_000_000
"""Product of the word counts up to which a difference is searched word by word (time grows with it)."""


def page(title: str, body: str, *, css: str = "", script: str = "") -> str:
    """A whole HTML document; ``title`` is text, ``body`` is HTML.

    Where there is a ``script``, the page's own policy lets nothing else run and nothing be fetched.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + (f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if script else "")
        + f"<title>{html.escape(title)}</title><style>{CSS}{css}</style></head><body><main>{body}</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def folding_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows turn into blocks where the screen is narrow; every cell then names its column."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-of="{html.escape(of)}">{html.escape(text)}</td>'
            for of, text in zip(heads, row, strict=True)
            if text or not of
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="figures folds"><tr>{head}</tr>{body}</table>'


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode(errors="replace"))  # a lone surrogate becomes "?"


def thumbnail(image: Image.Image, max_side: int = MAX_THUMBNAIL_SIDE) -> str:
    """A picture as a ``data:`` URI: JPEG in the colours that a model is shown, longest side at most ``max_side``."""
    small = as_rgb(image)
    small.thumbnail((max_side, max_side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


Marked = list[tuple[str, bool]]
"""A text in pieces: what it says, and whether the other text lacks it."""


def word_diff(chosen: str, rejected: str) -> tuple[str, str]:
    """Both completions as escaped HTML, the words of each that the other lacks inside ``<mark>``."""
    left, right = (
        "".join(f"<mark>{html.escape(text)}</mark>" if marked else html.escape(text) for text, marked in side)
        for side in marked_words(chosen, rejected)
    )
    return left, right


def marked_words(chosen: str, rejected: str) -> tuple[Marked, Marked]:
    """Both completions in pieces, the words of each that the other lacks marked."""
    words = _words(chosen), _words(rejected)
    bare = [[word.rstrip() for word in side] for side in words]
    if len(bare[0]) * len(bare[1]) <= MAX_COMPARED:
        # From 200 words on, frequent ones alone make no match: else it would take half a minute over a text that loops.
        codes = difflib.SequenceMatcher(None, bare[0], bare[1]).get_opcodes()
    else:
        codes = [("replace", 0, len(bare[0]), 0, len(bare[1]))]
    shown: tuple[Marked, Marked] = ([], [])
    for kind, *bounds in codes:
        for side in (0, 1):
            text = "".join(words[side][bounds[2 * side] : bounds[2 * side + 1]])
            core = text.rstrip()
            if kind != "equal" and core:
                shown[side].extend([(core, True), (text[len(core) :], False)])
            else:
                shown[side].append((text, False))
    return shown


def _words(text: str) -> list[str]:
    """Words and runs of punctuation, each with the space after it; Chinese and Japanese by the character."""
    return re.findall(r"\s+|(?:[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]+)\s*", text)
