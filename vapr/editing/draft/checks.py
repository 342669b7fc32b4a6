"""What a pair must hold to be accepted, each as a recorded verdict; the limits are ``checks`` of the config."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vapr.data.pair import Edit
from vapr.editing.config import CheckConfig
from vapr.editing.draft.named_things import asked_about, carried_on, named_in_question, named_twice, outside
from vapr.editing.draft.text_in_picture import nothing_read, other_text, outside_quotation
from vapr.editing.rules.agreement import number
from vapr.editing.rules.categories import Category, Value
from vapr.editing.rules.lookalikes import plain, unexpected
from vapr.editing.rules.nouns import Nouns, singular
from vapr.editing.rules.operations import spliced
from vapr.text import edit_distance, num_words, polarity, sentences, style_vector, words


@dataclass(frozen=True, slots=True)
class Verdict:
    """The finding of one check. ``note`` says why it failed, in words a language model can act on."""

    name: str
    passed: bool
    value: float | None = None
    note: str = ""


STYLE = ("sentences", "ends_full_stop", "ends_question_mark", "ends_exclamation_mark", "ends_other_mark",
         "starts_upper", "list_lines", "markdown_marks", "hedges", "first_person", "line_breaks")  # fmt: skip
"""Of the style vector, what an edit must leave equal. The others follow length, or are measured by the audit."""


def check_pair(
    chosen: str, rejected: str, edits: Sequence[Edit], category: Category, config: CheckConfig, nouns: Nouns, *,
    traded: bool = False, question: str = "",
) -> list[Verdict]:  # fmt: skip
    """Every check of a pair, those of its category included.

    Args:
        chosen, rejected: the two texts.
        edits: spans of chosen, as :func:`vapr.editing.rules.operations.apply` gives them.
        traded: another row makes the opposite change, so that lengths cancel ("behind" for "in front of").
        question: the last one before the answer; what it speaks of is no wrong answer to it.
    """
    verdicts = [
        _verdict("different", _no_difference(chosen, rejected, edits, category)),
        _verdict("characters", unexpected(chosen, rejected)),
        *_lengths(chosen, rejected, category, config, words_off=2 if traded else 1),
    ]
    if config.style:
        verdicts.append(_verdict("style", _other_style(chosen, rejected)))
    verdicts.append(_verdict("repeats", _repetition(chosen, rejected)))
    verdicts.append(_verdict("marks", _mistyped(chosen, rejected)))
    if category.mode == "rewrite":
        if "conclusion" in category.checks:
            verdicts.append(_verdict("conclusion", _no_conclusion(chosen, edits), float(len(edits))))
        return verdicts
    verdicts.append(_verdict("edits", _wrong_number_of_edits(chosen, edits, category), float(len(edits))))
    for name in category.checks:
        if name == "polarity":
            verdicts.append(_verdict(name, _not_turned(chosen, rejected)))
            verdicts.append(_verdict("carried_on", carried_on(chosen, rejected, nouns)))
        elif name != "conclusion":
            verdicts.append(_verdict(name, _typed(name, chosen, edits, category, nouns)))
    if "other_text" in category.checks:
        verdicts.append(_verdict("read", nothing_read(question, chosen, edits)))
    if "not_related" in category.checks:
        verdicts.append(_verdict("in_question", named_in_question(question, chosen, edits, nouns)))
        verdicts.append(_verdict("asked_about", asked_about(question, chosen, edits, nouns)))
        verdicts.append(_verdict("named_twice", named_twice(chosen, edits, nouns)))
    return verdicts


def _verdict(name: str, problem: str | None, value: float | None = None) -> Verdict:
    return Verdict(name, problem is None, value, problem or "")


NEGATION = re.compile(r"\b(?:not|no|none|never|nothing|nobody|neither|without|cannot)\b|n['’]t\b", re.IGNORECASE)
VAGUE_NAME = re.compile(r"\b(?:some(?:thing|one|body|where)|anything) (?:else|different|other)\b", re.IGNORECASE)


def _no_difference(chosen: str, rejected: str, edits: Sequence[Edit], category: Category) -> str | None:
    if plain(chosen) == plain(rejected):
        return "only case, space or punctuation changed, or how letters are coded"
    if "polarity" not in category.checks and any(_only_negates(chosen, spliced(chosen, [edit])) for edit in edits):
        return "only a negation was put in or taken out; name another thing instead"
    if {"polarity", "other_text"}.isdisjoint(category.checks) and _said(chosen) == _said(rejected):
        return "only small words, or the form of a word, changed"
    if any(VAGUE_NAME.search(edit.to) for edit in edits):
        return "name what it is instead"
    # "A dog" is still true of what was "a brown dog", and the other way round it may be.
    changes = [(chosen[edit.start : edit.end], edit.to) for edit in edits]
    one_sided = all(not old.strip() or not new.strip() for old, new in changes)
    if one_sided and not any(NEGATION.search(f"{old} {new}") for old, new in changes):
        return "words were only added or taken away; what is said must become false"
    return None


SAYS_NOTHING = frozenset(
    ("a", "an", "the", "this", "that", "it", "is", "are", "was", "were", "be", "been", "made", "of")
)
ENDING = re.compile(r"(?<=\w{3})(?:ing|ed|en|es|s|e)$")
DOUBLED = re.compile(r"([^\d])\1$")


def _said(text: str) -> list[str]:
    """Return its words without those that say nothing and without endings: "is running" and "runs" are the same."""
    said = (word for word in re.findall(r"\w+", text.lower()) if word not in SAYS_NOTHING)
    return [DOUBLED.sub(r"\1", ENDING.sub("", word)) for word in said]


AFFIRMED = {"without": "with", "nobody": "somebody", "nothing": "something", "nowhere": "somewhere", "cannot": "can"}
BESIDE_NEGATION = frozenset(("not", "no", "never", "none", "a", "an", "any", "some", "do", "does", "did"))


def _only_negates(one: str, other: str) -> bool:
    """Return whether two texts differ in a negation alone, and in words that turn with it: "a" or "any", "eats"."""
    if len(NEGATION.findall(one)) == len(NEGATION.findall(other)):
        return False
    return _affirmed(one) == _affirmed(other)


def _affirmed(text: str) -> list[str]:
    plain_text = text.lower().replace("’", "'").replace("can't", "can not").replace("n't", " not")
    said = re.findall(r"\w+", plain_text)
    return [AFFIRMED.get(word, word).rstrip("s") for word in said if word not in BESIDE_NEGATION]


REPEATED = re.compile(r"\b([^\W\d_]+)(?:,? (?:and|or|but|nor)(?: an?| the)?|,)? \1\b", re.IGNORECASE)
DENIED = re.compile(r"\b(?:not|rather than|instead of)\s+((?:[\w'’-]+\s+){0,2}[\w'’-]+)", re.IGNORECASE)
SMALL_WORDS = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "but", "is", "are", "was", "were", "be", "with", "it",
    "one", "ones", "his", "her", "its", "their", "that", "this", "for", "by", "from", "as", "no", "not",
))  # fmt: skip


def _repetition(chosen: str, rejected: str) -> str | None:
    """Black and white must not become white and white, nor oranges, not apples, become apples, not apples."""
    before, after = (list(REPEATED.finditer(text)) for text in (chosen, rejected))
    if len(after) > len(before):
        return f"the result repeats itself: '{after[-1][0]}'"
    denied = _said_and_denied(rejected) - _said_and_denied(chosen)
    return f"the result both says and denies '{min(denied)}'" if denied else None


def _said_and_denied(text: str) -> set[str]:
    found: set[str] = set()
    for sentence in sentences(text):
        for match in DENIED.finditer(sentence):
            said = words((sentence[: match.start()] + " " + sentence[match.end() :]).lower())
            found |= set(words(match[1].lower())) & set(said) - SMALL_WORDS
    return {word for word in found if word[0].isalnum()}


MISTYPED = re.compile(r"[,;:.!?]{2,}|^ | {2,}| [,;.!?](?!\d)|\b(?:an?|the) (?:an?|the)\b", re.IGNORECASE)


def _mistyped(chosen: str, rejected: str) -> str | None:
    """An edit that brings its own full stop or article leaves "a car,." and "a the player"."""
    before, after = (MISTYPED.findall(text) for text in (chosen, rejected))
    return f"the result has '{after[-1]}', which nobody writes" if len(after) > len(before) else None


def _lengths(chosen: str, rejected: str, category: Category, config: CheckConfig, words_off: int) -> list[Verdict]:
    long, short = num_words(chosen), num_words(rejected)
    ratio = short / long if long else float(short == 0)
    distance = edit_distance(words(chosen), words(rejected))
    note = f"{short} words instead of {long}; keep the length"
    if long <= config.short_answer_words:
        # A short answer must stay one: "2" -> "There are three dogs" would be told by its length.
        near = abs(long - short) <= max(words_off, long // 4)
        length = _verdict("length", None if near else note, round(ratio, 4))
        return [length, Verdict("distance", True, round(distance, 4), "short")]
    (low, high), (hard_low, hard_high) = config.length_ratio, config.hard_length_ratio
    fits = low <= ratio <= high or (abs(long - short) <= words_off and hard_low <= ratio <= hard_high)
    most = config.max_edit_distance * (2 if category.mode == "rewrite" else 1)
    far = f"too much changed: {distance:.0%} of the words, where {most:.0%} may; change less"
    return [
        _verdict("length", None if fits else note, round(ratio, 4)),
        _verdict("distance", None if distance <= most else far, round(distance, 4)),
    ]


def _other_style(chosen: str, rejected: str) -> str | None:
    before, after = style_vector(chosen), style_vector(rejected)
    changed = [key.replace("_", " ") for key in STYLE if before[key] != after[key]]
    return f"style changed: {', '.join(changed)}" if changed else None


def _wrong_number_of_edits(chosen: str, edits: Sequence[Edit], category: Category) -> str | None:
    # Of several errors each must be one: "a red hat" is still true of what is now "a bright red hat".
    real = [
        edit for edit in edits if category.min_edits == 1 or (edit.to.strip() and chosen[edit.start : edit.end].strip())
    ]
    # One claim may need two places: "Yes, there is" -> "No, there is no".
    if "polarity" in category.checks and len(edits) <= 3:
        return None
    if category.min_edits <= len(real) and len(edits) <= category.max_edits:
        return None
    wanted = f"{category.min_edits} to {category.max_edits}" if category.max_edits > 1 else "1"
    return f"{len(real)} places changed instead of {wanted}"


def _not_turned(chosen: str, rejected: str) -> str | None:
    if {polarity(chosen), polarity(rejected)} != {"yes", "no"}:
        return "yes must become no, or no yes, at the beginning"
    one, other = (plain(text).split(" ")[1:] for text in (chosen, rejected))
    first, turned = (plain(next(iter(sentences(text)), "")).split(" ")[1:] for text in (chosen, rejected))
    if (one and one == other) or (first and first == turned):
        return "what follows yes or no must turn with it"
    # "No, there are only two" has counted two, so "Yes, there are two" is true.
    return "without 'only' it is true again" if "only" in one and [w for w in one if w != "only"] == other else None


def _typed(name: str, chosen: str, edits: Sequence[Edit], category: Category, nouns: Nouns) -> str | None:
    """Return what a check finds that looks at what each span became."""
    for edit in edits:
        old, before = chosen[edit.start : edit.end], chosen[: edit.start]
        if problem := _SPAN_CHECKS[name](old, edit.to, before, category, nouns):
            return problem
    if name == "other_text":
        return outside_quotation(chosen, edits)
    if name == "opposite":
        return _not_turned_round(chosen, edits, category) or _with_itself(chosen, edits)
    return None


def _pairs_of_values(old: str, new: str, category: Category) -> list[tuple[Value, Value]]:
    """Return values of two spans that are of one set; words around a span, which a set may look at, are not there."""
    return [(a, b) for a in category.all_values(old) for b in category.all_values(new) if a.set is b.set]


def _other_value(old: str, new: str, before: str, category: Category, nouns: Nouns) -> str | None:
    alike = any(one.set.alike(one.name, other.name) for one, other in _pairs_of_values(old, new, category))
    # "next to" is a value only before "the".
    if alike or any(closed.alike(old.strip(), new.strip()) for closed in category.values):
        return f"'{new}' can be said of what is '{old}'"
    # Where a side has no value of a closed set, the nouns tell, and the verifiers.
    return _not_related(old, new, before, category, nouns)


def _opposite(old: str, new: str, before: str, category: Category, nouns: Nouns) -> str | None:
    if not category.all_values(old) or not category.all_values(new):
        return None
    for one, other in _pairs_of_values(old, new, category):
        if one.group == other.group and not one.set.alike(one.name, other.name):
            return None
    return f"'{new}' is not the opposite of '{old}'"


COMPARATIVE = re.compile(r"\b(?:\w+er|more|less|worse)\b", re.IGNORECASE)
NOT_ADJECTIVE = re.compile(r"\bthe (?:\w+ )?$", re.IGNORECASE)  # "the flower is taller than"
THE_REST = re.compile(r"\bthan\b.*\b(?:others?|rest|else|any|all|every|each)\b", re.IGNORECASE | re.DOTALL)


def _not_turned_round(chosen: str, edits: Sequence[Edit], category: Category) -> str | None:
    """Return why a sentence with "than" is not what it was with the comparative, or the two things, turned round."""
    for sentence in re.finditer(r"[^.!?\n]+", chosen):
        start, end = sentence.span()
        here = [edit for edit in edits if start <= edit.start and edit.end <= end]
        if not here or "than" not in words(sentence[0]) or THE_REST.search(sentence[0]):
            continue
        others = [edit for edit in here if not _is_comparative(chosen, edit, category)]
        moved = spliced(chosen[:end], others)[start:]
        if others and sorted(_content(moved)) != sorted(_content(sentence[0])):
            return "both things compared must stay; turn the comparative round, or let the two change places"
        if others and len(others) < len(here):
            return "the comparative and the two things were both turned round, so it is true again"
    return None


def _with_itself(chosen: str, edits: Sequence[Edit]) -> str | None:
    """ "The right box is as large as the left box" must not become "the left box is as large as the left box"."""
    for sentence in re.finditer(r"[^.!?\n]+", chosen):
        start, end = sentence.span()
        here = [edit for edit in edits if start <= edit.start and edit.end <= end]
        rest = set(_content(outside(chosen[:end], here)[start:]))
        for edit in here:
            added = set(_content(edit.to)) - set(_content(chosen[edit.start : edit.end]))
            if added and added <= rest:
                return f"'{edit.to.strip()}' is then compared with itself"
    return None


def _is_comparative(chosen: str, edit: Edit, category: Category) -> bool:
    old = chosen[edit.start : edit.end]
    if category.all_values(old):
        return True
    both = COMPARATIVE.search(old) and COMPARATIVE.search(edit.to)
    return both is not None and not NOT_ADJECTIVE.search(chosen[: edit.start])


def _content(text: str) -> list[str]:
    return [word for word in words(text.lower()) if word[0].isalnum() and word not in SMALL_WORDS]


VAGUE = re.compile(
    r"\b(?:at least|at most|over|more than|fewer than|less than|up to|about|around|approximately|nearly|almost"
    r"|roughly)\s+",
    re.IGNORECASE,
)
ONE_THING = re.compile(r"\b(?:another|an? (?!couple|pair|few|dozen|lot|group|number|bunch))", re.IGNORECASE)
NUMBERS = re.compile(r"[\w'-]+(?:[.,]\d+)*")


def _other_number(old: str, new: str, before: str, category: Category, nouns: Nouns) -> str | None:
    was, now = ([n for word in NUMBERS.findall(text) if (n := number(word)) is not None] for text in (old, new))
    if not was and ONE_THING.search(old):
        was = [1]
    if not was or not now or len(now) > len(was):
        return f"a number must become another number, not '{old}' -> '{new}'"
    if was == now:
        return f"'{new}' is the same number as '{old}'"
    vague = any(VAGUE.search(text) for text in (old, new)) or any(
        m.end() == len(before) for m in VAGUE.finditer(before)
    )
    return "both numbers can be true after 'at least', 'about' and the like" if vague else None


def _not_related(old: str, new: str, before: str, category: Category, nouns: Nouns) -> str | None:
    if singular(old) == singular(new):
        return f"'{new}' is the same noun as '{old}'"
    sides = [[noun for *_, noun in nouns.find(text)] or re.findall(r"\w+", text.lower())[-1:] for text in (old, new)]
    for one in (noun for noun in sides[0] if noun not in sides[1]):
        for other in (noun for noun in sides[1] if noun not in sides[0]):
            if reason := nouns.related(one, other):
                return f"'{new}' may be true of '{old}': {reason}"
    return None


_SPAN_CHECKS: dict[str, Callable[[str, str, str, Category, Nouns], str | None]] = {
    "other_value": _other_value,
    "opposite": _opposite,
    "other_number": _other_number,
    "not_related": _not_related,
    "other_text": other_text,
}


def _no_conclusion(chosen: str, edits: Sequence[Edit]) -> str | None:
    """A wrong conclusion needs a wrong argument: more than one place, one of them in the last sentence."""
    parts = sentences(chosen)
    last = chosen.rfind(parts[-1]) if len(parts) > 1 else 0
    if len(edits) > 1 and any(edit.end > last for edit in edits):
        return None
    return "both the argument and the conclusion must change, the conclusion in the last sentence"
