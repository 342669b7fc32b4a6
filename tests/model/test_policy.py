"""Which models are taken, which are refused and how, and what is trained."""

import copy
import dataclasses
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vapr.batches import model_config
from vapr.batches.model_config import TRANSFORMERS, load_model_config
from vapr.batches.packing import pack
from vapr.batches.tokenize import Processor
from vapr.config import LoraConfig, PolicyConfig, TrainConfig
from vapr.errors import UserError
from vapr.model import patches
from vapr.model import policy as model_module
from vapr.model.attention import choose_backend
from vapr.model.logps import token_logps
from vapr.model.policy import hidden_states, image_features, load_policy
from vapr_kernels import launch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.PaliGemmaConfig(), "lets a prompt's text see later text .prefix-LM."),
        (transformers.Gemma3nConfig(), "takes? keys and values from others, and embeddings for each layer"),
        (transformers.Gemma4Config(), "takes? keys and values from others, and embeddings for each layer"),
        (
            transformers.Gemma3Config(text_config=transformers.Gemma3TextConfig(final_logit_softcapping=30.0)),
            "sets final_logit_softcapping, which transformers' Gemma3ForConditionalGeneration does not apply",
        ),
        (
            transformers.Gemma3Config(text_config=transformers.Gemma3TextConfig(attn_logit_softcapping=50.0)),
            "sets attn_logit_softcapping, which transformers' Gemma3ForConditionalGeneration does not apply",
        ),
        (
            transformers.Gemma3Config(text_config=transformers.Gemma3TextConfig(use_bidirectional_attention=True)),
            "lets all tokens see later ones",
        ),
        (transformers.Qwen3NextConfig(), "recurrent layers .linear_attention."),
        (transformers.Qwen3_5Config(), "recurrent layers .linear_attention.; packing cannot fork their state"),
        (transformers.MambaConfig(), "recurrent layers"),
        (transformers.LlamaConfig(), "is not supported; vapr trains llava, "),
        (
            transformers.LlavaConfig(text_config=transformers.LlamaConfig(layer_types=["chunked_attention"] * 32)),
            "layers whose attention packing does not support .chunked_attention.",
        ),
        (
            transformers.LlavaConfig(text_config=transformers.PhiConfig(sliding_window=64)),
            "a sliding_window in config.json but no layer_types",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_cannot_be_packed_are_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0.dev0", "5.25.0", "6.0.0"])
def test_a_version_of_transformers_that_was_never_tested_is_refused(version, tiny, monkeypatch):
    monkeypatch.setattr(model_config.transformers, "__version__", version)
    with pytest.raises(UserError, match=f"transformers {version} is installed, .* pip install 'transformers>=5.17,<5.25'"):  # fmt: skip
        load_policy(PolicyConfig(model=str(tiny("llava")), dtype="float32"), CPU)


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0", "5.24.3"])
def test_versions_of_transformers_that_are_taken(version, tiny, monkeypatch):
    monkeypatch.setattr(model_config.transformers, "__version__", version)
    assert load_model_config(str(tiny("llava"))).model_type == "llava"


def test_the_package_asks_for_the_versions_that_are_taken():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"transformers{TRANSFORMERS}" in project["dependencies"]


def test_a_model_with_missing_weights_is_refused(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if "gate_proj" in name)
    save_file(
        {k: v for k, v in weights.items() if k != name}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks weights or has wrong shapes, first .*gate_proj"):
        load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="float32"), CPU)


def test_cut_weights_are_one_line(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(UserError, match="does not load .*header"):
        load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="float32"), CPU)


def test_pickled_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not load"):
        load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="float32"), CPU)


def test_adapters_sit_on_the_trained_parts_and_not_on_the_head(family, tiny):
    def adapted(**train) -> set[str]:
        config = PolicyConfig(
            model=str(tiny(family)), dtype="float32", lora=LoraConfig(rank=2), train=TrainConfig(**train)
        )
        return {name.split(".lora_")[0] for name in load_policy(config, CPU).trained_parameters()}

    language = adapted()
    assert {name.rsplit(".", 1)[1] for name in language} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(language) == 3 * 7 and all(".language_model." in name for name in language)
    projector = adapted(language_model=False, projector=True)
    assert projector and all("merger" in name or "projector" in name for name in projector)
    assert not adapted(vision_tower=True, language_model=False) & (language | projector)


