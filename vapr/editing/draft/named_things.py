"""Checks of the things that a question and an answer name: what was replaced, and what is named besides.

Each returns why an edit is bad, or None.
"""

import re
from collections.abc import Sequence

from vapr.data.pair import Edit
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.operations import spliced
from vapr.text import sentences

OFFERS = re.compile(
    r"\b(?:or|which|between|(?:is|are|was|were|does|do|did) (?:this|that|these|those|it|they))\b", re.IGNORECASE
)


def named_in_question(question: str, chosen: str, edits: Sequence[Edit], nouns: Nouns) -> str | None:
    """Asked what the woman with the cup carries, "a cup" may be as true as what the answer says.

    Not where the question offers what to answer ("a dog or a cat?"), nor where the answer has named the thing itself.
    """
    if OFFERS.search(question):
        return None
    asked = _named(question, nouns) - _named(chosen, nouns)
    named = next((noun for edit in edits for *_, noun in nouns.find(edit.to) if noun in asked), None)
    return f"the question speaks of '{named}', so it may be true; name a thing that it does not" if named else None


def asked_about(question: str, chosen: str, edits: Sequence[Edit], nouns: Nouns) -> str | None:
    """Asked what the player carries, "The bus is carrying a jacket." answers another question.

    The replaced noun is one of the question, and what the answer tells beyond the question, the jacket, stays.
    """
    asked = _named(question, nouns)
    if OFFERS.search(question) or not _named(outside(chosen, edits), nouns) - asked:
        return None
    for edit in edits:
        old, new = _named(chosen[edit.start : edit.end], nouns), _named(edit.to, nouns)
        if old and old <= asked and (gone := old - new):
            return f"the question is about '{min(gone)}'; leave it, and change what the answer says of it"
    return None


def named_twice(chosen: str, edits: Sequence[Edit], nouns: Nouns) -> str | None:
    """The farmer does not carry the farmer; and what was a cat must not be called a cat further on."""
    rest = _named(outside(chosen, edits), nouns)
    for edit in edits:
        old, new = _named(chosen[edit.start : edit.end], nouns), _named(edit.to, nouns)
        if added := (new - old) & rest:
            return f"the answer speaks of '{min(added)}' already; name a thing that it does not"
        if left := (old - new) & rest:
            return f"the answer speaks of '{min(left)}' in another place, too; change both, or something else"
    return None


def _named(text: str, nouns: Nouns) -> set[str]:
    return {noun for *_, noun in nouns.find(text)}


def outside(chosen: str, edits: Sequence[Edit]) -> str:
    """The answer with a line break for every span: no noun of two words is found across one."""
    return spliced(chosen, [Edit(edit.start, edit.end, "\n") for edit in edits])


INSTEAD = re.compile(r"\binstead\b(?! of)", re.IGNORECASE)


def carried_on(chosen: str, rejected: str, nouns: Nouns) -> str | None:
    """ "Yes, there is a vase." must not be followed by "The room has a desk, but no vase." """
    before, after = sentences(chosen), sentences(rejected)
    turned = _named(" ".join(sentence for sentence in before if sentence not in after), nouns)
    for sentence in (sentence for sentence in after if sentence in before):
        if INSTEAD.search(sentence):
            return "a sentence with 'instead' must turn as well"
        if again := turned & _named(sentence, nouns):
            return f"a sentence still speaks of '{min(again)}' as before; turn it as well"
    return None
