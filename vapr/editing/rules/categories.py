"""Task categories as data: when one applies, what an edit must change and leave alone, its closed sets of values.

Each is a YAML file in ``vapr/editing/categories/``; a user's own file adds or replaces one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vapr.errors import UserError
from vapr.yaml_file import read_yaml

CheckName = Literal["other_value", "other_number", "opposite", "not_related", "polarity", "other_text", "conclusion"]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r:.60} is no regular expression ({error})") from None
    return text


Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Part):
    """When a category applies: everything that is given must hold. Patterns are searched for, case ignored."""

    id: str
    question: str | None = None
    answer: str | None = None
    not_question: str | None = None
    not_answer: str | None = None
    min_answer_words: int | None = None
    max_answer_words: int | None = None

    @pydantic.field_validator("question", "answer", "not_question", "not_answer")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return None if value is None else _pattern(value)

    @cached_property
    def _patterns(self) -> list[tuple[bool, bool, re.Pattern[str]]]:
        """(in the answer, wanted, pattern) of those that are given."""
        given = (
            (False, True, self.question), (True, True, self.answer), (False, False, self.not_question),
            (True, False, self.not_answer),
        )  # fmt: skip
        return [(place, wanted, re.compile(text, re.IGNORECASE)) for place, wanted, text in given if text is not None]

    def fits(self, question: str, answer: str) -> bool:
        if self.min_answer_words is not None or self.max_answer_words is not None:
            count = len(answer.split())
            if not (self.min_answer_words or 0) <= count <= (self.max_answer_words or 10**9):
                return False
        for in_answer, wanted, pattern in self._patterns:
            if (pattern.search(answer if in_answer else question) is not None) != wanted:
                return False
        return True


class Value(NamedTuple):
    """A member of a closed set where it stands in a text."""

    set: "ClosedSet"
    start: int
    end: int
    text: str
    group: int

    @property
    def name(self) -> str:
        return self.text.lower()


WORD = re.compile(r"\w+")
CONTEXT = 80
"""Characters beside a value that the patterns of a set see."""


class ClosedSet(_Part):
    """Values of which one can take another's place: within a group, but not a near-synonym's.

    ``before`` and ``after`` (one of each must be found) and ``not_before`` and ``not_after`` (none may be) are patterns
    for the text beside a value; anchor them with ``$`` and ``^``. ``not_around`` are patterns that must not be found in
    the value with the text on both sides: "an orange." is a fruit, "an orange hat" a colour. Values of a set that is
    ``adjective`` count only right before a known noun or at the end of a clause, those that are ``said_of`` classes of
    nouns only where their subject is of one.
    """

    name: str
    groups: Annotated[list[Annotated[list[Text], Field(min_length=1)]], Field(min_length=1)]
    same: list[list[str]] = []
    by_noun: bool = False
    by_source: bool = False
    adjective: bool = False
    said_of: list[str] = []
    before: list[str] = []
    after: list[str] = []
    not_before: list[str] = []
    not_after: list[str] = []
    not_around: list[str] = []

    @pydantic.field_validator("before", "after", "not_before", "not_after", "not_around", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("before", "after", "not_before", "not_after", "not_around")
    @classmethod
    def _compile(cls, value: list[str]) -> list[str]:
        return [_pattern(text) for text in value]

    @cached_property
    def _alike(self) -> dict[str, set[str]]:
        alike: dict[str, set[str]] = {value: {value} for value in self.members}
        for near in self.same:
            for value in near:
                alike.setdefault(value.lower(), set()).update(other.lower() for other in near)
        return alike

    @cached_property
    def members(self) -> dict[str, int]:
        """Lower-case value -> the number of its group."""
        return {value.lower(): number for number, group in enumerate(self.groups) for value in group}

    def near(self, value: str) -> set[str]:
        """Values in lower case that can be said of what this one is said of: itself, and near-synonyms."""
        return self._alike.get(value.lower(), set())

    def alike(self, one: str, other: str) -> bool:
        """Tell whether two values can be said of one thing: equal, or near-synonyms."""
        return other.lower() in self.near(one)

    @cached_property
    def first_words(self) -> frozenset[str]:
        """The words that members begin with, in lower case: a text that has none of them holds no member."""
        return frozenset(word[0] for member in self.members if (word := WORD.search(member)))

    @cached_property
    def _found(self) -> re.Pattern[str]:
        return _whole_words(self.members)

    @cached_property
    def _named(self) -> re.Pattern[str]:
        return _whole_words(self._alike)

    @cached_property
    def _context(self) -> tuple[list[re.Pattern[str]], ...]:
        given = (self.before, self.not_before, self.after, self.not_after, self.not_around)
        return tuple([re.compile(pattern, re.IGNORECASE) for pattern in patterns] for patterns in given)

    def find(self, text: str) -> list[Value]:
        """Values in a text that stand for what the set means, in order."""
        before, not_before, after, not_after, not_around = self._context
        found = []
        for match in self._found.finditer(_lower(text)):
            left = text[max(0, match.start() - CONTEXT) : match.start()]
            right = text[match.end() : match.end() + CONTEXT]
            said = text[match.start() : match.end()]
            if before and not any(pattern.search(left) for pattern in before):
                continue
            if after and not any(pattern.search(right) for pattern in after):
                continue
            if any(pattern.search(left) for pattern in not_before) or any(p.search(right) for p in not_after):
                continue
            if any(pattern.search(left + said + right) for pattern in not_around):
                continue
            found.append(Value(self, match.start(), match.end(), said, self.members[match[0]]))
        return found

    def named(self, text: str) -> list[tuple[int, str]]:
        """Return where a text names members or near-synonyms, whatever they mean there: start and lower-case value."""
        return [(match.start(), match[0]) for match in self._named.finditer(_lower(text))]


def _whole_words(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def _lower(text: str) -> str:
    """The text in lower case, every character in its place: there are capitals that become two."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


