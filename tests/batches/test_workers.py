"""Background workers: the same steps in the same order, errors with their row, and one line when one is killed."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vapr.batches import loader, shared_memory
from vapr.batches.loader import PairLoader, load_pairs
from vapr.batches.model_config import load_model_config
from vapr.batches.processed_image import joined_pixels
from vapr.batches.tokenize import Processor
from vapr.batches.workers import default_workers
from vapr.config import Config
from vapr.errors import BadRow, UserError


@pytest.fixture
def new_loader(processor):
    """A loader of pairs with so many workers; what it opened is closed at the end."""
    opened = []

    def make(pairs, count: int, share: str = "pair", **data) -> PairLoader:
        config = Config.parse({
            "run_dir": "unused", "policy": {"model": "unused"}, "seed": 3,
            "data": {"train": "unused", "workers": count, **data},
            "packing": {"max_tokens": 2048, "share": share}, "optim": {"pairs_per_step": 8},
        })  # fmt: skip
        opened.append(load_pairs(config, pairs, processor))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def contents(value) -> object:
    """Everything in a step, every byte of its arrays included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return [contents(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [contents(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("share", ["pair", "image"])
def test_processes_change_no_byte_and_not_the_order(new_loader, photo_pairs, share, monkeypatch):
    """Nor does it matter whether batches come in shared memory or, where there is too little, through a pipe."""
    expected = [contents(step) for step in new_loader(photo_pairs[:40], 0, share).steps(0, 5)]
    for count in (1, 2):
        assert [contents(step) for step in new_loader(photo_pairs[:40], count, share).steps(0, 5)] == expected
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: 0)
    assert [contents(step) for step in new_loader(photo_pairs[:40], 2, share).steps(0, 5)] == expected


def test_a_shared_memory_that_is_too_small_is_said_once(new_loader, photo_pairs, monkeypatch, capsys):
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: 2**20)
    assert len(list(new_loader(photo_pairs[:40], 2).steps(0, 5))) == 5
    assert capsys.readouterr().out.count("/dev/shm is too small for batches of") == 1


def test_the_order_is_shuffled_by_seed(new_loader, photo_pairs):
    steps = list(new_loader(photo_pairs[:40], 0).steps(0, 5))
    assert [pair.id for step in steps for pair in step.pairs] != [pair.id for pair in photo_pairs[:40]]


def test_pixels_come_joined_and_once(new_loader, photo_pairs):
    pairs = [pair for pair in photo_pairs if pair.images]
    [step] = new_loader(pairs[:8], 1).steps(0, 1)
    for batch in step.batches:
        pixels = joined_pixels(batch.images)
        assert pixels.data_ptr() == batch.images[0].pixel_values.data_ptr()
        assert torch.equal(pixels, torch.cat([image.pixel_values for image in batch.images]))
        held = {id(image) for pair in batch.pairs for path in pair.paths for image in path.images}
        assert held == {id(image) for image in batch.images}
    assert torch.equal(joined_pixels(batch.images[::-1]), torch.cat([i.pixel_values for i in batch.images[::-1]]))


def test_one_loader_can_be_asked_while_another_goes_on(new_loader, photo_pairs):
    """As training is interrupted by an evaluation."""
    loader = new_loader(photo_pairs[:40], 2)
    expected = [contents(step) for step in loader.steps(0, 5)]
    got = []
    for step in loader.steps(0, 5):
        got.append(contents(step))
        assert contents(next(loader.once().steps(0, 1))) == expected[0]
    assert got == expected


def test_a_killed_worker_is_told_in_one_line(new_loader, photo_pairs, monkeypatch):
    monkeypatch.setattr(loader, "LOOKAHEAD", 8)
    killed = new_loader(photo_pairs[:48], 2)
    steps = killed.steps(0, 6)
    next(steps)
    os.kill(killed._workers.process_ids[0], signal.SIGKILL)
    with pytest.raises(UserError, match="^a data worker was killed; is there enough memory") as told:
        list(steps)
    assert not isinstance(told.value, BadRow)  # skipping bad rows must not hide it


def test_a_worker_killed_in_the_middle_of_a_message_does_not_hang(new_loader, photo_pairs, monkeypatch):
    """Nobody reads the pipe meanwhile, so that the worker is killed while it writes."""
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: 0)
    killed = new_loader(photo_pairs[:48], 1)
    steps = killed.steps(0, 6)
    next(steps)
    [pid] = killed._workers.process_ids
    while "pipe_write" not in Path(f"/proc/{pid}/wchan").read_text() and not waits_to_write(pid):
        pass
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="^a data worker was killed"):
        list(steps)


