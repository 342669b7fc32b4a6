"""Answers of a policy to held-out questions, by an untouched Hugging Face model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vapr.batches.families import load_model_config
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.data.sources import read_pairs
from vapr.progress import Display

BATCH = 64
MAX_NEW_TOKENS = 24


def answer_all(model: Path, questions: Path, label: str) -> list[str]:
    """Answer every question of a pair file greedily, in the file's order.

    Args:
        model: folder of the policy.
        questions: pairs of which only the prompts count.
        label: what the progress is called.
    """
    pairs = list(read_pairs(questions))
    processor = Processor(str(model), load_model_config(str(model)))
    policy = transformers.LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenized = [processor.tokenize_pair(pair) for pair in pairs]
    answers = [""] * len(pairs)
    with Display(label, len(pairs), unit="question") as display:
        for numbers in _batches_of_equal_length(tokenized):
            for number, ids in zip(numbers, _generate(policy, [tokenized[n] for n in numbers]), strict=True):
                answers[number] = str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            display.advance("", len(numbers))
    return answers


def _batches_of_equal_length(tokenized: Sequence[TokenizedPair]) -> Iterator[list[int]]:
    """Yield the numbers of questions whose prompts are equally long, so that a batch needs no padding."""
    by_length: dict[int, list[int]] = {}
    for number, pair in enumerate(tokenized):
        by_length.setdefault(pair.paths[0].completion_start, []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), BATCH):
            yield numbers[start : start + BATCH]


def _generate(policy: Any, pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """Complete prompts of one length greedily; they are tokenised as the trainer does it."""
    paths = [pair.paths[0] for pair in pairs]
    prompts = torch.from_numpy(np.stack([path.input_ids[: path.completion_start] for path in paths]))
    with torch.inference_mode():
        out = policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            pixel_values=torch.cat([image.pixel_values for path in paths for image in path.images]),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
    return out[:, prompts.shape[1] :].tolist()
