"""MME: the benchmark's folders, eval_tool's texts, points worked by hand, and the official rule."""

import shutil

import pytest

from tests.evaluation.benchmarks.authors_files import answered, mme
from vapr.errors import UserError
from vapr.evaluation.benchmarks.mme import MME
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction


def test_questions_of_both_layouts(tmp_path):
    questions = MME.read(mme(tmp_path))
    assert [q.id for q in questions[:4]] == [f"existence/000{n}-{k}" for n in (1, 2) for k in (1, 2)]
    ocr = next(q for q in questions if q.id == "OCR/0002-2")
    assert ocr.answer == "no" and ocr.meta == {"split": "OCR", "image": "OCR/0002"}
    (tmp_path / "OCR" / "images").mkdir()
    (tmp_path / "OCR" / "images" / "0002.png").write_bytes(b"")
    again = next(q for q in MME.read(tmp_path) if q.id == "OCR/0002-2")
    assert again.images == (tmp_path / "OCR" / "images" / "0002.png",)


def test_points_by_hand(tmp_path):
    """existence: 3 of 4 right, 1 of 2 pictures whole: 75 + 50. OCR: yes to all, 50 + 0. Code: perfect, 200."""

    def answer(question):
        if question.meta["split"] == "OCR" or question.id == "existence/0001-2":
            return "Yes"
        return question.answer

    result = score(answered(MME.read(mme(tmp_path)), answer), MME)
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    expected = {
        "perception": 175,
        "cognition": 200,
        "existence": 125,
        "OCR": 50,
        "code_reasoning": 200,
        "acc_plus": 3 / 6,
    }
    assert values == pytest.approx(expected)
    assert result["splits"]["existence"]["figures"]["perception"]["value"] == 125
    low, high = result["figures"]["perception"]["interval"]
    assert low <= 175 <= high


def results(folder, questions, answer):
    """Write eval_tool's texts as LLaVA does: names of the texts, a doubled space before what is asked of the form."""
    folder.mkdir()
    for task in ("existence", "OCR", "code_reasoning"):
        lines = [
            f"{q.meta['image'].split('/')[1]}.txt\t{q.question.replace(' Please', '  Please')}\t{q.answer.title()}\t{answer(q)}\n"
            for q in questions if q.meta["split"] == task
        ]  # fmt: skip
        (folder / f"{task}.txt").write_text("".join(reversed(lines)))
    return folder


def test_results_of_eval_tool(tmp_path):
    questions = MME.read(mme(tmp_path / "data"))
    folder = results(tmp_path / "answers", questions, lambda q: "Yes" if q.meta["split"] == "OCR" else q.answer)
    predictions, notes, _ = open_answers(folder, MME, questions)
    assert notes == [] and score(predictions, MME)["figures"]["perception"]["value"] == 250
    # The same folder holds the questions with their truths, too.
    predictions, _, _ = open_answers(folder, MME, MME.read(folder))
    assert score(predictions, MME, "official")["figures"]["perception"]["value"] == 250


@pytest.mark.parametrize(
    ("text", "official", "guessed"),
    [("Yes, it is", "yes", False), ("no", "no", False), (" No.", "no", False), ("I know", None, False), ("know", "no", True),
     ("Not at all", "no", True), ("Eyes", "yes", True), ("The answer is yes", None, False)],
)  # fmt: skip
def test_the_official_rule_looks_at_four_characters(text, official, guessed):
    row = Prediction(benchmark="mme", id="1", question="", prediction=text, answer="yes")
    reading = MME.read_answer(row, "official")
    assert (reading.value, reading.guessed) == (official, guessed)


def test_pictures_count_only_whole(tmp_path):
    rows = answered(MME.read(mme(tmp_path)), lambda q: q.answer)
    with pytest.raises(UserError, match="picture 'existence/0001' has 1 of its 2 answers"):
        score(rows[1:], MME)
    figures = score(rows[1:], MME, partial=True)["figures"]
    assert figures["existence"]["value"] == 200 and figures["acc_plus"]["count"] == 5


def test_answers_that_name_no_picture():
    bare = [
        Prediction(benchmark="mme", id=f"{n}", question="?", prediction=said, answer=said, meta={"split": "count"})
        for n, said in enumerate(("Yes", "No"))
    ]
    with pytest.raises(UserError, match="'0' of mme: meta names no 'image'.*--bench mme=PATH"):
        score(bare, MME)


def test_a_task_that_mme_does_not_have():
    rows = [
        Prediction(benchmark="mme", id=f"x-{n}", question="?", prediction="Yes", answer="yes", meta={"image": "x"})
        for n in (1, 2)
    ]
    with pytest.raises(UserError, match="question 'x-2' of mme: 'split' is None, no task of MME"):
        score(rows, MME)


def test_bad_files(tmp_path):
    questions = MME.read(mme(tmp_path / "data"))
    folder = results(tmp_path / "answers", questions, lambda q: q.answer)
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a file; MME is a folder"):
        MME.read(tmp_path / "file.txt")
    with pytest.raises(UserError, match="no folder and no .txt of a task of MME"):
        MME.read(tmp_path / "empty")
    line = (folder / "OCR.txt").read_text().splitlines()[0]
    for wrong, said in {
        line.rsplit("\t", 1)[0]: "OCR.txt:1: 3 cells between tabs, not picture, question, truth and answer",
        line.replace("Is it", "Was it"): "is no question of MME on OCR/0002",
        line.replace("\tNo\t", "\tYes\t"): "says that the truth is Yes, but it is no",
        f"{line}\n{line}": "question 'OCR/0002-2' is answered twice",
        line: "questions; 'OCR/0001-1' has none",
    }.items():
        (folder / "OCR.txt").write_text(wrong + "\n")
        with pytest.raises(UserError) as refused:
            open_answers(folder, MME, questions)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    (folder / "OCR.txt").write_bytes(b"\xff\xfe\tx\n")
    with pytest.raises(UserError, match="OCR.txt: not UTF-8 text"):
        open_answers(folder, MME, questions)
    shutil.rmtree(tmp_path / "data" / "existence")
    (tmp_path / "data" / "OCR" / "questions_answers_YN" / "0001.txt").write_text("Is it?\tMaybe\n")
    with pytest.raises(UserError, match=r"0001.txt:1: the truth is 'Maybe', not Yes or No"):
        MME.read(tmp_path / "data")
