"""Edit jobs that are taken up again for more: a larger target, rows that failed, what a review has dropped."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_jobs import (
    CATEGORY,
    COLOURS,
    assert_every_turn_ends_once,
    contents,
    done,
    ids_in,
    killed,
    manifests,
    pairs_in,
    parse,
    rejects_in,
    row,
    run_until,
    source_rows,
    start_of,
    write_source,
)
from tests.fake_server import FakeServer, completion, obedient
from vapr.data.convert import convert
from vapr.data.sources import read_pairs
from vapr.editing.job.start import Start
from vapr.errors import UserError

pytest_plugins = ["tests.editing.edit_jobs"]


# Targets


def values(pairs: list[dict], side: str) -> Counter:
    return Counter(edit[side] for pair in pairs for edit in pair["edits"])


def test_a_target_is_met_exactly_and_may_grow(source, unbroken, capsys, out):
    first = done(start_of(source, out, target=18))
    folder = out
    assert first["accepted"] == len(pairs_in(folder)) == 18
    assert first["turns"]["left"] == 65 - 2 * 16  # no shard was begun for nothing
    assert values(pairs_in(folder), "from") == values(pairs_in(folder), "to")  # trades were not torn apart
    before, ids = contents(folder), ids_in(folder)

    again = done(start_of(source, out, target=18))
    assert contents(folder) == before and again == first
    assert "holds 18 accepted pairs already, --target is 18" in capsys.readouterr().out

    assert done(start_of(source, out, target=31))["accepted"] == 31  # an odd one: half a trade fills the last place
    assert len(set(ids_in(folder))) == 31 and set(ids) < set(ids_in(folder))
    assert {name: contents(folder)[name] for name in before} == before

    last = done(start_of(source, out))
    assert last["turns"]["left"] == last["over_target"] == 0
    assert_every_turn_ends_once(folder)
    assert len(pairs_in(unbroken)) - 2 <= len(pairs_in(folder)) <= len(pairs_in(unbroken))


def said(pairs: list[dict]) -> dict[str, str]:
    """The rejected text of each id."""
    return {pair["id"]: pair["rejected"][0]["content"][0]["text"] for pair in pairs}


def test_half_a_trade_is_completed_by_the_next_target(tmp_path, out):
    source = write_source(tmp_path, [row(n, f"What color is car {n}?", f"It is {COLOURS[n]}.") for n in range(2)])
    done(start_of(source, out, target=1))
    assert len(pairs_in(out)) == 1
    done(start_of(source, out, target=2))
    assert sorted(said(pairs_in(out)).values()) == ["It is blue.", "It is red."]


@pytest.mark.parametrize("balance", ["swap", "uniform"])
def test_growing_targets_end_with_the_pairs_of_one_run(tmp_path, balance):
    """Rows whose partner is refused, too: they are left alone in later rounds as in the first."""
    config = parse({"seed": 1, "turns_per_shard": 32, "plan": {"balance": balance}})
    vans = [row(f"van {n}", f"What color is van {max(n, 1)}?", f"The van is {COLOURS[n % 2]}.") for n in range(6)]
    source = write_source(tmp_path, [*vans, *source_rows()])
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    expected = done(start_of(source, whole, config=config))
    assert ("the other half of its trade was refused" in expected["rejected"]) == (balance == "swap")
    for target in (3, 5, 7, 8, 40, 41):
        assert done(start_of(source, grown, config=config, target=target))["accepted"] == target
        torn = values(pairs_in(grown), "from") - values(pairs_in(grown), "to")
        assert torn.total() == target % 2 or balance == "uniform"
    last = done(start_of(source, grown, config=config))
    by_id = {pair["id"]: pair for pair in pairs_in(whole)}
    assert {pair["id"]: pair for pair in pairs_in(grown)} == by_id
    for key in ("accepted", "rejected", "failed", "categories", "polarity"):
        assert last[key] == expected[key], key


@pytest.mark.parametrize(("name", "times"), [("write_lines", 2), ("write_pairs", 1), ("_counts", 1)])
def test_killed_while_it_takes_up_what_was_over_a_target(source, tmp_path, name, times):
    for folder in ("unbroken", "killed"):
        done(start_of(source, tmp_path / folder, target=7))
    done(start_of(source, tmp_path / "unbroken"))
    killed(run_until, "vapr.editing.job.worker", name, times, start_of(source, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "shards" / "00000-again1.json").exists()
    done(start_of(source, tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_a_target_that_is_out_of_reach_is_said(source, unbroken, capsys, out):
    result = done(start_of(source, out, target=1000))
    assert f"--target 1,000 was not reached: the source gave {result['accepted']} " in capsys.readouterr().out
    assert contents(out) == contents(unbroken)


def test_a_lower_target_leaves_no_pairs_of_a_killed_worker(source, out):
    killed(run_until, "vapr.editing.job.worker", "_counts", 2, start_of(source, out))
    accepted = manifests(out)[0]["accepted"]
    assert len(pairs_in(out)) > accepted
    done(start_of(source, out, target=accepted))
    assert len(pairs_in(out)) == accepted


def test_a_finished_job_says_so(source, capsys, finished):
    before, ledger = contents(finished), (finished / "ledger.json").read_bytes()
    done(start_of(source, finished))
    assert "out: nothing is left to do" in capsys.readouterr().out
    assert contents(finished) == before and (finished / "ledger.json").read_bytes() == ledger


# Rows that failed


class Renamer:
    """A server that makes every apple a pear; rows that are ill get HTTP 400."""

    def __init__(self) -> None:
        self.ill = {"apple 2", "apple 5"}

    def __call__(self, number: int, body: dict):
        if "const" in json.dumps(body["response_format"]):
            return obedient(body)
        task = json.loads(body["messages"][-1]["content"].split("\n")[0])
        if any(name in task["answer"] for name in self.ill):
            return 400, {}, {"error": {"message": "no such luck"}}
        edit = {"find": "apple", "replace": "pear", "category": "mine", "why_wrong": "another fruit"}
        return completion(json.dumps({"edits": [edit]}))


@pytest.fixture
def apples(tmp_path, monkeypatch):
    """Start of a job with a server, and what the server does."""
    pytest.importorskip("openai", reason="the openai package is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.png")
    (tmp_path / "mine.yaml").write_text(CATEGORY)
    rows = [row(n, "What is it?", f"It is apple {n} of a tree.") for n in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"categories": ["mine"], "add_categories": [str(tmp_path / "mine.yaml")]}
    config = parse({"turns_per_shard": 4, "plan": plan, "ask": {"attempts": 1}, "engine": {"tries": 1}})
    renamer = Renamer()
    with FakeServer(renamer) as server:
        yield (
            Start(source=str(tmp_path / "sft.jsonl"), folder=tmp_path / "out", editor=server.url, config=config),
            (
                renamer,
                server,
            ),
        )


def test_failed_rows_are_asked_for_again_only_when_told_to(apples, capsys):
    start, (renamer, server) = apples
    result = done(start)
    assert result["accepted"] == 6 and result["failed"] == {"HTTP N: no such luck": 2}
    failed = {reject["source_id"]: (reject["status"], reject["reason"]) for reject in rejects_in(start.folder)}
    assert failed == {f"row-{n}": ("failed", "HTTP 400: no such luck") for n in (2, 5)}
    before, asked = contents(start.folder), len(server.chats)

    done(start)
    assert "nothing is left to do" in capsys.readouterr().out
    assert len(server.chats) == asked and contents(start.folder) == before

    renamer.ill = {"apple 5"}
    result = done(replace(start, retry_failed=True))
    assert len(server.chats) == asked + 3  # the proof that schemas are obeyed, and two rows
    assert result["accepted"] == 7 and result["failed"] == {"HTTP N: no such luck": 1}
    assert {name: contents(start.folder)[name] for name in before} == before

    renamer.ill = set()
    result = done(replace(start, retry_failed=True))
    assert result["accepted"] == 8 and result["failed"] == {}
    assert result["categories"]["mine"] == {
        "turns": 8, "accepted": 8, "rejected": 0, "failed": 0, "accept_rate": 1.0
    }  # fmt: skip
    assert sorted(pair["provenance"]["source_id"] for pair in pairs_in(start.folder)) == [f"row-{n}" for n in range(8)]
    assert {pair["rejected"][0]["content"][0]["text"] for pair in pairs_in(start.folder)} == {
        f"It is pear {n} of a tree." for n in range(8)
    }


def test_what_is_over_the_target_is_not_asked_for_twice(apples, tmp_path):
    start, (renamer, server) = apples
    renamer.ill = set()
    done(replace(start, target=3))
    asked = len(server.chats)
    done(replace(start, target=4))
    assert len(server.chats) == asked
    done(start)
    assert len(server.chats) == asked + 1 + 4  # the proof that schemas are obeyed, and the second shard
    done(replace(start, folder=tmp_path / "whole"))
    assert {pair["id"]: pair for pair in pairs_in(start.folder)} == {
        pair["id"]: pair for pair in pairs_in(tmp_path / "whole")
    }
    assert {pair["provenance"]["raw"] is None for pair in pairs_in(start.folder)} == {False}


def test_another_editor_does_not_go_on_with_a_job(apples):
    start, (_, server) = apples
    done(replace(start, target=1))
    server.models = ("other",)
    with pytest.raises(UserError, match=r"out: was begun with another editor: name is fake, not other"):
        done(start)
    server.models = ("fake",)
    moved = replace(start, editor=start.editor + "/v1")  # the same model at another address
    assert done(moved)["turns"]["left"] == 0
    with pytest.raises(UserError, match="holds a job of other settings: editor is a server, not rules"):
        done(replace(start, editor="rules"))


# Verdicts


def test_what_a_review_drops_leaves_the_pairs_and_stays_out(source, tmp_path, finished):
    folder, ids = finished, ids_in(finished)
    dropped = {ids[0], ids[20]}
    lines = [{"id": id, "verdict": "drop"} for id in dropped] + [{"id": id, "verdict": "keep"} for id in ids[1:4]]
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = start_of(source, finished)
    result = done(replace(start, verdicts=verdicts))
    assert ids_in(folder) == [id for id in ids if id not in dropped]
    assert result["accepted"] == len(ids) - 2 and result["rejected"]["dropped in review"] == 2
    assert result["review"] == {"kept": 3, "dropped": 2, "low": pytest.approx(0.2307), "high": pytest.approx(0.8824)}
    card = (folder / "README.md").read_text()
    assert f"{len(ids) - 2} preference pairs" in card and "3 pairs kept, 2 dropped" in card
    before = contents(folder)
    assert done(start)["accepted"] == len(ids) - 2 and contents(folder) == before

    other = done(start_of(source, tmp_path / "other", verdicts=verdicts))  # the same source in a new folder
    assert ids_in(tmp_path / "other") == ids_in(folder)
    assert other["accepted"] == len(ids) - 2 and other["rejected"]["dropped in review"] == 2
    more = done(start_of(source, tmp_path / "other", target=len(ids) - 2))
    assert more["accepted"] == len(ids) - 2


def test_verdicts_from_label_studio(source, tmp_path, finished, capsys):
    """Each task as it is exported: one pair kept, one dropped, one skipped, and one that is of another job."""
    ids, tasks = ids_in(finished), []
    convert(read_pairs(finished), "label-studio", tmp_path / "tasks.json")
    for task in json.loads((tmp_path / "tasks.json").read_text())[:3]:
        kept = task["data"]["id"] == ids[0]
        side = task["meta"]["chosen"] if kept else {"left": "right", "right": "left"}[task["meta"]["chosen"]]
        region = {
            "from_name": "right",
            "to_name": "left_side,right_side",
            "type": "pairwise",
            "value": {"selected": side},
        }
        skipped = task["data"]["id"] == ids[2]
        tasks.append({**task, "annotations": [{"completed_by": 1, "was_cancelled": skipped, "result": [region]}]})
    tasks.append({**tasks[0], "data": {"id": "elsewhere"}})
    verdicts = tmp_path / "project-1.json"
    verdicts.write_text(json.dumps(tasks))
    result = done(replace(start_of(source, finished), verdicts=verdicts))
    assert ids_in(finished) == [id for id in ids if id != ids[1]]
    assert (result["review"]["kept"] + result["review"]["dropped"], result["rejected"]["dropped in review"]) == (3, 1)
    said = capsys.readouterr().out
    assert f"{verdicts}: 1 without a verdict: 1 not answered (the first: '{ids[2]}')" in said
    assert f"{verdicts}: 1 of its ids match no pair that the job has made so far (the first: 'elsewhere')" in said


@pytest.mark.parametrize("times", [1, 2, 3])
def test_killed_while_a_review_leaves_the_pairs(source, unbroken, tmp_path, finished, times):
    """Between verdicts, manifest and part, twice; and in a second review of the same part."""
    ids, verdicts = ids_in(finished), tmp_path / "verdicts.jsonl"
    start = start_of(source, finished, verdicts=verdicts)
    for id in ids[:2]:
        verdicts.write_text(json.dumps({"id": id, "verdict": "drop"}) + "\n")
        killed(run_until, "vapr.cache", "os.fsync", times, start)
        killed(run_until, "vapr.cache", "Path.replace", times, start)
        assert id in ids_in(finished)
        done(replace(start, verdicts=None))  # nothing is damaged
        done(start)
        assert id not in ids_in(finished)
    done(replace(start, verdicts=None))
    assert ids_in(finished) == ids[2:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "verdict": "drop"}\n{"id": "b"', "verdicts.jsonl:2: not valid JSON"),
        ('{"id": 5, "verdict": "drop"}\n', "verdicts.jsonl:1: a verdict needs an 'id' that is text"),
        ('\n{"id": "a", "verdict": "perhaps"}\n', "verdicts.jsonl:2: 'verdict' of 'a' must be keep or drop"),
    ],
)
def test_bad_verdicts_change_nothing(source, text, message, tmp_path, finished):
    before = contents(finished)
    (tmp_path / "verdicts.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        done(start_of(source, finished, verdicts=tmp_path / "verdicts.jsonl"))
    assert contents(finished) == before and not (finished / "verdicts.jsonl").exists()
