"""Jobs with candidates, a judge and several editors: what their folders hold, what is said, and how they go on."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("openai", reason="the openai package is not installed")

from tests.editing.edit_command import assert_refused, edit, folder, ledger_of, pairs_of, row, talk, write
from tests.editing.edit_jobs import CATEGORY, contents, killed, pairs_in, run_until, start_of
from tests.fake_server import FakeServer, completion, obedient
from vapr.cli import main
from vapr.editing.config import EditConfig
from vapr.editing.job.folder import CANDIDATES
from vapr.editing.job.run import run
from vapr.editing.job.start import Start
from vapr.editing.job.summary import show

__all__ = ["folder"]  # a fixture

WORDS = ("pear", "plum", "fig", "lime", "date")


@pytest.fixture
def serve(monkeypatch):
    """``serve(name, points)`` -> a running server: each seed names one fruit, each fruit has its points."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(name: str = "fake", points: str = "7") -> FakeServer:
        def answer(number: int, body: dict):
            schema = json.dumps(body["response_format"])
            if "const" in schema:
                return obedient(body)
            if "score" in schema:
                return completion(points if points == "prose" else json.dumps({"score": int(points)}))
            word = WORDS[body["seed"] % len(WORDS)]
            edits = [{"find": "apple", "replace": word, "category": "mine", "why_wrong": "another fruit"}]
            return completion(json.dumps({"edits": edits}))

        servers.append(FakeServer(answer, models=(name,)).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def fruits(folder):
    """Twelve answers that need a language model."""
    (folder / "mine.yaml").write_text(CATEGORY)
    said = [
        talk(("human", "<image>\nWhat is it?"), ("gpt", f"It is an apple on the shelf {n} there.")) for n in range(12)
    ]
    return write(folder, [row(id=f"fruit-{n}", conversations=turns) for n, turns in enumerate(said)])


def settings(source, *more: str) -> tuple[str, ...]:
    return (
        f"plan.add_categories=[{source.parent / 'mine.yaml'}]",
        "plan.categories=[mine]",
        "turns_per_shard=5",
        *more,
    )


def arguments(source, *more: str) -> tuple:
    return (source, *(part for setting in settings(source, *more) for part in ("--set", setting)))


def candidates_of(folder) -> list[dict]:
    files = sorted((folder / "out" / CANDIDATES).glob("*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_what_was_not_chosen_is_kept_and_counted(fruits, serve):
    server = serve()
    assert edit(*arguments(fruits, "ask.candidates=3"), "--editor", server.url) == (0, "")
    rows, pairs = candidates_of(fruits.parent), pairs_of(fruits.parent)
    assert len(rows) == 36 and len(pairs) == 12
    chosen = {row["place"]: row for row in rows if row["status"] == "chosen"}
    for pair in pairs:
        assert chosen[pair["provenance"]["place"]]["raw"] == pair["provenance"]["raw"]
    counted = Counter(row["status"] for row in rows)
    assert counted["chosen"] == 12 and set(counted) <= {"chosen", "not_chosen", "same"}
    assert all(row["reason"] for row in rows if row["status"] != "chosen")
    ledger = ledger_of(fruits.parent)
    assert ledger["candidates"] == counted and ledger["judge"] is None
    said = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counted.most_common())
    assert f"candidates  36: {said}" in show(ledger)
    # With one candidate nothing of this kind is written or said.
    assert edit(*arguments(fruits), "--editor", server.url, "--out", fruits.parent / "one") == (0, "")
    assert not (fruits.parent / "one" / CANDIDATES).exists()
    assert json.loads((fruits.parent / "one" / "ledger.json").read_text())["candidates"] is None


def test_an_explanation_shows_prompt_and_candidates(fruits, serve):
    server = serve()
    given = (*arguments(fruits, "ask.candidates=3"), "--editor", server.url)
    assert edit(*given) == (0, "")
    result = CliRunner().invoke(
        main, ["edit", *map(str, given), "--out", str(fruits.parent / "out"), "--explain", "5", "--json"]
    )
    [answer] = json.loads(result.stdout)["answers"]
    sent = [chat for chat in server.chats if "shelf 4" in json.dumps(chat["messages"])]
    assert len(sent) == 3 and all(chat["messages"] == answer["prompt"] for chat in sent)
    rows = [row for row in candidates_of(fruits.parent) if row["place"] == f"{fruits}:5"]
    assert [(one["status"], one["raw"]) for one in answer["candidates"]] == [
        (row["status"], row["raw"]) for row in rows
    ]
    assert answer["candidates"][0]["status"] == "chosen" and answer["reply"] == answer["candidates"][0]["raw"]
    assert (answer["editor"], answer["status"], answer["attempts"]) == ("fake", "accepted", 1)


def test_a_target_keeps_who_has_made_what(fruits, serve):
    one, other = serve("one"), serve("other")
    whole = (*arguments(fruits, several(one, other)), "--out", fruits.parent / "whole")
    assert edit(*whole) == (0, "")
    grown = arguments(fruits, several(one, other))
    assert edit(*grown, "--target", "3") == (0, "") and edit(*grown) == (0, "")
    made = [
        {pair["id"]: pair["provenance"]["editor"] for pair in pairs_in(fruits.parent / name)}
        for name in ("whole", "out")
    ]
    assert made[0] == made[1] and len(made[0]) == 12
    assert (
        ledger_of(fruits.parent)["editors"]
        == json.loads((fruits.parent / "whole" / "ledger.json").read_text())["editors"]
    )


def test_a_killed_job_with_candidates_ends_with_the_same_bytes(fruits, serve):
    server = serve()
    config = EditConfig.load(None, settings(fruits, "ask.candidates=3"))
    starts = [start_of(fruits, fruits.parent / name, config=config, editor=server.url) for name in ("whole", "broken")]
    run(starts[0], print)
    killed(run_until, "vapr.editing.job.worker", "write_pairs", 2, starts[1])
    assert len(list((fruits.parent / "broken" / "shards").glob("*.json"))) == 1
    run(starts[1], print)
    assert contents(fruits.parent / "whole") == contents(fruits.parent / "broken")
    parts = [{file.name: file.read_bytes() for file in (start.folder / CANDIDATES).iterdir()} for start in starts]
    assert parts[0] == parts[1] and len(parts[0]) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("ask.candidates=3",), "ask.candidates is 2, not 3"),
        (("ask.candidates=2", "ask.rubric=short"), "prompts or categories have changed"),
        (("ask.candidates=2", "checks.patterns=[x]"), "checks.patterns is [], not ['x']"),
    ],
)
def test_other_settings_are_another_job(fruits, serve, more, message):
    server = serve()
    assert edit(*arguments(fruits, "ask.candidates=2"), "--editor", server.url) == (0, "")
    assert_refused(f"holds a job of other settings: {message}", *arguments(fruits, *more), "--editor", server.url)


