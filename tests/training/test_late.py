"""The device is given one step after another without a look at its results: what is then written, and what is not."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.runs import Crash, losses, metrics
from vapr.batches.loader import open_loaders
from vapr.batches.packing import pack
from vapr.batches.shared_memory import in_one_buffer
from vapr.config import OptimConfig
from vapr.model.policy import load_policy
from vapr.model.reference import Reference
from vapr.training import copied_ahead, step_clock, trainer
from vapr.training.copied_ahead import CopiedAhead
from vapr.training.engine import Engine
from vapr.training.late_lines import LateLines
from vapr.training.ledger import read_ledger
from vapr.training.step_clock import StepClock

CPU = torch.device("cpu")


@pytest.fixture
def packs(make_config, photo_rows):
    """Eight pairs with images in three packs, and their config."""
    config = make_config(rows=[row for row in photo_rows if row.get("images")][:8])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    with open_loaders(config) as loaders:
        (step,) = loaders["train"].steps(0, 1)
    return config, (pack(step.pairs[:3]), pack(step.pairs[3:5]), pack(step.pairs[5:]))


# When lines are written.


@pytest.fixture
def events(monkeypatch):
    """What a run does in order: ``update n`` and ``line n``, checkpoints and evaluations."""
    seen: list[str] = []
    update, write, save = Engine.step, trainer.MetricsLog.write, trainer.checkpoint.save
    monkeypatch.setattr(
        Engine, "step", lambda engine: (seen.append(f"update {engine.num_updates + 1}"), update(engine))[1]
    )
    monkeypatch.setattr(
        trainer.MetricsLog, "write", lambda log, n, values: (
            seen.append(f"{'line' if 'loss' in values else 'evaluation'} {n}"), write(log, n, values)
        )[1],
    )  # fmt: skip
    monkeypatch.setattr(
        trainer.checkpoint, "save", lambda run, n, *rest: (seen.append(f"checkpoint {n}"), save(run, n, *rest))[1]
    )
    return seen


def test_a_line_is_written_after_the_next_update_was_launched_and_before_a_checkpoint(make_config, events):
    config = make_config(checkpoint={"every": 4})
    trainer.train(config)
    assert events == [
        "update 1", "update 2", "line 1", "update 3", "line 2", "update 4", "line 3", "line 4", "checkpoint 4",
        "update 5", "update 6", "line 5", "line 6", "checkpoint 6",
    ]  # fmt: skip
    assert [entry["step"] for entry in read_ledger(Path(config.run_dir))] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in metrics(config)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
def test_whatever_ends_a_run_leaves_the_lines_of_the_steps_before_it(make_config, monkeypatch, error):
    update = Engine.step

    def step(engine):
        if engine.num_updates == 2:
            raise error
        update(engine)

    monkeypatch.setattr(Engine, "step", step)
    config = make_config(checkpoint={"every": 100})
    with pytest.raises(error):
        trainer.train(config)
    assert [entry["step"] for entry in metrics(config)] == [1, 2]
    assert [entry["step"] for entry in read_ledger(Path(config.run_dir))] == [1, 2]


def test_the_first_margin_is_compared_once(make_config, capsys):
    trainer.train(make_config(checkpoint={"every": 100}))
    assert "".join(capsys.readouterr()).count("first step: largest |log-ratio|") == 1


def test_no_line_follows_one_that_could_not_be_written():
    written: list[int] = []

    def write(number: int) -> None:
        if number == 2:
            raise OSError
        written.append(number)

    lines = LateLines(write)
    lines.add(1)
    assert written == [] and lines.is_due
    lines.add(2)
    assert written == [1]
    with pytest.raises(OSError):
        lines.add(3)
    lines.catch_up()
    assert written == [1] and not lines.is_due


# What is not finite.


def test_a_gradient_that_is_not_finite_changes_no_weight_in_the_next_step_either(make_config, events, monkeypatch):
    """Step 3's gradient is spoiled; step 4 is launched before the host hears of it."""
    kept: dict[str, torch.Tensor] = {}
    norm = Engine.gradient_norm
    engines: list[Engine] = []

    def spoiled(engine):
        engines[:] = [engine]
        if engine.num_updates == 2:
            kept.update(all_bytes(engine))
            next(iter(engine.masters.values())).grad.fill_(float("inf"))
        return norm(engine)

    monkeypatch.setattr(Engine, "gradient_norm", spoiled)
    config = make_config(checkpoint={"every": 100})
    with pytest.raises(trainer.TrainingStopped, match="step 3: grad_norm is not finite; stopped before the update"):
        trainer.train(config)
    assert events[-2:] == ["line 2", "update 4"] and engines[0].num_updates == 4
    assert_same_bytes(all_bytes(engines[0]), kept)
    assert [entry["step"] for entry in read_ledger(Path(config.run_dir))] == [1, 2] and len(losses(config)) == 2
    assert len(json.loads((Path(config.run_dir) / "not-finite-step-000003.json").read_text())["pairs"]) == 8


