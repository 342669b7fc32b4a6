"""One table from many runs: plan the grid, train it, measure every model, write the page."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vapr.cache import file_identity, write_json
from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.generation.journal import FolderLock
from vapr.evaluation.readers.open import open_benchmark
from vapr.evaluation.scoring.prediction import Prediction
from vapr.pages.study_report import write_study_report
from vapr.study.config import StudyConfig
from vapr.study.grid import Cell, make_grid
from vapr.study.measures import Measured, figures_of, of_bench, of_probes
from vapr.study.run_cells import Failures, Training, seconds_a_pair, train_cells

Evaluate = Callable[[str, Sequence[str], Path, StudyConfig], Any]
"""Lets a model answer ``NAME=PATH`` benchmarks into a result folder; what is answered there already stays."""

Measures = dict[str, tuple[Measured, dict[str, Measured]]]
"""By name of a measure: the base, and the cells by the name of their run folder."""


def run_study(
    study: StudyConfig, say: Callable[[str], None], *, plan_only: bool = False,
    start: Callable[[Cell], Any] = Training, evaluate: Evaluate | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure every cell that is not done, and write ``study.json`` and ``study.html`` into ``out``.

    Args:
        study: the config.
        say: shows a line.
        plan_only: show the grid and what is left, and do nothing.
        start: begins the training of a cell; see :func:`vapr.study.run_cells.train_cells`.
        evaluate: answers benchmarks; None for ``vapr eval``'s own way.

    Returns:
        The content of ``study.json``.

    Raises:
        UserError: for a mistake in config, data, model or benchmarks, or if another process works in the folder.
        Stopped: after a signal; what is done is kept.
    """
    benches = _open_benches(study)
    with FolderLock(Path(study.out), "out"):
        cells = make_grid(study)
        for line in plan(study, cells):
            say(line)
        if plan_only:
            return {"cells": [_as_dict(cell, {}) for cell in cells]}
        failed = train_cells(cells, start)
        trained = [cell for cell in cells if cell.is_done]
        measures = _probes(trained)
        if benches:
            measures |= _answers(study, benches, trained, evaluate or _vapr_eval, say)
        result = {
            "out": study.out,
            "parsing": study.parsing,
            "cells": [_as_dict(cell, failed) for cell in cells],
            "failed": len(failed),
            "measures": {name: _figures(*measured, trained) for name, measured in measures.items()},
        }
        write_json(Path(study.out) / "study.json", result, allow_nan=False)
        write_study_report(Path(study.out) / "study.html", result)
        return result


