"""Batches answer as each question alone does, through transformers' own processor and ``generate``."""

import dataclasses
import math

import pytest
import torch
import transformers
from PIL import Image

from tests import oracles
from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_questions, collate
from vapr.evaluation.generation.first_token import yes_no_tokens
from vapr.evaluation.generation.prompts import in_batches, messages_of, tokenize_questions
from vapr.evaluation.generation.settings import Settings

SETTINGS = Settings(max_new_tokens=12, batch_size=4)


@pytest.fixture
def opened(tiny, family):
    folder = tiny(family)
    model = oracles.CLASSES[family].from_pretrained(folder, dtype=torch.float32).eval()
    return model, Processor(str(folder), load_model_config(str(folder)))


def alone(model, family, folder, question, *, blind=False):
    """The ids that the model says to one question, and the logits of the first, by transformers alone."""
    processor = oracles.hugging_face_processor(folder, family)
    images = [] if blind else [Image.open(image) for image in question.images]
    text = processor.apply_chat_template(
        messages_of(question, blind=blind), tokenize=False, add_generation_prompt=True,
        **({"chat_template": processor.chat_template} if processor.chat_template else {}),
    )  # fmt: skip
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), out.logits[0][0]


@pytest.mark.parametrize("blind", [False, True])
def test_batches_say_what_each_question_alone_gets(tiny, family, opened, questions, blind):
    model, processor = opened
    predictions = answer_questions(model, processor, questions, SETTINGS, blind=blind, quiet=True)
    assert [one.id for one in predictions] == [one.id for one in questions]
    truths = [alone(model, family, tiny(family), question, blind=blind)[0] for question in questions]
    decoded = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in truths]
    assert [one.prediction for one in predictions] == decoded
    assert len(set(decoded)) > 4  # random weights say different things to different questions


def test_the_tokens_are_those_of_each_question_alone(tiny, family, opened, questions, monkeypatch):
    model, processor = opened
    said = {}
    generate = model.generate

    def watched(**inputs):
        out = generate(**inputs)
        for prompt, row in zip(inputs["input_ids"], out[:, inputs["input_ids"].shape[1] :], strict=True):
            said[tuple(t for t in prompt.tolist() if t != processor.tokenizer.pad_token_id)] = row.tolist()
        return out

    monkeypatch.setattr(model, "generate", watched)
    answer_questions(model, processor, questions, SETTINGS, quiet=True)
    monkeypatch.undo()
    asked = tokenize_questions(questions, processor)
    assert len({one.length for one in asked}) > 4
    for one in asked:
        pictures = tuple(processor.process_image(image) for image in one.images)
        ids = processor.with_images(one.prompt, pictures)
        assert one.length == len(ids)
        truth = alone(model, family, tiny(family), one.question)[0]
        batched = said[tuple(ids.tolist())]
        assert batched[: len(truth)] == truth
        assert set(batched[len(truth) :]) <= {processor.tokenizer.pad_token_id}


def test_log_probs_of_yes_and_no_are_those_of_a_plain_forward(tiny, family, opened, questions):
    model, processor = opened
    words = yes_no_tokens(processor.tokenizer)
    predictions = answer_questions(model, processor, questions, SETTINGS, quiet=True)
    for question, prediction in zip(questions, predictions, strict=True):
        if question.answer not in ("yes", "No.", "Yes"):
            assert "log_p_yes" not in prediction.meta
            continue
        logits = alone(model, family, tiny(family), question)[1]
        p = logits.softmax(-1)
        for name, ids in zip(("log_p_yes", "log_p_no"), words, strict=True):
            assert prediction.meta[name] == pytest.approx(math.log(float(p[ids].sum())), abs=1e-4)


