"""Shapes of benchmarks whose answers are letters."""

from collections.abc import Callable, Iterator

from vapr.evaluation.readers.shape import Row, Shape, as_list, as_number, as_text, lettered, picked

Own = Iterator[tuple[str, Row]]

SEED_TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip


def _cv_bench_hub(row: Row) -> Own:
    keys = ("idx", "type", "task", "question", "choices", "answer", "source", "prompt", "filename", "image")
    yield "test.jsonl", {**picked(row, keys), "choices": list(row["choices"])}


def _cv_bench_tsv(row: Row) -> Own:
    letter = as_text(row["answer"]).strip("()")
    yield "test.jsonl", {
        "idx": f"{as_text(row.get('split')) or 'tsv'}-{as_text(row['index'])}", "type": row.get("split") or "2D",
        "task": row.get("task") or row.get("category") or row.get("split"), "question": row["question"],
        "choices": lettered(row), "answer": f"({letter})", "source": row["source"], "prompt": row.get("prompt"),
        "image": row["image"],
    }  # fmt: skip


def _mmstar(row: Row) -> Own:
    """Yield MMStar's own row; VLMEvalKit keeps the options apart, or in the question as MMStar does."""
    question, options = as_text(row["question"]), lettered(row)
    if options and "Options:" not in question:
        listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
        question = f"{question}\nOptions: {listed}"
    yield "mmstar.jsonl", {
        "index": as_text(row["index"]), "question": question, "answer": row["answer"], "category": row["category"],
        "l2_category": row.get("l2_category") or row.get("l2-category"), "image": row["image"],
    }  # fmt: skip


def _seed_hub(row: Row) -> Own:
    """Yield the row of a question about an image; those about videos have other types, or say so."""
    kind = as_number(row["question_type_id"])
    if kind in range(1, len(SEED_TYPES) + 1) and row.get("data_type", "image") == "image":
        image = row["image"][0] if isinstance(row["image"], list) else row["image"]
        keys = ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer")
        yield "SEED-Bench.jsonl", {
            **picked(row, keys), "question_id": as_text(row["question_id"]), "question_type_id": kind,
            "data_id": image.removeprefix("SEED-Bench-image/"),
        }  # fmt: skip


def _seed_tsv(row: Row) -> Own:
    kind = as_text(row["category"]).replace("_", " ").lower()
    names = [name.lower() for name in SEED_TYPES]
    if kind not in names and kind.replace("instances", "instance") in names:
        kind = kind.replace("instances", "instance")
    options = [as_text(row.get(letter)) for letter in "ABCD"]
    yield "SEED-Bench.jsonl", {
        "question_id": f"tsv-{as_text(row['index'])}", "question_type_id": names.index(kind) + 1,
        "question": row["question"], "choice_a": options[0], "choice_b": options[1], "choice_c": options[2],
        "choice_d": options[3], "answer": row["answer"], "data_id": row["image"].removeprefix("SEED-Bench-image/"),
    }  # fmt: skip


def _mmmu_hub(row: Row) -> Own:
    if as_text(row["id"]).startswith("validation"):
        yield "validation.jsonl", {key: value for key, value in row.items() if value not in ("", None)}


def _mmmu_tsv(row: Row) -> Own:
    """Yield MMMU's own row. VLMEvalKit makes two options of an open question: the truth, and "Other Answers"."""
    id, options = as_text(row.get("id")) or as_text(row["index"]), lettered(row)
    if not id.startswith("validation"):
        return
    is_open = options[1:] == ["Other Answers"]
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    yield "validation.jsonl", {
        "id": id, "question": row["question"], "options": [] if is_open else options,
        "answer": options[0] if is_open else row["answer"], "question_type": "open" if is_open else "multiple-choice",
        **{f"image_{number}": image for number, image in enumerate(images, start=1) if image},
    }  # fmt: skip


def _mathvista_hub(row: Row) -> Own:
    left_out = ("decoded_image", "image")
    yield "testmini.jsonl", {k: v for k, v in row.items() if k not in left_out} | {
        "pid": as_text(row["pid"]), "image": row["decoded_image"] or row["image"], "choices": as_list(row["choices"]),
    }  # fmt: skip


def _mathvista_tsv(row: Row) -> Own:
    """Yield MathVista's own row; VLMEvalKit's ``question`` is the authors' whole prompt."""
    facts = picked(row, ("task", "context", "grade", "source", "language", "skills"))
    yield "testmini.jsonl", {
        "pid": f"tsv-{as_text(row['index'])}", "question": row["question"], "query": row["question"],
        "answer": as_text(row["answer"]), "question_type": row["question_type"], "answer_type": row["answer_type"],
        "choices": as_list(row.get("choices")), "precision": as_number(row.get("precision")) or None,
        "metadata": facts, "image": row["image"],
    }  # fmt: skip


SHAPES = {
    "cv-bench": (
        Shape(
            title="nyu-visionx/CV-Bench", needs=("idx", "type", "task", "question", "choices", "answer", "source"),
            rows=_cv_bench_hub, split="test",
        ),
        Shape(
            title="VLMEvalKit's CV-Bench-2D.tsv and -3D.tsv", needs=("index", "question", "A", "B", "answer", "source"),
            rows=_cv_bench_tsv,
        ),
    ),
    "mmstar": (
        Shape(
            title="Lin-Chen/MMStar", needs=("index", "question", "answer", "category", "l2_category"), rows=_mmstar,
            split="val",
        ),
        Shape(
            title="VLMEvalKit's MMStar.tsv", needs=("index", "question", "answer", "category", "l2-category"),
            rows=_mmstar,
        ),
    ),
    "seed-bench": (
        Shape(
            title="lmms-lab/SEED-Bench", needs=("question_id", "question_type_id", "choice_a", "choice_d", "answer"),
            rows=_seed_hub, split="test",
            name=lambda row, column, number: f"SEED-Bench-image/{as_text(row.get('data_id') or row['question_id'])}",
        ),
        Shape(
            title="VLMEvalKit's SEEDBench_IMG.tsv", needs=("index", "question", "A", "D", "answer", "category"),
            rows=_seed_tsv,
        ),
    ),
    "mmmu": (
        Shape(
            title="MMMU/MMMU", needs=("id", "question", "options", "answer", "question_type"), rows=_mmmu_hub,
            pictures=tuple(f"image_{number}" for number in range(1, 8)), split="validation",
            name=lambda row, column, number: f"images/{row['id']}_{column[-1]}",
        ),
        Shape(
            title="VLMEvalKit's MMMU_DEV_VAL.tsv", needs=("index", "id", "question", "A", "answer"), rows=_mmmu_tsv,
        ),
    ),
    "mathvista": (
        Shape(
            title="AI4Math/MathVista", needs=("pid", "question", "answer", "question_type", "answer_type", "choices"),
            rows=_mathvista_hub, pictures=("decoded_image",), split="testmini",
            name=lambda row, column, number: as_text(row["image"]),
        ),
        Shape(
            title="VLMEvalKit's MathVista_MINI.tsv",
            needs=("index", "question", "answer", "question_type", "answer_type", "choices"), rows=_mathvista_tsv,
        ),
    ),
}  # fmt: skip

LOG_IDS: dict[str, tuple[str | Callable[[Row], str], ...]] = {
    "cv-bench": ("{idx}", "{id}"),
    "mmstar": ("{index}", "{question_id}"),
    "seed-bench": ("{question_id}",),
    "mmmu": ("{id}",),
    "mathvista": ("{pid}", "{question_id}"),
}
