"""The reference of every config key as Markdown, made from the dataclasses and docstrings of a config module.

    python scripts/config_reference.py [--of run|edit] [--write docs/config.md | --check docs/config.md]

``--of run`` (the default) is vapr/config.py, ``--of edit`` vapr/editing/config.py.

``--write`` replaces the block between the markers below; ``--check`` exits 1 if that block is out of date.
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "kernels")]

from vapr.config import Config  # noqa: E402
from vapr.editing.config import EditConfig  # noqa: E402

CONFIGS: dict[str, Any] = {"run": Config, "edit": EditConfig}
BEGIN, END = "<!-- config:begin -->", "<!-- config:end -->"
WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=list(CONFIGS), default="run")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args()
    file = options.write or options.check
    if file is None:
        print(render(options.of))
        return 0
    old = file.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        print(f"{file}: no '{BEGIN}' ... '{END}' block in it; add the two lines where the reference belongs")
        return 2
    new = replace_block(old, render(options.of))
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{file}: it is out of date; run scripts/config_reference.py --of {options.of} --write {file}")
        return 1
    return 0


def replace_block(text: str, block: str) -> str:
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def render(of: str = "run") -> str:
    """Every section: its heading, its docstring, a table of its keys."""
    docs = read_docs(inspect.getmodule(CONFIGS[of]))
    return "\n\n".join(part for name, section in sections(CONFIGS[of]) for part in section_parts(name, section, docs))


def sections(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(name, dataclass) of the config and of every section below it; a class that two keys share is named by both."""
    found: dict[Any, list[str]] = {section: [prefix]}
    for key, annotation in hints(section).items():
        for below in dataclasses_in(annotation):
            for name, inner in sections(below, f"{prefix}.{key}".lstrip(".")):
                found.setdefault(inner, []).append(name)
    return [(" and ".join(names), inner) for inner, names in found.items()]


def section_parts(name: str, section: Any, docs: dict[str, dict[str, str]]) -> list[str]:
    heading = " and ".join(f"`{part}`" for part in name.split(" and ")) if name else "Top level"
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(section):
        annotation = hints(section)[field.name]
        if dataclasses.is_dataclass(annotation) and field.name not in docs[section.__name__]:
            continue  # a section of its own says all there is to say
        full = f"{name.split(' and ')[0]}.{field.name}".lstrip(".")
        meaning = docs[section.__name__].get(field.name, "")
        cells = (f"`{full}`", words(annotation), default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [f"## {heading}", plain(section.__doc__), "\n".join(lines)]


def hints(section: Any) -> dict[str, Any]:
    known = typing.get_type_hints(section)
    return {field.name: known[field.name] for field in dataclasses.fields(section)}


def dataclasses_in(annotation: Any) -> list[Any]:
    """The sections that a type mentions, each once."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    found = [section for part in typing.get_args(annotation) for section in dataclasses_in(part)]
    return list(dict.fromkeys(found))


def words(annotation: Any) -> str:
    """A type as a user says it."""
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return ", ".join(f"`{part}`" for part in parts)
        case types.UnionType | typing.Union:
            return " or ".join(dict.fromkeys(words(part) for part in parts))
        case kind if kind is list:
            return f"list of {words(parts[0]).removesuffix('s')}s"
        case kind if kind is tuple:
            return f"{len(parts)} numbers"
        case kind if kind is dict:
            return f"mapping of {words(parts[0])} to {words(parts[1])}"
    return "mapping" if dataclasses.is_dataclass(annotation) else WORDS[annotation]


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value) or (isinstance(value, list) and value and dataclasses.is_dataclass(value[0])):
        return "the section's defaults"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower().replace('none', 'null')}`"
    shown = list(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, int | float) else value
    return f"`{shown}`"


def read_docs(module: Any) -> dict[str, dict[str, str]]:
    """The string under each field, by class and field."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            docs[node.name] = {
                line.target.id: plain(below.value.value)
                for line, below in pairs
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            }  # fmt: skip
    return docs


def plain(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


if __name__ == "__main__":
    sys.exit(main())
