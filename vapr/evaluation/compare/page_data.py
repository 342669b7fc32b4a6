"""Turn a comparison into what its page shows."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.evaluation.compare.changes import SHOWN
from vapr.evaluation.compare.questions import most_shown
from vapr.evaluation.compare.report_text import (
    SPLITS_SHOWN,
    bias_table,
    change_table,
    comparison_table,
    explanations,
    figure_table,
    own_table,
    policy_table,
)
from vapr.evaluation.compare.written import percent
from vapr.pages.dots import Dot
from vapr.pages.eval_compare import Plot, Table

Result = Mapping[str, Any]

SURE = 0.05
"""Corrected p below which a difference is called one."""

UNREAD = 0.05
"""Share of unparsed answers from which another policy is worth a try."""


def page_data(
    result: Result, questions: Sequence[Mapping[str, Any]], picture_notes: Sequence[str], out: Path
) -> dict[str, Any]:
    """Return what :func:`vapr.pages.eval_compare.write_eval_compare_page` takes."""
    names = [folder["name"] for folder in result["folders"]]
    scored = {name: part for name, part in result["benchmarks"].items() if part["scored"]}
    return {
        "models": names,
        "policy": result["policy"],
        "cards": [_card(name, n, scored, names[0]) for n, name in enumerate(names[1:])],
        "explanations": explanations(result)[:1],
        "notes": [*result["notes"], *picture_notes],
        "plots": _plots(scored, names[0]),
        "tables": _tables(result),
        "kinds": SHOWN,
        "totals": {
            name: [
                {kind: compared["changes"]["kinds"][kind]["questions"] for kind in SHOWN}
                for compared in part["comparisons"]
            ]
            for name, part in scored.items()
        },
        "questions": questions,
        "drawn": _drawn(len(names), result["seed"]),
        "commands": next_commands(result, out),
    }


def next_commands(result: Result, out: Path | None) -> list[tuple[str, str]]:
    """Return what to run next: what for, and the command."""
    again = shlex.join(["vapr", "eval", "--compare", *(folder["path"] for folder in result["folders"])])
    page = f" --out {shlex.quote(str(out))}" if out else ""
    commands = []
    share, model, name = max(
        (
            (model["unparsed_rate"]["value"], model["name"], name)
            for name, part in result["benchmarks"].items() if part["scored"]
            for model in part["models"]
        ),
        default=(0.0, "", ""),
    )  # fmt: skip
    if share >= UNREAD and result["policy"] != "last-answer":
        purpose = f"{share:.1%} of {model}'s answers to {name} are unparsed; this reads them after any reasoning"
        commands.append((purpose, f"{again} --policy last-answer{page}"))
    if out is None:
        commands.append(("the questions that changed", f"{again} --policy {result['policy']} --out comparison.html"))
    return commands


def _drawn(num_folders: int, seed: int) -> str:
    several = num_folders > 2
    text = (
        f"At most {most_shown(num_folders)} questions of a kind{', model' if several else ''} and benchmark are shown, "
        f"drawn with seed {seed}; the numbers beside the kinds are of all."
    )
    return f"{text} What is of one kind for one model may be of another for the next." if several else text


def _card(name: str, number: int, scored: Result, first: str) -> tuple[str, str, str]:
    """Return how many benchmarks a model is better and worse at, as far as that can be told."""
    compared = [part["comparisons"][number] for part in scored.values() if not part["blind"]]
    sure = [one["difference"]["value"] for one in compared if one["p_holm"] < SURE]
    better, worse = (sum(sign * value > 0 for value in sure) for sign in (1, -1))
    number_of = "1 benchmark" if len(compared) == 1 else f"{len(compared)} benchmarks"
    note = f"of {number_of} with pictures, at p corrected < {SURE:g}; else no difference is shown"
    return f"{name} against {first}", f"{better} better, {worse} worse", note


def _plots(scored: Result, first: str) -> list[Plot]:
    accuracy = [
        (name, [_dot(model["name"], n, model["accuracy"]) for n, model in enumerate(part["models"])])
        for name, part in scored.items()
    ]
    differences = [
        (name, [_dot(one["name"], n, one["difference"], signed=True) for n, one in enumerate(part["comparisons"], 1)])
        for name, part in scored.items()
    ]
    return [
        Plot("Accuracy in %", "Whiskers are 95 % intervals.", accuracy, False),
        Plot(f"Difference to {first} in points", "Right of zero: more answers are right.", differences, True),
    ]


def _dot(name: str, number: int, figure: Result, *, signed: bool = False) -> Dot:
    value, interval = figure["value"], figure["interval"]
    return Dot(
        name, number, None if value is None else 100 * value, interval and [100 * bound for bound in interval],
        percent(figure, signed=signed),
    )  # fmt: skip


def _tables(result: Result) -> list[Table]:
    first = result["first"]
    tables = [
        Table("Figures", "", *_filled(figure_table(result, SPLITS_SHOWN))),
        Table(f"Against {first}", " ".join(explanations(result)[1:]), *_filled(comparison_table(result, SPLITS_SHOWN))),
    ]
    if any(len(part["splits"]) > SPLITS_SHOWN for part in result["benchmarks"].values()):
        tables += [
            Table("Figures of all splits", "", *_filled(figure_table(result)), folded=True),
            Table(f"All splits against {first}", "", *_filled(comparison_table(result)), folded=True),
        ]
    return [
        *tables,
        Table(
            "What changed",
            "Every question is of one kind. By knowledge: answers that both models gave in a readable form, right in "
            "one and wrong in the other. By format: answers that became unparsed or parsed, whatever the model knew. "
            "Both sum up to the difference in accuracy, in points.",
            *_filled(change_table(result)),
        ),
        Table(
            "Yes and no",
            "Shares in %, d' and criterion in units of signal detection; a criterion below 0 leans to yes.",
            *_filled(bias_table(result)),
        ),
        Table(
            "Read under each policy",
            "Accuracy in %. The other tables have the answers read as "
            f"'{result['policy']}'; guesses of an official rule are unparsed.",
            *_filled(policy_table(result)),
        ),
        Table("The benchmarks' own figures", "In their authors' units.", *_filled(own_table(result))),
        Table("What was compared", "", *_filled(_folders(result))),
    ]


def _folders(result: Result) -> tuple[list[str], list[list[str]]]:
    return ["name", "folder", "model"], [[one[key] for key in ("name", "path", "model")] for one in result["folders"]]


def _filled(table: tuple[list[str], list[list[str]]]) -> tuple[list[str], list[list[str]]]:
    """Return a table whose empty cells hold a dash: the page leaves out empty ones where it is narrow."""
    heads, rows = table
    return heads, [[cell or "–" for cell in row] for row in rows]
