"""What must follow an edit in the words beside it: a and an, and the number of a noun and its verb."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vapr.data.pair import Edit
from vapr.editing.rules.nouns import english, singular

NOT_PLAIN = "one and several need other forms of words that are not plain to see"


class CannotEdit(ValueError):
    """An operation that does not fit its answer; the message is the reason, for the ledger and the next prompt."""


def agree(answer: str, edit: Edit, narrow: Edit | None, others: Sequence[Edit]) -> Edit:
    """Return the edit with the articles, nouns and verbs beside it as they must be now; these join its span.

    Args:
        narrow: the edit without the words at its ends that stay the same; None if nothing changes.
        others: the other edits of the answer; what they change themselves is left to them.

    Raises:
        CannotEdit: if something would not agree, and what would is not plain to see.
    """
    numbered = _with_number(answer, edit, narrow, others)
    if numbered is edit and narrow and (problem := _disagreement(answer, narrow, others)):
        raise CannotEdit(problem)
    return _with_article(answer, numbered)


# Articles

WORD = re.compile(r"[\w'’-]+")
ARTICLE_BEFORE = re.compile(r"(?<![\w'’-])(an?)(\s+)$", re.IGNORECASE)
ARTICLE = re.compile(r"(?<![\w'’-])(an?)(\s+)([\w'’-]+)", re.IGNORECASE)
FOLLOWING = re.compile(r"\s*[\w'’-]*")
LONGEST_NUMBER = 36
"""Digits; inflect has no words for more."""


@functools.lru_cache(maxsize=20_000)
def article_of(word: str) -> str:
    """Return ``a`` or ``an``, by how the word sounds."""
    if digits := re.match(r"\d+", word):
        word = str(english().number_to_words(digits[0][:LONGEST_NUMBER]))
    return english().a(word).split()[0].lower()


def _with_article(answer: str, edit: Edit) -> Edit:
    """Return the edit with the articles right that stand in it, before it or at its end."""
    start, text, tail = edit.start, edit.to, FOLLOWING.match(answer, edit.end)[0]  # type: ignore[index]
    before = ARTICLE_BEFORE.search(answer[:start])
    old, new = WORD.match(answer, start), WORD.match(text + tail)
    # An article that was already wrong (or a letter "a") is the author's.
    if before and old and new and article_of(old[0]) == before[1].lower() != article_of(new[0]):
        start, text = before.start(), before[0] + text
    # "Square A is" has a letter, no article.
    written = {match[0] for match in ARTICLE.finditer(answer[edit.start : edit.end + len(tail)])}
    fixed = ARTICLE.sub(
        lambda m: m[0] if m[0] in written else in_the_case_of(m[1], article_of(m[3])) + m[2] + m[3], text + tail
    )
    return Edit(start, edit.end, fixed[: len(fixed) - len(tail)])


def in_the_case_of(old: str, new: str) -> str:
    """Return ``new`` written as ``old`` is: Red -> Blue, RED -> BLUE, red -> blue."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


# Numbers

FIGURES = re.compile(r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?")


@functools.cache
def _number_words() -> dict[str, int]:
    spelled = {str(english().number_to_words(str(value))): value for value in range(101)}
    return spelled | {"a hundred": 100, "a dozen": 12, "no": 0, "none": 0, "single": 1}


@functools.lru_cache(maxsize=20_000)
def number(text: str) -> float | None:
    """Return what a number word or a figure says; None for anything else."""
    plain = text.strip().lower().rstrip(".")
    if FIGURES.fullmatch(plain):
        return float(plain.replace(",", ""))
    return _number_words().get(plain)


VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "isn't": "aren't", "wasn't": "weren't"}
SINGULARS = {plural: verb for verb, plural in VERBS.items()}
THERE = re.compile(r"(?<!\w)there(?:\s+(?:only|also))?\s+(is|are|was|were)(?:\s+(?:only|just|also|exactly))?\s+$", re.I)
NOUN_AFTER = re.compile(r"(\s+)([^\W\d_]+(?:-[^\W\d_]+)*)")
VERB_AFTER = re.compile(r"(\s+)(is|are|was|were|has|have|does|do)(?!\w)", re.IGNORECASE)
SUBJECT_BEFORE = re.compile(r"(?:^|[.!?;:,\n]\W*)(?:(?:the|this|that|these|those|his|her|its|their|my)\s+)?$", re.I)
SENTENCE_END = re.compile(r"[.!?;\n]|$")
NOT_COUNTED = frozenset((
    "of", "is", "are", "was", "were", "in", "on", "at", "and", "or", "to", "with", "by", "for", "from", "a", "an",
    "the",
))  # fmt: skip
PRONOUNS = frozenset(("that", "who", "which", "he", "she", "it", "they", "his", "her", "its", "their", "him", "them"))
QUANTITIES = frozenset(("few", "dozen", "hundred", "thousand", "million", "couple", "pair", "lot", "many", "more"))
FOLLOWS_NOUN = frozenset((
    "in", "on", "at", "of", "with", "and", "or", "by", "near", "under", "over", "behind", "beside", "above",
    "below", "inside", "outside", "from", "to", "for", "visible", "shown", "here", "there", "sitting", "standing",
    "parked", "walking", "lying", "that", "who", "which", "playing", "riding", "holding", "wearing", "eating",
    "flying",
))  # fmt: skip


