"""What Qwen3-VL has that other families have not: head norms, DeepStack, resampled positions, experts."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tests import oracles
from tests.families.exported import exported_logps
from tests.runs import metrics
from vapr.batches.model_config import load_model_config
from vapr.batches.packing import pack
from vapr.batches.tokenize import Processor
from vapr.config import LoraConfig, PolicyConfig, TrainConfig
from vapr.data.images import read_image
from vapr.data.pairs import write_pairs
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Question
from vapr.families import FAMILIES
from vapr.families.qwen2_vl import Qwen2VL
from vapr.families.qwen3_vl import Qwen3VL
from vapr.model import attention
from vapr.model import policy as policy_module
from vapr.model.image_features import ImageFeatures
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import hidden_states, image_features, load_policy
from vapr.training import trainer
from vapr.training.checkpoint import save_model

CPU = torch.device("cpu")


@pytest.fixture(params=["qwen3_vl", "qwen3_vl_moe"])
def family(request) -> str:
    return request.param


def policy_of(folder, dtype="float32", **options):
    return load_policy(PolicyConfig(model=str(folder), dtype=dtype, **options), CPU)


def batch_of(folder, policy, pairs):
    processor = Processor(str(folder), policy.base.config, "pil")
    return pack([processor.tokenize_pair(pair) for pair in pairs])


def with_images(photo_pairs, num):
    return [pair for pair in photo_pairs if pair.images][:num]


def test_every_layer_is_written_out_and_joined(family, tiny, device):
    """The second layer of the MoE has no experts: its MLP is joined, those of the others run transformers' own code."""
    policy = policy_of(tiny(family), lora=LoraConfig(rank=2))
    layers = policy.decoder.layers
    assert policy.kernels and policy.left_unfused == () and policy.written_out == {0, 1, 2}
    assert all(layer.joint is not None for layer in layers)
    assert [layer.joint.gate_up is not None for layer in layers] == [family == "qwen3_vl", True, family == "qwen3_vl"]
    assert "forward" in vars(layers[0].self_attn.q_norm)


def test_experts_that_nearly_tie_do_not_keep_a_layer_from_being_written_out(corpus, tmp_path, device):
    """In bf16 a rounding chooses between them, and what a layer makes of a row then differs by more than rounding."""
    sizes = {"num_experts": 128, "num_experts_per_tok": 2, "hidden_size": 256}
    folder = build_tiny_policy("qwen3_vl_moe", tmp_path / "many", corpus, initializer_range=0.15, **sizes)
    policy = policy_of(folder, "bfloat16")
    assert policy.written_out == {0, 1, 2} and all(layer.joint is not None for layer in policy.decoder.layers)
    assert "forward" not in vars(policy.decoder.layers[0].mlp)


def test_each_part_of_deepstack_matters_and_the_mergers_belong_to_the_projector(family, tiny, photo_pairs):
    folder = tiny(family)
    policy = policy_of(folder, train=TrainConfig(language_model=False, projector=True))
    names = set(policy.trained_parameters())
    assert {name.split(".")[2] for name in names} == {"merger", "deepstack_merger_list"}
    batch = batch_of(folder, policy, with_images(photo_pairs, 1))
    features = image_features(policy, batch.images).detach()
    width = policy.base.config.get_text_config().hidden_size
    assert features.shape == (batch.images[0].num_tokens, 3 * width)
    out = hidden_states(policy, batch, features)
    for part in range(3):
        changed = features.clone()
        changed[:, part * width : (part + 1) * width] = 0.0
        assert (hidden_states(policy, batch, changed) - out).abs().max() > 0.01


def test_cached_features_are_the_computed_ones(family, tiny, photo_pairs, tmp_path):
    folder = tiny(family)
    policy = policy_of(folder)
    batch = batch_of(folder, policy, with_images(photo_pairs, 3))
    cache = ImageFeatures(policy, str(tmp_path))
    computed = cache.of_batch(batch)
    assert torch.equal(cache.of_batch(batch), computed) and cache.hits == len(batch.images)
    truth = token_logps(policy, batch)
    torch.testing.assert_close(token_logps(policy, batch, computed), truth, rtol=1e-6, atol=1e-6)


@pytest.fixture
def never_waits(monkeypatch):
    """Run code on tensors without values: whatever waits for one fails. What is computed from sizes has its values."""

    def arguments_of_real_sizes(policy, images):
        with _disable_current_modes():
            return FAMILIES[policy.family].tower_arguments(policy.base.model, images, CPU)

    monkeypatch.setattr(attention, "varlen_attention", lambda q, *others, **options: q.clone())
    monkeypatch.setattr(policy_module, "_tower_arguments", arguments_of_real_sizes)
    return lambda: FakeTensorMode(allow_non_fake_inputs=True)


