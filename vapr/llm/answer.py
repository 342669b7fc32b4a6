"""What a server's answer says: the reply in it, or why there is none."""

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from vapr.llm.reasoning import StillReasoning, without_reasoning
from vapr.llm.request import Reply, cut_off

MAX_RETRY_AFTER_SECONDS = 300.0
TRY_AGAIN = (408, 409, 425, 429)
"""Statuses that may pass, besides every 5xx."""
THOUGHTS = ("reasoning_content", "reasoning")
"""Where servers put what a model says before its answer."""


class Failure(Exception):
    """A call that has brought nothing usable.

    Attributes:
        problem: what went wrong.
        said: the words of the server or of the connection, if there were any.
        status: the HTTP status; None if it was 200 or there was no answer.
        retry_after: seconds that the server asks to wait.
        answered: False if no answer came.
        timed_out: whether it did not come in time.
    """

    def __init__(
        self, problem: str, said: object = None, *, status: int | None = None, retry_after: float = 0.0,
        answered: bool = True, timed_out: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(problem)
        self.problem, self.said, self.status = problem, said, status
        self.retry_after, self.answered, self.timed_out = retry_after, answered, timed_out

    @property
    def may_pass(self) -> bool:
        """Tell whether the same request may be answered later; proxies also send HTTP 200 with nothing in it."""
        return self.status is None or self.status in TRY_AGAIN or self.status >= 500


def read_reply(body: Any, max_tokens: int, section: str) -> Reply:
    """Return the reply in the parsed body of an answer.

    Args:
        body: as the server has sent it.
        max_tokens: the limit of the request.
        section: the section of the config that a way out lies in.

    Raises:
        Failure: if there is no reply in it.
    """
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        usage = body.get("usage") or {}
        prompt, generated = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise Failure("an answer without choices") from None
    problem, reasons = None, False
    if isinstance(text, str):
        try:
            text = without_reasoning(text)
        except StillReasoning:
            reasons = True
    if finish == "length" or reasons:
        problem = cut_off(generated or max_tokens) + (" of reasoning" if reasons else "")
    elif finish == "content_filter" or message.get("refusal"):
        problem = "refused by the server's content filter or by the model"
    elif not isinstance(text, str) or not text.strip():
        problem = _empty_reply(message, section)
    return Reply(text if problem is None else None, problem, prompt, cached, generated)


def _empty_reply(message: dict[str, Any], section: str) -> str:
    for key in THOUGHTS:
        if isinstance(thought := message.get(key), str) and thought.strip():
            return (
                f"an empty reply: all of it is in {key} ({' '.join(thought.split())[:60]!r}); have the server not "
                f"think, for instance with {section}.extra_body={{chat_template_kwargs: {{enable_thinking: false}}}}, "
                "or without its reasoning parser"
            )
    return "an empty reply"


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the server asks to wait (RFC 9110, 10.2.3: a whole number or a date), within reason."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
