"""Shapes of benchmarks whose answers a judge rates."""

from collections.abc import Callable, Iterator

from vapr.evaluation.readers.pictures import UNNAMED
from vapr.evaluation.readers.shape import Row, Shape, as_text


def _llava_hub(row: Row) -> Iterator[tuple[str, Row]]:
    yield from _llava(as_text(row["question_id"]), row, row["gpt_answer"])


def _llava_tsv(row: Row) -> Iterator[tuple[str, Row]]:
    yield from _llava(f"tsv-{as_text(row['index'])}", row, row["gpt4_ans"])


def _llava(id: str, row: Row, reference: str) -> Iterator[tuple[str, Row]]:
    image = row["image"] or f"{UNNAMED}{id}.jpg"
    yield "questions.jsonl", {"question_id": id, "image": image, "text": row["question"], "category": row["category"]}
    yield "answers_gpt4.jsonl", {"question_id": id, "text": reference}
    yield "context.jsonl", {"image": image, "caption": row["caption"]}


SHAPES = {
    "llava-bench": (
        Shape(
            title="lmms-lab/llava-bench-in-the-wild", needs=("question_id", "question", "gpt_answer", "caption"),
            rows=_llava_hub, beside=("answers_gpt4.jsonl", "context.jsonl"), split="train",
            name=lambda row, column, number: f"images/{as_text(row.get('image_id') or row['question_id'])}",
        ),
        Shape(
            title="VLMEvalKit's LLaVABench.tsv", needs=("index", "question", "gpt4_ans", "caption", "category"),
            rows=_llava_tsv, beside=("answers_gpt4.jsonl", "context.jsonl"),
        ),
    ),
}  # fmt: skip

LOG_IDS: dict[str, tuple[str | Callable[[Row], str], ...]] = {"llava-bench": ("{question_id}",)}