def plan(study: StudyConfig, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield lines on what the grid holds, what of it is left, and how long that takes as far as it is known."""
    kinds = {
        name: list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("data", "loss", "size", "seed")
    }
    for name, values in kinds.items():
        yield f"{name:<10} {', '.join(f'{one:,}' if name == 'size' else str(one) for one in values)}"
    left = [cell for cell in cells if not cell.is_done]
    steps = sum(cell.num_steps - cell.steps_done for cell in left)
    yield f"{'runs':<10} {len(cells):,}, {len(cells) - len(left):,} of them done, {len(left):,} left: {steps:,} steps"
    if left and (seconds := seconds_a_pair(cells)) is not None:
        pairs = sum((cell.num_steps - cell.steps_done) * cell.config.optim.pairs_per_step for cell in left)
        yield f"{'time':<10} about {max(1, round(pairs * seconds / 60)):,} min of training, as fast as the runs so far"
    there = {cell.run_dir.name for cell in cells}
    others = [run for run in (Path(study.out) / "runs").glob("*/") if run.name not in there]
    if others:
        yield f"{'other':<10} {len(others):,} runs in {study.out}/runs are of other settings or data; left alone"


def _open_benches(study: StudyConfig) -> dict[str, Benchmark]:
    """Find the benchmarks; raise UserError if one is not there or nothing would be measured."""
    if not study.bench and study.base_config().probe.every is None:
        raise UserError("nothing would be measured; give benchmarks in bench, or a probe in base.probe")
    benches = {}
    for name, path in study.bench.items():
        try:
            benches[name], questions = open_benchmark(f"{name}={path}")
        except UserError as error:
            raise UserError(f"bench.{name}: {str(error).removeprefix('--bench ')}") from None
        answers = [Prediction.of(question, "") for question in questions or ()]
        why = benches[name].scored or benches[name].lacks(answers, study.parsing)
        if why is not None:
            raise UserError(f"bench.{name}: a study cannot compare its answers under '{study.parsing}': {why}")
    return benches


def _probes(trained: Sequence[Cell]) -> Measures:
    """Return what the runs' probes measured; the base is a run's policy before its first step."""
    measures: Measures = {}
    for cell in trained:
        for name, (before, after) in of_probes(cell.run_dir).items():
            measures.setdefault(name, (before, {}))[1][cell.run_dir.name] = after
    return measures


def _answers(
    study: StudyConfig, benches: dict[str, Benchmark], trained: Sequence[Cell], evaluate: Evaluate,
    say: Callable[[str], None],
) -> Measures:  # fmt: skip
    """Let the base and every trained cell answer the benchmarks."""
    given = [f"{name}={path}" for name, path in study.bench.items()]
    folder = Path(study.out) / "answers" / _questions_hash(study)
    model = study.base_config().policy.model
    measures: Measures = {}
    for number, (name, asked) in enumerate([("base", model), *((c.run_dir.name, str(c.run_dir)) for c in trained)]):
        if not (folder / name / "scores.json").is_file():
            say(f"{'answers':<10} model {number + 1} of {len(trained) + 1}: {name}")
            evaluate(asked, given, folder / name, study)
        for bench, benchmark in benches.items():
            measured = of_bench(folder / name, benchmark, study.parsing)
            if name == "base":
                measures[bench] = (measured, {})
            else:
                measures[bench][1][name] = measured
    return measures


def _questions_hash(study: StudyConfig) -> str:
    """Return a hash of what is asked and how: other questions get other folders."""
    files = [
        file_identity(file)
        for path in map(Path, study.bench.values())
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file()
    ]
    asked = [sorted(study.bench.items()), files, study.max_new_tokens, study.base_config().policy.model]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:10]


def _vapr_eval(model: str, benches: Sequence[str], folder: Path, study: StudyConfig) -> None:
    from vapr.evaluation.generation.evaluate import options_of
    from vapr.study.evaluate_models import evaluate_models

    options = options_of(policy=study.parsing, max_new_tokens=study.max_new_tokens)
    evaluate_models([model], benches, folder, options, say=lambda line: print(line, file=sys.stderr))


def _figures(base: Measured, by_cell: dict[str, Measured], trained: Sequence[Cell]) -> dict[str, Any]:
    """Return the figures of the base and of every group of seeds."""
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in trained:
        if cell.run_dir.name in by_cell:
            groups.setdefault((cell.size, cell.data, cell.loss), []).append(cell)
    rows = []
    for (size, data, loss), members in groups.items():
        figures = figures_of([by_cell[cell.run_dir.name] for cell in members], base)
        place = {"data": data, "loss": loss, "size": size, "seeds": [cell.seed for cell in members]}
        rows.append({**place, "figures": {name: figure.as_dict() for name, figure in figures.items()}})
    own = {name: figure.as_dict() for name, figure in figures_of([base]).items()}
    return {"questions": len(base.questions), "base": own, "groups": rows}


def _as_dict(cell: Cell, failed: Failures) -> dict[str, Any]:
    why = failed.get(cell.run_dir.name)
    state = "failed" if why is not None else "trained" if cell.is_done else "left"
    place = {name: getattr(cell, name) for name in ("data", "loss", "size", "seed")}
    return {**place, "steps": cell.num_steps, "run": str(cell.run_dir), "state": state, "why": why}
