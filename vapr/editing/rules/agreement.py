"""What must follow an edit in the words beside it: a and an, and the number of a noun and its verb."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vapr.data.pair import Edit
from vapr.editing.rules.nouns import english, singular


class CannotEdit(ValueError):
    """An operation that does not fit its answer; the message is the reason, for the ledger and the next prompt."""


def agree(answer: str, edit: Edit, narrow: Edit | None, others: Sequence[Edit]) -> Edit:
    """The edit with the articles, nouns and verbs beside it as they must be now; these become part of its span.

    Args:
        narrow: the edit without the words at its ends that stay the same; None if nothing changes.
        others: the other edits of the answer; what they change themselves is left to them.

    Raises:
        CannotEdit: if something would not agree, and what would is not plain to see.
    """
    numbered = _number(answer, edit, narrow, others)
    if numbered is edit and narrow and (problem := _disagreement(answer, narrow, others)):
        raise CannotEdit(problem)
    return _article(answer, numbered)


# Articles

ARTICLE_BEFORE = re.compile(r"(?<![\w'’-])(an?)(\s+)$", re.IGNORECASE)
ARTICLE = re.compile(r"(?<![\w'’-])(an?)(\s+)([\w'’-]+)", re.IGNORECASE)
FIRST_WORD = re.compile(r"[\w'’-]+")


LONGEST_NUMBER = 36
"""Digits; inflect has no words for more."""


@functools.lru_cache(maxsize=20_000)
def article_of(word: str) -> str:
    """``a`` or ``an``, by how the word sounds."""
    if digits := re.match(r"\d+", word):
        word = str(english().number_to_words(digits[0][:LONGEST_NUMBER]))
    return english().a(word).split()[0].lower()


def _article(answer: str, edit: Edit) -> Edit:
    """The edit with the articles right that stand in it, before it or at its end."""
    start, to = edit.start, edit.to
    before = ARTICLE_BEFORE.search(answer[:start])
    after = answer[edit.end :]
    first = FIRST_WORD.match(to + after)
    if before and first:
        old = FIRST_WORD.match(answer[start:])
        # An article that was already wrong (or a letter "a") is the author's.
        if old and article_of(old[0]) == before[1].lower() != article_of(first[0]):
            start = before.start()
            to = in_the_case_of(before[1], article_of(first[0])) + before[2] + to
    following = FIRST_WORD.match(after.lstrip())
    pieces, at = [], 0
    for match in ARTICLE.finditer(to):
        pieces += [to[at : match.start()], in_the_case_of(match[1], article_of(match[3])), match[2], match[3]]
        at = match.end()
    to = "".join(pieces) + to[at:]
    last = re.search(r"(?<![\w'’-])(an?)$", to, re.IGNORECASE)
    if last and following and after[:1].isspace():
        to = to[: last.start()] + in_the_case_of(last[1], article_of(following[0]))
    return Edit(start, edit.end, to)


def in_the_case_of(old: str, new: str) -> str:
    """``new`` written as ``old`` is: Red -> Blue, RED -> BLUE, red -> blue."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


# Numbers

SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
TENS = dict(
    zip(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), range(20, 100, 10), strict=True)
)
NUMBER_WORDS = {word: value for value, word in enumerate(SMALL)} | TENS | {
    f"{ten}-{SMALL[unit]}": value + unit for ten, value in TENS.items() for unit in range(1, 10)
} | {"a hundred": 100, "one hundred": 100, "a dozen": 12, "no": 0, "none": 0, "single": 1}  # fmt: skip


@functools.lru_cache(maxsize=20_000)
def number(text: str) -> float | None:
    """What a number word or a figure says; None for anything else."""
    plain = text.strip().lower().rstrip(".")
    if plain in NUMBER_WORDS:
        return NUMBER_WORDS[plain]
    return float(plain.replace(",", "")) if re.fullmatch(r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?", plain) else None


VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "isn't": "aren't", "wasn't": "weren't"}
SINGULARS = {plural: verb for verb, plural in VERBS.items()}
THERE = re.compile(
    r"(?<!\w)(there(?:\s+(?:only|also))?\s+)(is|are|was|were)((?:\s+(?:only|just|also|exactly))?\s+)$", re.IGNORECASE
)
COUNTED = re.compile(r"(\s+)([^\W\d_]+(?:-[^\W\d_]+)*)")
VERB_AFTER = re.compile(r"(\s+)(is|are|was|were|has|have|does|do)(?!\w)", re.IGNORECASE)
NOT_COUNTED = frozenset((
    "of", "is", "are", "was", "were", "in", "on", "at", "and", "or", "to", "with", "by", "for", "from", "a", "an",
    "the",
))  # fmt: skip
AGREES = re.compile(
    r"\b(?:is|are|was|were|has|have|does|do|that|who|which|he|she|it|they|his|her|its|their|him|them)\b", re.IGNORECASE
)
SUBJECT = re.compile(r"(?:^|[.!?;:,\n])\W*$")


