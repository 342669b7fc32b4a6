"""DeepSpeed's ZeRO trains as one process does: gradients, weights, files; and ends all ranks where one fails."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from tests import several_ranks
from tests.runs import losses, metrics
from tests.training.test_ranks import only_line, weights_of
from vapr.config import CheckpointConfig, FeaturesConfig, LoraConfig, PackingConfig, ParallelConfig, TrainConfig
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.model.joint_layers import JointDecoderLayer
from vapr.plan.engines import check_deepspeed
from vapr.training import engine_deepspeed, trainer
from vapr.training.engine import Engine
from vapr.training.make_engine import choose_engine

several_ranks.SERVER.set_forkserver_preload([*several_ranks.PRELOADED, "deepspeed"])


@pytest.fixture
def rows(photo_rows):
    """22 rows, of which every third has no image: packs of text alone, and in the last step two pairs for all ranks."""
    mixed = []
    for number, row in enumerate(photo_rows[:22]):
        if number % 3 == 0:
            prompt = [
                {"role": "user", "content": [part for part in row["prompt"][0]["content"] if part["type"] == "text"]}
            ]
            row = row | {"images": [], "prompt": prompt}
        mixed.append(row)
    return mixed


@pytest.fixture
def configure(make_config, rows):
    """A config of five steps an epoch: several packs a rank, fewer on the last, and in step 5 two pairs for all."""

    def configure(name, parallel=None, epochs=1, **policy):
        optim = {"lr": 1e-3, "pairs_per_step": 5, "epochs": epochs, "eps": 1e-5}
        config = make_config(name, rows=rows, lora="train" not in policy, optim=optim, packing={"max_tokens": 450})
        settings = (
            ParallelConfig(timeout=60)
            if parallel is None
            else ParallelConfig(**{"engine": "deepspeed", "timeout": 60, **parallel})
        )
        return dataclasses.replace(config, policy=dataclasses.replace(config.policy, **policy), parallel=settings)

    return configure


def nothing_whole(*arguments):
    """Train with every weight spread, however small."""
    engine_deepspeed.KEPT_WHOLE = 0
    several_ranks.vapr(*arguments)


def module_by_module(*arguments):
    """Train without joint products, which DeepSpeed parts: in bfloat16 those round once where their parts round often."""
    JointDecoderLayer.of = lambda *arguments, **options: None
    nothing_whole(*arguments)


def zero_on(size, config, tmp_path, *options, work=nothing_whole, before=()):
    file = several_ranks.config_file(config, tmp_path / f"{Path(config.run_dir).name}.yaml")
    return several_ranks.run(size, tmp_path / "out", work, *before, "train", file, *options)


def assert_same_training(several, one, tolerance=1e-5):
    """Within rounding, which five updates make more of: parted layers have other products than joined ones."""
    assert losses(several) == pytest.approx(losses(one), rel=tolerance, abs=tolerance)
    for key in ("grad_norm", "rewards/margins", "pairs", "logps/chosen"):
        found, expected = ([row[key] for row in metrics(config) if key in row] for config in (several, one))
        assert found == pytest.approx(expected, rel=4 * tolerance, abs=4 * tolerance), key
    assert_same_tensors(weights_of(several), weights_of(one), tolerance)


def assert_same_tensors(found, expected, tolerance=5e-6):
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        difference = (found[name].float() - expected[name].float()).abs().max()
        assert difference <= tolerance * expected[name].float().abs().max().clamp(min=1), name


def assert_same_final(several, one, tolerance=5e-6):
    """The same files; the same bytes but for weights."""
    folders = [Path(config.run_dir) / "final" for config in (several, one)]
    names = [
        sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        for folder in folders
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert_same_tensors(*(load_file(folder / name) for folder in folders), tolerance)
        elif name != "README.md":  # which names the run's folder and its figures
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


ALL = TrainConfig(language_model=True, projector=True, vision_tower=True)
LORA, FULL = {}, {"train": ALL, "lora": None}
WIDE = {"train": ALL, "lora": LoraConfig(rank=4, alpha=8), "checkpointing": "full"}
# Inside the backward pass ZeRO 3 gathers the weights of what is computed again.
ATTENTION, MLP = ({"train": ALL, "lora": None, "checkpointing": level} for level in ("attention", "mlp"))


@pytest.mark.parametrize(
    ("size", "zero", "policy"),
    [
        (3, {"zero": 1}, LORA), (2, {"zero": 2}, LORA), (3, {"zero": 3}, LORA), (2, {"zero": 3}, WIDE),
        (2, {"zero": 3}, ATTENTION), (2, {"zero": 3}, MLP),
        (2, {"zero": 1}, FULL), (3, {"zero": 2}, FULL), (3, {"zero": 3}, FULL),
        (2, {"zero": 2, "offload": "optimizer"}, FULL), (2, {"zero": 3, "offload": "all"}, FULL),
    ],
    ids=lambda value: {
        id(LORA): "lora", id(FULL): "full", id(WIDE): "lora-everywhere", id(ATTENTION): "attention", id(MLP): "mlp",
    }.get(id(value), str(value)),
)  # fmt: skip
def test_zero_trains_as_one_process(configure, tmp_path, size, zero, policy):
    one, several = configure("one", **policy), configure("several", zero, **policy)
    trainer.train(one)
    ranks = zero_on(size, several, tmp_path)
    assert [rank.code for rank in ranks] == [0] * size, "".join(rank.err for rank in ranks)
    assert_same_training(several, one)
    assert_same_final(several, one)
    assert all(rank.out == "" and rank.err == "" for rank in ranks[1:])
    assert f"processes  {size}, DeepSpeed ZeRO {zero['zero']} spreads" in ranks[0].out
    assert "deepspeed" not in (ranks[0].out + ranks[0].err).replace("DeepSpeed ZeRO", "").lower()  # its own chatter
    assert "largest |log-ratio| to the reference 0.00e+00" in ranks[0].err


def test_in_bfloat16_packs_and_ranks_add_up_in_float32(configure, tmp_path):
    """As the sum of gradients over the same two ranks, whose packs one process would lay out, and round, otherwise."""
    summed, *spread = (
        configure(name, parallel, dtype="bfloat16")
        for name, parallel in (("summed", {"engine": "all-reduce"}), ("zero1", {"zero": 1}), ("zero3", {"zero": 3}))
    )
    assert [rank.code for rank in zero_on(2, summed, tmp_path, work=module_by_module)] == [0, 0]
    for config in spread:
        ranks = zero_on(2, config, tmp_path, work=module_by_module)
        assert [rank.code for rank in ranks] == [0, 0], "".join(rank.err for rank in ranks)
        assert ("in bfloat16 stage 1 runs as 2" in ranks[0].out) == (config.parallel.zero == 1)
        assert_same_training(config, summed)


def stop_after(update, *arguments):
    """Train, and stop at a signal after an update; of whatever engine."""
    for engine in (Engine, engine_deepspeed.DeepSpeedEngine):

        def step_and_stop(self, step=engine.step):
            step(self)
            if self.num_updates == update:
                os.kill(os.getpid(), signal.SIGTERM)

        engine.step = step_and_stop
    nothing_whole(*arguments)


def test_a_run_goes_on_with_other_ranks_stages_and_engines(configure, tmp_path):
    """Full fine-tuning, whose parameters are of both groups: those that decay and those that do not."""
    whole = configure("whole", epochs=2, **FULL)
    trainer.train(whole)
    broken = configure("broken", epochs=2, **FULL)
    legs = [(2, 2, {"zero": 2}), (3, 4, {"zero": 3}), (1, 5, None), (2, 7, {"zero": 1}), (2, 8, None)]
    for number, (size, update, parallel) in enumerate(legs):
        leg = dataclasses.replace(broken, parallel=configure("", parallel).parallel)
        ranks = zero_on(size, leg, tmp_path, *["--resume"] * (number > 0), work=stop_after, before=(update,))
        assert f"step-{update:06d}" in only_line(ranks, 128 + signal.SIGTERM)
        folder = Path(broken.run_dir) / "checkpoints" / f"step-{update:06d}"
        parts = [""] if parallel is None else [f"-{rank:05d}-of-{size:05d}" for rank in range(size)]
        expected = {f"{kind}{part}.safetensors" for kind in ("optimizer", "weights") for part in parts}
        assert {file.name for file in folder.glob("*.safetensors")} == expected
    last = dataclasses.replace(broken, parallel=configure("", {"zero": 3}).parallel)
    assert [rank.code for rank in zero_on(2, last, tmp_path, "--resume")] == [0, 0]
    assert_same_training(broken, whole, tolerance=4e-5)  # rounding grows over ten steps
    assert_same_final(broken, whole, tolerance=4e-5)


def test_held_out_pairs_features_and_shared_images(configure, photo_rows, tmp_path):
    """Every kind of pass: the tower alone, the reference where one rank lacks it, pairs scored without gradients."""
    held_out = tmp_path / "held_out.jsonl"
    write_pairs(held_out, photo_rows[24:31])
    one, several = (
        dataclasses.replace(
            config, data=dataclasses.replace(config.data, eval=str(held_out)),
            packing=PackingConfig(share="image", max_tokens=700),
            features=FeaturesConfig(cache=True, cache_dir=str(tmp_path / config.run_dir[-3:])),
            reference=dataclasses.replace(config.reference, cache_dir=str(tmp_path / f"ref{config.run_dir[-3:]}")),
        )
        for config in (configure("one"), configure("several", {"zero": 3}))
    )  # fmt: skip
    trainer.train(one)
    ranks = zero_on(2, several, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], "".join(rank.err for rank in ranks)
    assert_same_training(several, one)
    figures = [[row["eval/loss"] for row in metrics(config) if "eval/loss" in row] for config in (several, one)]
    assert len(figures[0]) == 3 and figures[0] == pytest.approx(figures[1], rel=5e-6)
    assert (Path(several.run_dir) / "report.html").is_file()
    assert_same_final(several, one)


# What goes wrong on one rank, in the processes' own module.


def after_two_updates(rank, happens, *arguments):
    """Train; something happens after the second update, on one rank or (None) on all."""
    step = engine_deepspeed.DeepSpeedEngine.step

    def step_and_more(engine):
        step(engine)
        if rank in (None, engine.ranks.rank) and engine.num_updates == 2:
            happens(engine)

    engine_deepspeed.DeepSpeedEngine.step = step_and_more
    nothing_whole(*arguments)


def spoil_gradient(engine):
    """Give rank 1 a gradient that is not finite; end with another code if an update is made of it."""
    backward, gradient_norm = engine.passes.backward, engine.gradient_norm
    if engine.ranks.rank == 1:
        engine.passes.backward = lambda loss: backward(loss * float("nan"))

    def checked_norm():
        before = engine.state()[0]
        norm = gradient_norm()
        after = engine.state()[0]
        if not all(torch.equal(before[name], after[name]) for name in before):
            os._exit(77)
        return norm

    engine.gradient_norm = checked_norm


def mistake(engine):
    def backward(loss):
        raise UserError("pairs.jsonl:7: a row that cannot be used")

    engine.backward = backward


def lose_memory(engine):
    forward = engine.passes._engine

    def failing(*arguments):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    engine.passes._engine = failing


def kill(engine):
    def forward(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    engine.passes._engine = forward


@pytest.mark.parametrize("zero", [2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(configure, tmp_path, zero):
    config = configure("run", {"zero": zero}, **FULL)
    line = only_line(zero_on(2, config, tmp_path, work=after_two_updates, before=(None, spoil_gradient)), 1)
    assert line.startswith("Stopped: step 3: grad_norm is not finite; stopped before the update")
    [listed] = Path(config.run_dir).glob("not-finite-*.json")
    assert len(json.loads(listed.read_text())["pairs"]) == 5


def test_a_mistake_between_passes_ends_all_with_the_steps_saved(configure, tmp_path):
    """After step 3, of which a checkpoint is due only one step later."""
    config = dataclasses.replace(configure("run", {"zero": 3}), checkpoint=CheckpointConfig(every=5))
    line = only_line(zero_on(3, config, tmp_path, work=after_two_updates, before=(1, mistake)))
    assert line.startswith("Error: rank 1: pairs.jsonl:7: a row that cannot be used; the 2 steps before it are saved")


@pytest.mark.parametrize("zero", [2, 3])
def test_a_rank_that_ends_in_the_middle_of_a_pass_is_named(configure, tmp_path, zero):
    config = configure("run", {"zero": zero})
    ranks = zero_on(2, config, tmp_path, work=after_two_updates, before=(1, lose_memory))
    line = only_line(ranks, 1)
    assert line.startswith("Stopped: rank 1: step 3 does not fit the GPU's memory")
    ranks = zero_on(2, config, tmp_path, "--resume", work=after_two_updates, before=(1, kill))
    assert [rank.code for rank in ranks] == [0, 0]  # it went on from step 2, and never came to it again


def test_a_rank_that_is_killed_in_a_pass_is_named(configure, tmp_path):
    ranks = zero_on(2, configure("run", {"zero": 3}), tmp_path, work=after_two_updates, before=(1, kill))
    assert (ranks[0].code, ranks[1].code) == (1, -signal.SIGKILL)
    line = ranks[0].err.splitlines()[-1]
    assert line.startswith(f"Stopped: rank 1 (process {ranks[1].process.pid} of "), line


# What DeepSpeed cannot do, and what is chosen.


def without_deepspeed(*arguments):
    sys.modules["deepspeed"] = None
    several_ranks.vapr(*arguments)


def test_deepspeed_is_asked_for_where_it_is_not_installed(configure, tmp_path):
    ranks = zero_on(2, configure("run", {"zero": 2}), tmp_path, work=without_deepspeed)
    assert only_line(ranks) == "Error: parallel.engine: deepspeed is not installed; pip install 'vapr[scale]'"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim": {"kind": "adamw-8bit"}}, "optim.kind: adamw-8bit does not go with parallel.engine: deepspeed"),
        ({"probe": {"every": 2, "data": "rows.jsonl"}}, "probe.every: a probe runs on one rank"),
        ({"policy": {"base_weights": "nf4"}}, "policy.base_weights: nf4 cannot be spread"),
    ],
    ids=["8 bits", "probe", "nf4"],
)
def test_what_deepspeed_cannot_do_is_refused(configure, changes, told):
    config = configure("run", {"zero": 3})
    changed = {name: dataclasses.replace(getattr(config, name), **value) for name, value in changes.items()}
    with pytest.raises(UserError, match=told):
        check_deepspeed(dataclasses.replace(config, **changed), 3)


@pytest.mark.parametrize(
    ("engine", "size", "device", "lora", "gib", "stored", "chosen"),
    [
        ("auto", 1, "cuda", False, 0, "bfloat16", ("all-reduce", 2)),
        ("auto", 2, "cpu", False, 0, "bfloat16", ("all-reduce", 2)),
        ("auto", 2, "cuda", False, 0, "bfloat16", ("deepspeed", 2)),
        ("auto", 2, "cuda", True, 14, "bfloat16", ("all-reduce", 2)),
        ("auto", 2, "cuda", True, 26, "bfloat16", ("deepspeed", 3)),
        ("auto", 2, "cuda", True, 26, "nf4", ("all-reduce", 2)),  # ZeRO 3 spreads no nf4
        ("deepspeed", 1, "cpu", True, 1, "bfloat16", ("deepspeed", 2)),
        ("all-reduce", 2, "cuda", True, 26, "bfloat16", ("all-reduce", 2)),
    ],
)
def test_the_engine_is_chosen_by_what_fits(configure, monkeypatch, engine, size, device, lora, gib, stored, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 2**30))
    held = [SimpleNamespace(requires_grad=False, nbytes=gib * 2**30)]
    parameters, codes = (held, []) if stored == "bfloat16" else ([], held)
    base = SimpleNamespace(parameters=lambda: parameters, buffers=lambda: codes)
    policy = SimpleNamespace(device=torch.device(device), base=base)
    ranks = SimpleNamespace(size=size, gather=lambda values: np.array([values] * size))
    config = configure("run", **({"base_weights": stored} if lora else {"lora": None}))
    config = dataclasses.replace(config, parallel=ParallelConfig(engine=engine))
    name, zero, why = choose_engine(config, policy, ranks)
    assert (name, zero) == chosen
    assert bool(why) == (engine == "auto" and size > 1)
    assert stored == "bfloat16" or "26.0 GiB" in why
