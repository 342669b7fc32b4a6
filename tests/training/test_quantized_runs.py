"""Runs on a quantised base from start to export."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import oracles
from tests.runs import final_bytes, losses, metrics, train_until_crash
from tests.training.test_export import held_out_logps
from vapr.batches.loader import open_processor
from vapr.batches.packing import pack
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.model import policy as policy_module
from vapr.model.policy import load_policy
from vapr.model.quantized import QuantizedLinear, dequantize
from vapr.study.find_model import find
from vapr.training import trainer
from vapr.training.export import export

FAMILY = "qwen2_5_vl"


@pytest.fixture
def run_config(make_config, photo_rows, photo_root, tmp_path):
    def make(name: str = "run", kind: str = "nf4", model: Path | None = None, dtype="float32", **changes) -> Config:
        write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
        data = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
        config = make_config(name)
        policy = {
            "model": str(model or config.policy.model), "dtype": dtype, "base_weights": kind,
            "lora": {"rank": 4, "alpha": 8},
        }  # fmt: skip
        optim = {"lr": 3e-3, "pairs_per_step": 8, "epochs": 1}
        data |= {"image_root": str(photo_root), "workers": 0}
        return make_config(name, policy=policy, data=data, optim=optim, **changes)

    return make


def dequantised_oracle(config: Config, adapter: Path) -> nn.Module:
    """transformers' model with the dequantised weights in it, and the run's adapter by peft."""
    policy = load_policy(config.policy, torch.device("cpu"))
    model = oracles.load_model(Path(config.policy.model), FAMILY)
    for name, layer in policy.base.named_modules():
        if isinstance(layer, QuantizedLinear):
            model.get_submodule(name.removesuffix(".base_layer")).weight.data.copy_(layer.weight)
    return peft.PeftModel.from_pretrained(model, str(adapter))


def said_of(out: str, name: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(name)]


def test_from_the_first_step_to_the_export(run_config, tmp_path, capsys, monkeypatch):
    config = run_config()
    trainer.train(config)
    out = "".join(capsys.readouterr())
    [line] = said_of(out, "frozen")
    assert " linear layers as nf4, " in line and "; 1 LM head" in line
    assert "largest |log-ratio| to the reference 0.00e+00" in out
    run = Path(config.run_dir)
    assert "nf4" in json.loads((run / "environment.json").read_text())["quantized"]
    evaluated = [entry for entry in metrics(config) if "eval/loss" in entry][-1]
    expected = torch.tensor([evaluated["eval/logps/chosen"], evaluated["eval/logps/rejected"]])

    # A study asks a checkpoint its questions on the base that it was trained on.
    found = find(str(run / "checkpoints" / "step-000003"))
    assert found.identity["base_weights"] == "nf4"
    torch.testing.assert_close(held_out_logps(found.load(torch.float32), config), expected, rtol=1e-5, atol=1e-3)

    # final/ is an ordinary adapter; on the dequantised base it is what was trained.
    assert "stored as nf4" in (run / "final" / "README.md").read_text()
    trained = held_out_logps(dequantised_oracle(config, run / "final"), config)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-3)
    plain = oracles.load_model(Path(config.policy.model), FAMILY)
    original = held_out_logps(peft.PeftModel.from_pretrained(plain, str(run / "final")), config)
    moved = float((original - trained).abs().mean())
    assert moved > 0.05  # so the two exports can be told apart

    for into, truth in (("trained", trained), ("original", original)):
        export(run, tmp_path / into, into=into)
        out = capsys.readouterr().out
        merged = oracles.load_model(tmp_path / into, FAMILY)
        torch.testing.assert_close(held_out_logps(merged, config), truth, rtol=1e-5, atol=1e-3)
        [said] = said_of(out, "log-probs of 6 held-out pairs")
        largest, mean = (
            float(said.split(f"{word} ")[1].split(",")[0].split(" ")[0]) for word in ("difference", "mean")
        )
        before, after = (completions(model, config) for model in (dequantised_oracle(config, run / "final"), merged))
        assert mean == pytest.approx(float((after - before).abs().mean()), rel=0.06, abs=2e-4)
        assert largest == pytest.approx(float((after - before).abs().max()), rel=0.06, abs=5e-4)
        assert ("unquantised weights, which are not what was trained on" in out) == (into == "original")
        card = (tmp_path / into / "README.md").read_text()
        assert ("merged into the unquantised weights" in card) == (into == "original")
        assert "| base stored as | nf4 |" in card
    base = load_file(Path(config.policy.model) / "model.safetensors")
    for name in base:  # nothing but what an adapter changes moves when the weights are the original ones
        if "embed" in name or "norm" in name or "lm_head" in name:
            assert torch.equal(load_file(tmp_path / "trained" / "model.safetensors")[name], base[name]), name

    export(run, tmp_path / "adapter", adapter=True)
    adapted = peft.PeftModel.from_pretrained(
        oracles.load_model(Path(config.policy.model), FAMILY), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(held_out_logps(adapted, config), original, rtol=1e-5, atol=1e-3)
    assert "was trained on a base stored as nf4" in (tmp_path / "adapter" / "README.md").read_text()


def completions(model: nn.Module, config: Config) -> torch.Tensor:
    pairs = read_pairs(config.data.eval, image_root=Path(config.data.image_root))
    batch = pack([open_processor(config).tokenize_pair(pair) for pair in pairs])
    with torch.no_grad():
        return oracles.pair_logps(model, FAMILY, batch)


def test_an_export_in_bfloat16_of_a_run_in_bfloat16(run_config, tmp_path, capsys):
    config = run_config(kind="fp8", dtype="bfloat16")
    trainer.train(config)
    export(Path(config.run_dir), tmp_path / "merged")
    exported = oracles.load_model(tmp_path / "merged", FAMILY, "auto").state_dict()
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    policy = load_policy(config.policy, torch.device("cpu"))
    dequantize(policy.base)
    weights = policy.base.state_dict()
    untouched = [name for name in exported if ".visual." in name and ".mlp." in name and name.endswith("weight")]
    original = oracles.load_model(Path(config.policy.model), FAMILY, torch.bfloat16).state_dict()
    assert untouched
    for name in untouched:  # the tower has no adapter: what was run is what is written
        assert torch.equal(exported[name], weights[name]) and not torch.equal(exported[name], original[name]), name


def test_a_run_broken_off_goes_on_to_the_same_bytes(run_config, monkeypatch):
    unbroken = run_config("unbroken")
    trainer.train(unbroken)
    config = run_config("broken")
    train_until_crash(config, 3, monkeypatch)
    trainer.train(config, resume=True)
    assert losses(config) == losses(unbroken) and final_bytes(config) == final_bytes(unbroken)
    train_until_crash(run_config("third"), 3, monkeypatch)
    with pytest.raises(UserError, match=r"was started with policy.base_weights: nf4 \(now int8\)"):
        trainer.train(run_config("third", "int8"), resume=True)


def test_started_from_an_adapter_the_kept_policy_is_unquantised(run_config, tmp_path, tiny):
    """The merged policy that the new adapter's base is holds full weights, as a run without quantisation keeps them."""
    sft = run_config("sft", "bfloat16")
    trainer.train(sft)
    kept = {}
    for kind in ("bfloat16", "int8"):
        config = run_config(kind, kind, model=Path(sft.run_dir) / "final")
        trainer.train(config)
        run = Path(config.run_dir)
        kept[kind] = load_file(run / "policy" / "model.safetensors")
        named = json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str((run / "policy").resolve())
    assert kept["int8"].keys() == kept["bfloat16"].keys()
    assert all(torch.equal(kept["int8"][name], kept["bfloat16"][name]) for name in kept["int8"])
    export(Path(config.run_dir), tmp_path / "merged")
    evaluated = [entry for entry in metrics(config) if "eval/loss" in entry][-1]
    expected = torch.tensor([evaluated["eval/logps/chosen"], evaluated["eval/logps/rejected"]])
    merged = held_out_logps(oracles.load_model(tmp_path / "merged", FAMILY), config)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bfloat16", {"into": "original"}, "--into original: the base was not quantised, so there is no other one"),
        ("int8", {"into": "original", "adapter": True}, "--into original: an adapter is not merged; leave it out"),
    ],
)
def test_a_merge_that_is_none_is_refused(run_config, tmp_path, kind, options, message):
    config = run_config(kind=kind)
    trainer.train(config)
    with pytest.raises(UserError, match=message):
        export(Path(config.run_dir), tmp_path / "out", **options)


def test_full_fine_tuning_is_refused(make_config, tiny):
    with pytest.raises(UserError, match="policy.base_weights: nf4 is for a frozen base under LoRA; give policy.lora"):
        make_config(policy={"model": str(tiny(FAMILY)), "base_weights": "nf4"})


def test_without_bitsandbytes_a_run_ends_in_one_line_before_weights_are_read(run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(policy_module, "load_weights", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="policy.base_weights: nf4 needs bitsandbytes, .* or take int8 or fp8"):
        trainer.train(run_config())