def test_a_folder_of_a_version_without_these_keys_goes_on(fruits, serve):
    server = serve()
    assert edit(*arguments(fruits), "--editor", server.url, "--target", "3") == (0, "")
    job = fruits.parent / "out" / "job.json"
    described = json.loads(job.read_text())
    for section, key in (("ask", "candidates"), ("ask", "rubric"), ("checks", "python"), ("checks", "patterns")):
        del described["config"][section][key]
    job.write_text(json.dumps(described))
    assert edit(*arguments(fruits), "--editor", server.url) == (0, "")
    assert len(pairs_of(fruits.parent)) == 12
    assert_refused("ask.candidates is 1, not 2", *arguments(fruits, "ask.candidates=2"), "--editor", server.url)


# Judge


def test_a_judge_that_answers_prose_is_one_line(fruits, serve):
    server, judge = serve(), serve("judge", "prose")
    more = ("ask.candidates=2", "ask.rubric=The best fruit.", f"ask.judge={judge.url}")
    assert edit(*arguments(fruits, *more), "--editor", server.url) == (0, "")
    ledger = ledger_of(fruits.parent)
    asked = ledger["judge"]["replies"]
    assert len(pairs_of(fruits.parent)) == 12 and ledger["judge"]["no_points"] == asked > 0
    assert len(judge.chats) == 1 + asked  # and one that proves its structured output
    line = next(line for line in show(ledger).splitlines() if line.startswith("judge"))
    assert line == (
        f"judge       {asked} of {asked} replies hold no points "
        "[way out: another ask.judge; without points a candidate ranks last]"
    )
    good = serve("judge")
    more = (*more[:2], f"ask.judge={good.url}")
    assert edit(*arguments(fruits, *more), "--editor", server.url, "--out", fruits.parent / "good") == (0, "")
    ledger = json.loads((fruits.parent / "good" / "ledger.json").read_text())
    assert ledger["judge"] == {"model": good.url, "replies": asked, "no_points": 0} and "\njudge" not in show(ledger)


