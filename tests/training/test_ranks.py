"""Several processes train as one does: the same gradients, the same run folder, and one line where something is wrong."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from tests import several_ranks
from tests.runs import losses, metrics
from vapr.config import CheckpointConfig, FeaturesConfig, PackingConfig, ParallelConfig, ProbeConfig
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.interrupts import TrainingStopped
from vapr.training import checkpoint, trainer
from vapr.training.ranks import Ranks


def weights_of(config):
    return checkpoint.SavedTensors(checkpoint.list_checkpoints(Path(config.run_dir))[-1], "weights")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_several_processes_train_as_one(make_config, tmp_path, size, lora):
    """An epoch of 24 pairs in steps of 5: the last rank gets fewer, and in the last step of four, three ranks one or two."""
    optim = {"lr": 1e-3, "pairs_per_step": 5, "epochs": 2, "eps": 1e-5}
    one, several = (
        make_config(name, lora=lora, optim=optim, packing={"max_tokens": 1200}) for name in ("one", "several")
    )
    trainer.train(one)
    ranks = several_ranks.run(
        size, tmp_path / "out", several_ranks.vapr, "train", several_ranks.config_file(several, tmp_path / "run.yaml")
    )
    assert [rank.code for rank in ranks] == [0] * size, ranks[0].err + ranks[1].err
    assert losses(several) == pytest.approx(losses(one), rel=2e-6, abs=2e-6)
    # Ranks add up in another order, and AdamW makes the most of the smallest differences for ten steps.
    for key in ("grad_norm", "rewards/margins", "pairs", "logps/chosen"):
        assert [row[key] for row in metrics(several)] == pytest.approx(
            [row[key] for row in metrics(one)], rel=3e-5, abs=3e-5
        )
    expected, found = weights_of(one), weights_of(several)
    assert set(expected) == set(found)
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 2e-6 * expected[name].abs().max().clamp(min=1), name
    assert ranks[1].out == "" and ranks[1].err == ""
    assert f"processes  {size}" in ranks[0].out


def vapr_on(size, config, tmp_path, *options, command="train", env=None):
    """Run a command in several processes; return them, ended."""
    file = several_ranks.config_file(config, tmp_path / f"{Path(config.run_dir).name}.yaml")
    return several_ranks.run(size, tmp_path / "out", several_ranks.vapr, command, file, *options, env=env)


def only_line(ranks, code=2):
    """The one line on stderr of rank 0; every process has ended with ``code``, the others in silence."""
    assert [rank.code for rank in ranks] == [code] * len(ranks), [rank.err for rank in ranks]
    assert all(rank.out == "" and rank.err == "" for rank in ranks[1:])
    return ranks[0].err.splitlines()[-1]


def test_what_people_read_is_written_once_and_tells_of_all_pairs(make_config, tmp_path, photo_rows):
    """Held-out pairs, image features, pairs that share images, the probe, the best checkpoint."""
    rows = [photo_rows[0] | {"id": "bad", "chosen": photo_rows[0]["rejected"]}, *photo_rows[:23]]
    held_out = tmp_path / "held_out.jsonl"
    write_pairs(held_out, photo_rows[24:31])
    base = make_config(rows=rows)
    data = dataclasses.replace(base.data, eval=str(held_out), on_bad_row="skip")
    options = {
        "packing": PackingConfig(share="image", max_tokens=1200),
        "features": FeaturesConfig(cache=True, cache_dir=str(tmp_path / "features")),
        "checkpoint": CheckpointConfig(every=2, keep=2, best=True),
        "probe": ProbeConfig(every=3, pairs=4, questions=2, max_new_tokens=4),
    }
    one, several = (
        dataclasses.replace(base, data=data, run_dir=str(tmp_path / name), **options) for name in ("one", "several")
    )
    trainer.train(one)
    ranks = vapr_on(2, several, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert [set(row) for row in metrics(several)] == [set(row) for row in metrics(one)]
    for mine, other in zip(metrics(one), metrics(several), strict=True):
        for key in set(mine) - {"pairs_per_second", "peak_memory_mib", "tokens", "tokens_saved", "probe/seconds"}:
            expected = mine[key] if mine[key] is None else pytest.approx(mine[key], rel=1e-4, abs=1e-4)
            assert other[key] == expected, key
        assert other.get("tokens", 0) + other.get("tokens_saved", 0) == mine.get("tokens", 0) + mine.get(
            "tokens_saved", 0
        )
    one_files, several_files = (
        sorted(
            file.relative_to(run).as_posix()
            for file in Path(run).rglob("*")
            if file.is_file() and "tensorboard" not in file.parts
        )
        for run in (one.run_dir, several.run_dir)
    )
    assert several_files == one_files
    skipped = [json.loads((Path(config.run_dir) / "skipped.json").read_text()) for config in (one, several)]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 1
    assert "134 completions found in the cache, 0 computed" in ranks[0].out  # 23 pairs twice, 7 held out three times


def test_what_another_rank_finds_is_said(make_config, tmp_path, photo_rows):
    """Rows in the file's order: the second half of each step, text alone, is rank 1's."""
    text = [row for row in photo_rows if not row.get("images")][:4]
    shown = [row for row in photo_rows if row.get("images")][:4]
    config = make_config(
        rows=[*shown, *text], loss=[{"kind": "sigmoid"}, {"kind": "image"}], optim={"pairs_per_step": 8, "max_steps": 2}
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle=False))
    ranks = vapr_on(2, config, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    assert ranks[0].err.count("rank 1: ") == 1
    [line] = [line for line in ranks[0].err.splitlines() if line.startswith("rank 1: ")]
    assert "the row has no image" in line


def test_the_reference_cache_is_built_by_all_and_read_by_each(make_config, tmp_path):
    config = make_config(lora=False)
    ranks = vapr_on(2, config, tmp_path, "--json", command="prepare")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    counts = json.loads(ranks[0].out)["reference"]
    assert (counts["found"], counts["computed"], counts["on disk"]) == (0, 48, 48)
    again = json.loads(vapr_on(3, config, tmp_path, "--json", command="prepare")[0].out)["reference"]
    assert (again["found"], again["computed"], again["on disk"]) == (48, 0, 48)
    ranks = vapr_on(2, config, tmp_path)
    assert "96 completions found in the cache, 0 computed" in ranks[0].out, ranks[0].err


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3), (3, 2)], ids=str)
def test_a_run_goes_on_with_another_number_of_processes(make_config, tmp_path, sizes):
    optim = {"lr": 1e-3, "pairs_per_step": 8, "epochs": 2, "eps": 1e-5}
    whole, broken = (make_config(name, optim=optim) for name in ("whole", "broken"))
    trainer.train(whole)
    file = several_ranks.config_file(broken, tmp_path / "broken.yaml")
    ranks = several_ranks.run(sizes[0], tmp_path / "out", after_three_updates, sizes[0] - 1, terminate, file)
    line = only_line(ranks, 128 + signal.SIGTERM)
    assert line.startswith("Stopped: SIGTERM: stopped after writing") and "step-000003" in line
    ranks = vapr_on(sizes[1], broken, tmp_path, "--resume")
    assert [rank.code for rank in ranks] == [0] * sizes[1], ranks[0].err
    assert losses(broken) == pytest.approx(losses(whole), rel=2e-6, abs=2e-6)
    expected, found = weights_of(whole), weights_of(broken)
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 2e-6 * expected[name].abs().max().clamp(min=1), name


# What goes wrong on one rank, in the processes' own module.


def after_three_updates(rank, happens, file, *options):
    """Train; on one rank something happens after the third update."""
    step = trainer.Engine.step

    def step_and_more(engine):
        step(engine)
        if engine.ranks.rank == rank and engine.num_updates == 3:
            happens(engine)

    trainer.Engine.step = step_and_more
    several_ranks.vapr("train", file, *options)


def terminate(engine):
    os.kill(os.getpid(), signal.SIGTERM)


def kill(engine):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(engine):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(engine):
    raise ZeroDivisionError("a fault of vapr's own")


def spoil_gradient(engine):
    master = next(iter(engine.masters.values()))
    master.register_hook(lambda gradient: gradient * float("nan"))


def lose_memory(engine):
    def backward(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.backward = backward


def told_late(rank, place, file):
    """Train; a signal comes to one rank in its third step, when the ranks have just asked each other for one."""
    where = {"after asking": (trainer, "_is_due"), "while saving": (trainer.run_state, "save")}
    module, name = where[place]
    before = getattr(module, name)

    def told(first, *rest):
        engine = rest[1] if place == "while saving" else first
        if engine.ranks.rank == rank and engine.num_updates == 3:
            terminate(engine)
        return before(first, *rest)

    setattr(module, name, told)
    several_ranks.vapr("train", file)


@pytest.mark.parametrize(("place", "saved"), [("after asking", 4), ("while saving", 3)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(make_config, tmp_path, place, saved):
    optim = {"lr": 1e-3, "pairs_per_step": 4, "epochs": 1}
    config = dataclasses.replace(make_config(optim=optim), checkpoint=CheckpointConfig(every=3))
    if place == "after asking":
        config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=100))
    file = several_ranks.config_file(config, tmp_path / "run.yaml")
    line = only_line(several_ranks.run(2, tmp_path / "out", told_late, 1, place, file), 128 + signal.SIGTERM)
    assert line.startswith(f"Stopped: SIGTERM: stopped after writing {config.run_dir}/checkpoints/step-00000{saved};")
    assert len(losses(config)) == saved


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named(make_config, tmp_path, rank):
    file = several_ranks.config_file(make_config(), tmp_path / "run.yaml")
    ranks = several_ranks.run(2, tmp_path / "out", after_three_updates, rank, kill, file)
    assert ranks[rank].code == -signal.SIGKILL and ranks[1 - rank].code == 1
    assert ranks[1].out == ""
    told = ranks[1 - rank].err.splitlines()
    # Without a launcher rank 0 keeps the processes' numbers, and nobody knows them any more.
    who = f"rank 1 (process {ranks[1].process.pid} of " if rank == 1 else "rank 0, which holds the processes together,"
    assert told[-1].startswith(f"Stopped: {who}")
    assert told[-1].endswith(" was killed, or hangs; continue with --resume")
    assert rank == 1 or len(told) == 1


def test_a_rank_that_hangs_is_named(make_config, tmp_path):
    config = dataclasses.replace(make_config(), parallel=ParallelConfig(timeout=20))
    file = several_ranks.config_file(config, tmp_path / "run.yaml")
    ranks = several_ranks.start(2, tmp_path / "out", after_three_updates, 1, hang, file)
    ranks[0].process.join(several_ranks.SECONDS)
    ranks[1].process.kill()
    assert ranks[0].code == 1
    assert ranks[0].err.splitlines()[-1].startswith(f"Stopped: rank 1 (process {ranks[1].process.pid} of ")


def test_a_fault_on_one_rank_ends_all(make_config, tmp_path):
    """Its traceback is shown there, and the line of the others names it."""
    file = several_ranks.config_file(make_config(), tmp_path / "run.yaml")
    ranks = several_ranks.run(2, tmp_path / "out", after_three_updates, 1, fail, file)
    assert [rank.code for rank in ranks] == [1, 1]
    assert "a fault of vapr's own" in ranks[1].err and "Traceback" in ranks[1].err
    assert ranks[0].err.splitlines()[-1] == "Stopped: rank 1 failed (ZeroDivisionError: a fault of vapr's own)"


def test_what_one_rank_finds_wrong_ends_all_with_its_line(make_config, tmp_path, photo_rows):
    rows = photo_rows[:24]
    rows[17] = rows[17] | {"images": ["absent.jpg"]}
    config = make_config(rows=rows)
    line = only_line(vapr_on(2, config, tmp_path))
    assert "pairs.jsonl:18" in line and "absent.jpg" in line
    assert not (Path(config.run_dir) / "final").exists()


def test_a_gradient_that_is_not_finite_stops_all_and_names_the_pairs_of_all(make_config, tmp_path):
    config = make_config()
    file = several_ranks.config_file(config, tmp_path / "run.yaml")
    line = only_line(several_ranks.run(2, tmp_path / "out", after_three_updates, 1, spoil_gradient, file), 1)
    assert line.startswith("Stopped: step 4: grad_norm is not finite; stopped before the update")
    [listed] = Path(config.run_dir).glob("not-finite-*.json")
    assert len(json.loads(listed.read_text())["pairs"]) == 8
    assert len(losses(config)) == 3


def test_steps_before_too_small_a_gpu_are_saved(make_config, tmp_path):
    config = make_config()
    file = several_ranks.config_file(config, tmp_path / "run.yaml")
    line = only_line(several_ranks.run(2, tmp_path / "out", after_three_updates, 1, lose_memory, file), 1)
    assert "step 4 does not fit" in line and "the 3 steps before it are saved" in line
    assert checkpoint.list_checkpoints(Path(config.run_dir))[-1].name == "step-000003"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim": {"pairs_per_step": 1}}, "optim.pairs_per_step: 1 cannot be dealt to 2 processes"),
        ({"policy": {"model": "nowhere/at-all"}}, "policy.model"),
        ({"run_dir": "/proc/nowhere"}, "run_dir: /proc/nowhere cannot be written"),
    ],
    ids=["world size", "model", "run_dir"],
)
def test_mistakes_are_one_line_of_rank_0(make_config, tmp_path, changes, told):
    config = make_config()
    changed = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    config = dataclasses.replace(config, **changed)
    assert told in only_line(
        several_ranks.run(
            2, tmp_path / "out", several_ranks.vapr, "train", several_ranks.config_file(config, tmp_path / "run.yaml")
        )
    )


def train_with_other_torch(file):
    if os.environ["RANK"] == "1":
        import importlib.metadata

        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "2.9.9" if name == "torch" else version(name)
    several_ranks.vapr("train", file)


def test_other_versions_on_a_rank_are_refused(make_config, tmp_path):
    file = several_ranks.config_file(make_config(), tmp_path / "run.yaml")
    line = only_line(several_ranks.run(2, tmp_path / "out", train_with_other_torch, file))
    assert line.startswith("Error: rank 1 has torch 2.9.9, rank 0 2.")


def train_with_other_seed(file):
    several_ranks.vapr("train", file, *(("--set", "seed=5") if os.environ["RANK"] == "1" else ()))


def test_another_config_on_a_rank_is_refused_by_the_key_that_differs(make_config, tmp_path):
    file = several_ranks.config_file(make_config(), tmp_path / "run.yaml")
    line = only_line(several_ranks.run(2, tmp_path / "out", train_with_other_seed, file))
    assert line.startswith("Error: rank 1 has seed: 5, rank 0 0; start every process from the same")


def test_held_out_pairs_of_which_none_can_be_used_lose_no_run(make_config, tmp_path, photo_rows):
    """One pair, too long: one of two ranks has skipped nothing."""
    config = make_config(packing={"max_tokens": 1200})
    answer = [{"role": "assistant", "content": "A helmet. " * 700}]
    write_pairs(tmp_path / "held_out.jsonl", [photo_rows[30] | {"chosen": answer, "edits": []}])
    data = dataclasses.replace(config.data, eval=str(tmp_path / "held_out.jsonl"), too_long="skip")
    ranks = vapr_on(2, dataclasses.replace(config, data=data), tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    assert "data.eval: no pair could be used; the first: " in ranks[0].out
    assert (Path(config.run_dir) / "final").exists()


@pytest.mark.parametrize("calls_of_1", [4, 5], ids=["before", "while waiting"])
def test_a_rank_that_is_only_slower_is_not_blamed(calls_of_1):
    """Rank 1 is gone; rank 0 lives, and may not have come as far as rank 2, which notices."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    store = torch.distributed.HashStore()
    for rank, (pid, calls) in enumerate([(os.getpid(), calls_of_1), (gone.pid, calls_of_1), (os.getpid(), 4)]):
        store.set(f"is/{rank}", f"process {pid} of {socket.gethostname()}")
        store.set(f"calls/{rank}", str(calls))
    ranks = Ranks(2, 3, store)
    ranks._calls = 4

    def talk():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(TrainingStopped) as stopped:
        ranks._collective(talk)
    assert str(stopped.value).startswith(f"rank 1 (process {gone.pid} of ")
    assert "rank 0" not in str(stopped.value) and not ranks.shows


def test_a_rank_that_failed_stays_until_rank_0_ends():
    """Launchers kill all processes as soon as one has failed, and rank 0 has something to show."""
    store = torch.distributed.HashStore()
    other = threading.Thread(target=Ranks(1, 2, store).let_first_end)
    other.start()
    other.join(0.1)
    assert other.is_alive()
    Ranks(0, 2, store).let_first_end()
    other.join()


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
    ],
    ids=["words", "rank", "alone", "no rank"],
)  # fmt: skip
def test_settings_of_a_launcher_that_make_no_sense(make_config, monkeypatch, env, told):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        trainer.train(make_config())
