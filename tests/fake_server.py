"""An OpenAI-compatible server in a thread, on 127.0.0.1, that misbehaves as it is told to."""

import json
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONGEST_HANG = 20.0  # seconds: a test that goes wrong ends all the same


class Drop(Exception):
    """Closes the connection without an answer."""


def completion(text: str | None, finish: str = "stop", **message: Any) -> dict:
    """The body of an ordinary answer."""
    return {
        "id": "chat-1", "object": "chat.completion", "created": 0, "model": "fake",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 64}},
    }  # fmt: skip


def obedient(body: dict) -> dict:
    """What a server that follows schemas answers: the constant it must, else the question in JSON."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    values = {name: rule.get("const", body["messages"][-1]["content"]) for name, rule in properties.items()}
    return completion(json.dumps(values))


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # the five of the base class lose connections that come all at once


class FakeServer:
    """Answers chat requests with ``answer(number, body)``: a body, or (status, headers, body); or it raises Drop.

    Attributes:
        chats, keys, paths: bodies of the chat requests, and every request's authorization and path.
        most_in_flight: largest number of chat requests at once.
        meta: what it tells about its models' weights; by default they are no other server's.
        dead: drops everything, the list of models included.
        batches: answers what is below /files and /batches; None: it has no such thing.
        going: set when the server closes; hanging answers wait for it.
    """

    def __init__(
        self, answer: Callable[[int, dict], Any] = lambda number, body: obedient(body), models=("fake",), meta=None
    ):  # fmt: skip
        self.answer, self.models = answer, models
        self.meta = meta or {"weights": uuid.uuid4().hex}
        self.chats: list[dict] = []
        self.keys: list[str] = []
        self.paths: list[str] = []
        self.most_in_flight = self._in_flight = 0
        self.dead = False
        self.batches: Any = None
        self.going = threading.Event()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.going.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def hang(self) -> None:
        self.going.wait(LONGEST_HANG)
        raise Drop

    def chat(self, body: dict) -> Any:
        with self._lock:
            number = len(self.chats)
            self.chats.append(body)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return self.answer(number, body)
        finally:
            with self._lock:  # before the answer is sent: its client may be faster than this thread
                self._in_flight -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if server.batches is not None and not self.path.endswith("/models"):
                    self._reply(server.batches.get(self.path))
                    return
                self._reply(
                    {
                        "object": "list",
                        "data": [{"id": m, "root": f"/models/{m}", "meta": server.meta} for m in server.models],
                    }
                )

            def do_POST(self) -> None:
                payload = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.path.endswith("/chat/completions"):
                    none = (404, {}, {"error": {"message": "Not Found"}})
                    self._reply(none if server.batches is None else server.batches.post(self.path, payload))
                    return
                body = json.loads(payload)
                try:
                    answer = {} if server.dead else server.chat(body)
                except Drop:
                    self.close_connection = True
                    return
                self._reply(answer)

            def _reply(self, answer: Any) -> None:
                server.keys.append(self.headers["Authorization"])
                server.paths.append(self.path)
                if server.dead:
                    self.close_connection = True
                    return
                status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
