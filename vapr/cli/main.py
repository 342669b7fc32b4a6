"""The ``vapr`` command: parses and calls, nothing else. Torch loads only when a command needs it."""

import contextlib
import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import click

from vapr import __version__
from vapr.cli import evaluation_commands, pair_commands, training_commands
from vapr.errors import UserError
from vapr.interrupts import Stopped

GRACE = 10.0
"""Seconds that the other processes wait for the first to show a mistake: launchers kill all when the first one ends."""


class _Mistake(click.ClickException):
    """A user's mistake: one line on stderr, never wrapped, exit code 2.

    Of several processes on a machine, all of which find it before they know of each other, the first shows it.
    """

    exit_code = 2

    def show(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(GRACE)
            return
        click.echo(f"Error: {' '.join(self.message.split())}", err=True)


@contextlib.contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vapr"
        raise _Mistake(f"{error.format_message()} See {command} --help") from None


class _Commands(click.Group):
    """Commands that show a user's mistake, a full disk and an early end as one line instead of a traceback."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        try:
            with _usage_in_one_line():
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
    # The hub's client warns of each of its retries; that it could not be reached is in our own message.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # transformers imports deepspeed wherever it is installed, which then announces that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
# DeepSpeed's launcher says twice which process of a machine this is; LOCAL_RANK is what counts.
@click.option("--local_rank", type=int, hidden=True, expose_value=False)
def main() -> None:
    """Align vision-language models with preference pairs: packed, exact, fast."""
    _quiet_libraries()


for _command in (*training_commands.COMMANDS, *pair_commands.COMMANDS, *evaluation_commands.COMMANDS):
    main.add_command(_command)
