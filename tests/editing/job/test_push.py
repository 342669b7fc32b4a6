"""vapr edit --push-to: what the hub is sent, against a stand-in for the hub on 127.0.0.1, and every way not to get there."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.editing import edit_jobs
from tests.editing.edit_jobs import source_rows, write_source


class FakeHub:
    """Keeps the files of one data set, ``me/pairs``, as the hub's API is told to; ``status`` refuses every commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.exists = False
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None:
                pass

            def reply(self, content: object, status: int = 200, **headers: str) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body)),
                    **headers,
                }.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if not hub.exists:
                    self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                elif "/tree/" in self.path:
                    self.reply(
                        [{"type": "file", "path": name, "size": len(hub.files[name]), "oid": "0"} for name in hub.files]
                    )
                else:
                    self.reply({"id": "me/pairs", "sha": "0" * 40, "private": True, "siblings": []})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    status = 409 if hub.exists else 200
                    hub.exists = True
                    self.reply({"url": f"{hub.url}/datasets/me/pairs"}, status)
                elif self.path == "/api/validate-yaml":  # of the card
                    self.reply({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                    self.reply({"files": modes})
                elif hub.status != 200:
                    self.reply({"error": "no"}, hub.status)
                else:
                    hub.tokens.add(self.headers.get("Authorization"))
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                        elif line["key"] == "deletedFile":
                            del hub.files[line["value"]["path"]]
                    self.reply(
                        {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/datasets/me/pairs/commit/1"}
                    )

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def hub():
    one = FakeHub()
    yield one
    one.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), source_rows()[:40])


def vapr_edit(source: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own: the hub's client reads its environment once."""
    home = {"HF_HOME": str(out.parent / "hf-home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    keep = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    command = [sys.executable, "-m", "vapr.cli", "edit", str(source), "--out", str(out), *arguments]
    return subprocess.run(command, env={**keep, **home, **environment}, capture_output=True, text=True, timeout=180)


def test_pairs_pictures_and_card_are_pushed_once_the_job_is_done(source, tmp_path, hub):
    import pyarrow.parquet

    out, environment = tmp_path / "out", {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    result = vapr_edit(source, out, "--push-to", "me/pairs", **environment)
    assert result.returncode == 0, result.stderr
    assert "pushing to a new private repository me/pairs" in result.stderr
    assert f"pushed to {hub.url}/datasets/me/pairs/commit/1" in result.stderr
    [created] = hub.created
    assert (created["name"], created["organization"], created["type"]) == ("pairs", "me", "dataset")
    assert created.get("visibility") == "private" or created.get("private") is True  # by the client's version
    assert hub.tokens == {"Bearer secret"}
    [mark] = [name for name in hub.files if name.startswith("job-")]
    parts = sorted(f"pairs/{file.name}" for file in (out / "pairs").iterdir())
    assert sorted(hub.files) == sorted([*parts, mark, "README.md"])
    assert hub.files["README.md"] == (out / "README.md").read_bytes()
    pushed = [row for part in parts for row in pyarrow.parquet.read_table(io.BytesIO(hub.files[part])).to_pylist()]
    own = edit_jobs.pairs_in(out)
    assert [row["images"] for row in pushed] == [
        [{"bytes": (source.parent / "page.png").read_bytes(), "path": "page.png"}]
    ] * len(own)
    assert [{**row, "images": 0} for row in pushed] == [{**row, "images": 0} for row in own]
    assert not list(out.glob(".push*"))

    hub.files["pairs/part-99999.parquet"] = b"of an earlier round"  # the same command again replaces what is there
    again = vapr_edit(source, out, "--push-to", "me/pairs", **environment)
    assert again.returncode == 0 and "pushing to the repository me/pairs" in again.stderr
    assert sorted(hub.files) == sorted([*parts, mark, "README.md"])


def test_nothing_is_pushed_unless_asked(source, tmp_path, hub):
    result = vapr_edit(source, tmp_path / "out", HF_ENDPOINT=hub.url, HF_TOKEN="secret")
    assert result.returncode == 0 and not hub.tokens and not hub.created


def test_every_way_not_to_get_there_is_one_line(source, tmp_path, hub):
    out = tmp_path / "out"

    def refused(message: str, *arguments: str, name: str = "me/pairs", **environment: str) -> None:
        result = vapr_edit(source, out, "--push-to", name, *arguments, **{"HF_ENDPOINT": hub.url, **environment})
        lines = [
            line
            for line in result.stderr.splitlines()
            if not line.startswith(("edit ", "read source ", "pack ", "pushing ", "the images of 1 "))
        ]
        assert result.returncode == 2 and len(lines) == 1 and message in lines[0], result.stderr
        assert "secret" not in result.stderr

    refused("no token of the hub here; hf auth login, or set HF_TOKEN")
    assert not (out / "pairs").exists()  # told before the work
    refused("write NAMESPACE/NAME", name="pairs", HF_TOKEN="secret")
    refused("the hub refused, or cannot be reached", HF_TOKEN="secret", HF_HUB_OFFLINE="1")
    refused("--limit: a trial has no --push-to", "--limit", "3", HF_TOKEN="secret")
    hub.exists, hub.files = True, {"train.csv": b"mine"}
    refused("holds other files than those of this job", HF_TOKEN="secret")
    hub.files, hub.status = {}, 403
    refused("the hub refused, or cannot be reached (403 ", HF_TOKEN="secret")
    assert hub.files == {} and len(edit_jobs.pairs_in(out)) > 0  # and the pairs are kept


def test_an_unfinished_job_is_not_pushed(source, tmp_path, hub):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    result = vapr_edit(source, tmp_path / "out", "--set", "turns_per_shard=8", "--target", "100000", "--push-to", "me/pairs", **environment)  # fmt: skip
    assert result.returncode == 0 and "was not reached" in result.stderr and "pushed to" in result.stderr
    hub.files.clear()
    result = vapr_edit(source, tmp_path / "two", "--set", "turns_per_shard=8", "--target", "2", "--push-to", "me/pairs", **environment)  # fmt: skip
    assert result.returncode == 0 and "pushed to" in result.stderr and len(hub.files) == 3
