"""Shapes of benchmarks whose answers are yes or no."""

from collections.abc import Iterator

from vapr.errors import BadRow
from vapr.evaluation.benchmarks import pope
from vapr.evaluation.readers.shape import Row, Shape, as_text


def _pope_tsv(row: Row) -> Iterator[Row]:
    """Yield a question for each split that asks it: they stand in one row, with commas between them."""
    for split in as_text(row["category"]).replace(" ", "").split(","):
        if split not in pope.SPLITS:
            raise BadRow(f"'category' is {row['category']!r}; POPE's splits are {', '.join(pope.SPLITS)}")
        yield {
            "split": split, "question_id": f"tsv-{as_text(row['index'])}", "image": row["image"],
            "text": row["question"], "label": row["answer"],
        }  # fmt: skip


def _pope_hub(row: Row) -> Iterator[Row]:
    yield {
        "split": row["category"], "question_id": as_text(row["question_id"]), "image": row["image"],
        "text": row["question"], "label": row["answer"],
    }  # fmt: skip


def _coco_name(row: Row, column: str, number: int) -> str:
    return f"{row['image_source']}.jpg"


def _pope_file(row: Row) -> str:
    return f"coco_pope_{row.pop('split')}.json"


SHAPES = {
    "pope": (
        Shape(
            title="VLMEvalKit's POPE.tsv", needs=("index", "question", "answer", "category"), rows=_pope_tsv,
            file=_pope_file,
        ),
        Shape(
            title="lmms-lab/POPE", needs=("question_id", "question", "answer", "category", "image_source"),
            rows=_pope_hub, file=_pope_file, split="test", name=_coco_name,
        ),
    ),
}  # fmt: skip

LOG_IDS = {
    "pope": (
        "{category}-{question_id}", "adversarial-{question_id}", "popular-{question_id}", "random-{question_id}",
    ),
}  # fmt: skip
