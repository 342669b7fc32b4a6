"""Commands that train, and what belongs to a run."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Literal

import click

from vapr.cli.options import (
    A_PATH,
    AT_LEAST_0,
    AT_LEAST_1,
    config_argument,
    json_option,
    page_option,
    set_option,
)
from vapr.errors import UserError
from vapr.interrupts import Stopped


@click.command()
@config_argument
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in run_dir.")
@set_option
def train(config: Path, resume: bool, overrides: tuple[str, ...]) -> None:
    """Train the policy that CONFIG (a YAML file) describes."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr.training import trainer

    trainer.train(run_config, resume=resume)


@click.command()
@config_argument
@set_option
@click.option("--limit", type=AT_LEAST_1, help="Read about so many rows only, chosen at random.")
@json_option
def data(config: Path, overrides: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Show what is read for CONFIG: rows, images, tokens, what sharing saves, what is skipped and why."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr.batches import survey

    results = {"train": survey.survey(run_config, "train", limit)}
    if run_config.data.eval is not None:
        results["eval"] = survey.survey(run_config, "eval", limit)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for name, result in results.items():
            click.echo(f"data.{name}\n{survey.show(result)}")
    if warning := survey.rows_in_both(run_config):
        click.echo(warning, err=True)
    for name, result in results.items():
        if stopping := survey.stops_training(run_config, result):
            raise UserError(f"data.{name}: vapr train would stop at {stopping}")


@click.command()
@config_argument
@set_option
@click.option(
    "--gpu", metavar="NAME", help="GPU that the run is for, as in H100 or 'RTX 4090'. [default: the one here]"
)
@click.option("--gpu-memory", type=float, metavar="GIB", help="Memory of each GPU in GiB, in place of a name.")
@click.option("--gpus", type=AT_LEAST_1, default=1, show_default=True, help="GPUs that train together.")
@click.option("--limit", type=AT_LEAST_1, help="Read about so many rows at most. [default: 1000]")
@json_option
def plan(
    config: Path, overrides: tuple[str, ...], gpu: str | None, gpu_memory: float | None, gpus: int, limit: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Predict what the run of CONFIG takes: tokens, FLOPs, memory, time, what fits. Reads no weights."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr.plan import plan_text
    from vapr.plan.packs import LIMIT
    from vapr.plan.plan import plan

    result = plan(run_config, gpu_memory, gpu, gpus, limit or LIMIT)
    click.echo(json.dumps(result, indent=2) if as_json else plan_text.show(result, str(config)))


@click.command()
@config_argument
@set_option
@json_option
def prepare(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Build the reference cache (and with features.cache the image features) of CONFIG ahead of training."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr.training import fill_caches

    result = fill_caches.prepare(run_config, partial(click.echo, err=as_json))
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for name in ("reference", "features"):
        if counts := result.get(name):
            counted = f"{counts['found']:,} found, {counts['computed']:,} computed, {counts['on disk']:,} on disk"
            click.echo(f"{name:<10} {counted} ({counts['folder']})")
    if result["skipped"]:
        click.echo(f"skipped    {len(result['skipped']):,} rows; the first: {next(iter(result['skipped'].values()))}")
    click.echo(f"next       vapr train {shlex.quote(str(config))}")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=A_PATH)
@page_option("the curves overlaid")
@json_option
def compare(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Show the held-out figures of several run folders side by side, and what differs in their configs."""
    from vapr.pages import compare, runs_side_by_side

    opened = runs_side_by_side.read_runs(runs)
    result = runs_side_by_side.compare(opened)
    if out is not None:
        compare.write_compare_page(out, opened, result)
    if as_json:
        click.echo(json.dumps(result, indent=2, default=str))
        return
    runs_side_by_side.show(opened, result)
    if out is not None:
        click.echo(f"wrote {out}")


@click.command()
@click.argument("run", type=A_PATH)
@click.option("--out", required=True, type=A_PATH, help="New folder for the model.")
@click.option("--adapter", is_flag=True, help="Write the PEFT adapter instead of merged weights.")
@click.option(
    "--checkpoint", "which", default="last", show_default=True, metavar="last|best|STEP",
    help="The newest checkpoint, the one with the best held-out figure, or one by name such as step-000100.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Type of the written weights. [default: policy.dtype]"
)
@click.option(
    "--into", type=click.Choice(["trained", "original"]), default="trained", show_default=True,
    help="Base to merge into, where policy.base_weights quantised it: as trained on, or the unquantised weights.",
)  # fmt: skip
def export(
    run: Path, out: Path, adapter: bool, which: str, dtype: str | None, into: Literal["trained", "original"]
) -> None:
    """Write the model of RUN as a Hugging Face folder: merged weights, or its adapter.

    RUN is a run's folder, finished or not, or one of its checkpoints.
    """
    from vapr.training.export import export

    export(run, out, adapter=adapter, which=which, dtype=dtype, into=into, say=click.echo)
    click.echo(f"wrote {out}; {out / 'README.md'} says how to load it")


@click.command()
@config_argument
@set_option
@click.option("--plan", is_flag=True, help="Show the runs and what is left of them, and train nothing.")
@json_option
def study(config: Path, overrides: tuple[str, ...], plan: bool, as_json: bool) -> None:
    """Train and measure every combination that CONFIG (a YAML file) lists; what is done is not done again."""
    from vapr.study.config import StudyConfig

    study_config = StudyConfig.load(config, overrides)
    from vapr.study import study_text
    from vapr.study.run_study import run_study

    result = run_study(study_config, partial(click.echo, err=as_json), plan_only=plan)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not plan:
        study_text.show(result)
    if failed := [cell for cell in result["cells"] if cell["state"] == "failed"]:
        raise Stopped(f"{len(failed):,} of {len(result['cells']):,} runs failed; the same command tries them again")


@click.command()
@click.option("--out", default=Path("demo-out"), type=A_PATH, show_default=True, help="A new or empty folder.")
@click.option("--seed", default=0, type=AT_LEAST_0, show_default=True, help="Seed of pictures, weights and order.")
@click.option(
    "--family", default="llava", type=click.Choice(["llava", "qwen3_vl"]), show_default=True, help="Of the tiny policy."
)
def demo(out: Path, seed: int, family: str) -> None:
    """Draw pictures, train a tiny policy, align it with DPO and show what changed: minutes on a CPU, no network."""
    from vapr.demo.run import run_demo

    run_demo(out, seed, family=family)


COMMANDS = (train, data, plan, prepare, compare, export, study, demo)