def waits_to_write(pid: int) -> bool:
    """Tell whether a thread of the process is in write()."""
    calls = [task / "syscall" for task in Path(f"/proc/{pid}/task").iterdir()]
    return any(call.read_text().split()[0] == "1" for call in calls)


def test_workers_die_with_the_trainer(new_loader, photo_pairs):
    """Also with one that had no chance to say goodbye."""
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        workers = new_loader(photo_pairs[:8], 1)._workers
        os.write(writer, str(workers.process_ids[0]).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(reader, 20))
    os.waitpid(trainer, 0)
    state = Path(f"/proc/{worker}/stat")
    for _ in range(10_000_000):
        if not state.exists() or state.read_text().split(")")[1].split()[0] in "ZX":
            return
    raise AssertionError(f"worker {worker} still runs")


def test_errors_come_in_their_turn_and_name_their_row(new_loader, photo_pairs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    bad = dataclasses.replace(photo_pairs[0], images=(tmp_path / "bad.png",), where="pairs.jsonl:10", id="bad")
    pairs = [*photo_pairs[:9], bad, *photo_pairs[9:20]]
    for count in (0, 2):
        steps = new_loader(pairs, count, shuffle=False).steps(0, 3)
        assert len(next(steps).pairs) == 8  # the steps before it are whole
        with pytest.raises(BadRow, match=r"^pairs.jsonl:10: row 'bad': image .*bad.png' is not an image file"):
            next(steps)
        skipping = new_loader(pairs, count, shuffle=False, on_bad_row="skip")
        assert [len(step.pairs) for step in skipping.steps(0, 3)] == [8, 7, 5]
        assert list(skipping.skipped) == ["pairs.jsonl:10"]


def test_a_pair_that_is_too_long_is_refused_or_skipped_by_name(new_loader, photo_pairs):
    long = dataclasses.replace(
        photo_pairs[0], where="pairs.jsonl:4", id="long",
        chosen=({"role": "assistant", "content": [{"type": "text", "text": "word " * 3000}]},),
    )  # fmt: skip
    pairs = [*photo_pairs[:3], long, *photo_pairs[3:8]]
    for count in (0, 1):
        with pytest.raises(UserError, match=r"^pairs.jsonl:4: row 'long' has .* packing.max_tokens is 2,048 .*; raise"):
            list(new_loader(pairs, count, shuffle=False).steps(0, 2))
        skipping = new_loader(pairs, count, shuffle=False, too_long="skip")
        assert [len(step.pairs) for step in skipping.steps(0, 2)] == [7, 1]
        assert list(skipping.skipped) == ["pairs.jsonl:4"]


def test_an_image_that_comes_again_is_processed_once(new_loader, processor, photo_pairs, monkeypatch):
    pairs = [pair for pair in photo_pairs if pair.images == photo_pairs[0].images]
    assert len(pairs) > 3
    calls = []
    real = processor.files.image_processor

    class Counting:
        merge_size = real.merge_size

        def __call__(self, **inputs):
            calls.append(1)
            return real(**inputs)

    monkeypatch.setattr(processor, "files", dataclasses.replace(processor.files, image_processor=Counting()))
    list(new_loader(pairs, 0).steps(0, 1))
    assert len(calls) == 1


def test_pixels_are_rounded_to_the_policys_dtype_and_keep_their_name(tiny, photo_pairs):
    folder = str(tiny("qwen2_5_vl"))
    exact, rounded = (
        Processor(folder, load_model_config(folder), dtype=dtype).process_image(photo_pairs[0].images[0])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(rounded.pixel_values, exact.pixel_values.bfloat16())
    assert rounded.content_hash == exact.content_hash


def test_number_of_workers():
    assert 1 <= default_workers() <= 8


def test_a_fault_of_the_code_itself_is_raised_with_its_row_and_traceback(new_loader, photo_pairs, monkeypatch):
    monkeypatch.setattr(Processor, "tokenize_pair", lambda self, *arguments: 1 / 0)
    for count in (0, 1):
        with pytest.raises(RuntimeError, match="at .*photos.jsonl:1: ZeroDivisionError") as told:
            next(new_loader(photo_pairs[:1], count).steps(0, 1))
        if count:
            assert "in make" in str(told.value) or "lambda" in str(told.value)


def test_steps_are_a_function_of_their_number(new_loader, photo_pairs):
    for name in ("ids",):
        walked = [[p.id for p in step.pairs] for step in new_loader(photo_pairs[:40], 1).steps(0, 12)]
        assert [[p.id for p in step.pairs] for step in new_loader(photo_pairs[:40], 2).steps(9, 12)] == walked[9:], name
