"""Commands that measure what a model answers."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vapr.cli.options import A_PATH, AT_LEAST_1, json_option, page_option
from vapr.evaluation.scoring.answers import POLICIES, Policy

if TYPE_CHECKING:
    from vapr.evaluation.handover.run import Tool

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


@click.command()
@click.argument("model", type=A_PATH)
@click.option(
    "--bench", "benches", required=True, multiple=True, metavar="NAME=PATH", help="Benchmark and its questions."
)
@click.option("--to", "tool", type=click.Choice(["lmms-eval", "vlmevalkit"]), required=True, help="The other harness.")
@click.option("--out", type=A_PATH, required=True, help="Folder for the task, the tool's logs and the answers.")
@click.option("--python", type=A_PATH, help="Run it now, with the Python of the environment that the tool is in.")
@click.option("--model-class", help="The tool's name for the model's kind. [default: told from the model]")
@click.option("--max-new-tokens", type=AT_LEAST_1, default=512, show_default=True, help="The longest answer.")
@click.option(
    "--take-back", "only_read", is_flag=True, help="Only read the answers that the tool has logged under OUT."
)
@partial_option
def handover(
    model: Path, benches: tuple[str, ...], tool: "Tool", out: Path, python: Path | None, model_class: str | None,
    max_new_tokens: int, only_read: bool, partly: bool,
) -> None:  # fmt: skip
    """Hand MODEL and the questions over to another harness, and take its answers back.

    OUT then holds all that the tool needs without a network, and predictions.jsonl once it has answered.
    """
    from vapr.evaluation.handover import run

    if not only_read:
        call = run.prepare(model, benches, tool, out, model_class=model_class, max_new_tokens=max_new_tokens)
        for note in call.notes:
            click.echo(note, err=True)
        if python is None:
            click.echo(call.text())
            click.echo("then the same command with --take-back", err=True)
            return
        run.run(call, python)
    file = run.take_back(benches, tool, out, partial=partly, say=partial(click.echo, err=True))
    click.echo(f"{file}: score it with vapr score {file} --bench {benches[0].partition('=')[0]}")


COMMANDS = (score, evaluate, handover)
