"""docs/benchmarks.md: its table names what is read, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from vapr.cli import main
from vapr.evaluation.readers.shapes import SHAPES

PAGE = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" # ")[0]
    for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
ROWS = {row.split("`")[1]: row for row in PAGE.splitlines() if row.startswith("| `")}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_in_the_table(name):
    for shape in SHAPES[name]:
        for file in shape.title.removeprefix("VLMEvalKit's ").split(" and "):
            assert file in ROWS[name], f"{file} is not in the row of {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    program, name, *arguments = shlex.split(command)
    assert program == "vapr"
    main.commands[name].make_context(name, arguments)
