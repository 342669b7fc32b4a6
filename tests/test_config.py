"""The config: what is accepted, and one line for everything that is not."""

import dataclasses
import json
import pickle
from collections.abc import Iterator

import pytest
import yaml

from vapr.config import Config
from vapr.config_mistakes import fields_of, mentioned, sections_in
from vapr.editing.config import EditConfig
from vapr.errors import UserError

MINIMAL = {"run_dir": "runs/x", "policy": {"model": "m"}, "data": {"train": "pairs.jsonl"}}

DOCUMENTED = """
run_dir: runs/qwen2_5_vl_3b
seed: 0
policy:
  model: Qwen/Qwen2.5-VL-3B-Instruct
  dtype: bfloat16
  base_weights: bfloat16
  attention: auto
  checkpointing: none
  train: {language_model: true, projector: false, vision_tower: false}
  lora: {rank: 128, alpha: 256, targets: all-linear}
data:
  train: pairs/
  eval: null
  format: auto
  image_root: null
  image_backend: auto
  shuffle: true
  too_long: error
  on_bad_row: error
loss: {kind: sigmoid, beta: 0.1}
packing: {max_tokens: 8192, share: pair}
optim: {lr: 5.0e-6, schedule: cosine, warmup_ratio: 0.03, weight_decay: 0.0, clip: 1.0, pairs_per_step: 64, epochs: 1,
        max_steps: null}
reference: {cache_dir: null}
kernels: auto
checkpoint: {every: 100, keep: 3}
"""


