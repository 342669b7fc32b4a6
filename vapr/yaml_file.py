"""Reads YAML in which no key is given twice: of two, YAML itself takes the last and says nothing."""

import re
from pathlib import Path
from typing import Any

import yaml

from vapr.errors import UserError, one_line

try:
    from yaml import CSafeLoader as Loader  # ten times as fast
except ImportError:  # built without libyaml
    from yaml import SafeLoader as Loader  # type: ignore[assignment]

MERGE = "tag:yaml.org,2002:merge"


class _EachKeyOnce(Loader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if key in seen and name.tag != MERGE:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", name.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if it is no YAML, gives a key twice, or holds a date that is none.
    """
    return yaml.load(text, _EachKeyOnce)


def read_text(path: str | Path, where: str | None = None) -> str:
    """Read a text file; messages name it, or ``where``.

    Raises:
        UserError: naming the file, if it is not there or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where or path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{where or path}: cannot be read as a text file ({reason})") from None


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: naming the file, if it cannot be read, is no YAML, or gives a key twice.
    """
    text = read_text(path)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and re.match(r"[ -]*\t", "".join(text.splitlines()[mark.line : mark.line + 1])):
            place = f"{path}:{mark.line + 1}"
            raise UserError(f"{place}: a tab in the indentation; YAML takes only spaces there") from None
        said = one_line(error).replace('in "<unicode string>", line', "in line")
        raise UserError(f"{path}: not valid YAML: {said}") from None
