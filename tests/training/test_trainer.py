"""Training runs of tiny policies on photographs: what is logged and written, and that interruptions leave no trace."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.runs import Crash, final_bytes, losses, metrics, train_until_crash
from vapr.batches import loader
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.interrupts import Stopped
from vapr.plan import checkpointing
from vapr.training import checkpoint, trainer
from vapr.training import fill_caches as prepare
from vapr.training import step as training_step
from vapr.training.export import export

LOGGED = {
    "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "grad_norm", "lr", "pairs", "tokens", "tokens_saved", "pairs_per_second", "mfu", "peak_memory_mib",
}  # fmt: skip


def test_every_family_learns_from_photographs(family, make_config):
    config = make_config(family=family, optim={"lr": 3e-3, "pairs_per_step": 8, "epochs": 5})
    trainer.train(config)
    entries = metrics(config)
    assert [entry["step"] for entry in entries] == list(range(1, 16))
    assert all(set(entry) == LOGGED for entry in entries)
    first, last = entries[0], entries[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # a policy equal to its reference
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.6 and last["rewards/accuracies"] > 0.7
    assert first["tokens_saved"] > 0.3 * first["tokens"]


def test_full_fine_tuning_writes_a_model_that_loads(make_config, family):
    config = make_config(family=family, lora=False, packing={"share": "image"})
    final = trainer.train(config)
    model = transformers.AutoModelForImageTextToText.from_pretrained(final)
    masters = load_file(checkpoint.list_checkpoints(Path(config.run_dir))[-1] / "weights.safetensors")
    weights = dict(model.named_parameters())
    assert masters.keys() <= weights.keys()
    assert all(torch.equal(weights[name], master) for name, master in masters.items())
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template or (final / "chat_template.jinja").exists()


def test_exported_weights_are_base_plus_adapter(make_config, tmp_path):
    import peft

    config = make_config()
    final = trainer.train(config)
    export(Path(config.run_dir), tmp_path / "merged")
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForImageTextToText.from_pretrained(config.policy.model)
    adapted = peft.PeftModel.from_pretrained(base, str(final))
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    export(Path(config.run_dir), tmp_path / "adapter", adapter=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == final_bytes(config)[
        "adapter_model.safetensors"
    ]


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("crash_before_update", [1, 3, 4, 6])
def test_a_resumed_run_ends_with_the_same_bytes(make_config, monkeypatch, lora, crash_before_update):
    """Crashes before the first checkpoint, between two, right after one, and at the last step; mid-epoch included."""
    changes = {"lora": lora, "packing": {"share": "image", "max_tokens": 700}, "reference": {"cache_dir": None}}
    unbroken, broken = make_config("unbroken", **changes), make_config("broken", **changes)
    trainer.train(unbroken)
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "vapr")  # each starts from an empty cache

    train_until_crash(broken, crash_before_update, monkeypatch)
    trainer.train(broken, resume=True)
    assert final_bytes(broken) == final_bytes(unbroken)
    assert losses(broken) == losses(unbroken)
    assert [entry["step"] for entry in metrics(broken)] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_checkpoint_never_counts(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr(
        checkpoint, "write_json", lambda *a: (_ for _ in ()).throw(Crash) if "state" in str(a[0]) else None
    )
    with pytest.raises(Crash):
        trainer.train(config)
    assert checkpoint.list_checkpoints(Path(config.run_dir)) == []
    monkeypatch.undo()
    trainer.train(config, resume=True)
    assert len(losses(config)) == 6


def run_in_process(config: Config, tmp_path: Path, *arguments: str) -> subprocess.Popen:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.as_dict()))  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-m", "vapr.cli", "train", str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen, config: Config, num_steps: int) -> None:
    """Until that many steps are in metrics.jsonl (or the process has ended)."""
    path = Path(config.run_dir) / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < num_steps):
        os.sched_yield()


def test_kill_9_loses_only_what_is_not_checkpointed(make_config, tmp_path):
    optim = {"lr": 1e-3, "pairs_per_step": 8, "epochs": 10}
    unbroken, killed = make_config("unbroken", optim=optim), make_config("killed", optim=optim)
    trainer.train(unbroken)
    process = run_in_process(killed, tmp_path)
    wait_for_steps(process, killed, 5)
    process.kill()
    process.communicate()
    done = len(losses(killed))
    assert 5 <= done < 30 and not (Path(killed.run_dir) / "final").exists()
    trainer.train(killed, resume=True)
    assert final_bytes(killed) == final_bytes(unbroken)


def test_a_run_with_kernels_has_the_losses_of_one_without(make_config, photo_rows, device, monkeypatch, capsys):
    """Everything fused, the loss included, through Triton's interpreter where there is no GPU."""
    calls = []
    fused = training_step.preference_loss
    monkeypatch.setattr(training_step, "preference_loss", lambda *a, **k: calls.append(1) or fused(*a, **k))
    rows = [row for row in photo_rows if not row.get("images")][:4]
    optim = {"lr": 1e-3, "pairs_per_step": 2, "epochs": 1}
    off = make_config("off", rows=rows, optim=optim, kernels="off")
    trainer.train(off)
    assert not calls and "PyTorch's operations" in capsys.readouterr().out
    on = make_config("on", optim=optim)
    trainer.train(on)
    assert len(calls) >= 2 and "fused kernels" in capsys.readouterr().out
    assert losses(on) == pytest.approx(losses(off), rel=1e-5)