def test_lora_targets_by_ending(tiny):
    config = PolicyConfig(
        model=str(tiny("qwen2_vl")), dtype="float32", lora=LoraConfig(rank=2, targets=["q_proj", "v_proj"])
    )
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in load_policy(config, CPU).trained_parameters()}
    assert names == {"q_proj", "v_proj"}


def test_adapters_are_the_compute_dtype_and_off_means_off(tiny):
    policy = load_policy(PolicyConfig(model=str(tiny("qwen2_vl")), dtype="bfloat16", lora=LoraConfig(rank=2)), CPU)
    assert {p.dtype for p in policy.trained_parameters().values()} == {torch.bfloat16}
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_B" in name:
                parameter.fill_(1.0)
    layer = policy.base.model.language_model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with policy.adapters_off():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_the_last_layer_works_on_what_predicts_only(family, lora, tiny, photo_pairs):
    folder = str(tiny(family))
    policy = load_policy(PolicyConfig(model=folder, dtype="float32", lora=lora), CPU, kernels="off")
    processor = Processor(folder, policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(pair) for pair in photo_pairs[:2]])
    predicting, queries = batch.predicting.tolist(), batch.last_queries.tokens.tolist()
    assert set(predicting) <= set(queries) and len(queries) < batch.num_tokens / 2
    rows: dict[str, int] = {}
    layers = policy.base.model.language_model.layers
    for name, module in (
        ("first mlp", layers[0].mlp.down_proj), ("last mlp", layers[-1].mlp.down_proj), ("last k", layers[-1].self_attn.k_proj),
        ("last q", getattr(layers[-1].self_attn.q_proj, "base_layer", None)),
    ):  # fmt: skip
        if module is not None:
            module.register_forward_hook(lambda m, inputs, out, name=name: rows.update({name: inputs[0].shape[-2]}))
    token_logps(policy, batch)
    assert rows["first mlp"] == rows["last k"] == batch.num_tokens
    assert rows["last mlp"] == len(predicting) and rows.get("last q", len(queries)) == len(queries)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_the_model_called_as_transformers_would(kernels, tiny, monkeypatch):
    """Fused or not, and after packed batches: every row counts, and queries and keys are rotated."""
    monkeypatch.setattr(launch, "interpret", launch.installed and kernels == "auto")
    folder = str(tiny("qwen2_5_vl"))
    policy = load_policy(PolicyConfig(model=folder, dtype="float32"), CPU, kernels=kernels)
    policy.base.model.language_model.config._attn_implementation = "sdpa"
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    input_ids = torch.arange(20, 37)[None]
    with torch.no_grad():
        got, true = (model(input_ids=input_ids, use_cache=False).logits for model in (policy.base, plain))
    torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_copy_of_the_model_is_its_own(kernels, tiny, photo_pairs, monkeypatch):
    monkeypatch.setattr(launch, "interpret", launch.installed and kernels == "auto")
    folder = str(tiny("qwen2_vl"))
    policy = load_policy(PolicyConfig(model=folder, dtype="float32"), CPU, kernels=kernels)
    copied = dataclasses.replace(policy, base=copy.deepcopy(policy.base))
    processor = Processor(folder, policy.base.config, "pil")
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    with torch.no_grad():
        before = token_logps(copied, batch)
        for parameter in policy.base.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(token_logps(copied, batch), before) and token_logps(policy, batch).isnan().all()


def test_kernels_that_cannot_run_are_not_used(tiny, monkeypatch):
    """On a CPU transformers' layers stay as they are; under the interpreter they are fused, unless switched off."""
    config = PolicyConfig(model=str(tiny("llava")), dtype="float32")
    is_fused = lambda policy: "forward" in vars(policy.base.model.language_model.layers[0].mlp)
    assert not load_policy(config, CPU).kernels and not is_fused(load_policy(config, CPU))
    monkeypatch.setattr(launch, "interpret", launch.installed)
    assert load_policy(config, CPU).kernels is is_fused(load_policy(config, CPU)) is launch.installed
    off = load_policy(config, CPU, kernels="off")
    assert not off.kernels and not is_fused(off)


def test_dropout_is_switched_off(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
    config.save_pretrained(tmp_path / "model")
    policy = load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="float32"), CPU)
    attention = [m for m in policy.base.modules() if hasattr(m, "attention_dropout")]
    assert attention and all(m.attention_dropout == 0 for m in attention)


