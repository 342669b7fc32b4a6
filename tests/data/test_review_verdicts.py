"""data.verdicts: what a review dropped is not trained on, and is counted, listed and said."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import metrics
from vapr.batches import survey
from vapr.data.pairs import write_pairs
from vapr.data.review_verdicts import read_verdicts
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.training.fill_caches import prepare
from vapr.training.trainer import train

FIRST, SECOND, THIRD = "astronaut-object-1", "astronaut-colour-1", "coins-count-1"


def write_verdicts(path: Path, **verdicts: str) -> Path:
    path.write_text("".join(json.dumps({"id": id, "verdict": v}) + "\n" for id, v in verdicts.items()))
    return path


@pytest.fixture
def with_verdicts(make_config, photo_rows, photo_root, tmp_path):
    """A config of 8 pairs of which a review drops two, keeps one, and names two that are not there."""
    pairs, verdicts = tmp_path / "pairs.jsonl", tmp_path / "verdicts.jsonl"
    write_pairs(pairs, photo_rows[:8])
    write_verdicts(verdicts, **{FIRST: "drop", SECOND: "keep", THIRD: "drop", "gone-1": "drop", "gone-2": "keep"})
    data = {"train": str(pairs), "eval": str(pairs), "image_root": str(photo_root), "verdicts": str(verdicts)}
    return make_config(data=data, optim={"lr": 1e-3, "pairs_per_step": 4, "epochs": 2})


def test_dropped_pairs_are_not_trained_on(with_verdicts, tmp_path, capsys):
    train(with_verdicts)
    assert sum(entry["pairs"] for entry in metrics(with_verdicts) if "pairs" in entry) == 2 * 6
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    pairs = tmp_path / "pairs.jsonl"
    assert skipped == {
        f"{pairs}:1": f"{pairs}:1: dropped in review: row '{FIRST}'",
        f"{pairs}:3": f"{pairs}:3: dropped in review: row '{THIRD}'",
    }
    said = capsys.readouterr().out
    assert "verdicts.jsonl: 2 ids dropped, 1 kept; 2 of its ids match no pair" in said
    assert said.count("verdicts ") == 1  # data.eval is not reviewed
    assert "skipped    2 pairs, listed with reasons" in said
    assert "2</b> x dropped in review: row" in (tmp_path / "run" / "report.html").read_text()


def test_a_resumed_run_has_the_same_verdicts(with_verdicts, tmp_path):
    train(with_verdicts)
    final = tmp_path / "run" / "final"
    shutil.rmtree(final)
    train(with_verdicts, resume=True)
    shutil.rmtree(final)
    write_verdicts(tmp_path / "verdicts.jsonl", **{FIRST: "drop"})
    with pytest.raises(UserError, match=r"the pairs changed since .* was started, or data\.verdicts did"):
        train(with_verdicts, resume=True)


def test_vapr_data_and_prepare_leave_them_out(with_verdicts):
    result = survey.survey(with_verdicts)
    assert (result["rows"], result["pairs"]) == (8, 6)
    (entry,) = result["skipped"]["reasons"]
    assert (entry["reason"], entry["rows"]) == ("dropped in review: row '…'", 2)
    assert survey.stops_training(with_verdicts, result) is None
    prepared = prepare(with_verdicts)
    assert len(prepared["skipped"]) == 2
    assert survey.survey(with_verdicts, "eval")["pairs"] == 8


def test_ids_are_found_in_any_format_and_once_for_all(tmp_path):
    (tmp_path / "povid.json").write_text(json.dumps([
        {"id": n, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
         "rejected_conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]} for n in (7, 8)
    ]))  # fmt: skip
    (tmp_path / "bare.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    for _ in range(2):  # the second time out of the cache
        assert read_pairs(tmp_path / "povid.json").ids_among(["7", "9", "\ud800"]) == {"7"}
        assert read_pairs(tmp_path / "bare.jsonl").ids_among(["bare.jsonl:1", "bare.jsonl:2"]) == {"bare.jsonl:1"}


def test_the_last_line_of_an_id_counts(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    file.write_text(
        '\ufeff{"id": "a", "verdict": "keep", "category": "colour"}\n\n{"id": "b", "verdict": "drop", "note": "true"}\r\n'
        '{"id": "a", "verdict": "drop"}\n'
    )
    assert read_verdicts(file) == {"a": "drop", "b": "drop"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "verdicts.jsonl:2: not valid JSON"),
        ("[1]", "verdicts.jsonl:2: a verdict needs an 'id' that is text"),
        ('{"verdict": "keep"}', "verdicts.jsonl:2: a verdict needs an 'id' that is text"),
        ('{"id": 3, "verdict": "keep"}', "verdicts.jsonl:2: a verdict needs an 'id' that is text"),
        ('{"id": "b", "verdict": "kept"}', "verdicts.jsonl:2: 'verdict' of 'b' must be keep or drop, got 'kept'"),
        ('{"id": "b"}', "verdicts.jsonl:2: 'verdict' of 'b' must be keep or drop, got None"),
        ("[" * 100_000, "verdicts.jsonl:2: not valid JSON"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "verdicts.jsonl"
    file.write_text(f'{{"id": "a", "verdict": "keep"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read_verdicts(file)
    assert message in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"verdicts: .*none\.jsonl: no such file"):
        read_verdicts(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: cannot be read as a text file"):
        read_verdicts(tmp_path / "binary")