def test_sigterm_checkpoints_and_leaves(make_config, tmp_path):
    config = make_config(optim={"lr": 1e-3, "pairs_per_step": 8, "epochs": 30}, checkpoint={"every": 1000})
    process = run_in_process(config, tmp_path)
    wait_for_steps(process, config, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    [saved] = checkpoint.list_checkpoints(Path(config.run_dir))
    assert int(saved.name[5:]) == len(losses(config))
    assert f"SIGTERM: stopped after writing {saved}; continue with --resume" in output


@pytest.fixture
def held_out(photo_rows, photo_root, tmp_path) -> dict:
    """A data section with six held-out pairs."""
    write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
    return {
        "train": str(tmp_path / "pairs.jsonl"),
        "eval": str(tmp_path / "held_out.jsonl"),
        "image_root": str(photo_root),
    }


def test_ctrl_c_while_held_out_pairs_are_scored_ends_the_scoring(make_config, held_out, monkeypatch, capsys):
    config, unbroken = make_config("interrupted", data=held_out), make_config("unbroken", data=held_out)
    trainer.train(unbroken)
    capsys.readouterr()
    note = trainer.Display.note

    def interrupted(display, line):
        note(display, line)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Display, "note", interrupted)
    with pytest.raises(
        trainer.TrainingStopped, match=r"SIGINT: stopped after writing .*step-000002; continue"
    ) as stopped:
        trainer.train(dataclasses.replace(config, packing=dataclasses.replace(config.packing, max_tokens=300)))
    assert stopped.value.exit_code == 130
    assert capsys.readouterr().err.count("SIGINT: finishing this step, then a checkpoint follows; Ctrl-C again") == 1
    assert [entry["step"] for entry in metrics(config)] == [1, 2]
    monkeypatch.setattr(trainer.Display, "note", note)
    trainer.train(config, resume=True)
    assert [(entry["step"], "loss" in entry) for entry in metrics(config)] == [
        (e["step"], "loss" in e) for e in metrics(unbroken)
    ]


def test_ctrl_c_while_reference_values_are_computed_keeps_them(make_config, monkeypatch, capsys):
    config = make_config(lora=False)
    counts = prepare._counts

    def interrupted(*caches):
        os.kill(os.getpid(), signal.SIGINT)
        return counts(*caches)

    monkeypatch.setattr(prepare, "_counts", interrupted)
    with pytest.raises(Stopped, match="SIGINT: what was computed so far is kept; the same command goes on") as stopped:
        trainer.train(config)
    assert stopped.value.exit_code == 130
    monkeypatch.setattr(prepare, "_counts", counts)
    capsys.readouterr()
    trainer.train(config)
    computed = re.search(r"found in the cache, (\d+) computed", capsys.readouterr().out)
    assert int(computed[1]) == 48 - 16  # 24 pairs, of which a step of 8 was kept


