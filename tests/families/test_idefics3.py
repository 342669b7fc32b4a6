"""Idefics3 and SmolVLM: splitting, and processors that do not belong to their model."""

import shutil

import pytest
import torch
import transformers

from tests import oracles
from tests.families.changed_files import change, processor_of
from tests.families.test_several_runs import logps_of, pair_of, picture
from tests.model.test_exactness import policy_of
from vapr.batches.packing import pack
from vapr.errors import UserError


@pytest.fixture(params=["idefics3", "smolvlm"])
def family(request) -> str:
    return request.param


@pytest.fixture
def changed(tiny, family, tmp_path):
    """``changed(file, **settings)`` -> a copy of the tiny model whose file says otherwise."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny(family), folder)

    def changing(file: str, **settings):
        change(folder, file, **settings)
        return folder

    return changing


def test_tiles_stand_in_rows_before_the_small_copy(tiny, family):
    processor = processor_of(tiny(family))
    image = processor.process_image(picture(112, 50))
    assert image.layout == (1, 2) and image.pixel_values.shape == (3, 3, 56, 56)
    around = "<fake_token_around_image>"
    assert image.placeholder.text == (
        f"{around}<row_1_col_1><image>{around}<row_1_col_2><image>\n\n{around}<global-img><image>{around}"
    )
    assert image.placeholder.runs == (4, 4, 4)


def test_without_splitting_a_picture_is_its_small_copy(changed, family):
    folder = changed("preprocessor_config.json", do_image_splitting=False)
    processor = processor_of(folder)
    image = processor.process_image(picture())
    assert image.layout == (0, 0) and image.placeholder.runs == (4,) and len(image.pixel_values) == 1
    assert image.placeholder.text == "<fake_token_around_image><global-img><image><fake_token_around_image>"
    pair = processor.tokenize_pair(pair_of(picture(), picture(60, 112)))
    theirs = oracles.hugging_face_processor(folder, family)
    text = theirs.tokenizer.apply_chat_template(
        list(pair_of(picture(), picture()).prompt), chat_template=theirs.chat_template, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    for whole in (image.placeholder.text.replace("<image>", "<image>" * 4),):
        expected = theirs.tokenizer(text.replace("<image>", whole), add_special_tokens=False)["input_ids"]
        assert pair.paths[0].input_ids[: pair.paths[0].completion_start].tolist() == expected
    batch = pack([pair])
    truth = oracles.pair_logps(oracles.load_model(folder, family), family, batch)
    torch.testing.assert_close(logps_of(policy_of(folder), batch), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [112, 150, 168])
@pytest.mark.parametrize("size", [(1, 1), (56, 57), (300, 299), (90, 64), (64, 90), (500, 40), (1000, 1), (77, 333)])
def test_the_grid_of_a_size_is_known_without_processing(changed, longest, size):
    """150 is no multiple of a tile; the image processor's own count of patches errs there."""
    processor = processor_of(changed("preprocessor_config.json", size={"longest_edge": longest}))
    image = processor.process_image(picture(*size))
    assert processor._family.expected_tokens(processor.files, *size) == image.placeholder


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("processor_config.json", {"image_seq_len": 9}, "a tile gets 9 tokens in the prompt but 4 features"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 112}}, "4 tokens in the prompt but 16 features"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 70}}, "scale_factor 2 does not divide"),
        ("config.json", {"image_token_id": 5}, "'<image>' is not token 5"),
    ],
    ids=str,
)  # fmt: skip
def test_a_processor_that_does_not_fit_the_model_is_one_line(changed, file, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        processor_of(changed(file, **settings))
    assert "\n" not in str(caught.value)


def test_the_towers_dropout_is_off(changed):
    folder = changed("config.json")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_config.attention_dropout = 0.5
    config.save_pretrained(folder)
    policy = policy_of(folder)
    batch = pack([processor_of(folder).tokenize_pair(pair_of(picture()))])
    assert torch.equal(logps_of(policy, batch), logps_of(policy, batch))


def test_the_pil_class_serves_where_transformers_puts_it_away(tiny, family, monkeypatch):
    """As 5.17 does without torchvision."""

    def refuse(*arguments, **options):
        raise ValueError("None of these classes could be imported. Missing optional dependencies: torchvision.")

    expected = processor_of(tiny(family)).process_image(picture(112, 50))
    monkeypatch.setattr("vapr.batches.image_processor.AutoImageProcessor.from_pretrained", refuse)
    assert torch.equal(processor_of(tiny(family)).process_image(picture(112, 50)).pixel_values, expected.pixel_values)
