"""The family that docs/families.md adds, registered from there: exact, planned, trained and exported like the others."""

import dataclasses
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import transformers

from tests import oracles
from tests.plan.counted_step import assert_counted
from tests.runs import metrics
from vapr.batches.loader import open_processor
from vapr.batches.packing import pack
from vapr.config import LoraConfig, PolicyConfig, TrainConfig
from vapr.errors import UserError
from vapr.families import FAMILIES
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import load_policy
from vapr.plan.plan import plan
from vapr.training import trainer
from vapr.training.export import export

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
EVERYTHING = TrainConfig(vision_tower=True, projector=True)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)[0]
    module = types.ModuleType("vipllava")
    exec(compile(code, PAGE, "exec"), vars(module))
    monkeypatch.setitem(FAMILIES, "vipllava", module.VipLlava())


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A tiny ViP-LLaVA beside the tokenizer and the processor of the tiny LLaVA."""
    folder = shutil.copytree(tiny("llava"), tmp_path / "vipllava")
    llava = transformers.AutoConfig.from_pretrained(folder)
    config = transformers.VipLlavaConfig(
        vision_config=llava.vision_config, text_config=llava.text_config, image_token_index=llava.image_token_index,
        vision_feature_layers=[-2, 1],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(folder, make_config):
    config = make_config(family="llava")
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, model=str(folder)))


def test_the_family_of_the_page_is_exact(folder, config, photo_pairs):
    policy = load_policy(PolicyConfig(model=str(folder), dtype="float32", train=EVERYTHING), torch.device("cpu"))
    processor = open_processor(config)
    pairs = [processor.tokenize_pair(pair) for pair in photo_pairs[:6]]
    batch = pack(pairs)
    logps = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
    model = transformers.VipLlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    truth = oracles.pair_logps(model, "llava", batch)
    torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-5)
    got = oracles.gradients(logps.sum(), policy.trained_parameters())
    wanted = oracles.gradients(truth.sum(), dict(model.named_parameters()))
    assert got.keys() == wanted.keys() and oracles.worst_relative_error(got, wanted) < 1e-3


@pytest.mark.parametrize(
    ("lora", "train", "checkpointing"),
    [(LoraConfig(rank=4, alpha=8), EVERYTHING, "full"), (None, EVERYTHING, "none"), (None, TrainConfig(), "mlp")],
)
def test_its_work_is_planned_without_a_line_for_it(config, lora, train, checkpointing):
    assert_counted(config, lora, train, checkpointing)


def test_its_memory_is_planned(config):
    found = plan(config, gpu_memory=24)
    assert found["fits"] and found["model"]["family"] == "vipllava" and found["gpus"][0]["parts_gib"]["activations"] > 0


def test_it_trains_and_is_exported(config, tmp_path):
    trainer.train(config)
    losses = [entry["loss"] for entry in metrics(config) if "loss" in entry]
    assert losses[-1] < losses[0]
    export(Path(config.run_dir), tmp_path / "exported")
    transformers.VipLlavaForConditionalGeneration.from_pretrained(tmp_path / "exported")


def test_a_processor_that_counts_otherwise_is_refused_in_one_line(folder, config):
    file = folder / "processor_config.json"
    file.write_text(file.read_text().replace('"num_additional_image_tokens": 1', '"num_additional_image_tokens": 0'))
    with pytest.raises(UserError, match="15 tokens in the prompt but 16 features") as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)
