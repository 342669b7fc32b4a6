"""Rows of benchmarks as each tool has them, and the same questions as their authors write them.

Columns are those of the data sets on the hub and of VLMEvalKit's tables; their contents are made up.
"""

import json
from pathlib import Path

from tests.evaluation.readers.tool_files import base64_of, picture


def struct(number: int) -> dict:
    return {"bytes": picture(number), "path": None}


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


NATURAL = [
    ("yes_no", "Is it red?", "Is it blue?", "Yes", "No"),
    ("multiple_choice", "What is it? A: cat, B: dog", "Where? A: in, B: out", "A", "B"),
]


def naturalbench_group(n: int) -> dict:
    kind, one, other, a, b = NATURAL[n]
    return {
        "Index": n, "Image_0": struct(2 * n), "Image_1": struct(2 * n + 1), "Question_0": one, "Question_1": other,
        "Image_0_Question_0": a, "Image_1_Question_0": b, "Image_0_Question_1": b, "Image_1_Question_1": a,
        "Question_Type": kind, "Source": "DOCCI",
    }  # fmt: skip


def naturalbench_flat() -> list[dict]:
    rows = []
    for n in range(len(NATURAL)):
        group = naturalbench_group(n)
        for q in (0, 1):
            for i in (0, 1):
                row = {
                    "Index": str(4 * n + 2 * q + i),
                    "Image": group[f"Image_{i}"],
                    "Question": group[f"Question_{q}"],
                }
                rows.append(row | {"Question_Type": group["Question_Type"], "Answer": group[f"Image_{i}_Question_{q}"]})
    return rows