def test_reference_cache_changes_nothing_and_is_reused(make_config, capsys):
    cold, warm = make_config("cold", lora=False), make_config("warm", lora=False)
    trainer.train(cold)
    assert "48 computed" in capsys.readouterr().out  # 24 pairs, two completions each
    trainer.train(warm)
    assert " 0 computed" in capsys.readouterr().out
    assert final_bytes(warm) == final_bytes(cold) and losses(warm) == losses(cold)


def test_a_changed_row_costs_one_row(make_config, photo_rows, capsys):
    trainer.train(make_config("before"))
    rows = [dict(row) for row in photo_rows[:24]]
    rows[3] = {**rows[3], "rejected": [{"role": "assistant", "content": "Something else entirely."}]}
    capsys.readouterr()
    trainer.train(make_config("after", rows=rows))
    assert " 1 computed" in capsys.readouterr().out  # the chosen completion of that row is still known


def test_a_changed_answer_in_bf16_is_within_the_measured_tolerance(make_config, tiny, photo_rows):
    """The rejected completion was scored when it shared its beginning with another chosen one: another pack layout."""
    policy = {"model": str(tiny("llava")), "dtype": "bfloat16", "lora": {"rank": 2}}
    for number, row in enumerate(photo_rows[:6]):
        row = {**row, "edits": [], "chosen": "Yes. It is a red one.", "rejected": "Yes. It is a blue one."}
        trainer.train(make_config(f"a{number}", rows=[row], policy=policy))
        trainer.train(make_config(f"b{number}", rows=[{**row, "chosen": "Surely red."}], policy=policy))


