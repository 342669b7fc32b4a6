"""What a policy answers while it trains: transformers' own ``generate`` on its modules, adapters included."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from vapr.batches.processed_image import joined_pixels
from vapr.batches.tokenize import TokenPath
from vapr.model.policy import Policy, frozen


def generate(
    policy: Policy, paths: Sequence[TokenPath], eos_token_ids: Sequence[int], *, max_new_tokens: int, max_tokens: int
) -> list[list[int]]:
    """Continue the prompt of each path greedily.

    Nothing of the policy, its mode or the random state is different afterwards.

    Args:
        policy: runs on its device.
        paths: whose prompts are continued; their completions play no part.
        eos_token_ids: at which an answer ends; none is part of it.
        max_new_tokens: longest answer.
        max_tokens: tokens of the prompts run at once, padding included; a longer one runs alone.

    Returns:
        The new token ids of each path.
    """
    answers: list[list[int]] = [[] for _ in paths]
    with frozen(policy), _transformers_attention(policy):
        for numbers in _alike(paths, max_tokens):
            batch = _inputs(policy, [paths[n] for n in numbers], eos_token_ids[0])
            length = batch["input_ids"].shape[1]
            out = policy.base.generate(  # type: ignore[operator]
                **batch, generation_config=_greedy(eos_token_ids, max_new_tokens)
            )
            for n, ids in zip(numbers, out[:, length:].tolist(), strict=True):
                end = next((place for place, token in enumerate(ids) if token in eos_token_ids), len(ids))
                answers[n] = ids[:end]
    return answers


def _greedy(eos_token_ids: Sequence[int], max_new_tokens: int) -> transformers.GenerationConfig:
    """Return settings that take nothing over from the model's own, which may sample or punish repetitions."""
    return transformers.GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens, use_cache=True,
        eos_token_id=list(eos_token_ids), pad_token_id=eos_token_ids[0], temperature=1.0, top_p=1.0, top_k=50,
    )  # fmt: skip


def _alike(paths: Sequence[TokenPath], max_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of paths in batches, those of like length together."""
    batch: list[int] = []
    for n in sorted(range(len(paths)), key=lambda n: paths[n].completion_start):
        if batch and paths[n].completion_start * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _inputs(policy: Policy, paths: Sequence[TokenPath], pad: int) -> dict[str, Any]:
    """Lay prompts out as transformers takes them, padded on the left."""
    length = max(path.completion_start for path in paths)
    ids = torch.full((len(paths), length), pad)
    mask = torch.zeros_like(ids)
    kinds = torch.zeros_like(ids)  # 1 where an image's token stands
    for row, path in enumerate(paths):
        start = length - path.completion_start
        ids[row, start:] = torch.from_numpy(path.input_ids[: path.completion_start])
        mask[row, start:] = 1
        for image, first in zip(path.images, path.image_starts, strict=True):
            kinds[row, start + first : start + first + image.num_tokens] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if policy.family != "llava":
        inputs["mm_token_type_ids"] = kinds
    if images := [image for path in paths for image in path.images]:
        inputs["pixel_values"] = joined_pixels(images).to(policy.dtype)
        if policy.family != "llava":
            inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
    return {name: value.to(policy.device) for name, value in inputs.items()}


@contextlib.contextmanager
def _transformers_attention(policy: Policy) -> Iterator[None]:
    """Let the decoder attend as transformers does, over padded rows and a key-value cache, not over a forest."""
    config = policy.base.model.language_model.config
    packed = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = packed
