"""Checks of answers about text that is read from the picture. Each returns why an edit is bad, or None."""

import re
from collections.abc import Sequence

from vapr.data.pair import Edit
from vapr.editing.rules.categories import Category
from vapr.editing.rules.nouns import Nouns

DIGITS_LIKE_LETTERS = str.maketrans("015", "ois")


def other_text(old: str, new: str, before: str, category: Category, nouns: Nouns) -> str | None:
    """Return what is wrong with ``new`` in the place of a text in the picture, ``old``; None: nothing."""
    one, other = (re.sub(r"[\W_]", "", text).casefold() for text in (old, new))
    if one == other or (one.isalpha() and one == other.translate(DIGITS_LIKE_LETTERS)):
        return f"'{new}' reads the same as '{old}'"
    if re.search(r"\d", old) and not re.search(r"\d", new):
        return "a number, price or time must become another one, in figures"
    capitals = re.search(r"[A-Z]{2}", old) and old.isupper()
    return f"'{old}' is in capitals, and '{new}' is not" if capitals and not new.isupper() else None


QUOTATION = re.compile(r"""(?<!\w)"[^"\n]+"|“[^”\n]+”|«[^»\n]+»|‘[^\n]+?’(?!\w)|(?<![\w'])'[^\n]+?'(?!\w)""")


READ = re.compile(
    r"\b(?:say|says|said|read|reads|spells?|spelled|written|writing|printed|words?|texts?|letters?|lettering|numbers?"
    r"|numerals?|brands?|logos?|names?|named|called|titles?|slogans?|messages?|dates?|years?|times?|prices?|signs?"
    r"|labels?|labell?ed|plates?|companies|company|airlines?|stores?|shops?|authors?)\b",
    re.IGNORECASE,
)
HOW_TO_ANSWER = re.compile(r"\banswer\b[^.?!\n]*\bwords?\b", re.IGNORECASE)  # "using a single word or phrase"


def nothing_read(question: str, chosen: str, edits: Sequence[Edit]) -> str | None:
    """Small models call any answer one about text; green boots made brown are none."""
    changed = (chosen[edit.start : edit.end] for edit in edits)
    if (
        READ.search(f"{HOW_TO_ANSWER.sub('', question)}\n{chosen}")
        or QUOTATION.search(chosen)
        or any(re.search(r"[A-Z\d]", t) for t in changed)
    ):
        return None
    return "no text that is read from the picture was changed"


def outside_quotation(chosen: str, edits: Sequence[Edit]) -> str | None:
    """Return what is wrong with edits of an answer that quotes a text in the picture; None: nothing."""
    quoted = [match.span() for match in QUOTATION.finditer(chosen)]
    for edit in edits:
        figure = re.search(r"\d", chosen[edit.start : edit.end])  # a price, a time: read, too, and seldom quoted
        if quoted and not figure and not any(a < edit.start and edit.end < b for a, b in quoted):
            return "the text in quotation marks must change, and nothing outside of them"
    return None