class Counted(NamedTuple):
    """A number, or an article, with the noun that ends the same text, if one does."""

    value: float
    head: str  # everything before the noun
    noun: str

    @property
    def is_article(self) -> bool:
        return self.head.split()[0].lower() in ("a", "an")


def _counted(text: str) -> Counted | None:
    if (value := number(text)) is not None and text == text.strip():
        return Counted(value, text, "")
    head, space, noun = text.rpartition(" ")
    first, *inner = (head or noun).lower().split() or [""]
    value = 1 if first in ("a", "an") else number(first)
    if value is None or text != text.strip():
        return None
    if not head:
        return Counted(value, text, "")
    is_noun = all(part.isalpha() for part in noun.split("-")) and all(map(WORD.fullmatch, inner))
    if not is_noun or not (NOT_COUNTED | QUANTITIES).isdisjoint([*inner, noun.lower()]):
        return None
    return Counted(value, head + space, noun)


def _with_number(answer: str, edit: Edit, narrow: Edit | None, others: Sequence[Edit]) -> Edit:
    """Return the edit of a number, with its noun and verb in the right number where that changes.

    Raises:
        CannotEdit: if it changes and the noun is not plain to see.
    """
    # Of "1.5" the trimmed edit may hold half.
    if narrow and (re.search(r"\w[.,:-]$", answer[: narrow.start]) or re.match(r"[.,:-]\w", answer[narrow.end :])):
        narrow = None
    for span in (edit, narrow):
        old, new = (_counted(answer[span.start : span.end]), _counted(span.to)) if span else (None, None)
        # "a dog" -> "no dog" stays as it is
        if span and old and new and (max(old.value, new.value) > 1 or not (old.is_article or new.is_article)):
            with_noun = _with_noun(answer, span, old, new)
            turns = (old.value == 1) != (new.value == 1)
            return _with_verb(answer, with_noun, new.value != 1, others) if turns else with_noun
    return edit


def _with_noun(answer: str, span: Edit, old: Counted, new: Counted) -> Edit:
    plural, turns = new.value != 1, (old.value == 1) != (new.value == 1)
    if old.noun or new.noun:
        # "one big" -> "two small" ends before the noun.
        if singular(old.noun) != singular(new.noun) and not _phrase_ends(answer, span.end):
            if turns:
                raise CannotEdit(NOT_PLAIN)
            return span
        if not new.noun:
            return span
        one = singular(new.noun)
        given = english().plural_noun(new.noun) if plural and one == new.noun.lower() else new.noun
        given = in_the_case_of(new.noun, one) if not plural and one != new.noun.lower() else given
        return Edit(span.start, span.end, new.head + given)
    if not turns or not re.match(r"\s+\w", answer[span.end :]):
        return span
    counted = NOUN_AFTER.match(answer, span.end)
    if counted is None or counted[2].lower() in NOT_COUNTED or not _phrase_ends(answer, counted.end()):
        raise CannotEdit(NOT_PLAIN)
    noun, one = counted[2], singular(counted[2])
    if plural:
        noun = noun if one != noun.lower() else english().plural_noun(noun)
    elif one == noun.lower() and english().plural_noun(noun) != noun:
        raise CannotEdit(f"'{noun}' has no singular that is plain to see")
    else:
        noun = in_the_case_of(noun, one)
    return Edit(span.start, counted.end(), span.to + counted[1] + noun)


