"""Why a rule may not edit a value: one question, one short list of reasons.

Rules edit what is plainly safe: one member of a closed set, said of one known noun, in a short sentence of its own,
with nothing else in the answer, the question or an earlier turn that depends on it. A sentence is plain if it holds
known words alone (``words.yaml``, ``nouns.yaml``): "because", "not", "about", "both" and whatever else could make
another word depend on the value are not among them. What is not plain is left to the language model.
"""

from collections.abc import Callable, Set
from functools import cached_property

from vapr.editing.rules.agreement import number
from vapr.editing.rules.categories import Value
from vapr.editing.rules.nouns import IN_QUESTIONS, UNCOUNTED, lexicon, unknown_words
from vapr.editing.rules.polarity import flip
from vapr.editing.rules.turns import Turn
from vapr.text import words

MAX_WORDS = 14
OPENINGS = tuple(
    f"In {the} {picture}, " for the in ("the", "this") for picture in ("image", "picture", "photo", "scene")
)
BE = frozenset(("is", "are", "was", "were", "it's", "they're", "he's", "she's"))
AFTER_ADJECTIVE = frozenset(("in", "on", "at", "with", "near", "next", "behind", ".", "!"))
# "A black bear", "red wine" and "a little boy" are kinds of their own; a red car is a car that is red.
PLAIN_THINGS = frozenset((
    "vehicle", "clothing", "accessory", "furniture", "furnishing", "appliance", "electronics", "tableware", "building",
    "structure", "toy", "sport-gear", "container", "road-things", "vehicle part",
))  # fmt: skip

PLAIN_ANIMALS = frozenset(("dog", "cat", "horse", "cow"))
POSITIONED = frozenset(("stands", "sits", "lies", "hangs"))
PARTS = frozenset((
    "wheel", "tire", "tyre", "hand", "ear", "eye", "leg", "side", "door", "arm", "horn", "tail", "foot", "wing",
))  # fmt: skip
SEATS = frozenset(("chair", "bench", "couch", "sofa", "stool", "seat", "bed"))
ODD = frozenset(("little",))  # "the window is little": no one says so


def why_not(turn: Turn, value: Value) -> str | None:
    """Return why a rule may not edit a value of an answer, as a name from :data:`REASONS`; None if it is safe."""
    if value.name in ("yes", "no"):
        return NO_OPPOSITE if flip(turn.answer) is None else None
    place = Place(turn, value)
    return next((reason for reason, holds in REASONS.items() if holds(place)), None)


def choices(turn: Turn, value: Value) -> Set[str]:
    """Return the values among which the question lets choose ("red or blue?"), if this is one; else none."""
    if " or " not in turn.question:
        return frozenset()
    named = {name for _, name in value.set.named(turn.question) if value.set.members.get(name) == value.group}
    return named if value.name in named and len(named) > 1 else frozenset()


def replacements(turn: Turn, value: Value) -> frozenset[str]:
    """Return the values that may take a safe one's place: of its group, or the question's choices, and none near it."""
    allowed = choices(turn, value) or {member.lower() for member in value.set.groups[value.group]}
    alone = value.text == turn.answer.strip(" .!")
    allowed = allowed - value.set.near(value.name) - ODD
    return frozenset(member for member in allowed if alone or number(member) != 1)


class Place:
    """A value's place in its answer, and what stands beside it."""

    def __init__(self, turn: Turn, value: Value) -> None:
        self.turn, self.value = turn, value
        opening = next((len(words) for words in OPENINGS if turn.answer.startswith(words)), 0)
        self.left = turn.answer[min(opening, value.start) : value.start]
        self.right = turn.answer[value.end :]
        self.count = number(value.text)

    @cached_property
    def subject(self) -> tuple[int, int, str] | None:
        """The first noun before the value: start, end and singular."""
        return next(lexicon().find(self.left), None)

    @cached_property
    def next_noun(self) -> str | None:
        """The noun right after the value."""
        found = next(lexicon().find(self.right), None)
        return found[2] if found and self.right[: found[0]] == " " else None

    @cached_property
    def noun(self) -> str | None:
        """Return the noun that the value is said of: right after it, else the subject, else the question's first."""
        if self.next_noun or self.subject:
            return self.next_noun or (self.subject and self.subject[2])
        return next((noun for *_, noun in lexicon().find(self.turn.question) if not noun.startswith("photo")), None)

    @property
    def is_predicate(self) -> bool:
        """Tell whether the value follows "is" or a noun ("a man sitting"), or begins the answer."""
        before = self.left.lower().split()
        return not before or before[-1] in BE or (self.subject is not None and self.left[self.subject[1] :] == " ")

    @property
    def names_nothing_else(self) -> bool:
        """Tell whether no noun stands beside the value: "It is red.", "On the left." """
        return self.subject is None and next(lexicon().find(self.right), None) is None


