"""Shapes of benchmarks whose answers are yes or no."""

from collections.abc import Callable, Iterator
from pathlib import Path

from vapr.errors import BadRow
from vapr.evaluation.readers.pictures import UNNAMED
from vapr.evaluation.readers.shape import Row, Shape, as_text, picked

POPE_SPLITS = ("adversarial", "popular", "random")
MME_TASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
HALLUSION = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")
FLAT = {"index": "Index", "question": "Question", "type": "Question_Type", "answer": "Answer"}

Own = Iterator[tuple[str, Row]]


def _pope_tsv(row: Row) -> Own:
    """Yield a question for each split that asks it: they stand in one row, with commas between them."""
    for split in as_text(row["category"]).replace(" ", "").split(","):
        yield _pope(split, f"tsv-{as_text(row['index'])}", row)


def _pope_hub(row: Row) -> Own:
    yield _pope(as_text(row["category"]), as_text(row["question_id"]), row)


def _pope(split: str, id: str, row: Row) -> tuple[str, Row]:
    if split not in POPE_SPLITS:
        raise BadRow(f"'category' is {row['category']!r}; POPE's splits are {', '.join(POPE_SPLITS)}")
    own = {"question_id": id, "image": row["image"], "text": row["question"], "label": row["answer"]}
    return f"coco_pope_{split}.json", own


def _naturalbench_hub(row: Row) -> Own:
    yield "naturalbench.jsonl", row


def _naturalbench_tsv(row: Row) -> Own:
    yield "naturalbench.jsonl", {own: row[name] for name, own in FLAT.items()} | {"Image": row["image"]}


def _amber_tsv(row: Row) -> Own:
    id = f"tsv-{as_text(row['index'])}"
    yield "query/query_discriminative.json", {"id": id, "image": row["image"], "query": row["question"]}
    yield "annotations.json", {"id": id, "type": row["category"], "truth": as_text(row["answer"]).lower()}


def _mme(row: Row) -> Own:
    """Yield a line of a picture's file, question and truth; the picture lies beside it in the folder of the task."""
    task = as_text(row["category"])
    if task not in MME_TASKS:
        raise BadRow(f"'category' is {task!r}; MME's tasks are {', '.join(MME_TASKS)}")
    name = Path(as_text(row["image"]) or _mme_name(row, "image", 0)).stem
    yield f"{task}/{name}.txt", {"question": row["question"], "answer": row["answer"]}


def _mme_name(row: Row, column: str, number: int) -> str:
    given = as_text(row.get("question_id") or row.get("image_path"))
    name = (
        Path(given).name if given else f"{UNNAMED}{as_text(row.get('index'))}.jpg"
    )  # MME knows pictures by the ending
    return f"{as_text(row['category'])}/{name}"


def _mme_order(name: str) -> tuple[int, str]:
    return MME_TASKS.index(name.split("/")[0]), name


def _hallusion_hub(row: Row) -> Own:
    has_picture = as_text(row.get("visual_input")) != "0"
    name = {"filename": row["image"]} if has_picture and row["image"] else {"filename": None}
    yield "HallusionBench.json", picked(row, HALLUSION) | name


def _hallusion_tsv(row: Row) -> Own:
    """Yield the row whose numbers stand at the end of its index: ..._<set>_<figure>_<question>."""
    parts = as_text(row["index"]).split("_")
    if len(parts) < 4 or not all(part.isdecimal() for part in parts[-3:]):
        raise BadRow(f"'index' is {as_text(row['index'])!r}; it must end with set, figure and question, such as _0_1_0")
    gold = {"yes": "1", "no": "0"}.get(as_text(row["answer"]).lower())
    yield "HallusionBench.json", {
        "category": row["category"], "subcategory": row["l2-category"], "set_id": parts[-3], "figure_id": parts[-2],
        "question_id": parts[-1], "question": row["question"], "gt_answer": gold, "filename": row["image"] or None,
    }  # fmt: skip


def _question_of_group(facts: Row) -> str:
    """Return the id of a question of NaturalBench, whose index counts pictures, then questions, then groups."""
    index = int(as_text(facts.get("Index", facts.get("id"))))
    return f"{index // 4}-q{index // 2 % 2}-i{index % 2}"


SHAPES = {
    "pope": (
        Shape(
            title="lmms-lab/POPE", needs=("question_id", "question", "answer", "category", "image_source"),
            rows=_pope_hub, split="test", name=lambda row, column, number: f"{row['image_source']}.jpg",
        ),
        Shape(title="VLMEvalKit's POPE.tsv", needs=("index", "question", "answer", "category"), rows=_pope_tsv),
    ),
    "naturalbench": (
        Shape(
            title="BaiqiL/NaturalBench", needs=("Index", "Question_0", "Image_0_Question_0"), rows=_naturalbench_hub,
            pictures=("Image_0", "Image_1"), split="train",
            name=lambda row, column, number: f"images/{row['Index']}_{column[-1]}",
        ),
        Shape(
            title="BaiqiL/NaturalBench-lmms-eval", needs=("Index", "Question", "Question_Type", "Answer"),
            rows=_naturalbench_hub, pictures=("Image",), split="test",
        ),
        Shape(
            title="VLMEvalKit's NaturalBenchDataset.tsv", needs=("index", "question", "type", "answer"),
            rows=_naturalbench_tsv,
        ),
    ),
    "amber-d": (
        Shape(
            title="VLMEvalKit's AMBER.tsv", needs=("index", "question", "answer", "category"), rows=_amber_tsv,
            form="list", beside=("annotations.json",),
        ),
    ),
    "mme": (
        Shape(
            title="lmms-lab/MME", needs=("question_id", "question", "answer", "category"), rows=_mme, form="tabs",
            split="test", name=_mme_name, order=_mme_order,
        ),
        Shape(
            title="VLMEvalKit's MME.tsv", needs=("index", "question", "answer", "category"), rows=_mme, form="tabs",
            name=_mme_name, order=_mme_order,
        ),
    ),
    "hallusionbench": (
        Shape(
            title="lmms-lab/HallusionBench", needs=("set_id", "figure_id", "question_id", "question", "gt_answer"),
            rows=_hallusion_hub, form="list", split="image+non_image",
            name=lambda row, column, number: as_text(row.get("filename")) or f"{as_text(row['set_id'])}.png",
        ),
        Shape(
            title="VLMEvalKit's HallusionBench.tsv", needs=("index", "question", "answer", "category", "l2-category"),
            rows=_hallusion_tsv, form="list",
        ),
    ),
}  # fmt: skip

_POPE_IDS = ("{category}-{question_id}", *(f"{split}-{{question_id}}" for split in POPE_SPLITS))

LOG_IDS: dict[str, tuple[str | Callable[[Row], str], ...]] = {
    "pope": _POPE_IDS,
    "repope": _POPE_IDS,
    "naturalbench": (_question_of_group,),
    "amber-g": ("{question_id}",),
    "hallusionbench": ("{category}_{subcategory}_{set_id}_{figure_id}_{question_id}",),
}
