"""Language models behind servers: right answers, every way to fail, and the proof that schemas are obeyed."""

import asyncio
import json
import re
import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

pytest.importorskip("openai", reason="the openai package is not installed")

from tests.fake_server import Drop, FakeServer, completion, obedient
from vapr.editing.config import EditConfig, EngineConfig
from vapr.editing.llm.open import open_llm
from vapr.errors import UserError
from vapr.llm.request import Reply, Request
from vapr.llm.server import ServerModel

SCHEMA = {"type": "object", "properties": {"echo": {"type": "string"}}, "required": ["echo"]}
KEY = "sk-test-0123456789abcdef"


SLEPT: list[float] = []
"""The waits of a test, none of which takes time."""


@pytest.fixture(autouse=True)
def _no_proxy_and_no_waits(monkeypatch):
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        SLEPT.append(seconds)
        await sleep(0)

    SLEPT.clear()
    monkeypatch.setattr(asyncio, "sleep", note)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask_for(text: str, **changes) -> Request:
    values = {"schema": SCHEMA, "seed": 7, "max_tokens": 50, "temperature": 0.5, **changes}
    return Request(messages=({"role": "user", "content": text},), **values)


def opened(server: FakeServer, **settings) -> tuple[ServerModel, list[float]]:
    """A model, and the list of its waits."""
    return ServerModel(server.url, EngineConfig(**settings)), SLEPT


def echo(text: str) -> Reply:
    return Reply(json.dumps({"echo": text}), None, prompt_tokens=90, cached_tokens=64, generated_tokens=12)


def failing(status: int, message: str, headers: dict | None = None) -> tuple:
    return status, headers or {}, {"error": {"message": message, "type": "x", "code": status}}


# What is right


def test_the_answer_and_what_was_sent(serve):
    server = serve()
    llm, slept = opened(server)
    assert llm.ask([ask_for("two cats")]) == [echo("two cats")]
    assert server.chats[0] == {
        "model": "fake",
        "messages": [{"role": "user", "content": "two cats"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}},
        "seed": 7,
        "max_tokens": 50,
        "temperature": 0.5,
    }
    assert slept == []
    assert (llm.name, llm.revision, llm.num_gpus) == ("fake", "server-said /models/fake", 0)
    assert llm.engine == f"openai-compatible server at {server.url}"


def test_what_is_sent_can_be_changed(serve):
    server = serve()
    thinking = {"chat_template_kwargs": {"enable_thinking": False}, "max_completion_tokens": 300}
    llm, _ = opened(server, omit=["max_tokens", "temperature"], extra_body=thinking)
    assert llm.ask([ask_for("two cats")]) == [echo("two cats")]
    assert {key: value for key, value in server.chats[0].items() if key not in ("messages", "response_format")} == {
        "model": "fake",
        "seed": 7,
        **thinking,
    }


def test_the_limit_of_tokens_has_a_newer_name(serve):
    words = "Unsupported parameter: 'max_tokens' is not supported; use 'max_completion_tokens' instead."
    server = serve(lambda number, body: failing(400, words) if "max_tokens" in body else obedient(body))
    with pytest.raises(
        UserError, match=r"instead\.; engine\.max_tokens_as=max_completion_tokens sends it under the new"
    ):
        open_llm(server.url, EngineConfig())
    llm = open_llm(server.url, EngineConfig(max_tokens_as="max_completion_tokens", reasoning_tokens=1_000))
    llm.ask([ask_for("a")])
    assert [chat["max_completion_tokens"] for chat in server.chats[1:]] == [128 + 1_000, 50]


@pytest.mark.parametrize("refused", ["max_tokens", "temperature", "seed"])
def test_a_server_that_refuses_a_parameter_opens_without_it(serve, refused):
    words = f"Unsupported parameter: '{refused}' is not supported with this model."
    server = serve(lambda number, body: failing(400, words) if refused in body else obedient(body))
    with pytest.raises(UserError) as caught:
        open_llm(server.url, EngineConfig())
    assert f"failed: HTTP 400: {words}; engine.omit=[{refused}] leaves it out" in str(caught.value)
    config = EngineConfig(omit=[refused], extra_body={"top_p": 0.9})
    assert open_llm(server.url, config).name == "fake"
    assert server.chats[-1]["top_p"] == 0.9


def test_images_travel_as_they_are(serve):
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    server = serve(lambda number, body: completion('{"echo": "a cat"}'))
    llm, _ = opened(server)
    llm.ask([Request(({"role": "user", "content": parts},), SCHEMA, 0, 50, 0.0)])
    assert server.chats[0]["messages"][0]["content"] == parts


