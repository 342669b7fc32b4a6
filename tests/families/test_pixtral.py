"""Pixtral's tower in LLaVA and in Mistral3: rows of patches, attention inside of an image, Ministral3's queries."""

import json
import shutil

import pytest
import torch
import transformers

from tests import oracles
from tests.families.changed_files import change, processor_of
from tests.families.test_several_runs import logps_of, pair_of, picture
from tests.model.test_exactness import (
    EVERYTHING,
    assert_same,
    oracle_loss_and_grads,
    packed_loss_and_grads,
    policy_of,
)
from vapr.batches.model_config import load_model_config
from vapr.batches.packing import pack
from vapr.batches.processed_image import joined_pixels
from vapr.errors import UserError
from vapr.families import FAMILIES
from vapr.model import decoder
from vapr.model.policy import image_features


@pytest.fixture
def changed(tiny, tmp_path):
    """``changed(family, file, **settings)`` -> a copy of a tiny model whose file says otherwise."""

    def changing(family: str, file: str, **settings):
        folder = tmp_path / "changed"
        if not folder.exists():
            shutil.copytree(tiny(family), folder)
        change(folder, file, **settings)
        return folder

    return changing


@pytest.mark.parametrize(("family", "tokens"), [("llava_pixtral", (2, 6)), ("mistral3", (2, 4))])
def test_a_picture_is_a_run_a_row(family, tokens, tiny):
    image = processor_of(tiny(family)).process_image(picture(112, 37))
    height, width = tokens
    assert image.placeholder.text == "[IMG][IMG_BREAK][IMG][IMG_END]"
    assert image.placeholder.runs == (width,) * height
    patches = image.layout[0] // 14 * (image.layout[1] // 14)
    assert image.pixel_values.shape == (patches, 3 * 14 * 14)


def test_pictures_of_any_size_are_laid_end_to_end(tiny):
    processor = processor_of(tiny("mistral3"))
    images = [processor.process_image(picture(*size)) for size in ((112, 30), (20, 90), (60, 60))]
    joined = joined_pixels(images)
    assert torch.equal(joined, torch.cat([image.pixel_values for image in images]))
    taken = FAMILIES["mistral3"].inputs(images, torch.zeros(1, 1, dtype=torch.bool))
    assert torch.equal(taken["pixel_values"], oracles.pixel_values("mistral3", images))


@pytest.mark.parametrize("family", ["llava_pixtral", "mistral3"])
def test_a_pictures_features_do_not_depend_on_the_others(family, tiny):
    policy, processor = policy_of(tiny(family)), processor_of(tiny(family))
    images = [processor.process_image(picture(*size)) for size in ((112, 30), (20, 90), (60, 60))]
    together = image_features(policy, images).split([image.num_tokens for image in images])
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(features, image_features(policy, [image]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_pixtral", "mistral3"])
@pytest.mark.parametrize("layers", [-2, 1, [-2, -1], [0, 2]], ids=str)
def test_features_of_other_layers_of_the_tower(family, layers, changed):
    folder = changed(family, "config.json", vision_feature_layer=layers)
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(3)
    model = oracles.CLASSES[family](config)
    if family == "mistral3" and isinstance(layers, list):
        # transformers' own merger takes the width of one layer, so there is no such model.
        with pytest.raises(RuntimeError):
            oracles.pair_logps(model, family, pack([processor_of(folder).tokenize_pair(pair_of(picture()))]))
        return
    model.save_pretrained(folder)
    policy = policy_of(folder, train=EVERYTHING)
    pairs = [processor_of(folder).tokenize_pair(pair_of(picture(), picture(40, 90)))]
    truth = oracle_loss_and_grads(model.eval(), family, dict(model.named_parameters()), pairs)
    assert_same(packed_loss_and_grads(policy, [pairs], "image"), truth, 1e-5)


@pytest.mark.parametrize(
    ("family", "file", "settings", "message"),
    [
        ("mistral3", "processor_config.json", {"patch_size": 16}, "processor's patch_size is 16 but the model's is 14"),
        ("mistral3", "processor_config.json", {"spatial_merge_size": 1}, "spatial_merge_size is 1 but the model's is 2"),
        ("llava_pixtral", "processor_config.json", {"spatial_merge_size": 2}, "is 2 but the model's is 1"),
        ("llava_pixtral", "processor_config.json", {"image_break_token": "[ROW]"}, "the tokenizer has no '\\[ROW\\]'"),
        ("llava_pixtral", "processor_config.json", {"image_token": "[INST]"}, "do not belong together"),
        ("llava_pixtral", "config.json", {"vision_feature_select_strategy": "default"}, "set full"),
    ],
    ids=str,
)  # fmt: skip
def test_a_processor_that_does_not_fit_the_model_is_one_line(changed, family, file, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        processor_of(changed(family, file, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llava_pixtral", "mistral3", "ministral3"])
def test_a_real_window_is_refused(family, changed):
    folder = changed(family, "config.json")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding-window attention, which packing does not support"):
        load_model_config(str(folder))


@pytest.mark.parametrize("family", ["llava_pixtral", "mistral3"])
def test_a_picture_that_becomes_no_row_is_one_line(family, tiny):
    processor = processor_of(tiny(family))
    assert processor.expected_image_tokens([(2000, 1)]) == 0
    with pytest.raises(UserError, match="is refused by the image processor") as caught:
        processor.process_image(picture(2000, 1))
    assert "\n" not in str(caught.value)


def test_ministrals_queries_grow_with_their_position(tiny, monkeypatch):
    """The layers that vapr writes out scale them; without it they would be left to transformers, and that is seen."""
    folder = tiny("ministral3")
    policy = policy_of(folder)
    assert policy.written_out == {0, 1, 2}
    pair = processor_of(folder).tokenize_pair(pair_of(picture(), picture(60, 60), chosen="A cat sits there. " * 20))
    batch = pack([pair])
    assert batch.position_ids.max() > 3 * 32  # queries are scaled by several factors
    truth = oracles.pair_logps(oracles.load_model(folder, "ministral3"), "ministral3", batch)
    torch.testing.assert_close(logps_of(policy, batch), truth, rtol=1e-5, atol=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "query_scales", lambda decoder, positions: None)
        assert (logps_of(policy, batch) - truth).abs().max() > 1e-3
    monkeypatch.setattr("vapr.model.patches.query_scales", lambda decoder, positions: None)
    left = policy_of(folder)
    assert left.written_out == frozenset()
    torch.testing.assert_close(logps_of(left, batch), truth, rtol=1e-5, atol=1e-5)
