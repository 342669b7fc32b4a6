"""What Gemma 3 has that other families have not: line breaks around images that join the text's, blocks, windows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import oracles
from tests.families.exported import exported_logps
from tests.runs import metrics
from vapr.batches.model_config import load_model_config
from vapr.batches.packing import pack
from vapr.batches.tokenize import Processor
from vapr.config import PolicyConfig, TrainConfig
from vapr.data.images import read_image
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Question
from vapr.families import FAMILIES
from vapr.model.policy import hidden_states, image_features, load_policy
from vapr.training import trainer

CPU = torch.device("cpu")
FAMILY = "gemma3"


@pytest.fixture
def folder(tiny) -> Path:
    return tiny(FAMILY)


@pytest.fixture
def processor(folder) -> Processor:
    return Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")


IMAGE = {"type": "image"}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


@pytest.mark.parametrize(
    ("content", "begins"),
    [
        ([IMAGE, text("What is it?")], ["\n\n\n", "<start_of_image>"]),  # that of the turn joins two of the image
        ([text("Look:"), IMAGE, text("What is it?")], None),
        ([IMAGE, IMAGE, text("Which?")], ["\n\n\n", "<start_of_image>"]),
        ([text("First"), IMAGE, text("second"), IMAGE], None),
    ],
    ids=["before", "within", "side by side", "at the end"],
)
@pytest.mark.parametrize("system", [False, True])
def test_line_breaks_of_an_image_join_those_of_the_text(content, begins, system, folder, processor, photo_root):
    theirs = oracles.hugging_face_processor(folder, FAMILY)
    picture = read_image(photo_root / "coffee.png")
    messages = [{"role": "user", "content": content}]
    if system:
        messages = [{"role": "system", "content": [text("Be brief.")]}, *messages]
    shown = [
        {**m, "content": [{**p, "image": picture} if p is IMAGE else p for p in m["content"]]} for m in messages
    ]  # fmt: skip
    expected = theirs.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
    images = tuple(processor.process(picture, "coffee.png") for part in content if part is IMAGE)
    ids = processor.with_images(processor.tokenize_prompt(messages), images)
    assert ids.tolist() == expected["input_ids"][0]
    runs = processor.image_runs(ids, images)
    is_image = np.zeros(len(ids), int)
    for ((start, length),) in runs:
        is_image[start : start + length] = 1
    assert length == 9 and is_image.tolist() == expected["token_type_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    if begins and not system:
        start = tokens.index("<start_of_image>")
        assert tokens[start - 1 : start + 1] == begins
    if content[:2] == [IMAGE, IMAGE]:
        end = tokens.index("<end_of_image>")
        assert tokens[end : end + 3] == ["<end_of_image>", "\n\n\n\n", "<start_of_image>"]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2000, 3), (84, 84), (85, 83)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_of_pictures_of_odd_sizes_and_modes(size, mode, folder, processor):
    """Transparency, too, becomes what Gemma3Processor makes of it, although the model's file leaves that open."""
    assert json.loads((folder / "processor_config.json").read_text())["image_processor"]["do_convert_rgb"] is None
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 4), np.uint8), "RGBA").convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    theirs = oracles.hugging_face_processor(folder, FAMILY)
    expected = theirs(images=[picture], text="<start_of_image>", return_tensors="np")["pixel_values"]
    ours = processor.process(picture, "odd.png")
    assert np.array_equal(ours.pixel_values.numpy(), expected)
    assert ours.num_tokens == 9
    assert processor.expected_image_tokens([size]) == 9 + 2 + 2  # two marks and two empty lines


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"image_seq_length": 16}, "16 tokens in the prompt but 9 features .* set image_seq_length: 9$"),
        ("processor_config.json", {"image_processor": {"size": {"height": 56, "width": 84}}}, "gives 84 x 56 pixels but the vision tower takes 84 x 84; correct size"),
        ("processor_config.json", {"image_processor": {"do_pan_and_scan": True}}, "sets do_pan_and_scan, .* set it to null$"),
        ("tokenizer_config.json", {"boi_token": None}, "names no boi_token; Gemma 3's does$"),
        ("tokenizer_config.json", {"image_token": "<mask>"}, r"image_token is <mask>, but image_token_index .* is <image_soft_token>; correct one"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_each_other_are_one_line(file, change, message, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((other / file).read_text())
    for name, value in change.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
        if value is None:
            del settings[name]
    if file == "tokenizer_config.json":
        settings.pop("extra_special_tokens", None)
        settings.pop("model_specific_special_tokens", None)
    (other / file).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as raised:
        Processor(str(other), transformers.AutoConfig.from_pretrained(other), "pil")
    assert "\n" not in str(raised.value)


def test_a_placeholder_in_the_text_is_refused(processor):
    asked = [{"role": "user", "content": [text("What is <start_of_image> for?")]}]
    with pytest.raises(UserError, match="holds 1 '<start_of_image>' for 0 image"):
        processor.with_images(processor.tokenize_prompt(asked), ())


def test_image_tokens_are_sequences_that_look_both_ways(processor, photo_pairs):
    """One of the pair's prompt, which is shared; the rejected completion has the block among its keys only."""
    pair = next(pair for pair in photo_pairs if len(pair.images) == 1 and len(pair.prompt) == 1)
    path = processor.tokenize_pair(pair).paths[0]
    ((start, length),) = path.image_runs[0]
    assert path.blocks == ((start, length),)
    attention = pack([processor.tokenize_pair(pair)], "pair").attention
    assert attention.both_ways == (False, True, False, False)
    assert attention.lengths_q[:2] == (start, length) and attention.lengths_k[:2] == (start, start + length)
    assert attention.lengths_k[2] == len(path.input_ids)
    texts = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    assert texts.attention.both_ways is None


def test_an_image_token_sees_later_ones_of_its_image_and_no_later_text(folder, processor, photo_pairs):
    policy = load_policy(PolicyConfig(model=str(folder), dtype="float32"), CPU)
    pair = next(pair for pair in photo_pairs if len(pair.images) == 1 and len(pair.prompt) == 1)
    batch = pack([processor.tokenize_pair(pair)], "pair")
    seen = {}

    def keep(module, arguments, output):
        seen["out"] = output[0] if isinstance(output, tuple) else output

    policy.decoder.layers[0].register_forward_hook(keep)
    tokens, features = batch.image_tokens.tolist(), image_features(policy, batch.images)
    outs = []
    for changed in (features, torch.cat([features[:-1], features[-1:] + 1])):
        with torch.no_grad():
            hidden_states(policy, batch, changed)
        outs.append(seen["out"].reshape(batch.num_tokens, -1))
    moved = (outs[0] - outs[1]).abs().amax(1) > 1e-6
    assert moved[tokens].all() and not moved[: tokens[0]].any()
    assert moved[tokens[-1] + 1]  # the first text behind it
    assert not moved[tokens[-1] + 20]  # its window ends before the image, in this first layer


def test_what_runs_on_kernels(folder, device):
    """Norms, those of heads too, and the head of the model; a layer is transformers' own code."""
    policy = load_policy(PolicyConfig(model=str(folder), dtype="float32"), CPU)
    assert policy.kernels and not policy.written_out
    assert policy.left_unfused == ("Gemma3DecoderLayer",)
    layer = policy.decoder.layers[0]
    assert all(
        "forward" in vars(norm)
        for norm in (layer.self_attn.q_norm, layer.pre_feedforward_layernorm, policy.decoder.norm)
    )


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_from_cached_features_to_an_export_that_transformers_loads(lora, make_config, photo_rows, photo_root, tmp_path):
    """Untouched transformers gives the exported model the log-probs that the run logged, with features from a cache."""
    write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
    files = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    features = {"cache": True, "cache_dir": str(tmp_path / "features")}
    data = {**files, "image_root": str(photo_root), "workers": 0}
    config = make_config(family=FAMILY, lora=lora, data=data, features=features)
    trainer.train(config)
    _, (chosen, rejected) = exported_logps(config, FAMILY, photo_root, tmp_path / "out")
    first, *_, last = (entry for entry in metrics(config) if "eval/loss" in entry)
    assert abs(first["eval/logps/chosen"] - last["eval/logps/chosen"]) > 5e-3  # it learned
    assert float(chosen) == pytest.approx(last["eval/logps/chosen"], abs=1e-3)
    assert float(rejected) == pytest.approx(last["eval/logps/rejected"], abs=1e-3)


def test_answers_in_batches_are_those_of_each_question_alone(folder, photo_pairs):
    """Padded, with one picture, two and none."""
    processor = Processor(str(folder), load_model_config(str(folder)), "pil")
    theirs = oracles.hugging_face_processor(folder, FAMILY)
    model = oracles.CLASSES[FAMILY].from_pretrained(folder, dtype=torch.float32).eval()
    # With random weights and the embeddings for a head it would only say its last token again.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    shown = {len(pair.images): pair.images for pair in photo_pairs}
    questions = [
        Question(benchmark="pope", id=f"q{n}", question=f"What is in {n} pictures?", answer=None, images=shown[n])
        for n in (1, 0, 2)
    ]
    answers = answer_questions(model, processor, questions, Settings(max_new_tokens=8, batch_size=3), quiet=True)
    for question, answer in zip(questions, answers, strict=True):
        content = [{**IMAGE, "image": read_image(image)} for image in question.images]
        inputs = theirs.apply_chat_template(
            [{"role": "user", "content": [*content, text(question.question)]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.prediction == processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert len({answer.prediction for answer in answers}) == 3


def test_a_spare_image_changes_nothing(folder, processor, photo_pairs):
    policy = load_policy(
        PolicyConfig(model=str(folder), dtype="float32", train=TrainConfig(language_model=False, projector=True)), CPU
    )
    batch = pack([processor.tokenize_pair(next(pair for pair in photo_pairs if not pair.images))])
    spare = FAMILIES[FAMILY].spare_image(policy.base.config)
    assert spare.num_tokens == len(image_features(policy, [spare])) == 9
    assert torch.equal(hidden_states(policy, batch, spare=[spare]), hidden_states(policy, batch))
