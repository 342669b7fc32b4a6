"""A whole training step at 7B widths on FakeTensors, which have shapes and dtypes but no memory.

What a GPU would run is taken everywhere: kernels, varlen attention, bf16. The tensors are of the CPU all the same: a
build of PyTorch without CUDA refuses to index fake tensors of a GPU, and autograd asks a GPU's driver for streams.
"""

import contextlib
import dataclasses
import importlib
from unittest import mock

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from bench.arms import vapr_config
from bench.workloads import SHAPES, WORKLOADS, Subject
from tests.test_gpu import shrink
from vapr.batches.loader import load_pairs
from vapr.config import TrainConfig
from vapr.families import FAMILIES
from vapr.model import patches
from vapr.model import policy as model
from vapr.model.logps import per_completion, token_logps
from vapr.model.policy import frozen, image_features
from vapr.training.engine import Engine
from vapr.training.step import train_step
from vapr_kernels import launch, preference_loss

HEAD = importlib.import_module("vapr_kernels.linear_logps")  # the package has a function of that name
MODELS = {"qwen2.5-vl-7b": "qwen2.5-vl-7b", "qwen2-vl-7b": "qwen2.5-vl-7b", "llava-1.5-7b": "llava-1.5-7b"}


def shape_of(name):
    """7B widths, two decoder layers, four of the tower."""
    shape = shrink(SHAPES[MODELS[name]], 2, 4)
    if name != "qwen2-vl-7b":
        return shape
    vision = {"depth": 4, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
    return dataclasses.replace(shape, family="qwen2_vl", vision=vision)


@contextlib.contextmanager
def as_on_a_gpu():
    """Fake tensors, and the choices that load_policy makes on a GPU."""

    def arguments_of_real_sizes(policy, images):
        with _disable_current_modes():
            found = FAMILIES[policy.family].tower_arguments(policy.base.model, images, torch.device("cpu"))
        return {name: value.to(policy.device) if torch.is_tensor(value) else value for name, value in found.items()}

    with (
        mock.patch.object(launch, "runs_triton", lambda x: True),
        mock.patch.object(model, "choose_backend", lambda *wanted, **options: "varlen"),
        mock.patch.object(patches, "_agree", lambda got, own: got.shape == own.shape),  # there is nothing to compare
        mock.patch.object(model, "_tower_arguments", arguments_of_real_sizes),
        mock.patch.object(HEAD, "_budget", lambda device: 2**30),
        mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", make_adapter_beside_its_layer),
        mock.patch.object(torch.nn.Module, "to", lambda module, *where, **options: module),  # built in the right place
        mock.patch.object(PreTrainedModel, "initialize_weights"),  # nothing to initialise
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def make_adapter_beside_its_layer(layer, adapter_name, device=None):
    """What peft does by assigning to a parameter's data, which fake tensors refuse."""
    weight = layer.get_base_layer().weight
    for name in ("lora_A", "lora_B"):
        linear = getattr(layer, name)[adapter_name]
        linear.weight = torch.nn.Parameter(torch.empty(linear.weight.shape, device=weight.device, dtype=weight.dtype))


@pytest.fixture(scope="module", params=MODELS)
def subject(request, tmp_path_factory):
    return Subject(shape_of(request.param), tmp_path_factory.mktemp("subject"), torch.device("cpu"))


def step_of(subject, *, lora, tower):
    """The run config, and one step of four pairs that fills two packs."""
    vars(subject).pop("policy_config", None)  # of the test before
    subject.dtype, subject.lora = torch.bfloat16, lora
    config = vapr_config(subject, "pair", 4)
    config = dataclasses.replace(config, packing=dataclasses.replace(config.packing, max_tokens=2_000))
    (step,) = load_pairs(config, subject.pairs(WORKLOADS["captions"], 4), subject.new_processor()).steps(0, 1)
    train = TrainConfig(vision_tower=tower, projector=tower)
    subject.policy_config = lambda dtype=None: dataclasses.replace(config.policy, train=train)
    return config, step


def losses_of(policy, batch, config):
    features = image_features(policy, batch.images)
    with frozen(policy), policy.adapters_off():
        reference = per_completion(token_logps(policy, batch, features), batch)
    logps = token_logps(policy, batch, features, reference)
    assert logps.shape == batch.labels.shape and logps.dtype == torch.float32
    return preference_loss(logps, reference, batch.completions, config.loss, mean_chosen_length=150.0)[0]


@pytest.mark.parametrize("trained", ["lora", "full", "lora and tower", "full and tower"])
def test_a_whole_step(subject, trained):
    config, step = step_of(subject, lora="lora" in trained, tower="tower" in trained)
    assert len(step.batches) > 1
    with as_on_a_gpu():
        policy = subject.policy()
        assert policy.kernels and policy.left_unfused == () and policy.attention_backend == "varlen"
        engine = Engine(policy, config.optim, num_steps=10)
        for batch in step.batches:
            engine.backward(losses_of(policy, batch, config).sum() / step.num_pairs)
        missing = [name for name, master in engine.masters.items() if master.grad is None]
        # transformers reads LLaVA's features before the tower's last layer
        assert all(".layers.3." in name or "post_layernorm" in name for name in missing), missing
        assert all(master.grad.dtype == torch.float32 for master in engine.masters.values() if master.grad is not None)
        assert engine.gradient_norm().shape == ()
        engine.step()


@pytest.mark.parametrize("kind", ["nf4", "fp8", "int8"])
def test_a_quantised_base(subject, kind):
    """Quantising and restoring have shapes, too; what is stored takes the bits that it shall take."""
    config, step = step_of(subject, lora=True, tower=False)
    quantised = dataclasses.replace(config.policy, base_weights=kind, train=TrainConfig())
    subject.policy_config = lambda dtype=None: quantised
    with as_on_a_gpu():
        policy = subject.policy()
        assert policy.kernels and policy.left_unfused == ()
        losses_of(policy, step.batches[0], config).sum().backward()
        missing = [n for n, p in policy.trained_parameters().items() if p.grad is None]
    assert not missing
    bits = 8 * policy.quantized.num_bytes / (policy.quantized.num_bytes_before / 2)
    assert bits == pytest.approx({"nf4": 4.127, "fp8": 8.009, "int8": 8.009}[kind], abs=0.005)


class KnownReference:
    """A reference cache that has everything."""

    hits = misses = 0

    def find(self, batch):
        return torch.zeros(len(batch.token_weights))


def test_a_step_reads_nothing_back(subject):
    """A fake tensor has no value, so whatever asks for one (item, tolist, bool, float) raises."""
    config, step = step_of(subject, lora=True, tower=True)
    with as_on_a_gpu():
        policy = subject.policy()
        engine = Engine(policy, config.optim, num_steps=10)
        taken = train_step(policy, engine, KnownReference(), step, config.loss)
        engine.step()
        assert engine.num_updates == 1 and taken.number == 1
        with pytest.raises(DataDependentOutputException):
            taken.read()
