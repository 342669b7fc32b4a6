"""``vapr edit`` behind a batch endpoint: what is sent, what the same command does later, and batches that go wrong."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_command import assert_refused, edit, ledger_of, pairs_of, rejects_of, row, talk, write
from tests.editing.edit_jobs import CATEGORY, killed
from tests.fake_batches import FakeBatches
from tests.fake_server import FakeServer, completion, obedient
from vapr.editing.job.folder import Job
from vapr.editing.job.worker import Worker
from vapr.llm import batched
from vapr.llm.reply_cache import ReplyCache
from vapr.llm.sent_requests import SentRequests

pytest_plugins = ["tests.editing.edit_command"]

EDIT = {"find": "apple", "replace": "pear", "category": "mine", "why_wrong": "it is another fruit"}


def pear(number: int, body: dict):
    return completion(json.dumps({"edits": [EDIT]}))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "vapr"


@pytest.fixture
def batches() -> FakeBatches:
    return FakeBatches(pear)


@pytest.fixture
def server(serve, batches) -> FakeServer:
    server = serve()
    server.batches = batches
    return server


@pytest.fixture
def fruits(folder) -> Path:
    (folder / "mine.yaml").write_text(CATEGORY)
    rows = [
        row(id=n, conversations=talk(("human", "<image>\nWhat is it?"), ("gpt", f"It is an apple of tree {n} there.")))
        for n in range(5)
    ]
    return write(folder, rows)


def job(source: Path, server: FakeServer, *settings: str, more: tuple = ()) -> tuple:
    given = (f"plan.add_categories=[{source.parent / 'mine.yaml'}]", "plan.categories=[mine]", "engine.tries=1",
             "engine.batch=true", "ask.attempts=1", *settings)  # fmt: skip
    return (source, "--editor", server.url, *more, *(part for setting in given for part in ("--set", setting)))


def assert_waits(words: str, *command: object) -> None:
    code, said = edit(*command)
    assert code == 75 and said.startswith("Stopped: ") and said.count("\n") == 1, (code, said)
    assert words in said, said


def test_a_file_is_sent_and_the_same_command_takes_the_replies(fruits, server, batches):
    command = job(fruits, server)
    assert_waits("1 batches are at the server; the same command takes what has come (batch-0: in_progress for 0.0 h, "
                 "0 of 5 requests done)", *command)  # fmt: skip
    assert len(server.chats) == 1  # the proof that schemas are obeyed
    assert batches.batches["batch-0"] == {
        "input_file_id": "file-0", "endpoint": "/v1/chat/completions", "completion_window": "24h",
    }  # fmt: skip
    sent = batches.requests("batch-0")
    assert len({one["custom_id"] for one in sent}) == 5
    assert {(one["method"], one["url"], one["body"]["model"]) for one in sent} == {
        ("POST", "/v1/chat/completions", "fake")
    }
    assert "tree 3" in sent[3]["body"]["messages"][-1]["content"] and "response_format" in sent[3]["body"]
    assert_waits("batch-0: in_progress", *command)
    assert list(batches.batches) == ["batch-0"]  # nothing is sent twice
    batches.status = "completed"
    assert edit(*command) == (0, "")
    assert [pair["provenance"]["source_id"] for pair in pairs_of(fruits.parent)] == list("01234")
    (counts,) = ledger_of(fruits.parent)["models"].values()
    assert (counts["asked"], counts["found"], counts["generated"]) == (5, 0, 5 * 12)
    other = (*job(fruits, server, "checks.length_ratio=[0.5, 1.5]"), "--out", fruits.parent / "other")
    assert edit(*other) == (0, "") and list(batches.batches) == ["batch-0"]


def test_all_shards_are_sent_before_the_command_ends(fruits, server, batches):
    command = job(fruits, server, "turns_per_shard=1", "engine.extra_body={top_p: 0.5}")
    assert_waits("5 batches are at the server", *command)
    assert "; 2 more)" in edit(*command)[1]
    assert [len(batches.requests(name)) for name in batches.batches] == [1] * 5
    assert batches.requests("batch-4")[0]["body"]["top_p"] == 0.5
    batches.change = lambda about: (
        about
        | ({"status": "completed", "output_file_id": f"results-{about['id']}"} if about["id"] == "batch-2" else {})
    )
    assert_waits("4 batches are at the server", *command)
    assert [pair["provenance"]["source_id"] for pair in pairs_of(fruits.parent)] == ["2"]


def test_a_file_holds_so_many_requests(fruits, server, batches, monkeypatch):
    monkeypatch.setattr(batched, "REQUESTS_AT_MOST", 2)
    assert_waits("3 batches are at the server", *job(fruits, server))
    assert [len(batches.requests(name)) for name in batches.batches] == [2, 2, 1]


def test_a_second_attempt_is_a_second_batch(fruits, server, batches):
    batches.status = "completed"
    batches.answer = lambda number, body: (
        pear(number, body) if "refused" in body["messages"][-1]["content"] else completion("no")
    )
    assert edit(*job(fruits, server, "ask.attempts=2")) == (0, "")
    assert list(batches.batches) == ["batch-0", "batch-1"] and len(pairs_of(fruits.parent)) == 5


def test_several_editors_get_their_batches_at_once(fruits, serve):
    servers = [serve(models=(name,)) for name in ("one", "two")]
    for server in servers:
        server.batches = FakeBatches(pear)  # both call their first batch alike
    editors = f"editors={{{servers[0].url}: 1, {servers[1].url}: 1}}"
    command = tuple(part for part in job(fruits, servers[0], editors) if part not in ("--editor", servers[0].url))
    assert_waits("2 batches are at the server", *command)
    assert len(servers[0].batches.requests("batch-0")) + len(servers[1].batches.requests("batch-0")) == 5
    servers[1].batches.status = "completed"
    assert_waits("1 batches are at the server", *command)
    servers[0].batches.status = "completed"
    assert edit(*command) == (0, "")
    assert len(pairs_of(fruits.parent)) == 5 and [list(server.batches.batches) for server in servers] == [
        ["batch-0"],
        ["batch-0"],
    ]


def test_candidates_are_requests_of_their_own(fruits, server, batches):
    command = job(fruits, server, "ask.candidates=3")
    assert_waits("0 of 15 requests done", *command)
    batches.status = "completed"
    assert edit(*command) == (0, "")
    assert len(pairs_of(fruits.parent)) == 5 and list(batches.batches) == ["batch-0"]


def test_a_trial_sends_what_the_job_would(fruits, server, batches):
    assert_waits("batch-0", *job(fruits, server, more=("--limit", "5")))
    assert_waits("batch-0", *job(fruits, server))
    assert list(batches.batches) == ["batch-0"]


# What a batch has cost is counted once


def models_of(folder: Path, out: str = "out") -> dict[str, list[int]]:
    told = json.loads((folder / out / "ledger.json").read_text())["models"]
    return {name: [counts[kind] for kind in ("asked", "found", "generated")] for name, counts in told.items()}


def refuse_first(number: int, body: dict):
    return pear(number, body) if "refused" in body["messages"][-1]["content"] else completion("no")


def test_replies_that_a_stopped_start_fetched_are_counted_in_the_end(fruits, server, batches):
    batches.answer = refuse_first
    only_first = lambda about: about if about["id"] != "batch-0" else about | {"status": "completed", "output_file_id": "results-batch-0"}  # fmt: skip
    command = job(fruits, server, "ask.attempts=2", "engine.prices={fake: {prompt: 1000000, generated: 0}}")
    assert_waits("batch-0: in_progress", *command)
    batches.change = only_first
    assert_waits("batch-1: in_progress", *command)  # has taken the first batch
    assert_waits("batch-1: in_progress", *command)
    batches.change, batches.status = lambda about: about, "completed"
    assert edit(*command) == (0, "")
    assert models_of(fruits.parent) == {"fake": [10, 0, 10 * 12]}
    prompts = sum(completion("no")["usage"]["prompt_tokens"] for _ in range(10))
    assert ledger_of(fruits.parent)["models"]["fake"]["cost"] == prompts
    assert edit(*command, "--out", fruits.parent / "other") == (0, "")
    assert models_of(fruits.parent, "other") == {"fake": [0, 10, 0]}
    assert models_of(fruits.parent) == {"fake": [10, 0, 10 * 12]}


def test_the_job_that_sent_a_batch_counts_it_whoever_takes_it_first(fruits, server, batches):
    command = job(fruits, server)
    assert_waits("batch-0: in_progress", *command)
    batches.status = "completed"
    other = (*job(fruits, server, "checks.length_ratio=[0.5, 1.5]"), "--out", fruits.parent / "other")
    assert edit(*other) == (0, "") and models_of(fruits.parent, "other") == {"fake": [0, 5, 0]}
    assert edit(*command) == (0, "") and models_of(fruits.parent) == {"fake": [5, 0, 5 * 12]}
    assert list(batches.batches) == ["batch-0"]


def test_a_batch_that_a_trial_sent_counts_in_the_job_that_takes_it(fruits, server, batches):
    assert_waits("batch-0", *job(fruits, server, more=("--limit", "5")))
    batches.status = "completed"
    assert edit(*job(fruits, server)) == (0, "") and models_of(fruits.parent) == {"fake": [5, 0, 5 * 12]}


def edit_until(owner: type, name: str, command: tuple) -> None:
    setattr(owner, name, lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL))
    edit(*command)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(SentRequests, "forget"), (Worker, "_write_rows"), (Job, "write_manifest"), (ReplyCache, "note_counted")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_start_that_is_killed_around_its_manifest(fruits, server, batches, owner, name):
    batches.status = "completed"
    command = job(fruits, server, "turns_per_shard=3")
    for _ in range(2):
        killed(edit_until, owner, name, command)
    assert edit(*command)[0] == 0
    assert models_of(fruits.parent) == {"fake": [5, 0, 5 * 12]}


def test_a_new_job_in_the_place_of_one_that_was_deleted_pays_nothing(fruits, server, batches):
    batches.answer = refuse_first
    batches.change = lambda about: about if about["id"] != "batch-0" else about | {"status": "completed", "output_file_id": "results-batch-0"}  # fmt: skip
    command = job(fruits, server, "ask.attempts=2")
    assert_waits("batch-1: in_progress", *command)
    shutil.rmtree(fruits.parent / "out")
    batches.change, batches.status = lambda about: about, "completed"
    assert edit(*command) == (0, "") and models_of(fruits.parent) == {"fake": [0, 10, 0]}


def test_each_editor_has_its_own_batches_counted(fruits, serve):
    servers = {name: serve(models=(name,)) for name in ("one", "two")}
    for server in servers.values():
        server.batches = FakeBatches(pear)
    editors = f"editors={{{servers['one'].url}: 1, {servers['two'].url}: 1}}"
    command = tuple(
        part for part in job(fruits, servers["one"], editors) if part not in ("--editor", servers["one"].url)
    )
    assert_waits("2 batches are at the server", *command)
    sent = {name: len(server.batches.requests("batch-0")) for name, server in servers.items()}
    servers["two"].batches.status = "completed"
    for _ in range(2):
        assert_waits("1 batches are at the server", *command)
    servers["one"].batches.status = "completed"
    assert edit(*command) == (0, "")
    assert models_of(fruits.parent) == {name: [count, 0, count * 12] for name, count in sent.items()}
    assert sum(sent.values()) == 5 and all(sent.values())


# Batches that go wrong


def test_requests_that_failed_fail_alone_and_are_not_sent_again(fruits, server, batches):
    batches.status = "completed"

    def answer(number: int, body: dict):
        bad = "tree 2" in body["messages"][-1]["content"]
        return (429, {}, {"error": {"message": "too\nmany"}}) if bad else pear(number, body)

    batches.answer = answer
    assert edit(*job(fruits, server)) == (0, "")
    assert [(r["source_id"], r["status"], r["reason"]) for r in rejects_of(fruits.parent)] == [
        ("2", "failed", "HTTP 429 in its batch: too many")
    ]
    assert edit(*job(fruits, server), "--out", fruits.parent / "again") == (0, "")
    assert list(batches.batches) == ["batch-0"]
    batches.answer = pear
    assert edit(*job(fruits, server, more=("--retry-failed",))) == (0, "")
    assert len(batches.requests("batch-1")) == 1 and len(pairs_of(fruits.parent)) == 5


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: "".join(text.splitlines(keepends=True)[:-2]), "not answered in its batch, which is expired"),
        (lambda text: text[: len(text) * 3 // 5 + 9], "not answered in its batch, which is expired"),  # cut short
        (lambda text: text.replace('"status_code": 200', '"status_code": 500'), "HTTP 500 in its batch"),
        (lambda text: text.replace('"choices"', '"voices"'), "an answer without choices in its batch"),
        (lambda text: text.replace('"response"', '"answer"'), "not answered in its batch"),
        (lambda text: "[]\n7\n" + text.replace('"custom_id": "', '"custom_id": "x'), "not answered in its batch, which is expired"),
        (lambda text: "<html>sign in</html>", "not answered in its batch, which is expired"),
        (lambda text: "", "not answered in its batch, which is expired"),
    ],
    ids=["expired", "cut short", "all failed", "no choices", "no response", "other ids", "html", "empty"],
)  # fmt: skip
def test_what_has_no_reply_is_a_counted_row(fruits, server, batches, spoil, reason):
    batches.status, batches.output = "expired", spoil
    code, said = edit(*job(fruits, server))
    assert code == 0, said
    rejects, pairs = rejects_of(fruits.parent), pairs_of(fruits.parent) if ledger_of(fruits.parent)["accepted"] else []
    assert len(rejects) + len(pairs) == 5 and rejects
    assert {(reject["status"], reject["reason"]) for reject in rejects} == {("failed", reason)}
    assert sum(ledger_of(fruits.parent)["failed"].values()) == len(rejects)


def refuse(about: dict) -> dict:
    return about | {
        "status": "failed",
        "errors": {"data": [{"code": "x", "message": "the model\nis not served in batches"}]},
    }


def test_a_batch_that_is_refused_is_one_line_and_sent_again(fruits, server, batches):
    batches.change = refuse
    assert_refused("batch-0 of 5 requests is failed: the model is not served in batches; put that right, and the same "
                   "command sends them again", *job(fruits, server))  # fmt: skip
    batches.change, batches.status = lambda about: about, "completed"
    assert edit(*job(fruits, server)) == (0, "")
    assert list(batches.batches) == ["batch-0", "batch-1"]


def test_a_batch_that_the_server_has_lost(fruits, server, batches):
    assert edit(*job(fruits, server))[0] == 75
    del batches.batches["batch-0"]
    assert_refused(
        "it has batch-0 or its files no more; the same command sends its 5 requests again", *job(fruits, server)
    )
    batches.status = "completed"
    assert edit(*job(fruits, server)) == (0, "")


def test_results_that_the_server_has_lost(fruits, server, batches):
    batches.status, batches.change = "completed", lambda about: about | {"output_file_id": "gone"}
    assert_refused(
        "it has batch-0 or its files no more; the same command sends its 5 requests again", *job(fruits, server)
    )


def test_a_batch_that_never_comes_back_can_be_left(fruits, server, batches):
    """The same job without engine.batch asks the server directly."""
    assert edit(*job(fruits, server))[0] == 75
    server.answer = lambda number, body: pear(number, body) if "const" not in json.dumps(body) else obedient(body)
    assert edit(*job(fruits, server, "engine.batch=false")) == (0, "")
    assert len(pairs_of(fruits.parent)) == 5


@pytest.mark.parametrize("about", [b"<html>", b"[]", {"object": "batch"}], ids=str)
def test_an_answer_that_says_nothing_about_a_batch(fruits, server, batches, about):
    assert edit(*job(fruits, server))[0] == 75
    batches.change = lambda _: about
    if isinstance(about, bytes):
        batches.change = lambda _: (200, {}, about)
    assert_refused(
        "an answer that is no object with an id, when it was asked for batch-0; try again", *job(fruits, server)
    )
    batches.change, batches.status = lambda about: about, "completed"
    assert edit(*job(fruits, server)) == (0, "")


def test_a_status_that_nobody_knows(fruits, server, batches):
    batches.status = "moved"
    assert_refused("batch-0 of 5 requests is moved; put that right", *job(fruits, server))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--no-cache",), "engine.batch: replies come back by the cache; leave --no-cache out"),
        (("--workers", "2"), "engine.batch: one process sends and fetches all batches; leave --workers and --ray out"),
    ],
)
def test_what_does_not_go_with_batches(fruits, server, more, message):
    assert_refused(message, *job(fruits, server, more=more))


def test_a_server_without_batches(fruits, serve):
    assert_refused(
        "HTTP 404: Not Found, when a batch was sent; leave engine.batch out if it takes none", *job(fruits, serve())
    )


def test_a_file_of_batches_that_is_none(fruits, server, cache_folder):
    SentRequests().close()
    (cache_folder / "batches.sqlite").write_text("no database, but a text " * 99)
    assert_refused("batches.sqlite: is no database of vapr (file is not a database); delete it (batches under way are sent "
                   "again)", *job(fruits, server))  # fmt: skip
