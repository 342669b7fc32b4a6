"""Packs that do not fit are halved: the step has the gradient it would have had, whatever broke off before."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.runs import losses, metrics
from vapr.batches.loader import open_loaders
from vapr.batches.packing import pack
from vapr.batches.steps import Step
from vapr.config import ReferenceConfig
from vapr.interrupts import TrainingStopped
from vapr.model import reference as reference_module
from vapr.model.policy import load_policy
from vapr.model.reference import Reference
from vapr.training import step as step_module
from vapr.training import trainer
from vapr.training.engine import Engine
from vapr.training.out_of_memory import FittingPacks
from vapr.training.ranks import Ranks
from vapr.training.step import evaluate, train_step

CPU = torch.device("cpu")
PLACES = ("reference", "forward", "backward, late", "backward, early")


class Memory:
    """A GPU whose memory a pack of more than ``pairs`` pairs exceeds at a place, as often as one comes."""

    def __init__(self, monkeypatch, place: str, pairs: int) -> None:
        self.place, self.pairs, self.failures, self.sizes = place, pairs, 0, []
        self._too_large = False
        real = step_module.score

        def score(policy, reference, batch, *rest):
            self._too_large = batch.num_pairs > self.pairs
            self.sizes.append(batch.num_pairs)
            if self.place == "reference":
                self._fail()
            result = real(policy, reference, batch, *rest)
            if self.place == "forward":
                self._fail()
            return result

        monkeypatch.setattr(step_module, "score", score)

    def watch(self, policy) -> None:
        """Fail in the backward pass, after the gradients of some layers were added and before others are."""
        names = [name for name in policy.trained_parameters() if ".language_model.layers." in name]
        name = {"backward, late": names[0], "backward, early": names[-1]}.get(self.place)
        if name is not None:
            policy.trained_parameters()[name].register_post_accumulate_grad_hook(lambda weight: self._fail())

    def _fail(self) -> None:
        if self._too_large:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def parts(config, cache: Path):
    """A fresh policy with its engine and reference, from the config's seed."""
    torch.manual_seed(0)
    policy = load_policy(config.policy, CPU)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    engine = Engine(policy, config.optim, 4)
    engine._clip = None  # the gradients themselves are compared
    return policy, engine, Reference(policy, str(cache))


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: master.grad.clone() for name, master in engine.masters.items()}


@pytest.fixture
def make_step(make_config, photo_rows):
    """``make_step(dtype, lora)`` -> config and one step of eight pairs in two packs."""

    def make(dtype: str = "float32", lora: bool = True):
        config = make_config(rows=[row for row in photo_rows if row.get("images") or row.get("image")][:8], lora=lora)
        policy, data = dataclasses.replace(config.policy, dtype=dtype), dataclasses.replace(config.data, workers=0)
        config = dataclasses.replace(config, policy=policy, data=data)
        with open_loaders(config) as loaders:
            (step,) = loaders["train"].steps(0, 1)
        batches = (pack(step.pairs[:3]), pack(step.pairs[3:]))
        return config, dataclasses.replace(step, batches=batches)

    return make


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [("float32", True), ("bfloat16", True), ("float32", False)],
    ids=["LoRA fp32", "LoRA bf16", "full"],
)
def test_the_gradient_is_that_of_an_unbroken_step(dtype, lora, make_step, tmp_path, monkeypatch):
    config, step = make_step(dtype, lora)
    policy, engine, reference = parts(config, tmp_path / "cache")
    values, margins = train_step(policy, engine, reference, step, config.loss).read()
    truth, counted = gradients(engine), reference.hits + reference.misses
    split = None
    for place in PLACES:
        with monkeypatch.context() as patch:
            memory = Memory(patch, place, 3)
            policy, engine, reference = parts(config, tmp_path / "cache")
            memory.watch(policy)
            said: list[str] = []
            got, got_margins = train_step(
                policy, engine, reference, step, config.loss, None, FittingPacks("pair", said.append)
            ).read()
        assert memory.failures == 1 and len(said) == 1 and "(5 pairs) does not fit the GPU's memory" in said[0]
        assert max(memory.sizes[2:]) <= 3 and sum(memory.sizes[2:]) == 8
        # Another order of adding; in bf16 each pack's gradient is rounded before it is added.
        tolerance = 1e-5 if dtype == "float32" else 0.02
        assert oracles.worst_relative_error(gradients(engine), truth) < tolerance
        assert got["loss"] == pytest.approx(values["loss"], rel=tolerance) and got["pairs"] == values["pairs"]
        assert dict(got_margins) == pytest.approx(
            dict(margins), rel=tolerance, abs=0.05 if dtype != "float32" else 1e-4
        )
        assert reference.hits + reference.misses == counted  # each completion once, although the step began twice
        split = split or laid_out_as_said(said[0], step)
        policy, engine_of_halves, reference = parts(config, tmp_path / "cache")
        train_step(policy, engine_of_halves, reference, split, config.loss)
        assert same_bytes(gradients(engine), gradients(engine_of_halves)), place


