"""report.html of a training run: what happened, its curves, its extreme pairs, what was skipped, how it was set up."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.pages.chart import MINUS, readable
from vapr.pages.curves import SIDES, Rows, best_evaluation, column, curve_boxes, number, read_metrics, saved_share
from vapr.pages.figures import at, figures_of, mapping, setting
from vapr.pages.page import write_page
from vapr.pages.probe import Shown, probe_section
from vapr.pages.skipped import read_skipped
from vapr.pages.word_diff import word_diff

SIDE_REWARDS = tuple(f"rewards/{side}" for side in SIDES)

NUM_AVERAGED = 20
"""Steps at the start and at the end that the headline compares."""


@dataclass(frozen=True)
class ShownPair:
    """A pair as the page shows it."""

    margin: float
    step: int
    id: str
    where: str
    """Place in the file, as in ``pairs.jsonl:17``."""
    question: str
    """Text of the prompt."""
    chosen: str
    rejected: str
    pictures: tuple[str, ...]
    """``data:`` URIs, see :func:`vapr.pages.page.thumbnail`."""
    problem: str | None = None
    """Why a part of it cannot be shown."""

    @property
    def margin_text(self) -> str:
        """The margin with its sign."""
        return f"{self.margin:+.3f}".replace("-", MINUS)

    @property
    def marked(self) -> list[tuple[str, Markup]]:
        """Both completions by their side, the words marked that the other lacks."""
        return list(zip(SIDES, word_diff(self.chosen, self.rejected), strict=True))


def write_run_report(
    run_dir: Path, extremes: Sequence[ShownPair], notes: Sequence[str] = (), *,
    num_steps: int | None = None, asked: Sequence[Shown] = (),
) -> Path:  # fmt: skip
    """Write ``run_dir/report.html`` from the files of a run, whole or not at all; returns its path.

    Args:
        run_dir: holds ``metrics.jsonl``, ``config.yaml``, ``environment.json`` and, if pairs were left out,
            ``skipped.json``; a file that is missing or damaged is named on the page.
        extremes: pairs with the largest and the smallest margins, in any order; the upper half (and a single one)
            is shown as largest.
        notes: sentences to put below the headline, such as why the run stopped.
        num_steps: steps of the whole run; None takes ``optim.max_steps`` of the config.
        asked: questions of the probe to show; its figures are read from the run's folder.
    """
    training, evaluation = read_metrics(run_dir / "metrics.jsonl")
    config_text = _text(run_dir / "config.yaml")
    config = mapping(config_text)
    boxes, absent = curve_boxes(training, evaluation)
    path = run_dir / "report.html"
    write_page(
        path,
        "run_report.html",
        name=run_dir.resolve().name,
        setting=setting(config),
        trained=bool(training),
        verdict=_verdict(config, training) + _held_out_verdict(evaluation),
        notes=notes,
        figures=_figures(config, training, evaluation) if training else None,
        cards=_cards(training, num_steps or number(at(config, "optim", "max_steps"))) if training else None,
        boxes=boxes,
        absent=absent,
        probe=probe_section(run_dir, int(training[-1]["step"]) if training else 0, asked),
        margins=_by_margin(extremes),
        skipped=read_skipped(run_dir / "skipped.json"),
        config_text=config_text,
        environment=_entries(mapping(_text(run_dir / "environment.json"))),
    )
    return path


def _cards(training: Rows, num_steps: float | None) -> list[tuple[str, str, str]]:
    """Return name, value and note of the figures that stand large on the page."""
    steps = f"{int(training[-1]['step']):,}"
    if num_steps:
        steps = Markup("{} <i>of {:,}</i>").format(steps, int(num_steps))
    pairs, tokens, saved = (sum(column(training, key)) for key in ("pairs", "tokens", "tokens_saved"))
    speed = column(training, "pairs_per_second")
    return [
        ("Steps", steps, f"{int(pairs):,} pairs"),
        ("Pairs/s", readable(statistics.median(speed)) if speed else "none", "median over the steps"),
        ("Saved by sharing", f"{saved_share(training):.0%}", f"of {readable(tokens + saved)} tokens"),
    ]


def _verdict(config: dict[str, Any], training: Rows) -> Markup:
    """Say what happened to accuracy and log-probs, in words that fit the numbers."""
    accuracy = column(training, "rewards/accuracies")
    if len(accuracy) < 2:
        return Markup("Too few steps to say where the run is heading. ")
    count = _num_averaged(accuracy)
    steps = "step" if count == 1 else f"{count} steps"
    words = Markup(
        "In the first {} chosen had the larger reward in {:.0%} of the pairs, in the last {} in <b>{:.0%}</b>. "
    ).format(steps, statistics.fmean(accuracy[:count]), steps, statistics.fmean(accuracy[-count:]))
    changes = [figure.mean(training[-count:]) for figure in figures_of(config) if figure.key in SIDE_REWARDS]
    said = [f"{'higher' if by > 0 else 'lower'} by {readable(abs(by))}" for by in changes if by is not None]
    if len(said) == 2:
        words += Markup(
            "There the policy's log-prob of chosen was {} than the reference's, that of rejected {}. "
        ).format(*said)
    return words


def _held_out_verdict(evaluation: Rows) -> Markup:
    best = best_evaluation(evaluation)
    if best is None:
        return Markup("")
    if best["step"] == evaluation[-1]["step"]:
        return Markup("The loss on held-out pairs was lowest at the last evaluation.")
    words = Markup("The loss on held-out pairs was lowest at step <b>{:,}</b> and has risen since.")
    return words.format(int(best["step"]))


def _num_averaged(values: Sequence[Any]) -> int:
    return max(1, min(NUM_AVERAGED, len(values) // 2))


def _figures(config: dict[str, Any], training: Rows, evaluation: Rows) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the headline's table: training beside held out, at the last evaluation and the best."""
    best = best_evaluation(evaluation)
    count = _num_averaged(training)
    columns = [(f"training, last {count} steps" if count > 1 else "training, last step", training[-count:], "")]
    if evaluation:
        named = ", the lowest loss" if best is evaluation[-1] else ""
        columns.append((f"held out, step {int(evaluation[-1]['step']):,}{named}", evaluation[-1:], "eval/"))
    if best is not None and best is not evaluation[-1]:
        columns.append((f"held out, step {int(best['step']):,}, the lowest loss", [best], "eval/"))
    rows = [[figure.name, *(figure.text(rows, prefix) for _, rows, prefix in columns)] for figure in figures_of(config)]
    return ["", *(head for head, _, _ in columns)], rows


def _by_margin(pairs: Sequence[ShownPair]) -> list[tuple[str, str, list[ShownPair]]]:
    """Return title, meaning and pairs of both sections."""
    ranked = sorted(pairs, key=lambda pair: pair.margin, reverse=True)
    half = (len(ranked) + 1) // 2
    smallest = (
        "Where it moved least, or the wrong way (a negative margin). Hard pairs stand here, and wrongly labelled "
        "ones: read them."
    )
    return [
        ("Largest margins", "Where the policy moved furthest towards the chosen completion.", ranked[:half]),
        ("Smallest margins", smallest, ranked[half:][::-1]),
    ]


def _entries(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return names and values of nested facts in one list."""
    return [
        entry
        for key, value in facts.items()
        for entry in (_entries(value) if isinstance(value, dict) else [(str(key).replace("_", " "), value)])
    ]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
