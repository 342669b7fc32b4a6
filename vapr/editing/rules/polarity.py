"""Turns "Yes, there is a dog." into "No, there is no dog." and back, where a rule can; a model does the rest."""

import re

from vapr.editing.rules.agreement import in_the_case_of
from vapr.editing.rules.nouns import UNCOUNTED, Nouns
from vapr.editing.rules.operations import Operation
from vapr.text import polarity, sentences

YES_OR_NO = re.compile(r"[\s\"'“‘*_]*(yes|no)(?![\w-])", re.IGNORECASE)
BARE = re.compile(r"[\s\"'“‘*_]*(?:yes|no)[\s.!\"'”’*_]*", re.IGNORECASE)
NOT_ONE_CLAIM = re.compile(
    r"\b(?:but|instead|rather|only|because|since|although|though|however|except|while|as|so)\b|[,;:?()–—…]|\s-+\s|--|\.\.",
    re.I,
)
# "Not all", "not always", "not a dog or a cat" deny less than, or other than, what they seem to.
NOT_PLAIN = re.compile(
    r"\b(?:and|or|nor|all|both|each|every\w*|some(?:one|body|thing|times)|any\w*|most|several|few|lot|lots|couple|little|enough|"
    r"more|less|fewer|much|single|than|one|another|either|least|always|often|still|also|already|too|yet|longer|just|probably|likely|"
    r"possibly|perhaps|maybe)\b",
    re.IGNORECASE,
)
NEGATION = re.compile(r"\b(?:not|no|none|never|nothing|nobody|neither|without|cannot)\b|n['’]t\b", re.IGNORECASE)
NUMBERED = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+|several|many|few)\b", re.IGNORECASE
)
THERE = re.compile(r"\bthere(?: (is|are|was|were)|(['’]s))\b", re.IGNORECASE)
QUANTITY = re.compile(r"\s+(a|an|some)(?=\s)", re.IGNORECASE)
# "Yes, there are some on the table" has no noun: its opposite has "none".
NO_NOUN = (
    r"(?=\W*$|\s+(?:in|on|at|near|by|behind|under|above|below|beside|inside|outside|around|next|here|there|visible|present"
    r"|shown|seen)\b)"
)
SOME_ALONE = re.compile(rf"\s+(some){NO_NOUN}", re.IGNORECASE)
NONE_ALONE = re.compile(rf"\s+(none){NO_NOUN}", re.IGNORECASE)
VERB = re.compile(r"\b(is|are|was|were|can|could|will|would|should)(?=\s|\W*$)", re.IGNORECASE)
# "Can" is a verb after "I" and before "be"; else it may be a can, as in "the trash can on the left is", or unclear.
CAN_DO = re.compile(r"\b(?:I|you|we|he|she|it|they|one|that) $", re.IGNORECASE)
A_CAN = re.compile(r"\s+(?:is|are|was|were|in|on|of|with|next)\b", re.IGNORECASE)
NEGATED_VERB = re.compile(r"\b(is|are|was|were|could|would|should|can(?=not))( not|n['’]t|not)\b", re.IGNORECASE)
# Short answers end with their verb: "Yes, there is.", "No, they don't."
LAST_VERB = re.compile(
    r"\b(is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)(?=\W*$)", re.IGNORECASE
)
LAST_NEGATED = re.compile(
    r"\b(is|are|was|were|do|does|did|has|have|had|could|would|should|can(?=not)|ca(?=n['’]t)|wo(?=n['’]t))"
    r"( not|n['’]t|not)(?=\W*$)",
    re.IGNORECASE,
)
AFFIRMED = {"ca": "can", "wo": "will"}
LAST_JOINED = re.compile(r"\b(?:there|it|that|he|she|they|we|you|I)(['’](s|re|m) not)(?=\W*$)", re.IGNORECASE)
JOINED = {"s": " is", "re": " are", "m": " am"}
HELPED = re.compile(rf"{VERB.pattern}|\b(?:must|may|might|shall|do|does|did|has|have|had|to)\b", re.IGNORECASE)
STRONGLY = re.compile(r"\b(?:at all|whatsoever)\b", re.IGNORECASE)
INDEFINITE = re.compile(r"\W*(?:an?|some|no)\b", re.IGNORECASE)
MAX_SUBJECT_WORDS = 6
# What may stand after a noun that is the whole of a thing's name.
ALONE = re.compile(
    r"\W*$|\s+(?:in|on|at|near|by|behind|under|above|below|beside|inside|outside|around|with|of|to|next|for|from|here"
    r"|there|that|who|which|visible|present|shown|seen|\w+ing)\b",
    re.IGNORECASE,
)
STANDING = (["that"], ["there"])  # such a word alone is the subject: "that is not so", "there isn't"


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
    if NUMBERED.search(rest):  # "not two people" may be three
        return None
    claim = rest.lstrip(" ,–—-*_\"'”’")
    if len(sentences(answer)) != 1 or NOT_ONE_CLAIM.search(claim) or "\n" in rest.strip():
        return None
    if NOT_PLAIN.search(rest) or rest.isupper():
        return None
    second = _deny(answer, start.end()) if said == "yes" else _affirm(answer, start.end(), nouns)
    return None if second is None else [word, second]