def test_neither_tower_nor_decoder_waits_for_the_device(family, tiny, photo_pairs, never_waits, monkeypatch):
    folder = tiny(family)
    policy = policy_of(folder, "bfloat16")
    policy.base.model.visual.config._attn_implementation = attention.VISION_TOWER  # as on a GPU
    batch = batch_of(folder, policy, with_images(photo_pairs, 2))
    with never_waits():
        assert hidden_states(policy, batch).shape == (len(batch.predicting), policy.head.shape[1])
    monkeypatch.setattr(Qwen3VL, "tower_arguments", Qwen2VL.tower_arguments)  # which say nothing of resampling
    with pytest.raises(DynamicOutputShapeException), never_waits():
        hidden_states(policy, batch)


def test_pictures_of_odd_sizes_and_several_of_them(family, tiny):
    """A line, a column, a dot and an uneven picture, in one prompt: as transformers' own processor and model have it."""
    folder = tiny(family)
    config = transformers.AutoConfig.from_pretrained(folder)
    processor, theirs = Processor(str(folder), config, "pil"), oracles.hugging_face_processor(folder, family)
    drawn = np.random.default_rng(0).integers(0, 255, (300, 900, 3), np.uint8)
    pictures = [Image.fromarray(drawn[:height, :width]) for height, width in ((5, 900), (300, 2), (1, 1), (87, 131))]
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    images = tuple(processor.process(picture, "drawn") for picture in pictures)
    ids = processor.with_images(processor.tokenize_prompt(messages), images)
    assert ids.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(torch.cat([image.pixel_values for image in images]), expected["pixel_values"])
    assert [list(image.layout) for image in images] == expected["image_grid_thw"].tolist()
    for image, picture in zip(images, pictures, strict=True):
        assert processor.expected_image_tokens([picture.size]) == image.num_tokens
    runs = processor.image_runs(ids, images)
    positions = FAMILIES[family].positions(processor.files, len(ids), images, runs)
    model = oracles.load_model(folder, family)
    is_image = (expected["input_ids"] == config.image_token_id).int()
    rope, _ = model.model.get_rope_index(expected["input_ids"], is_image, image_grid_thw=expected["image_grid_thw"])
    assert torch.equal(torch.from_numpy(positions), rope[:, 0])
    policy = policy_of(folder)
    with torch.no_grad():
        out = model.model.get_image_features(expected["pixel_values"], expected["image_grid_thw"])
        parts = [out.pooler_output, *out.deepstack_features]
        truth = torch.cat([torch.cat(list(part)) if isinstance(part, tuple | list) else part for part in parts], dim=1)
        difference = (image_features(policy, images) - truth).abs().max()
        assert difference < 1e-5 * truth.abs().max()


def test_an_early_token_or_a_picture_changed_changes_the_result(family, tiny, photo_pairs):
    folder = tiny(family)
    policy = policy_of(folder)
    (pair,) = with_images(photo_pairs, 1)
    turned = {"role": "user", "content": [{"type": "text", "text": "Well then."}, *pair.prompt[0]["content"]]}
    other = next(p for p in photo_pairs if p.images and p.images[0] != pair.images[0])
    variants = (
        pair,
        dataclasses.replace(pair, prompt=(turned, *pair.prompt[1:])),
        dataclasses.replace(pair, images=other.images[:1]),
    )
    logps = []
    for variant in variants:
        batch = batch_of(folder, policy, [variant])
        logps.append(completion_logps(per_completion(token_logps(policy, batch), batch), batch))
    assert all((logps[0] - changed).abs().max() > 1e-3 for changed in logps[1:])


def test_a_tower_too_deep_for_its_decoder_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen3_vl"), tmp_path / "shallow")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="adds image features after 2 decoder layers, and needs more than its 2 layers"):
        policy_of(folder)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 14), ("merge_size", 1), ("temporal_patch_size", 1)])