# The reasons


def _is_several_claims(place: Place) -> bool:
    rest = place.left + place.right.rstrip(" .!")
    return len(words(rest)) > MAX_WORDS or any(mark in rest for mark in '.,;:!?()–—"“\n')


def _is_name(place: Place) -> bool:
    sentence = place.left + place.value.text + place.right
    return sentence[1:] != sentence[1:].lower() and not sentence.isupper()


def _has_unknown_word(place: Place) -> bool:
    return bool(unknown_words(place.left) or unknown_words(place.right.rstrip(" .!")))


def _has_unknown_question(place: Place) -> bool:
    known = IN_QUESTIONS | place.value.set.members.keys() | {"?", ".", ",", ":"}
    # "page 3", "picture B", and characters that nobody sees
    unknown = (word for word in unknown_words(place.turn.question, known) if not word.isdigit() and word.isprintable())
    return any(len(word) > 1 or not word.isalpha() for word in unknown)


def _is_one_of_several(place: Place) -> bool:
    if place.count is not None:
        return any(number(word) is not None for word in words(place.left + place.right))
    return bool(place.value.set.named(place.left) or place.value.set.named(place.right))


def _is_told_by_question(place: Place) -> bool:
    question, closed = place.turn.question, place.value.set
    if offered := choices(place.turn, place.value):
        return offered <= closed.near(place.value.name)
    if place.count is not None:  # "of the three cups", but not "on page 3?"
        asked = [*words(question), "?"]
        return any((number(word) or 0) > 1 and asked[n + 1][0].isalpha() for n, word in enumerate(asked[:-1]))
    return any(not question[:start].lower().endswith("how ") for start, _ in closed.named(question))


def _is_told_by_the_thing(place: Place) -> bool:
    """Tell whether the value can be guessed: legs of a table, colour of snow, what is under a bridge or on a chair."""
    closed = place.value.set
    if place.count is not None:
        asked = words(place.turn.question.lower())
        return place.noun in PARTS or any(word in PARTS or word.removesuffix("s") in PARTS for word in asked)
    if closed.said_of:
        return any(noun in SEATS for *_, noun in lexicon().find(place.turn.question))
    is_sky = place.noun is not None and lexicon().noun_class(place.noun) == "sky-and-water"
    return closed.name == "above-below" or is_sky or (closed.adjective and place.noun in UNCOUNTED)


def _is_told_before(place: Place) -> bool:
    parts = [part for message in place.turn.prompt[:-1] for part in message["content"] if part["type"] == "text"]
    said = "\n".join(part["text"] for part in parts)
    if place.count is not None:
        return any(number(word) == place.count for word in words(said))
    return any(place.value.set.alike(place.value.name, name) for _, name in place.value.set.named(said))


def _is_not_said_of_a_thing(place: Place) -> bool:
    closed, noun = place.value.set, place.noun
    if place.count is not None:  # "one" only alone: noun and verb need no other form there
        counts = place.next_noun is not None or place.names_nothing_else
        return not counts or (place.count == 1 and bool(place.left.strip() or place.right.strip(" .!")))
    if closed.said_of:
        return not (place.is_predicate and noun and lexicon().is_one_of(noun, closed.said_of))
    if closed.adjective and place.next_noun:
        plain = lexicon().noun_class(place.next_noun) in PLAIN_THINGS or place.next_noun in PLAIN_ANIMALS
        return noun in UNCOUNTED or not plain
    if closed.adjective:
        after = (words(place.right.lower()) or ["."])[0]
        return not (place.is_predicate and after in AFTER_ADJECTIVE and noun and lexicon().noun_class(noun) != "person")
    return place.subject is not None and (BE | POSITIONED).isdisjoint(place.left.lower().split())


REASONS: dict[str, Callable[[Place], bool]] = {
    "several claims": _is_several_claims,
    "a name": _is_name,
    "another value in the answer": _is_one_of_several,
    "a word that rules do not know": _has_unknown_word,
    "not plainly said of a thing": _is_not_said_of_a_thing,
    "told by the question": _is_told_by_question,
    "told by what the thing is": _is_told_by_the_thing,
    "a question that rules do not know": _has_unknown_question,
    "told by an earlier turn": _is_told_before,
}
NO_OPPOSITE = "no plain opposite"
NO_VALUE = "no value of a closed set"
