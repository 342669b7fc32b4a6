"""Edit operations: applied to an answer in one way only, articles and agreement repaired, spans kept."""

import difflib
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vapr.editing.nouns import english, singular
from vapr.preference_pair import Edit


class CannotEdit(ValueError):
    """An operation that does not fit its answer; the message is the reason, for the ledger and the next prompt."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Put ``replace`` where ``find`` stands. ``start`` says where that is; -1: it occurs exactly once."""

    find: str
    replace: str
    why: str = ""
    start: int = -1


def apply(answer: str, operations: Sequence[Operation]) -> tuple[str, list[Edit]]:
    """The edited answer, and what changed in it as spans of the answer.

    ``a`` and ``an``, and the number of a noun and its verb, follow the edit; such words become part of its span.

    Raises:
        CannotEdit: if a ``find`` is not in the answer, or more than once, or changes nothing; or operations overlap.
    """
    spans = sorted((_place(answer, operation) for operation in operations), key=lambda edit: edit.start)
    repaired = [_agree(answer, edit) for edit in spans]
    for before, after in itertools.pairwise(repaired):
        if after.start < before.end:
            raise CannotEdit("two edits overlap")
    edits = [trimmed for edit in repaired if (trimmed := _trimmed(answer, edit)) is not None]
    if not edits:
        raise CannotEdit("the edit changes nothing")
    return spliced(answer, edits), edits


def spliced(answer: str, edits: Sequence[Edit]) -> str:
    """The answer with every span replaced."""
    pieces, at = [], 0
    for edit in edits:
        pieces += [answer[at : edit.start], edit.to]
        at = edit.end
    return "".join([*pieces, answer[at:]])


def _place(answer: str, operation: Operation) -> Edit:
    find = operation.find
    if operation.start >= 0:
        assert answer.startswith(find, operation.start)
        return Edit(operation.start, operation.start + len(find), operation.replace)
    if not find.strip():
        raise CannotEdit("find is empty")
    places = _places(find, answer) or _at_sentence_starts(find, answer)
    if len(places) != 1:
        times = f"{len(places)} times" if places else "nowhere"
        raise CannotEdit(f"find must occur exactly once in the answer; {_short(find)} occurs {times}")
    start, end = places[0], places[0] + len(find)
    replace = operation.replace if answer[start:end] == find else in_the_case_of(answer[start:end], operation.replace)
    if start == 0 and find[0].isupper():
        replace = replace[:1].upper() + replace[1:]
    if replace == answer[start:end]:
        raise CannotEdit(f"replace is the same as find: {_short(find)}")
    return Edit(start, end, replace)


SENTENCE_START = re.compile(r"(?:^|[.!?]\s+|\n)[\s\"'“‘(*]*$")


def _places(find: str, answer: str) -> list[int]:
    """Where it starts. A word is not found inside another one: "man" in "woman"."""
    left = r"(?<!\w)" if find[0].isalnum() else ""
    right = r"(?!\w)" if find[-1].isalnum() else ""
    return [match.start() for match in re.finditer(left + re.escape(find) + right, answer)]


def _at_sentence_starts(find: str, answer: str) -> list[int]:
    """Where it stands with a capital: of "A dog barks." a model likes to say that it found "a dog"."""
    places = _places(find[0].upper() + find[1:], answer)
    return [start for start in places if SENTENCE_START.search(answer[:start])]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _agree(answer: str, edit: Edit) -> Edit:
    return _article(answer, _number(answer, edit))


