"""One start of a job: what the command line asks for, and the folder and editor opened for it."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.prompts import prompt_hash
from vapr.editing.job.folder import Job
from vapr.editing.llm.open import open_llm
from vapr.editing.llm.request import LanguageModel
from vapr.editing.rules.categories import load_categories
from vapr.errors import UserError

RULES = "rules"


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

    @property
    def loaded_models(self) -> list[str]:
        """Models that a worker loads by itself."""
        models = (self.editor, self.config.checks.verifier)
        return [model for model in models if model not in (None, RULES) and not str(model).startswith("http")]


ADDRESS = re.compile(r"[\w.-]+:\d+(/.*)?|(localhost|\d+(\.\d+){3})(/.*)?")
"""Of a server, without http://."""


def check_names(start: Start) -> None:
    """Before the hub is asked for them."""
    editor = start.editor
    for key, name in (("--editor", editor), ("checks.verifier", start.config.checks.verifier)):
        if name is not None and ADDRESS.fullmatch(name) and not Path(name).exists():
            raise UserError(
                f"{key} {name}: the address of a server begins with http:// or https://; did you mean http://{name}?"
            )
    if editor != RULES and difflib.get_close_matches(editor, [RULES], cutoff=0.7) and not Path(editor).exists():
        raise UserError(f"--editor {editor}: did you mean '{RULES}'?")


def open_job(start: Start) -> Job:
    """The job's folder, made or found."""
    plan = start.config.plan
    categories = load_categories(plan.categories, plan.add_categories)
    # A server may move; who answers there is in editor.json.
    editor = "a server" if start.editor.startswith(("http://", "https://")) else start.editor
    identity = {"editor": editor, "prompts": prompt_hash(categories)}
    return Job(start.folder, start.source, start.config, identity)


@contextlib.contextmanager
def open_editor(start: Start) -> Iterator[Editor]:
    """The editor, with its models loaded; they are given back at the end."""
    config = start.config
    categories = load_categories(config.plan.categories, config.plan.add_categories)
    with contextlib.ExitStack() as stack:
        llm, verifier = None, None
        engine = config.engine
        if len(start.loaded_models) > 1:  # they share the GPUs
            engine = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / 2)
        if start.editor != RULES:
            llm = open_llm(start.editor, engine)
            stack.callback(llm.close)
        elif config.checks.blind:
            raise UserError("checks.blind: the rules editor has no language model to ask; give one with --editor")
        if config.checks.verifier is not None:
            verifier = open_llm(config.checks.verifier, engine)
            stack.callback(verifier.close)
        yield Editor(config, categories, llm, verifier, _picture)


def _picture(image: Path | bytes) -> str:
    from vapr.data.images import read_image
    from vapr.pages.page import thumbnail

    return thumbnail(read_image(image))


def identity(start: Start, editor: Editor) -> dict[str, Any]:
    """Who edits, for provenance."""
    llm: LanguageModel | None = editor.llm
    return {
        "name": llm.name if llm else RULES,
        "revision": llm.revision if llm else None,
        "engine": llm.engine if llm else None,
        "prompt_hash": prompt_hash(editor.categories),
        "seed": start.config.seed,
        "temperature": start.config.ask.temperature if llm else None,
    }