def _with_verb(answer: str, span: Edit, plural: bool, others: Sequence[Edit]) -> Edit:
    """Return the span of a noun whose number has turned with the verb after it, or "there is" before it."""
    start, end, to = span.start, span.end, span.to
    forms = VERBS if plural else SINGULARS
    if re.match(r"\s+\w", answer[end:]):
        verb = VERB_AFTER.match(answer, end)
        at = verb.end() if verb else end
        rest = answer[at : SENTENCE_END.search(answer, at).start()]  # type: ignore[union-attr]
        # "One dog in the yard is licking its paw": more words agree with the noun than those beside it.
        agreeing = PRONOUNS | VERBS.keys() | SINGULARS.keys()
        unclear = not agreeing.isdisjoint(WORD.findall(rest.lower()))
        unclear = unclear or bool(rest.strip() and not verb and re.search(r"(?:^|[.!?;:,\n])\W*$", answer[:start]))
        if unclear and not _touches(others, end, len(answer)):
            raise CannotEdit(NOT_PLAIN)
        if verb and not _touches(others, end, verb.end()):
            to, end = to + verb[1] + in_the_case_of(verb[2], forms.get(verb[2].lower(), verb[2])), verb.end()
    there = THERE.search(answer[:start])
    if there and not _touches(others, there.start(1), start):
        to = in_the_case_of(there[1], forms.get(there[1].lower(), there[1])) + answer[there.end(1) : start] + to
        start = there.start(1)
    return Edit(start, end, to)


def _touches(others: Sequence[Edit], start: int, end: int) -> bool:
    """Return whether the model itself edits something there."""
    return any(other.start < end and start < other.end for other in others)


def _phrase_ends(answer: str, at: int) -> bool:
    """Return whether the word before is the last of its phrase, a noun, and not an adjective before one."""
    rest = WORD.match(answer[at:].lstrip(" "))
    return rest is None or rest[0].lower() in FOLLOWS_NOUN | VERBS.keys() | SINGULARS.keys()


# Nouns

ADJECTIVE = r"(?:(?:big|large|small|little|old|young|new|red|blue|green|yellow|black|white|brown|grey|gray)\s+)?"
DETERMINER_BEFORE = re.compile(rf"(?<![\w'’-])([\w-]+)\s+{ADJECTIVE}$")
ONE = frozenset(("a", "an", "one", "this", "each", "every", "another"))
SEVERAL = frozenset(("these", "those", "several", "many", "few", "both"))


def _disagreement(answer: str, edit: Edit, others: Sequence[Edit]) -> str | None:
    """Return why the noun that the edit puts in does not fit the words beside it."""
    old_phrase, phrase = _noun_phrase(answer[edit.start : edit.end]), _noun_phrase(edit.to)
    if not old_phrase or not phrase or not _phrase_ends(answer, edit.end):
        return None
    old, new = old_phrase[-1], phrase[-1]
    if number(new) is not None or new[0].isupper():  # "Platform 9 Tours": a name
        return None
    before = answer[: edit.start]
    determiner = DETERMINER_BEFORE.search(before)
    given = _wants(phrase[0])
    word = phrase[0] if given else determiner[1] if determiner else ""
    # What did not agree before is the author's.
    for wanted, fits, misfits, name in (("one", _is_singular, _is_plural, "plural"),
                                        ("several", _is_plural, _is_singular, "singular")):  # fmt: skip
        if _wants(word) == wanted and (given or fits(old)) and misfits(new):
            return f"'{new}' is {name} after '{word}'"
    verb = THERE.search(before) or (SUBJECT_BEFORE.search(before) and VERB_AFTER.match(answer, edit.end))
    if verb:
        said = verb[verb.lastindex or 0]
        one, several = (old, new) if said.lower() in VERBS else (new, old)
        if _is_singular(one) and _is_plural(several) and not _touches(others, *verb.span(verb.lastindex or 0)):
            return f"the verb '{said}' no longer agrees with '{new}'"
    return None


def _noun_phrase(text: str) -> list[str]:
    """Return the words up to its noun, an article or a number included; none where that is not plain to see."""
    words = WORD.findall(text)
    if re.search(r"[^\w\s'’-]|\band\b", text) or not QUANTITIES.isdisjoint(words[1:]):
        return []
    ends = NOT_COUNTED - {"a", "an", "the"} | FOLLOWS_NOUN
    return list(itertools.takewhile(lambda word: word.lower() not in ends, words))


def _wants(determiner: str) -> str | None:
    """Return whether ``one`` or ``several`` follow a word; None if both may."""
    if determiner.lower() in ONE:
        return "one"
    return "several" if determiner.lower() in SEVERAL or (number(determiner) or 0) > 1 else None


def _is_plural(noun: str) -> bool:
    one = singular(noun)
    return one != noun.lower() and str(english().plural_noun(one)).lower() == noun.lower()


def _is_singular(noun: str) -> bool:
    """Return whether a noun is one, and its plural is another word: not "sheep"."""
    if noun.lower() in ("police", "cattle") or not noun.isalpha():
        return False
    return singular(noun) == noun.lower() != str(english().plural_noun(noun)).lower()