def test_a_processor_that_cuts_other_patches_than_the_tower_takes(name, value, tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen3_vl"), tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(UserError, match=rf"{name} is {value} but .* in preprocessor_config.json set {name}: \d+$"):
        Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")


def test_a_picture_that_is_refused_names_itself(tiny, tmp_path):
    """Longer than 200 times its height, which Qwen's image processor refuses."""
    folder = tiny("qwen3_vl")
    processor = Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")
    with pytest.raises(UserError, match="image long.png is refused by the image processor: absolute aspect ratio"):
        processor.process(Image.new("RGB", (900, 3)), "long.png")


def test_adapters_leave_experts_alone_and_a_run_says_so(tiny):
    """And dense models have nothing to say."""
    policy = policy_of(tiny("qwen3_vl_moe"), lora=LoraConfig(rank=2, targets=["q_proj", "v_proj"]))
    assert policy.adapted == ["q_proj", "v_proj"]
    router, adapters = FAMILIES["qwen3_vl_moe"].notes(adapted=policy.adapted)
    assert router.startswith("the router's auxiliary loss is off")
    assert adapters.startswith("adapters reach the linear layers q_proj, v_proj; experts and routers")
    assert len(FAMILIES["qwen3_vl_moe"].notes(adapted=[])) == 1
    assert FAMILIES["qwen3_vl"].notes(adapted=["q_proj"]) == []
    with pytest.raises(UserError, match="no trained linear layer is called 'gate_up_proj'"):
        policy_of(tiny("qwen3_vl_moe"), lora=LoraConfig(rank=2, targets=["gate_up_proj"]))
    everything = policy_of(tiny("qwen3_vl_moe")).trained_parameters()
    assert {"gate.weight", "experts.gate_up_proj", "experts.down_proj"} <= {
        name.split(".mlp.")[1] for name in everything if ".mlp." in name
    }


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_run_from_cached_features_to_an_export_that_transformers_loads(family, lora, make_config, photo_rows, photo_root, tmp_path, capsys):  # fmt: skip
    """Untouched transformers gives the exported model the log-probs that the run logged."""
    write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
    files = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    features = {"cache": True, "cache_dir": str(tmp_path / "features")}
    config = make_config(
        family=family, lora=lora, data={**files, "image_root": str(photo_root), "workers": 0}, features=features
    )
    trainer.train(config)
    said = capsys.readouterr().out
    assert said.count("the router's auxiliary loss is off") == int(family == "qwen3_vl_moe")
    assert said.count("experts and routers are single parameters") == int(family == "qwen3_vl_moe" and lora)
    model, (chosen, rejected) = exported_logps(config, family, photo_root, tmp_path / "out")
    logged = [entry for entry in metrics(config) if "eval/loss" in entry]
    assert logged[0]["eval/logps/chosen"] != pytest.approx(logged[-1]["eval/logps/chosen"], abs=5e-3)  # it learned
    assert float(chosen) == pytest.approx(logged[-1]["eval/logps/chosen"], abs=1e-3)
    assert float(rejected) == pytest.approx(logged[-1]["eval/logps/rejected"], abs=1e-3)
    start = oracles.load_model(Path(config.policy.model), family).state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    assert any("q_proj" in name for name in changed) and not any("visual" in name for name in changed)
    assert any(".experts." in name for name in changed) == (family == "qwen3_vl_moe" and not lora)


def test_batched_answers_are_those_of_each_question_alone(family, tiny, photo_pairs):
    """As ``vapr eval`` asks several questions at once, padded, with one picture, two and none."""
    folder = tiny(family)
    processor = Processor(str(folder), load_model_config(str(folder)), "pil")
    theirs = oracles.hugging_face_processor(folder, family)
    model = oracles.CLASSES[family].from_pretrained(folder, dtype=torch.float32).eval()
    shown = {len(pair.images): pair.images for pair in photo_pairs}
    questions = [
        Question(benchmark="pope", id=f"q{n}", question=f"What is in {n} pictures?", answer=None, images=shown[n])
        for n in (1, 0, 2)
    ]  # fmt: skip
    answers = answer_questions(model, processor, questions, Settings(max_new_tokens=8, batch_size=3), quiet=True)
    for question, answer in zip(questions, answers, strict=True):
        content = [{"type": "image", "image": read_image(image)} for image in question.images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.question}]}]
        inputs = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.prediction == processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert len({answer.prediction for answer in answers}) == 3


def test_a_spare_image_changes_nothing(family, tiny, photo_pairs):
    """The smallest picture, which keeps ranks of ZeRO 3 in step, has weight 0."""
    folder = tiny(family)
    policy = policy_of(folder, train=TrainConfig(language_model=False, projector=True))
    batch = batch_of(folder, policy, [next(pair for pair in photo_pairs if not pair.images)])
    spare = FAMILIES[family].spare_image(policy.base.config)
    assert spare.num_tokens == len(image_features(policy, [spare])) == 1
    out = hidden_states(policy, batch, spare=[spare])
    assert torch.equal(out, hidden_states(policy, batch))
    out.sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in policy.trained_parameters().values())


def test_experts_are_saved_as_they_are_where_parameters_were_emptied(tiny, tmp_path):
    """As ZeRO 3 does; transformers would transpose what has another shape than its parameter."""
    policy = policy_of(tiny("qwen3_vl_moe"))
    weights = {name: weight.clone() for name, weight in policy.base.state_dict().items()}
    for parameter in policy.base.parameters():
        parameter.data = parameter.new_empty(0)
    save_model(policy, tmp_path / "saved", weights)
    again = oracles.load_model(tmp_path / "saved", "qwen3_vl_moe").state_dict()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(
        torch.equal(again[name], weight) and torch.equal(saved[name], weight) for name, weight in weights.items()
    )