class Counted(NamedTuple):
    """A number, or an article, with the noun that follows it in the same text, if one does."""

    value: float
    head: str
    noun: str


COUNTED_NOUN = re.compile(r"(\S+)(\s+(?:[\w'’-]+\s+)*)([^\W\d_]+(?:-[^\W\d_]+)*)")
QUANTITIES = frozenset(("few", "dozen", "hundred", "thousand", "million", "couple", "pair", "lot", "many", "more"))


def _counted(text: str) -> Counted | None:
    if text != text.strip():
        return None
    if (value := number(text)) is not None:
        return Counted(value, text, "")
    if text.lower() in ("a", "an"):
        return Counted(1, text, "")
    match = COUNTED_NOUN.fullmatch(text)
    if match is None or not (NOT_COUNTED | QUANTITIES).isdisjoint(text.lower().split()[1:]):
        return None
    value = 1 if match[1].lower() in ("a", "an") else number(match[1])
    return None if value is None else Counted(value, match[1] + match[2], match[3])


def _number(answer: str, edit: Edit, narrow: Edit | None, others: Sequence[Edit]) -> Edit:
    """The edit of a number, with its noun and verb in the right number where that changes.

    Raises:
        CannotEdit: if it changes and the noun is not plain to see.
    """
    # Of "1.5" the trimmed edit may hold half.
    if narrow and (re.search(r"\w[.,:-]$", answer[: narrow.start]) or re.match(r"[.,:-]\w", answer[narrow.end :])):
        narrow = None
    for span in (edit, narrow):
        if span is None:
            continue
        old, new = _counted(answer[span.start : span.end]), _counted(span.to)
        # "a dog" -> "no dog" stays as it is
        articles = [one for one in (old, new) if one and one.head.split()[0].lower() in ("a", "an")]
        if old and new and (not articles or max(old.value, new.value) > 1):
            return _with_verb(answer, _with_noun(answer, span, old, new), old, new, others)
    return edit


def _with_noun(answer: str, span: Edit, old: Counted, new: Counted) -> Edit:
    plural, turns = new.value != 1, (old.value == 1) != (new.value == 1)
    counted = COUNTED.match(answer, span.end)
    if old.noun or new.noun:
        # "one big" -> "two small" ends before the noun.
        if singular(old.noun) != singular(new.noun) and not _phrase_ends(answer, span.end):
            if turns:
                raise CannotEdit("one and several need another form of a noun that is not plain to see")
            return span
        return Edit(span.start, span.end, new.head + (_noun_given(new.noun, plural) if new.noun else ""))
    if not turns or not re.match(r"\s+\w", answer[span.end :]):
        return span
    if counted is None or counted[2].lower() in NOT_COUNTED or not _phrase_ends(answer, counted.end(2)):
        raise CannotEdit("one and several need another form of a noun that is not plain to see")
    return Edit(span.start, counted.end(2), span.to + counted[1] + _noun_in(counted[2], plural))


def _with_verb(answer: str, span: Edit, old: Counted, new: Counted, others: Sequence[Edit]) -> Edit:
    start, end, to = span.start, span.end, span.to
    if (old.value == 1) == (new.value == 1):
        return span
    plural = new.value != 1
    if re.match(r"\s+\w", answer[end:]):
        verb = VERB_AFTER.match(answer, end)
        rest = re.split(r"[.!?;\n]", answer[verb.end() if verb else end :])[0]
        # "One dog in the yard is licking its paw": more words agree with the noun than those beside it.
        unclear = AGREES.search(rest) or (rest.strip() and not verb and SUBJECT.search(answer[:start]))
        if unclear and not _touches(others, end, len(answer)):
            raise CannotEdit("one and several need other forms of words that are not plain to see")
        if verb and not _touches(others, end, verb.end()):
            to, end = to + verb[1] + _verb_in(verb[2], plural), verb.end()
    if (there := THERE.search(answer[:start])) and not _touches(others, there.start(2), start):
        start, to = there.start(2), _verb_in(there[2], plural) + there[3] + to
    return Edit(start, end, to)


def _touches(others: Sequence[Edit], start: int, end: int) -> bool:
    """Whether the model itself edits something there."""
    return any(other.start < end and start < other.end for other in others)