def test_weights_that_are_not_numbers_are_named_and_not_cached(make_config, tiny, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny("qwen2_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    policy = {"model": str(folder), "dtype": "float32", "lora": {"rank": 2}}
    with pytest.raises(UserError, match="log-probs of .*pairs.jsonl:.* are not finite; the weights in"):
        trainer.train(make_config(policy=policy))
    assert not list((tmp_path / "reference").glob("*/*.safetensors"))


def test_held_out_pairs_that_do_not_fit_cost_no_model(make_config, photo_rows, tmp_path, photo_root, capsys):
    write_pairs(tmp_path / "held_out.jsonl", [row for row in photo_rows if len(row.get("images", [])) == 2][:2])
    data = {
        "train": str(tmp_path / "pairs.jsonl"),
        "eval": str(tmp_path / "held_out.jsonl"),
        "image_root": str(photo_root),
        "too_long": "skip",
    }
    config = make_config(data=data, packing={"max_tokens": 75})
    assert trainer.train(config).is_dir()
    assert "data.eval: no pair could be used" in capsys.readouterr().out


def test_another_image_under_the_same_tokens_is_computed(make_config, photo_rows, capsys):
    """LLaVA gives every photograph the same number of tokens: only the pixels tell the rows apart."""
    trainer.train(make_config("before", family="llava"))
    rows = [dict(row) for row in photo_rows[:24]]
    number = next(n for n, row in enumerate(rows) if row.get("images") == ["astronaut.png"])
    rows[number]["images"] = ["coffee.png"]
    capsys.readouterr()
    trainer.train(make_config("after", family="llava", rows=rows))
    assert " 2 computed" in capsys.readouterr().out


def test_another_model_misses_everything(make_config, tiny, tmp_path, capsys):
    trainer.train(make_config("before"))
    folder = tmp_path / "other"
    shutil.copytree(tiny("qwen2_5_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.001
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    policy = {"model": str(folder), "dtype": "float32", "lora": {"rank": 4}}
    trainer.train(make_config("after", policy=policy))
    assert "48 computed" in capsys.readouterr().out


def test_a_reference_that_is_not_the_policys_is_refused(make_config, monkeypatch):
    config = make_config()
    real = trainer.Reference.logps
    monkeypatch.setattr(trainer.Reference, "logps", lambda self, batch: real(self, batch) - 0.01)
    with pytest.raises(UserError, match="the policy differs from its reference before the first update"):
        trainer.train(config)


def test_losses_without_a_reference_compute_none(make_config, capsys):
    trainer.train(make_config(loss={"kind": "simpo", "beta": 2.0}))
    assert "reference " not in capsys.readouterr().out


def test_held_out_pairs_are_scored(make_config, held_out, capsys):
    config = make_config(lora=False, data=held_out)
    trainer.train(config)
    scored = [entry for entry in metrics(config) if "loss" not in entry]
    assert [entry["step"] for entry in scored] == [2, 4, 6]
    said = [line for line in capsys.readouterr().err.splitlines() if " held out: " in line]
    best = min(scored, key=lambda entry: entry["eval/loss"])
    assert len(said) == 3
    for line, entry in zip(said, scored, strict=True):
        facts = f"loss {entry['eval/loss']:.4f} acc {entry['eval/rewards/accuracies']:.2f} margin {entry['eval/rewards/margins']:+.3f}; "
        assert line.startswith(f"step {entry['step']} held out: {facts}")
    assert said[-1].endswith("the lowest loss so far" if best is scored[-1] else f"at step {best['step']}")
    names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    assert all(set(entry) == {"step", *(f"eval/{name}" for name in names)} for entry in scored)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_loss_that_is_not_finite_stops_before_the_update(make_config, lora):
    config = make_config(
        lora=lora,
        optim={"lr": 1e30, "schedule": "constant", "warmup_ratio": 0, "pairs_per_step": 4, "clip": None},
        checkpoint={"every": 1},
    )
    with pytest.raises(
        trainer.TrainingStopped, match=r"step 2: .* not finite; stopped before the update.*pairs.jsonl:\d+"
    ) as stopped:
        trainer.train(config)
    assert stopped.value.exit_code == 1
    assert [folder.name for folder in checkpoint.list_checkpoints(Path(config.run_dir))] == ["step-000001"]
    listed = json.loads((Path(config.run_dir) / "not-finite-step-000002.json").read_text())
    assert len(listed["pairs"]) == 4


def test_token_weights_select_what_is_learned(make_config):
    """With unchanged tokens masked, chosen and rejected log-probs are those of the edit alone: much smaller."""
    whole, edit = make_config("whole"), make_config("edit", loss={"token_weights": {"changed": 1, "unchanged": 0}})
    trainer.train(whole)
    trainer.train(edit)
    assert metrics(edit)[0]["logps/chosen"] > 0.5 * metrics(whole)[0]["logps/chosen"]
    assert metrics(edit)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_pair_weights_scale_losses(make_config, photo_rows):
    rows = [{**row, "weight": 0.5} for row in photo_rows[:24]]
    config = make_config(rows=rows)
    trainer.train(config)
    assert losses(config)[0] == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_bf16_keeps_fp32_master_weights(make_config, tiny):
    """Updates of 1e-6 are far below bf16's resolution at 0.1; they must add up in the masters all the same."""
    policy = {"model": str(tiny("qwen2_5_vl")), "dtype": "bfloat16"}
    config = make_config(
        policy=policy,
        lora=False,
        optim={"lr": 1e-6, "schedule": "constant", "warmup_ratio": 0, "pairs_per_step": 8, "epochs": 2},
    )
    trainer.train(config)
    before = transformers.AutoModelForImageTextToText.from_pretrained(tiny("qwen2_5_vl")).state_dict()
    after = load_file(checkpoint.list_checkpoints(Path(config.run_dir))[-1] / "weights.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name].bfloat16().float()).abs()
    assert 1e-6 < moved.median() < 7e-6
    final = load_file(Path(config.run_dir) / "final" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in final.values())


def test_pairs_that_do_not_fit(make_config, photo_rows, tmp_path, photo_root):
    with pytest.raises(UserError, match=r"pairs.jsonl:\d+: row '.*' has \d+ tokens but packing.max_tokens is 60"):
        trainer.train(make_config("refused", packing={"max_tokens": 60}))
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "too_long": "skip"}
    config = make_config("skipped", packing={"max_tokens": 60}, data=data)
    trainer.train(config)
    skipped = json.loads((Path(config.run_dir) / "skipped.json").read_text())
    first_epoch = sum(entry["pairs"] for entry in metrics(config)[:3])
    assert skipped and first_epoch + len(skipped) == 24
    assert all("nothing is truncated" in reason for reason in skipped.values())


def test_a_step_whose_pairs_are_all_skipped_is_no_update(make_config, photo_rows, tmp_path, photo_root):
    """One pair a step: skipped ones leave no line, the others keep their step and learning rate."""
    optim = {"lr": 1e-3, "schedule": "linear", "warmup_ratio": 0, "pairs_per_step": 1}
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "too_long": "skip", "shuffle": False}
    config = make_config(packing={"max_tokens": 60}, data=data, optim=optim)
    trainer.train(config)
    skipped = json.loads((Path(config.run_dir) / "skipped.json").read_text())
    steps = [entry["step"] for entry in metrics(config)]
    assert 0 < len(skipped) < 24 and len(steps) == 24 - len(skipped)
    lines = {int(place.rsplit(":", 1)[1]) for place in skipped}
    assert set(steps) == set(range(1, 25)) - lines
    assert [entry["lr"] for entry in metrics(config)] == pytest.approx([1e-3 * (1 - (n - 1) / 24) for n in steps])
    with pytest.raises(UserError, match="every pair was skipped; the first: .*pairs.jsonl:1: "):
        trainer.train(make_config("none", packing={"max_tokens": 5}, data=data, optim=optim))


def test_pairs_without_any_image(make_config, photo_rows, family):
    rows = [row for row in photo_rows if not row.get("images")]
    for share in ("pair", "image"):
        config = make_config(share, family=family, rows=rows, packing={"share": share})
        trainer.train(config)
        assert losses(config)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_bad_rows_and_images_can_be_skipped(make_config, photo_rows, photo_root, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(
        photo_root, root, ignore=lambda d, names: [n for n in names if Path(n).suffix not in (".png", ".jpg")]
    )
    (root / "broken.png").write_bytes(b"not a picture")
    rows = [dict(row) for row in photo_rows[:24]]
    rows[2]["images"] = ["broken.png"] * len(rows[2].get("images", []))
    rows[5] = {key: value for key, value in rows[5].items() if key != "chosen"}
    assert rows[2]["images"]
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(root)}
    with pytest.raises(UserError, match=r"pairs.jsonl:6: 'chosen' is missing"):
        trainer.train(make_config("refused", rows=rows, data=data))
    config = make_config("skipped", data={**data, "on_bad_row": "skip"})
    trainer.train(config)
    skipped = json.loads((Path(config.run_dir) / "skipped.json").read_text())
    assert len(skipped) == 2
    assert any("broken.png' is not an image file" in reason for reason in skipped.values())


def test_a_bad_image_late_in_the_run_costs_no_step(make_config, photo_rows, photo_root, tmp_path):
    """The steps before it are checkpointed, and the run goes on once the row is mended, or is to be skipped."""
    root = tmp_path / "photos"
    root.mkdir()
    for row in photo_rows[:24]:
        for name in row.get("images", []):
            shutil.copy(photo_root / name, root / name)
    bad = next(n for n, row in enumerate(photo_rows[:24]) if n >= 16 and row.get("images"))
    rows = [dict(row) for row in photo_rows[:24]]
    rows[bad]["images"] = ["broken.png"] * len(rows[bad]["images"])
    (root / "broken.png").write_bytes(b"not a picture")
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(root), "shuffle": False}
    optim = {"pairs_per_step": 8, "epochs": 1}
    config = make_config(rows=rows, data=data, optim=optim, checkpoint={"every": 100})
    with pytest.raises(
        UserError, match=rf"pairs.jsonl:{bad + 1}: .*not an image file; the 2 steps before it are saved"
    ):
        trainer.train(config)
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_row="skip"))
    trainer.train(skipping, resume=True)
    assert [entry["step"] for entry in metrics(config)] == [1, 2, 3]
    assert [entry["pairs"] for entry in metrics(config)] == [8, 8, 7]


