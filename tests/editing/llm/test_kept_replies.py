"""Replies that are kept for all jobs: what is asked again, what is not, and files that are no cache any more."""

import json
import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_command import assert_refused, edit, ledger_of, pairs_of, rejects_of, row, talk, write
from tests.editing.edit_jobs import CATEGORY, in_a_process, killed, pairs_in
from tests.fake_server import FakeServer, completion, obedient
from vapr.editing.config import EngineConfig
from vapr.editing.llm.open import open_llm
from vapr.errors import UserError
from vapr.llm.cached import CachedModel
from vapr.llm.reply_cache import REPLIES_AT_ONCE, ReplyCache
from vapr.llm.request import Reply, Request

pytest_plugins = ["tests.editing.edit_command"]

KEY = b"0123456789abcdef"
REPLY = Reply('{"a": "é \\n\ud83d"}', None, prompt_tokens=9, cached_tokens=4, generated_tokens=3)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "vapr"


def chats(server: FakeServer) -> list[dict]:
    """What the model was asked, the proof at the start left out."""
    return [chat for chat in server.chats if "const" not in json.dumps(chat["response_format"])]


def editor(number: int, body: dict):
    """Makes an apple a pear."""
    if "const" in json.dumps(body["response_format"]):
        return obedient(body)
    return completion(json.dumps({"edits": [EDIT]}))


EDIT = {"find": "apple", "replace": "pear", "category": "mine", "why_wrong": "it is another fruit"}


def fruits(folder: Path, count: int) -> Path:
    (folder / "mine.yaml").write_text(CATEGORY)
    rows = [
        row(id=n, conversations=talk(("human", "<image>\nWhat is it?"), ("gpt", f"It is an apple of tree {n} there.")))
        for n in range(count)
    ]
    return write(folder, rows)


def job(source: Path, server: FakeServer, out: str, *settings: str, more: tuple = ()) -> tuple:
    folder = source.parent
    given = (f"plan.add_categories=[{folder / 'mine.yaml'}]", "plan.categories=[mine]", "engine.tries=1", *settings)
    return (source, "--out", folder / out, "--editor", server.url, *more, *(p for s in given for p in ("--set", s)))


def model_of(folder: Path, out: str) -> dict:
    (counts,) = json.loads((folder / out / "ledger.json").read_text())["models"].values()
    return counts


# What is asked


def test_a_changed_check_on_a_finished_job_of_1000_turns_asks_for_nothing(folder, serve):
    server = serve(editor)
    source = fruits(folder, 1_000)
    assert edit(*job(source, server, "one", "turns_per_shard=300")) == (0, "")
    assert len(chats(server)) == 1_000
    assert edit(*job(source, server, "two", "turns_per_shard=400", "checks.length_ratio=[0.5, 1.5]")) == (0, "")
    assert (
        len(server.chats) == 1 + 1_000
    )  # not even the proof that schemas are obeyed, which stands for a model's start
    assert model_of(folder, "two") == {
        "asked": 0,
        "found": 1_000,
        "prompt": 0,
        "cached": 0,
        "generated": 0,
        "cost": None,
    }
    one, two = (json.loads((folder / name / "ledger.json").read_text())["accepted"] for name in ("one", "two"))
    assert one == two == 1_000


def fruit_or_points(number: int, body: dict):
    """Makes an apple one of five fruits, by the seed, and gives each of them 7 points."""
    schema = json.dumps(body["response_format"])
    if "const" in schema:
        return obedient(body)
    if "score" in schema:
        return completion(json.dumps({"score": 7}))
    return completion(json.dumps({"edits": [{**EDIT, "replace": FRUITS[body["seed"] % len(FRUITS)]}]}))


FRUITS = ("pear", "plum", "fig", "lime", "date")


def fruits_in(pairs: list[dict]) -> set[str]:
    return {edit["to"].split()[-1] for pair in pairs for edit in pair["edits"]}


def test_a_changed_check_asks_for_no_candidate_and_no_points_again(folder, serve):
    server = serve(fruit_or_points)
    source = fruits(folder, 20)
    given = ("ask.candidates=3", "ask.attempts=1", "ask.rubric=the funniest")
    assert edit(*job(source, server, "one", *given)) == (0, "")
    asked = [chat for chat in chats(server) if "score" not in json.dumps(chat["response_format"])]
    assert len(asked) == len({chat["seed"] for chat in asked}) == 60  # no candidate is another one's kept reply
    assert fruits_in(pairs_in(folder / "one")) == set(FRUITS)
    (folder / "check.py").write_text("def refuse(pair):\n    return 'pear' not in pair['rejected']\n")
    num_chats = len(server.chats)
    assert edit(*job(source, server, "two", *given, f"checks.python={folder / 'check.py'}:refuse")) == (0, "")
    assert len(server.chats) == num_chats
    assert model_of(folder, "two")["asked"] == 0 and model_of(folder, "two")["found"] > 60
    assert fruits_in(pairs_in(folder / "two")) == set(FRUITS) - {"pear"}


