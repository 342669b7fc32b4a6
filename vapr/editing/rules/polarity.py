"""Turns "Yes, there is a dog." into "No, there is no dog." and back, where a rule can; a model does the rest."""

import re

from vapr.editing.rules.agreement import in_the_case_of
from vapr.editing.rules.nouns import IN_ANSWERS, UNCOUNTED, lexicon, unknown_words
from vapr.editing.rules.operations import Operation
from vapr.text import polarity

YES_OR_NO = re.compile(r"(?P<mark>[\s\"'“‘*_]*)(?P<word>yes|no)(?![\w-])(?P<end>[\s.!\"'”’*_]*$)?", re.IGNORECASE)
THERE = re.compile(r",? there (?P<verb>is|are|was|were)(?P<quantity>(?: an?| some| no)?)(?P<thing> [^.,!]+)[.!]?", re.I)
SUBJECT = r"(?P<subject>there|it|he|she|they|that|this|I|we|you|(?:the|this|that|his|her|its|their) [a-z]+(?: [a-z]+)?)"
BE = "is|are|was|were"
NEGATION = "(?P<negation> not|n['’]t|not)?"
SHORT = re.compile(rf",? {SUBJECT} (?P<verb>{BE}|do|does|did|has|have|had|can|could)(?P<rest>){NEGATION}[.!]?", re.I)
STATED = re.compile(rf",? {SUBJECT} (?P<verb>{BE}){NEGATION}(?P<rest> [^.,!]+)[.!]?", re.IGNORECASE)
NOT_TURNED = frozenset(("one", "two", "three", "four", "five", "six", "no", "not", "some"))
CLAIM_WORDS = IN_ANSWERS | {
    ",", ".", "!", "no", "not", "some", "do", "does", "did", "had", "could", "cannot", "isn't", "aren't", "wasn't",
    "weren't", "don't", "doesn't", "didn't", "hasn't", "haven't", "hadn't", "couldn't",
}  # fmt: skip


def flip(answer: str) -> list[Operation] | None:
    """Return operations that make the answer say the opposite; None where that is not plain, as in two sentences."""
    start = YES_OR_NO.match(answer)
    if start is None or polarity(answer) != start["word"].lower():
        return None
    denies = start["word"].lower() == "yes"
    word = Operation(start["word"], in_the_case_of(start["word"], "no" if denies else "yes"), start=start.start("word"))
    if start["end"] is not None:
        return [word]
    claim = answer[start.end() :].rstrip(" \"'”’*_")
    if claim.isupper() or unknown_words(claim, CLAIM_WORDS):
        return None
    turned = _turn_there(claim, denies) or _turn_verb(claim, denies)
    return [word, Operation(turned[1], turned[2], start=start.end() + turned[0])] if turned else None


Change = tuple[int, str, str]  # place in the claim, old and new text


def _turn_there(claim: str, denies: bool) -> Change | None:
    match = THERE.fullmatch(claim)
    found = next(lexicon().find(match["thing"][1:]), None) if match else None
    if (
        match is None
        or found is None
        or found[0] != 0
        or match["thing"] != match["thing"].lower()
        or not NOT_TURNED.isdisjoint(match["thing"].split())
    ):
        return None
    quantity, verb = match["quantity"][1:], match["verb"]
    if denies:
        return (match.start("quantity") + 1, quantity, "no") if quantity else (match.start("verb"), verb, f"{verb} no")
    _, end, noun = found
    several = verb.lower() in ("are", "were")
    is_singular = match["thing"][1 : end + 1].lower() == noun and (noun.endswith(("ss", "us")) or noun[-1] != "s")
    if quantity != "no" or not (several or (is_singular and lexicon().noun_class(noun) != "sky-and-water")):
        return None
    return match.start("quantity") + 1, "no", "some" if several or noun in UNCOUNTED else "a"


def _turn_verb(claim: str, denies: bool) -> Change | None:
    match = SHORT.fullmatch(claim) or STATED.fullmatch(claim)
    if match is None or bool(match["negation"]) == denies or not NOT_TURNED.isdisjoint(match["rest"].split()):
        return None
    subject, verb = match["subject"], match["verb"]
    if " " in subject and lexicon().known(subject.partition(" ")[2]) is None:  # "the dog that is brown"
        return None
    if not denies:
        return match.start("verb"), verb + match["negation"], verb
    if subject.lower() == "there" and match["rest"]:
        return None
    return match.start("verb"), verb, "cannot" if verb.lower() == "can" else f"{verb} not"
