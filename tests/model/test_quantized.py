"""Quantised bases: what is stored, that policy and reference are one, and gradients against plain transformers + peft."""

import contextlib
import dataclasses
import shutil
import sys
import types
from collections import Counter

import pytest
import torch
from torch import nn

from tests import oracles
from tests.model.test_exactness import (
    assert_same,
    chosen_pairs,
    oracle_loss_and_grads,
    packed_loss_and_grads,
    tokenize,
)
from vapr.batches.packing import pack
from vapr.config import LEVELS, LoraConfig, PolicyConfig, TrainConfig
from vapr.errors import UserError
from vapr.model import quantized
from vapr.model.logps import per_completion, token_logps
from vapr.model.policy import Policy, load_policy
from vapr.model.quantized import QuantizedLinear, dequantize
from vapr.model.reference import Reference, first_margin
from vapr.training.metrics import UsefulFlops

CPU = torch.device("cpu")
KINDS = ("nf4", "fp8", "int8")
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
"""The 16 values of NormalFloat4 (arXiv 2305.14314, appendix E)."""


def policy_of(folder, kind: str, dtype: str = "float32", **options) -> Policy:
    lora = options.pop("lora", LoraConfig(rank=4, alpha=8))
    policy = load_policy(
        PolicyConfig(model=str(folder), dtype=dtype, base_weights=kind, lora=lora, **options), CPU
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(0, 0.05, generator=generator)
    return policy


def linear(shape: tuple[int, int], dtype: torch.dtype, scale: float = 0.02) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(shape) * scale)
    return layer


