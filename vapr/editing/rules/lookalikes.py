"""Texts that look the same, and characters that nobody sees or expects."""

import re
import unicodedata

_TWINS = str.maketrans(
    "асеорхуіѕјһԁԛԝӏ" + "вкмнт" + "οαινκρυτ" + "ıɑɡ",
    "aceopxyisjhdqwl" + "bkmht" + "oaivkpyt" + "iag",
)
"""Letters of other alphabets, in lower case, and the Latin ones they or their capitals look like."""

_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0]")
_ACCENTED = re.compile("([a-z])[\u0300-\u036f]+")
_ALPHABETS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE", "COPTIC")


def plain(text: str) -> str:
    """The words alone: equal where only case, accents, punctuation, or how letters are coded, differ."""
    if text.isascii() and text.isprintable():
        return " ".join(re.findall(r"\w+", text.lower()))
    text = "".join(
        c for c in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(c)[0] != "C" or c.isspace()
    )
    text = _UNSEEN.sub("", _ACCENTED.sub(r"\1", text)).translate(_TWINS)
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def unexpected(chosen: str, rejected: str) -> str | None:
    """Name what rejected holds that no reader of chosen expects there; None if nothing."""
    known = set(chosen)
    for character in rejected:
        if character in known or character == " ":
            continue
        if unicodedata.category(character)[0] in "CZ":
            return f"U+{ord(character):04X} does not belong into the answer"
        if character in "()[]{}<>|→":  # a model that shows what it did
            return f"'{character}' does not belong into the answer"
    known_alphabets = _alphabets(chosen)
    for word in re.findall(r"\w+", rejected):
        mixed = _alphabets(word)
        if len(mixed) > 1 and not mixed <= known_alphabets:
            return f"'{word}' mixes {' and '.join(name.capitalize() for name in sorted(mixed, reverse=True))} letters"
    return None


def _alphabets(text: str) -> set[str]:
    if text.isascii():
        return {"LATIN"} if any(c.isalpha() for c in text) else set()
    names = (unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha())
    return {name for name in names if name in _ALPHABETS}
