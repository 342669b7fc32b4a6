"""Whether an engine uses an adapter, told from log-probs."""

import dataclasses

import peft
import pytest
import torch

from tests import oracles
from vapr.errors import UserError
from vapr.evaluation.generation.adapter_proof import KnownAnswer, check_adapter, known_answers
from vapr.evaluation.generation.open_model import find_answerer
from vapr.evaluation.generation.prompts import tokenize_questions

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """Folder of a LoRA adapter on the language model of a tiny Qwen2.5-VL, large enough to change what it says."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(1)
    base = oracles.CLASSES[FAMILY].from_pretrained(tiny(FAMILY), dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    adapted.save_pretrained(folder)
    return folder


def test_known_answers_are_scored_with_and_without_the_adapter(adapter, tiny, questions):
    answerer = find_answerer(str(adapter))
    processor = answerer.processor()
    known = known_answers(answerer, processor, tokenize_questions(questions[:3], processor), torch.float32)
    base = oracles.CLASSES[FAMILY].from_pretrained(tiny(FAMILY), dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(
        oracles.CLASSES[FAMILY].from_pretrained(tiny(FAMILY), dtype=torch.float32), adapter
    ).eval()
    for one in known:
        pictures = tuple(processor.process_image(image) for image in one.asked.images)
        prompt = processor.with_images(one.asked.prompt, pictures)
        ids = torch.tensor([[*prompt.tolist(), *one.ids]])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processor.image_token_id).int()}
        inputs["pixel_values"] = torch.cat([picture.pixel_values for picture in pictures])
        inputs["image_grid_thw"] = torch.tensor([picture.layout for picture in pictures])
        for model, scored in ((adapted, one.adapted), (base, one.base)):
            with torch.no_grad():
                logps = model(**inputs).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            truth = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scored), truth, rtol=1e-4, atol=1e-4)
        assert one.adapted != pytest.approx(one.base, abs=0.1)


def known(adapted: list[float], base: list[float]) -> KnownAnswer:
    return KnownAnswer(None, [5] * len(adapted), adapted, base, 1e-3)


def test_an_engine_that_agrees_is_told_to():
    line = check_adapter("runs/a", [known([-1.0, -2.0], [-3.0, -4.0])], [[-1.0001, -2.0002]])
    assert line == (
        "runs/a: the adapter is in use (log-probs of 1 answers differ from transformers' by 0.00015 a token with the "
        "adapter, by 2 without)"
    )


def test_an_engine_that_leaves_the_adapter_out_is_refused():
    with pytest.raises(
        UserError, match=r"^runs/a: vLLM does not use the adapter \(.*by 2 a token with the adapter, by 0 without"
    ):
        check_adapter("runs/a", [known([-1.0, -2.0], [-3.0, -4.0])], [[-3.0, -4.0]])


def test_an_engine_that_uses_half_of_the_adapter_is_refused():
    with pytest.raises(UserError, match=r"^runs/a: vLLM uses the adapter in part or otherwise"):
        check_adapter("runs/a", [known([-1.0, -2.0], [-3.0, -4.0])], [[-1.8, -2.8]])


def test_an_adapter_that_changes_nothing_proves_nothing():
    line = check_adapter("runs/a", [known([-1.0, -2.0], [-1.0, -2.0])], [[-1.0, -2.0]])
    assert "changes hardly anything" in line and line.endswith("whether it is used cannot be told")


def test_a_rounding_of_bfloat16_is_allowed():
    one = dataclasses.replace(known([-1.0, -2.0], [-1.3, -2.3]), rounding=0.05)
    assert "in use" in check_adapter("runs/a", [one], [[-1.06, -2.06]])
