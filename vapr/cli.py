"""The ``vapr`` command: parses and calls, nothing else. Torch loads only when a command needs it."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from vapr import __version__
from vapr.errors import UserError


class _Mistake(click.ClickException):
    """A user's mistake: one line on stderr, never wrapped, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"Error: {' '.join(self.message.split())}", err=True)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show a UserError as one line instead of a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            raise _Mistake(str(error)) from None

    return run


def _quiet_libraries() -> None:
    """Other libraries' start-up chatter is not for our users; their errors still are."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers imports deepspeed wherever it is installed, which then announces that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Align vision-language models with preference pairs: packed, exact, fast."""
    _quiet_libraries()


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in run_dir.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set optim.lr=1e-6."
)
@one_line_errors
def train(config: Path, resume: bool, overrides: tuple[str, ...]) -> None:
    """Train the policy that CONFIG (a YAML file) describes."""
    from vapr.config import Config

    run_config = Config.load(config, overrides)
    from vapr import trainer

    try:
        trainer.train(run_config, resume=resume)
    except trainer.TrainingStopped as stopped:
        click.echo(f"Stopped: {stopped}", err=True)
        sys.exit(stopped.exit_code)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the model.")
@click.option("--adapter", is_flag=True, help="Write the PEFT adapter instead of merged weights.")
@one_line_errors
def export(run: Path, out: Path, adapter: bool) -> None:
    """Write the model of a finished RUN as a Hugging Face folder: merged weights, or its adapter."""
    from vapr import checkpoint

    checkpoint.export(run, out, adapter=adapter)
    click.echo(f"wrote {out}")


@main.command()
@click.option(
    "--out", default=Path("demo-out"), type=click.Path(path_type=Path), show_default=True, help="A new or empty folder."
)
@click.option(
    "--seed", default=0, type=click.IntRange(min=0), show_default=True, help="Of pictures, weights and order."
)
@one_line_errors
def demo(out: Path, seed: int) -> None:
    """Draw pictures, train a tiny policy, align it with DPO and show what changed: minutes on a CPU, no network."""
    from vapr.demo.run import run_demo
    from vapr.trainer import TrainingStopped

    try:
        run_demo(out, seed)
    except TrainingStopped as stopped:
        click.echo(f"Stopped: {stopped}", err=True)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