# Several editors


def several(*servers: FakeServer) -> str:
    return f"editors={{{', '.join(f'{json.dumps(server.url)}: {n + 1}' for n, server in enumerate(servers))}}}"


def test_each_pair_says_which_editor_made_it(fruits, serve):
    one, other = serve("one"), serve("other")
    assert edit(*arguments(fruits, several(one, other))) == (0, "")
    made = Counter(pair["provenance"]["editor"] for pair in pairs_of(fruits.parent))
    assert made.total() == 12 and set(made) == {"one", "other"}
    assert (len(one.chats), len(other.chats)) == (1 + made["one"], 1 + made["other"])
    ledger = ledger_of(fruits.parent)
    assert {name: counts["accepted"] for name, counts in ledger["editors"].items()} == made
    assert {name: about["weight"] for name, about in ledger["editor"]["editors"].items()} == {"one": 1.0, "other": 2.0}
    for pair in pairs_of(fruits.parent):
        about = ledger["editor"]["editors"][pair["provenance"]["editor"]]
        assert (pair["provenance"]["revision"], pair["provenance"]["engine"]) == (about["revision"], about["engine"])
    lines = show(ledger).splitlines()
    assert f"editors     one: {made['one']} of {made['one']} accepted" in lines
    assert f"            other: {made['other']} of {made['other']} accepted" in lines
    card = (fruits.parent / "out" / "README.md").read_text()
    assert re.search(rf"\| other \| 2 \| .* \| {made['other']} \| {made['other']} \|", card)


def test_editors_may_move_but_not_change(fruits, serve):
    one, other = serve("one"), serve("other")
    assert edit(*arguments(fruits, several(one, other)), "--target", "4") == (0, "")
    third = serve("third")
    assert_refused("was begun with another editor", *arguments(fruits, several(one, third)))
    first, second = serve("one"), serve("other")  # at other ports
    assert edit(*arguments(fruits, several(first, second))) == (0, "")
    assert len(pairs_of(fruits.parent)) == 12
    weights = several(first, second).replace(": 2", ": 5")
    assert_refused("holds a job of other settings: editors is ", *arguments(fruits, weights))
    assert_refused("holds a job of other settings: ", *arguments(fruits), "--editor", first.url)


@pytest.mark.parametrize(
    ("editors", "more", "message"),
    [
        ("{a: 1, b: 1}", ("--editor", "c"), "--editor c: the config has 'editors' already; leave one of them out"),
        ("{a: 1, rules: 1}", (), "editors.rules: rules edit what they can beside any model"),
        ("{a: 1, 'localhost:8000': 1}", (), "editors localhost:8000: the address of a server begins with http://"),
        ("{a: 1}", (), "editors"),
    ],
)
def test_editors_that_are_none(fruits, editors, more, message):
    assert_refused(message, *arguments(fruits, f"editors={editors}"), *more)


def test_candidates_need_a_model(fruits):
    assert_refused("ask.candidates: the rules editor has no language model", *arguments(fruits, "ask.candidates=2"))


def test_start_names_each_model_once():
    config = EditConfig.load(
        None, ["editors={a: 1, b: 1}", "checks.verifier=b", "ask.candidates=2", "ask.rubric=x", "ask.judge=c"]
    )
    assert Start(source="x", folder=Path("y"), config=config).models == ["a", "b", "c"]
