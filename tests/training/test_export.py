"""What ``vapr export`` writes: any checkpoint of a run, whole or as an adapter, with a card whose lines load it."""

import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests import oracles
from tests.runs import metrics
from tests.training.test_trainer import run_in_process, wait_for_steps
from vapr.batches.loader import open_processor
from vapr.batches.packing import pack
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.training import checkpoint, trainer
from vapr.training.export import export

FAMILY = "qwen2_5_vl"


@pytest.fixture
def run_config(make_config, photo_rows, photo_root, tmp_path):
    def make(name: str = "run", **changes) -> Config:
        write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
        data = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
        return make_config(name, data={**data, "image_root": str(photo_root), "workers": 0}, **changes)

    return make


def held_out_logps(model: torch.nn.Module, config: Config) -> torch.Tensor:
    """Mean log-probs of the held-out pairs' chosen and rejected completions, by the model's own forward, (2,)."""
    pairs = read_pairs(config.data.eval, image_root=Path(config.data.image_root))
    batch = pack([open_processor(config).tokenize_pair(pair) for pair in pairs])
    with torch.no_grad():
        return oracles.pair_logps(model, FAMILY, batch).mean(0)


def evaluated(config: Config, step: int) -> torch.Tensor:
    """The same as the run logged it at a step, (2,)."""
    [entry] = [entry for entry in metrics(config) if "eval/loss" in entry and entry["step"] == step]
    return torch.tensor([entry["eval/logps/chosen"], entry["eval/logps/rejected"]])


