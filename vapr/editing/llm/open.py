"""What editing asks of a language model, and the proof at start-up that its replies follow a schema."""

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vapr.editing.config import EngineConfig
from vapr.errors import UserError


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation whose next message is wanted, as JSON that follows ``schema``.

    Attributes:
        messages: chat messages; content is text, or for a vision-language model a list of ``{"type": "text"}`` and
            ``{"type": "image_url", "image_url": {"url": data URI}}`` parts.
        schema: JSON schema.
        seed: of the sampling. The same request gives the same reply as far as the engine's arithmetic does.
        max_tokens: most tokens of the reply.
        temperature: 0 takes the likeliest token each time.
    """

    messages: tuple[dict[str, Any], ...]
    schema: dict[str, Any]
    seed: int
    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: ``text``, or a ``problem`` of one line. Tokens are counted where the engine says how many."""

    text: str | None
    problem: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's tokens, those that were found in the prefix cache
    generated_tokens: int = 0


def tell_nobody() -> None:
    """The ``on_reply`` of whoever wants no progress."""


class LanguageModel(Protocol):
    """vLLM in this process or a server.

    Attributes:
        name: hub id, folder name or the server's model id.
        revision: sha256 of a folder's files, commit of a hub id, or what the server says.
        engine: what runs it, with its version where that is known.
        num_gpus: that this process keeps busy; 0 for a server, which does not say.
    """

    name: str
    revision: str
    engine: str
    num_gpus: int

    def ask(self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody) -> list[Reply]:
        """Replies in the order of the requests. ``on_reply`` is called once for each, as they come.

        Raises:
            UserError: if the engine is gone or refuses everything; what concerns one request is its reply's problem.
        """
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


def open_llm(model: str, engine: EngineConfig) -> LanguageModel:
    """Open a server (``http://`` or ``https://``), or load a folder or hub id with vLLM.

    Raises:
        UserError: if it does not open, or if its replies do not follow a schema.
    """
    llm: LanguageModel
    if model.startswith(("http://", "https://")):
        from vapr.editing.llm.server import ServerModel

        llm = ServerModel(model, engine)
    else:
        from vapr.editing.llm.vllm_offline import OfflineModel

        llm = OfflineModel(model, engine)
    with contextlib.ExitStack() as unless_proven:
        unless_proven.callback(llm.close)
        prove_structured_output(llm)
        unless_proven.pop_all()
    return llm


def prove_structured_output(llm: LanguageModel) -> None:
    """Ask for prose under a schema that allows one random word only.

    An engine that ignores schemas answers with prose, and nothing else would tell: vLLM dropped the ``guided_*`` keys
    in 0.12, and a server answers 200 to keys it does not know.

    Raises:
        UserError: if anything else than that word comes back.
    """
    nonce = secrets.token_hex(6)
    code = {"type": "string", "const": nonce}
    schema = {"type": "object", "properties": {"code": code}, "required": ["code"], "additionalProperties": False}
    question = {"role": "user", "content": "Describe a rainy afternoon in two sentences of plain prose."}
    reply = llm.ask([Request((question,), schema, seed=0, max_tokens=128, temperature=0.0)])[0]
    where = f"{llm.name} ({llm.engine})"
    # Whoever ignores the schema may well write on until it is cut off.
    if reply.problem is not None and not reply.problem.startswith(CUT_OFF):
        raise UserError(f"{where}: the first request, under a JSON schema, failed: {reply.problem}")
    if reply.text is None or _parsed(reply.text) != {"code": nonce}:
        got = f"{reply.text!r:.60}" if reply.text is not None else f"a reply {reply.problem}"
        raise UserError(
            f"{where}: structured output is off: a JSON schema brought {got}; use vLLM 0.30 or newer, or a server that "
            "obeys response_format json_schema, with no proxy before it that drops the key"
        )


CUT_OFF = "cut off after"
"""How the problem of a reply begins that reached ``max_tokens``."""


def cut_off(tokens: int) -> str:
    """The problem of a reply that reached ``max_tokens``."""
    return f"{CUT_OFF} {tokens} tokens"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a thousand open brackets
        return None
