"""Commands that measure what a model answers."""

import json
import math
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vapr.cli.options import A_PATH, AT_LEAST_0, AT_LEAST_1, Command, json_option
from vapr.errors import UserError
from vapr.evaluation.scoring.answers import POLICIES, Policy

if TYPE_CHECKING:
    from vapr.evaluation.handover.run import Tool
    from vapr.evaluation.judges.reviews import Judging

policy_option = click.option(
    "--policy", type=click.Choice(POLICIES), default="strict", show_default=True,
    help="How answers are read: official, as the benchmark's authors do; strict, from their beginning; last-answer, "
    "the final answer, after any reasoning.",
)  # fmt: skip
partial_option = click.option(
    "--partial", "partly", is_flag=True, help="Take the answers that are there, although others are missing."
)


def judging_options(command: Command) -> Command:
    """Add the options that say who judges; the command gets them as one, ``judging``."""

    @click.option("--judge", metavar="URL", help="OpenAI-compatible server of the judge, or a YAML file that names it.")
    @click.option("--judge-model", metavar="NAME", help="The judge's name at the server. [default: the only one there]")
    @click.option("--reviews", type=A_PATH, help="File of reviews. [default: reviews.jsonl beside the answers]")
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
    help="Benchmark, or the YAML file of a set that a judge rates, and the file or folder of its questions.",
)
@policy_option
@partial_option
@judging_options
@json_option
def score(file: Path, bench: str, policy: Policy, partly: bool, judging: "Judging", as_json: bool) -> None:
    """Score the answers in FILE: predictions.jsonl, a result folder, or another tool's results.

    Most files of other tools hold no true answers; --bench NAME=PATH gives the questions, and these with them.
    """
    from vapr.evaluation import report_text, score_file

    say = partial(click.echo, err=True)
    result = score_file.score_file(file, bench, policy, partial=partly, judging=judging, say=say)
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else report_text.show(result))


@click.command("eval")
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "--compare",
    is_flag=True,
    help="Compare result folders, given in place of models, with the first of them.",
)
@click.option(
    "--bench",
    "benches",
    multiple=True,
    metavar="NAME=PATH",
    help="Benchmark, and the file or folder of its questions; repeatable.",
)
@click.option(
    "--out",
    type=A_PATH,
    help="Folder for the answers; with several models, for a folder of each; with --compare, a page (.html) to write.",
)
@policy_option
@click.option(
    "--limit", type=AT_LEAST_1, help="Ask only about so many questions of each benchmark, drawn from all splits."
)
@click.option("--blind", is_flag=True, help="Ask everything without the pictures, too, and show the gap in accuracy.")
@click.option("--max-new-tokens", type=AT_LEAST_1, default=512, show_default=True, help="Longest answer, in tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Temperature of sampling; 0 answers greedily.",
)
@click.option("--batch-size", type=AT_LEAST_1, help="Questions answered at once. [default: 16; vLLM 256]")
@click.option("--seed", type=AT_LEAST_0, default=0, show_default=True, help="Seed of --limit, and of sampled answers.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    show_default=True,
    help="What generates the answers; auto is vLLM where it is installed and there is a GPU, else transformers.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the weights; auto is float32 on a CPU, else their own.",
)
@json_option
def evaluate(
    models: tuple[str, ...], compare: bool, benches: tuple[str, ...], out: Path | None, limit: int | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Let each MODEL answer benchmarks, and score the answers.

    MODEL is a hub id, a folder, an adapter (on the base that it names), a run or a checkpoint. The same command
    goes on where it was stopped.

    vapr eval --compare FOLDER FOLDER... shows result folders side by side: paired tests, and what changed, question by
    question.
    """
    if compare:
        _compare_folders(models, out, options["policy"], as_json)
        return
    if not models or not benches or out is None:
        lacking = "MODEL" if not models else "--bench NAME=PATH" if not benches else "--out DIR"
        raise UserError(f"{lacking} is missing; write: vapr eval MODEL --bench NAME=PATH --out DIR")
    if not math.isfinite(options["temperature"]):  # which click takes for in range
        raise UserError(f"--temperature {options['temperature']}: give a number from 0 on")
    from vapr.evaluation.generation.evaluate import options_of
    from vapr.study import eval_text
    from vapr.study.evaluate_models import evaluate_models, write_comparison

    evaluated = evaluate_models(
        models, benches, out, options_of(**options), limit=limit, say=partial(click.echo, err=True)
    )
    if as_json:
        click.echo(json.dumps({"models": [one.as_dict() for one in evaluated]}, indent=2, allow_nan=False))
    else:
        click.echo(eval_text.show(evaluated))
    if len(evaluated) > 1:
        write_comparison(evaluated, out, options["policy"], say=partial(click.echo, err=True))


def _compare_folders(folders: tuple[str, ...], out: Path | None, policy: Policy, as_json: bool) -> None:
    context = click.get_current_context()
    for name in context.params:
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("models", "compare", "out", "policy", "as_json"):
            option = "bench" if name == "benches" else name.replace("_", "-")
            raise UserError(f"--{option} is for asking models; --compare takes result folders, --out and --policy")
    from vapr.evaluation.compare.compare_folders import compare_folders

    compare_folders([Path(folder) for folder in folders], out, policy, as_json, click.echo)


@click.command()
@click.argument("model", type=A_PATH)
@click.option(
    "--bench", "benches", required=True, multiple=True, metavar="NAME=PATH",
    help="Benchmark, and the file or folder of its questions; repeatable.",
)  # fmt: skip
@click.option("--to", "tool", type=click.Choice(["lmms-eval", "vlmevalkit"]), required=True, help="The other harness.")
@click.option("--out", type=A_PATH, required=True, help="Folder for the task, the tool's logs and the answers.")
@click.option("--python", type=A_PATH, help="Run the tool now, with this Python, or that of this environment's folder.")
@click.option("--model-class", help="The tool's name for the model's class. [default: told from the model]")
@click.option("--max-new-tokens", type=AT_LEAST_1, default=512, show_default=True, help="Longest answer, in tokens.")
@click.option(
    "--take-back", "only_read", is_flag=True, help="Only read the answers that the tool has logged under --out."
)
@partial_option
def handover(
    model: Path, benches: tuple[str, ...], tool: "Tool", out: Path, python: Path | None, model_class: str | None,
    max_new_tokens: int, only_read: bool, partly: bool,
) -> None:  # fmt: skip
    """Hand MODEL and the questions over to another harness, and take its answers back.

    The folder --out then holds all that the tool needs without a network, and predictions.jsonl once it has answered.
    """
    from vapr.evaluation.handover import run

    if not only_read:
        call = run.prepare(model, benches, tool, out, model_class=model_class, max_new_tokens=max_new_tokens)
        for note in call.notes:
            click.echo(note, err=True)
        if python is None:
            click.echo(call.text())
            click.echo("Run this where the tool is installed, then the same vapr command with --take-back.", err=True)
            return
        run.run(call, python)
    file = run.take_back(benches, tool, out, partial=partly, say=partial(click.echo, err=True))
    click.echo(f"{file}: score it with vapr score {file} --bench {benches[0].partition('=')[0]}")


COMMANDS = (score, evaluate, handover)
