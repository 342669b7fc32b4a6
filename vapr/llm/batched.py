"""A model behind a server's batch endpoint: a file of requests is sent, and the same command later has the replies."""

import asyncio
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vapr.errors import UserError
from vapr.llm.answer import Failure, read_reply
from vapr.llm.cached import digest
from vapr.llm.reply_cache import ReplyCache
from vapr.llm.request import BatchUnderWay, Reply, Request, keep_nowhere, tell_nobody
from vapr.llm.sent_requests import SentRequests
from vapr.llm.server import ServerModel

ENDPOINT = "/v1/chat/completions"
REQUESTS_AT_MOST, BYTES_AT_MOST = 50_000, 100 * 2**20
"""Of one file: OpenAI takes 50,000 requests and 200 MB, others less."""
ENDED = ("completed", "expired", "cancelled")
UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")


class BatchedServer:
    """A server's model that is asked by files.

    Args:
        server: the server, which is asked directly for everything but replies.
        extra_body: more keys of every request.
        cache: keeps the replies that have come; without it they would be sent for again and again.
        folder: of the file that says which requests are under way; None: the user's cache folder.
    """

    num_gpus = 0

    def __init__(
        self, server: ServerModel, extra_body: dict[str, Any] | None, cache: ReplyCache, folder: str | None
    ) -> None:
        self.name, self.revision, self.engine, self.settings = (
            server.name,
            server.revision,
            server.engine,
            server.settings,
        )
        self._server, self._extra_body, self._cache = server, extra_body, cache
        self._sent = SentRequests(folder, self.engine)

    def start(self) -> None:
        """Do nothing: the server is there."""

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        """Return replies in the order of the requests, once all of them have come.

        Raises:
            BatchUnderWay: until then.
            UserError: if the server takes no batches, or refuses or has lost one.
        """
        keys = [self._key(request) for request in requests]
        asyncio.run(self._send_and_fetch(keys, requests))
        come = self._sent.replies(keys)
        replies = [
            _seen_by(request, come.get(key, Reply(None, "its batch was forgotten")))
            for key, request in zip(keys, requests, strict=True)
        ]
        for number, reply in enumerate(replies):
            keep(number, reply)
            on_reply()
        self._cache.write()
        if self._cache.fault is None:  # failures stay, or each start would send them again
            self._sent.forget([key for key, reply in come.items() if reply.text is not None or reply.generated_tokens])
        return replies

    def close(self) -> None:
        """Close the file; batches go on."""
        self._sent.close()
        self._server.close()

    def _key(self, request: Request) -> bytes:
        sampling = [request.max_tokens, request.temperature, request.seed]
        model = [self.engine, self.name, self.revision, self.settings]
        return digest([*model, request.messages, request.schema, *sampling])

    async def _send_and_fetch(self, keys: Sequence[bytes], requests: Sequence[Request]) -> None:
        new = dict(zip(keys, requests, strict=True))
        for key in self._sent.batches_of(keys):
            del new[key]
        async with self._server.client() as client:
            for lines, sent in self._files(new):
                await self._send(client, lines, sent, new[sent[0]].asked_for)
            answered = self._sent.replies(keys)
            batches = {batch: None for key, batch in self._sent.batches_of(keys).items() if key not in answered}
            waiting = [line for batch in batches if (line := await self._fetch(client, batch)) is not None]
        if waiting:
            raise BatchUnderWay(waiting)

    def _files(self, requests: dict[bytes, Request]) -> Iterator[tuple[bytes, list[bytes]]]:
        """Yield the content of each file to be sent, and the requests in it."""
        lines, sent = bytearray(), list[bytes]()
        for key, request in requests.items():
            body = self._server.body_of(request) | (self._extra_body or {})
            line = {"custom_id": key.hex(), "method": "POST", "url": ENDPOINT, "body": body}
            text = json.dumps(line).encode() + b"\n"
            another = bool(sent) and request.asked_for != requests[sent[0]].asked_for  # a batch is paid for by one
            if sent and (another or len(sent) == REQUESTS_AT_MOST or len(lines) + len(text) > BYTES_AT_MOST):
                yield bytes(lines), sent
                lines, sent = bytearray(), []
            lines += text
            sent.append(key)
        if sent:
            yield bytes(lines), sent

    async def _send(self, client: Any, lines: bytes, keys: list[bytes], asked_for: str) -> None:
        upload = functools.partial(
            client.files.with_raw_response.create, file=(f"vapr-{keys[0].hex()}.jsonl", lines), purpose="batch"
        )
        begin = functools.partial(client.batches.with_raw_response.create, endpoint=ENDPOINT, completion_window="24h")
        try:
            file = _object(await self._server.call(upload))
            begin_file = functools.partial(begin, input_file_id=str(file["id"]))
            # Once: where no answer came, it may have begun all the same, and would be paid for twice.
            batch = _object(await self._server.call(begin_file, unless_silent=True))
            self._sent.note_sent(str(batch["id"]), keys, asked_for)
        except Failure as failure:
            raise UserError(
                f"{self._server.told(failure)}, when a batch was sent; leave engine.batch out if it takes none"
            ) from None

    async def _fetch(self, client: Any, batch: str) -> str | None:
        """Take what has come of a batch; return a line on one that has not ended."""
        try:
            about = _object(await self._server.call(lambda: client.batches.with_raw_response.retrieve(batch)))
            status = str(about.get("status"))
            if status in ENDED:
                replies = dict[bytes, Reply]()
                for kind in ("error_file_id", "output_file_id"):
                    if file := about.get(kind):
                        content = functools.partial(client.files.with_raw_response.content, file)
                        replies |= dict(self._read(await self._server.call(content)))
                self._sent.end(batch, replies, Reply(None, f"not answered in its batch, which is {status}"))
                return None
        except Failure as failure:
            if failure.status != 404:
                raise UserError(f"{self._server.told(failure)}, when it was asked for {batch}; try again") from None
            count = self._sent.forget_batch(batch)
            raise UserError(
                f"{self._server.told(failure)}: it has {batch} or its files no more; the same command sends its "
                f"{count:,} requests again"
            ) from None
        if status not in UNDER_WAY:
            count = self._sent.forget_batch(batch)
            raise UserError(
                f"{batch} of {count:,} requests is {status}{_errors(about)}; put that right, and the same command "
                "sends them again"
            )
        counts = about.get("request_counts")
        done, total = (counts.get(kind, "?") for kind in ("completed", "total")) if isinstance(counts, dict) else "??"
        return f"{batch}: {status} for {self._sent.age_seconds(batch) / 3600:.1f} h, {done} of {total} requests done"

    def _read(self, text: str) -> Iterator[tuple[bytes, Reply]]:
        """Yield the replies of a file of results; lines that make no sense are as good as missing."""
        for line in text.split("\n"):
            try:
                told = json.loads(line)
                key, response = bytes.fromhex(told["custom_id"]), told.get("response")
            except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
                continue
            yield key, self._read_one(response, told.get("error"))

    def _read_one(self, response: Any, error: Any) -> Reply:
        response = response if isinstance(response, dict) else {}
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            try:
                return read_reply(body, 0, "engine")
            except Failure as failure:
                return Reply(None, f"{failure.problem} in its batch")
        error = (body.get("error") if isinstance(body, dict) else None) or error
        said = error.get("message") if isinstance(error, dict) else error
        words = f": {' '.join(str(said).split())[:300]}" if said else ""
        return Reply(None, f"HTTP {status} in its batch{words}" if status else f"not answered in its batch{words}")


def _seen_by(request: Request, reply: Reply) -> Reply:
    """Return a reply as who asks now counts it: found, if the batch was sent for somebody else."""
    return replace(reply, found=reply.asked_for not in ("", request.asked_for))


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or "id" not in value:
        raise Failure("an answer that is no object with an id")
    return value


def _errors(about: dict[str, Any]) -> str:
    """Return the server's words on a batch that it did not take, after a colon."""
    errors = about.get("errors")
    listed = errors.get("data") if isinstance(errors, dict) else None
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        return ""
    return f": {' '.join(str(listed[0].get('message')).split())[:300]}"
