"""The ``vapr`` command: parses and calls, nothing else. Torch loads only when a command needs it."""

from vapr.cli.main import main as main
