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
from functools import partial
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import NEEDS_A_JUDGE, Benchmark, Judged, Results, reference, unread
from vapr.evaluation.benchmarks.judge_set_config import PLACEHOLDER, JudgeSetConfig
from vapr.evaluation.benchmarks.rows import read_rows
from vapr.evaluation.scoring import verdicts
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids
from vapr.evaluation.scoring.verdicts import Verdict

NOT_META = ("id", "question", "reference", "prediction")


def load(path: Path) -> Benchmark:
    """Return the benchmark of a YAML file.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    return of_config(JudgeSetConfig.load(path))


def of_config(config: JudgeSetConfig) -> Benchmark:
    """Return the benchmark that a config describes."""
    return Benchmark(
        name=config.name,
        title=config.title or config.name,
        source=config.source,
        read=partial(read, config),
        gold=reference,
        read_answer=unread,
        headline=config.headline or config.figure_names[0],
        read_results=partial(read_results, config) if "prediction" in config.columns else None,
        scored=NEEDS_A_JUDGE,
        note=config.note,
        judged=Judged(
            prompt=partial(prompt, config),
            read_review=config.verdict.read,
            figures=partial(figures, config),
            no_reference=config.no_reference if "{reference}" in config.prompt else "",
        ),
    )


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
    """Return a value as a judge reads it, lists with commas; None for none and for an empty text."""
    if column not in row and role not in ("reference", "prediction"):
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise UserError(f"{where}: no '{column}' (it has {has}); the set's columns.{role} names it")
    value = row.get(column)
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return None if value is None or not str(value).strip() else str(value)


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
