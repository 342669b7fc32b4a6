"""Which modules of a model run fused: those that compute what the kernels compute, tried on random input."""

import dataclasses
import functools
import inspect
import textwrap
from collections import Counter

import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from tests import oracles
from vapr.batches.packing import pack
from vapr.batches.tokenize import Processor
from vapr.config import LEVELS, LoraConfig, PolicyConfig, TrainConfig
from vapr.families import FAMILIES
from vapr.model import attention, patches
from vapr.model import decoder as decoder_module
from vapr.model.attention import segment_attention
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import Policy, frozen, load_policy

CPU = torch.device("cpu")
NORM, MLP, LAYER = "Qwen2_5_VLRMSNorm", "Qwen2MLP", "Qwen2_5_VLDecoderLayer"
VISION_MLP = "Qwen2_5_VLMLP"


def policy_of(folder, dtype: str = "float32", **options) -> Policy:
    return load_policy(PolicyConfig(model=str(folder), dtype=dtype, **options), CPU)


def assert_log_probs_are_those_of_the_untouched_model(policy: Policy, folder, photo_pairs) -> None:
    processor = Processor(str(folder), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if pair.images))])
    with torch.no_grad():
        got = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
        truth = oracles.pair_logps(oracles.load_model(folder, policy.family), policy.family, batch)
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_module_of_the_families_is_fused(family, dtype, tiny, device):
    policy = policy_of(tiny(family), dtype, lora=LoraConfig(rank=2))
    assert policy.kernels and policy.left_unfused == ()
    layer = policy.base.model.language_model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, policy.base.model.language_model.norm):
        assert "forward" in vars(module)


def one_plus_weight(self, x):
    """Gemma's norm."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (normed * (1 + self.weight.float())).type_as(x)


def larger_epsilon(self, x):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 0.01)
    return (normed * self.weight.float()).type_as(x)


def gelu(self, x):
    return nn.functional.gelu(x)


def gelu_gated(self, x):
    return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


def clamped(self, x):
    """gpt-oss and others bound what is multiplied; the activation comes second."""
    return self.down_proj(self.up_proj(x).clamp(-1, 1) * self.act_fn(self.gate_proj(x)))


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """Cohere's and GLM's rotation: planes of neighbours instead of halves."""

    def turn(x):
        half = x.shape[-1] // 2
        c, s = (table.unsqueeze(unsqueeze_dim)[..., :half] for table in (cos, sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)

    return turn(q), turn(k)


def backwards(q, k, cos, sin, unsqueeze_dim=1):
    return qwen_rotary(q, k, cos, -sin, unsqueeze_dim)


qwen_rotary = qwen.apply_rotary_pos_emb


def scaled_residual(self, hidden_states, **kwargs):
    """Granite multiplies what attention adds."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended * 0.5
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * 0.5


