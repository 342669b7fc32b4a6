"""The outcome of a demo on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vapr.demo.claims import claims

Result = Mapping[str, Any]

POLICIES = {
    "sft": "after sft",
    "dpo": "after DPO",
    "dpo-half": "DPO, half of the pairs",
    "dpo-quarter": "DPO, a quarter",
    "length-biased": "DPO, rejected also longer",
    "more-sft": "more sft, same answers",
}
"""What is trained and asked, and what it is called in tables."""


def share_text(figure: Mapping[str, Any]) -> str:
    """Write a share with its interval: "88.4 % [86.1, 90.4]"."""
    if figure["value"] is None:
        return "-"
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def figure_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows: each policy with accuracy by category, share of "Yes" and garbled answers."""
    categories = list(result["policies"]["sft"]["accuracy"])
    heads = ["", *categories, "says Yes", "garbled"]
    rows = [
        [
            POLICIES[name],
            *(share_text(one["accuracy"][category]) for category in categories),
            share_text(one["yes"]["yes_rate"]),
            f"{one['garbled']['answers']:,}",
        ]
        for name, one in result["policies"].items()
    ]
    return heads, rows


def print_outcome(console: Console, out: Path, result: Result) -> None:
    """Print accuracies, what was shown and what was not, and where to look next."""
    table = Table(title="Held-out pictures, greedy answers: right in any of the ordinary wordings [95 % interval]")
    heads, rows = figure_table(result)
    for head, *cells in zip(heads, *rows, strict=True):
        if not head:
            for cell in ("", *cells):
                table.add_column(cell, justify="left" if not cell else "right")
        else:
            table.add_row(head, *cells)
    console.print()
    console.print(table)
    for claim in claims(result):
        mark = "[green]shown[/green]    " if claim.holds else "[yellow]not shown[/yellow]"
        console.print(f"{mark} {claim.expected}: {claim.found}.")
    for line in (
        f"It took {result['seconds']['total'] / 60:.1f} min.",
        f"Report: {out / 'report.html'}; the audit alone: {out / 'audit.html'}",
        f"Repeat a stage: vapr train {out / 'dpo.yaml'} --set run_dir={out / 'again'}",
    ):
        console.print(line, soft_wrap=True, markup=False)