def at_step(monkeypatch, number: int, act) -> None:
    """Do something once, right after the update of a step."""
    real, taken = trainer.Engine.step, []

    def step(engine):
        real(engine)
        taken.append(1)
        if len(taken) == number:
            act()

    monkeypatch.setattr(trainer.Engine, "step", step)


def test_data_workers_are_forked_before_the_policy_is_loaded(make_config, monkeypatch):
    """Which may put it on a GPU, whose state no fork should copy."""
    real, running = checkpointing.load_policy, []

    def load(*arguments, **options):
        running.append(len(multiprocessing.active_children()))
        return real(*arguments, **options)

    monkeypatch.setattr(checkpointing, "load_policy", load)
    config = make_config()
    trainer.train(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2)))
    assert running == [2]


def test_a_worker_killed_during_a_run_costs_no_step(make_config, photo_root, tmp_path, monkeypatch):
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "workers": 2}
    optim = {"lr": 1e-3, "pairs_per_step": 2, "epochs": 2}
    monkeypatch.setattr(loader, "LOOKAHEAD", 4)
    whole = make_config("whole", data=data, optim=optim)
    trainer.train(whole)
    real = loader.start_workers
    opened = []
    monkeypatch.setattr(loader, "start_workers", lambda *args: opened.append(real(*args)) or opened[-1])
    at_step(monkeypatch, 3, lambda: os.kill(opened[0].process_ids[0], signal.SIGKILL))
    killed = make_config("killed", data=data, optim=optim)
    told = r"a data worker was killed; .*; the \d+ steps before it are saved, continue with --resume"
    with pytest.raises(UserError, match=told):
        trainer.train(killed)
    monkeypatch.undo()
    trainer.train(killed, resume=True)
    assert final_bytes(killed) == final_bytes(whole) and losses(killed) == losses(whole)