def normed_afterwards(self, hidden_states, **kwargs):
    """OLMo 2 and Gemma norm what attention gives before it is added."""
    attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
    hidden_states = hidden_states + self.input_layernorm(attended)
    return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("owner", "name", "value", "left"),
    [
        (qwen.Qwen2_5_VLRMSNorm, "forward", one_plus_weight, (NORM, LAYER)),
        (qwen.Qwen2_5_VLRMSNorm, "forward", larger_epsilon, (NORM, LAYER)),
        (qwen.Qwen2MLP, "forward", gelu_gated, (MLP,)),
        (qwen.Qwen2MLP, "forward", clamped, (MLP,)),
        (type(ACT2FN["silu"]), "forward", gelu, (VISION_MLP, MLP)),
        (qwen, "apply_rotary_pos_emb", interleaved, (LAYER,)),
        (qwen, "apply_rotary_pos_emb", backwards, (LAYER,)),
        (qwen.Qwen2_5_VLDecoderLayer, "forward", scaled_residual, (LAYER,)),
        (qwen.Qwen2_5_VLDecoderLayer, "forward", normed_afterwards, (LAYER,)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_module_that_computes_something_else_stays_as_it_is(owner, name, value, left, dtype, tiny, photo_pairs, device, monkeypatch):  # fmt: skip
    """And the log-probs are those of the untouched model, which computes the same."""
    monkeypatch.setattr(owner, name, value)
    policy = policy_of(tiny("qwen2_5_vl"), dtype)
    assert policy.left_unfused == left
    if dtype == "float32":
        assert_log_probs_are_those_of_the_untouched_model(policy, tiny("qwen2_5_vl"), photo_pairs)


def test_a_layer_that_differs_by_a_number_alone_is_found(tiny, photo_pairs, device, monkeypatch):
    """SmolLM3 and others rotate in most layers only. Tried is every kind of layer, not the first one."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(qwen.Qwen2_5_VLAttention.forward)))
    source = source[source.index("def forward") :].replace(
        "query_states, key_states = apply", "if self.rotates: query_states, key_states = apply"
    )
    assert "self.rotates" in source
    scope = {**vars(qwen)}
    exec(source, scope)
    init = qwen.Qwen2_5_VLAttention.__init__

    def __init__(self, config, layer_idx=None):
        init(self, config, layer_idx)
        self.rotates = layer_idx != 1

    monkeypatch.setattr(qwen.Qwen2_5_VLAttention, "__init__", __init__)
    monkeypatch.setattr(qwen.Qwen2_5_VLAttention, "forward", scope["forward"])
    policy = policy_of(tiny("qwen2_5_vl"))
    layers = policy.base.model.language_model.layers
    assert policy.left_unfused == (LAYER,)
    assert policy.written_out == set(range(len(layers))) - {1}
    assert_log_probs_are_those_of_the_untouched_model(policy, tiny("qwen2_5_vl"), photo_pairs)


def test_trying_draws_no_random_numbers_and_keeps_no_gradients(tiny, device):
    folder = tiny("llava")  # made here if no test before asked for it
    torch.manual_seed(5)
    policy = policy_of(folder, train=TrainConfig(language_model=True))
    drawn = torch.randn(3)
    torch.manual_seed(5)
    load_policy(PolicyConfig(model=str(folder), dtype="float32"), CPU, kernels="off")
    assert torch.equal(drawn, torch.randn(3))
    assert all(parameter.grad is None for parameter in policy.base.parameters())
    assert policy.base.model.language_model.config._attn_implementation == "vapr_segments"


def test_without_kernels_a_layer_is_transformers_own_to_the_bit(family, tiny, photo_pairs):
    """The decoder as patches.py writes it out, but for the last layer, which skips rows: the same bits, and gradients."""
    policy = load_policy(PolicyConfig(model=str(tiny(family)), dtype="float32"), CPU, kernels="off")
    processor = Processor(str(tiny(family)), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(pair) for pair in photo_pairs[:2]])
    decoder = policy.base.model.language_model
    assert policy.written_out == set(range(len(decoder.layers)))
    tables = decoder_module.rotary_tables(decoder, batch.position_ids[: FAMILIES[family].position_axes])[0]
    attend = functools.partial(segment_attention, segments=batch.attention, backend="sdpa")
    results = []
    for run in (functools.partial(patches._written_out, kernels=False), decoder_module.transformers_layer):
        torch.manual_seed(0)
        x = torch.randn(batch.num_tokens, decoder.config.hidden_size).requires_grad_()
        out = run(decoder.layers[0], x, tables, attend)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_launches_and_the_last_layer(tiny, photo_pairs, device, monkeypatch):
    """A step's operations: what reads the same rows is one; the last layer works on rows that are asked for."""
    policy = policy_of(tiny("qwen2_5_vl"))
    processor = Processor(str(tiny("qwen2_5_vl")), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    batch = dataclasses.replace(batch, attention=dataclasses.replace(batch.attention, branches=None))  # as on a GPU
    rows: dict[str, list[int]] = {}
    for module, name in (
        (decoder_module, "normed_attention"), (decoder_module, "normed_linears"), (decoder_module, "gated_mlp"), (patches, "add_rms_norm"), (patches, "rms_norm"), (patches, "swiglu"),
        (attention, "rotate"), (attention, "gather_keys_values"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, functools.partial(_counted, getattr(module, name), rows.setdefault(name, [])))
    token_logps(policy, batch)
    num_layers, few, every = len(policy.written_out), len(batch.predicting), batch.num_tokens
    queries = len(batch.last_queries.tokens)
    assert few <= queries < every
    assert rows == {
        "normed_attention": [every] * (num_layers - 1) if policy.kernels else [],
        "normed_linears": [
            *[every] * (0 if policy.kernels else num_layers - 1),
            every,
            queries,
        ],  # the last layer's keys and values, then queries
        "gated_mlp": [*[every] * (num_layers - 1), few],
        "add_rms_norm": [few],  # the last norm
        "rms_norm": [],
        "swiglu": [],
        "rotate": [*[every] * (num_layers - 1), queries],
        "gather_keys_values": [every] * num_layers,
    }


def _counted(function, rows, x, *arguments, **options):
    rows.append(len(x))
    return function(x, *arguments, **options)


def test_adapters_run_without_pefts_passes(tiny, photo_pairs, monkeypatch):
    """On any device: what reads the same rows as other layers runs with them, and the output projection by itself."""
    policy = policy_of(tiny("llava"), lora=LoraConfig(rank=2))
    processor = Processor(str(tiny("llava")), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    rows: list[int] = []
    monkeypatch.setattr(patches, "lora_linear", functools.partial(_counted, patches.lora_linear, rows))
    monkeypatch.setattr(lora.Linear, "forward", None)
    token_logps(policy, batch)
    assert len(rows) == len(policy.written_out)


PARTS = {
    "none": (),
    "attention": ("input_layernorm", "q_proj", "k_proj", "v_proj"),
    "mlp": ("post_attention_layernorm", "gate_proj", "up_proj"),
    "full": (
        "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm", "gate_proj", "up_proj",
    ),
}  # fmt: skip
"""What each level computes again where everything is trained: ``down_proj`` never, whose output nobody keeps."""


def count_calls(policy: Policy) -> Counter[str]:
    """Return a counter, to be filled, of how often linear layers and norms of the decoder run, by the end of names."""
    calls: Counter[str] = Counter()
    for name, module in policy.base.model.language_model.layers.named_modules():
        if not list(module.children()):
            end = name.rsplit(".", 1)[-1]
            module.register_forward_hook(lambda *_, end=end: calls.update([end]))
    return calls


@pytest.mark.parametrize("checkpointing", LEVELS)
def test_layers_are_recomputed_only_where_checkpointing_asks_for_it(checkpointing, tiny, photo_pairs):
    config = PolicyConfig(model=str(tiny("qwen2_vl")), dtype="float32", checkpointing=checkpointing)
    policy = load_policy(config, CPU, kernels="off")  # module by module, whose calls can be counted
    processor = Processor(str(tiny("qwen2_vl")), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    calls, num_layers = count_calls(policy), len(policy.written_out)
    with frozen(policy):
        token_logps(policy, batch)
    assert calls.pop("act_fn") == num_layers and len(calls) == 9 and set(calls.values()) == {num_layers}
    calls.clear()
    with torch.no_grad():
        token_logps(policy, batch)
    assert calls.pop("act_fn") == num_layers and len(calls) == 9 and set(calls.values()) == {num_layers}
    calls.clear()
    token_logps(policy, batch).sum().backward()
    calls.pop("act_fn")
    assert calls == {name: num_layers * (2 if name in PARTS[checkpointing] else 1) for name in calls}


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products: other shapes may round differently."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            self.shapes.append((func.__name__, *(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize("kernels", ["kernels", "pytorch"])
def test_scores_are_those_that_are_trained_on(kernels, checkpointing, tiny, photo_pairs, few_rows, request):
    """By the same products at every level, so that the first log-ratio is 0: the reference is scored without gradients."""
    device = request.getfixturevalue("device") if kernels == "kernels" else CPU
    config = PolicyConfig(
        model=str(tiny("qwen2_5_vl")), dtype="bfloat16", checkpointing=checkpointing, lora=LoraConfig(rank=2)
    )
    policy = load_policy(config, device, kernels="auto" if kernels == "kernels" else "off")
    processor = Processor(str(tiny("qwen2_5_vl")), policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(pair) for pair in photo_pairs if not pair.images][:2]).to(device)
    with Products() as trained:
        logps = token_logps(policy, batch)
    with torch.no_grad(), Products() as scored:
        assert torch.equal(token_logps(policy, batch), logps)
    assert len(scored.shapes) > 10 and scored.shapes == trained.shapes


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_layers_left_are_recomputed_whole_at_any_level(checkpointing, tiny, photo_pairs, monkeypatch):
    monkeypatch.setattr(qwen.Qwen2_5_VLDecoderLayer, "forward", scaled_residual)
    gradients = []
    for level in ("none", checkpointing):
        policy = policy_of(tiny("qwen2_5_vl"), checkpointing=level)
        assert not policy.written_out
        processor = Processor(str(tiny("qwen2_5_vl")), policy.base.config, "pil")
        batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if pair.images))])
        calls, num_layers = count_calls(policy), len(policy.base.model.language_model.layers)
        token_logps(policy, batch).sum().backward()
        assert calls["q_proj"] == calls["gate_proj"] == num_layers * (1 if level == "none" else 2)
        gradients.append({name: p.grad for name, p in policy.trained_parameters().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert oracles.worst_relative_error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("checkpointing", LEVELS)
def test_blocks_of_a_trained_tower_are_recomputed_at_level_full_alone(family, checkpointing, tiny, photo_pairs):
    """As transformers' own checkpointing does it, for one pass; and a frozen tower never."""
    for trained in (TrainConfig(vision_tower=True), TrainConfig()):
        policy = policy_of(tiny(family), checkpointing=checkpointing, train=trained)
        processor = Processor(str(tiny(family)), policy.base.config, "pil")
        batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if pair.images))])
        tower = policy.base.model.get_submodule(FAMILIES[family].tower[0])
        calls: list[str] = []
        for name, module in tower.named_modules():
            if name.endswith("1.mlp"):  # of the second block; its last layer is not run again to the end
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(""))
        token_logps(policy, batch).sum().backward()
        assert len(calls) == (2 if trained.vision_tower and checkpointing == "full" else 1)


def test_layers_left_without_kernels_attend_over_the_forest(tiny, photo_pairs, monkeypatch):
    """Also without kernels a layer that computes something else runs its own code, in every row, and is named."""
    monkeypatch.setattr(qwen.Qwen2_5_VLDecoderLayer, "forward", scaled_residual)
    policy = policy_of(tiny("qwen2_5_vl"))
    assert not policy.kernels and policy.left_unfused == (LAYER,) and not policy.written_out
    assert_log_probs_are_those_of_the_untouched_model(policy, tiny("qwen2_5_vl"), photo_pairs)
