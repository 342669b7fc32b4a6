"""Measures how a text is written, whatever it says: words, sentences, style, distance, and whether it says yes or no.

Shared by the audit and the editor's checks. Word lists are English; other languages are counted, not understood.
"""

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Vowel signs and accents, which \w leaves out, and the joiners between them.
_MARKS = "\u200c\u200d" + "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
_LETTER = rf"(?:[^\W_{CJK}][{_MARKS}]*)"
_WORD = re.compile(rf"[{CJK}]|\d+(?:[.,]\d+)+(?!\w)|{_LETTER}+(?:['’-]{_LETTER}+)*|[^\w\s]|_")

_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[」』”）]*")
_BEFORE_NAME = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "mt", "rev", "gen", "sen", "capt", "lt", "sgt", "vs", "e.g", "i.e", "cf",
    "fig", "approx", "eg", "ie", "ca",
})  # fmt: skip
_INSIDE_OR_LAST = frozenset({
    "etc", "a.m", "p.m", "inc", "ltd", "co", "corp", "jr", "sr", "u.s", "u.k", "al", "no",
})  # fmt: skip

_HEDGES = frozenset({
    "might", "may", "maybe", "perhaps", "possibly", "probably", "presumably", "potentially", "likely", "unlikely",
    "seem", "seems", "seemed", "seemingly", "appear", "appears", "appeared", "apparently", "suggest", "suggests",
    "suggesting", "suggested", "could", "somewhat", "approximately", "roughly", "arguably", "supposedly",
})  # fmt: skip
_FIRST_PERSON = frozenset({
    "i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves", "i'm", "i've", "i'll", "i'd",
    "we're", "we've", "we'll",
})  # fmt: skip
_CONTRACTION = re.compile(
    r"\b\w+(?:n['’]t|['’](?:re|ve|ll|d|m))\b|\b(?:it|that|there|here|he|she|what|who|where|let)['’]s\b", re.IGNORECASE
)
_LIST_LINE = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_MARKDOWN = re.compile(r"\*\*|__|`+|^\s{0,3}#{1,6}\s|^\s*>\s|^\s*\|", re.MULTILINE)
_CLOSING = "\"'”’»)]}*_`~ \t\r\n"

STYLE_KEYS = (
    "sentences", "words", "commas", "other_punctuation", "ends_full_stop", "ends_question_mark",
    "ends_exclamation_mark", "ends_other_mark", "starts_upper", "upper_words", "numbers", "list_lines",
    "markdown_marks", "hedges", "first_person", "contractions", "line_breaks", "mean_word_length",
    "words_per_sentence", "type_token_ratio",
)  # fmt: skip
"""Names of the features of :func:`style_vector`, in its order."""

