"""One start of an edit job: what the command line asks for, and the folder and editor that are opened for it."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vapr.editing.config import EditConfig
from vapr.editing.draft.editor import RULES, Editor
from vapr.editing.draft.picture_editor import PictureEditor
from vapr.editing.draft.prompts import prompt_hash
from vapr.editing.job.folder import Job
from vapr.editing.llm.open import is_server, open_llm
from vapr.editing.rules.categories import Categories, load_categories
from vapr.errors import UserError
from vapr.llm.reply_cache import ReplyCache


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a job: what may be different the next time."""

    source: str
    folder: Path
    editor: str = RULES
    config: EditConfig
    target: int | None = None
    retry_failed: bool = False
    workers: int = 1
    ray: bool = False
    price_per_gpu_hour: float | None = None
    verdicts: Path | None = None
    push_to: str | None = None
    cache: bool = True

    @property
    def loaded_models(self) -> list[str]:
        """The models that a worker loads by itself."""
        models = (self.editor, self.config.checks.verifier)
        return [model for model in models if model is not None and model != RULES and not is_server(model)]


ADDRESS = re.compile(r"[\w.-]+:\d+(/.*)?|(localhost|\d+(\.\d+){3})(/.*)?")
"""The address of a server without http://."""


def check_model_names(start: Start) -> None:
    """Check the names of editor and verifier before the hub is asked for them.

    Raises:
        UserError: if a name is the address of a server, or nearly "rules", or a model is to change pictures.
    """
    editor = start.editor
    for key, name in (("--editor", editor), ("checks.verifier", start.config.checks.verifier)):
        if name is not None and ADDRESS.fullmatch(name) and not Path(name).exists():
            raise UserError(
                f"{key} {name}: the address of a server begins with http:// or https://; did you mean http://{name}?"
            )
    if editor != RULES and start.config.picture is not None:
        raise UserError(f"--editor {editor}: pictures are changed by rules, no model is asked; leave --editor out")
    if editor != RULES and difflib.get_close_matches(editor, [RULES], cutoff=0.7) and not Path(editor).exists():
        raise UserError(f"--editor {editor}: did you mean '{RULES}'?")


def check_batches(start: Start) -> None:
    """Check that one process alone sends and fetches batches.

    Raises:
        UserError: if several are to.
    """
    if start.config.engine.batch and (start.workers > 1 or start.ray):
        raise UserError("engine.batch: one process sends and fetches all batches; leave --workers and --ray out")


def open_job(start: Start) -> Job:
    """Make or find the job's folder."""
    # A server may move; who answers there is in editor.json.
    editor = "a server" if is_server(start.editor) else start.editor
    identity = {"editor": editor, "prompts": prompt_hash(_categories(start.config))}
    return Job(start.folder, start.source, start.config, identity)


@contextlib.contextmanager
def open_editor(start: Start, *, keep: bool = True) -> Iterator[Editor | PictureEditor]:
    """Load the editor's models; they are given back at the end. Unless ``keep``, new pictures are not written."""
    config, engine = start.config, start.config.engine
    if config.picture is not None:
        yield PictureEditor(config, _categories(config), start.folder if keep else None)
        return
    if len(start.loaded_models) > 1:  # they share the GPUs
        engine = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / 2)
    llm, verifier, cache = None, None, None
    with contextlib.ExitStack() as stack:
        if start.cache and (start.editor != RULES or config.checks.verifier is not None):
            cache = stack.enter_context(_cache(engine.cache_dir))
        if start.editor != RULES:
            llm = stack.enter_context(contextlib.closing(open_llm(start.editor, engine, cache)))
        elif config.checks.blind:
            raise UserError("checks.blind: the rules editor has no language model to ask; give one with --editor")
        if config.checks.verifier is not None:
            verifier = stack.enter_context(contextlib.closing(open_llm(config.checks.verifier, engine, cache)))
        yield Editor(config, _categories(config), llm, verifier, _picture)


@contextlib.contextmanager
def _cache(folder: str | None) -> Iterator[ReplyCache]:
    """Open the replies that are kept; a fault that has ended their use in the middle is told at the end."""
    with contextlib.closing(ReplyCache(folder)) as cache:
        try:
            yield cache
        finally:
            if cache.fault is not None:
                print(f"{cache.fault}; {cache.lost:,} replies were not kept", file=sys.stderr)


def _categories(config: EditConfig) -> Categories:
    return load_categories(config.plan.categories, config.plan.add_categories)


def _picture(image: Path | bytes) -> str:
    from vapr.data.images import read_image
    from vapr.pages.page import thumbnail

    return thumbnail(read_image(image))
