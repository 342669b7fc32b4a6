"""Small sets in the layouts of the benchmarks' authors, made by hand for these tests."""

import json
from collections.abc import Callable
from pathlib import Path

from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.scoring.prediction import Prediction, Question


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def pope(folder: Path, name: str = "pope") -> Path:
    """Two splits of eight questions about two pictures, half of them yes."""
    for split in ("adversarial", "popular"):
        rows = [
            {
                "question_id": n,
                "image": f"{n % 2}.jpg",
                "text": f"Is there a thing{n} in the image?",
                "label": "yes" if n < 5 else "no",
            }
            for n in range(1, 9)
        ]
        write_lines(folder / f"coco_{name}_{split}.json", rows)
    return folder


def naturalbench(folder: Path, groups: int = 3) -> Path:
    """Groups of yes/no questions, and one of multiple choice."""
    rows = []
    for index in range(groups):
        choice = index == groups - 1
        first, second = ("A", "B") if choice else ("Yes", "No")
        rows.append({
            "Index": index, "Question_0": f"Is it red ({index})?", "Question_1": f"Is it blue ({index})?",
            "Image_0_Question_0": first, "Image_1_Question_0": second, "Image_0_Question_1": second,
            "Image_1_Question_1": first, "Question_Type": "multiple_choice" if choice else "yes_no", "Source": "made",
        })  # fmt: skip
    write_lines(folder / "naturalbench.jsonl", rows)
    return folder


def amber(folder: Path) -> Path:
    """Two pictures to describe, and eight questions about them with ten kinds of annotation."""
    write_json(folder / "relation.json", {
        "man": ["person", "people"], "dog": [], "sofa": ["couch", "chair"], "cat": [], "tree": ["forest", "leave"],
        "bus": ["window"], "can": [], "knife": [], "light": [],
    })  # fmt: skip
    (folder / "safe_words.txt").write_text("light\n")
    notes = [
        {"id": 1, "type": "generative", "truth": ["man", "sofa"], "hallu": ["dog", "tree"]},
        {"id": 2, "type": "generative", "truth": ["bus", "tree", "man"], "hallu": ["cat"]},
    ]
    types = ["attribute-state", "attribute-number", "attribute-action", "hallucination"]
    facts = [
        (f"discriminative-{kind}", truth)
        for kind in types
        for truth in ("yes", "no")
        if (kind, truth) != (types[3], "yes")
    ]
    facts += [("discriminative-relation", "yes"), ("relation", "no")]
    queries = []
    for number, (kind, truth) in enumerate(facts, start=1005):
        notes.append({"id": number, "type": kind, "truth": truth})
        queries.append({"id": number, "image": f"AMBER_{number % 2 + 1}.jpg", "query": f"Is thing {number} so?"})
    write_json(folder / "annotations.json", notes)
    write_json(folder / "query" / "query_discriminative.json", queries)
    write_json(folder / "query" / "query_generative.json", [
        {"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in (1, 2)
    ])  # fmt: skip
    return folder


def mme(folder: Path) -> Path:
    """Three tasks of two pictures: two of perception, one in the layout with images/, and one of cognition."""
    for task in ("existence", "OCR", "code_reasoning"):
        texts = folder / task / "questions_answers_YN" if task == "OCR" else folder / task
        texts.mkdir(parents=True)
        for n in (1, 2):
            asked = [f"Is it {word} ({n})? Please answer yes or no." for word in ("red", "blue")]
            (texts / f"000{n}.txt").write_text(f"{asked[0]}\tYes\n{asked[1]}\tNo\n")
    return folder


def hallusion_row(category: str, set_id: int, figure: int, number: int, truth: str) -> dict:
    return {
        "category": category, "subcategory": "chart", "visual_input": str(min(figure, 1)), "set_id": str(set_id),
        "figure_id": str(figure), "sample_note": "made", "question_id": str(number), "question": f"Is {set_id}-{number} so?",
        "gt_answer_details": "made", "gt_answer": truth,
        "filename": None if category == "VS" and figure == 0 else f"./{category}/chart/{set_id}_{figure}.png",
    }  # fmt: skip


HALLUSION = [
    # Question 0 is yes without a picture and no with one; question 1 the other way round.
    hallusion_row("VS", 0, 0, 0, "1"), hallusion_row("VS", 0, 0, 1, "0"),
    hallusion_row("VS", 0, 1, 0, "0"), hallusion_row("VS", 0, 1, 1, "1"),
    # Question 0 is yes on both figures.
    hallusion_row("VD", 1, 0, 0, "1"), hallusion_row("VD", 1, 1, 0, "1"),
]  # fmt: skip


def hallusionbench(folder: Path) -> Path:
    write_json(folder / "HallusionBench.json", HALLUSION)
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {
    "amber-d": amber,
    "amber-g": amber,
    "hallusionbench": hallusionbench,
    "mme": mme,
    "naturalbench": naturalbench,
    "pope": pope,
    "repope": lambda folder: pope(folder, "repope"),
}
"""Writers of these sets by the name of their benchmark."""


def questions_of(name: str, folder: Path) -> list[Question]:
    return BENCHMARKS[name].read(MAKE[name](folder))


def answered(questions: list[Question], answer: Callable[[Question], str]) -> list[Prediction]:
    return [Prediction.of(question, answer(question)) for question in questions]
