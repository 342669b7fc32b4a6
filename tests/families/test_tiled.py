"""Families that cut pictures into tiles: odd sizes, several pictures, text models, caches, generation, files, mistakes."""

import dataclasses
import io
import json
import random
import shutil
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests import oracles
from tests.model.test_exactness import (
    EVERYTHING,
    assert_same,
    chosen_pairs,
    oracle_loss_and_grads,
    packed_loss_and_grads,
    policy_of,
    tokenize,
)
from vapr.batches.model_config import load_model_config
from vapr.batches.packing import pack
from vapr.batches.tokenize import Processor
from vapr.config import TrainConfig
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.errors import UserError
from vapr.evaluation.generation.answer import collate
from vapr.evaluation.generation.prompts import Asked
from vapr.families import FAMILIES
from vapr.model.image_features import ImageFeatures
from vapr.model.policy import image_features
from vapr.training import trainer
from vapr.training.export import export

ANY_RESOLUTION = ("llava_next", "llava_onevision")
TILED = (*ANY_RESOLUTION, "internvl")
SIZES = [
    (1, 40),
    (400, 1),
    (1, 2000),
    (3, 3),
    (56, 56),
    (57, 56),
    (112, 112),
    (500, 30),
    (31, 400),
    (640, 480),
    (169, 168),
]
"""Widths and heights: a pixel wide; so long that nothing is left between the bars; tiny; one tile; a pixel over it; just
a canvas; long; a photograph; near a tie."""


@pytest.fixture(params=TILED)
def family(request) -> str:
    return request.param