def test_an_image_deleted_during_a_run_stops_it_by_name_and_costs_no_step(
    make_config, photo_rows, photo_root, tmp_path, monkeypatch
):
    root = tmp_path / "photos"
    root.mkdir()
    for name in {name for row in photo_rows[:24] for name in row.get("images", [])}:
        shutil.copy(photo_root / name, root / name)
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(root), "shuffle": False, "workers": 0}
    optim = {"lr": 1e-3, "pairs_per_step": 2, "max_steps": 12}
    whole = make_config("whole", data=data, optim=optim)
    trainer.train(whole)
    last = photo_rows[23]["images"][0]
    monkeypatch.setattr(loader, "LOOKAHEAD", 2)
    at_step(monkeypatch, 2, (root / last).unlink)
    gone = make_config("gone", data=data, optim=optim)
    with pytest.raises(
        UserError, match=rf"image '.*{last}.* the \d+ steps before it are saved, continue with --resume"
    ):
        trainer.train(gone)
    assert "Stopped: " in (Path(gone.run_dir) / "report.html").read_text()
    monkeypatch.undo()
    shutil.copy(photo_root / last, root / last)
    trainer.train(gone, resume=True)
    assert final_bytes(gone) == final_bytes(whole)


def test_the_report_shows_the_pairs_of_the_last_epoch(make_config):
    config = make_config()
    trainer.train(config)
    page = (Path(config.run_dir) / "report.html").read_text()
    assert page.count('class="box pair"') == 16 and page.count("data:image/jpeg;base64,") >= 16
    assert "Largest margins" in page and "Nothing was skipped." in page
    steps = {int(n) for n in re.findall(r"at step (\d+)", page)}
    assert steps <= {4, 5, 6}  # three steps an epoch


def test_packs_of_text_rows_only_do_not_disturb_a_projector(make_config, photo_rows, tiny):
    """Nothing trained is reached from such a pack: no gradient, no error."""
    with_image = [row for row in photo_rows if len(row.get("images", [])) == 1][:4]
    text = [row for row in photo_rows if not row.get("images")][:4]
    policy = {"model": str(tiny("llava")), "dtype": "float32", "train": {"language_model": False, "projector": True}}
    packing = {"max_tokens": 150}
    trainer.train(make_config(rows=with_image + text, policy=policy, packing=packing))


