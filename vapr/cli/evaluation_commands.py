"""Commands that measure what a model answers."""

import json
from functools import partial
from pathlib import Path

import click

from vapr.cli.options import A_PATH, json_option, page_option
from vapr.evaluation.scoring.answers import POLICIES, Policy

policy_option = click.option(
    "--policy", type=click.Choice(POLICIES), default="strict", show_default=True,
    help="How answers are read: as the benchmark's authors do, from their beginning, or after any reasoning.",
)  # fmt: skip
partial_option = click.option(
    "--partial", "partly", is_flag=True, help="Score what is there, although questions are unanswered."
)


@click.command()
@click.argument("file", type=A_PATH)
@click.option(
    "--bench", required=True, metavar="NAME[=PATH]", help="Benchmark, and the file or folder of its questions."
)
@policy_option
@partial_option
@json_option
def score(file: Path, bench: str, policy: Policy, partly: bool, as_json: bool) -> None:
    """Score the answers in FILE: predictions.jsonl, a result folder, or another tool's results.

    Files of other tools hold no truths; --bench NAME=PATH gives the questions with them.
    """
    from vapr.evaluation import report_text, score_file

    result = score_file.score_file(file, bench, policy, partial=partly, say=partial(click.echo, err=True))
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else report_text.show(result))


@click.command("eval")
@click.argument("folders", nargs=-1, metavar="FOLDER...", type=A_PATH)
@click.option(
    "--compare",
    "comparing",
    is_flag=True,
    required=True,
    help="Compare result folders; the first is what the others are held against.",
)
@page_option("figures, and the questions that changed; the same as JSON goes beside it")
@policy_option
@json_option
def evaluate(folders: tuple[Path, ...], comparing: bool, out: Path | None, policy: Policy, as_json: bool) -> None:
    """Show result folders side by side: paired tests, and what changed question by question."""
    from vapr.evaluation.compare.compare_folders import compare_folders

    compare_folders(folders, out, policy, as_json, click.echo)


COMMANDS = (score, evaluate)
