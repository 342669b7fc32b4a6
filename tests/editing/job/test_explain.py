"""``vapr edit --explain ROW``: of a finished job, of one that has not come so far, and of none."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_command import assert_refused
from tests.editing.edit_jobs import contents, done, out, own_source, pairs_in, row, start_of, write_source
from vapr.cli import main
from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.own_checks import OWN_CHECK
from vapr.editing.job import worker as workers
from vapr.editing.rules.categories import load_categories

__all__ = ["out", "own_source"]  # fixtures


def told(source, out, wanted: object, *more: object) -> dict:
    """The explanation as programs get it."""
    result = CliRunner().invoke(main, ["edit", *map(str, (source, "--out", out, "--explain", wanted, "--json", *more))])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def shown(source, out, wanted: object) -> list[str]:
    result = CliRunner().invoke(main, ["edit", *map(str, (source, "--out", out, "--explain", wanted))])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_a_pair_that_two_rows_made(own_source, out):
    done(start_of(own_source, out))
    before = contents(out)
    [answer] = told(own_source, out, 1)["answers"]
    pair = next(pair for pair in pairs_in(out) if pair["provenance"]["place"] == f"{own_source}:1")
    assert (answer["state"], answer["status"], answer["editor"]) == ("done", "accepted", "rules")
    assert (answer["category"], answer["decided_by"]) == ("attribute", "attribute:asks-colour")
    [trade] = answer["plan"]
    assert answer["chosen"] == "The car is red." and answer["rejected"] == f"The car is {trade['target']}."
    assert answer["checks"] == pair["checks"] and answer["prompt"] is None
    [partner] = answer["with"]
    [other] = told(own_source, out, partner)["answers"]
    assert (
        other["with"] == [f"{own_source}:1"] and other["rejected"] == "The " + other["chosen"].split()[1] + " is red."
    )
    for name in (f"{own_source}:1", "sft.jsonl:1", "row-0", pair["id"]):
        assert told(own_source, out, name)["answers"] == [answer]
    lines = shown(own_source, out, 1)
    assert f"plan        red -> {trade['target']} (among colours|red|vehicle)" in lines
    assert f"            traded with {partner}" in lines
    assert lines[-2:] == ["verdict     accepted", f"pair        The car is [-red-]{{+{trade['target']}+}}."]
    assert contents(out) == before


def test_what_became_no_pair(own_source, out):
    done(start_of(own_source, out))
    [answer] = told(own_source, out, "row-odd")["answers"]
    assert (answer["status"], answer["reason"], answer["rejected"]) == (
        "rejected",
        "no category fits",
        None,
    )
    assert shown(own_source, out, "row-odd")[-3:] == [
        "verdict     rejected",
        "because     no category fits",
        "way out     --editor MODEL, or a category of your own in plan.add_categories",
    ]
    [empty] = told(own_source, out, "row-empty")["answers"]
    assert (empty["state"], empty["reason"]) == ("left out", "empty answer")
    assert_refused("image 'nowhere.png' not found", own_source, "--out", out, "--explain", 31)


def test_a_row_that_is_not_asked_yet(own_source, out):
    """Neither without a job nor in one that has ended before it: nothing is written, nobody is asked."""
    [answer] = told(own_source, out, 1)["answers"]
    assert not out.exists()
    assert (answer["state"], answer["category"]) == ("not yet", "attribute")
    assert "blue" in answer["plan"][0]["targets"] and answer["plan"][0]["value"] == "red"
    done(start_of(own_source, out, target=4))
    [last] = told(own_source, out, 67)["answers"]
    assert (last["state"], told(own_source, out, 1)["answers"][0]["state"]) == ("not yet", "done")


def test_the_prompt_that_a_model_will_get(out, tmp_path):
    source = write_source(tmp_path, [row("zebra", "What is the man doing?", "He rides a zebra.")])
    [answer] = told(source, out, 1, "--editor", "no-model-is-opened")["answers"]
    assert answer["reason"] == "the language model will be asked for an edit"
    assert [message["role"] for message in answer["prompt"][:2]] == ["system", "user"]
    assert json.loads(answer["prompt"][-1]["content"]) == {
        "question": "What is the man doing?",
        "answer": "He rides a zebra.",
    }
    [without] = told(source, out, 1)["answers"]
    assert without["prompt"] is None and without["reason"].startswith("needs a language model")


def test_a_failed_check_is_shown(own_source, out, tmp_path):
    (tmp_path / "check.py").write_text(
        "def judge(pair):\n    return 'cars are fine' if 'car' in pair['chosen'] else None\n"
    )
    config = EditConfig.load(None, [f"checks.python={tmp_path}/check.py:judge", "turns_per_shard=16"])
    done(start_of(own_source, out, config=config))
    [answer] = told(own_source, out, 1)["answers"]  # the job is read with its own settings
    assert (answer["status"], answer["reason"]) == ("rejected", "own check: cars are fine")
    assert answer["checks"][-1] == {"name": OWN_CHECK, "passed": False, "value": None, "note": "cars are fine"}
    assert "            own check   refuses: cars are fine" in shown(own_source, out, 1)


def test_the_newest_round_counts(own_source, out):
    done(start_of(own_source, out, target=3))
    over = [n for n in range(1, 17) if told(own_source, out, n)["answers"][0]["status"] == "over_target"]
    assert over
    done(start_of(own_source, out))
    assert {told(own_source, out, n)["answers"][0]["status"] for n in over} == {"accepted"}
    assert all(told(own_source, out, n)["answers"][0]["checks"] for n in over)


def test_a_pair_dropped_in_review(own_source, out, tmp_path):
    done(start_of(own_source, out))
    dropped = pairs_in(out)[0]
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text(json.dumps({"id": dropped["id"], "verdict": "drop"}) + "\n")
    done(start_of(own_source, out, verdicts=verdicts))
    [answer] = told(own_source, out, dropped["id"])["answers"]
    assert (answer["status"], answer["reason"]) == ("rejected", workers.DROPPED)


def test_changed_prompts_are_said(own_source, out, monkeypatch):
    done(start_of(own_source, out))
    monkeypatch.setattr(prompts, "PROMPT_VERSION", 99)
    assert prompts.prompt_hash(load_categories())
    assert "prompts or categories have changed since" in told(own_source, out, 1)["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--explain", "99"), "--explain 99: no such row in "),
        (("--explain", "1", "--limit", "3"), "--explain: shows one row, and --limit tries some"),
        (("--explain", "1", "--target", "3"), "--explain: shows one row, and takes no --target"),
    ],
)
def test_what_cannot_be_explained(own_source, arguments, message):
    assert_refused(message, own_source, *arguments)


def test_a_job_of_other_rows(own_source, out):
    done(start_of(own_source, out))
    with own_source.open("a") as file:
        file.write(json.dumps(row("more", "Is it?", "Yes")) + "\n")
    assert_refused("is a job of other rows than", own_source, "--out", out, "--explain", "1")


def test_two_files_have_a_row_of_that_number(own_source, tmp_path):
    (tmp_path / "two.jsonl").write_bytes(own_source.read_bytes())
    own_source.rename(tmp_path / "one.jsonl")
    assert_refused("one.jsonl:1 or ", tmp_path / "*.jsonl", "--out", tmp_path / "out", "--explain", "1")