def laid_out_as_said(said: str, step: Step) -> Step:
    """The same step, laid out from the beginning as the message says."""
    fitting = FittingPacks("pair")
    fitting.max_tokens = int(said.split("at most ")[1].split(" ")[0].replace(",", ""))
    return dataclasses.replace(step, batches=tuple(fitting._limited(step.batches)))


def same_bytes(got: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(got[name], other[name]) for name in other)


def test_a_second_time_halves_again_and_a_single_pair_is_the_end(make_step, tmp_path, monkeypatch):
    config, step = make_step()
    step = dataclasses.replace(step, batches=(pack(step.pairs),))
    memory = Memory(monkeypatch, "backward, late", 1)
    policy, engine, reference = parts(config, tmp_path / "cache")
    memory.watch(policy)
    said: list[str] = []
    fitting = FittingPacks("pair", said.append)
    train_step(policy, engine, reference, step, config.loss, None, fitting)
    assert memory.sizes[-8:] == [1] * 8 and len(said) == memory.failures > 1
    memory.pairs = 0
    engine.forget_gradients()
    with pytest.raises(torch.OutOfMemoryError):
        train_step(policy, engine, reference, step, config.loss, None, fitting)
    assert len(said) == memory.failures - 1


def test_a_run_goes_on_and_keeps_to_the_smaller_packs(make_config, photo_rows, tmp_path, monkeypatch, capsys):
    rows = [row for row in photo_rows if row.get("images") or row.get("image")][:16]
    changes = {"optim": {"lr": 1e-3, "pairs_per_step": 8, "epochs": 2}, "checkpoint": {"every": 10}}
    unbroken = make_config("unbroken", rows=rows, **changes)
    trainer.train(unbroken)
    capsys.readouterr()
    config = make_config("halved", **changes)
    memory = Memory(monkeypatch, "forward", 5)
    trainer.train(config)
    said = "".join(capsys.readouterr())
    assert said.count("does not fit the GPU's memory") == memory.failures
    assert 1 <= memory.failures <= 2 and max(memory.sizes[2:]) <= 5
    assert losses(config) == pytest.approx(losses(unbroken), rel=1e-5)
    assert [entry["pairs"] for entry in metrics(config)] == [8, 8, 8, 8]
    assert sum(size for size in memory.sizes if size <= 5) == 32  # two epochs of 16 pairs, none lost or twice


@pytest.mark.parametrize("lora", [True, False], ids=["first margin", "reference before the run"])
def test_what_comes_before_the_first_step_is_halved_too(lora, make_config, photo_rows, monkeypatch, capsys):
    rows = [row for row in photo_rows if row.get("images") or row.get("image")][:8]
    changes = {"lora": lora, "optim": {"lr": 1e-3, "pairs_per_step": 8}}
    unbroken = make_config("unbroken", rows=rows, **changes)
    trainer.train(unbroken)
    real = reference_module.token_logps
    sizes: list[int] = []

    def token_logps(policy, batch, *rest):
        sizes.append(batch.num_pairs)
        if batch.num_pairs > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(policy, batch, *rest)

    monkeypatch.setattr(reference_module, "token_logps", token_logps)
    cold = ReferenceConfig(cache_dir=str(Path(unbroken.run_dir).parent / "cold"))
    config = dataclasses.replace(make_config("halved", **changes), reference=cold)
    capsys.readouterr()
    trainer.train(config)
    said = "".join(capsys.readouterr())
    failures = sum(size > 3 for size in sizes)
    assert failures > 0 and said.count("does not fit the GPU's memory") == failures
    assert losses(config) == pytest.approx(losses(unbroken), rel=1e-5)
    assert f" completions found in the cache, {2 * len(rows)} computed" in said  # none counted twice


def test_a_run_ends_as_ever_where_one_pair_does_not_fit(make_config, photo_rows, monkeypatch):
    config = make_config(rows=[row for row in photo_rows if row.get("images") or row.get("image")][:8])
    Memory(monkeypatch, "forward", 0)
    with pytest.raises(TrainingStopped, match="step 1 does not fit the GPU's memory; lower packing.max_tokens"):
        trainer.train(config)


def test_held_out_pairs_too(make_config, photo_rows, tmp_path, monkeypatch):
    config = make_config(rows=[row for row in photo_rows if row.get("images") or row.get("image")][:8])
    policy, _, reference = parts(config, tmp_path / "cache")
    figures, notes = [], []
    for pairs in (8, 3):
        memory = Memory(monkeypatch, "forward", pairs)
        with open_loaders(config) as loaders:
            fitting = FittingPacks("pair", lambda line: None)
            figures.append(
                evaluate(policy, reference, loaders["train"], config.loss, None, Ranks(), notes.append, fitting)
            )
    assert memory.failures > 0 and figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert notes[-1] == "scoring held-out pairs 8/8"
