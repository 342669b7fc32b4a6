"""A language model that is asked only what it has not answered before."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from vapr.llm.reply_cache import ReplyCache
from vapr.llm.request import LanguageModel, Reply, Request, keep_nowhere, tell_nobody


class CachedModel:
    """A model behind the replies that are kept of it.

    A reply is found again if all that makes it is the same: model, revision, its settings, messages, schema, limit of
    tokens, temperature and seed. At temperature 0 the seed makes no reply and does not count. What an engine or server
    has answered in place of the model is not kept, so that it is asked for again.

    Args:
        llm: the model, not started.
        cache: its replies, and others'. It stays open.
        start: starts the model and proves that it is of use.
    """

    def __init__(self, llm: LanguageModel, cache: ReplyCache, start: Callable[[LanguageModel], None]) -> None:
        self.name, self.revision, self.engine, self.num_gpus = llm.name, llm.revision, llm.engine, llm.num_gpus
        self.settings = llm.settings
        self._llm, self._cache, self._start = llm, cache, start
        self._model = [llm.name, llm.revision, llm.settings]
        self._started = False
        if not cache.knows_model(digest(self._model)):
            self.start()

    def start(self) -> None:
        """Start the model, once. One that has been of use before waits until there is something to ask."""
        if not self._started:
            self._start(self._llm)
            self._started = True
            self._cache.note_model(digest(self._model))

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        """Return replies in the order of the requests, the model's only where none is kept."""
        keys = [self._key(request) for request in requests]
        found: dict[bytes, Reply] = {}
        for asked_for in {request.asked_for for request in requests}:
            theirs = [key for key, request in zip(keys, requests, strict=True) if request.asked_for == asked_for]
            found |= self._cache.find(theirs, asked_for)
        missing = [number for number, key in enumerate(keys) if key not in found]
        for number, key in enumerate(keys):
            if key in found:
                keep(number, found[key])
                on_reply()
        replies: dict[int, Reply] = {}
        if missing:
            self.start()

            def keep_here(place: int, reply: Reply) -> None:
                number = missing[place]
                if reply.text is not None or reply.generated_tokens:  # the model's own
                    self._cache.keep(keys[number], reply, reply.asked_for or requests[number].asked_for)
                keep(number, reply)

            try:
                new = self._llm.ask([requests[number] for number in missing], on_reply, keep_here)
            finally:
                self._cache.write()  # what has come before an engine stopped is paid for
            replies = dict(zip(missing, new, strict=True))
        return [replies[number] if number in replies else found[key] for number, key in enumerate(keys)]

    def close(self) -> None:
        """Give the model's memory back."""
        self._llm.close()

    def _key(self, request: Request) -> bytes:
        omitted = self.settings.get("omit", ())
        temperature = None if "temperature" in omitted else request.temperature
        seed = None if temperature == 0 else request.seed  # where it is not sent, it still tells one try from another
        asked = [request.messages, request.schema, request.max_tokens, temperature, seed]
        return digest([*self._model, *asked])


def digest(value: Any) -> bytes:
    """Return 16 bytes that are the same for the same JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