def test_replies_of_several_editors_are_kept_of_each(folder, serve):
    one, two = serve(editor, models=("one",)), serve(editor, models=("two",))
    editors = f"editors={{{one.url}: 1, {two.url}: 1}}"
    source = fruits(folder, 30)
    command = job(source, one, "first", editors)
    command = tuple(part for part in command if part not in ("--editor", one.url))
    assert edit(*command) == (0, "")
    again = tuple(folder / "second" if part == folder / "first" else part for part in command)
    assert edit(*again, "--set", "checks.patterns=[banana]") == (0, "")
    first, second = (json.loads((folder / out / "ledger.json").read_text()) for out in ("first", "second"))
    assert first["accepted"] == second["accepted"] == 30 == len(chats(one)) + len(chats(two))
    for name, server in (("one", one), ("two", two)):
        assert (first["models"][name]["asked"], first["models"][name]["found"]) == (len(chats(server)), 0)
        assert (second["models"][name]["asked"], second["models"][name]["found"]) == (0, len(chats(server)))
        assert first["editors"][name]["turns"] == second["editors"][name]["turns"] == len(chats(server)) > 5


def test_only_what_is_new_is_asked(folder, serve):
    server = serve(editor)
    assert edit(*job(fruits(folder, 6), server, "one")) == (0, "")
    assert edit(*job(fruits(folder, 9), server, "two")) == (0, "")
    assert len(chats(server)) == 9
    assert (model_of(folder, "two")["asked"], model_of(folder, "two")["found"]) == (3, 6)
    (folder / "mine.yaml").write_text(CATEGORY.replace("the thing", "the fruit"))
    (folder / "sft.jsonl").rename(folder / "more.jsonl")
    assert edit(*job(folder / "more.jsonl", server, "three")) == (0, "")
    assert len(chats(server)) == 9 + 9  # the prompt has changed


def test_the_summary_counts_what_was_kept(folder, serve):
    from click.testing import CliRunner

    from vapr.cli import main

    server = serve(editor)
    source = fruits(folder, 3)
    prices = "engine.prices={fake: {prompt: 2, cached: 1, generated: 10}}"
    edit(*job(source, server, "one", prices))
    # 90 prompt tokens of which 64 cached, 12 generated, each time: 26 * 2 + 64 * 1 + 12 * 10 = 236 millionths
    assert model_of(folder, "one")["cost"] == round(3 * 236 / 1e6, 4)
    said = CliRunner().invoke(main, ["edit", *map(str, job(source, server, "two", prices))]).stdout
    assert "model       fake: 0 replies asked for, 3 kept from before, cost 0.0\n" in said
    assert "fake: replies kept from before | 3 |" in (folder / "two" / "README.md").read_text()


def test_without_the_cache_everything_is_asked(folder, serve, cache_folder):
    server = serve(editor)
    source = fruits(folder, 2)
    for out in ("one", "two"):
        assert edit(*job(source, server, out, more=("--no-cache",))) == (0, "")
    assert len(chats(server)) == 4
    assert not list(cache_folder.rglob("replies*"))


def test_the_cache_may_lie_elsewhere(folder, serve, cache_folder):
    server = serve(editor)
    edit(*job(fruits(folder, 2), server, "one", f"engine.cache_dir={folder / 'kept'}"))
    assert (folder / "kept" / "replies.sqlite").exists() and not list(cache_folder.rglob("replies*"))


def test_a_second_try_after_a_refusal_and_a_later_round_get_other_replies(folder, serve):
    """Not the reply that was refused, for ever."""
    banana = completion(json.dumps({"edits": [{**EDIT, "find": "banana"}]}))
    server = serve(lambda number, body: obedient(body) if "const" in json.dumps(body["response_format"]) else banana)
    source = fruits(folder, 1)
    assert edit(*job(source, server, "one", "ask.attempts=2"))[0] == 0
    first, second = chats(server)
    assert first["seed"] != second["seed"] and first["messages"] != second["messages"]
    assert edit(*job(source, server, "one", "ask.attempts=2", more=("--retry-failed",)))[0] == 0
    assert len(chats(server)) == 4 and len({chat["seed"] for chat in chats(server)}) == 4
    edit(*job(source, server, "two", "ask.attempts=2"))  # another job begins as the first did
    assert len(chats(server)) == 4