class ExampleEdit(_Part):
    """An operation of a worked pair."""

    find: str
    replace: str
    why_wrong: str


class Example(_Part):
    """A worked pair, shown to the language model."""

    question: str
    answer: str
    edits: list[ExampleEdit] = []
    rewritten: str | None = None
    why_wrong: str | None = None


class Category(_Part):
    """One kind of error; docs/edit.md explains its keys."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    title: str
    order: int
    applies: list[Rule] = []
    values: list[ClosedSet] = []
    values_of: list[str] = []
    change: str
    keep: str
    mode: Literal["edits", "rewrite"] = "edits"
    min_edits: int = Field(1, ge=1)
    max_edits: int = Field(1, ge=1, le=20)
    checks: list[CheckName] = []
    examples: list[Example] = []

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> "Category":
        if self.max_edits < self.min_edits:
            raise ValueError(f"max_edits ({self.max_edits}) is below min_edits ({self.min_edits})")
        for example in self.examples:
            if self.mode == "rewrite" and (example.rewritten is None or example.why_wrong is None):
                raise ValueError("an example of a rewrite needs 'rewritten' and 'why_wrong'")
            if self.mode == "edits" and not example.edits:
                raise ValueError("an example needs 'edits'")
            for edit in example.edits:
                if example.answer.count(edit.find) != 1:
                    raise ValueError(f"example: '{edit.find}' must occur once in '{example.answer:.60}'")
        return self

    def all_values(self, text: str) -> list[Value]:
        """Values of its closed sets in a text, set by set; they may overlap."""
        return [value for closed in self._sets_in(text) for value in closed.find(text)]

    def _sets_in(self, text: str) -> list[ClosedSet]:
        words = set(WORD.findall(text.lower()))
        return [closed for closed in self.values if not words.isdisjoint(closed.first_words)]

    def find_values(self, answer: str) -> list[Value]:
        """Values of its closed sets in an answer, in order; of overlapping ones the longest."""
        found = sorted(self.all_values(answer), key=lambda value: (value.start, value.start - value.end))
        kept: list[Value] = []
        for value in found:
            if not kept or value.start >= kept[-1].end:
                kept.append(value)
        return kept


class Categories:
    """The categories of a job, by the order of their rules.

    Attributes:
        digest: sha256 of everything in them, for prompts and provenance.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.all = sorted(categories, key=lambda category: (category.order, category.name))
        self._by_name = {category.name: category for category in self.all}
        text = json.dumps([category.model_dump() for category in self.all], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __getitem__(self, name: str) -> Category:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.all]

    def by_rule(self, question: str, answer: str) -> Iterator[tuple[Category, str]]:
        """Categories whose rules fit, the first to be tried first, with ``category:rule``."""
        for category in self.all:
            rule = next((rule for rule in category.applies if rule.fits(question, answer)), None)
            if rule is not None:
                yield category, f"{category.name}:{rule.id}"


def load_categories(names: Sequence[str] | None = None, files: Sequence[str] = ()) -> Categories:
    """vapr's categories and those of a user's files.

    Args:
        names: which of them; None takes all.
        files: YAML files, of one category each; a known name replaces vapr's.

    Raises:
        UserError: naming the file and what is wrong in it, or the unknown name.
    """
    folder = resources.files("vapr.editing.rules") / "categories"
    shipped = [Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")]
    loaded = {}
    for file in [*sorted(shipped), *map(Path, files)]:
        category = read_category(file)
        loaded[category.name] = category
    for name in names if names is not None else ():
        if name not in loaded:
            raise UserError(f"plan.categories: no category '{name}'; there are {', '.join(loaded)}")
    used = [_with_values(category, loaded) for category in loaded.values() if names is None or category.name in names]
    return Categories(used)


def _with_values(category: Category, loaded: dict[str, Category]) -> Category:
    """The category with the closed sets of those it borrows from: a caption holds colours, numbers and sides."""
    borrowed = []
    for name in category.values_of:
        if name not in loaded:
            raise UserError(f"category '{category.name}': values_of names '{name}'; there are {', '.join(loaded)}")
        borrowed += loaded[name].values
    return category.model_copy(update={"values": [*category.values, *borrowed]}) if borrowed else category


def read_category(file: Path) -> Category:
    """One category of a YAML file. Raises UserError, naming the file."""
    try:
        return Category.model_validate(read_yaml(file))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{file}: {f'{place}: ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
