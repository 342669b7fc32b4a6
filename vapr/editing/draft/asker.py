"""Sends the requests of one shard to language models."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.draft import Draft
from vapr.llm.request import BatchUnderWay, LanguageModel, Reply, Request
from vapr.progress import Display


@dataclass(slots=True)
class Tokens:
    """What the requests of a shard have cost, those of one model or all."""

    asked: int = 0  # replies that a model was asked for
    found: int = 0  # replies that others have paid for
    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def count(self, reply: Reply) -> None:
        """Add one reply."""
        if reply.found:
            self.found += 1
            return
        self.asked += 1
        self.prompt += reply.prompt_tokens
        self.cached += reply.cached_tokens
        self.generated += reply.generated_tokens


class Asker:
    """Sends the requests of one shard: each has its own seed, tokens are added up, replies are shown as progress.

    Args:
        config: of the job.
        round: how often the turns were through before.
        display: shows progress.
        asked_for: the shard of a job whose manifest will count the tokens.
    """

    def __init__(self, config: EditConfig, round: int, display: Display | None, asked_for: str = "") -> None:
        self._config, self._round, self._display, self._asked_for = config, round, display, asked_for
        self.tokens: dict[str, Tokens] = defaultdict(Tokens)  # of each model

    def advance(self, turns: int) -> None:
        """Show that so many turns more are through."""
        if turns and self._display is not None:
            self._display.advance("", turns)

    def request(
        self, draft: Draft, purpose: str, messages: prompts.Messages, schema: dict[str, Any], max_tokens: int
    ) -> Request:
        """Make a request about a draft; the same one for the same purpose in the same round, whatever shard it is in.

        So a reply that is kept is found again by jobs that divide or filter the source otherwise; --retry-failed, which
        begins another round, gets another reply.
        """
        seed = f"{self._config.seed}|{self._round}|{purpose}|{draft.turn.digest()}"
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
        max_tokens += self._config.engine.reasoning_tokens
        return Request(messages, schema, number, max_tokens, self._config.ask.temperature, self._asked_for)

    def ask(self, llm: LanguageModel, requests: Sequence[Request], what: str) -> list[Reply]:
        """Return the replies, in the order of the requests."""
        came = itertools.count(1)

        def show() -> None:
            note = f"{what}: {next(came):,} of {len(requests):,} replies"
            if self._display is not None:
                self._display.note(note)

        replies = llm.ask(requests, show)
        for reply in replies:
            self.tokens[llm.name].count(reply)
        return replies

    def ask_each(self, asked: Sequence[tuple[LanguageModel, Request]], what: str) -> list[Reply]:
        """Return the replies of several models, one model after the other, in the order of the requests.

        Raises:
            BatchUnderWay: if one of them answers by batches that have not come; the others are asked all the same.
        """
        replies: dict[int, Reply] = {}
        under_way: list[str] = []
        for llm in {id(llm): llm for llm, _ in asked}.values():
            numbers = [number for number, (its, _) in enumerate(asked) if its is llm]
            try:
                replies |= zip(numbers, self.ask(llm, [asked[number][1] for number in numbers], what), strict=True)
            except BatchUnderWay as batches:
                under_way += batches.lines
        if under_way:
            raise BatchUnderWay(under_way)
        return [replies[number] for number in range(len(asked))]


def text_of(reply: Reply) -> str:
    """Return the text of a reply. Raises BadReply if there is none."""
    if reply.text is None:
        raise prompts.BadReply(reply.problem or "no text")
    return reply.text
