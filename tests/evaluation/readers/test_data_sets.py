"""Questions in parquet files, in folders of the datasets library and on the hub."""

import pyarrow
import pytest

from tests.evaluation.readers.tool_files import number_of, pope_hub_rows, pope_own_files, write_parquet
from vapr.errors import UserError
from vapr.evaluation.readers.open import open_benchmark


def parquet(folder):
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", pope_hub_rows())


def saved(folder):
    import datasets

    datasets.Dataset.from_list(pope_hub_rows()).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_with_splits(folder):
    import datasets

    rows = datasets.Dataset.from_list(pope_hub_rows())
    datasets.DatasetDict({"test": rows, "train": rows.select([0])}).save_to_disk(folder / "splits")
    return folder / "splits"


PLACES = {
    "a file": parquet, "its folder": lambda folder: parquet(folder).parent.parent, "saved": saved,
    "saved with splits": saved_with_splits,
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_questions_are_those_of_the_authors_files(tmp_path, place):
    (tmp_path / "own").mkdir()
    _, own = open_benchmark(f"pope={pope_own_files(tmp_path / 'own')}")
    _, questions = open_benchmark(f"pope={PLACES[place](tmp_path)}")
    assert [(q.id, q.question, q.answer, q.meta) for q in questions] == [
        (q.id, q.question, q.answer, q.meta) for q in own
    ]
    assert [number_of(q.images[0]) for q in questions] == [0, 0, 0, 1, 1, 1] * 3


def test_shards_of_another_split_are_left_out(tmp_path):
    parquet(tmp_path)
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [{**pope_hub_rows()[0], "question_id": "77"}])
    _, questions = open_benchmark(f"pope={tmp_path}")
    assert len(questions) == 18 and "adversarial-77" not in {question.id for question in questions}


def test_a_hub_id_is_asked_of_the_library(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(pope_hub_rows())
    )
    _, questions = open_benchmark("pope=lmms-lab/POPE")
    assert len(questions) == 18 and asked == [(("lmms-lab/POPE", None), {"split": "test"})]


def test_what_the_hub_does_not_have(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError,
        match="lmms-lab/POPE: no such file or folder here, and the hub gave no data set of that name .no network",
    ):
        open_benchmark("pope=lmms-lab/POPE")


def test_a_damaged_file(tmp_path):
    file = parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match="test-00000-of-00001.parquet: not a readable parquet file"):
        open_benchmark(f"pope={tmp_path}")


def test_other_columns(tmp_path):
    file = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"pid": ["1"], "query": ["?"]}), file)
    with pytest.raises(
        UserError,
        match=r"its columns \(pid, query\) are not those of POPE: lmms-lab/POPE has question_id, question, answer, category, image_source",
    ):
        open_benchmark(f"pope={file}")


def test_a_row_without_its_picture(tmp_path):
    rows = pope_hub_rows()
    rows[3]["image"] = {"bytes": b"", "path": "gone.jpg"}
    from vapr.evaluation.readers.pictures import missing_images, require_images

    path = write_parquet(tmp_path / "test.parquet", rows)
    _, questions = open_benchmark(f"pope={path}")
    [line] = missing_images(questions)
    assert line.startswith("question 'adversarial-4' of pope: image '") and line.endswith("gone.jpg' is not there")
    with pytest.raises(UserError, match=r"question 'adversarial-4'.* \(1 of 18 questions lack a picture\); put"):
        require_images(questions)
