"""Tokens, pixels and positions equal those of transformers' own processors and models at inference."""

import dataclasses
import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import oracles
from tests.conftest import EVERY_FAMILY
from vapr.batches.changed_spans import changed_spans
from vapr.batches.tokenize import Processor
from vapr.config import TokenWeights
from vapr.data.images import read_image
from vapr.data.pair import Edit, PreferencePair
from vapr.errors import UserError
from vapr.families import FAMILIES


@pytest.fixture(params=EVERY_FAMILY)
def family(request) -> str:
    return request.param


@pytest.fixture
def processor(tiny, family) -> Processor:
    folder = tiny(family)
    return Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")


def text_pair(chosen: str, rejected: str, **fields) -> PreferencePair:
    message = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
    return PreferencePair(
        id="t", images=(), prompt=(message("user", "What is it?"),), chosen=(message("assistant", chosen),),
        rejected=(message("assistant", rejected),), where="t.jsonl:1", **fields,
    )  # fmt: skip


def test_prompt_is_what_the_processor_gives_at_inference(family, tiny, processor, photo_pairs):
    theirs = oracles.hugging_face_processor(tiny(family), family)
    for pair in photo_pairs:
        images = iter([read_image(image) for image in pair.images])
        messages = [
            {
                "role": m["role"],
                "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in m["content"]],
            }
            for m in pair.prompt
        ]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        path = processor.tokenize_pair(pair).paths[0]
        assert path.input_ids[: path.completion_start].tolist() == list(expected["input_ids"][0])
        if pair.images:
            ours = oracles.pixel_values(family, path.images).numpy()
            assert np.array_equal(ours, oracles.pixels(family, expected).reshape(ours.shape))
            assert sum(image.num_tokens for image in path.images) == (path.input_ids == processor.image_token_id).sum()


def test_completion_is_the_rest_of_the_conversation(processor, photo_pairs):
    for pair in photo_pairs[:20]:
        tokenized = processor.tokenize_pair(pair)
        for path, messages in zip(tokenized.paths, (pair.chosen, pair.rejected), strict=True):
            text = processor.tokenizer.decode(path.input_ids[path.completion_start :])
            answer = "".join(part["text"] for part in messages[0]["content"])
            end_of_turn = oracles.END_OF_TURN.get(processor.family, "<|im_end|>\n")
            assert text.removeprefix(" ") == answer + end_of_turn


def test_llava_prompts_begin_with_bos(tiny, photo_pairs):
    processor = Processor(str(tiny("llava")), transformers.AutoConfig.from_pretrained(tiny("llava")), "pil")
    for pair in (photo_pairs[0], next(p for p in photo_pairs if not p.images)):
        path = processor.tokenize_pair(pair).paths[0]
        assert path.input_ids[0] == processor.tokenizer.bos_token_id
        assert (path.input_ids == processor.tokenizer.bos_token_id).sum() == 1


def test_template_that_writes_its_own_bos_gets_no_second_one(tiny, photo_pairs):
    processor = Processor(str(tiny("llava")), transformers.AutoConfig.from_pretrained(tiny("llava")), "pil")
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    path = processor.tokenize_pair(photo_pairs[0]).paths[0]
    assert (path.input_ids == processor.tokenizer.bos_token_id).sum() == 1


def test_positions_equal_the_models_own(family, tiny, processor, photo_pairs):
    model = oracles.load_model(tiny(family), family)
    for pair in photo_pairs:
        for path in processor.tokenize_pair(pair).paths:
            if FAMILIES[processor.family].position_axes == 1 or not path.images:
                expected = torch.arange(len(path.input_ids)).expand(3, -1)
            else:
                ids = torch.from_numpy(path.input_ids)[None]
                grids = torch.tensor([image.layout for image in path.images])
                is_image = (ids == processor.image_token_id).int()
                expected = model.model.get_rope_index(ids, is_image, image_grid_thw=grids)[0][:, 0]
            assert torch.equal(torch.from_numpy(path.position_ids), expected)


def test_content_hash_is_of_the_pixels(processor, photo_root):
    png = photo_root / "astronaut.png"
    bmp = io.BytesIO()
    Image.open(png).save(bmp, "BMP")
    again, other = processor.process_image(bmp.getvalue()), processor.process_image(photo_root / "coffee.png")
    assert processor.process_image(png).content_hash == again.content_hash != other.content_hash


def test_changed_spans_follow_the_edits():
    pair = text_pair("A red cat on a mat.", "A green cat on a mat.", edits=(Edit(2, 5, "green"),))
    assert changed_spans(pair, "chosen") == [(2, 5)]
    assert changed_spans(pair, "rejected") == [(2, 7)]
    two = text_pair("Two red cats.", "Three blue cats.", edits=(Edit(4, 7, "blue"), Edit(0, 3, "Three")))
    text = "Three blue cats."
    assert [text[a:b] for a, b in changed_spans(two, "rejected")] == ["Three", "blue"]


