"""Bytes predicted on fake tensors against bytes of the same step on real ones, and short models against whole ones."""

import dataclasses

import pytest
import torch

from tests.conftest import EVERY_FAMILY, FAMILIES
from vapr.batches.loader import open_loaders
from vapr.batches.model_config import load_model_config
from vapr.config import LEVELS, LoraConfig
from vapr.model import attention
from vapr.model.joint_layers import part
from vapr.model.logps import token_logps
from vapr.model.policy import image_features, load_policy
from vapr.plan import fake_step
from vapr.plan.fake_policy import Choices
from vapr.plan.fake_step import profile
from vapr.plan.live_bytes import LiveBytes
from vapr_kernels import naive

LORA = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj", "down_proj"])
SOME = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"])
"""Which models of experts have, too."""


def one_pack(config):
    with open_loaders(config, say=lambda line: None) as loaders:
        return next(loaders["train"].steps(0, 1)).batches[0]


def choices_of(config, **changed):
    base = Choices(config.policy, tuple(config.loss), kernels=True, gpu=False, keep_logits=True, cached_features=False)
    return dataclasses.replace(base, **changed)


def tensors_of(value):
    """Every tensor in a batch or a part of one."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in tensors_of(getattr(value, field.name))]
    return [t for one in value for t in tensors_of(one)] if isinstance(value, tuple) else []


def real_step(config, batch, *, module_by_module=False):
    """Run a step on real tensors.

    Returns LiveBytes of it, what it counted until the loss, the bytes that autograd saved until then by PyTorch's own
    hook (which shares nothing with LiveBytes), and the bytes of the gradients.
    """
    policy = load_policy(config.policy, torch.device("cpu"))
    if module_by_module:
        part(policy.decoder.layers)
    reference = torch.zeros(len(batch.sum_prediction.rows))
    live = LiveBytes()
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with live:
        live.enter("image tower")
        features = image_features(policy, batch.images)
        live.enter("forward")
        before = live.alive
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logps = token_logps(policy, batch, features, reference)
            losses = naive.preference_loss(
                logps, reference, batch.completions, tuple(config.loss), mean_chosen_length=100.0
            )[0]
        kept = live.alive - before
        live.enter("backward")
        losses.sum().backward()
    given = [*policy.base.parameters(), *policy.base.buffers(), features, reference, *tensors_of(batch)]
    for tensor in given:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    gradients = sum(p.grad.numel() * 4 for p in policy.base.parameters() if p.grad is not None)
    return live, kept, sum(saved.values()), gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize("lora", [LORA, None])
def test_bytes_of_a_real_step(make_config, dtype, checkpointing, lora, few_rows):
    predicted, live = compare(make_config, "llava", dtype, checkpointing, lora)
    assert predicted.peaks["image tower"].alive == live.peaks["image tower"].alive


@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {"llava"}))
def test_bytes_of_a_real_step_in_every_family(make_config, family):
    """But for the tower's: fake images attend in one call, as on a GPU, and those of a CPU one by one."""
    compare(make_config, family, "float32", "none", SOME)


@pytest.mark.parametrize("checkpointing", LEVELS)
def test_bytes_where_layers_run_module_by_module(make_config, checkpointing):
    """As under ZeRO 3."""
    compare(make_config, "llava", "float32", checkpointing, LORA, module_by_module=True)


def compare(make_config, family, dtype, checkpointing, lora, *, module_by_module=False):
    config = make_config(family=family)
    policy = dataclasses.replace(config.policy, dtype=dtype, lora=lora, checkpointing=checkpointing)
    config = dataclasses.replace(config, policy=policy)
    batch = one_pack(config)
    choices = choices_of(config, module_by_module=module_by_module)
    predicted = profile(load_model_config(policy.model), choices, batch)
    live, kept, saved, gradients = real_step(config, batch, module_by_module=module_by_module)
    assert predicted.activations + predicted.head == kept
    if checkpointing == "none":  # where a layer's input is kept by a closure, which the hook does not see
        assert 0 <= kept - saved < 20_000  # log-probs, losses, masks and indices are alive, and saved by nobody
    assert max(peak.gradients for peak in predicted.peaks.values()) == gradients
    peaks = predicted.peaks
    assert max(peaks[phase].alive for phase in ("forward", "head", "loss")) == live.peaks["forward"].alive
    if dtype == "float32":  # else the engine would move gradients to fp32, and here nobody does
        backward = max(peak.with_gradients for phase, peak in peaks.items() if phase.startswith("backward"))
        assert backward == live.peaks["backward"].alive
    return predicted, live


@pytest.mark.parametrize("lora", [LORA, None])
def test_each_level_keeps_less_than_the_one_before(make_config, lora):
    """What is alive after the forward pass, whoever holds it: autograd's hook does not see arguments of checkpoint."""
    kept = {}
    for level in LEVELS:
        config = make_config(family="llava")
        policy = dataclasses.replace(config.policy, lora=lora, checkpointing=level)
        config = dataclasses.replace(config, policy=policy)
        kept[level] = real_step(config, one_pack(config))[1]
    assert kept["none"] > kept["attention"] > kept["mlp"] > kept["full"]


@pytest.mark.parametrize("gpu", [False, True])
def test_only_a_cpu_attends_by_its_own_products(make_config, monkeypatch, gpu):
    """In fp32 a GPU takes PyTorch's attention, which keeps its outputs; the fake tensors of both lie on a CPU."""
    config = make_config(family="llava")
    calls = []
    monkeypatch.setattr(attention, "_sdpa", lambda q, *rest, real=attention._sdpa, **scale: calls.append(q.shape) or real(q, *rest, **scale))  # fmt: skip
    batch = one_pack(config)
    assert config.policy.dtype == "float32"
    profile(load_model_config(config.policy.model), choices_of(config, gpu=gpu), batch)
    every = {batch.num_tokens, len(batch.last_queries.tokens)}  # the last layer asks for fewer
    assert {shape[0] for shape in calls} == (every if gpu else set())


@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize(("family", "lora"), [("qwen2_5_vl", LORA), ("qwen2_vl", None), ("llava", LORA)])
def test_short_models_say_what_whole_ones_do(make_config, family, lora, checkpointing):
    compare_short(make_config, family, lora, checkpointing)


@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {*FAMILIES}))
def test_short_models_of_every_family(make_config, family):
    compare_short(make_config, family, SOME, "attention")


def compare_short(make_config, family, lora, checkpointing):
    config = make_config(family=family)
    policy = dataclasses.replace(config.policy, dtype="bfloat16", lora=lora, checkpointing=checkpointing)
    batch = one_pack(config)
    model = load_model_config(policy.model)
    text = model.get_text_config()
    text.num_hidden_layers = 9
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * 9)[:9]
    choices = choices_of(config, policy=policy, kernels=True, gpu=True)
    short = profile(model, choices, batch)
    whole = fake_step._run(model, choices, batch)
    assert (short.features, short.activations, short.head) == (whole.features, whole.activations, whole.head)
    assert short.head_calls == whole.head_calls
    between = whole.peaks.pop("backward, between layer")
    if "backward, between layer" in short.peaks:  # layers differ, so all were run
        assert short.peaks.pop("backward, between layer") == between
    else:
        assert between.alive <= short.peaks["backward, last but one layer"].alive
    assert short.peaks == whole.peaks