def test_masks_without_any_changed_token(make_config, photo_rows):
    """A rejected answer that only adds words changes no token of the chosen one."""
    rows = [
        {**row, "id": str(n), "edits": [], "chosen": "A red cat.", "rejected": "A big red cat."}
        for n, row in enumerate(photo_rows[:8])
    ]
    weights = {"changed": 1, "unchanged": 0}
    for kind in ("sft", "simpo", "ipo"):
        config = make_config(kind, rows=rows, loss={"kind": kind, "token_weights": weights})
        trainer.train(config)
        assert all(math.isfinite(loss) for loss in losses(config))


def test_max_steps_overrides_epochs(make_config):
    config = make_config(optim={"pairs_per_step": 8, "max_steps": 5})
    trainer.train(config)
    assert [entry["pairs"] for entry in metrics(config)] == [8] * 5  # 24 pairs: the second epoch is begun


def test_changed_pairs_are_not_resumed(make_config, photo_rows):
    config = make_config(checkpoint={"every": 2})
    trainer.train(config)
    shutil.rmtree(Path(config.run_dir) / "final")
    with pytest.raises(UserError, match="the pairs changed since"):
        trainer.train(make_config(rows=photo_rows[:23]), resume=True)


def test_an_evaluation_lost_between_checkpoint_and_line_is_made_up(make_config, photo_rows, photo_root, tmp_path):
    write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
    data = {
        "train": str(tmp_path / "pairs.jsonl"),
        "eval": str(tmp_path / "held_out.jsonl"),
        "image_root": str(photo_root),
    }
    config = make_config(data=data)
    trainer.train(config)
    path = Path(config.run_dir) / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    assert "eval/loss" in whole[-1]
    path.write_text("".join(whole[:-1]))
    shutil.rmtree(Path(config.run_dir) / "final")
    trainer.train(config, resume=True)
    assert path.read_text().splitlines(keepends=True) == whole


def test_run_dir_rules(make_config, capsys, tmp_path):
    config = make_config()
    Path(config.run_dir).mkdir()
    trainer.train(config, resume=True)
    assert "no checkpoint yet; starting from the beginning" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run; continue it with --resume"):
        trainer.train(config)
    before = final_bytes(config)
    trainer.train(config, resume=True)
    assert "this run is finished" in capsys.readouterr().out and final_bytes(config) == before
    shutil.rmtree(Path(config.run_dir) / "final")
    changed = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match=r"was started with seed: 0 \(now 1\)"):
        trainer.train(changed, resume=True)
    newest = checkpoint.list_checkpoints(Path(config.run_dir))[-1]
    (newest / "weights.safetensors").write_bytes(b"half")
    trainer.train(config, resume=True)  # tests/training/test_faults.py has what becomes of damage
    assert "weights.safetensors is cut short or was changed; set aside" in capsys.readouterr().out
    assert final_bytes(config) == before


def test_keep_leaves_the_newest_checkpoints(make_config):
    config = make_config(checkpoint={"every": 1, "keep": 2})
    trainer.train(config)
    names = [folder.name for folder in checkpoint.list_checkpoints(Path(config.run_dir))]
    assert names == ["step-000005", "step-000006"]


def test_packing_changes_no_result(make_config):
    """Sharing, pack size and order inside a step move the losses by rounding only."""
    runs = {}
    for name, packing in {
        "shared": {"share": "image"}, "pair": {"share": "pair"}, "none": {"share": "none"}, "small": {"max_tokens": 400},
    }.items():  # fmt: skip
        # share: image also changes the shuffled order, so the file's order is taken
        base = make_config(name, packing=packing)
        config = dataclasses.replace(base, data=dataclasses.replace(base.data, shuffle=False))
        trainer.train(config)
        runs[name] = losses(config)
    for other in ("pair", "none", "small"):
        assert runs[other] == pytest.approx(runs["shared"], abs=1e-5)