def test_what_came_before_the_server_died_is_not_asked_again(folder, serve):
    def answer(number, body):
        server.dead = server.dead or number == 4
        return editor(number, body)

    server = serve(answer, meta={"weights": "the same"})
    source = fruits(folder, 6)
    assert_refused("is not reachable any more", *job(source, server, "one", "engine.concurrency=1"))
    back = serve(editor, meta={"weights": "the same"})
    assert edit(*job(source, back, "one", "engine.concurrency=1")) == (0, "")
    assert len(chats(back)) == 6 - 3  # the whole shard was lost, but not the replies
    assert len(pairs_in(folder / "one")) == 6


def test_what_the_server_says_in_place_of_the_model_is_asked_again(folder, serve):
    full = (500, {}, {"error": {"message": "boom"}})
    server = serve(lambda number, body: obedient(body) if number == 0 else full)
    source = fruits(folder, 1)
    edit(*job(source, server, "out", "ask.attempts=1"))
    assert [reject["reason"] for reject in rejects_of(folder)] == ["HTTP 500 after 1 tries: boom"]
    server.answer = editor
    assert edit(*job(source, server, "again", "ask.attempts=1")) == (0, "")
    assert len(pairs_in(folder / "again")) == 1
    assert edit(*job(source, server, "out", "ask.attempts=1", more=("--retry-failed",))) == (0, "")
    assert len(pairs_of(folder)) == 1 and ledger_of(folder)["failed"] == {}


# What a reply depends on


def ask_for(text: str = "a", **changes) -> Request:
    schema = {"type": "object", "properties": {"echo": {"type": "string"}}}
    given = {
        "messages": ({"role": "user", "content": text},),
        "schema": schema,
        "seed": 7,
        "max_tokens": 50,
        "temperature": 0.5,
    }
    return Request(**{**given, **changes})


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        (ask_for(), ask_for(), 1),
        (ask_for(), ask_for("b"), 2),
        (ask_for(), ask_for(seed=8), 2),
        (ask_for(), ask_for(max_tokens=51), 2),
        (ask_for(), ask_for(temperature=0.6), 2),
        (ask_for(), ask_for(schema={"type": "object", "properties": {"said": {"type": "string"}}}), 2),
        (ask_for(temperature=0), ask_for(temperature=0, seed=8), 1),  # the likeliest token each time, whatever the seed
    ],
)  # fmt: skip
def test_a_reply_is_found_again_if_all_that_makes_it_is_the_same(serve, first, second, asked):
    server = serve()
    cache = ReplyCache()
    llm = open_llm(server.url, EngineConfig(), cache)
    replies = [llm.ask([request])[0] for request in (first, second)]
    assert len(chats(server)) == asked
    assert [reply.found for reply in replies] == [False, asked == 1]
    assert replace(replies[1], found=False) == open_llm(server.url, EngineConfig()).ask([second])[0]


@pytest.mark.parametrize(
    ("settings", "meta", "models"),
    [({"extra_body": {"top_p": 0.5}}, 1, ("fake",)), ({"omit": ["seed"]}, 1, ("fake",)), ({}, 2, ("fake",)), ({}, 1, ("other",))],
    ids=["more is sent", "less is sent", "other weights", "another model"],
)  # fmt: skip
def test_another_model_or_another_way_to_ask_it(serve, settings, meta, models):
    cache = ReplyCache()
    open_llm(serve(meta={"n": 1}).url, EngineConfig(), cache).ask([ask_for()])
    server = serve(meta={"n": meta}, models=models)
    open_llm(server.url, EngineConfig(**settings), cache).ask([ask_for()])
    assert len(server.chats) == 2  # proven anew, and asked


def test_where_no_temperature_is_sent_the_seed_counts(serve):
    server = serve()
    llm = open_llm(server.url, EngineConfig(omit=["temperature"]), ReplyCache())
    llm.ask([ask_for(temperature=0)])
    llm.ask([ask_for(temperature=0, seed=8)])
    assert len(chats(server)) == 2


def test_replies_keep_their_order_and_are_told_as_they_come(serve):
    server = serve()
    llm = open_llm(server.url, EngineConfig(), ReplyCache())
    llm.ask([ask_for("b"), ask_for("d")])
    came, ticks = [], []
    replies = llm.ask([ask_for(text) for text in "abcd"], lambda: ticks.append(1), lambda n, r: came.append((n, r)))
    assert [json.loads(reply.text)["echo"] for reply in replies] == list("abcd")
    assert [reply.found for reply in replies] == [False, True, False, True]
    assert sorted(came, key=lambda one: one[0]) == list(enumerate(replies)) and len(ticks) == 4


# The file


def test_a_reply_is_read_as_it_was_kept():
    cache = ReplyCache()
    cache.keep(KEY, REPLY)
    cache.close()
    again = ReplyCache()
    assert again.find([KEY, b"another"]) == {KEY: replace(REPLY, found=True)}


