"""report.html of a training run: what happened, its curves, its extreme pairs, what was skipped, how it was set up."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vapr.pages.chart import MINUS, readable
from vapr.pages.curves import SIDES, Rows, column, curves_section, number, read_metrics
from vapr.pages.page import page, word_diff, write_page
from vapr.pages.skipped import skipped_section

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
    config = _mapping(config_text)
    parts = (
        _headline(config, training, evaluation, notes, num_steps or number(_at(config, "optim", "max_steps"))),
        curves_section(training, evaluation),
        _extremes(extremes),
        skipped_section(run_dir / "skipped.json"),
        _setup(config_text, run_dir / "environment.json"),
    )
    path = run_dir / "report.html"
    write_page(path, page(f"vapr run: {_model(config)}", "".join(parts)))
    return path


def _headline(
    config: dict[str, Any], training: Rows, evaluation: Rows, notes: Sequence[str], num_steps: float | None
) -> str:
    lora = _at(config, "policy", "lora")
    how = f"LoRA, rank {_at(config, 'policy', 'lora', 'rank')}" if lora else "full fine-tuning"
    setting = " · ".join(part for part in (how if config else "", _loss(config)) if part)
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    top = f'<h1>vapr run: {html.escape(_model(config))}</h1><p class="soft">{html.escape(setting)}</p>'
    if not training:
        return f"{top}<p>No training step is in metrics.jsonl, so there is nothing to plot yet.</p>{said}"
    done = int(training[-1]["step"])
    pairs, tokens, saved = (sum(column(training, key)) for key in ("pairs", "tokens", "tokens_saved"))
    speed = column(training, "pairs_per_second")
    cards = (
        ("Accuracy", *_last(training, evaluation, "rewards/accuracies")),
        ("Margin", *_last(training, evaluation, "rewards/margins")),
        ("Loss", *_last(training, evaluation, "loss")),
        ("Steps", f"{done:,} <i>of {int(num_steps):,}</i>" if num_steps else f"{done:,}", f"{int(pairs):,} pairs"),
        ("Pairs/s", readable(statistics.median(speed)) if speed else "none", "median over the steps"),
        ("Saved by sharing", f"{saved / max(1, tokens + saved):.0%}", f"of {readable(tokens + saved)} tokens"),
    )
    shown = "".join(
        f'<div class="card"><div class="soft">{name}</div><div class="big">{value}</div>'
        f'<div class="soft">{note}</div></div>'
        for name, value, note in cards
    )
    return f'{top}<p>{_verdict(training)}</p>{said}<div class="cards narrow">{shown}</div>'


def _verdict(training: Rows) -> str:
    """What happened to accuracy and chosen log-probs, in words that fit the numbers."""
    accuracy = column(training, "rewards/accuracies")
    if len(accuracy) < 2:
        return "Too few steps to say where the run is heading."
    count = max(1, min(NUM_AVERAGED, len(accuracy) // 2))
    first, last = statistics.fmean(accuracy[:count]), statistics.fmean(accuracy[-count:])
    steps = "step" if count == 1 else f"{count} steps"
    words = (
        f"In the last {steps} chosen had the larger reward in <b>{last:.0%}</b> of the pairs; in the first {steps} in "
        f"{first:.0%}."
    )
    sides = [column(training, f"logps/{side}") for side in SIDES]
    if all(len(side) >= 2 * count for side in sides):
        change = [statistics.fmean(side[-count:]) - statistics.fmean(side[:count]) for side in sides]
        chosen, rejected = (f"{'rose' if by > 0 else 'fell'} by {readable(abs(by))}" for by in change)
        words += f" Between them the mean log-prob of chosen {chosen}, that of rejected {rejected}."
    return words


def _last(training: Rows, evaluation: Rows, key: str) -> tuple[str, str]:
    """The last value of a metric for a card, and a line of what to compare it with."""
    values, held_out = column(training, key), column(evaluation, f"eval/{key}")
    if not values:
        return "none", "no value in metrics.jsonl"
    show = "{:.1%}".format if key.endswith("accuracies") else readable
    parts = ["at the last step"]
    if len(values) > NUM_AVERAGED:
        parts.append(f"last {NUM_AVERAGED} in the mean: {show(statistics.fmean(values[-NUM_AVERAGED:]))}")
    if held_out:
        parts.append(f"held out: {show(held_out[-1])}")
    return show(values[-1]), "<br>".join(parts)


def _loss(config: dict[str, Any]) -> str:
    terms = config.get("loss")
    named = [
        (f"{term['weight']:g} x " if number(term.get("weight", 1)) not in (None, 1) else "")
        + f"{term.get('kind')} (beta {term.get('beta')})"
        + (f" + {term['sft_weight']} x sft" if term.get("sft_weight") else "")
        for term in (terms if isinstance(terms, list) else [terms])
        if isinstance(term, dict)
    ]
    return f"loss {' + '.join(named)}" if named else ""


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
    facts = _mapping(_text(environment))
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


def _mapping(text: str | None) -> dict[str, Any]:
    """YAML or JSON as a mapping; empty if it is none."""
    try:
        value = yaml.safe_load(text or "")
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return {}
    return value if isinstance(value, dict) else {}


def _at(config: dict[str, Any], *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _model(config: dict[str, Any]) -> str:
    return str(_at(config, "policy", "model") or "unknown model")
