"""A policy that is given as a PEFT adapter: merged before training, and what is trained on it is what comes out."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import oracles
from tests.runs import final_bytes, metrics
from vapr.audit.image_ablation import Scorer
from vapr.batches import survey
from vapr.batches.loader import open_processor
from vapr.batches.model_folder import find_model
from vapr.batches.packing import pack
from vapr.config import Config, PolicyConfig
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.model.adapters import merge_layers
from vapr.model.policy import load_policy
from vapr.training import trainer
from vapr.training.checkpoint import save_start
from vapr.training.export import export
from vapr.training.fill_caches import prepare

FAMILY = "qwen2_5_vl"
CPU = torch.device("cpu")


def write_adapter(base: Path, folder: Path, *, scale: float = 0.2, **settings) -> Path:
    """A LoRA adapter as PEFT saves it, with weights that change every log-prob."""
    torch.manual_seed(5)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft(tiny, tmp_path_factory) -> Path:
    """An SFT adapter that names its base."""
    return write_adapter(tiny(FAMILY), tmp_path_factory.mktemp("adapters") / "sft")


@pytest.fixture(scope="module")
def both(sft, tiny, tmp_path_factory) -> Path:
    """Base weights and adapter in one folder, as trainers leave them."""
    folder = tmp_path_factory.mktemp("adapters") / "both"
    shutil.copytree(tiny(FAMILY), folder)
    shutil.copytree(sft, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def merged_logps(sft, tiny):
    """Log-probs of pairs by PEFT's own adapter on its base, never merged."""

    def score(config: Config) -> torch.Tensor:
        base = oracles.load_model(tiny(FAMILY), FAMILY)
        return held_out_logps(peft.PeftModel.from_pretrained(base, str(sft)), config)

    return score


def held_out_logps(model: torch.nn.Module, config: Config) -> torch.Tensor:
    """Mean log-probs of the held-out pairs' chosen and rejected completions, by the model's own forward, (2,)."""
    rows = [open_processor(config).tokenize_pair(pair) for pair in held_out_pairs(config)]
    with torch.no_grad():
        return oracles.pair_logps(model, FAMILY, pack(rows)).mean(0)


def held_out_pairs(config: Config) -> list:
    from vapr.data.sources import read_pairs

    return list(read_pairs(config.data.eval, image_root=Path(config.data.image_root)))