def test_replies_keep_the_order_of_the_requests(serve):
    last_came = threading.Event()

    def answer(number, body):
        text = body["messages"][-1]["content"]
        if text == "row 7":
            last_came.set()
        assert text != "row 0" or last_came.wait(10)  # the first is answered after the last
        return obedient(body)

    replies = []
    llm, _ = opened(serve(answer), concurrency=8)
    got = llm.ask([ask_for(f"row {n}") for n in range(8)], lambda: replies.append(1))
    assert got == [echo(f"row {n}") for n in range(8)]
    assert len(replies) == 8


def test_as_many_requests_are_in_flight_as_asked_for_and_no_more(serve):
    three, fourth = threading.Barrier(3), threading.Event()

    def answer(number, body):
        if number >= 3:
            fourth.set()
        else:
            three.wait(10)  # goes on when three requests are here at once
            fourth.wait(0.5)  # gives one too many the time to come
        return obedient(body)

    server = serve(answer)
    llm, _ = opened(server, concurrency=3, tries=1)
    assert llm.ask([ask_for(f"row {n}") for n in range(12)]) == [echo(f"row {n}") for n in range(12)]
    assert server.most_in_flight == 3


def test_no_request_is_no_trouble(serve):
    llm, _ = opened(serve())
    assert llm.ask([]) == []


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("", "/v1"),
        ("/", "/v1"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/proxy", "/proxy/v1"),
        ("/v1beta/openai", "/v1beta/openai"),
    ],
)
def test_the_url_may_leave_the_version_out(serve, given, asked):
    server = serve()
    ServerModel(server.url + given, EngineConfig())
    assert server.paths == [f"{asked}/models"]


# The canary


def test_a_server_that_follows_schemas_opens(serve):
    server = serve()
    assert open_llm(server.url, EngineConfig()).name == "fake"
    assert "const" in json.dumps(server.chats[0]["response_format"])


@pytest.mark.parametrize(
    "answer",
    [
        completion("Rain drums on the roof. The street is empty."),
        completion("Rain drums on the roof and it", finish="length"),
        completion('{"code": "rain"}'),
        completion("[" * 100_000),
    ],
    ids=["prose", "endless prose", "another object", "deep nonsense"],
)
def test_a_server_that_ignores_schemas_does_not(serve, answer):
    server = serve(lambda number, body: answer)
    with pytest.raises(UserError, match="structured output is off.*vLLM 0.30 or newer"):
        open_llm(server.url, EngineConfig())


def test_a_server_that_knows_no_schemas_does_not_open_either(serve):
    server = serve(lambda number, body: failing(400, "response_format is not supported"))
    with pytest.raises(UserError, match="under a JSON schema, failed: HTTP 400: response_format is not supported"):
        open_llm(server.url, EngineConfig())


# What passes


def test_too_many_requests_wait_as_long_as_the_server_says(serve):
    full = failing(429, "full", {"Retry-After": "17"})
    llm, slept = opened(serve(lambda number, body: full if number == 0 else obedient(body)))
    assert llm.ask([ask_for("a")]) == [echo("a")]
    assert slept == [17.0]


def test_the_server_may_name_a_date(serve):
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    full = failing(503, "full", {"Retry-After": in_a_minute})
    llm, slept = opened(serve(lambda number, body: full if number == 0 else obedient(body)))
    assert llm.ask([ask_for("a")]) == [echo("a")]
    assert 30 < slept[0] <= 60


def test_a_server_that_was_asked_too_much_is_asked_half_as_much(serve):
    full, limits = failing(429, "full"), []
    llm, slept = opened(serve(lambda number, body: full if number == 5 else obedient(body)), concurrency=16)
    replies = llm.ask([ask_for(f"row {n}") for n in range(50)], lambda: limits.append(llm._pace.limit))
    assert replies == [echo(f"row {n}") for n in range(50)]  # the refused one, too
    assert len(slept) == 1
    assert 8 < min(limits) < 9 < limits[-1] < 13  # half, and a bit more with each of about 44 replies


def test_what_was_learned_of_a_server_stays_for_the_next_requests(serve):
    full = failing(429, "full", {"Retry-After": "30"})
    llm, slept = opened(serve(lambda number, body: full if number == 0 else obedient(body)), concurrency=8)
    llm.ask([ask_for("a")])
    assert 4 < llm._pace.limit < 5
    llm.ask([ask_for("b")])
    assert slept[0] == 30 and 0 < slept[1] < 30  # no time has passed here since the server has asked everybody to wait


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "soon"}, {"Retry-After": "-5"}, {"Retry-After": "nan"}])
def test_without_such_a_word_each_wait_doubles(serve, headers):
    server = serve(lambda number, body: failing(500, "out of\nluck", headers))
    llm, slept = opened(server, tries=4)
    assert llm.ask([ask_for("a")]) == [Reply(None, "HTTP 500 after 4 tries: out of luck")]
    assert len(server.chats) == 4
    assert all(0.5 * base <= seconds <= 1.5 * base for seconds, base in zip(slept, (1, 2, 4), strict=True))


