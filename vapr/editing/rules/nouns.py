"""Nouns: the class one belongs to, and whether two name the same thing or kinds of one another.

Knows the nouns of ``nouns.yaml`` and, given a folder of WordNet's files, WordNet's.
"""

import functools
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vapr.errors import UserError

if TYPE_CHECKING:
    import inflect

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
WORDS = re.compile(rf"{WORD.pattern}(?: {WORD.pattern})*")
OTHER = "other"
GENERAL = frozenset((
    "thing", "object", "item", "something", "anything", "stuff", "entity", "artifact", "device", "utensil", "dish",
))  # fmt: skip
"""Words for things of several classes; the lists have those for things of one."""
UNCOUNTED = frozenset((
    "water", "snow", "rain", "ice", "sand", "mud", "dirt", "soil", "grass", "fog", "mist", "smoke", "lightning", "hair",
    "fur", "rice", "bread", "milk", "coffee", "tea", "juice", "wine", "beer", "soda", "popcorn", "cereal", "butter",
    "cheese", "meat", "bacon", "broccoli", "lettuce", "spinach", "corn", "ketchup", "mustard", "food", "furniture",
    "luggage", "traffic", "jewelry", "jewellery", "graffiti", "text", "writing", "fruit", "pasta", "spaghetti",
    "macaroni", "silverware", "cutlery", "tableware", "kitchenware", "stationery", "paper", "toilet paper", "cardboard",
    "clothing", "apparel", "equipment", "gear", "money", "cash", "trash", "garbage", "litter", "rubbish", "waste",
    "vegetation", "greenery", "foliage", "ivy", "hay", "wood", "metal", "plastic", "sugar", "salt", "pepper",
    "flour", "honey", "oil", "cream", "whipped cream", "ice cream", "mayonnaise", "gravy", "jam", "jelly", "sauce",
    "soup", "salad", "seafood", "sushi", "beef", "pork", "ham", "toast", "chocolate", "candy", "celery", "cabbage",
    "cauliflower", "garlic", "parsley", "lemonade", "champagne", "espresso", "bottled water", "alcohol", "steam",
    "dust", "gravel", "sunlight", "light", "electricity", "makeup", "music", "shrimp", "maize", "squash", "wildlife",
    "livestock", "cattle", "poultry", "space", "room", "parking", "evidence", "damage", "action", "activity",
))  # fmt: skip
"""Of what there is "some", not "a": "some fruit", "some toilet paper"."""


@functools.cache
def english() -> "inflect.engine":
    """The grammar of English nouns, imported when it is asked: that takes a second."""
    import inflect

    return inflect.engine()


class Nouns:
    """The lexicon.

    Args:
        wordnet: folder with WordNet's ``index.noun`` and ``data.noun``, or None.

    Raises:
        UserError: if there is no WordNet in that folder.
    """

    def __init__(self, wordnet: Path | None = None) -> None:
        self._classes: dict[str, str] = {}
        self._above: dict[str, set[str]] = {}  # noun -> its synonyms and everything it is a kind of
        self._wordnet = WordNet(wordnet) if wordnet is not None else None
        tree = yaml.safe_load((resources.files("vapr.editing.rules") / "nouns.yaml").read_text(encoding="utf-8"))
        for name, entries in tree.items():
            names = name.split("|")
            for noun in names:
                self._above.setdefault(noun, set()).update(names)
            self._add(entries, names[0], set(names))

    def _add(self, entries: list[Any], noun_class: str, above: set[str]) -> None:
        for entry in entries:
            nested = entry if isinstance(entry, dict) else {entry: []}
            for names, kinds in nested.items():
                nouns = [noun.strip().lower() for noun in str(names).split("|")]
                here = above | set(nouns)
                for noun in nouns:
                    self._classes.setdefault(noun, noun_class)
                    self._above.setdefault(noun, set()).update(here)
                self._add(kinds, noun_class, here)

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Known nouns in a text, of two words or one: start, end and singular."""
        matches = list(WORD.finditer(text))
        at = 0
        while at < len(matches):
            for size in (2, 1):
                part = matches[at : at + size]
                phrase = text[part[0].start() : part[-1].end()]
                if len(part) == size and (noun := self.known(phrase)):
                    yield part[0].start(), part[-1].end(), noun
                    at += size - 1
                    break
            at += 1

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 - one lexicon lives as long as the job
    def known(self, phrase: str) -> str | None:
        """The lexicon's singular of a noun; None if it is not there."""
        return next((form for form in (phrase.lower(), singular(phrase)) if form in self._classes), None)

    def noun_class(self, noun: str) -> str:
        """``animal`` for a dog; ``other`` if the lexicon has no such noun."""
        known = self.known(noun)
        return self._classes[known] if known else OTHER

    def related(self, one: str, other: str) -> str | None:
        """Why two nouns can name one thing, in words; None where nothing says that they can."""
        a, b = (singular(noun) for noun in (one, other))
        if a == b:
            return "the same noun"
        if a in GENERAL or b in GENERAL:
            return f"'{a if a in GENERAL else b}' can be said of many things"
        if a in self._above.get(b, ()) or b in self._above.get(a, ()):
            return "synonyms, or one a kind of the other"
        if self._wordnet is not None:
            return self._wordnet.related(a, b)
        return None


SINGULARS_IN_S = frozenset((
    "lens", "canvas", "atlas", "alias", "chaos", "tennis", "gymnastics", "athletics", "christmas", "texas", "pancreas",
    "always", "perhaps",
))  # fmt: skip


@functools.lru_cache(maxsize=20_000)
def singular(noun: str) -> str:
    """Lower-case singular of a noun; a singular stays, and so does what is not words."""
    text = noun.lower()
    if text == "men":
        return "man"
    # inflect takes away the s of singulars, too, and stumbles over what is not words
    if text.endswith(("ss", "us", "is")) or text in SINGULARS_IN_S or len(text) <= 3 or not WORDS.fullmatch(text):
        return text
    return english().singular_noun(text) or text


class WordNet:
    """Synonyms and hypernyms out of WordNet's own files (``data.noun``, ``index.noun``; wndb(5WN))."""

    def __init__(self, folder: Path) -> None:
        try:
            self._index = self._read_index(folder / "index.noun")
            self._data = (folder / "data.noun").read_bytes()
        except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
            raise UserError(f"checks.wordnet: {folder}: no WordNet there ({error})") from None

    @staticmethod
    def _read_index(file: Path) -> dict[str, list[int]]:
        index = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                lemma, _, num_senses, *rest = line.split()
                index[lemma] = [int(offset) for offset in rest[-int(num_senses) :]]
        return index

    def related(self, one: str, other: str) -> str | None:
        """As :meth:`Nouns.related`. Only the two most common senses of each count: rare ones make everything alike."""
        a, b = (self._index.get(noun.replace(" ", "_"), [])[:2] for noun in (one, other))
        if set(a) & set(b):
            return "synonyms in WordNet"
        if any(self._hypernyms(sense) & set(b) for sense in a) or any(self._hypernyms(s) & set(a) for s in b):
            return "one a kind of the other in WordNet"
        return None

    @functools.lru_cache(maxsize=10_000)  # noqa: B019 - one lexicon lives as long as the job
    def _hypernyms(self, sense: int) -> frozenset[int]:
        fields = self._data[sense : self._data.index(b"\n", sense)].decode().split(" | ")[0].split()
        pointers = fields[5 + 2 * int(fields[3], 16) - 1 :]
        direct = [int(pointers[n + 1]) for n, mark in enumerate(pointers) if mark in ("@", "@i")]
        return frozenset(direct).union(*(self._hypernyms(above) for above in direct))