def naturalbench_tsv() -> list[dict]:
    return [
        {"index": row["Index"], "image": base64_of(2 * (int(row["Index"]) // 4) + int(row["Index"]) % 2), "question": row["Question"],
         "type": row["Question_Type"], "answer": row["Answer"], "source": "DOCCI"}
        for row in naturalbench_flat()
    ]  # fmt: skip


def naturalbench_own(folder: Path) -> Path:
    rows = [
        {key: value for key, value in naturalbench_group(n).items() if key not in ("Image_0", "Image_1")}
        for n in (0, 1)
    ]
    (folder / "rows.jsonl").write_text(lines(rows))
    return folder / "rows.jsonl"


MME_ROWS = [
    ("color", "0001.jpg", "Is there a red cup? Please answer yes or no.", "Yes"),
    ("color", "0001.jpg", "Is there a blue cup? Please answer yes or no.", "No"),
    ("OCR", "0002.jpg", "Is the word \"HOPE\"? Please answer yes or no.", "Yes"),
    ("OCR", "0002.jpg", "Is the word \"ROPE\"? Please answer yes or no.", "No"),
]  # fmt: skip


def mme_hub() -> list[dict]:
    return [
        {
            "question_id": f"{task}/{name}",
            "image": struct(n // 2),
            "question": question,
            "answer": answer,
            "category": task,
        }
        for n, (task, name, question, answer) in enumerate(MME_ROWS)
    ]


def mme_tsv() -> list[dict]:
    return [
        {"index": n, "image": base64_of(n // 2) if n % 2 == 0 else n - 1, "question": question, "answer": answer,
         "category": task, "image_path": name}
        for n, (task, name, question, answer) in enumerate(MME_ROWS)
    ]  # fmt: skip


def mme_own(folder: Path) -> Path:
    for task in ("color", "OCR"):
        rows = [row for row in MME_ROWS if row[0] == task]
        (folder / f"{task}.txt").write_text("".join("\t".join(row[1:]) + "\n" for row in rows))
    return folder


HALLUSION = [("VD", "figure", 0, 0, 0), ("VD", "figure", 0, 1, 0), ("VS", "chart", 3, 1, 1)]


def hallusion_own_rows() -> list[dict]:
    rows = [
        {"category": c, "subcategory": s, "visual_input": "1", "set_id": str(n), "figure_id": str(f), "sample_note": "x",
         "question_id": str(q), "question": f"Is figure {n}-{f} level?", "gt_answer_details": "", "gt_answer": str((f + q) % 2),
         "filename": f"./{c}/{s}/{n}_{f}.png"}
        for c, s, n, f, q in HALLUSION
    ]  # fmt: skip
    asked = {
        "visual_input": "0",
        "figure_id": "0",
        "question": "Is the earth flat?",
        "gt_answer": "0",
        "filename": None,
    }
    return [*rows, rows[-1] | asked]


def hallusion_hub() -> list[dict]:
    return [{**row, "image": struct(n) if row["filename"] else None} for n, row in enumerate(hallusion_own_rows())]


def hallusion_tsv() -> list[dict]:
    return [
        {"index": f"{row['category']}_{row['subcategory']}_figure_{row['set_id']}_{row['figure_id']}_{row['question_id']}",
         "image": base64_of(n), "question": row["question"], "answer": ("No", "Yes")[int(row["gt_answer"])],
         "category": row["category"], "l2-category": row["subcategory"]}
        for n, row in enumerate(hallusion_own_rows()) if row["filename"]
    ]  # fmt: skip


def hallusion_own(folder: Path) -> Path:
    write_json(folder / "HallusionBench.json", hallusion_own_rows())
    return folder / "HallusionBench.json"


def amber_tsv() -> list[dict]:
    asked = [
        ("Is the sky sunny?", "Yes", "discriminative-attribute-state"),
        ("Is there a dog?", "No", "discriminative-hallucination"),
    ]
    return [
        {
            "index": n,
            "image": base64_of(n),
            "question": q,
            "answer": a,
            "category": kind,
            "image_path": f"AMBER_{n + 1}.jpg",
        }
        for n, (q, a, kind) in enumerate(asked)
    ]


def amber_own(folder: Path) -> Path:
    rows = amber_tsv()
    write_json(
        folder / "annotations.json",
        [{"id": n, "type": row["category"], "truth": row["answer"].lower()} for n, row in enumerate(rows)],
    )
    write_json(
        folder / "query" / "query_discriminative.json",
        [{"id": n, "image": row["image_path"], "query": row["question"]} for n, row in enumerate(rows)],
    )
    return folder


def cv_bench_hub() -> list[dict]:
    rows = []
    for n, (kind, task, source, choices) in enumerate(
        [
            ("2D", "Count", "ADE20K", ["3", "2", "1"]),
            ("2D", "Relation", "COCO", ["left", "right"]),
            ("3D", "Depth", "Omni3D", ["cup", "box"]),
        ]
    ):
        question = f"How is thing {n}?"
        listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=False))
        rows.append({
            "idx": n, "type": kind, "task": task, "image": struct(n), "question": question, "choices": choices,
            "answer": f"({'AB'[n % 2]})", "prompt": f"{question} Select from the following choices.\n{listed}",
            "filename": f"img/{kind}/{task.lower()}/{n}.png", "source": source, "source_dataset": source,
            "source_filename": f"s{n}.jpg", "target_class": None, "target_size": None, "bbox": None,
        })  # fmt: skip
    return rows


def cv_bench_tsv() -> list[dict]:
    return [
        {"index": n, "image": base64_of(n), "question": row["question"], "A": row["choices"][0], "B": row["choices"][1],
         "C": row["choices"][2] if len(row["choices"]) > 2 else "", "answer": row["answer"].strip("()"), "split": row["type"],
         "category": row["task"], "source": row["source"], "prompt": row["prompt"]}
        for n, row in enumerate(cv_bench_hub())
    ]  # fmt: skip


def cv_bench_own(folder: Path) -> Path:
    (folder / "test_2d.jsonl").write_text(
        lines([{k: v for k, v in row.items() if k != "image"} for row in cv_bench_hub()])
    )
    return folder


def mmstar_hub() -> list[dict]:
    return [
        {"index": n, "question": f"Which one is {n}?\nOptions: A: red, B: blue, C: green, D: none", "image": struct(n), "answer": "BC"[n],
         "category": "coarse perception", "l2_category": ("image scene", "image style")[n], "meta_info": {"source": "MMBench"}}
        for n in (0, 1)
    ]  # fmt: skip


def mmstar_tsv() -> list[dict]:
    return [
        {"index": row["index"], "image": base64_of(n), "question": row["question"], "answer": row["answer"],
         "category": row["category"], "l2-category": row["l2_category"], "bench": "MMBench"}
        for n, row in enumerate(mmstar_hub())
    ]  # fmt: skip


def mmstar_own(folder: Path) -> Path:
    (folder / "mmstar.jsonl").write_text(
        lines([{k: v for k, v in row.items() if k != "image"} for row in mmstar_hub()])
    )
    return folder / "mmstar.jsonl"


def seed_own_rows() -> list[dict]:
    kinds = [(1, "101669", "1454426_2591111986"), (6, "101670", "1454426_2591111987"), (10, "v20", "v.mp4")]
    return [
        {"question_id": id, "question_type_id": kind, "data_id": data, "question": f"What about {id}?", "choice_a": "One", "choice_b": "Two",
         "choice_c": "Three", "choice_d": "Four", "answer": "A"}
        for kind, id, data in kinds
    ]  # fmt: skip


def seed_hub() -> list[dict]:
    return [
        {
            **row,
            "data_type": "image" if row["question_type_id"] < 10 else "video",
            "image": [struct(n)],
            "segment": None,
        }
        for n, row in enumerate(seed_own_rows())
    ]


def seed_tsv() -> list[dict]:
    names = {1: "Scene_Understanding", 6: "Spatial_Relation"}
    return [
        {"index": n, "image": base64_of(n), "question": row["question"], "A": "One", "B": "Two", "C": "Three", "D": "Four",
         "answer": row["answer"], "category": names[row["question_type_id"]]}
        for n, row in enumerate(seed_own_rows()[:2])
    ]  # fmt: skip


def seed_own(folder: Path) -> Path:
    write_json(folder / "SEED-Bench.json", {"questions": seed_own_rows()})
    return folder / "SEED-Bench.json"


def mmmu_hub() -> list[dict]:
    rows = [
        ("validation_Art_1", "What is in <image 1>?", "['cat', 'dog\\'s ear']", "B", "multiple-choice", 1),
        ("validation_Math_2", "Compare <image 1> and <image 2>.", "[]", "['24/7', '3.429']", "open", 2),
        ("dev_Math_1", "What?", "['a', 'b']", "A", "multiple-choice", 1),
    ]
    return [
        {"id": id, "question": question, "options": options, "explanation": "", "answer": answer, "question_type": kind,
         **{f"image_{k}": struct(10 * n + k) if k <= count else None for k in range(1, 8)}}
        for n, (id, question, options, answer, kind, count) in enumerate(rows)
    ]  # fmt: skip


def mmmu_tsv() -> list[dict]:
    return [
        {"index": 1, "id": "validation_Art_1", "image": base64_of(1), "question": "What is in <image 1>?", "A": "cat", "B": "dog's ear", "answer": "B",
         "split": "validation", "image_path": "a.png"},
        {"index": 2, "id": "validation_Math_2", "image": json.dumps([base64_of(11), base64_of(12)]), "question": "Compare <image 1> and <image 2>.",
         "A": "['24/7', '3.429']", "B": "Other Answers", "answer": "A", "split": "validation", "image_path": "['b.png', 'c.png']"},
        {"index": 3, "id": "dev_Math_1", "image": base64_of(21), "question": "What?", "A": "a", "B": "b", "answer": "A", "split": "dev", "image_path": "d.png"},
    ]  # fmt: skip


def mmmu_own(folder: Path) -> Path:
    rows = [{k: v for k, v in row.items() if not k.startswith("image_")} for row in mmmu_hub()[:2]]
    (folder / "validation.jsonl").write_text(lines(rows))
    return folder / "validation.jsonl"


def mathvista_own_rows() -> list[dict]:
    return [
        {"pid": "1", "question": "How high?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": 1.0, "answer": "1.2",
         "question_type": "free_form", "answer_type": "float", "metadata": {"task": "geometry", "category": "x"}, "query": "Hint: give a number.\nQuestion: How high?"},
        {"pid": "2", "question": "Which?", "image": "images/2.jpg", "choices": ["3", "4"], "unit": None, "precision": None, "answer": "4",
         "question_type": "multi_choice", "answer_type": "text", "metadata": {"task": "vqa", "category": "y"}, "query": "Hint: pick.\nQuestion: Which?\nChoices:\n(A) 3\n(B) 4"},
    ]  # fmt: skip


def mathvista_hub() -> list[dict]:
    return [{**row, "decoded_image": struct(n)} for n, row in enumerate(mathvista_own_rows())]


def mathvista_tsv() -> list[dict]:
    return [
        {"index": int(row["pid"]), "image": base64_of(n), "question": row["query"], "answer": row["answer"], "answer_option": "",
         "question_type": row["question_type"], "answer_type": row["answer_type"], "choices": str(row["choices"] or []),
         "precision": row["precision"], "task": row["metadata"]["task"], "skills": "['x']"}
        for n, row in enumerate(mathvista_own_rows())
    ]  # fmt: skip


def mathvista_own(folder: Path) -> Path:
    (folder / "testmini.jsonl").write_text(lines(mathvista_own_rows()))
    return folder / "testmini.jsonl"


def llava_hub() -> list[dict]:
    return [
        {"question_id": n, "question": "Describe this photo.", "image": struct(n), "image_id": f"00{n}.jpg", "category": ("conv", "detail")[n],
         "gpt_answer": f"A thing {n}.", "caption": f"It shows {n}."}
        for n in (0, 1)
    ]  # fmt: skip


def llava_tsv() -> list[dict]:
    return [
        {
            "index": n,
            "image": base64_of(n),
            "question": row["question"],
            "caption": row["caption"],
            "gpt4_ans": row["gpt_answer"],
            "category": row["category"],
        }
        for n, row in enumerate(llava_hub())
    ]


def llava_own(folder: Path) -> Path:
    rows = llava_hub()
    (folder / "questions.jsonl").write_text(
        lines(
            [
                {
                    "question_id": r["question_id"],
                    "image": r["image_id"],
                    "text": r["question"],
                    "category": r["category"],
                }
                for r in rows
            ]
        )
    )
    (folder / "answers_gpt4.jsonl").write_text(
        lines([{"question_id": r["question_id"], "text": r["gpt_answer"]} for r in rows])
    )
    (folder / "context.jsonl").write_text(lines([{"image": r["image_id"], "caption": r["caption"]} for r in rows]))
    return folder


def natural_log() -> list[tuple[str, dict, str]]:
    records = ({"id": int(row["Index"]), "score": row["Answer"]} for row in naturalbench_flat())
    return [
        (row["Question"], {"naturalbench_G_ACC": record}, row["Answer"])
        for row, record in zip(naturalbench_flat(), records, strict=True)
    ]


def mme_log() -> list[tuple[str, dict, str]]:
    return [
        (q, {f"mme_{'perception'}_score": {"question_id": f"{t}/{n}", "category": t, "score": 1.0}}, a)
        for t, n, q, a in MME_ROWS
    ]


def cv_bench_log() -> list[tuple[str, dict, str]]:
    return [
        (f"Note: You only need to respond with A, B without providing any additional information.\n\n{row['prompt']}",
         {"cv_bench_acc": {"id": row["idx"], "gt_content": "A", "pred": "A", "type": row["type"], "task": row["task"], "source": row["source"]}}, row["answer"])
        for row in cv_bench_hub()
    ]  # fmt: skip


def mmstar_log() -> list[tuple[str, dict, str]]:
    return [
        (
            row["question"],
            {row["category"]: {"question_id": row["index"], "l2_category": row["l2_category"], "score": 1.0}},
            row["answer"],
        )
        for row in mmstar_hub()
    ]


def seed_log() -> list[tuple[str, dict, str]]:
    return [
        (f"{row['question']}\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with the option's letter from the given choices directly.",
         {"seed_image": {"pred": "A", "answer": "A", "question_id": row["question_id"]}}, "A")
        for row in seed_own_rows()[:2]
    ]  # fmt: skip


def mmmu_log() -> list[tuple[str, dict, str]]:
    return [
        (row["question"].replace("<image 1>", "<image>").replace("<image 2>", "<image>"),
         {"mmmu_acc": {"id": row["id"], "subdomain": "Art", "question_type": row["question_type"], "answer": row["answer"], "parsed_pred": ["B"]}}, row["answer"])
        for row in mmmu_hub()[:2]
    ]  # fmt: skip


def mathvista_log() -> list[tuple[str, dict, str]]:
    return [
        (
            row["query"],
            {"submission": {"question_id": row["pid"], "query": row["query"], "answer": row["answer"], "metadata": {}}},
            row["answer"],
        )
        for row in mathvista_own_rows()
    ]


def llava_log() -> list[tuple[str, dict, str]]:
    return [
        (
            row["question"],
            {
                "gpt_eval_llava_all": {
                    "question": row["question"],
                    "ans1": row["gpt_answer"],
                    "category": "llava_bench_conv",
                }
            },
            row["gpt_answer"],
        )
        for row in llava_hub()
    ]


LOGS = {
    "naturalbench": (natural_log, naturalbench_own), "mme": (mme_log, mme_own), "cv-bench": (cv_bench_log, cv_bench_own),
    "mmstar": (mmstar_log, mmstar_own), "seed-bench": (seed_log, seed_own), "mmmu": (mmmu_log, mmmu_own),
    "mathvista": (mathvista_log, mathvista_own), "llava-bench": (llava_log, llava_own),
}  # fmt: skip
"""What lmms-eval 0.7 logs of each question: the prompt, a metric's record, the target. Documents are left out."""

HUB = {
    "naturalbench": (lambda: [naturalbench_group(0), naturalbench_group(1)], naturalbench_own),
    "naturalbench, flat": (naturalbench_flat, naturalbench_own),
    "mme": (mme_hub, mme_own), "hallusionbench": (hallusion_hub, hallusion_own), "cv-bench": (cv_bench_hub, cv_bench_own),
    "mmstar": (mmstar_hub, mmstar_own), "seed-bench": (seed_hub, seed_own), "mmmu": (mmmu_hub, mmmu_own),
    "mathvista": (mathvista_hub, mathvista_own), "llava-bench": (llava_hub, llava_own),
}  # fmt: skip
"""Rows of data sets on the hub, and what writes the authors' files with the same questions."""

TABLES = {
    "naturalbench": (naturalbench_tsv, naturalbench_own), "mme": (mme_tsv, mme_own), "amber-d": (amber_tsv, amber_own),
    "hallusionbench": (hallusion_tsv, hallusion_own), "cv-bench": (cv_bench_tsv, cv_bench_own), "mmstar": (mmstar_tsv, mmstar_own),
    "seed-bench": (seed_tsv, seed_own), "mmmu": (mmmu_tsv, mmmu_own), "mathvista": (mathvista_tsv, mathvista_own),
    "llava-bench": (llava_tsv, llava_own),
}  # fmt: skip
"""The same of VLMEvalKit's tables."""
