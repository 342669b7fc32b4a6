"""The held-out figures of several runs side by side, as data and as rows of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from vapr.errors import UserError
from vapr.folder_names import names_of
from vapr.pages.curves import Rows, best_evaluation, read_metrics
from vapr.pages.figures import Figure, figures_of, flat, mapping
from vapr.terminal import table_console, text_table

ALIKE = ("run_dir", "data.workers", "reference", "features", "parallel")
"""Keys (and what lies below them) that change no result and are not listed as differences."""


@dataclass(frozen=True)
class Run:
    """A run with at least one evaluation."""

    name: str
    folder: Path
    config: dict[str, Any]
    evaluation: Rows

    @property
    def figures(self) -> list[Figure]:
        return figures_of(self.config)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss; None if no loss was finite."""
        return best_evaluation(self.evaluation)

    @property
    def points(self) -> list[tuple[str, dict[str, Any]]]:
        """The evaluations that are shown, each after its name: the last, and that with the lowest loss."""
        last, best = self.evaluation[-1], self.best
        if best is None:
            return [("last", last)]
        return [("last, lowest loss", last)] if best is last else [("last", last), ("lowest loss", best)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the config and the evaluations of at least two run folders.

    Raises:
        UserError: for a folder that is no run, is given twice, or has no held-out figures.
    """
    if len(folders) < 2:
        raise UserError(f"{folders[0]}: one run alone; give two or more to compare (its own page is report.html)")
    return [_read_run(folder, name) for folder, name in zip(folders, names_of(folders, "run"), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    try:
        config = mapping((folder / "config.yaml").read_text(encoding="utf-8", errors="replace"))
        evaluation = read_metrics(folder / "metrics.jsonl")[1]
    except OSError as error:
        near = sorted(str(path.parent) for path in folder.parent.glob("*/config.yaml"))
        others = f"; runs beside it: {', '.join(near[:5])}" if near else ""
        missing = f"no run, {Path(error.filename).name} cannot be read" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {missing}{others}") from None
    if not evaluation:
        raise UserError(f"{folder}: no held-out figures; set data.eval in its config and train it again")
    return Run(name, folder, config, evaluation)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Compare the held-out figures of runs, at their last evaluation and at the one with the lowest loss.

    Returns:
        Plain data: ``runs`` (``name``, ``folder``, ``last`` and ``best``, objects of metrics.jsonl), ``differences``
        (values by key of the config, in the order of the runs) and ``notes`` (what does not compare, in sentences).
    """
    shown = [
        {"name": run.name, "folder": str(run.folder), "last": run.evaluation[-1], "best": run.best} for run in runs
    ]
    differences = _differences(runs)
    return {"runs": shown, "differences": differences, "notes": _notes(differences)}


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {
        key: [config.get(key) for config in configs]
        for key in keys
        if not any(key == alike or key.startswith(f"{alike}.") for alike in ALIKE)
    }
    return {key: column for key, column in values.items() if any(value != column[0] for value in column)}


def _notes(differences: dict[str, list[Any]]) -> list[str]:
    notes = []
    if any(key == "data.eval" or key.startswith("data.eval.") for key in differences):
        notes.append("The runs were not scored on the same held-out pairs (data.eval): their figures do not compare.")
    if losses := [key for key in differences if key == "loss" or key.startswith("loss.")]:
        notes.append(f"The losses differ ({', '.join(losses)}): values of loss and margin do not compare.")
    return notes


def figure_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table: a run's last evaluation, then its best where that is another."""
    names = list(dict.fromkeys(figure.name for run in runs for figure in run.figures))
    rows = []
    for run in runs:
        by_name = {figure.name: figure for figure in run.figures}
        for point, row in run.points:
            cells = [by_name[name].text([row], "eval/") if name in by_name else "" for name in names]
            rows.append([run.name, f"{int(row['step']):,} ({point})", *cells])
    return ["run", "step", *names], rows


def config_rows(differences: dict[str, list[Any]]) -> list[list[str]]:
    """Return a row for each key of the config that differs, with the runs' values."""
    return [
        [key, *("none" if value is None else str(value) for value in values)] for key, values in differences.items()
    ]


def show(runs: Sequence[Run], result: dict[str, Any]) -> None:
    """Print the table, what differs between the configs, and what does not compare."""
    console = table_console(len(runs))
    console.print(text_table(*figure_rows(runs)))
    if rows := config_rows(result["differences"]):
        console.print(text_table(["config", *(run.name for run in runs)], rows))
    for note in result["notes"]:
        console.print(Text(note, style="yellow"))
