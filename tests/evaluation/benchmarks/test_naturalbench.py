"""NaturalBench: both shapes of its rows, groups, and figures worked by hand."""

from dataclasses import replace

import pytest

from tests.evaluation.benchmarks.authors_files import answered, naturalbench, write_json, write_lines
from vapr.errors import UserError
from vapr.evaluation.benchmarks.naturalbench import ASKED_FOR, NATURALBENCH, from_row
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction


def flat_rows() -> list[dict]:
    """The three groups of the fixture as lmms-eval's copy has them."""
    rows = []
    for group in range(3):
        first, second = ("A", "B") if group == 2 else ("Yes", "No")
        for q, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows.append({
                "Index": 4 * group + 2 * q + i, "Image": f"{group}_{i}.jpg", "Answer": first if q == i else second,
                "Question": f"Is it {('red', 'blue')[q]} ({group})?",
                "Question_Type": "multiple_choice" if group == 2 else "yes_no",
            })  # fmt: skip
    return rows


def test_both_shapes_hold_the_same_questions(tmp_path):
    groups = NATURALBENCH.read(naturalbench(tmp_path / "groups"))
    flat = NATURALBENCH.read(write_json(tmp_path / "flat.json", flat_rows()))
    assert [(q.id, q.question, q.answer, q.meta) for q in groups] == [
        (q.id, q.question, q.answer, q.meta) for q in flat
    ]
    assert groups[1].id == "0-q0-i1" and groups[1].question == "Is it red (0)? " + ASKED_FOR["yes_no"]
    assert groups[1].meta == {"split": "yes_no", "group": 0, "question_number": 0, "image": "0_1"}
    assert flat[1].images == (tmp_path / "0_1.jpg",)


def test_options_stand_in_the_question(tmp_path):
    row = flat_rows()[8] | {"Question": "What is it? Option: A: a red cup; B: two blue cups;"}
    question = from_row(row, "here", tmp_path)[0]
    assert question.meta["options"] == ["a red cup", "two blue cups"]
    for said, read in (("Two blue cups.", "B"), ("A", "A"), ("A red cup", "A"), ("a cup", None)):
        assert NATURALBENCH.read_answer(Prediction.of(question, said), "strict").value == read


def test_pictures_of_parquet_are_bytes(tmp_path):
    row = flat_rows()[0] | {"Image": {"bytes": b"jpeg", "path": None}}
    assert from_row(row, "here", tmp_path)[0].images == (b"jpeg",)
    row = {key.replace("Question_Type", "Question Type"): value for key, value in row.items()}  # the first edition
    assert from_row(row, "here", tmp_path)[0].id == "0-q0-i0"


def test_figures_by_hand(tmp_path):
    """Group 0: wrong on picture 0. Group 1: yes to all. Group 2, of A and B: all right."""

    def answer(question):
        if question.meta["group"] == 0:
            return {"0-q0-i0": "No", "0-q1-i0": "Yes"}.get(question.id, question.answer)
        return "Yes" if question.meta["group"] == 1 else question.answer

    result = score(answered(NATURALBENCH.read(naturalbench(tmp_path)), answer), NATURALBENCH)
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    assert figures == pytest.approx({
        "acc": (2 + 2 + 4) / 12, "q_acc": (0 + 0 + 2) / 6, "i_acc": (1 + 0 + 2) / 6, "g_acc": 1 / 3,
        "same_answer": 4 / 6, "same_answer_yes_or_a": 3 / 6, "same_answer_no_or_b": 1 / 6,
    })  # fmt: skip
    assert result["splits"]["multiple_choice"]["figures"]["g_acc"]["value"] == 1
    assert result["accuracy"] == figures["acc"] and result["headline"] == "g_acc"
    assert result["yes_bias"]["questions"] == 8  # letters are neither yes nor no
    assert all(figure["interval"] is not None for figure in result["figures"].values())


@pytest.mark.parametrize(
    ("kind", "text", "official", "guessed"),
    [
        ("yes_no", "There is no dog, yes.", "no", False),
        ("yes_no", "I have no clue", "no", False),
        ("yes_no", "It is no less than two", "no", True),
        ("yes_no", "Yes", "yes", False),
        ("yes_no", "Noon", None, False),
        ("multiple_choice", "B", "B", False),
        ("multiple_choice", "a dog", "A", True),
        ("multiple_choice", "The answer is (B), not A", "B", False),
        ("multiple_choice", "C", None, False),
    ],
)
def test_the_official_rule_takes_the_first_word(kind, text, official, guessed):
    row = Prediction(benchmark="naturalbench", id="1", question="", prediction=text, answer="", meta={"split": kind})
    reading = NATURALBENCH.read_answer(row, "official")
    assert (reading.value, reading.guessed) == (official, guessed)


def test_groups_count_only_whole(tmp_path):
    rows = answered(NATURALBENCH.read(naturalbench(tmp_path)), lambda q: q.answer)
    with pytest.raises(UserError, match="group '2' has 3 of its 4 answers.*--partial"):
        score(rows[:-1], NATURALBENCH)
    result = score(rows[:-1], NATURALBENCH, partial=True)
    assert result["questions"] == 11 and result["figures"]["g_acc"]["count"] == 2
    bare = [Prediction(benchmark="naturalbench", id="1", question="", prediction="Yes", answer="Yes")]
    with pytest.raises(UserError, match="meta has no 'group'; give the questions with --bench naturalbench=PATH"):
        score(bare, NATURALBENCH)
    for key in ("question_number", "image"):
        lacking = [replace(row, meta={k: v for k, v in row.meta.items() if k != key}) for row in rows]
        with pytest.raises(UserError, match=f"meta has no '{key}'"):
            score(lacking, NATURALBENCH)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Index": None}, "'Index' is None, not a number"),
        ({"Question_Type": "open"}, "'Question_Type' is 'open', not yes_no or multiple_choice"),
        ({"Question": 3}, "'Question' is 3, not a text"),
        ({"Answer": None}, "'Answer' is null, not a text"),
    ],
)
def test_bad_rows(change, said, tmp_path):
    with pytest.raises(UserError) as refused:
        NATURALBENCH.read(write_lines(tmp_path / "rows.jsonl", [flat_rows()[0] | change]))
    assert f"{tmp_path}/rows.jsonl:1: {said}" in str(refused.value) and "\n" not in str(refused.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no .json or .jsonl of NaturalBench"):
        NATURALBENCH.read(tmp_path)
    with pytest.raises(UserError, match="no 'Image_0_Question_1'; a row of NaturalBench has"):
        row = {
            "Index": 1,
            "Question_0": "?",
            "Question_1": "?",
            "Image_0_Question_0": "Yes",
            "Image_1_Question_0": "No",
        }
        NATURALBENCH.read(write_json(tmp_path / "one.json", [row]))
    with pytest.raises(UserError, match="question '0-q0-i0' of naturalbench stands twice"):
        NATURALBENCH.read(write_json(tmp_path / "two.json", [flat_rows()[0]] * 2))
    with pytest.raises(UserError, match=r"three.json:1: not JSON .*is the file whole"):
        (tmp_path / "three.json").write_text('[{"Index": 1, ')
        NATURALBENCH.read(tmp_path / "three.json")
    with pytest.raises(UserError, match="row 1: no 'Index'"):
        NATURALBENCH.read(write_json(tmp_path / "four.json", {"rows": []}))
