"""The ``vapr`` command: parses and calls, nothing else. Torch loads only when a command needs it."""

import errno
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial, reduce, wraps
from pathlib import Path
from typing import Any, cast

import click

from vapr import __version__
from vapr.errors import UserError
from vapr.interrupts import Stopped


class _Mistake(click.ClickException):
    """A user's mistake: one line on stderr, never wrapped, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"Error: {' '.join(self.message.split())}", err=True)


class _Commands(click.Group):
    """Commands that show a user's mistake, a full disk and an early end as one line instead of a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UserError as error:
            raise _Mistake(str(error)) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENAMETOOLONG):
                raise
            problem = "no space left" if error.errno == errno.ENOSPC else "this name is too long for a file"
            raise _Mistake(f"{error.filename or 'the output'}: {problem}") from None
        except Stopped as stopped:
            click.echo(f"Stopped: {stopped}", err=True)
            sys.exit(stopped.exit_code)


def _quiet_libraries() -> None:
    """Silence other libraries' start-up chatter, which is not for our users; their errors still are."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers imports deepspeed wherever it is installed, which then announces that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Align vision-language models with preference pairs: packed, exact, fast."""
    _quiet_libraries()


Command = Callable[..., None]

A_PATH = click.Path(path_type=Path)
INSTRUCTION_SHAPES = click.Choice(["auto", "llava", "messages", "prompt"])
AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)

config_argument = click.argument("config", type=A_PATH)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config, e.g. --set seed=1."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for programs.")
bad_row_option = click.option(
    "--on-bad-row", type=click.Choice(["error", "skip"]), default="error", show_default=True,
    help="What to do at a row that cannot be used: stop, or leave it out.",
)  # fmt: skip


def page_option(content: str) -> Callable[[Command], Command]:
    """Add ``--out``, an HTML page that the command can write."""

    def check(_context: click.Context, _option: click.Parameter, out: Path | None) -> Path | None:
        if out is not None and out.suffix != ".html":
            raise UserError(f"--out {out}: the page is HTML; give a name that ends in .html")
        return out

    return click.option("--out", type=A_PATH, callback=check, help=f"Write a page (.html) with {content}.")


