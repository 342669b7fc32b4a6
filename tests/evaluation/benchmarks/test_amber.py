"""AMBER: rules on hand-made answers with its own annotations, its printed figures, its files."""

import json
import os
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.authors_files import amber, answered, write_json
from vapr.errors import UserError
from vapr.evaluation.benchmarks.amber_d import AMBER_D
from vapr.evaluation.benchmarks.amber_g import AMBER_G, nouns
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction

REAL = Path(os.environ.get("VAPR_REAL_DATA", "")) / "amber"
needs_real = pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")


def figures(result) -> dict:
    return {name: figure["value"] for name, figure in result["figures"].items()}


# --- descriptions ---


@needs_real
def test_descriptions_with_ambers_own_annotations():
    """Picture 1: sky, forest, grass, person, lake, mountain, road are there; cloud, sun, bird, dog, flower are made up."""
    questions = AMBER_G.read(REAL)
    assert len(questions) == 1004 and [words[0] for words in questions[0].answer["truth"]] == [
        "sky", "forest", "grass", "person", "lake", "mountain", "road",
    ]  # fmt: skip
    said = (
        "Two men walk with dogs along a path between trees. Hills rise behind the water, and the "  # man and tree go for
        "sky is clear. A knife lies there."  # person and forest, path for road, hill for mountain, water for lake
    )
    rows = [Prediction.of(questions[0], said)]
    reading = AMBER_G.read_answer(rows[0], "strict")
    # men, dogs!, path, trees, hills, water, sky, knife!: 6 of 7 objects (no grass), one made up of five
    assert reading.value == "2 of 8 wrong, 6 of 7 covered, 1 of 5 made up"
    result = figures(score(rows, AMBER_G))
    assert result == pytest.approx({"chair": 25.0, "cover": 600 / 7, "hal": 100.0, "cog": 20.0})


def test_counts_by_hand(tmp_path):
    """Picture 1: man, sofa; dog and tree made up. Picture 2: bus, tree, man; cat made up."""
    questions = AMBER_G.read(amber(tmp_path))
    rows = [
        Prediction.of(questions[0], "People sit on couches. A dog, two dogs and knives lie in the light."),
        Prediction.of(questions[1], "The window of the bus."),
    ]
    result = score(rows, AMBER_G)
    # 1: people, couches; dog, dogs, knives wrong; light is safe. 2: window goes for bus.
    assert figures(result) == pytest.approx({"chair": 100 * 3 / 8, "cover": 100 * 3 / 5, "hal": 50.0, "cog": 100 / 3})
    assert result["accuracy"] == 0.5 and result["unparsed_rate"] == 0
    assert all(figure["interval"] is not None for figure in result["figures"].values())
    assert result["yes_rate"] is None and "yes_bias" not in result


def test_what_names_nothing_is_unparsed(tmp_path):
    rows = answered(AMBER_G.read(amber(tmp_path)), lambda q: "It is nice.")
    strict, official = score(rows, AMBER_G), score(rows, AMBER_G, "official")
    assert strict["unparsed_rate"] == official["unparsed_rate"] == 1
    assert strict["accuracy"] == 0 and official["accuracy"] == 1 and official["guessed"] == 2
    assert figures(strict)["cover"] == figures(official)["cover"] == 0 and figures(strict)["chair"] is None


def test_reasoning_is_no_description(tmp_path):
    rows = answered(AMBER_G.read(amber(tmp_path)), lambda q: "<think>A cat? No, a knife.</think>A man.")
    assert figures(score(rows, AMBER_G, "last-answer"))["hal"] == 0
    assert figures(score(rows, AMBER_G, "official"))["hal"] == 100


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You can see a knife", ["knife"]),
        ("The can and two cans", ["can", "can"]),
        ("leaves of a tree, tree's", ["tree", "tree"]),
        ("Knives, MEN, people and a person.", ["knife", "man", "people", "person"]),
        ("buses; a mantle, catlike", ["bus"]),
        ("He can leave", []),
        ("a light, lights", ["light"]),
        ("an e-book on TV", ["e-book", "TV"]),
        ("", []),
    ],
)
def test_nouns(text, found):
    assert nouns(text, "can knife leave tree man people person bus cat light e-book TV") == found


# --- questions ---


@needs_real
def test_constant_answers_on_the_real_questions():
    """By counting annotations: 9,427 of 14,216 are no; of 4,924 on existence all, of 7,628 on attributes half."""
    questions = AMBER_D.read(REAL)
    assert len(questions) == 14216 and sum(q.answer == "no" for q in questions) == 9427
    no = score(answered(questions, lambda q: "No"), AMBER_D, "official")
    assert figures(no)["f1_no"] == pytest.approx(2 * 9427 / (9427 + 14216))
    printed = {name: value for name, value in figures(no).items() if name.startswith("official_")}
    # As inference.py prints: 66.3 and 100.0, of which 2 x 0.663 x 1 / (1.663 + 0.0001) = 79.7
    assert printed == {
        "official_accuracy": 66.3,
        "official_precision": 66.3,
        "official_recall": 100.0,
        "official_f1": 79.7,
    }
    assert {name: part["questions"] for name, part in no["splits"].items()} == {
        "attribute": 7628, "existence": 4924, "relation": 1664,
    }  # fmt: skip
    assert figures(no["splits"]["existence"])["official_f1"] == 100.0
    yes = figures(score(answered(questions, lambda q: "Yes"), AMBER_D, "official"))
    assert yes["official_f1"] == yes["f1_no"] == 0 and yes["official_accuracy"] == 33.7


