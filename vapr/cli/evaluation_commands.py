"""Commands that measure what a model answers."""

import json
from functools import partial
from pathlib import Path

import click

from vapr.cli.options import A_PATH, json_option
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


COMMANDS = (score,)