def _trimmed(answer: str, edit: Edit) -> Edit | None:
    """The span without the words at its ends that stay the same; None if nothing changes."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (answer[edit.start : edit.end], edit.to))
    if old == new:
        return None
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    start = edit.start + sum(map(len, old[:first]))
    end = edit.end - sum(map(len, old[len(old) - last :]))
    return Edit(start, end, "".join(new[first : len(new) - last]))


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
COUNTED = re.compile(
    r"(\s+)([^\W\d_]+(?:-[^\W\d_]+)*)(?:(\s+)(is|are|was|were|has|have|does|do)(?!\w))?", re.IGNORECASE
)
NOT_COUNTED = frozenset((
    "of", "is", "are", "was", "were", "in", "on", "at", "and", "or", "to", "with", "by", "for", "from", "a", "an",
    "the",
))  # fmt: skip
AGREES = re.compile(
    r"\b(?:is|are|was|were|has|have|does|do|that|who|which|he|she|it|they|his|her|its|their|him|them)\b", re.IGNORECASE
)
SUBJECT = re.compile(r"(?:^|[.!?;:,\n])\W*$")


def _number(answer: str, edit: Edit) -> Edit:
    """The edit of a number, with its noun and verb in the right number where that changes.

    Raises:
        CannotEdit: if it changes and the noun is not plain to see.
    """
    old, new = number(answer[edit.start : edit.end]), number(edit.to)
    if old is None or new is None or (old == 1) == (new == 1):
        return edit
    plural = new != 1
    start, end, to = edit.start, edit.end, edit.to
    counted = COUNTED.match(answer, end)
    bare = not re.match(r"\s+\w", answer[end:])
    if not bare:
        if counted is None or counted[2].lower() in NOT_COUNTED or not _next_is_end_or_verb(answer, counted):
            raise CannotEdit("one and several need another form of a noun that is not plain to see")
        # "One dog in the yard is licking its paw": more words agree with the noun than those beside it.
        rest = re.split(r"[.!?;\n]", answer[counted.end() :])[0]
        if AGREES.search(rest) or (rest.strip() and not counted[4] and SUBJECT.search(answer[:start])):
            raise CannotEdit("one and several need other forms of words that are not plain to see")
        to += counted[1] + _noun_in(counted[2], plural)
        end = counted.end(2)
        if counted[4]:
            to += counted[3] + _verb_in(counted[4], plural)
            end = counted.end()
    if there := THERE.search(answer[:start]):
        start = there.start(2)
        to = _verb_in(there[2], plural) + there[3] + to
    return Edit(start, end, to)


FOLLOWS_NOUN = frozenset((
    "in", "on", "at", "of", "with", "and", "or", "by", "near", "under", "over", "behind", "beside", "above",
    "below", "inside", "outside", "from", "to", "for", "visible", "shown", "here", "there", "sitting", "standing",
    "parked", "walking", "lying", "that", "who", "which", "playing", "riding", "holding", "wearing", "eating",
    "flying",
))  # fmt: skip


def _next_is_end_or_verb(answer: str, counted: re.Match[str]) -> bool:
    """Whether the word after the number is the counted noun, and not an adjective before it."""
    rest = FIRST_WORD.match(answer[counted.end(2) :].lstrip(" "))
    return counted[4] is not None or rest is None or rest[0].lower() in FOLLOWS_NOUN


def _noun_in(noun: str, plural: bool) -> str:
    one = singular(noun)
    if plural:
        return noun if one != noun.lower() else english().plural_noun(noun)
    if one == noun.lower() and english().plural_noun(noun) != noun:
        raise CannotEdit(f"'{noun}' has no singular that is plain to see")
    return in_the_case_of(noun, one)


def _verb_in(verb: str, plural: bool) -> str:
    table = VERBS if plural else SINGULARS
    return in_the_case_of(verb, table.get(verb.lower(), verb.lower()))


# Rewrites

WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def changed_spans(answer: str, rewritten: str) -> list[Edit]:
    """The word-level differences of a rewritten answer, as spans of the answer."""
    old, new = ([(m.start(), m.end(), m[0]) for m in WORDS.finditer(text)] for text in (answer, rewritten))
    matcher = difflib.SequenceMatcher(None, [w for *_, w in old], [w for *_, w in new], autojunk=False)
    edits = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        # Words that are only added or only taken away go with the space around them.
        wide = a == b or c == d
        start, end = _bounds(old, a, b, len(answer), wide)
        new_start, new_end = _bounds(new, c, d, len(rewritten), wide)
        edits.append(Edit(start, end, rewritten[new_start:new_end]))
    if spliced(answer, edits) != rewritten:  # the space between words changed, too
        return [Edit(0, len(answer), rewritten)]
    return edits


def _bounds(words: list[tuple[int, int, str]], first: int, stop: int, length: int, wide: bool) -> tuple[int, int]:
    if not wide:
        return words[first][0], words[stop - 1][1]
    return words[first - 1][1] if first else 0, words[stop][0] if stop < len(words) else length