_YES = re.compile(r"(?:yes|yeah|yep|yup)\b(?!-\w)", re.IGNORECASE)
_NO = re.compile(
    r"(?:nope|nah)\b|no(?=\s*(?:$|[,;:!?*_`\]}»\"'”’()…，、；：！？。—–\n]|-\s|\.(?!\s*\d))"
    r"|\s+(?:there|it|they|he|she|i|we|you|this|that|these|those|the|not|because|but|a|an)\b)",
    re.IGNORECASE,
)
_OPENING = re.compile(r"(?:answer\s*:)?[\s\"'“‘(*_`#>-]*", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Split a text into words and single punctuation marks.

    A word is letters and digits, with apostrophes and hyphens inside it (``it's``, ``well-lit``); a number keeps its
    inner points and commas (``3.5``). Chinese and Japanese are taken by the character.
    """
    return _WORD.findall(text)


def num_words(text: str) -> int:
    """Count the words of a text, without the punctuation marks."""
    return sum(word[0].isalnum() for word in words(text))


def sentences(text: str) -> list[str]:
    """Split a text into sentences, without the space around them. A line break ends one, too.

    Abbreviations (``e.g.``, ``Mr.``, ``J. Smith``) and decimals (``3.5``) end none; ``etc.``, ``p.m.`` and the like
    only before a capital letter or at the end; dots (``...``) not before a small letter; ``No.`` not before a number.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for mark in _END.finditer(line):
            if _ends_sentence(line, start, mark):
                found.append(line[start : mark.end()].strip())
                start = mark.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if any(character.isalnum() for character in sentence)]


def _ends_sentence(line: str, start: int, mark: re.Match[str]) -> bool:
    after = line[mark.end() : mark.end() + 3].lstrip()
    if not after or mark[0][0] not in ".…":
        return True
    if mark[0].startswith(("..", "…")):
        return not after[0].islower()
    before = line[start : mark.start()]
    word = (before.split() or [""])[-1].lstrip("(\"'“‘[").lower()
    if not mark[0].startswith(".") or len(mark[0]) > 1:
        return True
    if word in _BEFORE_NAME or (len(word) == 1 and word.isalpha() and before[-1].isupper() and word != "i"):
        return False
    if word.isdigit() and before.strip() == word:  # "1. A dog": the number of a list
        return False
    if word == "no":
        return not after[0].isdigit()
    return word not in _INSIDE_OR_LAST or after[0].isupper()


def style_vector(text: str) -> dict[str, float]:
    """Measure how a text is written; the features are named by :data:`STYLE_KEYS`.

    Counts, except: ``ends_...`` and ``starts_upper`` are 0 or 1 (no ``ends_...`` at all: the last character is no mark;
    closing quotes and brackets are looked through), ``mean_word_length`` is in characters, ``words_per_sentence`` is a
    mean, and ``type_token_ratio`` is distinct words (in lower case) by words. An empty text is all zeros.
    ``upper_words`` are words of two or more letters, all capital; ``numbers`` are words that hold a digit.
    """
    tokens = _WORD.findall(text)
    plain = [token for token in tokens if token[0].isalnum()]
    lower = [word.lower().replace("’", "'") for word in plain]
    count = len(plain)
    num_sentences = len(sentences(text))
    commas = tokens.count(",") + tokens.count("，") + tokens.count("、")
    bare = text.rstrip(_CLOSING)
    last = bare[-1:]
    marked = bool(last) and not last.isalnum()
    stop, question, exclamation = last in ".。" and marked, last in "?？" and marked, last in "!！" and marked
    first = next((character for character in text if character.isalnum()), "")
    return {
        "sentences": float(num_sentences),
        "words": float(count),
        "commas": float(commas),
        "other_punctuation": float(len(tokens) - count - commas),
        "ends_full_stop": float(stop),
        "ends_question_mark": float(question),
        "ends_exclamation_mark": float(exclamation),
        "ends_other_mark": float(marked and not (stop or question or exclamation)),
        "starts_upper": float(first.isupper()),
        "upper_words": float(sum(len(word) > 1 and word.isupper() for word in plain)),
        "numbers": float(sum(not word.isalpha() and any(map(str.isdigit, word)) for word in plain)),
        "list_lines": float(len(_LIST_LINE.findall(text))),
        "markdown_marks": float(len(_MARKDOWN.findall(text))),
        "hedges": float(sum(word in _HEDGES for word in lower) - plain.count("May")),
        "first_person": float(sum(word in _FIRST_PERSON for word in lower)),
        "contractions": float(len(_CONTRACTION.findall(text)) if "'" in text or "’" in text else 0),
        "line_breaks": float(text.count("\n")),
        "mean_word_length": sum(map(len, plain)) / count if count else 0.0,
        "words_per_sentence": count / max(num_sentences, 1),
        "type_token_ratio": len(set(lower)) / count if count else 0.0,
    }


def edit_distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Return the Levenshtein distance of two lists of words, divided by the longer length: 0 if equal, 1 at most."""
    return float(Levenshtein.normalized_distance(a, b))


def polarity(text: str) -> str | None:
    """Return ``"yes"`` or ``"no"`` if the text begins by saying so, else None.

    Quotes and markdown before it are looked through. Yeah, yep and yup are yes; nope and nah are no. "No" counts before
    a mark, the end, or a word it cannot belong to (``No there is none``), so ``No one is there``, ``No dogs are
    visible`` and ``No. 5`` are None: they deny something, but do not answer in one word.
    """
    start = _OPENING.match(text).end()  # type: ignore[union-attr]
    if _YES.match(text, start):
        return "yes"
    return "no" if _NO.match(text, start) else None
