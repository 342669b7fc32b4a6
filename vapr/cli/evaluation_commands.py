"""Commands that measure what a model answers."""

import json
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vapr.cli.options import A_PATH, Command, json_option, page_option
from vapr.errors import UserError
from vapr.evaluation.scoring.answers import POLICIES, Policy

if TYPE_CHECKING:
    from vapr.evaluation.judges.reviews import Judging

policy_option = click.option(
    "--policy", type=click.Choice(POLICIES), default="strict", show_default=True,
    help="How answers are read: as the benchmark's authors do, from their beginning, or after any reasoning.",
)  # fmt: skip
partial_option = click.option(
    "--partial", "partly", is_flag=True, help="Score what is there, although questions are unanswered."
)


def judging_options(command: Command) -> Command:
    """Add the options that say who judges; the command gets them as one, ``judging``."""

    @click.option("--judge", metavar="URL", help="OpenAI-compatible server of the judge, or a YAML file that has it.")
    @click.option("--judge-model", metavar="NAME", help="The judge's name at the server (judge.model).")
    @click.option("--reviews", type=A_PATH, help="Reviews of the judge. [default: reviews.jsonl beside the answers]")
    @wraps(command)
    def run(judge: str | None, judge_model: str | None, reviews: Path | None, **values: Any) -> None:
        from vapr.evaluation.judges.config import JudgeConfig
        from vapr.evaluation.judges.reviews import Judging

        if judge_model is not None and judge is None:
            raise UserError(f"--judge-model {judge_model}: --judge has to say where it is: --judge http://HOST:PORT/v1")
        named = None if judge is None else JudgeConfig.of(judge, judge_model)
        command(judging=Judging(judge=named, file=reviews), **values)

    return run


@click.command()
@click.argument("file", type=A_PATH)
@click.option(
    "--bench",
    required=True,
    metavar="NAME[=PATH]",
    help="Benchmark, or a judge set's YAML file, and where its questions are.",
)
@policy_option
@partial_option
@judging_options
@json_option
def score(file: Path, bench: str, policy: Policy, partly: bool, judging: "Judging", as_json: bool) -> None:
    """Score the answers in FILE: predictions.jsonl, a result folder, or another tool's results.

    Files of other tools hold no truths; --bench NAME=PATH gives the questions with them.
    """
    from vapr.evaluation import report_text, score_file

    say = partial(click.echo, err=True)
    result = score_file.score_file(file, bench, policy, partial=partly, judging=judging, say=say)
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
