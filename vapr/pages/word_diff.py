"""Marks the words that one of two completions has and the other lacks."""

import difflib
import re

from markupsafe import Markup, escape

MAX_COMPARED = 1_000_000
"""Product of the word counts up to which a difference is searched word by word (time grows with it)."""

Pieces = list[tuple[str, bool]]
"""A text in pieces: the characters of each, and whether they are marked because the other text lacks them."""


def word_diff(chosen: str, rejected: str) -> tuple[Markup, Markup]:
    """Return both completions as escaped HTML, the words of each that the other lacks inside ``<mark>``."""
    left, right = (
        Markup("").join(Markup("<mark>{}</mark>").format(text) if marked else escape(text) for text, marked in pieces)
        for pieces in marked_words(chosen, rejected)
    )
    return left, right


def marked_words(chosen: str, rejected: str) -> tuple[Pieces, Pieces]:
    """Return both completions in pieces, the words of each that the other lacks marked."""
    sides = _words(chosen), _words(rejected)
    bare = [[word.rstrip() for word in words] for words in sides]
    if len(bare[0]) * len(bare[1]) <= MAX_COMPARED:
        # From 200 words on, frequent ones alone make no match: else it would take half a minute over a text that loops.
        codes = difflib.SequenceMatcher(None, bare[0], bare[1]).get_opcodes()
    else:
        codes = [("replace", 0, len(bare[0]), 0, len(bare[1]))]
    pieces: tuple[Pieces, Pieces] = ([], [])
    for kind, *bounds in codes:
        for side in (0, 1):
            text = "".join(sides[side][bounds[2 * side] : bounds[2 * side + 1]])
            core = text.rstrip()
            if kind != "equal" and core:
                pieces[side].extend([(core, True), (text[len(core) :], False)])
            else:
                pieces[side].append((text, False))
    return pieces


def _words(text: str) -> list[str]:
    """Split into words and runs of punctuation, each with the space after it; Chinese and Japanese by the character."""
    return re.findall(r"\s+|(?:[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]+)\s*", text)