def test_a_broken_connection_is_tried_again(serve):
    def answer(number, body):
        if number == 0:
            raise Drop
        return obedient(body)

    llm, slept = opened(serve(answer))
    assert llm.ask([ask_for("a")]) == [echo("a")]
    assert len(slept) == 1


# What is one row's problem


NOT_THINK = (
    "have the server not think, for instance with engine.extra_body={chat_template_kwargs: {enable_thinking: false}}, or "
    "without its reasoning parser"
)


def others_are_fine(llm: ServerModel) -> str:
    """The problem of the row that says 'bad' among others."""
    replies = llm.ask([ask_for(text) for text in ("a", "bad", "b", "c")])
    assert [replies[0], *replies[2:]] == [echo("a"), echo("b"), echo("c")]
    assert replies[1].text is None
    return replies[1].problem


def badly(bad):
    """Answers the row 'bad' with ``bad``, or by calling it."""

    def answer(number, body):
        if body["messages"][-1]["content"] != "bad":
            return obedient(body)
        return bad() if callable(bad) else bad

    return answer


def dropped():
    raise Drop


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (failing(400, "prompt is longer than 4096"), "HTTP 400: prompt is longer than 4096"),
        (failing(422, "no such role"), "HTTP 422: no such role"),
        (failing(500, "boom"), "HTTP 500 after 2 tries: boom"),
        ((502, {"Content-Type": "text/html"}, b"<h1>Bad gateway</h1>"), "HTTP 502 after 2 tries"),
        ((200, {}, b"<html>sign in</html>"), "an answer that is not JSON after 2 tries"),
        ((200, {"Content-Type": "text/html"}, b"<html>sign in</html>"), "an answer that is not JSON after 2 tries"),
        ((200, {}, b"[" * 100_000), "an answer that is not JSON after 2 tries"),
        ({"object": "chat.completion", "choices": []}, "an answer without choices after 2 tries"),
        ({"choices": None}, "an answer without choices after 2 tries"),
        ([], "an answer without choices after 2 tries"),
        (dropped, "broken connection after 2 tries"),
        (completion('{"echo": "b', finish="length"), "cut off after 12 tokens"),
        (completion("", finish="content_filter"), "refused by the server's content filter or by the model"),
        (completion(None, refusal="I cannot"), "refused by the server's content filter or by the model"),
        (completion(None), "an empty reply"),
        ({"error": {"message": "model is\nloading", "code": 503}}, "an error in place of an answer after 2 tries: model is loading"),
        ({"error": "out of quota", "choices": None}, "an error in place of an answer after 2 tries: out of quota"),
        ({"error": {"code": 7}}, "an error in place of an answer after 2 tries: {'code': 7}"),
        (completion("<think>It is a"), "cut off after 12 tokens of reasoning"),
        (completion("<think>It is a", finish="length"), "cut off after 12 tokens of reasoning"),
        (completion("<think>It is a</think>"), "an empty reply"),
        (completion(None, reasoning_content='{"echo":\n"b"}'), f"an empty reply: all of it is in reasoning_content ('{{\"echo\": \"b\"}}'); {NOT_THINK}"),
        (completion("", reasoning="Let me see"), f"an empty reply: all of it is in reasoning ('Let me see'); {NOT_THINK}"),
        ({"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}, "an empty reply"),
        (completion(" \n"), "an empty reply"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_one_row_fails_alone(serve, bad, problem):
    llm, _ = opened(serve(badly(bad)), tries=2)
    assert others_are_fine(llm) == problem


@pytest.mark.parametrize("said", [{"content": '<think>So be it.</think>\n{"echo": "a"}'}, {"content": '{"echo": "a"}', "reasoning_content": "So be it."}], ids=str)  # fmt: skip
def test_the_answer_comes_after_the_reasoning(serve, said):
    llm, _ = opened(serve(lambda number, body: completion(said["content"], **said)))
    assert llm.ask([ask_for("a")]) == [echo("a")]


def test_a_row_that_hangs_fails_alone(serve):
    server = serve(badly(lambda: server.hang()))
    llm, _ = opened(server, tries=2, timeout_seconds=0.5)
    assert others_are_fine(llm) == "no answer within 0.5 s after 2 tries"


# What ends the run


def test_a_server_that_dies_in_the_middle_ends_the_run_at_once(serve):
    def answer(number, body):
        if number >= 20:
            server.dead = True
        return obedient(body)

    server = serve(answer)
    llm, slept = opened(server, tries=3, concurrency=4)
    with pytest.raises(UserError, match="is not reachable any more; what is finished is kept, run the same command"):
        llm.ask([ask_for(f"row {n}") for n in range(5000)])
    assert len(slept) <= 2 * 4  # four rows were tried to the end, not thousands


@pytest.mark.parametrize(
    ("status", "way_out"),
    [
        (401, "wants another key (OPENAI_API_KEY is not set)"),
        (403, "the key may not"),
        (404, "check the URL and engine.model"),
    ],
)
def test_refusals_of_everything_end_it_too(serve, status, way_out):
    server = serve(lambda number, body: failing(status, "no"))
    llm, slept = opened(server)
    with pytest.raises(UserError, match=rf"^server {server.url}: HTTP {status}: no; .*{re.escape(way_out)}"):
        llm.ask([ask_for("a")])
    assert slept == []


def test_an_error_in_place_of_the_list_of_models(serve):
    server = serve()
    server._http.RequestHandlerClass.do_GET = lambda handler: handler._reply(
        {"error": {"message": "no such deployment"}}
    )
    with pytest.raises(UserError, match="when asked for its models: no such deployment; is this"):
        ServerModel(server.url, EngineConfig())


def test_no_server_at_all():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=rf"server http://127.0.0.1:{port}: not reachable \(.+\); check the URL"):
        ServerModel(f"http://127.0.0.1:{port}", EngineConfig())


@pytest.mark.parametrize("url", ["http://", "http:///v1", "https://host:port", "http://host:99999"])
def test_a_url_without_host_or_port(url):
    with pytest.raises(UserError, match="the server's URL has no host or a wrong port"):
        ServerModel(url, EngineConfig())


@pytest.mark.parametrize("models", [("large", "small"), ()], ids=["two", "none"])
def test_which_model_is_meant_must_be_said(serve, models):
    server = serve(models=models)
    with pytest.raises(
        UserError, match=f"lists {len(models)} models; engine.model must name one: {', '.join(models) or 'none'}"
    ):
        ServerModel(server.url, EngineConfig())
    llm, _ = opened(server, model="small")
    llm.ask([ask_for("a")])
    assert server.chats[0]["model"] == "small"
    assert llm.revision == ("server-said /models/small" if models else "server-said small")


# The key


def test_the_key_is_sent_and_never_shown(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    server = serve(badly(failing(400, f"bad request by {KEY}")))
    llm, _ = opened(server, api_key_env="MY_KEY")
    assert others_are_fine(llm) == "HTTP 400: bad request by ***"
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.answer = lambda number, body: failing(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(UserError, match=r"provided: \*\*\*; it wants another key \(MY_KEY is set\)") as caught:
        llm.ask([ask_for("a")])
    assert KEY not in str(caught.value) + llm.name + llm.revision + llm.engine


def test_a_key_that_no_header_takes(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-tést")
    with pytest.raises(UserError, match="^OPENAI_API_KEY: holds characters that no key has"):
        ServerModel("http://127.0.0.1:9", EngineConfig())


def test_what_a_url_hides(serve):
    server = serve()
    llm = ServerModel(server.url.replace("127", "user:hunter2@127") + "/v1?token=hunter2", EngineConfig())
    assert llm.engine == f"openai-compatible server at {server.url}/v1"


# The config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tries": 0}, "engine.tries must be at least 1, got 0"),
        ({"concurrency": 5000}, "engine.concurrency must be at least 1 and at most 1,000, got 5000"),
        ({"timeout_seconds": 0}, "engine.timeout_seconds must be > 0, got 0"),
        ({"gpu_memory_utilization": 90}, "engine.gpu_memory_utilization must be > 0 and at most 1, got 90"),
        ({"tensor_parallel": 0}, "engine.tensor_parallel must be at least 1, got 0"),
        ({"max_model_len": 0}, "engine.max_model_len must be at least 1, got 0"),
        ({"model": ""}, "engine.model must be null or non-empty, got ''"),
        ({"omit": ["top_p"]}, "omit.0: "),
        (
            {"extra_body": {"messages": []}},
            "engine.extra_body must be keys other than model, messages, response_format",
        ),
        ({"tires": 3}, "unknown key 'engine.tires'; did you mean 'tries'?"),
    ],
    ids=str,
)
def test_the_config_says_what_is_wrong(settings, message):
    with pytest.raises(UserError) as caught:
        EditConfig.parse({"engine": settings}, "edit.yaml")
    assert message in str(caught.value)
