"""Two answers to one question must not become the same pair: in one shard, in two, and after a stop."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_jobs import contents, done, pairs_in, rejects_in, start_of
from vapr.data.sources import read_pairs
from vapr.editing.config import EditConfig
from vapr.editing.draft.editor import SAME_PAIR
from vapr.editing.draft.trades import PARTNER_LOST

pytest_plugins = ["tests.editing.edit_jobs"]

ANSWERS = [(0, "red"), (1, "green"), (0, "blue"), (2, "green"), (3, "black"), (4, "white")]
"""Picture and colour: the car of picture 0 has two, and each would become green."""


@pytest.fixture
def source(tmp_path) -> Path:
    with (tmp_path / "sft.jsonl").open("w") as file:
        for n, (picture, colour) in enumerate(ANSWERS):
            Image.new("RGB", (8, 8), (picture, 0, 0)).save(tmp_path / f"{picture}.png")
            turns = [
                {"from": "human", "value": "<image>\nWhat color is the car?"},
                {"from": "gpt", "value": f"The car is {colour}."},
            ]
            file.write(json.dumps({"id": n, "image": f"{picture}.png", "conversations": turns}) + "\n")
    return tmp_path / "sft.jsonl"


def said(pair: dict) -> tuple:
    return pair["images"][0]["path"], str(pair["prompt"]), str(pair["rejected"])


@pytest.mark.parametrize("turns_per_shard", [2, 4], ids=["across shards", "in one shard"])
def test_no_pair_is_there_twice(source, out, turns_per_shard):
    audit = pytest.importorskip("vapr.audit.measure")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    ledger = done(start_of(source, out, config=EditConfig(turns_per_shard=turns_per_shard)))
    pairs = pairs_in(out)
    assert max(Counter(map(said, pairs)).values()) == 1 and len(pairs) == ledger["accepted"] == 4
    assert ledger["rejected"] == {SAME_PAIR: 1, PARTNER_LOST: 1}
    assert sorted(reject["reason"] for reject in rejects_in(out)) == sorted([SAME_PAIR, PARTNER_LOST])
    result = audit.audit({"out": read_pairs(out)})["sets"]["out"]
    assert result["duplicates"]["extra"] == 0


def test_a_shard_that_is_made_again_is_not_in_its_own_way(source, out):
    start = start_of(source, out, config=EditConfig(turns_per_shard=2))
    done(start)
    before = contents(out)
    for name in ("00000", "00001"):
        (out / "shards" / f"{name}.json").unlink()
        done(start)
        assert contents(out) == before


def test_what_a_target_has_set_aside_is_not_made_by_another_row(source, out):
    config = EditConfig(turns_per_shard=2)
    for target in (1, 4):
        done(start_of(source, out, config=config, target=target))
    assert max(Counter(map(said, pairs_in(out))).values()) == 1 and len(pairs_in(out)) == 4