def test_every_documented_key_is_accepted_and_is_the_default():
    config = Config.parse(yaml.safe_load(DOCUMENTED))
    shorter = Config.parse(
        {
            "run_dir": "runs/qwen2_5_vl_3b",
            "policy": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "lora": {}},
            "data": {"train": "pairs/"},
        }
    )
    assert config == shorter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"polcy": {}}, "unknown key 'polcy'; did you mean 'policy'?"),
        ({"loss": {"betta": 0.2}}, "unknown key 'loss.betta'; did you mean 'beta'?"),
        ({"policy": {"model": "m", "lora": {"rnk": 8}}}, "unknown key 'policy.lora.rnk'; did you mean 'rank'?"),
        ({"optim": {"xyzzy": 1}}, "unknown key 'optim.xyzzy'; known keys here: lr, schedule"),
        ({"loss": {"beta": -1.0}}, "loss.beta must be > 0, got -1.0"),
        ({"loss": {"kind": "ppo"}}, "loss.kind: should be 'sigmoid', 'robust'"),
        ({"loss": {"kind": "robust", "label_smoothing": 0.5}}, "loss.label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"loss": {"kind": "hinge", "label_smoothing": 0.1}}, "loss.label_smoothing means nothing to hinge"),
        ({"loss": "sigmoid"}, "loss: should be a mapping such as {kind: sigmoid, beta: 0.1}, or a list of them"),
        ({"policy": {"model": "m", "lora": {"targets": "q_proj"}}}, "policy.lora.targets: should be all-linear, or a list of module names"),
        ({"seed": 2**64}, "seed must be at least 0 and below 9,223,372,036,854,775,808"),
        ({"loss": []}, "loss: give one loss, or a list of at least one"),
        ({"loss": [{"kind": "sigmoid", "weight": 0}]}, "loss: every weight is 0"),
        ({"loss": {"token_weights": {"changed": 0, "unchanged": 0}}}, "token_weights are both 0"),
        ({"optim": {"lr": "fast"}}, "optim.lr: should be a valid number"),
        ({"optim": {"pairs_per_step": 0}}, "optim.pairs_per_step must be at least 1, got 0"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1 must be at least 0 and below 1, got 1.0"),
        ({"packing": {"max_tokens": "many"}}, "packing.max_tokens: should be a valid integer"),
        ({"policy": {}}, "'policy.model' is missing"),
        ({"policy": {"model": "m", "dtype": "float16"}}, "policy.dtype: should be 'float32' or 'bfloat16', got 'float16'"),
        ({"policy": {"model": "m", "train": {"language_model": False}}}, "policy.train freezes every part"),
        ({"data": "pairs.jsonl"}, "data: a mapping of keys to values is needed here, got 'pairs.jsonl'"),
        ({"run_dir": None}, "run_dir: "),
        ({"run_dir": ""}, "run_dir must be non-empty, got ''"),
        ({"policy": {"model": "m", "lora": {"targets": [1]}}}, "policy.lora.targets.0: should be all-linear, or a list of module names such as [q_proj, v_proj], got 1"),
        ({"policy": {"model": "m", "lora": {"targets": []}}}, "policy.lora.targets: should be all-linear, or a list of module names"),
        ({"data": {"train": [{"path": "p"}, {"path": "p", "wieght": 1}]}}, "unknown key 'data.train.1.wieght'; did you mean 'weight'?"),
        ({"data": {"train": {}}}, "'data.train.path' is missing"),
        ({"data": {"train": [5]}}, "data.train.0: should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those, got 5"),
        ({"loss": [{"kind": "sigmoid"}, {"beta": 0}]}, "loss.1.beta must be > 0, got 0"),
        ({"loss": ["dpo"]}, "loss.0: should be a mapping such as {kind: sigmoid, beta: 0.1}"),
        ({"trackers": ["wand"]}, "trackers.0: should be 'tensorboard', 'wandb', 'trackio' or 'mlflow', got 'wand'"),
        ({"optim": {"betas": [0.9]}}, "'optim.betas.1' is missing"),
        ({"optim": {"lr": float("nan")}}, "optim.lr: should be a finite number, got nan"),
        ({3: 4}, "unknown key '3'; known keys here: run_dir, policy"),
        ({"policy": {"model": "m", "gradient_checkpointing": True}}, "'policy.gradient_checkpointing'; it is now policy.checkpointing: true -> full, false -> none, auto -> auto"),
        ({"gradient_checkpointing": True}, "unknown key 'gradient_checkpointing'; did you mean 'policy.checkpointing'?"),
        ({"policy": {"model": "m", "checkpointing": True}}, "policy.checkpointing: should be 'none', 'attention', 'mlp', 'full' or 'auto', got True"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(UserError) as error:
        Config.parse({**MINIMAL, **changes}, where="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": True}, "seed"),
        ({"loss": {"kind": "sigmoid", "beta": True}}, "loss.beta"),
        ({"loss": [{"kind": "sigmoid"}, {"kind": "sft", "weight": True}]}, "loss.1.weight"),
        ({"data": {"train": {"path": "a", "weight": True}}}, "data.train.weight"),
        ({"data": {"train": [{"path": "a"}, {"path": "b", "weight": True}]}}, "data.train.1.weight"),
        ({"optim": {"betas": [False, 0.9]}}, "optim.betas.0"),
        ({"policy": {"model": "m", "lora": {"rank": True}}}, "policy.lora.rank"),
    ],
    ids=str,
)
def test_yes_is_no_number(changes, key):
    with pytest.raises(UserError, match=rf"^run.yaml: {key}: should be a number, got (True|False) \(YAML reads yes"):
        Config.parse({**MINIMAL, **changes}, where="run.yaml")


def number_keys(section: type) -> Iterator[tuple[str, ...]]:
    """Every key of a config that takes a number, or numbers."""
    for name, field in fields_of(section).items():
        if inner := sections_in(field.annotation):
            yield from ((name, *key) for key in number_keys(inner[0]))
        elif any(part in (int, float) for part in mentioned(field.annotation)):
            yield (name,)


@pytest.mark.parametrize("config", [Config, EditConfig], ids=lambda config: config.__name__)
def test_no_key_for_a_number_takes_yes(config):
    keys = list(number_keys(config))
    assert ("seed",) in keys and len(keys) > 10
    for *sections, key in keys:
        data = {"train": {"path": "x"}, "eval": {"path": "x"}}
        raw: dict = {"policy": {"model": "m"}, "run_dir": "x", "data": data} if config is Config else {}
        if "picture" in sections:
            raw["picture"] = {"change": "mask"}
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = True
        with pytest.raises(UserError, match=rf"{key}\b"):
            config.parse(raw, "run.yaml")


