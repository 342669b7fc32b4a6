"""VLMEvalKit's files: questions as TSV with pictures in base64, answers as xlsx and in its other formats."""

import json

import pytest

from tests.evaluation.readers.tool_files import (
    number_of,
    pope_own_files,
    pope_tsv_rows,
    shuffled,
    write_jsonl,
    write_parquet,
    write_tsv,
    write_xlsx,
)
from vapr.cache import user_cache
from vapr.errors import UserError
from vapr.evaluation.readers.open import open_answers, open_benchmark
from vapr.evaluation.readers.pictures import missing_images
from vapr.evaluation.score import score
from vapr.evaluation.score_file import score_file


@pytest.fixture
def tsv(tmp_path):
    return write_tsv(tmp_path / "POPE.tsv", pope_tsv_rows())


def answers() -> list[dict]:
    """Return what VLMEvalKit writes: the table without pictures, and a prediction. One of eight is wrong, one unread."""
    said = ["Yes", "No.", "No", "no", "Yes, there is.", "No", "A car.", "No"]
    return [
        {**{key: value for key, value in row.items() if key != "image"}, "prediction": text}
        for row, text in zip(pope_tsv_rows(), said, strict=True)
    ]


def test_questions_of_all_splits_with_the_picture_that_an_index_names(tsv):
    benchmark, questions = open_benchmark(f"pope={tsv}")
    assert benchmark.name == "pope" and len(questions) == 2 * (3 + 1 + 3 + 2)
    by_id = {question.id: question for question in questions}
    assert len(by_id) == len(questions)
    assert [q.meta["split"] for q in questions].count("random") == 6
    person = by_id["popular-tsv-7"]
    assert person.question == "Is there a person in the image?" and person.answer == "No"
    assert [number_of(image) for image in person.images] == [1]
    assert [number_of(by_id["adversarial-tsv-1"].images[0])] == [0]
    assert missing_images(questions) == []


def test_an_index_may_name_a_later_row_and_one_that_names_another(tmp_path):
    rows = pope_tsv_rows()
    rows[1]["image"], rows[2]["image"] = "2", "4"
    _, questions = open_benchmark(f"pope={write_tsv(tmp_path / 'POPE.tsv', rows)}")
    by_id = {question.id: question for question in questions}
    assert number_of(by_id["adversarial-tsv-1"].images[0]) == number_of(by_id["random-tsv-2"].images[0]) == 1


def test_fields_longer_than_the_libraries_limit(tmp_path):
    rows = pope_tsv_rows(size=200)
    assert len(rows[0]["image"]) > 131_072
    _, questions = open_benchmark(f"pope={write_tsv(tmp_path / 'POPE.tsv', rows)}")
    assert number_of(questions[0].images[0]) == 0


def test_pictures_beside_the_table(tmp_path):
    rows = pope_tsv_rows()
    images = tmp_path / "images" / "POPE"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(b"a")
    moved = [
        {**{k: v for k, v in row.items() if k != "image"}, "image_path": "a.png" if n < 4 else "b.png"}
        for n, row in enumerate(rows)
    ]
    _, questions = open_benchmark(f"pope={write_tsv(tmp_path / 'POPE_local.tsv', moved)}")
    assert questions[0].images == (images / "a.png",)
    missing = missing_images(questions)
    assert len(missing) == 9 and "b.png' is not there" in missing[0]


