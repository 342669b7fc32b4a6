"""Answer questions with an untouched Hugging Face model, in batches. B = batch, T = tokens of its longest prompt."""

import contextlib
import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from vapr.batches.tokenize import Processor
from vapr.batches.workers import default_workers
from vapr.errors import UserError
from vapr.evaluation.generation.first_token import FirstToken, yes_no_tokens
from vapr.evaluation.generation.prompts import Asked, check_lengths, in_batches, tokenize_questions
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Prediction, Question
from vapr.families import FAMILIES
from vapr.families.processed_image import ProcessedImage
from vapr.progress import Display

BATCHES_AHEAD = 2
"""Batches whose pictures are decoded and processed while one is answered."""


def answer_questions(
    model: transformers.PreTrainedModel, processor: Processor, questions: Sequence[Question],
    settings: Settings | None = None, *, blind: bool = False, label: str = "answer", quiet: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Answer questions; the answers are those that each question alone would get.

    Args:
        model: of transformers, in evaluation mode, its weights merged or with adapters inside.
        processor: the model's; pixels are given to the model in its own dtype.
        questions: of any benchmarks.
        settings: None for greedy answers.
        blind: ask without the pictures.
        label: what the progress is called.
        quiet: show no progress.

    Returns:
        The answers in the order of the questions.

    Raises:
        UserError: naming a question that cannot be asked, or if the GPU's memory does not suffice.
    """
    settings = (settings or Settings()).of("transformers")
    asked = tokenize_questions(questions, processor, blind=blind)
    places = {id(one): number for number, one in enumerate(asked)}
    answers: dict[int, Prediction] = {}
    batches = in_batches(asked, settings.batch_size or 1)
    with Display(label, len(asked), unit="question", quiet=quiet) as display:
        for batch, predictions in zip(batches, answer_batches(model, processor, batches, settings), strict=True):
            answers |= {places[id(one)]: said for one, said in zip(batch, predictions, strict=True)}
            display.advance("", len(predictions))
    return [answers[number] for number in range(len(asked))]


def answer_batches(
    model: transformers.PreTrainedModel, processor: Processor, batches: Sequence[Sequence[Asked]], settings: Settings
) -> Iterator[list[Prediction]]:
    """Yield the answers to one batch after another.

    A yes/no question's ``meta`` gets ``log_p_yes`` and ``log_p_no``; an answer that reached ``max_new_tokens`` gets
    ``cut_off``. Raises UserError as :func:`answer_questions` does.
    """
    check_lengths(
        [one for batch in batches for one in batch], settings.max_new_tokens,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )  # fmt: skip
    words = yes_no_tokens(processor.tokenizer)
    with contextlib.closing(_with_pictures(batches, processor)) as ready, _own_settings(model):
        for batch, pictures in ready:
            first = FirstToken(words or ())
            try:
                said = _generate(model, processor, batch, pictures, settings, first)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{len(batch)} questions at a time do not fit the GPU; lower --batch-size (answers so far are kept)"
                ) from None
            yield [
                _prediction(one.question, ids, processor, first.log_probs[n] if words else None)  # type: ignore[index]
                for n, (one, ids) in enumerate(zip(batch, said, strict=True))
            ]


def _prediction(question: Question, ids: list[int], processor: Processor, log_probs: Tensor | None) -> Prediction:
    more: dict[str, Any] = {}
    if log_probs is not None and asks_yes_or_no(question):
        more = {"log_p_yes": round(float(log_probs[0]), 5), "log_p_no": round(float(log_probs[1]), 5)}
    ends = [n for n, id in enumerate(ids) if id in processor.eos_token_ids]
    if not ends:
        more["cut_off"] = True
    text = str(processor.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True))
    return Prediction.of(question, text.strip(), **more)


def asks_yes_or_no(question: Question) -> bool:
    """Tell whether the truth is yes or no."""
    return str(question.answer).strip().lower().rstrip(".") in ("yes", "no")


def _with_pictures(
    batches: Sequence[Sequence[Asked]], processor: Processor
) -> Generator[tuple[Sequence[Asked], list[tuple[ProcessedImage, ...]]]]:
    """Yield batches with their processed pictures; threads are a few batches ahead."""

    def start(batch: Sequence[Asked]) -> list[list[Future[ProcessedImage]]]:
        return [
            [pool.submit(processor.process_image, image, several=len(one.images) > 1) for image in one.images]
            for one in batch
        ]

    waiting: deque[tuple[Sequence[Asked], list[list[Future[ProcessedImage]]]]] = deque()
    left = iter(batches)
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="pictures") as pool:
        try:
            while True:
                while len(waiting) <= BATCHES_AHEAD and (batch := next(left, None)) is not None:
                    waiting.append((batch, start(batch)))
                if not waiting:
                    return
                batch, pictures = waiting.popleft()
                yield (
                    batch,
                    [tuple(_result(one, p) for p in row) for one, row in zip(batch, pictures, strict=True)],
                )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(one: Asked, picture: "Future[ProcessedImage]") -> ProcessedImage:
    try:
        return picture.result()
    except UserError as error:
        raise UserError(f"question '{one.question.id}' of {one.question.benchmark}: {error}") from None


@contextlib.contextmanager
def _own_settings(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Leave out what generation_config.json asks for, such as a penalty: what is not in Settings does not happen."""
    before, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _generate(
    model: Any, processor: Processor, batch: Sequence[Asked], pictures: Sequence[tuple[ProcessedImage, ...]],
    settings: Settings, first: FirstToken,
) -> list[list[int]]:  # fmt: skip
    """Return the ids that the model says to each question, its end of turn included."""
    inputs = collate(processor, batch, pictures, model.device, model.dtype)
    config = transformers.GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=settings.temperature > 0,
        eos_token_id=processor.eos_token_ids, pad_token_id=_pad(processor),
        **({"temperature": settings.temperature, "top_k": 0} if settings.temperature > 0 else {}),
    )  # fmt: skip
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(question_seed(settings.seed, *batch))
        out = model.generate(
            **inputs, generation_config=config, logits_processor=transformers.LogitsProcessorList([first])
        )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def collate(
    processor: Processor, batch: Sequence[Asked], pictures: Sequence[tuple[ProcessedImage, ...]],
    device: torch.device, dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Return what ``generate`` takes, (B, T): prompts end together, and padding before them is masked.

    transformers counts positions, Qwen's in time, height and width too, from the first token that is not masked.
    """
    rows = [processor.with_images(one.prompt, shown) for one, shown in zip(batch, pictures, strict=True)]
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), _pad(processor), np.int64)
    mask = np.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, longest - len(row) :] = row
        mask[n, longest - len(row) :] = 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    images = [image for shown in pictures for image in shown]
    inputs |= FAMILIES[processor.family].inputs(images, inputs["input_ids"] == processor.image_token_id)
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def _pad(processor: Processor) -> int:
    """Return the id that pads: it is masked, so any does that is no picture's."""
    pad = processor.tokenizer.pad_token_id
    return int(processor.eos_token_ids[0] if pad is None or pad == processor.image_token_id else pad)


def question_seed(seed: int, *asked: Asked) -> int:
    """Return the seed of a batch's draws, or of one answer's: a resumed run draws alike."""
    named = repr((seed, [(one.question.benchmark, one.question.id) for one in asked]))
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7], "big")
