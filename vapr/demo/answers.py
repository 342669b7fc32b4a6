"""Answers of a policy to held-out questions, by an untouched Hugging Face model."""

from pathlib import Path

import torch

from vapr.data.sources import read_pairs
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.open_model import find_answerer
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Question

SETTINGS = Settings(max_new_tokens=24, batch_size=64)


def answer_all(model: Path, questions: Path, label: str) -> list[str]:
    """Answer every question of a pair file greedily, in the file's order.

    Args:
        model: folder of the policy.
        questions: pairs of which only the prompts count.
        label: what the progress is called.
    """
    asked = [
        Question(
            benchmark="demo", id=str(number), question=pair.prompt[0]["content"][1]["text"], answer=None,
            images=pair.images,
        )
        for number, pair in enumerate(read_pairs(questions))
    ]  # fmt: skip
    answerer = find_answerer(str(model))
    policy = answerer.load(torch.float32).eval()
    return [one.prediction for one in answer_questions(policy, answerer.processor(), asked, SETTINGS, label=label)]