@pytest.mark.parametrize(
    "told", ["", "7", '["a", null, 1, 2]', "[7, null, 1, 2, 3]", '["a", null, 1, 2, "x"]', b"\xff"]
)
def test_a_reply_that_is_not_as_it_was_kept_is_missing(told):
    cache = ReplyCache()
    with sqlite3.connect(cache.file) as other:
        other.execute("INSERT INTO replies VALUES (?, ?)", (KEY, told))
    assert cache.find([KEY]) == {}
    cache.keep(KEY, REPLY)
    cache.write()
    assert cache.find([KEY]) == {KEY: replace(REPLY, found=True)}


def filled(count: int = 2_000) -> Path:
    cache = ReplyCache()
    for number in range(count):
        cache.keep(number.to_bytes(16), REPLY)
    cache.close()
    return cache.file


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def text_file(file: Path) -> None:
    file.write_text("a text, and no database at all, which is long enough to be one " * 99)


def another_database(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE replies (mine TEXT)")


def newer(file: Path) -> None:
    with sqlite3.connect(file) as own:
        own.execute("PRAGMA user_version = 99")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "is damaged or cut short (database disk image is malformed); delete it (what it held is asked for again)"),
        (text_file, "is no database of vapr (file is not a database); delete it"),
        (another_database, "is a database of something else; name another folder with engine.cache_dir, or leave it out with --no-cache"),
        (newer, "was written by another version of vapr; delete it"),
        (a_folder, "cannot be used (unable to open database file); name another folder"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_cache_is_one_line(folder, serve, spoil, message):
    file = filled()
    spoil(file)
    source = fruits(folder, 1)
    server = serve(editor)
    assert_refused(f"{file}: {message}", *job(source, server, "out"))
    assert edit(*job(source, server, "out", more=("--no-cache",))) == (0, "")


def test_an_empty_file_is_begun(serve):
    file = filled()
    file.write_bytes(b"")
    ReplyCache().close()
    assert file.stat().st_size > 0


def test_a_fault_in_the_middle_ends_no_job(folder, serve, cache_folder):
    """As when the disk is full: the answers are the model's, and one line says what was not kept."""

    def answer(number, body):
        if number == 2:
            text_file(cache_folder / "replies.sqlite")
        return editor(number, body)

    server = serve(answer)
    code, said = edit(*job(fruits(folder, 5), server, "out", "engine.concurrency=1"))
    assert code == 0 and len(pairs_of(folder)) == 5
    assert said.startswith(f"{cache_folder / 'replies.sqlite'}: ") and said.count("\n") == 1
    assert "5 replies were not kept" in said


def keep_until_killed(first: int) -> None:
    cache = ReplyCache()
    for number in range(first, first + 10 * REPLIES_AT_ONCE):
        if number == first + 5 * REPLIES_AT_ONCE + 7:
            cache._database.execute("BEGIN IMMEDIATE")
            cache._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (b"half", "half"))
            os.kill(os.getpid(), signal.SIGKILL)
        cache.keep(number.to_bytes(16), REPLY)


def test_a_killed_process_spoils_nothing():
    killed(keep_until_killed, 0)
    cache = ReplyCache()
    keys = [number.to_bytes(16) for number in range(6 * REPLIES_AT_ONCE)]
    assert list(cache.find(keys)) == keys[: 5 * REPLIES_AT_ONCE]
    assert cache._database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_whoever_looks_holds_up_nobody():
    """A look is a transaction of its own, also one that finds nothing or half of it damaged."""
    cache, other = ReplyCache(), ReplyCache()
    cache.find([KEY])
    other.keep(KEY, REPLY)
    other.write()
    assert cache.find([KEY, b"x"]) == other.find([KEY])
    assert not cache._database.in_transaction and other.fault is None


def keep_many(first: int) -> None:
    cache = ReplyCache()
    for number in range(first, first + 1_000):
        cache.keep(number.to_bytes(16), REPLY)
        if number % 10 == 0:
            cache.find([number.to_bytes(16)])
    cache.close()
    assert cache.fault is None


def test_processes_keep_replies_side_by_side():
    processes = [in_a_process(keep_many, first) for first in (0, 500, 1_000, 1_500)]  # neighbours keep the same
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(ReplyCache().find([number.to_bytes(16) for number in range(2_500)])) == 2_500


def test_a_model_that_does_not_start_is_not_noted():
    class Gone:
        name, revision, engine, num_gpus, settings = "gone", "1", "none", 0, {}

    def fails(llm):
        raise UserError("no")

    cache = ReplyCache()
    for _ in range(2):
        with pytest.raises(UserError, match="^no$"):
            CachedModel(Gone(), cache, fails)