def test_tokens_of_yes_and_no_are_the_words_with_and_without_a_space(real_llava):
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_llava)
    yes, no = yes_no_tokens(tokenizer)
    assert {"Yes", "▁Yes", "▁yes"} <= {tokenizer.convert_ids_to_tokens(id) for id in yes}
    assert {"No", "▁No", "▁no"} <= {tokenizer.convert_ids_to_tokens(id) for id in no}
    words = (
        {tokenizer.decode([id]).strip().lower() for id in yes},
        {tokenizer.decode([id]).strip().lower() for id in no},
    )
    assert words == ({"yes"}, {"no"})


def test_padding_stands_before_the_prompt_and_is_masked(opened, questions):
    _, processor = opened
    asked = tokenize_questions(questions[:3], processor)
    pictures = [tuple(processor.process_image(image) for image in one.images) for one in asked]
    inputs = collate(processor, asked, pictures, torch.device("cpu"), torch.float32)
    for row, mask, one in zip(inputs["input_ids"], inputs["attention_mask"], asked, strict=True):
        assert mask.tolist() == [0] * (len(row) - one.length) + [1] * one.length
        assert set(row[: len(row) - one.length].tolist()) <= {processor.tokenizer.pad_token_id}


def test_batches_hold_questions_of_similar_length_the_longest_first(opened, questions):
    _, processor = opened
    asked = tokenize_questions(questions, processor)
    batches = in_batches(asked, 4)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    lengths = [one.length // 16 for batch in batches for one in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_sampling_is_seeded_by_batch(opened, questions):
    model, processor = opened
    hot = Settings(max_new_tokens=12, batch_size=4, temperature=1.5)
    first, again, other = (
        [one.prediction for one in answer_questions(model, processor, questions, settings, quiet=True)]
        for settings in (hot, hot, Settings(max_new_tokens=12, batch_size=4, temperature=1.5, seed=1))
    )
    assert first == again != other
    drawn, greedy = (answer_questions(model, processor, questions[:1], s, quiet=True)[0].meta for s in (hot, SETTINGS))
    assert drawn["log_p_yes"] == pytest.approx(greedy["log_p_yes"], abs=1e-4)  # what the model thinks, not the draw


def test_settings_of_generation_config_json_do_not_count(opened, questions):
    model, processor = opened
    plain = [one.prediction for one in answer_questions(model, processor, questions[:3], SETTINGS, quiet=True)]
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    again = [one.prediction for one in answer_questions(model, processor, questions[:3], SETTINGS, quiet=True)]
    assert again == plain
    assert model.generation_config.repetition_penalty == 50.0  # and it is left as it was


def test_an_answer_that_was_cut_off_says_so(opened, questions):
    model, processor = opened
    short = answer_questions(model, processor, questions, Settings(max_new_tokens=2, batch_size=4), quiet=True)
    assert sum(one.meta.get("cut_off", False) for one in short) >= 7  # hardly any random answer ends so soon


def test_a_question_too_long_for_the_model_is_refused_before_it_is_asked(opened, questions):
    model, processor = opened
    with pytest.raises(UserError, match=r"^question 'q\d' of pope takes .* more than the model's 4,096; lower"):
        answer_questions(model, processor, questions, Settings(max_new_tokens=4090), quiet=True)


def test_the_models_own_mark_in_a_question_is_refused(opened, questions):
    _, processor = opened
    if processor.image_token == "<image>":  # which is how questions name pictures
        pytest.skip("a mark like any other")
    bad = dataclasses.replace(questions[0], question=f"What is {processor.image_token}?")
    with pytest.raises(UserError, match=r"^question 'q0' of pope: its prompt holds 2 '<\|image_pad\|>' for 1 image"):
        tokenize_questions([bad], processor)


def test_a_picture_that_breaks_off_names_its_question(opened, questions, tmp_path):
    model, processor = opened
    whole = questions[3].images[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    bad = dataclasses.replace(questions[0], images=(tmp_path / "half.png",))
    with pytest.raises(UserError, match=r"^question 'q0' of pope: image '.*half.png' cannot be read"):
        answer_questions(model, processor, [bad, questions[1]], SETTINGS, quiet=True)
