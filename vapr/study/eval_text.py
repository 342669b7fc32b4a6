"""What ``vapr eval`` prints: scores of every model, what to know of them, and what to run next."""

import shlex
from collections.abc import Sequence
from typing import Any

from vapr.evaluation import report_text
from vapr.study.evaluate_models import Evaluated


def show(evaluated: Sequence[Evaluated]) -> str:
    """Return the scores of models as lines of text, the next commands last."""
    blocks = [_of_one(one) for one in evaluated]
    if len(evaluated) > 1:
        blocks.append(_side_by_side(evaluated))
    blocks.append("\n".join(_next(evaluated)))
    return "\n\n".join(blocks)


def _of_one(one: Evaluated) -> str:
    lines = [f"{one.name}: {one.folder}/predictions.jsonl, {one.folder}/scores.json"]
    for name, result in one.scores.items():
        lines += ["", report_text.show(result)]
        if result.get("partial"):
            lines.append(f"partial: {result['questions']:,} of {result['asked']:,} questions were asked")
        if gap := result.get("gap"):
            lines.append(f"{name}: {_gap(gap)}")
    if one.cut_off:
        lines += ["", f"{one.cut_off:,} answers were cut off at --max-new-tokens"]
    return "\n".join(lines)


def _gap(gap: dict[str, Any]) -> str:
    figure = gap["accuracy"]
    low, high = figure["interval"]
    return (
        f"accuracy with pictures less without: {100 * figure['value']:+.2f} points "
        f"[{100 * low:+.2f}, {100 * high:+.2f}], p {gap['p']:.2g}"
    )


def _side_by_side(evaluated: Sequence[Evaluated]) -> str:
    """Return accuracy and yes rate of all models, one line a benchmark and model."""
    width = max(len(one.name) for one in evaluated)
    lines = [f"{'side by side, in %':30}{'':{width}}  accuracy  yes rate  unparsed"]
    for name in evaluated[0].scores:
        for number, one in enumerate(evaluated):
            values = (one.scores[name][key] for key in ("accuracy", "yes_rate", "unparsed_rate"))
            cells = "".join(f"{'-' if value is None else f'{100 * value:.2f}':>10}" for value in values)
            lines.append(f"{name if not number else '':30}{one.name:{width}}{cells}")
    return "\n".join(lines)


def _next(evaluated: Sequence[Evaluated]) -> list[str]:
    first = shlex.quote(str(evaluated[0].folder))
    lines: list[str] = []
    for name, bench in evaluated[0].benches.items():
        result, named = evaluated[0].scores[name], shlex.quote(bench)
        if result["scored"] and not lines:
            lines.append(f"read otherwise: vapr score {first} --bench {named} --policy last-answer")
        if not result["scored"] and "judge" in result["why"]:
            lines.append(f"have it judged: vapr score {first} --bench {named} --judge http://HOST:PORT/v1")
    if len(evaluated) > 1:
        folders = " ".join(shlex.quote(str(one.folder)) for one in evaluated[:2])
        lines.append(f"what changed:   vapr eval --compare {folders} --out compare.html")
    return lines
