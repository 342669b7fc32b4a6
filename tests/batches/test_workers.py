"""Background workers: the same results in the same order, errors with their row, and nothing lost when one is killed."""

import os
import signal
from pathlib import Path

import pytest

from vapr.batches import loader
from vapr.batches.families import load_model_config
from vapr.batches.loader import PairLoader
from vapr.batches.tokenize import Processor
from vapr.batches.workers import ATTEMPTS, Workers, default_workers
from vapr.config import PackingConfig
from vapr.errors import BadRow, UserError


@pytest.fixture
def processor(tiny) -> Processor:
    folder = str(tiny("qwen2_5_vl"))
    return Processor(folder, load_model_config(folder))


def contents(step) -> list:
    return [(pair.id, [i.pixel_values.tobytes() for i in pair.paths[0].images]) for pair in step.pairs]


def new_loader(pairs, workers: Workers, **options) -> PairLoader:
    return PairLoader(pairs, workers, PackingConfig(max_tokens=2048), pairs_per_step=8, seed=3, **options)


def test_processes_change_neither_results_nor_order(processor, photo_pairs):
    with Workers(processor) as none, Workers(processor, count=3) as three:
        expected = [contents(step) for step in new_loader(photo_pairs[:40], none).steps(0, 5)]
        assert [contents(step) for step in new_loader(photo_pairs[:40], three).steps(0, 5)] == expected
        assert len(three.process_ids) == 3
    assert [id for step in expected for id, _ in step] != [pair.id for pair in photo_pairs[:40]]  # shuffled


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_worker_is_replaced_and_nothing_is_lost(processor, photo_pairs, after, monkeypatch):
    monkeypatch.setattr(loader, "LOOKAHEAD", 8)
    said = []
    with Workers(processor) as none, Workers(processor, count=2, say=said.append) as two:
        expected = [contents(step) for step in new_loader(photo_pairs[:48], none).steps(0, 6)]
        got = []
        for number, step in enumerate(new_loader(photo_pairs[:48], two).steps(0, 6)):
            got.append(contents(step))
            if number == after:
                before = two.process_ids
                for pid in before:
                    os.kill(pid, signal.SIGKILL)
        assert got == expected
        assert len(said) == 2 and "a data worker was killed" in said[0]
        assert not set(two.process_ids) & set(before)


def test_a_row_that_kills_every_worker_is_named(processor, photo_pairs, monkeypatch):
    pair = photo_pairs[5]
    monkeypatch.setattr(Processor, "tokenize_pair", lambda self, pair, weights: os.kill(os.getpid(), signal.SIGKILL))
    with Workers(processor, count=1, say=lambda line: None) as workers:
        error = workers.submit(pair)()
    assert isinstance(error, UserError) and not isinstance(error, BadRow)  # skipping bad rows must not hide it
    assert f"row '{pair.id}': {ATTEMPTS} data workers were killed" in str(error)


def test_workers_die_with_the_trainer(processor):
    """Also with one that had no chance to say goodbye."""
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        workers = Workers(processor, count=1)
        os.write(writer, str(workers.process_ids[0]).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(reader, 20))
    os.waitpid(trainer, 0)
    state = Path(f"/proc/{worker}/stat")
    for _ in range(10_000_000):
        if not state.exists() or state.read_text().split(")")[1].split()[0] in "ZX":
            return
    raise AssertionError(f"worker {worker} still runs")


def test_errors_come_in_their_turn_and_name_their_row(processor, photo_pairs, tmp_path):
    import dataclasses

    (tmp_path / "bad.png").write_bytes(b"not a picture")
    bad = dataclasses.replace(photo_pairs[0], images=(tmp_path / "bad.png",), where="pairs.jsonl:10", id="bad")
    pairs = [*photo_pairs[:9], bad, *photo_pairs[9:20]]
    with Workers(processor, count=2) as workers:
        steps = new_loader(pairs, workers, shuffle=False).steps(0, 3)
        assert len(next(steps).pairs) == 8  # the steps before it are whole
        with pytest.raises(BadRow, match=r"^pairs.jsonl:10: row 'bad': image .*bad.png' is not an image file"):
            next(steps)
        skipping = new_loader(pairs, workers, shuffle=False, on_bad_row="skip")
        assert [len(step.pairs) for step in skipping.steps(0, 3)] == [8, 7, 5]
        assert list(skipping.skipped) == ["pairs.jsonl:10"]


def test_an_image_that_comes_again_is_processed_once(processor, photo_pairs, monkeypatch):
    pairs = [pair for pair in photo_pairs if pair.images == photo_pairs[0].images]
    assert len(pairs) > 3
    calls = []
    real = processor.image_processor
    monkeypatch.setattr(processor, "image_processor", lambda **inputs: calls.append(1) or real(**inputs))
    processor.image_processor.merge_size = real.merge_size
    with Workers(processor) as workers:
        list(new_loader(pairs, workers).steps(0, 1))
    assert len(calls) == 1


def test_pixels_that_are_still_held_are_not_sent_again(processor, photo_pairs):
    pairs = [pair for pair in photo_pairs if pair.images == photo_pairs[0].images]
    with Workers(processor, count=1) as workers:
        [step] = new_loader(pairs[:8], workers).steps(0, 1)
    assert len(step.pairs) > 3
    assert len({id(image) for pair in step.pairs for path in pair.paths for image in path.images}) == 1


def test_number_of_workers():
    assert 1 <= default_workers() <= 8


def test_a_fault_of_the_code_itself_is_raised_where_the_pair_is_waited_for(processor, photo_pairs, monkeypatch):
    monkeypatch.setattr(Processor, "tokenize_pair", lambda self, pair, weights: 1 / 0)
    with (
        Workers(processor, count=1) as workers,
        pytest.raises(RuntimeError, match="in a data worker, at .*photos.jsonl:1: ZeroDivisionError"),
    ):
        workers.submit(photo_pairs[0])()
