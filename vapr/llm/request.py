"""Requests to a language model and its replies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation whose next message is wanted, as JSON that follows ``schema`` if there is one."""

    messages: tuple[dict[str, Any], ...]
    """Chat messages; content is text, or for a vision-language model a list of ``{"type": "text"}`` and ``{"type":
    "image_url", "image_url": {"url": data URI}}`` parts."""
    schema: dict[str, Any] | None  # None: plain text
    seed: int  # of the sampling; the same request gives the same reply as far as the engine's arithmetic does
    max_tokens: int
    temperature: float  # 0 takes the likeliest token each time
    asked_for: str = ""
    """The shard of a job whose manifest counts what the reply costs; it makes no reply. Empty: nobody counts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: ``text``, or a ``problem`` of one line. Tokens are counted where the engine says how many."""

    text: str | None
    problem: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's tokens, those that were found in the prefix cache
    generated_tokens: int = 0
    found: bool = False  # among replies that were kept, and not paid for by who asks now
    asked_for: str = ""  # of the request that it was paid for, if another one than this


class BatchUnderWay(Exception):
    """Replies that are not there yet: their requests are in batches that the server works on at its leisure.

    Attributes:
        lines: what the server says of each batch.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def tell_nobody() -> None:
    """Do nothing: the ``on_reply`` of whoever wants no progress."""


def keep_nowhere(number: int, reply: Reply) -> None:
    """Do nothing: the ``keep`` of whoever waits for all replies."""


class LanguageModel(Protocol):
    """vLLM in this process or a server."""

    name: str  # hub id, folder name or the server's model id
    revision: str  # sha256 of a folder's files, commit of a hub id, or what the server says
    engine: str  # what runs it, with its version where that is known
    num_gpus: int  # that this process keeps busy; 0 for a server, which does not say
    settings: dict[str, Any]  # what else changes a reply, beside name, revision and the request

    def start(self) -> None:
        """Load what has to be loaded before the first :meth:`ask`; name and revision are known without.

        Raises:
            UserError: if it does not start.
        """
        ...

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        """Return replies in the order of the requests.

        Args:
            requests: what is asked.
            on_reply: called once for each, as they come.
            keep: called with the number of each request and its reply, as soon as the engine gives it away.

        Raises:
            UserError: if the engine is gone or refuses everything; what concerns one request is its reply's problem.
        """
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


SAMPLING = ("seed", "max_tokens", "temperature")
"""What a request says of the sampling, and a config's ``omit`` can leave out."""
FIXED = ("model", "messages", "response_format")
"""What a config's ``extra_body`` cannot replace."""
CUT_OFF = "cut off after"
"""The beginning of the problem of a reply that reached ``max_tokens``."""


def cut_off(tokens: int) -> str:
    """Return the problem of a reply that reached ``max_tokens``."""
    return f"{CUT_OFF} {tokens} tokens"


def check_extra_body(body: dict[str, Any] | None, section: str) -> dict[str, Any] | None:
    """Return what a config adds to the body of every request.

    Raises:
        ValueError: for a key that is the request's own; ``section`` names the section of the config.
    """
    for key in body or ():
        if key in FIXED:
            raise ValueError(f"{section}.extra_body must be keys other than {', '.join(FIXED)}, got '{key}'")
    return body
