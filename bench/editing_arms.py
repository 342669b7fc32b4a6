"""The arms of the editing benchmark: a unit of vapr edit, its requests alone, and vLLM without vapr."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vapr.editing.draft.editor import Editor
from vapr.editing.job.folder import Job
from vapr.editing.job.start import Start, open_job
from vapr.editing.job.worker import Worker
from vapr.editing.llm.vllm_offline import OfflineModel
from vapr.llm.cached import CachedModel
from vapr.llm.reply_cache import ReplyCache
from vapr.llm.request import LanguageModel, Reply, Request, keep_nowhere, tell_nobody
from vapr.progress import Display


def timed_alone(arm: Any, device: torch.device) -> float:
    """Seconds of an arm, its preparation left out: the clock of :func:`bench.record.measure`."""
    arm.prepare()
    began = time.perf_counter()
    arm()
    return time.perf_counter() - began


def forget(llm: LanguageModel) -> None:
    """Empty vLLM's prefix cache: each arm computes every prompt for the first time."""
    if isinstance(llm, OfflineModel) and not llm._llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache")


class WholeUnit:
    """One unit of ``vapr edit``: rows read, planned, asked, applied, checked, and all files written."""

    def __init__(self, start: Start, editor: Editor, folder: Path) -> None:
        self._start, self._editor, self._folder = start, editor, folder
        self._job: Job | None = None
        self.generated = 0

    def prepare(self) -> None:
        """A new folder with the source scanned."""
        self._job = open_job(replace(self._start, folder=self._folder / uuid.uuid4().hex))
        forget(self._editor.mix.models[0])

    def __call__(self) -> None:
        with Display("edit", self._job.num_turns, unit="answer") as display:
            Worker(self._start, self._job, self._editor, display).work()
        self.generated = self._job.manifests()[0]["tokens"]["generated"]


class WholeUnitKept(WholeUnit):
    """The same unit, whose replies are looked for among none and then kept, as in a first run."""

    def __init__(self, start: Start, editor: Editor, folder: Path) -> None:
        super().__init__(start, editor, folder)
        self._without = editor

    def prepare(self) -> None:
        """Besides, a cache with nothing in it."""
        without, llm = self._without, self._without.mix.models[0]
        cache = ReplyCache(str(self._folder / uuid.uuid4().hex))
        kept = CachedModel(llm, cache, lambda llm: None)
        self._editor = Editor(without.config, without.categories, kept)
        super().prepare()
        forget(llm)


class Known:
    """A language model that has answered before: each request's reply is there at once."""

    def __init__(self, llm: OfflineModel) -> None:
        self.name, self.revision, self.engine, self.num_gpus = llm.name, llm.revision, llm.engine, llm.num_gpus
        self.settings, self._llm = llm.settings, llm
        self.replies: dict[str, Reply] = {}
        self.requests: list[Request] = []

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        asked = [repr(replace(request, asked_for="")) for request in requests]  # every round is another job
        new = [request for request, key in zip(requests, asked, strict=True) if key not in self.replies]
        if new:
            self.requests += new
            self.replies |= dict(
                zip([key for key in asked if key not in self.replies], self._llm.ask(new), strict=True)
            )
        for _ in requests:
            on_reply()
        return [self.replies[key] for key in asked]


class Instant:
    """A model that needs no time: what it answers is as long as an edit."""

    name, revision, engine, num_gpus, settings = "instant", "1", "none", 0, {"engine": "none"}
    TEXT = '{"edits": [{"find": "apple", "replace": "pear", "category": "object", "why_wrong": "It is an apple."}]}'

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        replies = [Reply(self.TEXT, None, 900, 800, 40) for _ in requests]
        for number, reply in enumerate(replies):
            keep(number, reply)
        return replies


class Asking:
    """vapr's own way to vLLM, with nothing around it."""

    def __init__(self, llm: OfflineModel, requests: Sequence[Request]) -> None:
        self._llm, self._requests = llm, requests
        self.generated = 0

    def prepare(self) -> None:
        forget(self._llm)

    def __call__(self) -> None:
        self.generated = sum(reply.generated_tokens for reply in self._llm.ask(self._requests))


class Bare:
    """``LLM.chat`` on messages and sampling parameters that were made before."""

    def __init__(self, llm: OfflineModel, requests: Sequence[Request]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self._llm = llm
        self._chats = [list(request.messages) for request in requests]
        self._sampling = [
            SamplingParams(
                max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed,
                structured_outputs=StructuredOutputsParams(json=request.schema),
            )
            for request in requests
        ]  # fmt: skip
        self.generated = 0

    def prepare(self) -> None:
        forget(self._llm)

    def __call__(self) -> None:
        outputs = self._llm._llm.chat(self._chats, self._sampling, use_tqdm=False)
        self.generated = sum(len(output.outputs[0].token_ids) for output in outputs)