def test_changed_spans_without_edits_come_from_a_word_diff():
    pair = text_pair("A red cat on a mat.", "A green cat on the mat.")
    text = "A green cat on the mat."
    assert [text[a:b] for a, b in changed_spans(pair, "rejected")] == ["green", "the"]


def test_token_weights_fall_on_the_changed_words(processor):
    pair = text_pair("A red cat on a mat.", "A green cat on a mat.", edits=(Edit(2, 5, "green"),))
    path = processor.tokenize_pair(pair, TokenWeights(changed=3.0, unchanged=0.5)).paths[1]
    ids, weights = path.input_ids[path.completion_start :], path.token_weights
    changed = processor.tokenizer.decode(ids[weights == 3.0])
    assert changed.strip() == "green"
    assert set(weights.tolist()) == {0.5, 3.0}


def test_every_photo_pairs_edit_is_found_in_its_tokens(processor, photo_pairs):
    for pair in photo_pairs:
        for side, path in zip(
            ("chosen", "rejected"), processor.tokenize_pair(pair, TokenWeights(changed=2)).paths, strict=True
        ):
            answer = "".join(part["text"] for part in getattr(pair, side)[0]["content"])
            changed = processor.tokenizer.decode(path.input_ids[path.completion_start :][path.token_weights == 2])
            for start, end in changed_spans(pair, side):
                assert answer[start:end].strip() in changed


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("text.png", lambda p: p.write_text("no image"), "is not an image file"),
        ("cut.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40), "image"),
        ("deep.png", lambda p: Image.new("I;16", (8, 8)).save(p), "mode I;16"),
        ("float.tiff", lambda p: Image.new("F", (8, 8)).save(p), "mode F"),
        ("bomb.png", lambda p: Image.new("1", (20000, 20000)).save(p), "decompression bomb"),
        ("moving.gif", lambda p: Image.new("L", (8, 8)).save(p, save_all=True, append_images=[Image.new("L", (8, 8), 200)]), "animated"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=message):
        read_image(path)


def test_a_truncated_photograph_is_an_error(tmp_path, photo_root):
    path = tmp_path / "half.png"
    path.write_bytes((photo_root / "coffee.png").read_bytes()[:20000])
    with pytest.raises(UserError, match="half.png"):
        read_image(path)


def test_a_sideways_photograph_is_turned_upright(tmp_path):
    path = tmp_path / "sideways.jpg"
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    image.save(path, exif=exif)
    assert read_image(path).size == (20, 40)


def test_image_token_in_the_text_is_an_error(processor):
    pair = text_pair(f"A {processor.image_token} cat", "A dog")
    with pytest.raises(UserError, match=r"t.jsonl:1: row 't': 'chosen' contains"):
        processor.tokenize_pair(pair)


def test_a_folder_without_tokenizer_is_one_line(tmp_path, tiny, family):
    config = transformers.AutoConfig.from_pretrained(tiny(family))
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not load"):
        Processor(str(tmp_path), config, "pil")


def test_torchvision_backend_equals_auto_processor(family, tiny, photo_pairs):
    """Where torchvision imports, transformers can build every processor itself: tokens and pixels are equal."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("torchvision does not import here")
    theirs = transformers.AutoProcessor.from_pretrained(tiny(family))
    ours = Processor(str(tiny(family)), transformers.AutoConfig.from_pretrained(tiny(family)), "auto")
    assert ours.image_backend == "torchvision"
    for pair in photo_pairs[:30]:
        images = iter([read_image(image) for image in pair.images])
        messages = [
            {**m, "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in m["content"]]}
            for m in pair.prompt
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = theirs.apply_chat_template(messages, **options)
        path = ours.tokenize_pair(pair).paths[0]
        assert path.input_ids[: path.completion_start].tolist() == expected["input_ids"][0].tolist()
        if pair.images:
            pixels = oracles.pixel_values(family, path.images).numpy()
            assert np.array_equal(pixels, expected["pixel_values"].numpy().reshape(pixels.shape))


def test_of_a_conversation_only_the_assistants_words_are_scored(family, processor):
    def said(*texts: str) -> tuple:
        roles = ("assistant", "user", "assistant")
        return tuple({"role": r, "content": [{"type": "text", "text": t}]} for r, t in zip(roles, texts, strict=True))

    pair = text_pair("x", "y")
    pair = dataclasses.replace(
        pair, chosen=said("Two cats.", "Sure?", "Yes, two."), rejected=said("Two dogs.", "Sure?", "Yes, two.")
    )
    path = processor.tokenize_pair(pair).paths[0]
    ids = path.input_ids[path.completion_start :]
    scored = processor.tokenizer.decode(ids[path.token_weights == 1])
    left_out = processor.tokenizer.decode(ids[path.token_weights == 0])
    assert "Two cats." in scored and "Yes, two." in scored and "Sure" not in scored
    assert "Sure?" in left_out and "two" not in left_out.lower()
