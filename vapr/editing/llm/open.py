"""Opens a language model, and proves at once that its replies follow a schema."""

import contextlib
import json
import secrets
from typing import Any

from vapr.editing.config import EngineConfig
from vapr.errors import UserError
from vapr.llm.cached import CachedModel
from vapr.llm.reply_cache import ReplyCache
from vapr.llm.request import CUT_OFF, LanguageModel, Request


def is_server(model: str) -> bool:
    """Return whether a model's name is the address of a server."""
    return model.startswith(("http://", "https://"))


def open_llm(model: str, engine: EngineConfig, cache: ReplyCache | None = None) -> LanguageModel:
    """Open a server (``http://`` or ``https://``), or load a folder or hub id with vLLM.

    Args:
        model: the server, folder or hub id.
        engine: how it is run or asked.
        cache: replies that are kept. A model with some among them is loaded and proven only if others are wanted.

    Raises:
        UserError: if it does not open, or if its replies do not follow a schema.
    """
    llm: LanguageModel
    server: LanguageModel | None = None
    if is_server(model):
        from vapr.llm.server import ServerModel

        llm = server = ServerModel(model, engine)
        if engine.batch:
            from vapr.llm.batched import BatchedServer

            if cache is None:
                raise UserError("engine.batch: replies come back by the cache; leave --no-cache out")
            llm = BatchedServer(server, engine.extra_body, cache, engine.cache_dir)
    else:
        from vapr.editing.llm.vllm_offline import OfflineModel

        llm = OfflineModel(model, engine)

    def start(llm: LanguageModel) -> None:
        llm.start()
        # A batch would bring the proof a day later.
        prove_structured_output(llm if server is None else server, engine.reasoning_tokens)

    with contextlib.ExitStack() as unless_proven:
        unless_proven.callback(llm.close)
        if cache is None:
            start(llm)
        else:
            llm = CachedModel(llm, cache, start)
        unless_proven.pop_all()
    return llm


def prove_structured_output(llm: LanguageModel, reasoning_tokens: int = 0) -> None:
    """Ask for prose under a schema that allows one random word only.

    An engine that ignores schemas answers with prose, and nothing else would tell: vLLM dropped the ``guided_*`` keys
    in 0.12, and a server answers 200 to keys it does not know.

    Raises:
        UserError: if anything else than that word comes back.
    """
    word = secrets.token_hex(6)
    code = {"type": "string", "const": word}
    schema = {"type": "object", "properties": {"code": code}, "required": ["code"], "additionalProperties": False}
    question = {"role": "user", "content": "Describe a rainy afternoon in two sentences of plain prose."}
    reply = llm.ask([Request((question,), schema, seed=0, max_tokens=128 + reasoning_tokens, temperature=0.0)])[0]
    where = f"{llm.name} ({llm.engine})"
    # Whoever ignores the schema may well write on until it is cut off.
    if reply.problem is not None and not reply.problem.startswith(CUT_OFF):
        raise UserError(f"{where}: the first request, under a JSON schema, failed: {reply.problem}")
    if reply.text is None or _parsed(reply.text) != {"code": word}:
        got = f"{reply.text!r:.60}" if reply.text is not None else f"a reply {reply.problem}"
        raise UserError(
            f"{where}: structured output is off: a JSON schema brought {got}; use vLLM 0.30 or newer, or a server that "
            "obeys response_format json_schema, with no proxy before it that drops the key"
        )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a thousand open brackets
        return None