def test_official_f1_of_existence_has_its_own_offset(tmp_path):
    """Half of 20 found: recall 50.0, precision 100.0; 2 x 0.5 / (1.5 + 0.001) is 66.6, and 66.7 with 0.0001."""
    rows = [
        Prediction(
            benchmark="amber-d", id=str(n), question="?", prediction="No" if n < 10 else "Yes", answer="no",
            meta={"split": "existence", "kind": "existence", "image": str(n)},
        )
        for n in range(20)
    ]  # fmt: skip
    assert figures(score(rows, AMBER_D, "official"))["official_f1"] == 66.6
    rows = [Prediction.of(row, row.prediction, split="relation") for row in rows]
    assert figures(score(rows, AMBER_D, "official"))["official_f1"] == 66.7


def test_official_answers_are_exact(tmp_path):
    rows = answered(AMBER_D.read(amber(tmp_path)), lambda q: q.answer.title() + ".")
    assert score(rows, AMBER_D, "official")["accuracy"] == 0 and score(rows, AMBER_D)["accuracy"] == 1


# --- files ---


def test_results_of_both_tasks(tmp_path):
    folder = amber(tmp_path)
    rows = [{"id": n, "response": "A man."} for n in (1, 2)] + [{"id": n, "response": "No"} for n in range(1005, 1014)]
    file = write_json(tmp_path / "results.json", rows[::-1])
    for benchmark, count, other in ((AMBER_D, 9, 2), (AMBER_G, 2, 9)):
        predictions, notes, _ = open_answers(file, benchmark, benchmark.read(folder))
        assert len(predictions) == count and notes == [f"{other} answers are to AMBER's other task"]


def test_the_folder_is_found(tmp_path):
    amber(tmp_path / "data")
    at = [
        tmp_path,
        tmp_path / "data",
        tmp_path / "data" / "annotations.json",
        tmp_path / "data" / "query" / "query_generative.json",
    ]
    assert {len(AMBER_G.read(path)) for path in at} == {2}
    (tmp_path / "data" / "image").mkdir()
    (tmp_path / "data" / "image" / "AMBER_1.jpg").write_bytes(b"")
    assert AMBER_G.read(tmp_path)[0].images == (tmp_path / "data" / "image" / "AMBER_1.jpg",)


def change(file: Path, edit) -> None:
    rows = json.loads(file.read_text())
    edit(rows)
    file.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("annotations.json", lambda rows: rows[3].update(truth="maybe"), None),
        ("annotations.json", lambda rows: rows.pop(3), "query 1006 has no annotation of its task"),
        ("annotations.json", lambda rows: rows[3].update(type="other"), "is of type 'other', none of AMBER's"),
        ("annotations.json", lambda rows: rows[3].pop("type"), "row 4: no 'type'"),
        (
            "query/query_discriminative.json",
            lambda rows: rows.append(rows[0]),
            "question '1005' of amber-d stands twice",
        ),
        ("query/query_discriminative.json", lambda rows: rows[0].update(query=1), "row 1: 'query' is 1, not a text"),
    ],
)
def test_bad_questions(file, edit, said, tmp_path):
    change(amber(tmp_path) / file, edit)
    with pytest.raises(UserError) as refused:
        rows = answered(AMBER_D.read(tmp_path), lambda q: "No")
        score(rows, AMBER_D)  # a truth that is neither is refused here
    assert (said or "'answer' is 'maybe', no truth") in str(refused.value) and "\n" not in str(refused.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no annotations.json in it"):
        AMBER_D.read(tmp_path)
    questions = AMBER_G.read(amber(tmp_path))
    for rows, said in (
        ([{"id": 99999, "response": "x"}], "row 1: 99999 is no id of AMBER"),
        ([{"id": 1, "response": None}], "row 1: 'response' is null, not a text"),
        ([{"id": 1, "answer": "x"}], "row 1: no 'response'"),
        ([{"id": 1, "response": "x"}], "1 answers to 2 questions; '2' has none"),
        ([{"id": 1, "response": "x"}] * 2, "question '1' is answered twice"),
    ):
        with pytest.raises(UserError) as refused:
            open_answers(write_json(tmp_path / "results.json", rows), AMBER_G, questions)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    (tmp_path / "relation.json").write_text('{"man": "person"}')
    with pytest.raises(UserError, match="relation.json: not the table of AMBER"):
        AMBER_G.read(tmp_path)
    write_json(tmp_path / "relation.json", {"man": []})
    with pytest.raises(UserError, match="'truth' of annotation 1 is no list of objects of relation.json"):
        AMBER_G.read(tmp_path)
    (tmp_path / "safe_words.txt").unlink()
    with pytest.raises(UserError, match="safe_words.txt: no such file"):
        AMBER_G.read(tmp_path)
    bare = [Prediction(benchmark="amber-g", id="1", question="?", prediction="A man.", answer=None)]
    with pytest.raises(UserError, match="give the questions with --bench amber-g=PATH"):
        score(bare, AMBER_G)