FOLLOWS_NOUN = frozenset((
    "in", "on", "at", "of", "with", "and", "or", "by", "near", "under", "over", "behind", "beside", "above",
    "below", "inside", "outside", "from", "to", "for", "visible", "shown", "here", "there", "sitting", "standing",
    "parked", "walking", "lying", "that", "who", "which", "playing", "riding", "holding", "wearing", "eating",
    "flying",
))  # fmt: skip


def _phrase_ends(answer: str, at: int) -> bool:
    """Whether the word before is the last of its phrase, a noun, and not an adjective before one."""
    rest = FIRST_WORD.match(answer[at:].lstrip(" "))
    return rest is None or rest[0].lower() in FOLLOWS_NOUN or rest[0].lower() in VERBS.keys() | SINGULARS.keys()


def _noun_in(noun: str, plural: bool) -> str:
    one = singular(noun)
    if plural:
        return noun if one != noun.lower() else english().plural_noun(noun)
    if one == noun.lower() and english().plural_noun(noun) != noun:
        raise CannotEdit(f"'{noun}' has no singular that is plain to see")
    return in_the_case_of(noun, one)


def _noun_given(noun: str, plural: bool) -> str:
    """The noun that the model gave, in the number that it must have."""
    one = singular(noun)
    if plural and one == noun.lower():
        return english().plural_noun(noun)
    return noun if plural or one == noun.lower() else in_the_case_of(noun, one)


def _verb_in(verb: str, plural: bool) -> str:
    table = VERBS if plural else SINGULARS
    return in_the_case_of(verb, table.get(verb.lower(), verb.lower()))


def _is_plural(noun: str) -> bool:
    one = singular(noun)
    return one != noun.lower() and str(english().plural_noun(one)).lower() == noun.lower()


def _is_singular(noun: str) -> bool:
    """Whether it is, and its plural is another word: not of "sheep"."""
    if noun.lower() in ("police", "cattle") or not noun.isalpha():
        return False
    return singular(noun) == noun.lower() != str(english().plural_noun(noun)).lower()


ADJECTIVE = r"(?:(?:big|large|small|little|old|young|new|red|blue|green|yellow|black|white|brown|grey|gray)\s+)?"
DETERMINER_BEFORE = re.compile(rf"(?<![\w'’-])([\w-]+)\s+{ADJECTIVE}$")
SUBJECT_BEFORE = re.compile(r"(?:^|[.!?;:,\n]\W*)(?:(?:the|this|that|these|those|his|her|its|their|my)\s+)?$", re.I)
ONE = frozenset(("a", "an", "one", "this", "each", "every", "another"))
SEVERAL = frozenset(("these", "those", "several", "many", "few", "both"))


def _disagreement(answer: str, edit: Edit, others: Sequence[Edit]) -> str | None:
    """Why the noun that the edit puts in does not fit the words beside it."""
    old_phrase, phrase = _noun_phrase(answer[edit.start : edit.end]), _noun_phrase(edit.to)
    if not old_phrase or not phrase or not _phrase_ends(answer, edit.end):
        return None
    old, new = old_phrase[-1], phrase[-1]
    if number(new) is not None or new[0].isupper():  # "Platform 9 Tours": a name
        return None
    before = answer[: edit.start]
    given = _wants(phrase[0])
    determiner = DETERMINER_BEFORE.search(before)
    word = phrase[0] if given else determiner[1] if determiner else ""
    # What did not agree before is the author's.
    if given or (_is_singular(old) if _wants(word) == "one" else _is_plural(old)):
        if _wants(word) == "one" and _is_plural(new):
            return f"'{new}' is plural after '{word}'"
        if _wants(word) == "several" and _is_singular(new):
            return f"'{new}' is singular after '{word}'"
    verb = THERE.search(before) or (SUBJECT_BEFORE.search(before) and VERB_AFTER.match(answer, edit.end))
    if verb and not _touches(others, verb.start(2), verb.end(2)):
        one, several = (old, new) if verb[2].lower() in VERBS else (new, old)
        if _is_singular(one) and _is_plural(several):
            return f"the verb '{verb[2]}' no longer agrees with '{new}'"
    return None


def _noun_phrase(text: str) -> list[str]:
    """The words up to its noun, an article or a number included; none where that is not plain to see."""
    words = FIRST_WORD.findall(text)
    if re.search(r"[^\w\s'’-]|\band\b", text) or not QUANTITIES.isdisjoint(words[1:]):
        return []
    ends = NOT_COUNTED - {"a", "an", "the"} | FOLLOWS_NOUN
    return list(itertools.takewhile(lambda word: word.lower() not in ends, words))


def _wants(determiner: str) -> str | None:
    """Whether ``one`` or ``several`` follow a word; None if both may."""
    if determiner.lower() in ONE:
        return "one"
    return "several" if determiner.lower() in SEVERAL or (number(determiner) or 0) > 1 else None
