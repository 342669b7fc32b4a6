"""What ``vapr eval`` does: several models answer several benchmarks, one result folder each."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.compare.compare_folders import compare_folders
from vapr.evaluation.generation.evaluate import Evaluation, Options
from vapr.evaluation.generation.open_model import Answerer
from vapr.evaluation.generation.prompts import check_images
from vapr.evaluation.generation.record import AskedSet
from vapr.evaluation.generation.sample import sample
from vapr.evaluation.readers.open import open_benchmark
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.prediction import check_ids
from vapr.study.find_model import find


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model's result folder, and the scores in it."""

    name: str
    model: str
    folder: Path
    scores: dict[str, Any]
    benches: dict[str, str]  # NAME=PATH, by benchmark
    cut_off: int  # answers that reached the limit of tokens

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "name": self.name,
            "model": self.model,
            "folder": str(self.folder),
            "cut_off": self.cut_off,
            "scores": self.scores,
        }


def evaluate_models(
    models: Sequence[str], benches: Sequence[str], out: Path, options: Options, *,
    limit: int | None = None, say: Callable[[str], None] = print, quiet: bool = False,
) -> list[Evaluated]:  # fmt: skip
    """Let models answer benchmarks, and score them.

    Everything that can be found wrong with questions, pictures, models and folders is found before weights are loaded.

    Args:
        models: what :func:`vapr.study.find_model.find` takes.
        benches: ``NAME=PATH`` each.
        out: the result folder of one model, or of several the folder of their result folders.
        options: how answers are generated and read.
        limit: ask about so many questions of each benchmark.
        say: called with lines on what was found and is done.
        quiet: show no progress.

    Raises:
        UserError: naming what cannot be used.
        Stopped: by a signal; answers so far are kept.
    """
    sets = open_sets(benches, limit, options.settings.seed)
    for one in sets:
        if len(one.questions) < one.of:
            say(f"{one.benchmark.name}: {len(one.questions):,} of {one.of:,} questions are asked (--limit {limit})")
    sizes = check_images([question for one in sets for question in one.questions])
    answerers = named_apart([find(model) for model in models])
    folders = [out] if len(answerers) == 1 else [out / one.name for one in answerers]
    evaluations = [
        Evaluation(answerer, sets, sizes, options, folder)
        for answerer, folder in zip(answerers, folders, strict=True)
    ]  # fmt: skip
    given = {one.benchmark.name: one.given for one in sets}
    evaluated = []
    while evaluations:  # and let each go with the pictures that it remembers
        evaluation = evaluations.pop(0)
        for note in evaluation.notes:
            say(note)
        answers = evaluation.answer(say, quiet=quiet)
        cut_off = sum(bool(one.meta.get("cut_off")) for part in answers.values() for one in part)
        scores = evaluation.score(answers, say)
        answerer = evaluation.answerer
        evaluated.append(Evaluated(answerer.name, answerer.given, evaluation.folder, scores, given, cut_off))
    return evaluated


def write_comparison(
    evaluated: Sequence[Evaluated], out: Path, policy: Policy, *, say: Callable[[str], None] = print
) -> None:
    """Write ``comparison.html`` and ``comparison.json`` of several models into the folder of their folders."""
    page = out / "comparison.html"
    try:
        compare_folders([one.folder for one in evaluated], page, policy, say=lambda line: None)
    except UserError as error:
        say(f"the answers are not compared: {error}")
    else:
        say(f"what changed, question by question: {page}")


def open_sets(benches: Sequence[str], limit: int | None, seed: int) -> list[AskedSet]:
    """Read the questions of ``NAME=PATH`` each, all of them or a seeded sample.

    Raises:
        UserError: for an unknown benchmark, one named twice, files that are not its own, or an id that stands twice.
    """
    sets: list[AskedSet] = []
    for bench in benches:
        benchmark, questions = open_benchmark(bench)
        if questions is None:
            raise UserError(f"--bench {bench}: which questions? Give --bench {bench}=PATH with their file or folder")
        if any(one.benchmark.name == benchmark.name for one in sets):
            raise UserError(f"--bench {benchmark.name} is given twice; put its files into one folder")
        check_ids(questions, Path(bench.partition("=")[2]))
        drawn = questions if limit is None else sample(questions, limit, seed)
        sets.append(AskedSet(benchmark, bench, drawn, len(questions)))
    return sets


def named_apart(answerers: Sequence[Answerer]) -> list[Answerer]:
    """Return models with names that differ: where some are called alike, the folders above them are named, too.

    Raises:
        UserError: if one model is given twice.
    """
    places = [Path(one.given).resolve() for one in answerers]  # also of a hub id, which then stands for itself
    for number, one in enumerate(answerers):
        if places[number] in places[:number]:
            raise UserError(f"MODEL {one.given} is given twice; give each model once")
    names = [one.name for one in answerers]
    near = [[part for part in Path(one.given).parts if part not in ("/", ".", "..")][-3:] for one in answerers]
    for parts in (near, [place.parts[1:] for place in places]):
        alike = {name for name in names if names.count(name) > 1}
        names = ["-".join(more) or name if name in alike else name for name, more in zip(names, parts, strict=True)]
    return [dataclasses.replace(one, name=name) for one, name in zip(answerers, names, strict=True)]
