"""Every benchmark in every tool's form asks what the authors' own files ask, and is scored alike."""

import pytest

from tests.evaluation.readers.benchmark_rows import HUB, LOGS, TABLES
from tests.evaluation.readers.tool_files import number_of, shuffled, write_jsonl, write_parquet, write_tsv
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.readers.open import open_answers, open_benchmark
from vapr.evaluation.readers.pictures import missing_images
from vapr.evaluation.readers.shapes import SHAPES
from vapr.evaluation.scoring.prediction import Question

NOT_COMPARED = ("image", "together", "skills")
"""Keys of ``meta`` that tell of the picture's name, of what else the file holds, or that a tool rewrites."""


def content(question: Question) -> tuple:
    """Return what a question asks and what is known about it, its picture's name aside."""
    meta = {key: value for key, value in question.meta.items() if key not in NOT_COMPARED}
    return question.question, question.answer, meta


def opened(case: str, path) -> list[Question]:
    return open_benchmark(f"{case.split(',')[0]}={path}")[1]


def own_of(case: str, write, folder) -> list[Question]:
    (folder / "own").mkdir()
    return opened(case, write(folder / "own"))


@pytest.mark.parametrize("case", HUB)
def test_data_sets_of_the_hub_ask_what_the_authors_files_ask(case, tmp_path):
    rows, write_own = HUB[case]
    own = own_of(case, write_own, tmp_path)
    questions = opened(case, write_parquet(tmp_path / "rows.parquet", rows()))
    assert [(q.id, content(q)) for q in questions] == [(q.id, content(q)) for q in own]
    assert missing_images(questions) == []


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_vlmevalkit_ask_what_the_authors_files_ask(case, tmp_path):
    rows, write_own = TABLES[case]
    own = own_of(case, write_own, tmp_path)
    questions = opened(case, write_tsv(tmp_path / "rows.tsv", rows()))
    if case == "hallusionbench":  # it leaves out questions without a picture
        own = [question for question in own if question.images]
    same = [content(q) for q in own]
    if case == "mmmu":  # of an open question it keeps one text
        same[1] = (same[1][0], same[1][1], same[1][2])
    assert [content(q) for q in questions] == same
    assert missing_images(questions) == []


PICTURES = {
    "naturalbench": [[0], [1], [0], [1], [2], [3], [2], [3]], "naturalbench, flat": [[0], [1], [0], [1], [2], [3], [2], [3]],
    "mme": [[1], [1], [0], [0]], "amber-d": [[0], [1]], "hallusionbench": [[0], [1], [2]], "cv-bench": [[0], [1], [2]],
    "mmstar": [[0], [1]], "seed-bench": [[0], [1]], "mmmu": [[1], [11, 12]], "mathvista": [[0], [1]], "llava-bench": [[0], [1]],
}  # fmt: skip


@pytest.mark.parametrize("case", HUB)
def test_pictures_of_data_sets_stay_with_their_questions(case, tmp_path):
    questions = opened(case, write_parquet(tmp_path / "rows.parquet", HUB[case][0]()))
    assert sorted([number_of(image) for image in q.images] for q in questions if q.images) == sorted(PICTURES[case])


def test_pictures_of_mme_without_names(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "image_path"} for row in TABLES["mme"][0]()]
    questions = opened("mme", write_tsv(tmp_path / "mme.tsv", rows))
    assert [number_of(q.images[0]) for q in questions] == [0, 0, 1, 1]
    assert len({q.meta["image"] for q in questions}) == 2


@pytest.mark.parametrize("case", TABLES)
def test_pictures_of_tables_stay_with_their_questions(case, tmp_path):
    questions = opened(case, write_tsv(tmp_path / "rows.tsv", TABLES[case][0]()))
    assert sorted([number_of(image) for image in q.images] for q in questions) == sorted(PICTURES[case])


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("asked", ["the table", "the authors' files"])
def test_answers_of_vlmevalkit_find_their_questions(case, asked, tmp_path):
    rows, write_own = TABLES[case]
    own = own_of(case, write_own, tmp_path)
    questions = opened(case, write_tsv(tmp_path / "rows.tsv", rows())) if asked == "the table" else own
    results = [
        {**{k: v for k, v in row.items() if k != "image"}, "prediction": f"{row['question']} {row.get('answer', '')}"}
        for row in rows()
    ]
    file = write_tsv(tmp_path / "m_DATA.tsv", shuffled(results))
    predictions, notes, _ = open_answers(file, BENCHMARKS[case], questions, partial=True)
    assert len(predictions) == sum("dev_" not in str(row.get("id")) for row in rows())
    for prediction in predictions:
        question = next(question for question in questions if question.id == prediction.id)
        asked_first = prediction.prediction.splitlines()[0].split("?")[0].replace("<image 1>", "").strip()
        assert asked_first.split("<image")[0].strip() in question.question.replace("<image>", "")
    assert ("1 rows are no questions of MMMU" in " ".join(notes)) == (case == "mmmu")


@pytest.mark.parametrize("case", LOGS)
def test_logs_of_lmms_eval_find_their_questions(case, tmp_path):
    log, write_own = LOGS[case]
    own = own_of(case, write_own, tmp_path)
    samples = [
        {"doc_id": n, "target": target, "filtered_resps": f"answer {n}", "doc_hash": "0", "input": asked, **record}
        for n, (asked, record, target) in enumerate(log())
    ]
    file = write_jsonl(tmp_path / f"20260801_120000_samples_{case}.jsonl", shuffled(samples))
    predictions, notes, _ = open_answers(file, BENCHMARKS[case], own)
    assert notes == [f"{file}: read as a log of lmms-eval"]
    # the rows are in the order of the authors' files, which MME's folders turn round
    in_order = [f"answer {n}" for n in ((2, 3, 0, 1) if case == "mme" else range(len(samples)))]
    by_id = {prediction.id: prediction.prediction for prediction in predictions}
    expected = [by_id[question.id] for question in own]
    assert sorted(expected) == sorted(in_order)
    if case != "mme":
        assert expected == in_order


def test_a_folder_with_both_tables_of_cv_bench(tmp_path):
    rows = TABLES["cv-bench"][0]()
    write_tsv(tmp_path / "CV-Bench-2D.tsv", [{**row, "index": n} for n, row in enumerate(rows[:2])])
    write_tsv(tmp_path / "CV-Bench-3D.tsv", [{**{k: v for k, v in rows[2].items() if k != "C"}, "index": 0}])
    questions = opened("cv-bench", tmp_path)
    assert [q.id for q in questions] == ["2D-0", "2D-1", "3D-0"]
    assert [number_of(q.images[0]) for q in questions] == [0, 1, 2]


def test_shapes_are_of_benchmarks_and_tell_themselves_apart():
    assert set(SHAPES) <= set(BENCHMARKS)
    for shapes in SHAPES.values():
        for shape in shapes:
            assert next(other for other in shapes if other.fits(shape.needs)) is shape
