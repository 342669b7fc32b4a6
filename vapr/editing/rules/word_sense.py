"""Whether a value means in its place what its set means: no name, an adjective of a thing, what somebody does."""

import itertools
import re

from vapr.editing.rules.agreement import number
from vapr.editing.rules.categories import Value
from vapr.editing.rules.nouns import UNCOUNTED, Nouns

STARTS_SENTENCE = re.compile(
    r"(?:^|[:\n]|(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)[.!?])[\s\W]*$"
)
# Words that numbers follow; a capital there is the sentence's.
BEFORE_NUMBERS = frozenset(
    ("only", "the", "these", "those", "all", "just", "exactly", "there", "are", "in", "on", "with")
)
CAPITALISED = re.compile(r"(?<!\w)(\w*[A-Z]\w*) $")


def is_name(text: str, start: int, said: str) -> bool:
    """Whether a word is a name or part of one: "Jack Black", "Apollo 11"."""
    if text.isupper():
        return False
    if number(said) is not None and (word := CAPITALISED.search(text, 0, start)):
        ordinary = word[1].lower() in BEFORE_NUMBERS and STARTS_SENTENCE.search(text[: word.start()])
        return word[1].lower() != "i" and not ordinary
    return said[0].isupper() and not STARTS_SENTENCE.search(text[:start])


# An adjective may end a clause after one of these ...
SAID_OF_SUBJECT = re.compile(
    r"(?:^\W*|\n\W*|: |(?:['’]s|\b(?:is|are|was|were|be|look|looks|looked|appears?|seems?|turns?|turned|painted|dyed"
    r"|colou?red|wears?|wearing|in)) )(?:(?:all|also|mostly|mainly|entirely|completely|very|quite|rather|pretty|solid"
    r"|plain|relatively|fairly) )*$",
    re.IGNORECASE,
)
# ... where one of these follows.
CLAUSE_ENDS = re.compile(
    r"\W*$|\s*[.,;:!?)\]\"”–—\n]|\s+(?:in (?:colou?r|shape|size)|and|but|with|on|at|from|near|above|below|under|around"
    r"|while|inside|in the|in this)\b",
    re.IGNORECASE,
)
NO_ADJECTIVE = frozenset((
    "of", "for", "to", "by", "in", "on", "at", "with", "from", "and", "or", "but", "as", "is", "are", "was", "were",
    "has", "have", "had", "be", "been", "the", "a", "an", "his", "her", "its", "their", "my", "your", "our", "this",
    "that", "these", "those", "which", "who", "while", "when", "where", "than", "it", "he", "she", "they", "them",
    "him", "near", "over", "under", "into", "through", "behind", "beside", "next", "can", "will", "do", "does",
    "not", "no", "if",
))  # fmt: skip
MAX_BETWEEN = 2  # "a small wooden fishing boat"


def is_adjective(answer: str, value: Value, nouns: Nouns) -> bool:
    """Whether a value is said of a thing: right before a known noun, or alone after a verb and at a clause's end."""
    clause = re.split(r"[.,;:!?()\n–—\"]", answer[value.end : value.end + 60])[0]
    found = next(nouns.find(clause), None)
    if found is not None and clause[:1] == " ":
        between = clause[: found[0]].lower().split()
        if len(between) <= MAX_BETWEEN and NO_ADJECTIVE.isdisjoint(between):
            return value.name != "little" or found[2] not in UNCOUNTED  # "a little water" is no small one
    return bool(SAID_OF_SUBJECT.search(answer[: value.start]) and CLAUSE_ENDS.match(answer, value.end))


CLAUSE = re.compile(r"[.,;:!?()\n–—]|\b(?:and|while|where|as|but)\b", re.IGNORECASE)
SOMEBODY = re.compile(r"\b(?:he|she|who|I|we|you|someone|somebody|everyone|everybody|people)\b", re.IGNORECASE)
THEY = re.compile(r"\bthey\b", re.IGNORECASE)
DETERMINED = re.compile(r"\b(?:the|an?|his|her|its|their|this|these|those|my|your|our) +\w", re.IGNORECASE)
RELATIVE = re.compile(r"\b(?:that|which) (?:is|are|was|were) $", re.IGNORECASE)
PICTURES = frozenset(("photo", "photograph"))


def said_of(answer: str, question: str, value: Value, nouns: Nouns) -> bool:
    """Whether the subject of a value is of a class that its set is said of: people sit, books do not."""
    clause = CLAUSE.split(answer[: value.start])[-1]
    found = _things(clause, nouns)
    if found:
        beside = clause[found[-1][1] :].strip() == "" or RELATIVE.search(clause)  # "a man with a dog sitting"
        return nouns.noun_class(found[-1 if beside else 0][2]) in value.set.said_of
    if SOMEBODY.search(clause):
        return True
    if DETERMINED.search(clause):  # something, but nobody knows what
        return False
    asked = _things(question, nouns)
    if asked:
        return nouns.noun_class(asked[0][2]) in value.set.said_of
    return bool(SOMEBODY.search(question) or THEY.search(question))


def _things(text: str, nouns: Nouns) -> list[tuple[int, int, str]]:
    """Nouns without those that only tell whose: "the man's bag" is a bag; of nouns side by side the last."""
    found = [one for one in nouns.find(text) if one[2] not in PICTURES and text[one[1] : one[1] + 1] not in ("'", "’")]
    return [
        one for one, following in itertools.zip_longest(found, found[1:]) if not following or following[0] > one[1] + 1
    ]