def column_option(example: str) -> Callable[[Command], Command]:
    """Add ``--column KEY=COLUMN``, which becomes a mapping, or None if it is not given."""

    def read(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
        mapped = {}
        for text in given:
            key, equals, column = text.partition("=")
            if not equals or not key or not column:
                raise UserError(f"--column {text}: write --column prompt=question")
            mapped[key] = column
        return mapped or None

    return click.option(
        "--column", "columns", multiple=True, metavar="KEY=COLUMN", callback=read, help=f"Map a column, e.g. {example}."
    )


def together_as_rows(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options that say how rows are read; the command gets them as one mapping, ``rows``."""

    def add(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            names = ("format", "columns", "image_root", "split", "subset")
            command(rows={name: values.pop(name) for name in names}, **values)

        return reduce(lambda added, option: option(added), reversed(options), cast(Command, run))

    return add


image_root_option = click.option("--image-root", type=click.Path(), help="Folder the images must lie in.")
pair_options = together_as_rows(
    click.option("--format", default="auto", show_default=True, help="Format of the pairs."),
    column_option("prompt=question"),
    image_root_option,
    click.option("--split", default="train", show_default=True, help="Split of a hub data set."),
    click.option("--subset", help="Subset of a hub data set, or an entry of dataset_info.json."),
)
instruction_options = together_as_rows(
    click.option("--format", type=INSTRUCTION_SHAPES, help="Shape of the rows. [default: auto]"),
    column_option("answer=caption"),
    image_root_option,
    click.option("--split", help="Split of a hub data set. [default: train]"),
    click.option("--subset", help="Subset of a hub data set."),
)


@main.command()
@config_argument
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in run_dir.")
@set_option
def train(config: Path, resume: bool, overrides: tuple[str, ...]) -> None:
    """Train the policy that CONFIG (a YAML file) describes."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr.training import trainer

    trainer.train(run_config, resume=resume)


@main.command()
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


@main.command()
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


@main.command()
@click.argument("source")
@click.option(
    "--to", required=True, help="Format: vapr, trl, llava, llama-factory, llama-factory-v1, ms-swift, povid or rlaif-v."
)
@click.option("--out", required=True, type=A_PATH, help="New file: .jsonl, .json or .parquet.")
@pair_options
@bad_row_option
@json_option
def convert(source: str, to: str, out: Path, rows: dict[str, Any], on_bad_row: str, as_json: bool) -> None:
    """Write the pairs of SOURCE (file, folder, glob or hub id) in another format."""
    from vapr.data import convert, sources

    opened = sources.read_pairs(source, **rows, on_bad_row=on_bad_row)
    result = {"read": opened.formats, **convert.convert(opened, to, out)}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for line in opened.formats:
        click.echo(f"read       {line}")
    click.echo(f"wrote      {out} ({result['written']:,} pairs, format {to})")
    if result["images"]:
        click.echo(f"images     {result['images']:,} files written beside it")
    for key, count in result["lost"].items():
        click.echo(f"lost       '{key}' of {count:,} pairs, which {to} has no place for")
    if result["skipped"]:
        click.echo(f"skipped    {len(result['skipped']):,} rows; the first: {next(iter(result['skipped'].values()))}")


@main.command()
@click.argument("source")
@click.option("--out", required=True, type=A_PATH, help="Page to write (.html).")
@click.option("--sample", type=AT_LEAST_1, help="Pairs to draw. [default: all of up to 1,000, else 1,000]")
@click.option("--seed", default=0, type=AT_LEAST_0, show_default=True, help="Seed of the draw and the order.")
@pair_options
@json_option
def view(source: str, out: Path, sample: int | None, seed: int, rows: dict[str, Any], as_json: bool) -> None:
    """Write a page on which a person reviews the pairs of SOURCE: keep or drop, exported as JSONL."""
    from vapr.data import sources
    from vapr.pages import review_sample

    opened = sources.read_pairs(source, **rows, on_bad_row="skip")
    result = review_sample.view(opened, out, sample=sample, seed=seed)
    notes = [*opened.formats, *opened.notes]
    click.echo(json.dumps(result, indent=2) if as_json else review_sample.show(result, notes, out))


@main.command()
@click.argument("source")
@click.option("--out", "folder", required=True, type=A_PATH, help="Folder of the job; an unfinished job in it goes on.")
@click.option(
    "--editor", default="rules", show_default=True,
    help="Editor: rules (no model), a hub id or folder that vLLM runs, or http://... of an OpenAI-compatible server.",
)  # fmt: skip
@click.option("--config", type=A_PATH, help="YAML file; docs/edit.md lists its keys.")
@set_option
@instruction_options
@click.option("--limit", type=AT_LEAST_1, help="Try about so many rows and show them; nothing is written.")
@click.option("--target", type=AT_LEAST_1, help="Stop at so many accepted pairs.")
@click.option("--retry-failed", is_flag=True, help="Ask again for what failed in an earlier start.")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes, each with its own GPUs."
)
@click.option("--ray", is_flag=True, help="Spread the shards over a Ray cluster.")
@click.option("--verdicts", type=A_PATH, help="Verdicts exported by vapr view; pairs they drop are taken out.")
@click.option(
    "--gpu-price", "price_per_gpu_hour", type=click.FloatRange(min=0),
    help="Price of a GPU-hour, to estimate what the rest costs.",
)  # fmt: skip
@json_option
def edit(
    config: Path | None, overrides: tuple[str, ...], rows: dict[str, Any], limit: int | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Make preference pairs of instruction data: the rejected answer is the true one with one targeted error.

    SOURCE is a file, folder, glob or hub id of questions with true answers about images. Pairs go to OUT/pairs; vapr
    train, audit and view take OUT. The same command goes on where a stopped one ended.
    """
    from vapr.editing.config import EditConfig
    from vapr.editing.job import summary, trial
    from vapr.editing.job.run import run
    from vapr.editing.job.start import Start

    start = Start(config=EditConfig.load(config, overrides).with_source(**rows), **options)
    say = partial(click.echo, err=True)
    if limit is not None:
        tried = trial.trial(start, limit, say)
        click.echo(json.dumps(tried, indent=2) if as_json else trial.show(tried, start, click.style))
        return
    result = run(start, say)
    lines = (summary.show(result), f"wrote       {start.folder}", summary.next_commands(result, start.folder))
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines))


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="PAIRS...")
@page_option("plots")
@click.option("--model", help="Folder or hub id: also measure what it prefers with the image and without.")
@click.option("--limit", type=AT_LEAST_1, help="Pairs of a set that the model scores, drawn at random.")
@click.option(
    "--max-pairs", type=AT_LEAST_1, default=20_000, show_default=True,
    help="Pairs of a set that the probes see, drawn at random.",
)  # fmt: skip
@click.option("--seed", type=AT_LEAST_0, default=0, show_default=True, help="Seed of every draw.")
@pair_options
@bad_row_option
@json_option
def audit(
    sources: tuple[str, ...], out: Path | None, model: str | None, limit: int | None, rows: dict[str, Any],
    on_bad_row: str, as_json: bool, **draws: int,
) -> None:  # fmt: skip
    """Measure what gives rejected answers away without the image; exit code 1 when a gate fails.

    PAIRS are files, folders (of vapr edit, too), globs or hub ids; several are shown side by side.
    """
    if limit is not None and model is None:
        raise UserError("--limit: how many pairs the model scores, and there is no --model; --max-pairs is for probes")
    from vapr.audit import measure, report_text
    from vapr.data.sources import read_pairs
    from vapr.pages import audit_report

    needed = model is not None
    opened = [read_pairs(source, **rows, on_bad_row=on_bad_row, images_needed=needed) for source in sources]
    result = measure.audit(measure.named(sources, opened), model=model, limit=limit, **draws)
    if out is not None:
        audit_report.write_audit_report(out, result)
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        report_text.show(result)
        if out is not None:
            click.echo(f"wrote {out}")
    if result["failed"]:
        sys.exit(1)


@main.command()
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


@main.command()
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
def export(run: Path, out: Path, adapter: bool, which: str, dtype: str | None) -> None:
    """Write the model of RUN as a Hugging Face folder: merged weights, or its adapter.

    RUN is a run's folder, finished or not, or one of its checkpoints.
    """
    from vapr.training.export import export

    export(run, out, adapter=adapter, which=which, dtype=dtype, say=click.echo)
    click.echo(f"wrote {out}; {out / 'README.md'} says how to load it")


@main.command()
@click.option("--out", default=Path("demo-out"), type=A_PATH, show_default=True, help="A new or empty folder.")
@click.option("--seed", default=0, type=AT_LEAST_0, show_default=True, help="Seed of pictures, weights and order.")
def demo(out: Path, seed: int) -> None:
    """Draw pictures, train a tiny policy, align it with DPO and show what changed: minutes on a CPU, no network."""
    from vapr.demo.run import run_demo

    run_demo(out, seed)


if __name__ == "__main__":
    main()
