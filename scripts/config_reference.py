"""The reference of every config key as Markdown, made from the fields of the config classes and their documentation.

    python scripts/config_reference.py [--of run|edit|study] [--write docs/config.md | --check docs/config.md]

``--of run`` (the default) is vapr/config.py, ``--of edit`` vapr/editing/config.py, ``--of study`` vapr/study/config.py.

``--write`` replaces the block between the markers below; ``--check`` exits 1 if that block is out of date.
"""

import argparse
import sys
import types
import typing
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "kernels")]

from pydantic.fields import FieldInfo  # noqa: E402

from vapr.config import Config  # noqa: E402
from vapr.config_mistakes import fields_of, rule, sections_in  # noqa: E402
from vapr.editing.config import EditConfig  # noqa: E402
from vapr.study.config import StudyConfig  # noqa: E402

CONFIGS: dict[str, Any] = {"run": Config, "edit": EditConfig, "study": StudyConfig}
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
    """Return every section: its heading, its docstring, a table of its keys. A study's other sections are a run's."""
    shown = sections(CONFIGS[of])[: 1 if of == "study" else None]
    return "\n\n".join(part for names, section in shown for part in section_parts(names, section))


def sections(section: Any, prefix: str = "") -> list[tuple[list[str], Any]]:
    """Return names and class of the config and of every section below it; a class that two keys share has two names."""
    found: dict[Any, list[str]] = {section: [prefix]}
    for key, field in fields_of(section).items():
        for below in sections_in(field.annotation):
            for names, inner in sections(below, f"{prefix}.{key}".lstrip(".")):
                found.setdefault(inner, []).extend(names)
    return [(names, inner) for inner, names in found.items()]


def section_parts(names: list[str], section: Any) -> list[str]:
    heading = " and ".join(f"`{name}`" for name in names if name) or "Top level"
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in fields_of(section).items():
        if field.description is None and field.annotation in sections_in(field.annotation):
            continue  # a section of its own says all there is to say
        limits = rule(field).removeprefix("null or ")
        value = f"{words(field.annotation)}; {limits}" if limits else words(field.annotation)
        cells = (f"`{f'{names[0]}.{key}'.lstrip('.')}`", value, default(field), plain(field.description or ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [f"## {heading}", plain(section.__doc__), "\n".join(lines)]


def words(annotation: Any) -> str:
    """Return a type as a user says it."""
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Annotated:
            return words(parts[0])
        case typing.Literal:
            return ", ".join(f"`{part}`" for part in parts)
        case types.UnionType | typing.Union:
            return " or ".join(dict.fromkeys(words(part) for part in parts))
        case kind if kind is list:
            item = "mapping" if typing.get_origin(parts[0]) is dict else words(parts[0])
            return f"list of {item}" + ("" if item.endswith(("s", "`")) else "s")
        case kind if kind is tuple:
            return f"{len(parts)} numbers"
        case kind if kind is dict:
            return f"mapping of {words(parts[0])} to {words(parts[1])}"
    return "mapping" if sections_in(annotation) else WORDS[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if sections_in(type(value)) or (isinstance(value, list) and value and sections_in(type(value[0]))):
        return "the section's defaults"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower().replace('none', 'null')}`"
    shown = list(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, int | float) else value
    return f"`{shown}`"


def plain(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


if __name__ == "__main__":
    sys.exit(main())
