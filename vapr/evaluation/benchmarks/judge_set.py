"""Judge sets as configuration: a YAML file says where the questions stand, what a judge is asked, and what counts.

::

    name: mine
    columns: {id: nr, question: question, reference: truth, category: kind, image: file, facts: facts}
    prompt: |
      Question: {question} Known of the picture: {facts} Truth: {reference} Answer: {answer}
      End with a line "Rating: N", N from 0 to 6.
    verdict: {kind: score, pattern: 'rating:\\s*(\\d+)', range: [0, 6]}
    figures:
      score: {kind: mean}
      hallucination_rate: {kind: share, below: 3}

``vapr score FILE --bench mine.yaml=QUESTIONS`` reads the questions from JSON lines, a JSON list, CSV or TSV.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, ConfigFile, Number
from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import NEEDS_A_JUDGE, Benchmark, Judged, Results, reference, unread
from vapr.evaluation.benchmarks.question_rows import read_rows, text_of
from vapr.evaluation.scoring import verdicts
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids
from vapr.evaluation.scoring.verdicts import Verdict

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
NOT_ASKED = ("id", "image", "prediction")
"""Columns that are no placeholders."""
NOT_META = ("id", "question", "reference", "prediction")
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
        if self.headline is not None and self.headline not in self._names:
            raise ValueError(f"headline must be one of {', '.join(self._names)}, got {self.headline!r}")
        return self

    @property
    def _names(self) -> list[str]:
        return [*(["accuracy"] if self.verdict.kind == "yes-no" else []), *self.figures]

    def benchmark(self) -> Benchmark:
        """Return the benchmark that the config describes."""
        return Benchmark(
            name=self.name,
            title=self.title or self.name,
            source=self.source,
            read=partial(read, self),
            gold=reference,
            read_answer=unread,
            headline=self.headline or self._names[0],
            read_results=partial(read_results, self) if "prediction" in self.columns else None,
            scored=NEEDS_A_JUDGE,
            note=self.note,
            judged=Judged(
                prompt=partial(prompt, self),
                read_review=self.verdict.read,
                figures=partial(figures, self),
                no_reference=self.no_reference if "{reference}" in self.prompt else "",
            ),
        )


def load(path: Path) -> Benchmark:
    """Return the benchmark of a YAML file.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    return JudgeSetConfig.load(path).benchmark()


def read(config: JudgeSetConfig, path: Path) -> list[Question]:
    """Read the questions of a set.

    Raises:
        UserError: for a row without a column, or without a reference where others have one.
    """
    questions = []
    without: list[str] = []
    for number, (where, row) in enumerate(read_rows(path), start=1):
        values = {role: _value(row, role, column, where) for role, column in config.columns.items()}
        if not values["question"]:
            raise UserError(f"{where}: '{config.columns['question']}' is empty; a question is needed")
        if "reference" in values and not values["reference"]:
            without.append(where)
        image = values.pop("image", None)
        named = {"image": _picture_name(image)} if image else {}
        meta = {role: value for role, value in values.items() if role not in NOT_META}
        questions.append(
            Question(
                benchmark=config.name, id=values.get("id") or str(number), question=str(values["question"]),
                answer=values.get("reference") or None, meta={**meta, **named},
                images=(_picture(path.parent, image),) if image else (),
            )
        )  # fmt: skip
    if without and len(without) < len(questions):
        raise UserError(f"{without[0]}: '{config.columns['reference']}' is empty, but other rows have a reference")
    check_ids(questions, path)
    return questions


def _value(row: Mapping[str, Any], role: str, column: str, where: str) -> str | None:
    if column not in row and role not in ("reference", "prediction"):
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise UserError(f"{where}: no '{column}' (it has {has}); the set's columns.{role} names it")
    return text_of(row.get(column))


def _picture_name(image: str) -> str:
    """Return the last two parts of a path or URL: names alone are not unique everywhere."""
    return "/".join(image.rstrip("/").split("/")[-2:])


def _picture(folder: Path, image: str) -> Path:
    """Return where a picture lies: below the folder of the questions, or below ``images/`` there."""
    parts = image.split("://")[-1].split("/")
    names = [Path(*parts[-count:]) for count in range(min(len(parts), 3), 0, -1)]
    places = [folder / below / name for name in names for below in ("", "images")]
    return next((at for at in places if at.is_file()), folder / "images" / names[-1])


def read_results(config: JudgeSetConfig, path: Path, questions: Sequence[Question]) -> Results:
    """Read answers that stand in the questions' own layout, joined by id, or else by picture and question.

    Raises:
        UserError: for a row without an answer, or of no question.
    """
    by_key = {_key(config, q.id, q.question, q.meta.get("image")): q for q in questions}
    if len(by_key) < len(questions):
        raise UserError(f"{path}: some questions are equal, picture included; the set needs columns.id to tell them")
    predictions = []
    for where, row in read_rows(path):
        values = {role: _value(row, role, column, where) for role, column in config.columns.items()}
        image = values.get("image")
        key = _key(config, values.get("id"), str(values["question"]), image and _picture_name(image))
        if key not in by_key:
            raise UserError(f"{where}: {str(values['question'])[:60]!r} is no question of {config.name}")
        if config.columns["prediction"] not in row:
            raise UserError(f"{where}: no '{config.columns['prediction']}', which holds the answer")
        predictions.append(Prediction.of(by_key[key], values["prediction"] or ""))
    check_ids(predictions, path)
    return Results(predictions)


def _key(config: JudgeSetConfig, name: str | None, question: str, image: str | None) -> tuple[str | None, ...]:
    return (name,) if "id" in config.columns else (question, image)


def prompt(config: JudgeSetConfig, prediction: Prediction) -> str:
    """Return what a judge is asked about an answer. What the answer says in braces stays as it is.

    Raises:
        UserError: if a value is missing.
    """
    values = {**prediction.meta, "question": prediction.question, "answer": prediction.prediction}
    values["reference"] = reference(prediction)

    def fill(found: re.Match[str]) -> str:
        value = values.get(found[1])
        if value is None and (found[1] == "reference" or found[1] not in values):
            raise UserError(
                f"question '{prediction.id}' of {config.name}: no {found[1]} for the judge; "
                f"{config.no_reference if found[1] == 'reference' else 'give the questions, too: --bench SET=PATH'}"
            )
        return "" if value is None else str(value)

    return PLACEHOLDER.sub(fill, config.prompt)


def figures(
    config: JudgeSetConfig, predictions: Sequence[Prediction], given: Sequence[Verdict], seed: int
) -> Mapping[str, Figure]:
    """Return the figures that the config names, and of yes and no the accuracy."""
    pictures = [prediction.image for prediction in predictions]
    made = {"accuracy": verdicts.share_within(given, pictures, 1)} if config.verdict.kind == "yes-no" else {}
    for name, figure in config.figures.items():
        if figure.kind == "mean":
            made[name] = verdicts.mean(given, pictures, seed)
        elif figure.kind == "ratio":
            made[name] = verdicts.ratio(given, pictures, seed)
        else:
            bounds = {"at_least": figure.at_least, "below": figure.below}
            made[name] = verdicts.share_within(given, pictures, **{k: v for k, v in bounds.items() if v is not None})
    return made


PACKAGED = {name: load(Path(__file__).with_name(f"{name}.yaml")) for name in ("contextual", "mmhal")}
"""Judge sets that come with vapr."""
