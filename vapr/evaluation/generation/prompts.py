"""Questions as the model is asked them: tokens and pictures, in batches whose composition never changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vapr.batches.tokenize import Processor, Prompt
from vapr.data.images import image_size
from vapr.data.pair import Message, messages_from, place_images
from vapr.data.row_values import PLACEHOLDER, with_image_parts
from vapr.errors import UserError, one_line
from vapr.evaluation.readers.pictures import require_images
from vapr.evaluation.scoring.prediction import Question

LENGTHS_ALIKE = 16
"""Prompts whose lengths share this many tokens go by their picture, so that it is processed once; padding is less."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question, rendered and tokenised; its pictures are not decoded yet."""

    question: Question
    prompt: Prompt
    images: tuple[Path | bytes, ...]  # none where it is asked blindly
    length: int  # tokens of the prompt, those of its pictures included


def messages_of(question: Question, *, blind: bool = False) -> list[Message]:
    """Return the conversation that asks a question: pictures at its marks, or before the text where it has none.

    Args:
        question: any.
        blind: leave the pictures out, the text as it is.

    Raises:
        UserError: if there are marks, but not as many as pictures.
    """
    messages = messages_from(with_image_parts(question.question, "question"), "question", "user")
    if blind:
        return [{**m, "content": [part for part in m["content"] if part["type"] != "image"]} for m in messages]
    marks = sum(part["type"] == "image" for part in messages[0]["content"])
    if marks not in (0, len(question.images)):
        raise UserError(f"{marks} '{PLACEHOLDER}' for {len(question.images)} image(s); correct the benchmark's file")
    return place_images(messages, len(question.images))


def check_images(questions: Sequence[Question]) -> dict[Path | bytes, tuple[int, int]]:
    """Return width and height of every picture asked about, from the files' headers.

    Raises:
        UserError: naming the first question whose picture is missing, with how many there are, or cannot be read.
    """
    require_images(questions)
    sizes: dict[Path | bytes, tuple[int, int]] = {}
    for question in questions:
        for image in question.images:
            if image in sizes:
                continue
            try:
                sizes[image] = image_size(image)
            except UserError as error:
                raise UserError(f"question '{question.id}' of {question.benchmark}: {error}") from None
    return sizes


def tokenize_questions(
    questions: Sequence[Question], processor: Processor, *, blind: bool = False,
    sizes: dict[Path | bytes, tuple[int, int]] | None = None,
) -> list[Asked]:  # fmt: skip
    """Render and tokenise questions as the model is asked them at inference.

    Args:
        questions: any.
        processor: the model's.
        blind: ask without the pictures.
        sizes: what :func:`check_images` returned for them.

    Raises:
        UserError: naming a question that the model's template, tokenizer or image processor refuses.
    """
    sizes = check_images(questions) if sizes is None and not blind else sizes or {}
    asked = []
    for question in questions:
        where = f"question '{question.id}' of {question.benchmark}"
        images = () if blind else question.images
        try:
            prompt = processor.tokenize_prompt(messages_of(question, blind=blind))
            image_tokens = processor.expected_image_tokens([sizes[image] for image in images])
        except (UserError, ValueError) as error:
            raise UserError(f"{where}: {one_line(error)}") from None
        placeholders = processor.places_for_images(prompt)
        if placeholders != len(images):
            raise UserError(
                f"{where}: its prompt holds {placeholders} '{processor.image_token}' for {len(images)} "
                "image(s); the mark must not stand in the question's text"
            )
        asked.append(Asked(question, prompt, images, len(prompt.ids) - placeholders + image_tokens))
    return asked


def check_lengths(asked: Sequence[Asked], max_new_tokens: int, most: int | None) -> None:
    """Refuse a prompt that leaves no room for the answer in the model's context of ``most`` tokens."""
    longest = max(asked, key=lambda one: one.length, default=None)
    if longest is not None and most is not None and longest.length + max_new_tokens > most:
        raise UserError(
            f"question '{longest.question.id}' of {longest.question.benchmark} takes {longest.length:,} tokens, which "
            f"with {max_new_tokens:,} of an answer is more than the model's {most:,}; lower --max-new-tokens, or scale "
            "its pictures down"
        )


def in_batches(asked: Sequence[Asked], batch_size: int) -> list[list[Asked]]:
    """Return questions in batches of similar length, the longest first, so that memory runs out at once or never.

    The order is that of the questions' lengths and pictures alone: a resumed run makes the same batches.
    """
    pictures: dict[object, int] = {}

    def place(one: Asked) -> tuple[int, int, int]:
        picture = pictures.setdefault(one.images[0] if one.images else None, len(pictures))
        return -(one.length // LENGTHS_ALIKE), picture, -one.length

    ordered = sorted(asked, key=place)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