def assert_same_logps(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


def stop_before(monkeypatch, update: int) -> None:
    real = trainer.Engine.step

    def step(engine):
        if engine.num_updates + 1 == update:
            raise RuntimeError("stopped")
        real(engine)

    monkeypatch.setattr(trainer.Engine, "step", step)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_an_interrupted_run_and_each_of_its_checkpoints(run_config, tmp_path, monkeypatch, capsys, lora):
    config = run_config(lora=lora)
    stop_before(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train(config)
    run = Path(config.run_dir)
    capsys.readouterr()
    export(run, tmp_path / "newest")
    assert f"{run} is not finished; this is its newest checkpoint, step 4 of 6" in capsys.readouterr().out
    assert_same_logps(held_out_logps(oracles.load_model(tmp_path / "newest", FAMILY), config), evaluated(config, 4))
    for source, options in ((run / "checkpoints" / "step-000002", {}), (run, {"which": "step-000002"})):
        out = tmp_path / f"out{len(options)}"
        export(source, out, **options)
        assert_same_logps(held_out_logps(oracles.load_model(out, FAMILY), config), evaluated(config, 2))
    if lora:
        export(run / "checkpoints" / "step-000002", tmp_path / "adapter", adapter=True)
        base = oracles.load_model(Path(config.policy.model), FAMILY)
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        assert_same_logps(held_out_logps(adapted, config), evaluated(config, 2))
    with pytest.raises(UserError, match="holds no such checkpoint; there are: step-000002, step-000004"):
        export(run, tmp_path / "none", which="step-000003")


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_finished_run_without_checkpoints(run_config, tmp_path, lora):
    config = run_config(lora=lora)
    trainer.train(config)
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    export(Path(config.run_dir), tmp_path / "out")
    assert_same_logps(held_out_logps(oracles.load_model(tmp_path / "out", FAMILY), config), evaluated(config, 6))


def test_a_checkpoint_before_the_end_is_not_taken_for_the_end(run_config, tmp_path):
    config = run_config()
    trainer.train(config)
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "step-000006")
    export(Path(config.run_dir), tmp_path / "out")
    assert_same_logps(held_out_logps(oracles.load_model(tmp_path / "out", FAMILY), config), evaluated(config, 6))


def test_float32_keeps_what_bfloat16_rounds_away(run_config, tiny, tmp_path, capsys):
    """A small adapter on a bf16 base: merged in bf16 most weights stay what they were, in fp32 nothing is lost."""
    policy = {"model": str(tiny(FAMILY)), "dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}}
    config = run_config(policy=policy, optim={"lr": 3e-4, "pairs_per_step": 8, "epochs": 2})
    trainer.train(config)
    run = Path(config.run_dir)
    masters = load_file(run / "checkpoints" / "step-000006" / "weights.safetensors")
    base = oracles.load_model(tiny(FAMILY), FAMILY, torch.bfloat16).state_dict()
    capsys.readouterr()
    errors = {}
    for dtype in ("bfloat16", "float32"):
        export(run, tmp_path / dtype, dtype=dtype)
        said = capsys.readouterr().out
        merged = oracles.load_model(tmp_path / dtype, FAMILY, "auto").state_dict()
        assert {weight.dtype for weight in merged.values()} == {getattr(torch, dtype)}
        error = size = 0.0
        same = total = 0
        for name in (name for name in masters if "lora_A" in name):
            target = name.replace(".lora_A.default", "")
            delta = masters[name.replace("lora_A", "lora_B")].double() @ masters[name].double() * 2
            error += float((merged[target].double() - base[target].double() - delta).square().sum())
            size += float(delta.square().sum())
            same += int((merged[target] == base[target].to(merged[target].dtype)).sum())
            total += delta.numel()
        errors[dtype] = (error / size) ** 0.5
        assert f"rounded once to {dtype}" in said and f"{same / total:.1%} of the weights unchanged" in said
        assert "log-probs of 6 held-out pairs, merged against adapter on base: largest difference " in said
        if dtype == "bfloat16":
            assert f"relative error of the merged delta {errors[dtype]:.1e}" in said and same / total > 0.5
    assert errors["bfloat16"] > 0.1 and errors["float32"] < 1e-3


def test_an_export_without_its_data_says_so(run_config, tmp_path, capsys):
    config = run_config()
    trainer.train(config)
    (tmp_path / "held_out.jsonl").unlink()
    export(Path(config.run_dir), tmp_path / "out")
    assert "log-probs of the merged model are not compared: " in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def figures_at(monkeypatch, figures: dict[int, float], metric: str = "eval/loss") -> None:
    """Held-out figures by step, in place of the measured ones."""
    real, steps = trainer.MetricsLog.write, trainer.MetricsLog

    def write(log, step, values):
        real(log, step, values | {metric: figures[step]} if "eval/loss" in values else values)

    monkeypatch.setattr(steps, "write", write)


@pytest.mark.parametrize(
    ("metric", "best"), [("eval/loss", 4), ("eval/rewards/accuracies", 2), ("eval/logps/chosen", 2)]
)
def test_the_best_checkpoint_is_kept_and_exported_by_name(run_config, tmp_path, monkeypatch, capsys, metric, best):
    """Of equal figures the first counts; one that is no number never does."""
    figures_at(monkeypatch, {1: float("nan"), 2: 0.9, 3: 0.7, 4: 0.2, 5: 0.2, 6: 0.6}, metric)
    config = run_config(checkpoint={"every": 1, "keep": 1, "best": True, "best_metric": metric})
    trainer.train(config)
    run = Path(config.run_dir)
    assert [folder.name for folder in checkpoint.list_checkpoints(run)] == [f"step-00000{best}", "step-000006"]
    assert f"best       step-00000{best}, {metric} " in capsys.readouterr().out
    export(run, tmp_path / "out", which="best")
    assert f"best of 2 kept checkpoints: step-00000{best}, {metric} " in capsys.readouterr().out
    if metric == "eval/loss":
        got = held_out_logps(oracles.load_model(tmp_path / "out", FAMILY), config)
        assert_same_logps(got, evaluated(config, best))


def test_the_best_checkpoint_survives_kill_9(run_config, tmp_path):
    optim = {"lr": 3e-2, "pairs_per_step": 8, "epochs": 4}  # too large a rate: the held-out loss turns early
    keep = {"every": 2, "keep": 1, "best": True}
    unbroken, killed = (run_config(name, optim=optim, checkpoint=keep) for name in ("unbroken", "killed"))
    trainer.train(unbroken)
    expected = [folder.name for folder in checkpoint.list_checkpoints(Path(unbroken.run_dir))]
    losses = {entry["step"]: entry["eval/loss"] for entry in metrics(unbroken) if "eval/loss" in entry}
    best = min(losses, key=losses.get)
    assert expected == [f"step-{best:06d}", "step-000012"] and best < 6
    process = run_in_process(killed, tmp_path)
    wait_for_steps(process, killed, 10)  # with the evaluations, after step 7
    process.kill()
    process.communicate()
    assert not (Path(killed.run_dir) / "final").exists()
    trainer.train(killed, resume=True)
    assert [folder.name for folder in checkpoint.list_checkpoints(Path(killed.run_dir))] == expected


def test_mistakes_about_the_best(make_config, run_config, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint.best: .* data.eval names none"):
        make_config(checkpoint={"best": True})
    with pytest.raises(UserError, match="checkpoint.best_metric: should be 'eval/loss', 'eval/rewards/accuracies'"):
        run_config(checkpoint={"best": True, "best_metric": "eval_loss"})
    config = make_config()
    trainer.train(config)
    with pytest.raises(UserError, match="no checkpoint in it has a held-out figure eval/loss; see data.eval"):
        export(Path(config.run_dir), tmp_path / "out", which="best")


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_written_files_have_ordinary_permissions(run_config, tmp_path, lora):
    before = os.umask(0o027)
    try:
        config = run_config(lora=lora)
        trainer.train(config)
        export(Path(config.run_dir), tmp_path / "merged")
        if lora:
            export(Path(config.run_dir), tmp_path / "adapter", adapter=True)
    finally:
        os.umask(before)
    folders = (Path(config.run_dir), tmp_path / "merged", tmp_path / "adapter", tmp_path / "reference")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert sum(file.suffix == ".safetensors" for file in files) >= 6
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
    assert oct((Path(config.policy.model) / "model.safetensors").stat().st_mode & 0o777) == "0o644"


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_the_lines_of_the_card_load_the_model(make_config, photo_rows, photo_root, tmp_path, monkeypatch, adapter):
    """LLaVA, whose processor needs no torchvision."""
    write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
    data = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    config = make_config(family="llava", data={**data, "image_root": str(photo_root)})
    final = trainer.train(config)
    out = tmp_path / "out"
    export(Path(config.run_dir), out, adapter=adapter)
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and str(Path(config.policy.model).parent) not in card
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == ("peft" if adapter else "transformers")
    assert "| data | pairs.jsonl |" in text and "DPO loss, beta 0.1" in text and "| steps | 6 of 8 pairs each |" in text
    [entry] = [entry for entry in metrics(config) if "eval/loss" in entry and entry["step"] == 6]
    assert f"| rewards/accuracies | {entry['eval/rewards/accuracies']:.4g} |" in text
    assert ("vllm serve BASE --enable-lora --max-lora-rank 4 " if adapter else "vllm serve .") in text
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(out)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    base = transformers.AutoModelForImageTextToText.from_pretrained(config.policy.model, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, str(final))
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(
        names["model"](input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert names["processor"].tokenizer.chat_template or names["processor"].chat_template


def test_what_cannot_be_exported(run_config, tmp_path):
    config = run_config(lora=False)
    trainer.train(config)
    run = Path(config.run_dir)
    for arguments, options, message in (
        ((tmp_path, tmp_path / "out"), {}, "no run .no config.yaml in "),
        ((run, run), {}, "already exists"),
        ((run, tmp_path / "out"), {"adapter": True}, "trained without LoRA"),
        ((run / "checkpoints" / "step-000009", tmp_path / "out"), {}, "no whole checkpoint"),
        ((run / "checkpoints" / "step-000006", tmp_path / "out"), {"which": "best"}, "is a checkpoint already"),
    ):
        with pytest.raises(UserError, match=message):
            export(*arguments, **options)
    (run / "checkpoints" / "step-000006" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"step-000006: weights.safetensors is cut short or was changed"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resuming_what_is_not_there_names_the_runs_nearby(make_config, tmp_path):
    for name in ("first", "zebra"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as error:
        trainer.train(make_config("frist"), resume=True)
    assert str(error.value) == (
        f"run_dir: {tmp_path}/frist does not exist, so there is nothing to resume; runs beside it: "
        f"{tmp_path}/first, {tmp_path}/zebra"
    )
    assert not (tmp_path / "frist").exists()
    with pytest.raises(UserError, match="there is no run in .* either; start it without --resume"):
        trainer.train(make_config("alone/run"), resume=True)