def _deny(answer: str, at: int) -> Operation | None:
    if NEGATION.search(answer, at):
        return None
    last = LAST_VERB.search(answer, at)
    if last and _short(answer[at : last.start()], last[1]):
        return Operation(last[1], _denied(last[1]), start=last.start(1))
    if there := THERE.search(answer, at):
        if alone := SOME_ALONE.match(answer, there.end()):
            return Operation(alone[1], "none", start=alone.start(1)) if there[1] else None
        if quantity := QUANTITY.match(answer, there.end()):
            return Operation(quantity[1], "no", start=quantity.start(1))
        if re.match(r"\s+(?:the|this|that|in|on|at|now|indeed|\w+ly)\b|\W*$", answer[there.end() :], re.IGNORECASE):
            return None
        verb = there[1] or there[2]
        return Operation(verb, f"{verb} no", start=there.end() - len(verb))
    verb = VERB.search(answer, at)
    if verb and verb[1].lower() == "can" and A_CAN.match(answer, verb.end()):
        verb = VERB.search(answer, verb.end())
    elif verb and verb[1].lower() == "can":
        verb = verb if CAN_DO.search(answer[: verb.start()]) or answer.startswith(" be ", verb.end()) else None
    if verb is None or not _plain_subject(answer[at : verb.start()]):
        return None
    return Operation(verb[1], _denied(verb[1]), start=verb.start(1))


def _denied(verb: str) -> str:
    return f"{verb}not" if verb.lower() == "can" else f"{verb} not"


def _short(subject: str, verb: str) -> bool:
    """Whether a verb at the end is all that is said of a subject: "Yes, it does", but not "Yes, that is a can"."""
    can = verb.lower() != "can" or CAN_DO.search(subject) is not None
    return can and HELPED.search(subject) is None and _plain_subject(subject)


def _affirm(answer: str, at: int, nouns: Nouns) -> Operation | None:
    if len(NEGATION.findall(answer, at)) != 1 or STRONGLY.search(answer, at):
        return None
    last = LAST_NEGATED.search(answer, at)
    if last and _short(answer[at : last.start()], AFFIRMED.get(last[1].lower(), last[1])):
        verb = in_the_case_of(last[1], AFFIRMED.get(last[1].lower(), last[1]))
        return Operation(last[0], verb, start=last.start())
    if joined := LAST_JOINED.search(answer, at):
        return Operation(joined[1], JOINED[joined[2].lower()], start=joined.start(1))
    there = THERE.search(answer, at)
    if there and not answer.startswith(" not ", there.end()):
        return _some_there(answer, there, nouns)
    negated = NEGATED_VERB.search(answer, at)
    if negated is None or not _plain_subject(answer[at : negated.start()]):
        return None
    return Operation(negated[0], negated[1], start=negated.start())


def _some_there(answer: str, there: re.Match[str], nouns: Nouns) -> Operation | None:
    """Of "there is no dog": "there is a dog"."""
    several = bool(there[1]) and there[1].lower() in ("are", "were")
    if alone := NONE_ALONE.match(answer, there.end()):  # "there is none": one, or some
        return Operation(alone[1], "some", start=alone.start(1)) if several else None
    none = re.match(r"\s+(no)\s+", answer[there.end() :], re.IGNORECASE)
    if none is None:
        return None
    start = there.end() + none.start(1)
    some = "some" if several else _some(answer[there.end() + none.end() :], nouns)
    return None if some is None else Operation(none[1], some, start=start)


def _some(thing: str, nouns: Nouns) -> str | None:
    """``a`` or ``some``, by the noun that the text begins with; None if nothing tells."""
    found = next(nouns.find(thing[:60]), None)
    if found is None or found[0] != 0:  # no noun is known: what is not counted may still be
        first = re.match(r"[^\W\d_]+", thing)
        return "some" if first and first[0].lower() in UNCOUNTED and ALONE.match(thing, first.end()) else None
    _, end, noun = found
    if not ALONE.match(thing, end):  # "toilet paper" is no toilet
        return None
    if noun in UNCOUNTED:
        return "some"
    plural = noun.endswith("s") and not noun.endswith(("ss", "us"))  # "glasses" have no other singular
    return "a" if thing[:end].lower() == noun and not plural and noun not in ("sun", "sky", "suv") else None


def _plain_subject(text: str) -> bool:
    """Whether the verb after it is the sentence's: no clause of its own, not long, and nothing that is one of many."""
    words = re.findall(r"\w+", text.lower())
    clause = {"who", "that", "which", "whose", "where", "what", "when", "if", "whether", "there"} & set(words)
    return 0 < len(words) <= MAX_SUBJECT_WORDS and not INDEFINITE.match(text) and (not clause or words in STANDING)
