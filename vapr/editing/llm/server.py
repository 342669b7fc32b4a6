"""An LLM behind any OpenAI-compatible server: bounded concurrency, retries, and rows that fail alone."""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from vapr.editing.config import SAMPLING, EngineConfig
from vapr.editing.llm.request import Reply, Request, cut_off, tell_nobody
from vapr.errors import UserError

LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 300.0
REFUSED = {
    401: "it wants another key",
    403: "the key may not use this model",
    404: "check the URL and engine.model",
}
"""What is wrong with every request, not with one."""
TRY_AGAIN = (408, 409, 425, 429)
"""And every 5xx."""


class ServerModel:
    """A model of an OpenAI-compatible server.

    Args:
        url: of the server, with or without ``/v1``.
        engine: its server keys are read.
        sleep: waits between tries, in seconds.

    Raises:
        UserError: if the server cannot be reached, or it is unclear which of its models is meant.
    """

    num_gpus = 0

    def __init__(
        self, url: str, engine: EngineConfig, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a language model behind a server needs the openai package; pip install openai") from None
        self._openai = openai
        self._settings = engine
        self._sleep = sleep
        self._key = _read_key(engine.api_key_env)
        self._shown = _without_secrets(url)
        self._base_url = _with_version(url)
        self.engine = f"openai-compatible server at {self._shown}"
        self.name, self.revision = self._choose(asyncio.run(self._list_models()))

    def ask(self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody) -> list[Reply]:
        """Replies in the order of the requests; a row that still fails after every try is a reply with a problem.

        Raises:
            UserError: if the server refuses the key or the model, or is gone.
        """
        return asyncio.run(self._ask(requests, on_reply))

    def close(self) -> None:
        """Nothing to give back: connections live as long as one :meth:`ask`."""

    async def _ask(self, requests: Sequence[Request], on_reply: Callable[[], None]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(requests)
        waiting = enumerate(requests)  # shared by the workers: each takes the next one

        async def work(client: Any) -> None:
            for number, request in waiting:
                replies[number] = await self._answer(client, request)
                on_reply()

        async with self._client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self._settings.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [reply for reply in replies if reply is not None]

    async def _answer(self, client: Any, request: Request) -> Reply:
        problem, details, retry_after = "", "", 0.0
        for attempt in range(self._settings.tries):
            if attempt:
                await self._sleep(max(retry_after, _backoff(attempt)))
            retry_after, details, reachable = 0.0, "", True
            try:
                return _read_reply(await self._send(client, request), request)
            except self._openai.APIStatusError as error:
                status = error.status_code
                problem, details = f"HTTP {status}", self._said(error)
                if status in REFUSED:
                    raise UserError(f"server {self._shown}: {problem}{details}; {self._way_out(status)}") from None
                if status not in TRY_AGAIN and status < 500:
                    return Reply(None, problem + details + _refused_parameter(details))
                retry_after = _retry_after(error.response.headers)
            except (TimeoutError, self._openai.APITimeoutError):
                problem, reachable = f"no answer within {self._settings.timeout_seconds:g} s", False
            except self._openai.APIConnectionError:
                problem, reachable = "broken connection", False
            except _UnusableAnswer as error:
                problem, details = str(error), self._named(error.said)
        if not reachable and not await self._is_there(client):
            raise UserError(
                f"server {self._shown} is not reachable any more; finished shards are kept, run the same command again"
            )
        return Reply(None, f"{problem} after {self._settings.tries} tries{details}")

    async def _send(self, client: Any, request: Request) -> Any:
        """The body of the answer, parsed. One timeout for all of it: a server may also send a byte now and then."""
        schema = {"name": "reply", "schema": request.schema, "strict": True}
        sampling = {"seed": request.seed, "max_tokens": request.max_tokens, "temperature": request.temperature}
        for name in self._settings.omit:
            del sampling[name]
        async with asyncio.timeout(self._settings.timeout_seconds):
            response = await client.chat.completions.with_raw_response.create(
                model=self.name,
                messages=list(request.messages),
                response_format={"type": "json_schema", "json_schema": schema},
                extra_body=self._settings.extra_body,
                **sampling,
            )
        return _parse_body(response)

    async def _list_models(self) -> list[dict[str, Any]]:
        async with self._client() as client:
            try:
                return await self._models(client)
            except self._openai.APIStatusError as error:
                status = error.status_code
                if status == 404 and self._settings.model is not None:  # some gateways list nothing
                    return []
                problem = f"HTTP {status}{self._said(error)}; {self._way_out(status)}"
            except (TimeoutError, self._openai.APITimeoutError):
                problem = f"no answer within {self._settings.timeout_seconds:g} s"
            except self._openai.APIConnectionError as error:
                cause = self._redacted(str(error.__cause__ or error))
                problem = f"not reachable ({cause}); check the URL, and that the server is running"
            except _UnusableAnswer as error:
                said = self._named(error.said)
                problem = f"{error} when asked for its models{said}; is this an OpenAI-compatible server?"
        raise UserError(f"server {self._shown}: {problem}")

    async def _models(self, client: Any) -> list[dict[str, Any]]:
        async with asyncio.timeout(self._settings.timeout_seconds):
            response = await client.models.with_raw_response.list()
        body = _parse_body(response)
        _check_sound(body)
        models = body.get("data") if isinstance(body, dict) else None
        if not isinstance(models, list) or not all(isinstance(m, dict) and m.get("id") for m in models):
            raise _UnusableAnswer("it sent no list of models")
        return models

    async def _is_there(self, client: Any) -> bool:
        try:
            await self._models(client)
        except (TimeoutError, self._openai.APIConnectionError):
            return False
        except (self._openai.APIStatusError, _UnusableAnswer):
            return True
        return True

    def _choose(self, models: list[dict[str, Any]]) -> tuple[str, str]:
        """Name and revision of the model that is meant. A name that is not listed is tried all the same."""
        name = self._settings.model
        if name is None:
            if len(models) != 1:
                listed = ", ".join(str(model["id"]) for model in models) or "none"
                raise UserError(
                    f"server {self._shown} lists {len(models)} models; engine.model must name one: {listed}"
                )
            name = str(models[0]["id"])
        root = next((model.get("root") for model in models if model["id"] == name), None)
        return name, f"server-said {root or name}"

    def _client(self) -> Any:
        return self._openai.AsyncOpenAI(
            base_url=self._base_url, api_key=self._key or "none", max_retries=0, timeout=None
        )

    def _way_out(self, status: int) -> str:
        if status in (401, 403):
            variable = self._settings.api_key_env
            return f"{REFUSED[status]} ({variable} is {'set' if self._key else 'not set'})"
        return REFUSED.get(status, "look at the server's log")

    def _said(self, error: Any) -> str:
        """A refusing server's own words, if it sent any."""
        message = error.body.get("message") if isinstance(error.body, dict) else None
        return self._named(message)

    def _named(self, words: object) -> str:
        return f": {self._redacted(str(words))}" if words else ""

    def _redacted(self, text: str) -> str:
        """In one line and without the key, which some servers repeat."""
        without_key = text.replace(self._key, "***") if self._key else text
        return " ".join(without_key.split())[:300]


class _UnusableAnswer(Exception):
    """HTTP 200, but not what was asked for. Proxies do that, so the request is sent again.

    Attributes:
        said: the server's own words, if it sent any.
    """

    def __init__(self, problem: str, said: object = None) -> None:
        super().__init__(problem)
        self.said = said


def _check_sound(body: Any) -> None:
    """Raise _UnusableAnswer for an error that comes with HTTP 200, as gateways send it."""
    if isinstance(body, dict) and (error := body.get("error")):
        said = (error.get("message") or error) if isinstance(error, dict) else error
        raise _UnusableAnswer("an error in place of an answer", said)


def _refused_parameter(details: str) -> str:
    """The way out where a server names a parameter that it does not take."""
    named = [name for name in SAMPLING if re.search(rf"\b{name}\b", details)]
    return f"; engine.omit=[{named[0]}] leaves it out, engine.extra_body sends what is wanted instead" if named else ""


THOUGHTS = ("reasoning_content", "reasoning")
"""Where servers put what a model says before its answer."""


def _nothing_said(message: dict[str, Any]) -> str:
    for key in THOUGHTS:
        if isinstance(thought := message.get(key), str) and thought.strip():
            return (
                f"an empty reply: all of it is in {key} ({' '.join(thought.split())[:60]!r}); have the server not "
                "think, for instance with engine.extra_body={chat_template_kwargs: {enable_thinking: false}}, or "
                "without its reasoning parser"
            )
    return "an empty reply"


def _read_reply(body: Any, request: Request) -> Reply:
    _check_sound(body)
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        usage = body.get("usage") or {}
        prompt, generated = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise _UnusableAnswer("an answer without choices") from None
    problem = None
    if finish == "length":
        problem = cut_off(generated or request.max_tokens)
    elif finish == "content_filter" or message.get("refusal"):
        problem = "refused by the server's content filter or by the model"
    elif not isinstance(text, str) or not text.strip():
        problem = _nothing_said(message)
    return Reply(text if problem is None else None, problem, prompt, cached, generated)


def _parse_body(response: Any) -> Any:
    try:
        return json.loads(response.http_response.text)
    except (ValueError, RecursionError):
        raise _UnusableAnswer("an answer that is not JSON") from None


def _backoff(attempt: int) -> float:
    """Seconds before a further try: about 1, 2, 4, ... with jitter, so that requests do not come back all at once."""
    return min(2.0 ** (attempt - 1), LONGEST_BACKOFF) * random.uniform(0.5, 1.5)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a whole number or a date), within reason."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return min(float(value), LONGEST_RETRY_AFTER)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


def _with_version(url: str) -> str:
    """The address below which /chat/completions is: /v1 is added unless the path names a version itself."""
    return url if re.search(r"/v\d", urlsplit(url).path) else url.rstrip("/") + "/v1"


def _without_secrets(url: str) -> str:
    """The URL as it may be shown and written down: no user, password or query."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise UserError("the server's URL has no host or a wrong port; write http://host:port or https://host/v1")
    return (
        f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
    )
