"""A language model behind any OpenAI-compatible server: as fast as it bears, retries, and rows that fail alone.

The openai package's own retries are off: they do not wait for a server that asks for more than two minutes, never wait
longer than 8 seconds otherwise, and take what a proxy sends with HTTP 200 for an answer.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from vapr.errors import UserError
from vapr.llm.answer import Failure, read_reply, retry_after
from vapr.llm.pace import TOO_MUCH, Pace
from vapr.llm.request import SAMPLING, Reply, Request, keep_nowhere, tell_nobody

MAX_BACKOFF_SECONDS = 60.0
REFUSED = {
    401: "it wants another key",
    403: "the key may not use this model",
    404: "check the URL and {section}.model",
}
"""Statuses that say what is wrong with every request, not with one."""


class ServerSettings(Protocol):
    """The keys of a config that say how a server is asked; what they mean stands there."""

    @property
    def model(self) -> str | None: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def tries(self) -> int: ...
    @property
    def api_key_env(self) -> str: ...
    @property
    def omit(self) -> Sequence[str]: ...
    @property
    def max_tokens_as(self) -> str: ...
    @property
    def extra_body(self) -> dict[str, Any] | None: ...


class ServerModel:
    """A model of an OpenAI-compatible server.

    Args:
        url: the address of the server, with or without ``/v1``.
        settings: how it is asked.
        section: the section of the config that holds the settings, for messages.

    Raises:
        UserError: if the server cannot be reached, or it is unclear which of its models is meant.
    """

    num_gpus = 0

    def __init__(self, url: str, settings: ServerSettings, section: str = "engine") -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a language model behind a server needs the openai package; pip install openai") from None
        self._openai = openai
        self._settings, self._section = settings, section
        self._key = _read_key(settings.api_key_env)
        self._shown = _without_secrets(url)
        self._base_url = _with_version(url)
        self.engine = f"openai-compatible server at {self._shown}"
        self._pace = Pace(settings.concurrency, settings.timeout_seconds)
        self.name, self.revision, about = self._choose(asyncio.run(self._list_models()))
        self.settings = {"omit": sorted(settings.omit), "extra_body": settings.extra_body, "about": about}

    def start(self) -> None:
        """Do nothing: somebody else has started it."""

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        """Return replies in the order of the requests; a row that fails after every try is a reply with a problem.

        Raises:
            UserError: if the server refuses the key or the model, or is gone.
        """

        def came(number: int, reply: Reply) -> None:
            keep(number, reply)
            on_reply()

        return self.ask_each(requests, came)

    def ask_each(self, requests: Sequence[Request], on_each: Callable[[int, Reply], None]) -> list[Reply]:
        """Do as :meth:`ask`; ``on_each`` is called with the number of a request and its reply, as they come."""
        return asyncio.run(self._ask(requests, on_each))

    def close(self) -> None:
        """Give nothing back: connections live as long as one :meth:`ask`."""

    async def _ask(self, requests: Sequence[Request], on_each: Callable[[int, Reply], None]) -> list[Reply]:
        async def answer(number: int, request: Request) -> Reply:
            await self._pace.enter()
            if (wait := self._pace.seconds_to_wait()) > 0:
                await asyncio.sleep(wait)
            try:
                reply = await self._answer(client, request)
            finally:
                self._pace.leave()
            on_each(number, reply)
            return reply

        try:
            with self._pace.running():
                async with self.client() as client, asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answer(*one)) for one in enumerate(requests)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, client: Any, request: Request) -> Reply:
        for attempt in range(1, self._settings.tries + 1):
            sent_at = time.monotonic()
            try:
                reply = read_reply(await self._body(self._send(client, request)), request.max_tokens, self._section)
                self._pace.answered(sent_at)
                return reply
            except Failure as error:
                failure = error
            words = self._quote(failure.said) if failure.answered else ""
            if failure.status in REFUSED:
                raise UserError(f"server {self._shown}: {failure.problem}{words}; {self._way_out(failure.status)}")
            if not failure.may_pass:
                return Reply(None, failure.problem + words + self._refused_parameter(words))
            too_much = failure.status in TOO_MUCH or failure.timed_out
            if too_much:
                self._pace.too_much(sent_at, failure.retry_after)
            if attempt < self._settings.tries:
                await self._wait(max(failure.retry_after, _backoff(attempt)), give_place=too_much)
        if not failure.answered and not await self._is_there(client):
            raise UserError(
                f"server {self._shown} is not reachable any more; what is finished is kept, run the same command again"
            )
        return Reply(None, f"{failure.problem} after {self._settings.tries} tries{words}")

    async def _wait(self, seconds: float, *, give_place: bool) -> None:
        """Wait before a further try. One that asked too much gives its place away: there are fewer places now.

        Others keep theirs, or every request would be tried on a server that is gone before the first is given up.
        """
        seconds = max(seconds, self._pace.seconds_to_wait())
        if not give_place:
            await asyncio.sleep(seconds)
            return
        self._pace.leave()
        await asyncio.sleep(seconds)
        await self._pace.enter(again=True)

    def body_of(self, request: Request) -> dict[str, Any]:
        """Return the body of a request, without the keys of ``extra_body``."""
        sampling: dict[str, Any] = {
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
        for name in self._settings.omit:
            del sampling[name]
        if "max_tokens" in sampling:
            sampling[self._settings.max_tokens_as] = sampling.pop("max_tokens")
        if request.schema is not None:
            schema = {"name": "reply", "schema": request.schema, "strict": True}
            sampling["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {"model": self.name, "messages": list(request.messages), **sampling}

    def _send(self, client: Any, request: Request) -> Awaitable[Any]:
        return client.chat.completions.with_raw_response.create(
            **self.body_of(request), extra_body=self._settings.extra_body
        )

    async def _body(self, call: Awaitable[Any]) -> Any:
        """Wait for an answer and return its body, parsed.

        Raises:
            Failure: if nothing usable comes.
        """
        try:
            body = json.loads(await self._text(call))
        except (ValueError, RecursionError):
            raise Failure("an answer that is not JSON") from None
        if isinstance(body, dict) and (refusal := body.get("error")):  # as gateways send it with HTTP 200
            said = (refusal.get("message") or refusal) if isinstance(refusal, dict) else refusal
            raise Failure("an error in place of an answer", said)
        return body

    async def _text(self, call: Awaitable[Any]) -> str:
        """Wait for an answer and return it. One timeout for all of it: bytes may come now and then.

        Raises:
            Failure: if nothing comes, or an error.
        """
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                response = await call
            return str(response.http_response.text)
        except self._openai.APIStatusError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            wait = retry_after(error.response.headers)
            raise Failure(f"HTTP {error.status_code}", said, status=error.status_code, retry_after=wait) from None
        except (TimeoutError, self._openai.APITimeoutError):
            problem = f"no answer within {self._settings.timeout_seconds:g} s"
            raise Failure(problem, answered=False, timed_out=True) from None
        except self._openai.APIConnectionError as error:
            raise Failure("broken connection", error.__cause__ or error, answered=False) from None
        except ValueError:
            raise Failure("an answer that is no text") from None

    async def call(self, what: Callable[[], Awaitable[Any]], *, unless_silent: bool = False) -> str:
        """Return the text that a call of the client brings, after some tries.

        Args:
            what: makes the call.
            unless_silent: no further try where no answer came.

        Raises:
            Failure: with the last problem.
        """
        for attempt in range(1, self._settings.tries + 1):
            try:
                return await self._text(what())
            except Failure as error:
                failure = error
            if not failure.may_pass or (unless_silent and not failure.answered):
                break
            if attempt < self._settings.tries:
                await asyncio.sleep(max(failure.retry_after, _backoff(attempt)))
        raise failure

    def told(self, failure: Failure) -> str:
        """Say in one line what has failed."""
        return f"server {self._shown}: {failure.problem}{self._quote(failure.said)}"

    async def _list_models(self) -> list[dict[str, Any]]:
        async with self.client() as client:
            try:
                return await self._models(client)
            except Failure as error:
                failure = error
        problem, words = failure.problem, self._quote(failure.said)
        if failure.status == 404 and self._settings.model is not None:  # some gateways list nothing
            return []
        if failure.status is not None:
            problem += f"{words}; {self._way_out(failure.status)}"
        elif failure.answered:
            problem += f" when asked for its models{words}; is this an OpenAI-compatible server?"
        elif failure.said:
            problem = f"not reachable ({words.removeprefix(': ')}); check the URL, and that the server is running"
        raise UserError(f"server {self._shown}: {problem}")

    async def _models(self, client: Any) -> list[dict[str, Any]]:
        body = await self._body(client.models.with_raw_response.list())
        models = body.get("data") if isinstance(body, dict) else None
        if not isinstance(models, list) or not all(isinstance(m, dict) and m.get("id") for m in models):
            raise Failure("it sent no list of models")
        return models

    async def _is_there(self, client: Any) -> bool:
        try:
            await self._models(client)
        except Failure as failure:
            return failure.answered
        return True

    def _choose(self, models: list[dict[str, Any]]) -> tuple[str, str, Any]:
        """Return name and revision of the model that is meant, and what llama.cpp's server tells about its weights.

        A name that is not listed is tried all the same.
        """
        name = self._settings.model
        if name is None:
            if len(models) != 1:
                listed = ", ".join(str(model["id"]) for model in models) or "none"
                raise UserError(
                    f"server {self._shown} lists {len(models)} models; {self._section}.model must name one: {listed}"
                )
            name = str(models[0]["id"])
        listed_so = next((model for model in models if model["id"] == name), {})
        return name, f"server-said {listed_so.get('root') or name}", listed_so.get("meta")

    def client(self) -> Any:
        """Return a client of the openai package, which whoever uses it closes."""
        return self._openai.AsyncOpenAI(
            base_url=self._base_url, api_key=self._key or "none", max_retries=0, timeout=None
        )

    def _way_out(self, status: int) -> str:
        if status in (401, 403):
            variable = self._settings.api_key_env
            return f"{REFUSED[status]} ({variable} is {'set' if self._key else 'not set'})"
        return REFUSED.get(status, "look at the server's log").format(section=self._section)

    def _refused_parameter(self, words: str) -> str:
        """Return the way out where a server names a parameter that it does not take."""
        named = [name for name in SAMPLING if re.search(rf"\b{name}\b", words)]
        if not named:
            return ""
        section = self._section
        if named[0] == "max_tokens" and "max_completion_tokens" in words:
            return f"; {section}.max_tokens_as=max_completion_tokens sends it under the new name"
        return f"; {section}.omit=[{named[0]}] leaves it out, {section}.extra_body sends what is wanted instead"

    def _quote(self, words: object) -> str:
        """Return the server's words after a colon, in one line and without the key, which some servers repeat."""
        text = str(words or "")
        if self._key:
            text = text.replace(self._key, "***")
        return f": {' '.join(text.split())[:300]}" if text else ""


def _backoff(attempt: int) -> float:
    """Return the seconds before a further try: about 1, 2, 4, ... with jitter, so that not all come back at once."""
    return min(2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.5)


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


def _with_version(url: str) -> str:
    """Return the address below which /chat/completions is: /v1 is added unless the path names a version itself."""
    return url if re.search(r"/v\d", urlsplit(url).path) else url.rstrip("/") + "/v1"


def _without_secrets(url: str) -> str:
    """Return the URL as it may be shown and written down: no user, password or query."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise UserError("the server's URL has no host or a wrong port; write http://host:port or https://host/v1")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
