"""Shapes of benchmarks whose answers are letters."""

from collections.abc import Iterator

from vapr.evaluation.readers.shape import Row, Shape, as_number, as_text, lettered, picked

SEED_TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip


def _cv_bench_hub(row: Row) -> Iterator[Row]:
    keys = ("idx", "type", "task", "question", "choices", "answer", "source", "prompt", "filename", "image")
    yield {**picked(row, keys), "choices": list(row["choices"])}


def _cv_bench_tsv(row: Row) -> Iterator[Row]:
    letter = as_text(row["answer"]).strip("()")
    yield {
        "idx": f"{as_text(row.get('split')) or 'tsv'}-{as_text(row['index'])}", "type": row.get("split") or "2D",
        "task": row.get("task") or row.get("category") or row.get("split"), "question": row["question"],
        "choices": lettered(row), "answer": f"({letter})", "source": row["source"], "prompt": row.get("prompt"),
        "image": row["image"],
    }  # fmt: skip


def _mmstar(row: Row) -> Iterator[Row]:
    """Yield MMStar's own row; VLMEvalKit keeps the options apart, or in the question as MMStar does."""
    question, options = as_text(row["question"]), lettered(row)
    if options and "Options:" not in question:
        listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
        question = f"{question}\nOptions: {listed}"
    yield {
        "index": as_text(row["index"]), "question": question, "answer": row["answer"], "category": row["category"],
        "l2_category": row.get("l2_category") or row.get("l2-category"), "image": row["image"],
    }  # fmt: skip


def _seed_hub(row: Row) -> Iterator[Row]:
    """Yield the row of a question about an image; those about videos have other types, or say so."""
    kind = as_number(row["question_type_id"])
    if kind in range(1, len(SEED_TYPES) + 1) and row.get("data_type", "image") == "image":
        image = row["image"][0] if isinstance(row["image"], list) else row["image"]
        keys = ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer")
        yield {
            **picked(row, keys), "question_id": as_text(row["question_id"]), "question_type_id": kind,
            "data_id": image.removeprefix("SEED-Bench-image/"),
        }  # fmt: skip


def _seed_tsv(row: Row) -> Iterator[Row]:
    kind = as_text(row["category"]).replace("_", " ").lower()
    names = [name.lower() for name in SEED_TYPES]
    if kind not in names and kind.replace("instances", "instance") in names:
        kind = kind.replace("instances", "instance")
    options = [as_text(row.get(letter)) for letter in "ABCD"]
    yield {
        "question_id": f"tsv-{as_text(row['index'])}", "question_type_id": names.index(kind) + 1,
        "question": row["question"], "choice_a": options[0], "choice_b": options[1], "choice_c": options[2],
        "choice_d": options[3], "answer": row["answer"], "data_id": row["image"].removeprefix("SEED-Bench-image/"),
    }  # fmt: skip


SHAPES = {
    "cv-bench": (
        Shape(
            title="nyu-visionx/CV-Bench", needs=("idx", "type", "task", "question", "choices", "answer", "source"),
            rows=_cv_bench_hub, file=lambda row: "test.jsonl", split="test",
        ),
        Shape(
            title="VLMEvalKit's CV-Bench-2D.tsv and -3D.tsv", needs=("index", "question", "A", "B", "answer", "source"),
            rows=_cv_bench_tsv, file=lambda row: "test.jsonl",
        ),
    ),
    "mmstar": (
        Shape(
            title="Lin-Chen/MMStar", needs=("index", "question", "answer", "category", "l2_category"), rows=_mmstar,
            file=lambda row: "mmstar.jsonl", split="val",
        ),
        Shape(
            title="VLMEvalKit's MMStar.tsv", needs=("index", "question", "answer", "category", "l2-category"),
            rows=_mmstar, file=lambda row: "mmstar.jsonl",
        ),
    ),
    "seed-bench": (
        Shape(
            title="lmms-lab/SEED-Bench", needs=("question_id", "question_type_id", "choice_a", "choice_d", "answer"),
            rows=_seed_hub, file=lambda row: "SEED-Bench.json", split="test",
        ),
        Shape(
            title="VLMEvalKit's SEEDBench_IMG.tsv", needs=("index", "question", "A", "D", "answer", "category"),
            rows=_seed_tsv, file=lambda row: "SEED-Bench.json",
        ),
    ),
}  # fmt: skip

LOG_IDS = {
    "cv-bench": ("{idx}", "{id}"), "mmstar": ("{index}", "{question_id}"), "seed-bench": ("{question_id}",),
}  # fmt: skip
