"""Pages are Jinja templates beside this file; here they are rendered and written, with pictures as text."""

import base64
import functools
import hashlib
import io
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from vapr.cache import written_whole
from vapr.data.images import as_rgb

MAX_THUMBNAIL_SIDE = 360


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template and write the page, whole or not at all."""
    with written_whole(path) as file:
        file.write(render(template, **values).encode(errors="replace"))  # a lone surrogate becomes "?"


def render(template: str, **values: Any) -> Markup:
    """Render a template of this folder. Values are escaped unless they are ``Markup``; a missing one is an error."""
    return Markup(_environment().get_template(template).render(**values))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vapr", "pages"), undefined=jinja2.StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    environment.globals |= {"file": _file, "sha256": _sha256}
    return environment


def _file(name: str) -> Markup:
    """Return a style or script of this folder, to be put into a page as it is."""
    return Markup((resources.files("vapr.pages") / name).read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    """Return the digest of a script as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def thumbnail(image: Image.Image, max_side: int = MAX_THUMBNAIL_SIDE) -> str:
    """Return a picture as a ``data:`` URI: a JPEG in the colours that a model is shown.

    Args:
        image: the picture; it is not changed.
        max_side: longest side of the JPEG, in pixels; smaller pictures keep their size.
    """
    small = as_rgb(image)
    small.thumbnail((max_side, max_side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