def test_scoring_writes_no_pictures(tsv, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    score_file(write_tsv(tmp_path / "m_POPE.tsv", answers()), f"pope={tsv}")
    assert not list((user_cache() / "benchmarks").rglob("pictures/*"))
    open_benchmark(f"pope={tsv}")
    assert len(list((user_cache() / "benchmarks").rglob("pictures/*"))) == 2


def test_what_was_made_of_a_table_is_found_again_until_the_table_changes(tsv, monkeypatch):
    from vapr.evaluation.readers import convert

    made = []
    write = convert.write_own_files
    monkeypatch.setattr(convert, "write_own_files", lambda *a, **k: made.append(1) or write(*a, **k))
    first, again = open_benchmark(f"pope={tsv}")[1], open_benchmark(f"pope={tsv}")[1]
    assert first == again and made == [1]
    rows = pope_tsv_rows()
    rows[0]["answer"] = "No"
    write_tsv(tsv, rows)
    assert open_benchmark(f"pope={tsv}")[1][0].answer == "No" and made == [1, 1]


@pytest.mark.parametrize("ending", ["xlsx", "tsv", "csv", "json", "jsonl", "parquet"])
def test_answers_in_any_order_and_format(tsv, tmp_path, ending):
    file = tmp_path / f"model_POPE.{ending}"
    rows = shuffled(answers())
    if ending == "xlsx":
        pytest.importorskip("openpyxl")
        write_xlsx(file, rows)
    elif ending in ("tsv", "csv"):
        write_tsv(file, rows, "\t" if ending == "tsv" else ",")
    elif ending == "json":
        file.write_text(json.dumps(rows))
    else:
        (write_parquet if ending == "parquet" else write_jsonl)(file, rows)
    notes: list[str] = []
    result = score_file(file, f"pope={tsv}", say=notes.append)
    # 18 questions; the row of index 2 ("No" for Yes) and of 6 ("A car.") are wrong, in three splits each
    assert result["questions"] == 18 and result["accuracy"] == pytest.approx(12 / 18)
    assert result["unparsed"] == 3 and result["splits"]["adversarial"]["unparsed"] == 1
    assert notes == [f"{file}: read as answers of VLMEvalKit, columns as in VLMEvalKit's POPE.tsv"]


def test_excel_cells_that_are_no_text(tsv, tmp_path):
    pytest.importorskip("openpyxl")
    rows = answers()
    rows[0]["prediction"], rows[1]["prediction"], rows[2]["prediction"] = None, 1, "Yes_x000D_\nindeed"
    rows[3]["prediction"] = "Failed to obtain answer via API."
    benchmark, questions = open_benchmark(f"pope={tsv}")
    predictions, notes, _ = open_answers(write_xlsx(tmp_path / "m_POPE.xlsx", rows), benchmark, questions)
    said = {prediction.id: prediction.prediction for prediction in predictions}
    assert said["random-tsv-0"] == "" and said["adversarial-tsv-1"] == "1" and said["random-tsv-2"] == "Yes\r\nindeed"
    assert "3 answers are empty; they count as unparsed" in notes[1]
    assert "2 answers are 'Failed to obtain answer', which is the tool's and not the model's" in notes[2]
    assert score(predictions, benchmark, "strict")["unparsed"] == 3 + 1 + 2 + 3


REFUSED = {
    "the judged file": ("m_POPE_auxmatch.xlsx", "what VLMEvalKit made of answers ('_auxmatch'), not the answers themselves; give m_POPE.xlsx"),
    "scores": ("m_POPE_score.csv", "('_score'), not the answers themselves; give m_POPE.xlsx"),
    "a pickle": ("m_POPE.pkl", "a pickle can run code and is not read; give VLMEvalKit's MODEL_DATASET.xlsx"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_file_of_answers(tsv, tmp_path, case):
    name, message = REFUSED[case]
    file = write_tsv(tmp_path / name, answers())
    with pytest.raises(UserError) as error:
        score_file(file, f"pope={tsv}")
    assert message in str(error.value) and "\n" not in str(error.value)


def changed(rows: list[dict], number: int, **values) -> list[dict]:
    return [{**row, **values} if n == number else row for n, row in enumerate(rows)]


BAD_TABLES = {
    "wrong columns": ([{"id": 1, "text": "a", "label": "b"}], "its columns (id, text, label) are not those of POPE: lmms-lab/POPE has question_id, question, answer, category, image_source; VLMEvalKit's POPE.tsv has index, question, answer, category"),
    "an index twice": (changed(pope_tsv_rows(), 3, index=2), "POPE.tsv:5: index 2 stands twice"),
    "an index of nothing": (changed(pope_tsv_rows(), 3, image="99"), "POPE.tsv:5: 'image' of index 3 is '99', neither a picture nor an index that has one"),
    "a circle": (changed(changed(pope_tsv_rows(), 3, image="2"), 2, image="3"), "'image' of index 2 leads in a circle: 2 -> 3 -> 2"),
    "itself": (changed(pope_tsv_rows(), 2, image="2"), "'image' of index 2 leads in a circle: 2 -> 2"),
    "broken base64": (changed(pope_tsv_rows(), 3, image="iVBOR*" + 90 * "A"), "POPE.tsv:5: 'image' is not base64, or cut short ('iVBOR*AAAAAAAAAAAAAA'..., 96 characters)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_of_questions(tmp_path, case):
    rows, message = BAD_TABLES[case]
    with pytest.raises(UserError) as error:
        open_benchmark(f"pope={write_tsv(tmp_path / 'POPE.tsv', rows)}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_the_benchmark_refuses_is_named_as_it_is_in_the_table(tmp_path, monkeypatch):
    from vapr.evaluation.readers.shapes import SHAPES

    shape = SHAPES["pope"][1]

    def without_label(row):
        return (
            (name, {k: v for k, v in own.items() if k != "label" or row["index"] != "2"})
            for name, own in shape.rows(row)
        )

    monkeypatch.setitem(SHAPES, "pope", (type(shape)(title="a tool's", needs=shape.needs, rows=without_label),))
    with pytest.raises(UserError, match=r"POPE.tsv:4: no 'label'"):
        open_benchmark(f"pope={write_tsv(tmp_path / 'POPE.tsv', pope_tsv_rows())}")


@pytest.mark.parametrize("kept", [0.4, 0.95, 0.99])
def test_a_half_written_table(tsv, kept):
    content = tsv.read_bytes()
    tsv.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"POPE.tsv:\d+: .*the file is cut short or damaged"):
        open_benchmark(f"pope={tsv}")


def test_a_table_cut_within_its_last_field(tsv):
    tsv.write_bytes(tsv.read_bytes()[:-6])
    with pytest.raises(
        UserError,
        match=r"POPE.tsv:9: not a row of VLMEvalKit's POPE.tsv: 'category' is 'random,pop'; POPE's splits are",
    ):
        open_benchmark(f"pope={tsv}")


def test_a_half_written_sheet(tsv, tmp_path):
    pytest.importorskip("openpyxl")
    file = write_xlsx(tmp_path / "m_POPE.xlsx", answers())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="m_POPE.xlsx: not a readable Excel file, or cut short"):
        score_file(file, f"pope={tsv}")


def test_without_the_library_the_way_out_is_said(tsv, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "m_POPE.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"Excel files need openpyxl; pip install 'vapr\[eval\]'"):
        score_file(tmp_path / "m_POPE.xlsx", f"pope={tsv}")


BAD_ANSWERS = {
    "fewer answers than questions": (answers()[:6], "13 answers to 18 questions; 'adversarial-tsv-6' has none. Finish the run, or score what is there with --partial"),
    "an answer twice": ([*answers(), answers()[0]], "m_POPE.tsv:10: index 0 stands twice"),
    "an answer too many": ([*answers(), {**answers()[0], "index": 9}], "m_POPE.tsv:2: could answer 2 questions ('adversarial-tsv-0', 'adversarial-tsv-4', ...), and its row names no picture"),
    "another benchmark's": ([{"index": 1, "question": "Which is taller?", "answer": "A", "category": "random", "prediction": "B"}], "m_POPE.tsv:2: 'Which is taller?' is no question of pope"),
    "no prediction": ([{key: value for key, value in row.items() if key != "prediction"} for row in answers()], "no answers in it: its columns are index, question, answer, category, and answers stand in 'prediction'"),
    "other columns": ([{"index": 1, "question": "Which?", "prediction": "B"}], "its columns (index, question, prediction) are not those of POPE"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_bad_tables_of_answers(tsv, tmp_path, case):
    rows, message = BAD_ANSWERS[case]
    with pytest.raises(UserError) as error:
        score_file(write_tsv(tmp_path / "m_POPE.tsv", rows), f"pope={tsv}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_partial_answers_are_scored_when_asked(tsv, tmp_path):
    result = score_file(
        write_tsv(tmp_path / "m_POPE.tsv", answers()[:6]), f"pope={tsv}", partial=True, say=lambda line: None
    )
    assert result["questions"] == 13 and result["asked"] == 18 and result["partial"]


def test_a_table_that_names_no_pictures_is_not_joined_by_guess(tmp_path):
    """The same thing is asked about two pictures, and nothing tells which of the authors' questions is answered."""
    own = pope_own_files(tmp_path)
    rows = (tmp_path / "coco_pope_random.json").read_text().splitlines()
    again = [{**json.loads(rows[0]), "question_id": 7, "image": "other.jpg", "label": "no"}]
    (tmp_path / "coco_pope_random.json").write_text("\n".join([*rows, json.dumps(again[0])]) + "\n")
    said = [
        {
            "index": 0,
            "question": "Is there a snowboard in the image?",
            "answer": "Maybe",
            "category": "random",
            "prediction": "Yes",
        }
    ]
    with pytest.raises(
        UserError,
        match=r"could answer 2 questions \('random-1', 'random-7', ...\), and its row names no picture; give the tool's own questions: --bench pope=PATH",
    ):
        score_file(write_tsv(tmp_path / "m_POPE.tsv", said), f"pope={own}", partial=True)


def test_a_table_that_names_pictures_is_joined_by_them(tmp_path):
    """The authors' ids are others, and the same thing is asked about both pictures with the same truth."""
    asked = "Is there a person in the image?"
    (tmp_path / "own").mkdir()
    own = [{"question_id": n, "image": f"COCO_val2014_{n}.jpg", "text": asked, "label": "yes"} for n in (1, 2)]
    write_jsonl(tmp_path / "own" / "coco_pope_random.json", own)
    rows = [
        {"index": 7 - n, "question": asked, "answer": "Yes", "category": "random", "image_path": f"val2014/COCO_val2014_{n}.jpg", "prediction": said}
        for n, said in ((2, "No"), (1, "Yes"))
    ]  # fmt: skip
    benchmark, questions = open_benchmark(f"pope={tmp_path / 'own'}")
    predictions, _, _ = open_answers(write_tsv(tmp_path / "m_POPE.tsv", rows), benchmark, questions)
    assert {prediction.id: prediction.prediction for prediction in predictions} == {"random-1": "Yes", "random-2": "No"}