@pytest.fixture
def run_config(make_config, photo_rows, photo_root, tmp_path):
    def make(model: Path, lora: bool, name: str = "run", base: Path | None = None, **changes) -> Config:
        write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
        policy = {"model": str(model), "dtype": "float32", **({"base": str(base)} if base else {})}
        if lora:
            policy["lora"] = {"rank": 4, "alpha": 8}
        data = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
        return make_config(name, policy=policy, data={**data, "image_root": str(photo_root), "workers": 0}, **changes)

    return make


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("given", ["adapter", "both", "named base"])
def test_what_is_trained_on_an_adapter_is_what_is_exported(
    run_config, sft, both, tiny, merged_logps, tmp_path, capsys, lora, given
):
    if given == "named base":  # the name in the adapter is of another machine
        shutil.copytree(sft, tmp_path / "moved")
        settings = json.loads((sft / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/data/base"}
        (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(settings))
    model = {"adapter": sft, "both": both, "named base": tmp_path / "moved"}[given]
    config = run_config(model, lora, base=tiny(FAMILY) if given == "named base" else None)
    untrained = merged_logps(config)

    counts = prepare(config)["reference"]
    assert counts["computed"] == 60 and "merged" in capsys.readouterr().out
    final = trainer.train(config)
    printed = capsys.readouterr().out
    assert printed.count("\nmerged ") == 1 and " 0 computed" in printed
    *_, last = [entry for entry in metrics(config) if "eval/loss" in entry]
    assert metrics(config)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics(config)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    trained = torch.tensor([last["eval/logps/chosen"], last["eval/logps/rejected"]])
    rewards = torch.tensor([last["eval/rewards/chosen"], last["eval/rewards/rejected"]])
    # the reference is the merged policy: reward = beta x (trained - reference)
    torch.testing.assert_close(trained - rewards / 0.1, untrained, rtol=1e-4, atol=1e-3)
    assert (trained - untrained).abs().max() > 0.05

    export(Path(config.run_dir), tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    exported = oracles.load_model(tmp_path / "out", FAMILY)
    torch.testing.assert_close(held_out_logps(exported, config), trained, rtol=1e-5, atol=1e-3)
    if lora:
        named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named) == (Path(config.run_dir) / "policy").resolve()
        alone = peft.PeftModel.from_pretrained(oracles.load_model(Path(named), FAMILY), str(final))
    else:
        assert not list(final.glob("adapter*")) and not (Path(config.run_dir) / "policy").exists()
        alone = oracles.load_model(final, FAMILY)
    torch.testing.assert_close(held_out_logps(alone, config), trained, rtol=1e-5, atol=1e-3)


KINDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "vision tower": {"target_modules": "all-linear"},
    "modules saved whole": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [1, 5, 7]}},
    "bias": {"bias": "all"},
    "bias of the adapter": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory) -> Path:
    """A model whose head is its input embeddings, as in small Qwen2-VL."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny(FAMILY), folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True], ids=["untied", "tied"])
def test_every_kind_of_lora_is_merged_as_peft_applies_it(tiny, tied, tmp_path, kind, ties):
    base = tied if ties else tiny(FAMILY)
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        model = oracles.load_model(base, FAMILY)
        plain = model(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(model, str(adapter))(input_ids=ids).logits
        assert (expected - plain).abs().max() > 0.1
        policy = load_policy(PolicyConfig(model=str(adapter), dtype="float32"), CPU)
        save_start(policy, policy.base.state_dict(), tmp_path / "merged")
        merged = oracles.load_model(tmp_path / "merged", FAMILY)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_added_in_fp32_and_rounded_once(tiny, tmp_path):
    """Each merged weight is the bf16 value nearest to base + delta in fp64; of a small delta most of it vanishes."""
    adapter = write_adapter(tiny(FAMILY), tmp_path / "adapter", scale=1e-3)
    policy = load_policy(PolicyConfig(model=str(adapter), dtype="bfloat16"), CPU)
    weights = oracles.load_model(tiny(FAMILY), FAMILY).state_dict()
    lora = load_file(adapter / "adapter_model.safetensors")
    merged = dict(policy.base.named_parameters())
    error = size = 0.0
    same = total = 0
    for name in (name for name in lora if "lora_A" in name):
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        before = weights[target]
        delta = lora[name.replace("lora_A", "lora_B")].double() @ lora[name].double() * 2
        exact = before.double() + delta
        got = merged[target].double()
        assert ((got - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() * 1.001).all()
        error += float((got - exact).square().sum())
        size += float(delta.square().sum())
        same += int((merged[target] == before.bfloat16()).sum())
        total += before.numel()
    assert same / total > 0.5
    said = (
        f"relative error of the merged delta {(error / size) ** 0.5:.1e}, {same / total:.1%} of the weights unchanged"
    )
    assert said in str(policy.merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base, is not here; give it as policy.base"),
        ({"base_model_name_or_path": None}, "is an adapter that names no base; give it as policy.base"),
        ({"base_model_name_or_path": "nobody/none"}, "nobody/none is no folder here, and the hub does not give it"),
        ({"peft_type": "IA3"}, "is of PEFT's type IA3; vapr merges LORA alone"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4', which changes the base"),
        ({"target_modules": ["q_proj"]}, "does not fit its base: 12 weights without a place"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "does not fit its base: 6 weights without a place"),
        ({"r": 8}, "cannot be merged .*size mismatch"),
        ({"alora_invocation_tokens": [1, 2]}, "cannot be merged"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_merged_are_one_line(sft, tmp_path, change, message):
    shutil.copytree(sft, tmp_path / "adapter")
    settings = json.loads((sft / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        load_policy(PolicyConfig(model=str(tmp_path / "adapter"), dtype="float32"), CPU)


def test_pickled_adapters_are_refused(sft, tmp_path):
    shutil.copytree(sft, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; save the adapter as safetensors"):
        load_policy(PolicyConfig(model=str(tmp_path / "adapter"), dtype="float32"), CPU)


def test_a_base_for_what_is_no_adapter_is_refused(tiny):
    with pytest.raises(UserError, match=r"policy.base: .* is no adapter .*; leave policy.base out"):
        load_policy(PolicyConfig(model=str(tiny(FAMILY)), base="x", dtype="float32"), CPU)


def test_an_adapter_on_a_folder_with_an_adapter_is_refused(sft, both):
    with pytest.raises(UserError, match="the base of .*, holds an adapter itself; merge that one first"):
        load_policy(PolicyConfig(model=str(sft), base=str(both), dtype="float32"), CPU)


def test_a_config_beside_an_adapter_is_no_base(sft, tiny, tmp_path):
    """Some trainers write the model's config.json beside the adapter, without weights."""
    shutil.copytree(sft, tmp_path / "adapter")
    shutil.copy(tiny(FAMILY) / "config.json", tmp_path / "adapter")
    assert find_model(str(tmp_path / "adapter")).base == str(tiny(FAMILY))


