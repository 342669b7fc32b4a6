"""Commands that make, change and look at pairs."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from vapr.cli.options import (
    A_PATH,
    AT_LEAST_0,
    AT_LEAST_1,
    bad_row_option,
    instruction_options,
    json_option,
    page_option,
    pair_options,
    set_option,
)
from vapr.errors import UserError


@click.command()
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
@click.option(
    "--explain", metavar="ROW", help="Show what came of one row, or what would: its place (sft.jsonl:17 or 17) or id."
)
@click.option("--target", type=AT_LEAST_1, help="Stop at so many accepted pairs.")
@click.option("--retry-failed", is_flag=True, help="Ask again for what failed in an earlier start.")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes, each with its own GPUs."
)
@click.option("--ray", is_flag=True, help="Spread the shards over a Ray cluster.")
@click.option(
    "--cache/--no-cache", default=True, help="Ask the model only what no job has asked it before.  [default: on]"
)
@click.option(
    "--verdicts", type=A_PATH, help="Verdicts of vapr view, Label Studio or Argilla; pairs they drop are taken out."
)
@click.option(
    "--push-to", metavar="NAMESPACE/NAME",
    help="Put the finished pairs with pictures and card into this data set of the hub; a new one is private.",
)  # fmt: skip
@click.option(
    "--gpu-price", "price_per_gpu_hour", type=click.FloatRange(min=0),
    help="Price of a GPU-hour, to estimate what the rest costs.",
)  # fmt: skip
@json_option
def edit(
    config: Path | None, overrides: tuple[str, ...], rows: dict[str, Any], limit: int | None,
    explain: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Make preference pairs of instruction data: the rejected answer is the true one with one targeted error.

    SOURCE is a file, folder, glob or hub id of questions with true answers about images. Pairs go to OUT/pairs; vapr
    train, audit and view take OUT. The same command goes on where a stopped one ended.
    """
    from vapr.editing.config import EditConfig
    from vapr.editing.job import explain as explanation
    from vapr.editing.job import summary, trial
    from vapr.editing.job.run import run
    from vapr.editing.job.start import Start

    start = Start(config=EditConfig.load(config, overrides).with_source(**rows), **options)
    say = partial(click.echo, err=True)
    if explain is not None:
        if limit is not None:
            raise UserError("--explain: shows one row, and --limit tries some; leave one of them out")
        told = explanation.explain(start, explain)
        click.echo(json.dumps(told, indent=2) if as_json else explanation.show(told, click.style))
        return
    if limit is not None:
        tried = trial.trial(start, limit, say)
        click.echo(json.dumps(tried, indent=2) if as_json else trial.show(tried, start, click.style))
        return
    result = run(start, say)
    lines = (summary.show(result), f"wrote       {start.folder}", summary.next_commands(result, start.folder))
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines))


@click.command()
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


@click.command()
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


@click.command()
@click.argument("source")
@click.option(
    "--to", required=True,
    help="Format: vapr, trl, llava, llama-factory, llama-factory-v1, ms-swift, povid or rlaif-v; label-studio or "
    "argilla: tasks for people.",
)  # fmt: skip
@click.option("--out", required=True, type=A_PATH, help="New file: .jsonl, .json or .parquet; for argilla a folder.")
@click.option(
    "--drop-near-duplicates", "encoder", metavar="ENCODER",
    help="Leave out pairs whose text is nearly an earlier one's, by a text encoder (folder or hub id).",
)  # fmt: skip
@click.option(
    "--similarity", type=click.FloatRange(0, 1, min_open=True),
    help="Cosine from which on texts are nearly the same. [default: 0.95]",
)  # fmt: skip
@pair_options
@bad_row_option
@json_option
def convert(
    source: str, to: str, out: Path, encoder: str | None, similarity: float | None, rows: dict[str, Any],
    on_bad_row: str, as_json: bool,
) -> None:  # fmt: skip
    """Write the pairs of SOURCE (file, folder, glob or hub id) in another format."""
    if similarity is not None and encoder is None:
        raise UserError("--similarity: of near-duplicates, and there is no --drop-near-duplicates")
    from vapr.data import convert, sources

    opened = sources.read_pairs(source, **rows, on_bad_row=on_bad_row)
    convert.check_target(to, out)
    similarity = similarity or 0.95
    near = None
    if encoder is not None:
        from vapr.audit.embedding_duplicates import near_duplicates_of

        near = near_duplicates_of(opened, encoder, similarity)
    dropped = {} if near is None else near.duplicate_of
    result = {"read": opened.formats, **convert.convert(opened, to, out, leave_out=dropped)}
    if near is not None:
        examples = [{"row": opened.where(n), "like": opened.where(m), "cosine": c} for n, (m, c) in dropped.items()]
        result["near_duplicates"] = {
            "encoder": encoder, "similarity": similarity, "compared": near.compared, "cut": near.cut,
            "dropped": examples,
        }  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for line in opened.formats:
        click.echo(f"read       {line}")
    click.echo(f"wrote      {out} ({result['written']:,} pairs, format {to})")
    if result["images"]:
        click.echo(f"images     {result['images']:,} files written beside it")
    for line in result.get("next", ()):
        click.echo(f"next       {line}")
    for key, count in result["lost"].items():
        click.echo(f"lost       '{key}' of {count:,} pairs, which {to} has no place for")
    if near is not None:
        click.echo(f"compared   {near.compared:,} texts of at least 8 words, by {encoder}")
        click.echo(f"dropped    {len(dropped):,} near-duplicates, of a cosine of {similarity:g} or more")
        for example in result["near_duplicates"]["dropped"][:3]:
            click.echo(f"           {example['row']} is nearly {example['like']} ({example['cosine']:.3f})")
        if near.cut:
            click.echo(f"cut        {near.cut:,} texts longer than the encoder reads; their beginnings were compared")
    if result["skipped"]:
        click.echo(f"skipped    {len(result['skipped']):,} rows; the first: {next(iter(result['skipped'].values()))}")


COMMANDS = (edit, audit, view, convert)
