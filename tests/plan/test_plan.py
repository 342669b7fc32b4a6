"""vapr plan: what it says of tiny runs against those runs, its arithmetic, and its mistakes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.conftest import EVERY_FAMILY, FAMILIES
from tests.runs import metrics
from vapr.cli import main
from vapr.config import LEVELS, Config, FeaturesConfig, PackingConfig, ParallelConfig, TrainConfig
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.families import FAMILIES as FAMILIES_OF_VAPR
from vapr.model.policy import load_policy
from vapr.plan import checkpointing, rates
from vapr.plan.gpus import GIB, GPUS, Gpu, find_gpu
from vapr.plan.memory import Storage, base_bytes, moments_bytes, weight_bytes
from vapr.plan.needs import Needs
from vapr.plan.packs import read_packs
from vapr.plan.plan import plan, variant_of
from vapr.plan.shapes import read_shapes
from vapr.training import trainer


@pytest.fixture
def bf16(make_config, tiny, tmp_path):
    """A config for a GPU, of a model folder without weights."""
    config = make_config(packing={"max_tokens": 600})
    folder = shutil.copytree(
        config.policy.model, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors")
    )
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, model=str(folder), dtype="bfloat16"))


CARD = find_gpu("RTX 4090")


def needs_of(config):
    return Needs(config, read_shapes(config.policy), read_packs(config), kernels=True)


def test_tokens_are_those_of_the_run(make_config):
    config = make_config(packing={"max_tokens": 500})
    trainer.train(config)
    entries = [entry for entry in metrics(config) if "loss" in entry]
    data = plan(config, gpu_memory=24)["data"]
    assert data["whole"] and data["rows_read"] == data["rows"] == 24 and data["steps"] == len(entries) == 6
    assert data["tokens_by_step"] == [entry["tokens"] for entry in entries[:3]]
    assert data["tokens_saved_by_step"] == [entry["tokens_saved"] for entry in entries[:3]]
    assert data["tokens"] + data["tokens_saved"] == data["tokens_unshared"]


@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {*FAMILIES}))
@pytest.mark.parametrize("tower", [False, True])
def test_every_family_has_a_plan(make_config, family, tower):
    config = make_config(family=family, lora=not tower)
    train = TrainConfig(vision_tower=tower, projector=tower)
    found = plan(
        dataclasses.replace(config, policy=dataclasses.replace(config.policy, dtype="bfloat16", train=train)),
        gpu_memory=24,
    )
    (gpu,) = found["gpus"]
    assert found["fits"] and found["flops"]["parts_per_pair"]["tower"] > 0
    assert all(size > 0 for name, size in gpu["parts_gib"].items() if name.startswith("weights"))


def test_code_that_asks_for_values_is_one_line(bf16, monkeypatch):
    def features(self, model, pixels, **arguments):
        return pixels[pixels > 0]

    monkeypatch.setattr(type(FAMILIES_OF_VAPR["qwen2_5_vl"]), "features", features)
    with pytest.raises(UserError, match="asks a tensor for its values \\(aten.nonzero.default\\)") as caught:
        plan(bf16, gpu_memory=24)
    assert "\n" not in str(caught.value)


def test_names_the_longest_rows_and_those_that_fit_no_pack(bf16, photo_rows):
    rows = [dict(row) for row in photo_rows[:8]]
    for number in (2, 5):
        rows[number].pop("edits")
    rows[5]["chosen"] = [{"role": "assistant", "content": [{"type": "text", "text": "a long story " * 20}]}]
    rows[2]["chosen"] = [{"role": "assistant", "content": [{"type": "text", "text": "an endless story " * 300}]}]
    write_pairs(Path(bf16.data.train), rows)
    data = plan(bf16, gpu_memory=24)["data"]
    assert data["longest"][0]["id"] == rows[5]["id"] and ":6" in data["longest"][0]["where"]
    assert data["longest"][0]["tokens"] <= data["largest_pack"]
    (line,) = data["too_long"]
    assert rows[2]["id"] in line and "packing.max_tokens is 600" in line and data["pairs"] == 7


def test_a_limit_is_said(bf16):
    data = plan(bf16, gpu_memory=24, limit=8)["data"]
    assert data["rows"] == 24 and data["rows_read"] == 8 and not data["whole"] and data["steps"] == 6


def test_weights_are_what_loading_allocates(make_config, family):
    config = make_config(family=family)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, dtype="bfloat16"))
    needs = needs_of(config)
    need = dataclasses.replace(needs.need(variant_of(config, needs, 1, CARD), 24 * GIB), kernels=False)
    policy = load_policy(config.policy, torch.device("cpu"), kernels="off")
    own = [weight for name, weight in policy.base.named_parameters() if "lora_" not in name]
    assert sum(base_bytes(need, "bfloat16").values()) == sum(weight.nbytes for weight in own)
    linear = sum(
        w.numel() for n, w in policy.base.named_parameters() if ".base_layer.weight" in n and "lm_head" not in n
    )
    halves = base_bytes(need, "int8")["language model"]
    assert linear < halves < linear + need.shapes.count("language model") / 8
    (weight,) = (w for w in need.shapes.weights if w.name.endswith("layers.0.mlp.up_proj.weight"))
    assert weight_bytes(weight, "nf4", need) == weight.numel // 2 + -(-weight.numel // (64 * 256)) * 260
    assert moments_bytes(need, "adamw") == 8 * need.shapes.num_trained


def test_what_is_spread_over_gpus(bf16):
    needs = needs_of(bf16)
    variant = variant_of(bf16, needs, 1, CARD)

    def parts(world_size, **storage):
        base = Storage("bfloat16", "adamw", "deepspeed", 1, "none", world_size)
        changed = dataclasses.replace(variant, storage=dataclasses.replace(base, **storage))
        return needs.peak(changed, 24 * GIB)

    alone = needs.peak(variant, 24 * GIB)
    weights = sum(size for name, size in alone.items() if name.startswith("weights"))
    state = alone["master weights"] + alone["moments"]
    assert state == 12 * needs.shapes.num_trained
    for world_size in (2, 4):
        one, two, three = (parts(world_size, zero=zero) for zero in (1, 2, 3))
        for spread in (one, two, three):
            assert spread["master weights"] + spread["moments"] == pytest.approx(state / world_size, abs=2)
        assert 0 < one["gradients"] <= 4 * needs.shapes.num_trained  # one pack: the peak is before the last gradient
        assert two["gradients"] == three["gradients"] == 4 * needs.shapes.num_trained // world_size
        left = sum(size for name, size in three.items() if name.startswith("weights"))
        assert left == pytest.approx(weights / world_size, abs=4)
    off = parts(2, zero=2, offload="optimizer")
    assert off["master weights"] == off["moments"] == off["gradients"] == 0
    cached = dataclasses.replace(variant, cached_features=True)
    assert needs.peak(cached, 24 * GIB)["weights: image tower"] == 0 < alone["weights: image tower"]


def test_the_largest_pack_that_fits_is_the_largest(bf16):
    found = plan(bf16, gpu_memory=1.2)["gpus"][0]
    most = found["max_tokens_that_fits"]
    needs = needs_of(bf16)
    variant = variant_of(bf16, needs, 1, CARD)
    peaks = [
        sum(needs.peak(dataclasses.replace(variant, tokens=tokens), int(1.2 * GIB)).values()) / GIB
        for tokens in (most, most + 1)
    ]
    assert found["fits"] and peaks[0] <= found["usable_gib"] < peaks[1]


def test_a_smaller_pack_that_fits_fits_when_it_is_set(bf16):
    """A step of one pack frees its activations before the last gradient is there; in a step of several both are."""
    policy = dataclasses.replace(bf16.policy, lora=None)
    one_pack = dataclasses.replace(bf16, policy=policy, packing=PackingConfig(max_tokens=8192))
    full = plan(one_pack, gpu_memory=24)
    (gpu,), data = full["gpus"], full["data"]
    assert data["packs"] == data["steps_read"]
    tight = (gpu["peak_gib"] * 0.98 + 1) / 0.98
    (gpu,) = plan(one_pack, gpu_memory=tight)["gpus"]
    most = gpu["max_tokens_that_fits"]
    if most is not None:
        smaller = dataclasses.replace(one_pack, packing=PackingConfig(max_tokens=most))
        a_percent = gpu["peak_gib"] / 100  # its packs are of other pairs than those that a line was drawn through
        assert plan(smaller, gpu_memory=tight + a_percent)["fits"]
    needs = needs_of(one_pack)
    alone = variant_of(one_pack, needs, 1, CARD)
    halved = dataclasses.replace(alone, tokens=needs.tokens // 2)
    gradients = [needs.peak(variant, 24 * GIB)["gradients"] for variant in (alone, halved)]
    assert gradients[0] < gradients[1] == 4 * needs.shapes.num_trained


def test_several_gpus_take_the_engine_that_the_run_takes(bf16):
    """Under LoRA by the share of the smallest GPU that frozen weights take, as training chooses (docs/scale.md)."""
    auto = dataclasses.replace(bf16, parallel=ParallelConfig())
    needs = needs_of(auto)
    frozen = needs.frozen_bytes / GIB
    large, small = (Gpu("a card", gib / 0.98) for gib in (frozen / 0.59, frozen / 0.61))
    assert variant_of(auto, needs, 2, large).storage.engine == "all-reduce"
    storage = variant_of(auto, needs, 2, small).storage
    assert (storage.engine, storage.zero) == ("deepspeed", 3)
    assert variant_of(auto, needs, 1, small).storage.engine == "all-reduce"
    stored = dataclasses.replace(auto, policy=dataclasses.replace(auto.policy, base_weights="nf4"))
    needs = needs_of(stored)
    assert needs.frozen_bytes / GIB < frozen * 0.6  # the embeddings stay
    small = Gpu("a card", needs.frozen_bytes / GIB / 0.61 / 0.98)
    assert variant_of(stored, needs, 2, small).storage.engine == "all-reduce"  # ZeRO 3 cannot spread nf4


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("optim", {"kind": "adamw-8bit"}, "optim.kind: adamw-8bit does not go with parallel.engine: deepspeed"),
        ("policy", {"base_weights": "nf4"}, "policy.base_weights: nf4 cannot be spread"),
    ],
)
def test_what_deepspeed_cannot_do_is_no_plan(bf16, section, values, message):
    zero = ParallelConfig(engine="deepspeed", zero=3)
    changed = dataclasses.replace(getattr(bf16, section), **values)
    with pytest.raises(UserError, match=message):
        plan(dataclasses.replace(bf16, parallel=zero, **{section: changed}), gpu_memory=24, world_size=2)


def test_zero_3_is_not_told_to_store_in_fewer_bits(bf16):
    zero = dataclasses.replace(bf16, parallel=ParallelConfig(engine="deepspeed", zero=3))
    (gpu,) = plan(zero, gpu_memory=1.021, world_size=2)["gpus"]
    assert gpu["changes"] and not any("nf4" in setting for change in gpu["changes"] for setting in change["set"])
    assert {row["base_weights"] for row in gpu["kept"]} == {"bfloat16"}
    assert {row["optimizer"] for row in gpu["kept"]} == {"adamw"}


def test_says_what_to_change(bf16):
    tight = plan(bf16, gpu_memory=24)["gpus"][0]["peak_gib"]
    found = plan(bf16, gpu_memory=(tight * 0.9 + 1) / 0.98)
    (gpu,) = found["gpus"]
    assert not found["fits"] and not gpu["fits"] and gpu["changes"]
    assert [change["fits"] for change in gpu["changes"]] == [False] * (len(gpu["changes"]) - 1) + [True]
    levels = [f"policy.checkpointing={level}" for level in LEVELS[1:]]
    assert [change["set"] for change in gpu["changes"]][:3] == [[level] for level in levels[: len(gpu["changes"])]]
    overrides = [one for given in gpu["changes"][-1]["set"] for one in given.split()]
    raw = json.loads(json.dumps(dataclasses.asdict(bf16)))
    for override in overrides:
        key, value = override.split("=")
        section, name = key.split(".")
        raw[section][name] = value
    again = plan(Config.parse(raw), gpu_memory=(tight * 0.9 + 1) / 0.98)["gpus"][0]
    assert again["fits"] and again["peak_gib"] == pytest.approx(gpu["changes"][-1]["peak_gib"])
    nothing = plan(bf16, gpu_memory=1.021)["gpus"][0]
    assert all(levels[-1] in change["set"] and len(change["set"]) > 1 for change in nothing["changes"][3:])
    assert nothing["max_tokens_that_fits"] is None and not any(change["fits"] for change in nothing["changes"])


def test_time_comes_from_a_measured_row_or_not_at_all(bf16, tmp_path, monkeypatch):
    row = {
        "run": "r1", "time": "2026-01-02T03:04", "commit": "abc", "device": "NVIDIA H200", "model": "qwen2.5-vl-7b",
        "workload": "answers", "tuning": "lora r=128", "dtype": "bfloat16", "arm": rates.CACHED, "tokens": 500,
        "useful_tflops": 200.0,
    }  # fmt: skip
    file = tmp_path / "train_step.jsonl"
    file.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(rates, "RESULTS", file)
    found = plan(bf16, gpu="h200")
    time = found["gpus"][0]["time"]
    assert time["seconds_per_step"] == pytest.approx(found["flops"]["useful_per_step"] / 200e12)
    assert time["seconds"] == pytest.approx(time["seconds_per_step"] * 6)
    assert "commit abc" in time["rate"] and "NVIDIA H200" in time["rate"] and "run r1" in time["rate"]
    assert plan(bf16, gpu="L4")["gpus"][0]["time"] is None
    monkeypatch.setattr(rates, "RESULTS", tmp_path / "absent")
    assert plan(bf16, gpu="h200")["gpus"][0]["time"] is None


def test_checkpointing_auto(bf16, monkeypatch):
    """The first level that fits, and the last where none does: on a card that just holds what a level takes, that."""
    auto = dataclasses.replace(bf16, policy=dataclasses.replace(bf16.policy, checkpointing="auto"))
    config, line = checkpointing.resolve(auto, torch.device("cpu"))
    assert config == bf16 and "auto is none on a CPU" in line
    assert checkpointing.resolve(bf16, torch.device("cpu")) == (bf16, None)
    rows = plan(bf16, gpu_memory=24)["gpus"][0]["levels"]
    peaks = {row["checkpointing"]: row["peak_gib"] for row in rows}
    assert tuple(peaks) == LEVELS and sorted(peaks.values(), reverse=True) == list(peaks.values())
    cards = {(peak + 1) / 0.98 + 1e-6: level for level, peak in peaks.items()}
    for gib, wanted in {24: "none", **cards, (peaks["full"] * 0.99 + 1) / 0.98: "full"}.items():
        monkeypatch.setattr(checkpointing, "gpu_here", lambda gib=gib: Gpu("a card", gib))
        config, line = checkpointing.resolve(auto, torch.device("cuda"))
        assert config.policy.checkpointing == wanted and f"auto is {wanted}: " in line
        assert plan(auto, gpu_memory=gib)["gpus"][0]["checkpointing"] == wanted


def test_what_levels_cost_is_what_they_compute_again(bf16):
    rows = plan(bf16, gpu_memory=1.2)["gpus"][0]["levels"]
    none, attention, mlp, full = (row["times_flops"] for row in rows)
    assert none == 1 < min(attention, mlp) and max(attention, mlp) < full < 1.5
    assert all(row["fits"] for row in rows)
    most = [row["max_tokens_that_fits"] for row in rows]
    assert sorted(most) == most and most[0] < most[-1]


def test_names_of_gpus():
    for gpu in GPUS:
        assert find_gpu(gpu.name) == gpu and find_gpu(f"NVIDIA {gpu.name.lower()}") == gpu
    for given, meant in {
        "NVIDIA H100 80GB HBM3": "H100", "a100": "A100 80GB", "A100-SXM4-40GB": "A100 40GB", "4090": "RTX 4090",
        "NVIDIA GeForce RTX 3090": "RTX 3090", "A6000": "RTX A6000", "Tesla T4": "T4", "V100-32GB": "V100 32GB",
        "NVIDIA A100 80GB PCIe": "A100 80GB", "L40S 48GB": "L40S", "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    }.items():  # fmt: skip
        assert find_gpu(given).name == meant
    with pytest.raises(UserError, match="did you mean RTX 4090"):
        find_gpu("RTX 4099")


def command(tmp_path, config, *arguments):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    return CliRunner().invoke(main, ["plan", str(file), *arguments])


def test_the_command(bf16, tmp_path):
    result = command(tmp_path, bf16, "--gpu", "rtx 4090")
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.output and "longest pairs" in result.output and "vapr train" in result.output
    result = command(tmp_path, bf16, "--json", "--gpu-memory", "1.01")
    assert result.exit_code == 0 and json.loads(result.stdout)["fits"] is False
    result = command(tmp_path, bf16)
    assert result.exit_code == 0 and "141 GiB" in result.output and "no measured rate" not in result.output


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ("--gpu", "H1000"), "did you mean H100"),
        ({}, ("--gpu", "abacus"), "known are V100 16GB"),
        ({}, ("--gpu-memory", "0"), "--gpu-memory 0: give the GPU's memory in GiB"),
        ({}, ("--gpu-memory", "-3"), "--gpu-memory -3"),
        ({}, ("--gpu-memory", "nan"), "--gpu-memory nan"),
        ({}, ("--set", "packing.max_token=3"), "max_tokens"),
        ({"policy": {"model": "/nowhere"}}, (), "/nowhere: no such folder"),
        ({"data": {"train": "/nowhere.jsonl"}}, (), "/nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(bf16, tmp_path, changes, arguments, message):
    for section, values in changes.items():
        bf16 = dataclasses.replace(bf16, **{section: dataclasses.replace(getattr(bf16, section), **values)})
    result = command(tmp_path, bf16, *arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_folder_without_config(bf16, tmp_path):
    (tmp_path / "no-weights" / "config.json").unlink()
    result = command(tmp_path, bf16, "--gpu", "H100")
    assert result.exit_code == 2 and "without config.json" in result.stderr


def test_features_from_the_cache_need_no_tower(bf16):
    cached = dataclasses.replace(bf16, features=FeaturesConfig(cache=True))
    with_tower, without = (plan(config, gpu_memory=24) for config in (bf16, cached))
    assert without["flops"]["parts_per_pair"]["tower"] == 0 < with_tower["flops"]["parts_per_pair"]["tower"]
    assert without["gpus"][0]["peak_gib"] < with_tower["gpus"][0]["peak_gib"]
