"""What editing asks of a language model, and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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


CUT_OFF = "cut off after"
"""How the problem of a reply begins that reached ``max_tokens``."""


def cut_off(tokens: int) -> str:
    """The problem of a reply that reached ``max_tokens``."""
    return f"{CUT_OFF} {tokens} tokens"
