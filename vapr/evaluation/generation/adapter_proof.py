"""Proof that an engine uses an adapter: its log-probs of a few answers are transformers', and not the base's."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from vapr.batches.tokenize import Processor
from vapr.errors import UserError
from vapr.evaluation.generation.answer import collate
from vapr.evaluation.generation.open_model import Answerer
from vapr.evaluation.generation.prompts import Asked

NUM_PROVEN = 4
"""Answers that are compared."""
NUM_TOKENS = 16
SAME = 0.25
"""How far an engine may be from transformers with the adapter, as a share of how far the base is from it."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Difference of a token's log-prob, on average, that rounding makes."""


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer of transformers with the adapter, and the log-probs of its tokens with and without."""

    asked: Asked
    ids: list[int]
    adapted: list[float]
    base: list[float]
    rounding: float


def known_answers(
    answerer: Answerer, processor: Processor, asked: Sequence[Asked], dtype: torch.dtype
) -> list[KnownAnswer]:
    """Answer a few questions with transformers, and give its memory back."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = answerer.load(dtype)
    model = model.to(device).eval()
    with torch.inference_mode():
        known = [_known_answer(model, processor, one) for one in asked]
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return known


def _known_answer(model: Any, processor: Processor, one: Asked) -> KnownAnswer:
    pictures = [processor.process_images(one.images)]
    inputs = collate(processor, [one], pictures, model.device, model.dtype)
    start = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    said = whole[0, start:]
    inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[name] = (whole == processor.image_token_id).int()

    def log_probs() -> list[float]:
        logps = model(**inputs, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
        return [float(p) for p in logps.gather(-1, said[:, None])[:, 0]]

    adapted = log_probs()
    with _without_adapters(model):
        base = log_probs()
    return KnownAnswer(one, said.tolist(), adapted, base, ROUNDING.get(model.dtype, 0.05))


@contextlib.contextmanager
def _without_adapters(model: torch.nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def check_adapter(name: str, known: Sequence[KnownAnswer], measured: Sequence[Sequence[float]]) -> str:
    """Compare an engine's log-probs of known answers with transformers'.

    Args:
        name: the adapter, for messages.
        known: answers of transformers.
        measured: the engine's log-probs of their tokens.

    Returns:
        A line that says what was proven.

    Raises:
        UserError: if the engine does not use the adapter, or only a part of it.
    """
    from_adapted = _mean_difference([one.adapted for one in known], measured)
    from_base = _mean_difference([one.base for one in known], measured)
    between = _mean_difference([one.adapted for one in known], [one.base for one in known])
    rounding = max(one.rounding for one in known)
    figures = (
        f"log-probs of {len(known)} answers differ from transformers' by {from_adapted:.2g} a token with the adapter, "
        f"by {from_base:.2g} without"
    )
    if between < 2 * rounding:
        return f"{name}: the adapter changes hardly anything ({figures}): whether it is used cannot be told"
    if from_adapted > max(rounding, SAME * between):
        verdict = "does not use the adapter" if from_base < from_adapted else "uses the adapter in part or otherwise"
        raise UserError(
            f"{name}: vLLM {verdict} ({figures}); merge it with vapr export or PEFT, or use --engine transformers"
        )
    return f"{name}: the adapter is in use ({figures})"


def _mean_difference(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    differences = [abs(a - b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(differences) / max(1, len(differences))
