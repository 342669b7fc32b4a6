"""Sends the requests of one shard to language models."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.draft import Draft
from vapr.llm.request import LanguageModel, Reply, Request
from vapr.progress import Display


@dataclass(slots=True)
class Tokens:
    """The tokens of all requests of a shard."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Asker:
    """Sends the requests of one shard: each has its own seed, tokens are added up, replies are shown as progress."""

    def __init__(self, config: EditConfig, shard: str, display: Display | None) -> None:
        self._seed, self._temperature, self._display = f"{config.seed}|{shard}", config.ask.temperature, display
        self.tokens = Tokens()

    def advance(self, turns: int) -> None:
        """Show that so many turns more are through."""
        if turns and self._display is not None:
            self._display.advance("", turns)

    def request(
        self, draft: Draft, purpose: str, messages: prompts.Messages, schema: dict[str, Any], max_tokens: int
    ) -> Request:
        """Make a request about a draft; the same one for the same purpose, whatever else is in the shard."""
        digest = hashlib.sha256(f"{self._seed}|{purpose}|{draft.turn.digest()}".encode()).digest()
        return Request(messages, schema, int.from_bytes(digest[:4], "little") >> 1, max_tokens, self._temperature)

    def ask(self, llm: LanguageModel, requests: Sequence[Request], what: str) -> list[Reply]:
        """Return the replies, in the order of the requests."""
        came = itertools.count(1)

        def show() -> None:
            note = f"{what}: {next(came):,} of {len(requests):,} replies"
            if self._display is not None:
                self._display.note(note)

        replies = llm.ask(requests, show)
        for reply in replies:
            self.tokens.prompt += reply.prompt_tokens
            self.tokens.cached += reply.cached_tokens
            self.tokens.generated += reply.generated_tokens
        return replies

    def ask_each(self, asked: Sequence[tuple[LanguageModel, Request]], what: str) -> list[Reply]:
        """Return the replies of several models, one model after the other, in the order of the requests."""
        replies: dict[int, Reply] = {}
        for llm in {id(llm): llm for llm, _ in asked}.values():
            numbers = [number for number, (its, _) in enumerate(asked) if its is llm]
            replies |= zip(numbers, self.ask(llm, [asked[number][1] for number in numbers], what), strict=True)
        return [replies[number] for number in range(len(asked))]


def text_of(reply: Reply) -> str:
    """Return the text of a reply. Raises BadReply if there is none."""
    if reply.text is None:
        raise prompts.BadReply(reply.problem or "no text")
    return reply.text