@pytest.mark.parametrize(("text", "lr"), [("1e-6", 1e-6), ("'1e-6'", 1e-6), ("1.0e-6", 1e-6), ("1", 1.0)])
def test_a_number_may_be_written_without_a_dot(text, lr):
    """YAML 1.1 takes 1e-6 for text."""
    read = Config.parse({**MINIMAL, "optim": yaml.safe_load(f"lr: {text}")}).optim.lr
    assert read == lr and isinstance(read, float)


@pytest.mark.parametrize(("text", "epochs"), [("3", 3), ("'3'", 3), ("3.0", 3), ("'3.0'", 3)])
def test_a_whole_number_may_be_written_as_text(text, epochs):
    read = Config.parse({**MINIMAL, "optim": yaml.safe_load(f"epochs: {text}")}).optim.epochs
    assert read == epochs and isinstance(read, int)


@pytest.mark.parametrize("value", [3.5, "3.5", "three", None, [3], 1e400, "nan"], ids=str)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UserError, match=r"^config: optim.epochs: should be a .*got "):
        Config.parse({**MINIMAL, "optim": {"epochs": value}})


def test_what_asks_for_nothing_possible_is_refused():
    for changes, told in (
        ({"parallel": {"engine": "deepspeed", "offload": "all"}}, "parallel.offload: all needs parallel.zero: 3"),
        ({"parallel": {"offload": "optimizer"}}, "parallel.offload: optimizer is DeepSpeed's"),
        ({"policy": {"model": "m", "base_weights": "nf4"}}, "policy.base_weights: nf4 is for a frozen base under LoRA"),
    ):
        with pytest.raises(UserError, match=told):
            Config.parse({**MINIMAL, **changes})


@pytest.mark.parametrize("config", [Config.parse(MINIMAL), EditConfig()], ids=lambda config: type(config).__name__)
def test_configs_are_values(config):
    """They go to other processes, cannot be changed, and are checked again where they are made anew."""
    assert pickle.loads(pickle.dumps(config)) == config == type(config).parse(config.as_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert dataclasses.replace(config, seed=1).seed == 1
    with pytest.raises(ValueError, match="less than 9223|less than 2147"):
        dataclasses.replace(config, seed=2**64)
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()


def test_off_without_quotes_is_off():
    assert Config.parse({**MINIMAL, **yaml.safe_load("kernels: off")}).kernels == "off"


def test_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "loss": [{"kind": "sigmoid"}, {"kind": "sft"}]}))
    config = Config.load(
        path, ("optim.lr=1e-4", "policy.lora={rank: 8}", "loss.1.weight=0.5", "data.eval=held_out.jsonl")
    )
    assert config.optim.lr == 1e-4
    assert config.policy.lora is not None and config.policy.lora.rank == 8
    assert config.loss[1].weight == 0.5
    assert config.data.eval == "held_out.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "write --set key.subkey=value"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("loss.7.weight=1", "'loss' is a list of 2"),
        ("loss.7=1", "'loss' is a list of 2; write an index"),
        ("run_dir.x=1", "'run_dir' has no keys below it"),
        ("optim.lr=[1", "not valid YAML"),
        ("optim={lr: 1, lr: 2}", "not valid YAML (key 'lr' is given twice)"),
        ("run_dir=2024-13-45", "not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "loss": [{"kind": "sigmoid"}, {"kind": "sft"}]}))
    with pytest.raises(UserError) as error:
        Config.load(path, (override,))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run_dir: [1", "not valid YAML"),
        (b"- a list", "a config is a mapping"),
        (b"", "a config is a mapping"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
        (b"run_dir: 2024-13-45", "not valid YAML: month must be in 1..12"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Config.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path / "none" / "none.yaml"):
        with pytest.raises(UserError, match=r"none\.yaml: no such file$"):
            Config.load(path)
