"""Turns "Yes, there is a dog." into "No, there is no dog." and back, where a rule can; a model does the rest."""

import re

from vapr.editing.nouns import Nouns, singular
from vapr.editing.operations import Operation, in_the_case_of
from vapr.style import polarity, sentences

YES_OR_NO = re.compile(r"[\s\"'“‘*_]*(yes|no)(?![\w-])", re.IGNORECASE)
BARE = re.compile(r"[\s\"'“‘*_]*(?:yes|no)[\s.!\"'”’*_]*", re.IGNORECASE)
NOT_ONE_CLAIM = re.compile(
    r"\b(?:but|instead|rather|only|because|since|although|though|however|except|while|so)\b|[;:]", re.I
)
NEGATION = re.compile(r"\b(?:not|no|none|never|nothing|nobody|neither|without|cannot)\b|n['’]t\b", re.IGNORECASE)
THERE = re.compile(r"\bthere (is|are|was|were)\b", re.IGNORECASE)
QUANTITY = re.compile(r"\s+(a|an|some)(?=\s)", re.IGNORECASE)
VERB = re.compile(r"\b(is|are|was|were|can|could|will|would|should)(?= )", re.IGNORECASE)
NEGATED_VERB = re.compile(r"\b(is|are|was|were|can|could|would|should)( not|n['’]t)\b", re.IGNORECASE)
MAX_SUBJECT_WORDS = 6


def flip(answer: str, nouns: Nouns) -> list[Operation] | None:
    """Operations that make the answer say the opposite; None where no rule can, as in one of several sentences."""
    start = YES_OR_NO.match(answer)
    said = polarity(answer)
    if start is None or said != start[1].lower():
        return None
    word = Operation(start[1], in_the_case_of(start[1], "no" if said == "yes" else "yes"), start=start.start(1))
    if BARE.fullmatch(answer):
        return [word]
    rest = answer[start.end() :]
    if len(sentences(answer)) != 1 or NOT_ONE_CLAIM.search(rest) or rest.count(",") > 1 or "\n" in rest.strip():
        return None
    second = _deny(answer, start.end()) if said == "yes" else _affirm(answer, start.end(), nouns)
    return None if second is None else [word, second]


def _deny(answer: str, at: int) -> Operation | None:
    if NEGATION.search(answer, at):
        return None
    if there := THERE.search(answer, at):
        if quantity := QUANTITY.match(answer, there.end()):
            return Operation(quantity[1], "no", start=quantity.start(1))
        one = re.match(r"\s+(?:no|one|two|\d|many|several|any|more|the)\b", answer[there.end() :], re.IGNORECASE)
        return Operation(there[1], f"{there[1]} {'not' if one else 'no'}", start=there.start(1))
    verb = VERB.search(answer, at)
    if verb is None or not _plain_subject(answer[at : verb.start()]):
        return None
    return Operation(verb[1], f"{verb[1]} not", start=verb.start(1))


def _affirm(answer: str, at: int, nouns: Nouns) -> Operation | None:
    if len(NEGATION.findall(answer, at)) != 1 or re.search(
        r"\b(?:any|anyone|anything|yet|either)\b", answer[at:], re.I
    ):
        return None
    if there := THERE.search(answer, at):
        none = re.match(r"\s+(no)\s+([^\W\d_]+)", answer[there.end() :], re.IGNORECASE)
        if none is None:
            return None
        start = there.end() + none.start(1)
        if there[1].lower() in ("are", "were"):
            return Operation(none[1], "some", start=start)
        countable = nouns.known(none[2]) and singular(none[2]) == none[2].lower()
        return Operation(none[1], "a", start=start) if countable else None
    negated = NEGATED_VERB.search(answer, at)
    if negated is None or not _plain_subject(answer[at : negated.start()]):
        return None
    return Operation(negated[0], negated[1], start=negated.start())


def _plain_subject(text: str) -> bool:
    """Whether the verb after it is the sentence's: no clause of its own, not long."""
    words = re.findall(r"\w+", text)
    return 0 < len(words) <= MAX_SUBJECT_WORDS and not {"who", "that", "which", "whose", "where"} & set(words)
