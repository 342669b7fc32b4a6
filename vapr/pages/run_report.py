"""report.html of a training run: what happened, its curves, its extreme pairs, what was skipped, how it was set up."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapr.pages.chart import MINUS, readable
from vapr.pages.curves import SIDES, Rows, best_evaluation, column, curves_section, number, read_metrics
from vapr.pages.figures import at, figures_of, mapping, setting
from vapr.pages.page import folding_table, page, word_diff, write_page
from vapr.pages.skipped import skipped_section

SIDE_REWARDS = tuple(f"rewards/{side}" for side in SIDES)

NUM_AVERAGED = 20
"""Steps at the start and at the end that the headline compares."""


WHEN_MEASURED = "Of the newest epoch, measured in the step that trained on the pair, before its update."


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


def write_run_report(
    run_dir: Path, extremes: Sequence[ShownPair], notes: Sequence[str] = (), *, num_steps: int | None = None
) -> Path:
    """Write ``run_dir/report.html`` from the files of a run, whole or not at all; returns its path.

    Args:
        run_dir: holds ``metrics.jsonl``, ``config.yaml``, ``environment.json`` and, if pairs were left out,
            ``skipped.json``; a file that is missing or damaged is named on the page.
        extremes: pairs with the largest and the smallest margins, in any order; the upper half (and a single one)
            is shown as largest.
        notes: sentences to put below the headline, such as why the run stopped.
        num_steps: steps of the whole run; None takes ``optim.max_steps`` of the config.
    """
    training, evaluation = read_metrics(run_dir / "metrics.jsonl")
    config_text = _text(run_dir / "config.yaml")
    config = mapping(config_text)
    name = run_dir.resolve().name
    of_steps = num_steps or number(at(config, "optim", "max_steps"))
    parts = (
        f'<h1>{html.escape(name)}</h1><p class="soft">{html.escape(" · ".join(setting(config)))}</p>',
        _headline(config, training, evaluation, notes, of_steps),
        curves_section(training, evaluation),
        _extremes(extremes),
        skipped_section(run_dir / "skipped.json"),
        _setup(config_text, run_dir / "environment.json"),
    )
    path = run_dir / "report.html"
    write_page(path, page(f"{name}: vapr run", "".join(parts)))
    return path


def _headline(
    config: dict[str, Any], training: Rows, evaluation: Rows, notes: Sequence[str], num_steps: float | None
) -> str:
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    if not training:
        return f"<p>No training step is in metrics.jsonl, so there is nothing to plot yet.</p>{said}"
    done = int(training[-1]["step"])
    pairs, tokens, saved = (sum(column(training, key)) for key in ("pairs", "tokens", "tokens_saved"))
    speed = column(training, "pairs_per_second")
    cards = (
        ("Steps", f"{done:,} <i>of {int(num_steps):,}</i>" if num_steps else f"{done:,}", f"{int(pairs):,} pairs"),
        ("Pairs/s", readable(statistics.median(speed)) if speed else "none", "median over the steps"),
        ("Saved by sharing", f"{saved / max(1, tokens + saved):.0%}", f"of {readable(tokens + saved)} tokens"),
    )
    shown = "".join(
        f'<div class="card"><div class="soft">{name}</div><div class="big">{value}</div>'
        f'<div class="soft">{note}</div></div>'
        for name, value, note in cards
    )
    words = f"<p>{_verdict(config, training)} {_held_out_verdict(evaluation)}</p>"
    return f'{words}{said}{_figures(config, training, evaluation)}<div class="cards narrow">{shown}</div>'


def _verdict(config: dict[str, Any], training: Rows) -> str:
    """What happened to accuracy and log-probs, in words that fit the numbers."""
    accuracy = column(training, "rewards/accuracies")
    if len(accuracy) < 2:
        return "Too few steps to say where the run is heading."
    count = _num_averaged(accuracy)
    first, last = statistics.fmean(accuracy[:count]), statistics.fmean(accuracy[-count:])
    steps = "step" if count == 1 else f"{count} steps"
    words = (
        f"In the first {steps} chosen had the larger reward in {first:.0%} of the pairs, in the last {steps} in "
        f"<b>{last:.0%}</b>."
    )
    changes = [figure.mean(training[-count:]) for figure in figures_of(config) if figure.key in SIDE_REWARDS]
    said = [f"{'higher' if by > 0 else 'lower'} by {readable(abs(by))}" for by in changes if by is not None]
    if len(said) == 2:
        words += (
            f" There the policy's log-prob of chosen was {said[0]} than the reference's, that of rejected {said[1]}."
        )
    return words


def _held_out_verdict(evaluation: Rows) -> str:
    best = best_evaluation(evaluation)
    if best is None:
        return ""
    if best["step"] == evaluation[-1]["step"]:
        return "The loss on held-out pairs was lowest at the last evaluation."
    return f"The loss on held-out pairs was lowest at step <b>{int(best['step']):,}</b> and has risen since."


def _num_averaged(values: Sequence[Any]) -> int:
    return max(1, min(NUM_AVERAGED, len(values) // 2))


def _figures(config: dict[str, Any], training: Rows, evaluation: Rows) -> str:
    """The table of the headline: training beside held out, at the last evaluation and at the best."""
    best = best_evaluation(evaluation)
    count = _num_averaged(training)
    columns = [(f"training, last {count} steps" if count > 1 else "training, last step", training[-count:], "")]
    if evaluation:
        named = ", the lowest loss" if best is evaluation[-1] else ""
        columns.append((f"held out, step {int(evaluation[-1]['step']):,}{named}", evaluation[-1:], "eval/"))
    if best is not None and best is not evaluation[-1]:
        columns.append((f"held out, step {int(best['step']):,}, the lowest loss", [best], "eval/"))
    rows = [[figure.name, *(figure.text(rows, prefix) for _, rows, prefix in columns)] for figure in figures_of(config)]
    return f'<div class="box tall">{folding_table(["", *(head for head, _, _ in columns)], rows)}</div>'


def _extremes(pairs: Sequence[ShownPair]) -> str:
    ranked = sorted(pairs, key=lambda pair: pair.margin, reverse=True)
    half = (len(ranked) + 1) // 2
    sections = (
        ("Largest margins", "Where the policy moved furthest towards the chosen completion.", ranked[:half]),
        (
            "Smallest margins",
            "Where it moved least, or the wrong way (a negative margin). Hard pairs stand here, and wrongly labelled "
            "ones: read them.",
            ranked[half:][::-1],
        ),
    )
    return "".join(
        f'<h2>{title}</h2><p class="soft">{meaning} {WHEN_MEASURED}</p>'
        + ("".join(_pair(pair) for pair in members) or '<p class="soft">No pair to show.</p>')
        for title, meaning, members in sections
    )


def _pair(pair: ShownPair) -> str:
    answers = "".join(
        f'<div class="answer {side}"><div class="soft">{side}</div>{text}</div>'
        for side, text in zip(SIDES, word_diff(pair.chosen, pair.rejected), strict=True)
    )
    pictures = "".join(f'<img alt="" src="{html.escape(picture)}">' for picture in pair.pictures)
    problem = f'<p class="wrong">{html.escape(pair.problem)}</p>' if pair.problem else ""
    return (
        '<div class="box pair">'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + f'<div class="said"><div class="soft">margin <b>{f"{pair.margin:+.3f}".replace("-", MINUS)}</b> at step '
        f"{pair.step:,} · {html.escape(pair.id)} · {html.escape(pair.where)}</div>{problem}"
        f'<div class="q">{html.escape(pair.question)}</div><div class="answers">{answers}</div></div></div>'
    )


def _setup(config_text: str | None, environment: Path) -> str:
    config = f"<pre>{html.escape(config_text)}</pre>" if config_text else "<p>config.yaml cannot be read.</p>"
    facts = mapping(_text(environment))
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape('none' if value is None else str(value))}</td></tr>"
        for name, value in _flat(facts)
    )
    table = f'<div class="box"><table>{rows}</table></div>' if rows else "<p>environment.json cannot be read.</p>"
    return f"<h2>Config</h2>{config}<h2>Environment</h2>{table}"


def _flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        entry
        for key, value in facts.items()
        for entry in (_flat(value) if isinstance(value, dict) else [(str(key).replace("_", " "), value)])
    ]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