def test_the_adapters_own_tokenizer_and_template_are_used(sft, tiny, run_config, tmp_path):
    shutil.copytree(sft, tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(FAMILY))
    tokenizer.chat_template = "Be brief. " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "adapter")
    for model, beginning in ((sft, "<|im_start|>user"), (tmp_path / "adapter", "Be brief. <|im_start|>user")):
        config = run_config(model, lora=True)
        text = open_processor(config).render(list(held_out_pairs(config)[0].prompt), add_generation_prompt=True)
        assert text.startswith(beginning)
    final = trainer.train(config)
    assert "Be brief." in transformers.AutoTokenizer.from_pretrained(final).chat_template


def test_another_adapter_misses_the_reference_cache(sft, tiny, run_config, tmp_path, capsys):
    trainer.train(run_config(sft, lora=True))
    assert " 60 computed" in capsys.readouterr().out
    other = write_adapter(tiny(FAMILY), tmp_path / "other", scale=0.1)
    trainer.train(run_config(other, lora=True, name="other"))
    assert " 60 computed" in capsys.readouterr().out
    trainer.train(run_config(tiny(FAMILY), lora=True, name="base"))
    assert " 60 computed" in capsys.readouterr().out


def test_data_and_audit_read_an_adapters_model(sft, run_config, capsys):
    config = run_config(sft, lora=True)
    assert survey.survey(config)["pairs"] == 24
    with Scorer(str(sft)):
        assert f"merged     {sft} into " in capsys.readouterr().err


def crash_after_three_steps(config, monkeypatch):
    real = trainer.Engine.step

    def crash(engine):
        if engine.num_updates == 3:
            raise RuntimeError
        real(engine)

    monkeypatch.setattr(trainer.Engine, "step", crash)
    with pytest.raises(RuntimeError):
        trainer.train(config)
    monkeypatch.undo()


def test_a_run_from_an_adapter_resumes_with_the_same_bytes(sft, run_config, monkeypatch):
    unbroken, broken = (run_config(sft, lora=True, name=name) for name in ("unbroken", "broken"))
    trainer.train(unbroken)
    crash_after_three_steps(broken, monkeypatch)
    start = Path(broken.run_dir) / "policy" / "model.safetensors"
    written = start.stat().st_mtime_ns
    trainer.train(broken, resume=True)
    assert start.stat().st_mtime_ns == written
    assert final_bytes(broken) == final_bytes(unbroken)


