"""Keys of a judge set's YAML file; :mod:`vapr.evaluation.benchmarks.judge_set` makes a benchmark of it."""

import re
from functools import cached_property
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, ConfigFile, Number
from vapr.evaluation.scoring import verdicts
from vapr.evaluation.scoring.verdicts import Verdict

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
NOT_ASKED = ("id", "image", "prediction")
"""Columns that are no placeholders."""
YES_NO_PATTERN = r"\bjudge?ment\W{1,9}(yes|no)\b"
CHARACTERS = r"[a-z0-9][a-z0-9._-]*"


@dataclass(frozen=True, kw_only=True, config=SECTION)
class VerdictConfig:
    """How a review is read."""

    kind: Literal["score", "yes-no"]
    """``score``: a number; ``yes-no``: whether the answer is right."""
    pattern: str = YES_NO_PATTERN
    """Regular expression (case does not matter, ^ and $ are of a line) whose group ``score``, or first, is the number
    or yes or no, and whose group ``reference`` is the number of the reference, if that is rated, too. A review in which
    it is found nowhere, or with two results, is unparsed."""
    range: tuple[Number, Number] | None = None
    """Lowest and highest score; a review with another is unparsed."""

    @field_validator("pattern")
    @classmethod
    def _compile(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"verdict.pattern: {pattern!r} is no regular expression ({error})") from None
        names = re.compile(pattern).groupindex
        if not groups or ("reference" in names and "score" not in names):
            raise ValueError(
                f"verdict.pattern: {pattern!r} lacks a group for the score; write (...), or (?P<score>...) beside a "
                "(?P<reference>...)"
            )
        return pattern

    @model_validator(mode="after")
    def _have_a_range(self) -> Self:
        if self.kind == "score" and (self.range is None or self.range[0] >= self.range[1]):
            raise ValueError("verdict.range must be the lowest and the highest score, such as [0, 6]")
        if self.kind == "yes-no" and self.range is not None:
            raise ValueError("verdict.range is of scores; leave it out where the verdict is yes or no")
        if self.kind == "score" and self.pattern == YES_NO_PATTERN:
            raise ValueError(r"verdict.pattern is missing; give one such as 'rating:\s*(\d+)'")
        return self

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE | re.MULTILINE)

    def read(self, review: str) -> Verdict | None:
        """Return what a review says; None if it does not say it."""
        if self.kind == "yes-no" or self.range is None:
            return verdicts.read_yes_no(review, self.compiled)
        return verdicts.read_scores(review, self.compiled, *self.range)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class FigureConfig:
    """How verdicts combine."""

    kind: Literal["mean", "share", "ratio"]
    """``mean`` of the scores; ``share`` of those in a range; ``ratio``: 100 times the mean over the reference's."""
    at_least: Number | None = None
    """Of ``share``: from this score on."""
    below: Number | None = None
    """Of ``share``: up to this score, itself not included."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class JudgeSetConfig(ConfigFile):
    """A judge set."""

    OTHER_THING: ClassVar = (
        "{path}: {found}, but a judge set (YAML) is wanted here, with name, columns, prompt and verdict; its questions "
        "come after it: --bench SET.yaml=QUESTIONS"
    )

    name: str
    """What predictions call the benchmark: small letters, digits, dots and hyphens."""
    columns: dict[str, str]
    """Columns of the questions' file: ``question``, and as far as there are any ``id``, ``reference``, ``category``,
    ``image``, and ``prediction`` (for answers in the same layout); any other becomes a placeholder."""
    prompt: str
    """What the judge is asked, with {question}, {answer}, {reference}, {category} and the other columns."""
    verdict: VerdictConfig
    figures: dict[str, FigureConfig] = Field(default={})
    """What is made of the verdicts, by name. Those of ``yes-no`` also make the ``accuracy``."""
    headline: str | None = None
    """The figure that people quote. Without it: the first, of ``yes-no`` the ``accuracy``."""
    title: str | None = None
    """What people call the set."""
    source: str = ""
    """Where it comes from."""
    no_reference: str = "the questions hold no reference answers, so that nothing can be compared with"
    """What to say where the whole column ``reference`` is missing or empty."""
    note: str = ""
    """Shown beside the score."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not re.fullmatch(CHARACTERS, self.name):
            raise ValueError(f"name must be small letters, digits, dots and hyphens, got {self.name!r}")
        if "question" not in self.columns:
            raise ValueError("columns.question is missing: the column that holds the question")
        known = {"question", "answer", *self.columns} - set(NOT_ASKED)
        for name in PLACEHOLDER.findall(self.prompt):
            if name not in known:
                raise ValueError(f"prompt: {{{name}}} is no placeholder; there are {', '.join(sorted(known))}")
        if "{answer}" not in self.prompt:
            raise ValueError("prompt: no {answer} in it, so that the judge would not see what it judges")
        for name, figure in self.figures.items():
            bounds = (figure.at_least, figure.below)
            if (figure.kind == "share") == (bounds == (None, None)):
                raise ValueError(f"figures.{name}: a share needs at_least or below, and no other kind has them")
            if figure.kind == "ratio" and "reference" not in self.verdict.compiled.groupindex:
                raise ValueError(f"figures.{name}: a ratio needs a group (?P<reference>...) in verdict.pattern")
        if self.verdict.kind == "score" and not self.figures:
            raise ValueError("figures must be non-empty for verdicts that are scores, such as {score: {kind: mean}}")
        if self.headline is not None and self.headline not in self.figure_names:
            raise ValueError(f"headline must be one of {', '.join(self.figure_names)}, got {self.headline!r}")
        return self

    @property
    def figure_names(self) -> list[str]:
        """Names of all that is made of the verdicts, the one that people quote by default first."""
        return [*(["accuracy"] if self.verdict.kind == "yes-no" else []), *self.figures]
