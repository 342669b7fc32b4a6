"""Qwen's vision tower with its GPU paths, run on the CPU: outputs and saved weights of transformers' own modules."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from vapr.model import attention, patches
from vapr.model.attention import VISION_TOWER
from vapr_kernels import naive

FAMILIES = {
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig),
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLConfig),
}
GRID = torch.tensor([[1, 8, 12], [1, 4, 4]])  # patches of two images


def cpu_varlen(q, k, v, bounds, *, scale, causal, backend):
    """Explicit softmax inside each sequence."""
    cu_q, _, max_q, max_k = bounds
    outs = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) * scale
        outs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[start:end]))
    assert not causal and max_q == max_k == int(cu_q.diff().max())
    return torch.cat(outs)


@pytest.fixture
def model(request, monkeypatch):
    """A tiny model whose tower is frozen; the gated MLPs of Qwen2.5-VL are 52 wide, not a multiple of 8."""
    monkeypatch.setattr(attention, "_varlen", cpu_varlen)
    model_class, config_class = FAMILIES[request.param]
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 3, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 52}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    if request.param == "qwen2_vl":
        vision = {"depth": 3, "num_heads": 2, "embed_dim": 32, "hidden_size": 32}
    torch.manual_seed(0)
    model = model_class(config_class(text_config=text, vision_config=vision)).requires_grad_(False)
    for parameter in model.model.visual.parameters():
        parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    return model


def features(model):
    pixels = torch.randn(int(GRID.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(1))
    return model.model.visual(pixels, grid_thw=GRID).pooler_output


def fuse(model):
    model.model.visual.config._attn_implementation = VISION_TOWER
    return patches.patch_tower(model.model.visual)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_features_are_those_of_transformers(model):
    model.model.visual.config._attn_implementation = "eager"
    truth = features(model)
    assert fuse(model) == []
    blocks = model.model.visual.blocks
    assert all("forward" in vars(block.attn) for block in blocks)
    torch.testing.assert_close(features(model), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_padded_weights_keep_their_names_shapes_and_values(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    mlp = model.model.visual.blocks[0].mlp
    assert mlp.padded_down.shape == (32, 56) and mlp.padded_gate.shape == (56, 32)
    assert mlp.padded_down[:, 52:].abs().sum() == 0
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(value.shape == (32, 52) for value in saved.values()) == 3  # down_proj of each block
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_weights_loaded_later_are_those_that_run(model):
    other = copy.deepcopy(model)
    fuse(model)
    new = {name: torch.full_like(value, 0.01) for name, value in model.state_dict().items()}
    model.load_state_dict(new)
    got = features(model)
    other.load_state_dict(new)
    other.model.visual.config._attn_implementation = "eager"
    torch.testing.assert_close(got, features(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_a_trained_tower_keeps_its_mlps_and_its_gradients(model):
    model.model.visual.config._attn_implementation = "eager"
    weights = {name: p.requires_grad_() for name, p in model.model.visual.named_parameters()}
    truth = torch.autograd.grad(features(model).square().sum(), list(weights.values()))
    fuse(model)
    assert not any("forward" in vars(block.mlp) for block in model.model.visual.blocks)
    got = torch.autograd.grad(features(model).square().sum(), list(weights.values()))
    for name, g, t in zip(weights, got, truth, strict=True):
        assert (g - t).norm() <= 1e-4 * t.norm() + 1e-6, name


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_modules_that_compute_something_else_are_left(model, monkeypatch):
    """A tower whose MLP is no SwiGLU, and whose attention turns the other way."""
    for block in model.model.visual.blocks:
        block.mlp.act_fn = nn.GELU()
    monkeypatch.setattr(patches, "rotate", lambda x, cos, sin: naive.rotary(x, cos, -sin))
    model.model.visual.config._attn_implementation = "eager"
    truth = features(model)
    assert fuse(model) == ["Qwen2_5_VLVisionAttention", "Qwen2_5_VLMLP"]
    torch.testing.assert_close(features(model), truth, rtol=1e-4, atol=1e-5)
