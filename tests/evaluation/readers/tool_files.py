"""Files as VLMEvalKit, lmms-eval and the datasets library write them, a few rows each."""

import base64
import csv
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(number: int, size: int = 24) -> bytes:
    """Return a PNG whose first pixel tells which it is, and that does not compress below what the format needs."""
    image = Image.effect_noise((size, size), 90).convert("RGB")
    image.putpixel((0, 0), (number, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def number_of(file: Path) -> int:
    """Return which picture a file is."""
    return Image.open(file).convert("RGB").getpixel((0, 0))[0]


def base64_of(number: int, size: int = 24) -> str:
    return base64.b64encode(picture(number, size)).decode()


def write_tsv(path: Path, rows: list[dict], delimiter: str = "\t") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_xlsx(path: Path, rows: list[dict]) -> Path:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shuffled(rows: list) -> list:
    rows = list(rows)
    random.Random(1).shuffle(rows)
    return rows


THINGS = ("snowboard", "dining table", "car", "person")


def pope_tsv_rows(size: int = 24) -> list[dict]:
    """Return POPE as VLMEvalKit keeps it: a row for each picture and thing, with all splits that ask for it."""
    rows = []
    for picture_number in (0, 1):
        for n, thing in enumerate(THINGS):
            index = 4 * picture_number + n
            rows.append({
                "index": index, "image": base64_of(picture_number, size) if n == 0 else str(4 * picture_number),
                "question": f"Is there a {thing} in the image?", "answer": "Yes" if n % 2 == 0 else "No",
                "category": "adversarial,popular,random" if n % 2 == 0 else ("adversarial", "random,popular")[n == 3],
            })  # fmt: skip
    return rows


def pope_hub_rows() -> list[dict]:
    """Return POPE as lmms-lab/POPE has it."""
    rows = []
    for split in ("adversarial", "popular", "random"):
        for n, thing in enumerate((*THINGS, "sheep", "cow"), start=1):
            rows.append({
                "id": str(len(rows)), "question_id": str(n), "question": f"Is there a {thing} in the image?",
                "answer": "yes" if n % 2 else "no", "image_source": f"COCO_val2014_{n // 4:012}",
                "image": {"bytes": picture(n // 4), "path": None}, "category": split,
            })  # fmt: skip
    return rows


def pope_own_files(folder: Path) -> Path:
    """Write the same questions as POPE's authors do."""
    for split in ("adversarial", "popular", "random"):
        rows = [
            {"question_id": int(row["question_id"]), "image": f"{row['image_source']}.jpg", "text": row["question"],
             "label": row["answer"]}
            for row in pope_hub_rows() if row["category"] == split
        ]  # fmt: skip
        write_jsonl(folder / f"coco_pope_{split}.json", rows)
    return folder


def lmms_sample(number: int, row: dict, said: str) -> dict:
    """Return a sample as lmms-eval 0.7 logs it: the document is left out, the metrics' own records stay."""
    record = {
        "question_id": row["question_id"],
        "score": 1.0,
        "prediction": said.lower(),
        "ground_truth": row["answer"],
    }
    names = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")
    return {
        "doc_id": number, "target": row["answer"], "filtered_resps": said, "token_counts": [None], "doc_hash": "74234e98",
        **dict.fromkeys(names, record),
        "input": f"{row['question']}\nAnswer the question using a single word or phrase.",
    }  # fmt: skip
