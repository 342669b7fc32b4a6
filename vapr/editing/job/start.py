"""One start of an edit job: what the command line asks for, and the folder and editor that are opened for it."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.draft.draft import RULES
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.mix import Mix
from vapr.editing.draft.own_checks import OwnChecks, file_of
from vapr.editing.draft.picture_editor import PictureEditor
from vapr.editing.draft.prompts import prompt_hash
from vapr.editing.job.folder import Job
from vapr.editing.job.pair_rows import digest_of
from vapr.editing.llm.open import is_server, open_llm
from vapr.editing.rules.categories import Categories, load_categories
from vapr.errors import UserError
from vapr.llm.reply_cache import ReplyCache
from vapr.llm.request import LanguageModel


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
    def editors(self) -> dict[str, float]:
        """The language models that edit, with their weights; none where rules alone do."""
        if self.config.editors is not None:
            return self.config.editors
        return {} if self.editor == RULES else {self.editor: 1.0}

    @property
    def models(self) -> list[str]:
        """All models of the job, each once."""
        judges = (self.config.checks.verifier, self.config.ask.judge)
        return list(dict.fromkeys([*self.editors, *(model for model in judges if model is not None)]))

    @property
    def loaded_models(self) -> list[str]:
        """The models that a worker loads by itself."""
        return [model for model in self.models if not is_server(model)]


ADDRESS = re.compile(r"[\w.-]+:\d+(/.*)?|(localhost|\d+(\.\d+){3})(/.*)?")
"""The address of a server without http://."""


def check_model_names(start: Start) -> None:
    """Check the names of editors and judges before the hub is asked for them.

    Raises:
        UserError: if a name is the address of a server, or nearly "rules", if editors are given twice, or if there is
            no model to ask, or one that is to change pictures.
    """
    editor, config = start.editor, start.config
    if config.editors is not None and editor != RULES:
        raise UserError(f"--editor {editor}: the config has 'editors' already; leave one of them out")
    if config.editors is not None and RULES in config.editors:
        raise UserError(f"editors.{RULES}: rules edit what they can beside any model; name models alone")
    judges = {"checks.verifier": config.checks.verifier, "ask.judge": config.ask.judge}
    named = [("--editor", editor), *(("editors", name) for name in config.editors or ()), *judges.items()]
    for key, name in named:
        if name is not None and ADDRESS.fullmatch(name) and not Path(name).exists():
            raise UserError(
                f"{key} {name}: the address of a server begins with http:// or https://; did you mean http://{name}?"
            )
    if editor != RULES and start.config.picture is not None:
        raise UserError(f"--editor {editor}: pictures are changed by rules, no model is asked; leave --editor out")
    if editor != RULES and difflib.get_close_matches(editor, [RULES], cutoff=0.7) and not Path(editor).exists():
        raise UserError(f"--editor {editor}: did you mean '{RULES}'?")
    if not start.editors:
        for key, given in {"checks.blind": config.checks.blind, "ask.candidates": config.ask.candidates > 1}.items():
            if given:
                raise UserError(f"{key}: the rules editor has no language model to ask; give one with --editor")


def check_batches(start: Start) -> None:
    """Check that one process alone sends and fetches batches.

    Raises:
        UserError: if several are to.
    """
    if start.config.engine.batch and (start.workers > 1 or start.ray):
        raise UserError("engine.batch: one process sends and fetches all batches; leave --workers and --ray out")


def open_job(start: Start) -> Job:
    """Make or find the job's folder."""
    identity: dict[str, Any] = {
        "editor": _place(start.editor),
        "prompts": prompt_hash(_categories(start.config), start.config.ask.rubric),
    }
    if start.config.editors is not None:
        identity["editors"] = [[_place(name), weight] for name, weight in start.config.editors.items()]
    if (file := file_of(start.config.checks)) is not None:
        identity["own_check"] = digest_of(file)
    return Job(start.folder, start.source, start.config, identity)


def _place(editor: str) -> str:
    """Return what a job's settings say of an editor. A server may move; who answers there is in editor.json."""
    return "a server" if is_server(editor) else editor


@contextlib.contextmanager
def open_editor(start: Start, *, keep: bool = True) -> Iterator[Editor | PictureEditor]:
    """Load the editor's models; they are given back at the end. Unless ``keep``, new pictures are not written."""
    config, engine = start.config, start.config.engine
    if config.picture is not None:
        yield PictureEditor(config, _categories(config), start.folder if keep else None)
        return
    if len(start.loaded_models) > 1:  # they share the GPUs
        engine = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / len(start.loaded_models))
    with contextlib.ExitStack() as stack:
        own_checks = None
        if config.checks.python is not None or config.checks.patterns:
            own_checks = stack.enter_context(contextlib.closing(OwnChecks(config.checks)))
        cache = stack.enter_context(_cache(engine.cache_dir)) if start.cache and start.models else None
        models: dict[str | None, LanguageModel] = {}
        for name in start.models:
            models[name] = stack.enter_context(contextlib.closing(open_llm(name, engine, cache)))
        weighed = [(models[name], weight) for name, weight in start.editors.items()]
        mix = Mix(weighed, config.seed) if weighed else None
        yield Editor(
            config, _categories(config), mix, models.get(config.checks.verifier), _picture,
            models.get(config.ask.judge), own_checks, None if cache is None else cache.note_counted,
        )  # fmt: skip


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
