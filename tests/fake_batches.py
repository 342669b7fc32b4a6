"""The batch endpoint of a fake server: files, batches, and ways in which they end."""

import json
from collections.abc import Callable
from typing import Any

from tests.fake_server import obedient

NOT_FOUND = (404, {}, {"error": {"message": "no such thing"}})


class FakeBatches:
    """Answers what is below /files and /batches.

    Attributes:
        answer: makes the body of the reply to a request's body, or ``(status, headers, body)``.
        status: of every batch.
        files: contents by id.
        batches: what was asked of each, by id.
        change: changes what is said of a batch.
        output: changes a file of results.
    """

    def __init__(self, answer: Callable[[int, dict], Any] = lambda number, body: obedient(body)) -> None:
        self.answer = answer
        self.status = "in_progress"
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict] = {}
        self.change: Callable[[dict], dict] = lambda about: about
        self.output: Callable[[str], str] = lambda text: text
        self.calls: list[str] = []

    def requests(self, batch: str) -> list[dict]:
        return [json.loads(line) for line in self.files[self.batches[batch]["input_file_id"]].splitlines()]

    def get(self, path: str) -> Any:
        self.calls.append(f"GET {path}")
        kind, name, *rest = path.removeprefix("/v1/").split("/")
        if kind == "files" and rest == ["content"]:
            return (200, {}, self._results(name).encode()) if name.startswith("results") else NOT_FOUND
        if kind == "batches" and name in self.batches:
            return self._about(name)
        return NOT_FOUND

    def post(self, path: str, payload: bytes) -> Any:
        self.calls.append(f"POST {path}")
        if path == "/v1/files":
            name = f"file-{len(self.files)}"
            begin = payload.index(b'{"custom_id"')
            self.files[name] = payload[begin : payload.rindex(b"}\n") + 2].decode()
            return {"id": name, "object": "file"}
        if path == "/v1/batches":
            name = f"batch-{len(self.batches)}"
            self.batches[name] = json.loads(payload)
            return self._about(name)
        return NOT_FOUND

    def _about(self, name: str) -> dict:
        total = len(self.requests(name))
        about = {
            "id": name,
            "object": "batch",
            "status": self.status,
            "request_counts": {"total": total, "completed": 0},
        }
        if self.status in ("completed", "expired", "cancelled"):
            about["output_file_id"] = f"results-{name}"
        return self.change(about)

    def _results(self, name: str) -> str:
        lines = []
        for number, request in enumerate(self.requests(name.removeprefix("results-"))):
            said = self.answer(number, request["body"])
            status, _, body = said if isinstance(said, tuple) else (200, {}, said)
            response = {"status_code": status, "body": body}
            lines.append(json.dumps({"custom_id": request["custom_id"], "response": response, "error": None}) + "\n")
        return self.output("".join(reversed(lines)))  # in any order
