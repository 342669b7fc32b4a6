"""Figures of speed and memory in the documents, and the rows of bench/results that they were read off.

A block of lines (a paragraph, a list item, a table) with such a figure has an HTML comment that says where it is from:

    <!-- row: 16.4, 34.2 = train_step, 3f2a9c1b, small-llava, vapr shared cached: pairs_per_second, step_mib / 1024 -->
    <!-- row: 5.2 = train_step, 3f2a9c1b, small-llava, trl: pairs_per_second; 3.2 = 16.4 / 5.2 -->
    <!-- predicted: 34.17 = vapr plan run.yaml -->
    <!-- given: 64 = Docker's default -->

A row is named by its benchmark, its run and as many of its values as it takes; the fields stand behind the colon, in the
order of the figures. Code blocks are left out, and what scripts write: tables of results and families, keys of
the config.
"""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = (
    r"times\b|x\b|-fold\b|(?:[a-z]+ a|[a-z]+ per|[a-z]+/) ?s(?:econd)?\b|T?FLOPS?(?:/s)?\b"
    r"|ms\b|s\b|min\b|seconds?\b|minutes?\b|hours?\b|[KMG]iB(?:/s)?\b|[KMG]B/s"
)
UNIT_OF_COLUMN = re.compile(r"\b(?:ms|seconds|[KMG]iB|\w+/s|(?:a|per) second)\b")
# "5.4 s", "172 to 71 ms", "3.2x", "3.2 pairs a second"; not the "640 x 480" of a picture
FIGURE = re.compile(rf"(?<![\w.,])({NUMBER})(?: (?:to|and|or|of|instead of) ({NUMBER}))? ?(?:{UNIT})(?! ?\d)")
WRITTEN = re.compile(
    r"<!-- (results|config|families):begin -->.*?<!-- \1:end -->|^```.*?^```", re.DOTALL | re.MULTILINE
)
COMMENT = re.compile(r"<!-- (row|predicted|given):\s(.*?) -->", re.DOTALL)


@dataclass(slots=True)
class Block:
    """Lines without an empty one between them."""

    line: int  # of the first, from 1
    text: str  # without its comments
    comments: list[tuple[str, str]] = field(default_factory=list)  # kind and content


def problems(text: str, rows: list[Row]) -> list[str]:
    """Say which figures of a document have no row, and which comments do not hold; each line begins with a number."""
    return [f"{block.line}: {line}" for block in blocks(text) for line in block_problems(block, rows)]


def blocks(text: str) -> list[Block]:
    text = WRITTEN.sub(lambda written: "\n" * written.group().count("\n"), text)
    found = []
    for match in re.finditer(r"(?:^.*\S.*\n?)+", text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, COMMENT.sub("", match.group()), COMMENT.findall(match.group())))
    return found


def block_problems(block: Block, rows: list[Row]) -> list[str]:
    lines = []
    known: dict[str, float] = {}  # a figure as it is written -> the value of its row
    explained: set[str] = set()
    for kind, content in block.comments:
        for claim in " ".join(content.split()).split("; "):
            left, _, right = claim.partition(" = ")
            figures = left.split(", ")
            explained.update(figures)
            try:
                if not right:
                    raise ValueError("is not 'FIGURE = WHERE IT IS FROM'")
                if absent := [figure for figure in figures if figure not in numbers(block.text)]:
                    raise ValueError(f"{', '.join(absent)} is not in the text")
                if kind == "row":
                    check(figures, claimed_values(right, known, rows), known)
            except (LookupError, ValueError) as error:
                lines.append(f"<!-- {kind}: {claim} -->: {error}")
    missing = dict.fromkeys(figure for figure in claims_of_speed(block.text) if figure not in explained)
    return lines + [f"{figure}: no comment names its row; see tests/figures.py" for figure in missing]


def check(figures: list[str], values: list[float], known: dict[str, float]) -> None:
    """Compare figures with the values of their row, and note these in ``known``; ValueError where they differ."""
    for figure, value in zip(figures, values, strict=True):
        known[figure] = value
        if not rounds_to(value, figure):
            raise ValueError(f"{figure} is {value:.6g} in the row")


def numbers(text: str) -> list[str]:
    return re.findall(NUMBER, text)


def claims_of_speed(text: str) -> list[str]:
    """Numbers with a unit behind them, and those of a table's columns that have a unit at their head."""
    flat = " ".join(text.replace("*", "").split())
    found = [number for match in FIGURE.finditer(flat) for number in match.groups() if number]
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    for column, head in enumerate(lines[0] if lines else []):
        if UNIT_OF_COLUMN.search(head):
            found += [number for line in lines[2:] if len(line) > column for number in numbers(line[column])]
    return found


def claimed_values(right: str, known: dict[str, float], rows: list[Row]) -> list[float]:
    """Look the fields of a row up, or divide two figures that were looked up before.

    Raises:
        LookupError: if no row or several have these values, or the row lacks a field.
    """
    if quotient := re.fullmatch(rf"({NUMBER}) / ({NUMBER})", right):
        return [known[quotient[1]] / known[quotient[2]]]  # KeyError: neither was looked up before
    names, _, fields = right.rpartition(": ")
    if ", " not in names:
        raise ValueError("is not 'BENCH, RUN, VALUES: FIELDS'")
    bench, run, *values = next(csv.reader([names], skipinitialspace=True))  # "up, 7b" is one value in quotes
    matching = [
        row for row in rows
        if (row["bench"], row["run"]) == (bench, run) and {*values} <= {str(value) for value in row.values()}
    ]  # fmt: skip
    if len(matching) != 1:
        raise LookupError(f"{len(matching)} rows have these values")
    return [_value(matching[0], name) for name in fields.split(", ")]


def _value(row: Row, name: str) -> float:
    """Return a field such as ``seconds_p50``, ``seconds_p50 * 1000`` or ``step_mib / 1024``."""
    field, *scaling = name.split()
    if field not in row:
        raise LookupError(f"the row has no {field}")
    value = float(row[field])
    for sign, number in zip(scaling[::2], scaling[1::2], strict=True):
        value = value * float(number) if sign == "*" else value / float(number)
    return value


def rounds_to(value: float, figure: str) -> bool:
    """Whether a value is the figure, as far as the figure has digits."""
    digits = len(figure.partition(".")[2])
    return abs(value - float(figure.replace(",", ""))) <= 0.5 * 10**-digits * (1 + 1e-9)


def read_rows(folder: Path) -> list[Row]:
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]