def all_bytes(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of master weights, moments and the model's own weights."""
    masters, moments = engine.state()
    weights = {f"model {name}": weight.detach() for name, weight in engine._weights.items()}
    return {name: tensor.clone() for name, tensor in {**masters, **moments, **weights}.items()}


def assert_same_bytes(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("bad", ["gradient", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_of_something_not_finite_changes_no_byte(make_config, kind, bad, dtype):
    config = make_config(lora=False)
    policy = load_policy(dataclasses.replace(config.policy, dtype=dtype), CPU)
    engine = Engine(policy, OptimConfig(lr=1e-2, weight_decay=0.1, warmup_ratio=0.0, kind=kind), 10)

    def step(loss: float = 1.0, factor: float = 1.0) -> None:
        engine.backward(torch.tensor(loss))
        for number, master in enumerate(engine.masters.values()):
            master.grad = torch.randn(master.shape, generator=torch.Generator().manual_seed(number)) * factor
        engine.gradient_norm()
        engine.step()

    step()
    before = all_bytes(engine)
    step(**({"factor": float("nan")} if bad == "gradient" else {"loss": float("inf")}))
    assert_same_bytes(all_bytes(engine), before)
    step()
    assert_same_bytes(all_bytes(engine), before)
    assert engine.num_updates == 3


def test_a_loss_is_that_of_the_step_alone(make_config):
    """What a pass that is run again had added, or the step before, does not count."""
    engine = Engine(load_policy(make_config().policy, CPU), OptimConfig(warmup_ratio=0.0), 10)
    engine.backward(torch.tensor(float("inf")))
    engine.forget_gradients()
    engine.backward(torch.tensor(1.0))
    engine.gradient_norm()
    assert float(engine._spoiled) == 0.0


# Packs ahead.


class Stream:
    """Notes in ``log`` what a stream of a GPU would be told."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.copies = log, 0

    def record_event(self) -> int:
        self.copies += 1
        self.log.append(f"copied {self.copies}")
        return self.copies

    def wait_event(self, event: int) -> None:
        self.log.append(f"kernels wait for {event}")


@pytest.fixture
def gpu(packs, monkeypatch):
    """CopiedAhead in front of a device without memory, with streams that note in a log what they are told."""
    log: list[str] = []
    beside, compute, marked = Stream(log), Stream(log), []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: marked.append((id(tensor), stream)))
    monkeypatch.setattr(copied_ahead, "pinned", lambda packed: log.append("pinned") or packed)
    reference = SimpleNamespace(find=lambda batch: torch.zeros(len(batch.token_weights)))
    policy = SimpleNamespace(device=torch.device("meta"), dtype=torch.bfloat16)
    ahead = CopiedAhead(policy, reference, None)
    ahead._beside = beside
    return ahead, packs[1], log, marked, compute


def test_a_pack_is_copied_while_the_one_before_it_is_computed(gpu):
    ahead, packs, log, marked, compute = gpu
    for number, copied in enumerate(ahead.each(packs), start=1):
        log.append(f"compute {number}")
        tensors = [value for value in fields(copied.batch) if isinstance(value, torch.Tensor)]
        tensors += [image.pixel_values for image in copied.batch.images] + [copied.reference_logps]
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert {(id(tensor), compute) for tensor in tensors} <= set(marked)
        assert all(image.pixel_values.dtype == torch.bfloat16 for image in copied.batch.images)
    assert [line for line in log if line != "pinned"] == [
        "copied 1", "copied 2", "kernels wait for 1", "compute 1", "copied 3", "kernels wait for 2", "compute 2",
        "kernels wait for 3", "compute 3",
    ]  # fmt: skip


def fields(value):
    """The fields of a dataclass, and of those in it that lie on a device."""
    found = []
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        nested = dataclasses.is_dataclass(one) and field.name != "pairs"
        found += fields(one) if nested else [one]
    return found


def test_a_pack_without_room_beside_the_one_before_it_is_copied_in_its_turn(gpu, monkeypatch):
    ahead, packs, log, _, _ = gpu
    copy, failures = ahead._copy, iter([False, True, False, False])

    def no_room(packed):
        if next(failures):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(packed)

    monkeypatch.setattr(ahead, "_copy", no_room)
    handed_over = [copied.batch.num_pairs for copied in ahead.each(packs)]
    assert handed_over == [3, 2, 3]
    assert [line for line in log if line != "pinned"] == [
        "copied 1", "kernels wait for 1", "copied 2", "copied 3", "kernels wait for 2", "kernels wait for 3",
    ]  # fmt: skip


def test_packs_that_are_handed_over_on_a_cpu_hold_what_they_held(packs, tmp_path):
    config, batches = packs
    policy = load_policy(config.policy, CPU)
    reference = Reference(policy, str(tmp_path / "cache"))
    reference.logps(batches[1])
    handed_over = list(CopiedAhead(policy, reference, None).each(batches))
    assert [copied.reference_logps is None for copied in handed_over] == [True, False, True]
    assert torch.equal(handed_over[1].reference_logps, reference.logps(batches[1]))
    for copied, batch in zip(handed_over, batches, strict=True):
        assert torch.equal(copied.batch.input_ids, batch.input_ids) and copied.batch.pairs == batch.pairs
        for got, image in zip(copied.batch.images, batch.images, strict=True):
            assert torch.equal(got.pixel_values, image.pixel_values) and got.content_hash == image.content_hash


def test_looking_up_counts_what_was_found_and_nothing_where_something_is_missing(packs, tmp_path):
    config, batches = packs
    reference = Reference(load_policy(config.policy, CPU), str(tmp_path / "cache"))
    assert reference.find(batches[0]) is None and (reference.hits, reference.misses) == (0, 0)
    computed = reference.logps(batches[0])
    assert (reference.hits, reference.misses) == (0, 6)
    assert torch.equal(reference.find(batches[0]), computed) and (reference.hits, reference.misses) == (6, 6)


def test_a_pack_in_one_buffer_is_the_same_pack(packs):
    """As packs that no data worker made are brought into pinned memory."""
    (batch, *_), buffers = packs[1], []

    def new_buffer(size):
        buffers.append(torch.empty(size, dtype=torch.uint8))
        return buffers[0]

    copied = in_one_buffer(batch, new_buffer).open()
    inside = buffers[0].untyped_storage().data_ptr()
    for got, tensor in zip(fields(copied), fields(batch), strict=True):
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(got, tensor) and got.dtype == tensor.dtype
            assert got.numel() == 0 or got.untyped_storage().data_ptr() == inside
    assert torch.equal(copied.images[0].pixel_values, batch.images[0].pixel_values)


def test_a_lap_lasts_from_one_update_to_the_next(monkeypatch):
    times = iter([10.0, 13.0, 15.5, 100.0, 101.0])
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: next(times))
    clock = StepClock(CPU)
    laps = [clock.lap(), clock.lap()]
    clock.start()  # after a checkpoint
    laps.append(clock.lap())
    assert [lap() for lap in laps] == [3.0, 2.5, 1.0]