@pytest.fixture
def processor(tiny, family) -> Processor:
    folder = tiny(family)
    return Processor(str(folder), load_model_config(str(folder)), "pil")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def asking(images: list) -> list[dict]:
    parts = [{"type": "image", "image": image} if image is not None else {"type": "image"} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_odd_sizes_are_what_transformers_processor_makes_of_them(family, tiny, processor, number):
    theirs = oracles.hugging_face_processor(tiny(family), family)
    groups = [random.Random(n).sample(SIZES, number) for n in range(6)] if number > 1 else [[size] for size in SIZES]
    for sizes in groups:
        pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
        expected = theirs.apply_chat_template(
            asking(pictures), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        images = processor.process_images([png(image) for image in pictures])
        ids = processor.with_images(processor.tokenize_prompt(asking([None] * number)), images)
        assert ids.tolist() == expected["input_ids"][0]
        assert np.array_equal(np.concatenate([i.pixel_values for i in images]), oracles.pixels(family, expected))
        assert processor.expected_image_tokens(sizes) == sum(image.num_tokens for image in images)
        assert sum(image.num_tokens for image in images) == (ids == processor.image_token_id).sum()


@torch.no_grad()
def test_features_are_the_models_own(family, tiny, processor):
    """Of pictures of all sizes at once, one from a prompt of several among them; in double precision, to rounding."""
    model = oracles.load_model(tiny(family), family).double()
    images = [processor.process_image(png(picture(*size))) for size in SIZES]
    images += [processor.process_image(png(picture(90, 60)), several=True)] * 2
    pixels = torch.cat([image.pixel_values for image in images]).double()
    arguments = FAMILIES[family].tower_arguments(model.model, images, torch.device("cpu"))
    got = FAMILIES[family].features(model.model, pixels, **arguments)
    inputs = FAMILIES[family].inputs(images, torch.zeros(1, 1, dtype=torch.bool)) | {"pixel_values": pixels}
    expected = model.get_image_features(**inputs).pooler_output
    expected = torch.cat(list(expected)).reshape(-1, got.shape[1])
    assert len(got) == sum(image.num_tokens for image in images)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_host_waits_for_nothing_while_features_are_computed(family, tiny, processor):
    """Fake tensors have no values, so whoever asks for one fails; transformers' own packing of tiles does."""
    model = oracles.load_model(tiny(family), family).model
    images = [processor.process_image(png(picture(*size))) for size in ((640, 480), (57, 56))]
    arguments = FAMILIES[family].tower_arguments(model, images, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(sum(len(image.pixel_values) for image in images), 3, 56, 56)
        features = FAMILIES[family].features(model, pixels, **arguments)
        assert len(features) == sum(image.num_tokens for image in images)
        if family in ANY_RESOLUTION:
            with pytest.raises(DataDependentOutputException):
                model.get_image_features(pixels, torch.empty(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("family", "config", "theirs"),
    [
        (
            "llava_onevision",
            transformers.LlavaOnevisionConfig(
                vision_config=transformers.SiglipVisionConfig(image_size=384, patch_size=14)
            ),
            {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"},
        ),
        (
            "llava_next",
            transformers.LlavaNextConfig(vision_config=transformers.CLIPVisionConfig(image_size=336, patch_size=14)),
            {"patch_size": 14, "num_additional_image_tokens": 0},
        ),
    ],
    ids=["llava_onevision", "llava_next"],
)
def test_numbers_of_placeholders_at_the_published_sizes(family, config, theirs):
    """By the processor's arithmetic, which knows nothing of features."""
    cls = {"llava_onevision": transformers.LlavaOnevisionProcessor, "llava_next": transformers.LlavaNextProcessor}
    processor = cls[family].__new__(cls[family])
    processor.image_processor = types.SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    for name, value in theirs.items():
        setattr(processor, name, value)
    side, numbers, scaled = config.vision_config.image_size, random.Random(0), 0
    for _ in range(150):
        height, width = (round(2 ** numbers.uniform(3, 12)) for _ in range(2))
        packing = FAMILIES[family].packing(config, 2, (height, width))
        assert packing.num_tokens == processor._get_number_of_features(height, width, side, side), (height, width)
        scaled += packing.scaled is not None
    assert (scaled > 0) == (family == "llava_onevision")


def test_only_onevision_takes_a_picture_among_others_as_a_whole(family, processor):
    source = png(picture(640, 480))
    alone = processor.process_image(source)
    one_of_two = processor.process_images([source, source])[0]
    again = processor.process_image(source)
    assert alone is again
    assert len(alone.pixel_values) > 1
    if family != "llava_onevision":
        assert one_of_two is alone
    else:
        assert (len(one_of_two.pixel_values), one_of_two.num_tokens) == (1, 17)
        assert one_of_two.content_hash != alone.content_hash


@pytest.mark.parametrize(("family", "text_model"), [("internvl", "qwen3"), ("llava_next", "llama")])
def test_other_text_models(family, text_model, corpus, photo_pairs, tmp_path):
    folder = build_tiny_policy(family, tmp_path, corpus, initializer_range=0.15, text_model=text_model)
    policy = policy_of(folder, train=EVERYTHING)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs)[-4:])
    model = oracles.load_model(folder, family)
    truth = oracle_loss_and_grads(model, family, dict(model.named_parameters()), pairs)
    assert_same(packed_loss_and_grads(policy, [pairs], "image"), truth, 1e-5)


@pytest.mark.parametrize("family", ANY_RESOLUTION)
def test_the_newline_is_trained_with_the_projector(tiny, family):
    def trained(**parts):
        return set(policy_of(tiny(family), train=TrainConfig(**parts)).trained_parameters())

    assert "model.image_newline" in trained(language_model=False, projector=True)
    assert "model.image_newline" not in trained(language_model=True)
    assert "model.image_newline" not in trained(language_model=False, vision_tower=True)


def test_cached_features_are_those_of_the_tower(family, tiny, photo_pairs, tmp_path):
    folder = tiny(family)
    policy = policy_of(folder)
    batch = pack(tokenize(policy, folder, chosen_pairs(photo_pairs)), "image")
    cache = ImageFeatures(policy, str(tmp_path))
    with torch.no_grad():
        expected = image_features(policy, batch.images)
    assert torch.equal(cache.of_batch(batch), expected)
    assert (cache.hits, cache.misses) == (0, len(batch.images))
    assert torch.equal(cache.of_batch(batch), expected)
    assert (cache.hits, cache.misses) == (len(batch.images), len(batch.images))
    one = dataclasses.replace(batch, images=batch.images[-1:])  # found by itself
    assert torch.equal(cache.of_batch(one), expected[-batch.images[-1].num_tokens :])


@torch.no_grad()
def test_a_batch_generates_what_each_question_alone_gets(family, tiny, processor):
    model = oracles.load_model(tiny(family), family).eval()
    theirs = oracles.hugging_face_processor(tiny(family), family)
    groups = [[picture(640, 480)], [picture(90, 60), picture(30, 200)], [], [picture(57, 56)]]
    asked, shown, truths = [], [], []
    for pictures in groups:
        prompt = processor.tokenize_prompt(asking([None] * len(pictures)))
        asked.append(Asked(None, prompt, (), 0))
        shown.append(processor.process_images([png(image) for image in pictures]))
        inputs = theirs.apply_chat_template(
            asking(pictures), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        truths.append(said[0, inputs["input_ids"].shape[1] :].tolist())
    inputs = collate(processor, asked, shown, torch.device("cpu"), torch.float32)
    said = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert said[:, inputs["input_ids"].shape[1] :].tolist() == truths
    assert truths[0] != truths[3]  # the same question; the picture matters


def test_spare_image_has_its_features(family, tiny):
    policy = policy_of(tiny(family))
    spare = FAMILIES[family].spare_image(policy.base.config)
    assert len(image_features(policy, [spare])) == spare.num_tokens


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_run_is_exported_and_reloaded(family, lora, make_config, tmp_path, photo_pairs):
    """Two steps, the features cached; transformers alone then gives what the exported weights give here."""
    optim = {"lr": 1e-2, "pairs_per_step": 4, "max_steps": 2}
    config = make_config(
        family=family, lora=lora, optim=optim, checkpoint={"every": 2},
        **({"features": {"cache": True, "cache_dir": str(tmp_path / "features")}} if lora else {}),
    )  # fmt: skip
    trainer.train(config)
    export(tmp_path / "run", tmp_path / "exported", say=lambda line: None)
    policy = policy_of(tmp_path / "exported")
    pairs = tokenize(policy, tmp_path / "exported", photo_pairs[:2])
    before = oracles.load_model(config.policy.model, family)
    after = oracles.load_model(tmp_path / "exported", family)
    logps = packed_loss_and_grads(policy, [pairs], "image")[0]
    with torch.no_grad():
        for pair in pairs:
            own, old = (
                torch.stack([oracles.completion_logps(model, family, path).sum() for path in pair.paths])
                for model in (after, before)
            )
            torch.testing.assert_close(logps[pair.id], own, rtol=1e-5, atol=1e-5)
            assert (own - old).abs().min() > 1e-2


def edit(folder, copy, name: str, **changes):
    """A copy of a folder with other entries in one JSON file."""
    shutil.copytree(folder, copy)
    file = copy / name
    values = json.loads(file.read_text())
    inside = values.get("image_processor") if "image_processor" in changes else None
    (inside or values).update(changes.pop("image_processor", {}))
    values.update(changes)
    file.write_text(json.dumps(values))
    return copy


PROCESSOR, CONFIG = "processor_config.json", "config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "message"),
    [
        ("llava_onevision", PROCESSOR, {"num_image_tokens": 17}, "set num_image_tokens: 16, vision_feature_select"),
        ("llava_onevision", PROCESSOR, {"vision_aspect_ratio": "anyres_max_9"}, "set vision_aspect_ratio: anyres_max_2"),
        ("llava_onevision", CONFIG, {"image_grid_pinpoints": [[56, 56], [112, 112]]}, "image_grid_pinpoints of"),
        ("llava_next", PROCESSOR, {"patch_size": 28}, "set patch_size: 14"),
        ("llava_next", PROCESSOR, {"num_additional_image_tokens": 0}, "set num_additional_image_tokens: 1, vision"),
        ("internvl", PROCESSOR, {"image_seq_length": 256}, "a tile gets 256 tokens in the prompt but 4 features"),
        ("internvl", CONFIG, {"image_token_id": 5}, "'<IMG_CONTEXT>' has the number"),
        ("internvl", "preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "tiles of 28 x 28 pixels"),
        ("llava_onevision", "preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "tiles of 28 x 28"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_each_other_are_one_line(family, file, changes, message, tiny, tmp_path):
    folder = edit(tiny(family), tmp_path / "copy", file, **changes)
    with pytest.raises(UserError) as caught:
        Processor(str(folder), load_model_config(str(folder)), "pil")
    assert message in str(caught.value) and str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


def test_canvases_that_are_no_multiple_of_a_tile_are_one_line(tiny, tmp_path):
    canvases = {"image_grid_pinpoints": [[56, 70]]}
    folder = edit(tiny("llava_onevision"), tmp_path / "a", CONFIG, **canvases)
    folder = edit(folder, tmp_path / "b", "preprocessor_config.json", **canvases)
    with pytest.raises(UserError, match="holds 56 x 70, which 56 x 56 pixels, a tile of the vision tower, do not"):
        Processor(str(folder), load_model_config(str(folder)), "pil")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, "has vision_aspect_ratio: pad; it must be anyres_max_"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "has not one feature a patch"),
        ("internvl", {"vision_feature_layer": [-1, -2]}, "reads several layers of its vision tower"),
    ],
)
def test_models_that_are_refused_by_name(family, changes, message, tiny, tmp_path):
    shutil.copytree(tiny(family), tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"].update(changes.get("text", {}))
    values.update({name: value for name, value in changes.items() if name != "text"})
    file.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_model_config(str(tmp_path / "copy"))
    assert message in str(caught.value) and f"({family})" in str(caught.value)


def test_too_many_tiles_for_the_pack_are_one_line(family, make_config):
    config = make_config(family=family, packing={"max_tokens": 40})
    with pytest.raises(UserError) as caught:
        trainer.train(config)
    assert "packing.max_tokens" in str(caught.value) and "\n" not in str(caught.value)