def quantised_layers(policy: Policy) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in policy.base.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (64, 128),
        (95, 101),  # neither a block nor a byte: two codes share one
        (96, 100),  # blocks run on into the next row
        (3, 1),
        (600, 64),  # more blocks than one group of scales
    ],
    ids=str,
)
class TestStorage:
    def test_nf4(self, shape, dtype):
        layer = linear(shape, dtype)
        flat = layer.weight.flatten().double()
        blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
        maxima = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / maxima)[..., None] - NF4.double()).abs().argmin(-1)
        expected = (NF4.double()[nearest] * maxima).flatten()[: len(flat)].view(shape)
        got = QuantizedLinear(layer, "nf4", CPU).weight
        assert got.dtype == dtype and got.shape == layer.weight.shape
        # What 8-bit scales add: half a step of the square root, beside the largest of 256 blocks.
        rounding = 0.0 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(got.double(), expected, rtol=0.012 + rounding, atol=1e-9)
        assert float((got.double() - expected).norm()) < (0.004 + rounding) * float(expected.norm())

    def test_fp8(self, shape, dtype):
        layer = linear(shape, dtype)
        got = QuantizedLinear(layer, "fp8", CPU).weight
        assert got.dtype == dtype
        largest = layer.weight.double().abs().amax(1, keepdim=True)
        error = (got.double() - layer.weight.double()).abs()
        # three bits behind the point, and the smallest step of a row whose largest is above 224 steps of 2**-9
        assert bool((error <= (layer.weight.double().abs() / 16).clamp(min=2**-10 * largest / 224)).all())

    def test_int8(self, shape, dtype):
        layer = linear(shape, dtype)
        got = QuantizedLinear(layer, "int8", CPU).weight.double()
        step = layer.weight.double().abs().amax(1, keepdim=True) / 127
        rounding = got.abs() * (2**-24 if dtype == torch.float32 else 2**-8)
        assert bool(((got - layer.weight.double()).abs() <= step / 2 * (1 + 1e-6) + rounding).all())


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("fp8", 8.07), ("int8", 8.07)])
def test_bits_a_weight(kind, bits):
    layer = QuantizedLinear(linear((512, 512), torch.bfloat16), kind, CPU)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert layer.num_bytes == stored and 8 * stored / 512**2 == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_far_apart(kind):
    """A row or block of zeros stays zero, a tiny one stays what it is beside a large one, and damage stays visible."""
    layer = linear((8, 256), torch.float32)
    layer.weight[0] = 0.0
    layer.weight[1] *= 1e-3
    got = QuantizedLinear(layer, kind, CPU).weight
    assert bool((got[0] == 0).all())
    assert float((got[1] - layer.weight[1]).norm() / layer.weight[1].norm()) < 0.15  # nf4 alone: 0.13
    for damage in (float("nan"), float("inf")):
        layer.weight[2, 3] = damage
        restored = QuantizedLinear(layer, kind, CPU).weight
        assert not bool(restored[2].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_dtype_leaves_the_weight_as_it_is(kind):
    """As DeepSpeed's module.bfloat16() and peft's float() do it."""
    layer = QuantizedLinear(linear((64, 96), torch.bfloat16), kind, CPU)
    before = layer.weight
    assert torch.equal(layer.bfloat16().float().weight, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", LEVELS)
def test_gradients_are_those_of_plain_layers(family, kind, checkpointing, tiny, photo_pairs):
    """Against transformers' own model and peft's own adapters on the dequantised weights, each sequence alone."""
    folder = tiny(family)
    policy = policy_of(folder, kind, checkpointing=checkpointing)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    truth = oracle(policy, folder, family, pairs)
    for share in ("none", "pair", "image") if kind == "nf4" and checkpointing == "none" else ("pair",):
        assert_same(packed_loss_and_grads(policy, [pairs], share), truth, 1e-5)


def oracle(policy: Policy, folder, family: str, pairs):
    """Log-probs, loss and gradients of transformers' model with the dequantised weights and peft's LoRA."""
    model = oracles.load_model(folder, family)
    moved = 0.0
    for name, layer in quantised_layers(policy).items():
        plain = model.get_submodule(name.removesuffix(".base_layer"))
        moved = max(moved, float((plain.weight.detach() - layer.weight).norm() / plain.weight.detach().norm()))
        plain.weight.data.copy_(layer.weight)
    assert moved > 1e-3  # else there is nothing to tell apart
    adapted, parameters = oracles.with_adapters_of(policy, model)
    return oracle_loss_and_grads(adapted, family, parameters, pairs)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_with_fused_kernels_and_layers_without_adapters(targets, tiny, photo_pairs, device):
    """Triton's norms, MLPs, rotations and head around quantised layers, some of which only pass a gradient through."""
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder, "nf4", lora=LoraConfig(rank=4, alpha=8, targets=targets))
    assert (
        policy.kernels
        and not policy.left_unfused
        and len(policy.written_out) == len(policy.base.model.language_model.layers)
    )
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    pairs = [pairs[2], pairs[-1]]
    truth = oracle(policy, folder, "qwen2_5_vl", pairs)
    assert_same(packed_loss_and_grads(policy, [pairs], "pair"), truth, 1e-5)


def test_adapters_on_the_tower_too(family, tiny, photo_pairs):
    folder = tiny(family)
    everything = TrainConfig(language_model=True, projector=True, vision_tower=True)
    policy = policy_of(folder, "nf4", train=everything)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    assert any("lora_A" in name and ".language_model." not in name for name in policy.trained_parameters())
    assert_same(packed_loss_and_grads(policy, [pairs], "pair"), oracle(policy, folder, family, pairs), 1e-5)


@pytest.mark.parametrize("share", ["none", "pair"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policy_is_its_reference_before_the_first_update(family, dtype, share, tiny, photo_pairs, tmp_path):
    """To the last bit: with gradients and without, recomputed, from the cache and not."""
    folder = tiny(family)
    for kind in KINDS:
        config = PolicyConfig(
            model=str(folder), dtype=dtype, base_weights=kind, lora=LoraConfig(rank=4, alpha=8),
            checkpointing={"nf4": "none", "fp8": "full", "int8": "mlp"}[kind],
        )  # fmt: skip
        policy = load_policy(config, CPU)
        batch = pack(tokenize(policy, folder, chosen_pairs(photo_pairs)), share)
        reference = Reference(policy, str(tmp_path), share)
        assert first_margin(policy, reference, (batch,))[0] == 0.0
        with_gradients = per_completion(token_logps(policy, batch), batch)
        assert with_gradients.requires_grad
        assert torch.equal(with_gradients.detach().float(), reference.logps(batch))


def test_each_storage_has_a_cache_of_its_own(tiny, tmp_path):
    folders = {}
    for kind in ("bfloat16", *KINDS):
        policy = load_policy(
            PolicyConfig(model=str(tiny("llava")), dtype="float32", base_weights=kind, lora=LoraConfig(rank=2)), CPU
        )
        reference = Reference(policy, str(tmp_path))
        folders[kind] = reference.folder
        assert (b"base_weights" in reference.policy_id) == (kind != "bfloat16")
    assert len(set(folders.values())) == 4


def test_what_is_stored_and_what_stays(family, tiny):
    """Every linear layer but the head, by the counts of a model that nobody touched."""
    policy = policy_of(tiny(family), "int8")
    model = oracles.load_model(tiny(family), family)
    plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    stored = {name.removesuffix(".base_layer") for name in quantised_layers(policy)}
    assert set(plain) - stored == {"lm_head"}
    size = sum(m.weight.numel() for name, m in plain.items() if name != "lm_head")
    said = policy.quantized
    assert (said.layers, said.linear, said.num_bytes_before) == (len(stored), len(plain), 4 * size)
    assert f"{len(stored)} of {len(plain)} linear layers as int8, " in str(said) and "; 1 LM head" in str(said)
    for name in ("model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"):
        assert torch.equal(policy.base.state_dict()[name], model.state_dict()[name])


def test_layers_that_cannot_be_stored_are_counted_with_the_reason(tiny):
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b", "c", "head")})
    layers["d"] = Squared(8, 8)
    layers["twice"] = layers["a"]  # one layer in two places
    layers["c"].weight = layers["b"].weight  # two layers, one weight
    layers.requires_grad_(False)
    layers["trained"] = nn.Linear(8, 8)
    said = quantized.quantize(layers, layers["head"], "fp8", CPU)
    assert isinstance(layers["a"], QuantizedLinear) and layers["twice"] is layers["a"]
    assert type(layers["trained"]) is nn.Linear and type(layers["d"]) is Squared
    assert (said.layers, said.linear) == (1, 5)
    assert said.left == {
        "with a weight shared with another layer": 2, "LM head": 1,
        "of class Squared, which computes something else": 1,
    }  # fmt: skip
    assert str(said).endswith("1 LM head; 1 of class Squared, which computes something else")


def test_useful_flops_count_quantised_layers(tiny, photo_pairs):
    from vapr.batches.steps import Step

    counted = []
    for kind in ("bfloat16", "nf4"):
        policy = policy_of(tiny("qwen2_vl"), kind)
        batch = pack(tokenize(policy, tiny("qwen2_vl"), chosen_pairs(photo_pairs)))
        counted.append(
            UsefulFlops(policy).of(Step((batch,), batch.num_pairs, 1.0, batch.num_tokens, batch.num_tokens_unshared))
        )
    assert counted[0] == counted[1]


def test_dequantised_layers_are_plain_ones_with_the_same_outputs(tiny, photo_pairs):
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder, "nf4", "bfloat16")
    batch = pack(tokenize(policy, folder, chosen_pairs(photo_pairs)))
    before = token_logps(policy, batch)
    dequantize(policy.base)
    assert not quantised_layers(policy)
    assert torch.equal(token_logps(policy, batch), before)


def test_tied_embeddings_stay_tied(tiny, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(tiny("qwen2_vl"), folder)
    model = oracles.CLASSES["qwen2_vl"].from_pretrained(folder)
    model.lm_head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.save_pretrained(folder)
    policy = policy_of(folder, "nf4")
    assert policy.head is policy.base.get_input_embeddings().weight
    assert policy.quantized.left == {"LM head": 1}


class TestWithoutBitsandbytes:
    @pytest.fixture(autouse=True)
    def _no_bitsandbytes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    def test_nf4_says_what_to_do_before_weights_are_read(self, tmp_path):
        with pytest.raises(UserError) as caught:
            policy_of(tmp_path / "no such folder", "nf4")
        text = str(caught.value)
        assert text.startswith("policy.base_weights: nf4 needs bitsandbytes, which does not import (")
        assert text.endswith("pip install 'vapr[quant]', or take int8 or fp8, which need no library")

    def test_too_old_a_version_is_refused(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(__version__="0.48.2"))
        with pytest.raises(
            UserError, match="nf4 needs bitsandbytes 0.50.2 or newer, and 0.48.2 is installed; pip inst"
        ):
            quantized.check_available("nf4")

    @pytest.mark.parametrize("kind", ["fp8", "int8"])
    def test_the_others_need_no_library(self, kind, tiny):
        assert policy_of(tiny("llava"), kind).quantized.layers > 10


def test_a_machine_that_cannot_quantise_says_so(tiny, monkeypatch):
    def fail(weight):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(quantized, "_store_nf4", fail)
    with pytest.raises(
        UserError, match="policy.base_weights: nf4 cannot be made on cpu here .no kernel image is avail"
    ):
        policy_of(tiny("llava"), "nf4")


def test_only_one_layer_is_on_the_device_unquantised(tiny, monkeypatch):
    """Weights in full precision that are alive at once beyond those of the model itself: the layer's own."""
    alive, most = set(), []
    real = quantized._store_int8

    def store(weight):
        alive.add(id(weight))
        most.append(len(alive))
        result = real(weight)
        alive.discard(id(weight))
        return result

    monkeypatch.setattr(quantized, "_store_int8", store)
    policy = policy_of(tiny("llava"), "int8")
    assert max(most) == 1 and len(most) == policy.quantized.layers
    names = [name for name, p in policy.base.named_parameters() if p.ndim == 2 and ".lora_" not in name]
    assert all("embed" in name or "lm_head" in name for name in names), names


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_wide_as_a_weight_is_kept_for_the_backward_pass(kind, tiny, photo_pairs):
    """Saved for the backward pass: activations and adapters, never a restored weight."""
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder, kind, "bfloat16")
    batch = pack(tokenize(policy, folder, chosen_pairs(photo_pairs)[:2]))
    shapes = {(layer.out_features, layer.in_features) for layer in quantised_layers(policy).values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        token_logps(policy, batch)
    assert kept and not shapes.intersection(kept)


@pytest.mark.parametrize("level", LEVELS)
def test_a_weight_is_restored_for_a_product_and_no_more_often(level, tiny, photo_pairs, few_rows, monkeypatch):
    """Once in each direction, and where its layer is computed again; however many parts an MLP could have."""
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder, "int8", checkpointing=level)
    batch = pack(tokenize(policy, folder, chosen_pairs(photo_pairs)[:2]))
    assert batch.num_tokens > 100
    first = {name: m for name, m in quantised_layers(policy).items() if ".layers.0." in name and "visual" not in name}
    restored = Counter()
    real = QuantizedLinear.weight.fget
    names = {id(layer): name.rsplit(".", 2)[-2 if name.endswith("base_layer") else -1] for name, layer in first.items()}

    def restore(layer):
        restored.update([names[id(layer)]] if id(layer) in names else [])
        return real(layer)

    monkeypatch.setattr(QuantizedLinear, "weight", property(restore))
    token_logps(policy, batch).sum().backward()
    again = {
        "none": (), "attention": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj"),
        "full": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
    }  # fmt: skip
    # Nothing learns below the first layer: its input has no gradient.
    inner = ("o_proj", "down_proj")
    assert restored == {
        name: 1 + (name in again[level]) + (name in inner or name in ("gate_proj", "up_proj"))
        for name in names.values()
    }


def test_a_policy_without_quantised_layers_has_none(tiny):
    policy = load_policy(PolicyConfig(model=str(tiny("llava")), dtype="float32"), CPU)
    assert policy.quantized is None and not quantised_layers(policy)
    with contextlib.suppress(dataclasses.FrozenInstanceError):
        policy.quantized = 1  # type: ignore[misc]
    assert policy.quantized is None