def test_backends():
    assert choose_backend("auto", CPU, torch.bfloat16) == "sdpa"
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == "sdpa"
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16) in ("varlen", "flash-attn")
    with pytest.raises(UserError, match="varlen needs a CUDA device and dtype bfloat16"):
        choose_backend("varlen", CPU, torch.bfloat16)


def in_bf16(count: int) -> float:
    return torch.tensor(float(count), dtype=torch.bfloat16).item()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_gradients_of_what_occurs_often_add_up_in_bf16(family, tiny, photo_pairs, monkeypatch):
    """A gradient of 1 at each of n places is n, for tokens and for image features; sums in bf16 stop at 256."""
    folder = str(tiny(family))
    policy = load_policy(PolicyConfig(model=folder, dtype="bfloat16", train=TrainConfig(projector=True)), CPU)
    pair = Processor(folder, policy.base.config, "pil").tokenize_pair(photo_pairs[0])
    batch = pack([pair] * 300, share="none")
    assert len(batch.images) == 1
    language_model = policy.base.model.language_model
    monkeypatch.setattr(model_module, "run_decoder", lambda decoder, embeds, *_, **__: embeds)
    features = torch.zeros(pair.paths[0].images[0].num_tokens, language_model.config.hidden_size, dtype=torch.bfloat16)
    features.requires_grad_()
    hidden_states(policy, batch, features).sum().backward()
    text = torch.ones(batch.num_tokens, dtype=torch.bool)
    text[batch.image_tokens] = False
    counts = Counter(batch.input_ids[text].tolist())
    assert max(counts.values()) > 2000
    gradient = policy.base.get_input_embeddings().weight.grad
    assert all(set(row.tolist()) == {in_bf16(counts[token])} for token, row in enumerate(gradient))
    assert set(features.grad.flatten().tolist()) == {in_bf16(600)}


def test_the_embedding_gradient_of_4000_equal_tokens():
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(9, 5, padding_idx=2, dtype=dtype)
        model_module._embed(embedding, torch.tensor([3] * 4000 + [2, 7])).sum().backward()
        gradients[dtype] = embedding.weight.grad
    assert gradients[torch.bfloat16][3].tolist() == [4000.0] * 5
    assert torch.equal(gradients[torch.bfloat16].double(), gradients[torch.float64])
    assert gradients[torch.float64][2].tolist() == [0.0] * 5  # the padding's, as in nn.Embedding


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_gradient_of_4000_equal_patches(family, tiny, monkeypatch):
    """As a matrix product, not as a convolution, which is slower on a CPU."""
    train = TrainConfig(vision_tower=True)
    policy = load_policy(PolicyConfig(model=str(tiny(family)), dtype="bfloat16", train=train), CPU)
    embed = policy.base.model.visual.patch_embed
    monkeypatch.setattr(torch.nn.Conv3d, "forward", None)
    embed(torch.ones(4000, embed.proj.weight[0].numel(), dtype=torch.bfloat16)).sum().backward()
    assert set(embed.proj.weight.grad.flatten().tolist()) == {4000.0}


def test_the_gradient_of_the_bias_of_4000_equal_patches():
    convolution = torch.nn.Conv3d(3, 5, (2, 2, 2), dtype=torch.bfloat16)
    patches.patches_by_matmul(convolution, torch.ones(4000, 3, 2, 2, 2, dtype=torch.bfloat16)).sum().backward()
    assert set(convolution.bias.grad.tolist()) == {4000.0}


def test_unused_layers_of_llavas_tower_do_not_run(tiny, photo_pairs):
    """Features are those of the untouched model, whose last layer computes what nobody reads."""
    folder = str(tiny("llava"))
    policy = load_policy(PolicyConfig(model=folder, dtype="float32"), CPU)
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = Processor(folder, policy.base.config, "pil")
    (image,) = processor.tokenize_pair(next(pair for pair in photo_pairs if pair.images)).paths[0].images
    with torch.no_grad():
        expected = plain.model.get_image_features(image.pixel_values).pooler_output[0]
        torch.testing.assert_close(image_features(policy, [image]), expected, rtol=1e-5, atol=1e-5)
        for name, parameter in policy.base.model.vision_tower.named_parameters():
            if f"layers.{plain.config.vision_config.num_hidden_layers - 1}." in name:
                parameter.fill_(torch.nan)
        torch.testing.assert_close(image_features(policy, [image]), expected, rtol=1e-5, atol=1e-5)
