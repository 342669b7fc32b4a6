"""Nouns: the class one belongs to, and whether two name the same thing or kinds of one another.

Knows the nouns of ``nouns.yaml`` and, given a folder of WordNet's files, WordNet's.
"""

import functools
import re
from collections.abc import Iterator, Set
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vapr.errors import UserError
from vapr.text import words

if TYPE_CHECKING:
    import inflect

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
OTHER = "other"


def read_data(name: str) -> Any:
    """Return what a YAML file of this folder holds."""
    return yaml.safe_load((resources.files("vapr.editing.rules") / name).read_text(encoding="utf-8"))


WORD_LISTS = read_data("words.yaml")
GENERAL, UNCOUNTED = (frozenset(WORD_LISTS[name].split(", ")) for name in ("general", "uncounted"))
IN_ANSWERS = frozenset(WORD_LISTS["anywhere"].split())
IN_QUESTIONS = IN_ANSWERS | set(WORD_LISTS["question"].split())


@functools.cache
def english() -> "inflect.engine":
    """Return the grammar of English nouns, imported when it is asked: that takes a second."""
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
        for name, entries in read_data("nouns.yaml").items():
            names = name.split("|")
            self._add([{name: entries}], names[0], set())

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
        """Yield the known nouns of a text, of two words or one: start, end and singular."""
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
        """Return the lexicon's singular of a noun; None if it is not there."""
        return next((form for form in (phrase.lower(), singular(phrase)) if form in self._classes), None)

    def noun_class(self, noun: str) -> str:
        """Return ``animal`` for a dog; ``other`` if the lexicon has no such noun."""
        known = self.known(noun)
        return self._classes[known] if known else OTHER

    def is_one_of(self, noun: str, kinds: list[str]) -> bool:
        """Return whether a noun of the lexicon is one of these nouns, or a kind of one."""
        return not self._above.get(noun, set()).isdisjoint(kinds)

    def related(self, one: str, other: str) -> str | None:
        """Return why two nouns can name one thing, in words; None where nothing says that they can."""
        a, b = (singular(noun) for noun in (one, other))
        if a == b:
            return "the same noun"
        if a in GENERAL or b in GENERAL:
            return f"'{a if a in GENERAL else b}' can be said of many things"
        if a in self._above.get(b, ()) or b in self._above.get(a, ()):
            return "synonyms, or one a kind of the other"
        return self._wordnet.related(a, b) if self._wordnet is not None else None


@functools.cache
def lexicon() -> Nouns:
    """Return the nouns of ``nouns.yaml``."""
    return Nouns()


def unknown_words(text: str, known: Set[str] = IN_ANSWERS) -> list[str]:
    """Return the words and marks of a text that are neither known nor nouns of the lexicon."""
    rest, at = [], 0
    for start, end, _ in lexicon().find(text):
        rest += words(text[at:start])
        at = end
    plain = (word.lower().replace("’", "'") for word in rest + words(text[at:]))
    return [word for word in plain if word not in known and lexicon().known(word.removesuffix("'s")) is None]


SINGULARS_IN_S = frozenset((
    "lens", "canvas", "atlas", "alias", "chaos", "tennis", "gymnastics", "athletics", "christmas", "texas", "pancreas",
    "always", "perhaps",
))  # fmt: skip


@functools.lru_cache(maxsize=20_000)
def singular(noun: str) -> str:
    """Return the lower-case singular of a noun; a singular stays, and so does what is not words."""
    text = noun.lower()
    if text == "men":
        return "man"
    # inflect takes away the s of singulars, too, and stumbles over what is not words
    if text.endswith(("ss", "us", "is")) or text in SINGULARS_IN_S or len(text) <= 3:
        return text
    if not all(map(WORD.fullmatch, text.split(" "))):
        return text
    return english().singular_noun(text) or text


class WordNet:
    """Synonyms and hypernyms out of WordNet's own files (``data.noun``, ``index.noun``; wndb(5WN))."""

    def __init__(self, folder: Path) -> None:
        self._index: dict[str, list[int]] = {}
        try:
            self._data = (folder / "data.noun").read_bytes()
            for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
                if not line.startswith(" "):
                    lemma, _, num_senses, *rest = line.split()
                    self._index[lemma] = [int(offset) for offset in rest[-int(num_senses) :]]
        except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
            raise UserError(f"checks.wordnet: {folder}: no WordNet there ({error})") from None

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