def test_a_stale_start_is_not_kept(sft, tiny, run_config, tmp_path, monkeypatch):
    """A start that never took a step, then another adapter under the same run_dir."""
    monkeypatch.setattr(trainer.Engine, "step", lambda engine: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        trainer.train(run_config(sft, lora=True))
    monkeypatch.undo()
    before = (tmp_path / "run" / "policy" / "model.safetensors").read_bytes()
    other = write_adapter(tiny(FAMILY), tmp_path / "other", scale=0.1)
    trainer.train(run_config(other, lora=True))
    assert (tmp_path / "run" / "policy" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_an_adapter_written_again_during_the_run_is_noticed(sft, tiny, run_config, tmp_path, monkeypatch, lora):
    shutil.copytree(sft, tmp_path / "sft")
    config = run_config(tmp_path / "sft", lora=lora)
    crash_after_three_steps(config, monkeypatch)
    write_adapter(tiny(FAMILY), tmp_path / "sft", scale=0.1)
    with pytest.raises(UserError, match=r"policy.model: the weights of .*sft changed since .*run was started; restore"):
        trainer.train(config, resume=True)
    if lora:  # the run keeps its base
        export(Path(config.run_dir), tmp_path / "out")
    else:
        with pytest.raises(UserError, match=r"the weights of .*sft changed since it was started; restore them"):
            export(Path(config.run_dir), tmp_path / "out")


@pytest.mark.parametrize(
    ("rms", "error", "unchanged"), [(3.8e-6, 0.96, 0.96), (3.8e-5, 0.63, 0.62), (3.8e-4, 0.09, 0.10)]
)
def test_what_rounding_takes_of_adapters_of_known_size(rms, error, unchanged):
    """The table of docs/export.md: weights of rms 0.02 in bf16."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
            self.linear.weight.data.normal_(0, 0.02)
            self.config: dict = {}
            self.get_input_embeddings = self.get_output_embeddings = lambda: self.linear

    for dtype in (torch.bfloat16, torch.float32):
        model = Layer()
        before = model.linear.weight.data.double()
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=["linear"]))
        factors = [w.data for name, w in adapted.named_parameters() if "lora_" in name]
        for factor in factors:
            factor.normal_(0, (rms / 4) ** 0.5)
        delta = factors[1].double() @ factors[0].double()
        report = merge_layers(adapted, dtype)
        merged = model.linear.weight.data.double()
        true = float((merged - before - delta).norm() / delta.norm())
        assert report.relative_error == pytest.approx(true, rel=1e-2)
        assert report.unchanged == pytest.approx(float((merged == before).double().mean()))
        if dtype == torch.bfloat16:
            assert report.relative_error == pytest.approx(error, abs=0.01)
            assert report.unchanged == pytest.approx(unchanged, abs=0.01)
        else:
            assert report.relative_error < 1e-3 and report.unchanged < 0.01


OLD_NAMES = {"llava": "language_model.model.", "qwen2_vl": "model.", "qwen2_5_vl": "model."}


@pytest.mark.parametrize("names", ["new", "old"])
def test_adapters_of_every_family_and_age(family, tiny, tmp_path, names):
    """transformers 4.52 renamed the modules: adapters saved before it have other names for the same layers."""
    base = tiny(family)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=r".*layers.*\.(q_proj|down_proj)")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        applied = peft.PeftModel.from_pretrained(oracles.load_model(base, family), str(adapter))
        expected = applied(input_ids=ids).logits
        weights = load_file(adapter / "adapter_model.safetensors")
        assert any(".model.language_model." in name for name in weights)
        if names == "old":
            weights = {n.replace("model.language_model.", OLD_NAMES[family]): w for n, w in weights.items()}
            save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
        policy = load_policy(PolicyConfig(model=str(adapter), dtype="float32"), CPU)
        save_start(policy, policy.base.state_dict(), tmp_path / "merged")
        merged = oracles.load_model(tmp_path / "merged", family)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
