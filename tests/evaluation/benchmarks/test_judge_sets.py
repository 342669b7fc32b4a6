"""Judge sets in YAML: those that come with vapr, one's own, and mistakes in them."""

import json
import re
from importlib.resources import files

import pytest

from tests.evaluation.judged_answers import ROWS, SET, refused, scored, write_answers, write_lines, write_set
from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.benchmarks.judge_set import load
from vapr.evaluation.scoring.prediction import Prediction

MMHAL = [
    {"question_type": kind, "question_topic": "food", "image_id": f"i{n}", "image_src": f"https://h.org/a/i{n}_o.jpg",
     "image_content": ["Apple", "Table"], "question": f"What is {kind}?" if n < 3 else "What is other?", "gt_answer": f"truth {n}",
     "model_answer": f"said {n}"}
    for n, kind in enumerate(["attribute", "counting", "other", "relation"])
]  # fmt: skip


def own_reviews(benchmark: str, said: dict[str, str]) -> list[dict]:
    return [{"benchmark": benchmark, "id": name, "judge": "j", "review": text} for name, text in said.items()]


def test_mmhal_from_its_own_layout(tmp_path):
    (tmp_path / "response_template.json").write_text(json.dumps([row | {"model_answer": ""} for row in MMHAL]))
    (tmp_path / "mine.json").write_text(json.dumps(MMHAL[::-1]))  # joined by picture and question, not by line
    said = {"1": "Rating: 6", "2": "It is so. **Rating**: 2", "3": "Rating: 3", "4": "Bad.\nrating: 0"}
    reviews = write_lines(tmp_path / "r.jsonl", own_reviews("mmhal", said))
    bench = f"mmhal={tmp_path / 'response_template.json'}"
    result = scored(tmp_path / "mine.json", "--bench", bench, "--reviews", reviews)
    assert result["figures"]["score"]["value"] == 11 / 4
    assert result["figures"]["hallucination_rate"]["value"] == 2 / 4  # 2 and 0, not 3
    assert result["splits"]["counting"]["figures"]["score"]["value"] == 2
    assert "do not compare" in result["note"]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{**MMHAL[0], "question": "Who?"}], "mine.json, row 1: 'Who?' is no question of mmhal"),
        ([{**MMHAL[0], "image_src": "other.jpg"}], "mine.json, row 1: 'What is attribute?' is no question of mmhal"),
        ([MMHAL[0], MMHAL[0]], "question '1' of mmhal stands twice"),
        (MMHAL[:2], "2 answers to 4 questions; '3' has none"),
        ([{k: v for k, v in MMHAL[0].items() if k != "model_answer"}], "mine.json, row 1: no 'model_answer'"),
        ([{k: v for k, v in MMHAL[0].items() if k != "image_src"}], "mine.json, row 1: no 'image_src'"),
    ],
)  # fmt: skip
def test_results_that_do_not_fit(tmp_path, rows, line):
    (tmp_path / "response_template.json").write_text(json.dumps(MMHAL))
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    assert line in refused(tmp_path / "mine.json", "--bench", f"mmhal={tmp_path / 'response_template.json'}")


def test_equal_questions_need_ids(tmp_path):
    (tmp_path / "response_template.json").write_text(json.dumps([MMHAL[0], MMHAL[0]]))
    (tmp_path / "mine.json").write_text(json.dumps(MMHAL[:1]))
    line = refused(tmp_path / "mine.json", "--bench", f"mmhal={tmp_path / 'response_template.json'}")
    assert "some questions are equal, picture included; the set needs columns.id to tell them" in line


def test_what_mmhals_judge_is_told(tmp_path):
    (tmp_path / "response_template.json").write_text(json.dumps(MMHAL))
    mmhal = BENCHMARKS["mmhal"]
    question = mmhal.read(tmp_path / "response_template.json")[1]
    prompt = mmhal.judged.prompt(Prediction.of(question, "I see {reference}."))
    for part in ("Apple, Table", "What is counting?", "truth 1", "I see {reference}.", '"counting"'):
        assert part in prompt
    assert not re.search(r"\{(?!reference)", prompt)
    assert question.meta["image"] == "a/i1_o.jpg"
    # The judge is shown a rating, which its own reply must not be mistaken for.
    assert mmhal.judged.read_review("Rating: 5") == (5.0,)


@pytest.fixture
def contextual(tmp_path) -> str:
    """Three rows in the shape of contextual_val.csv, quotes, commas and a line break in a field included."""
    (tmp_path / "val.csv").write_text(
        "image_url,instruction,response,category\n"
        'https://h.org/time/a.jpg,"Read, please.","It says ""ten"", then\nnoon.",time\n'
        "https://h.org/web/a.jpg,Read it.,eleven,web\n"
        "https://h.org/web/b.jpg,Read it.,twelve,web\n"
    )
    rows = [
        {
            "benchmark": "contextual",
            "id": f"https://h.org/{name}.jpg",
            "question": "",
            "prediction": "x",
            "answer": None,
        }
        for name in ("time/a", "web/a", "web/b")
    ]
    write_lines(tmp_path / "predictions.jsonl", rows)
    return f"contextual={tmp_path / 'val.csv'}"


def test_contextual_is_an_accuracy(tmp_path, contextual):
    said = ["Right.\nJudgement: Yes", "Judgement: **No**", "judgment - yes"]
    names = [f"https://h.org/{name}.jpg" for name in ("time/a", "web/a", "web/b")]
    write_lines(tmp_path / "reviews.jsonl", own_reviews("contextual", dict(zip(names, said, strict=True))))
    result = scored(tmp_path, "--bench", contextual)
    assert (result["accuracy"], result["headline"], result["f1"]) == (2 / 3, "accuracy", None)
    assert result["intervals"]["accuracy"][0] < 2 / 3 and result["splits"]["web"]["accuracy"] == 1 / 2
    question = BENCHMARKS["contextual"].read(tmp_path / "val.csv")[0]
    assert question.answer == 'It says "ten", then\nnoon.' and question.question == "Read, please."


def test_pictures_of_urls_are_looked_for_by_their_last_names(tmp_path, contextual):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jpg").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    time, web, none = (q.images[0] for q in BENCHMARKS["contextual"].read(tmp_path / "val.csv"))
    assert web == tmp_path / "web" / "a.jpg" and time == tmp_path / "images" / "a.jpg"
    assert none == tmp_path / "images" / "b.jpg"


def test_contextuals_test_split_is_not_scored(tmp_path):
    (tmp_path / "test.csv").write_text("image_url,instruction,category\nhttps://h.org/t/a.jpg,Read it.,time\n")
    row = {"benchmark": "contextual", "id": "https://h.org/t/a.jpg", "prediction": "x", "answer": None}
    answers = write_lines(tmp_path / "predictions.jsonl", [row])
    for judge in ((), ("--judge", "http://127.0.0.1:9")):
        result = scored(answers, "--bench", f"contextual={tmp_path / 'test.csv'}", *judge)
        assert result["scored"] is False and result["accuracy"] is None
        assert "the truth of ConTextual's test split is withheld" in result["why"]


def test_a_ratio_to_the_reference(tmp_path):
    text = SET[: SET.index("verdict:")] + (
        "verdict: {kind: score, pattern: '^(?P<reference>\\d+)/(?P<score>\\d+)$', range: [0, 9]}\n"
        "figures: {relative: {kind: ratio}, high: {kind: share, at_least: 5}}\n"
    )
    bench = write_set(tmp_path, text)
    said = {str(n): f"8/{n}\nfine" for n in range(8)}
    reviews = write_lines(tmp_path / "reviews.jsonl", own_reviews("mine", said))
    result = scored(write_answers(tmp_path), "--bench", bench, "--reviews", reviews)
    assert result["figures"]["relative"]["value"] == pytest.approx(100 * 28 / 64)
    assert result["figures"]["high"]["value"] == 3 / 8 and result["headline"] == "relative"


def test_sets_come_with_the_package():
    assert {"mmhal.yaml", "contextual.yaml"} <= {f.name for f in files("vapr.evaluation.benchmarks").iterdir()}
    for name in ("mmhal", "contextual", "llava-bench"):
        assert BENCHMARKS[name].scored and BENCHMARKS[name].judged


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: mine", "name: My set", "mine.yaml: name must be small letters, digits, dots and hyphens, got 'My set'"),
        ("name: mine", "nam: mine", "mine.yaml: unknown key 'nam'; did you mean 'name'?"),
        ("name: mine\n", "", "mine.yaml: 'name' is missing"),
        ("name: mine", "name: mmhal", "mine.yaml: name: mmhal is a benchmark of vapr; give the set another name"),
        ("question: q, ", "", "mine.yaml: columns.question is missing"),
        ("{facts}", "{fact}", "mine.yaml: prompt: {fact} is no placeholder; there are answer, category, facts, question, reference"),
        ("SAID: {answer}", "", "mine.yaml: prompt: no {answer} in it"),
        ("kind: score,", "kind: stars,", "mine.yaml: verdict.kind: should be 'score' or 'yes-no', got 'stars'"),
        (r"rating:\s*(-?\d+)", "rating: ([0-9", "mine.yaml: verdict.pattern: 'rating: ([0-9' is no regular expression"),
        (r"rating:\s*(-?\d+)", "rating: 5", "mine.yaml: verdict.pattern: 'rating: 5' lacks a group for the score"),
        (r"rating:\s*(-?\d+)", r"(?P<reference>\d) (\d)", "lacks a group for the score; write (...), or (?P<score>...)"),
        (", range: [0, 6]", "", "mine.yaml: verdict.range must be the lowest and the highest score, such as [0, 6]"),
        ("[0, 6]", "[6, 0]", "mine.yaml: verdict.range must be the lowest and the highest score"),
        ("[0, 6]", "6", "mine.yaml: verdict.range: should be a list of 2"),
        ("kind: score,", "kind: yes-no,", "mine.yaml: verdict.range is of scores"),
        (r"pattern: 'rating:\s*(-?\d+)', ", "", "mine.yaml: verdict.pattern is missing"),
        (", below: 3", "", "mine.yaml: figures.hallucination_rate: a share needs at_least or below"),
        ("{kind: mean}", "{kind: mean, below: 3}", "mine.yaml: figures.score: a share needs at_least or below, and no other"),
        ("{kind: mean}", "{kind: ratio}", "mine.yaml: figures.score: a ratio needs a group (?P<reference>...)"),
        ("{kind: mean}", "{kind: median}", "mine.yaml: figures.score.kind: should be 'mean', 'share' or 'ratio', got 'median'"),
        ("name: mine", "name: mine\nheadline: best", "mine.yaml: headline must be one of score, hallucination_rate, got 'best'"),
        ("name: mine", "name: mine\nname: other", "mine.yaml: not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_a_set(tmp_path, old, new, line):
    assert old in SET
    bench = write_set(tmp_path, SET.replace(old, new))
    assert line in refused(write_answers(tmp_path), "--bench", bench)


def test_scores_need_a_figure(tmp_path):
    (tmp_path / "mine.yaml").write_text(SET[: SET.index("figures:")])
    with pytest.raises(UserError, match="figures must be non-empty for verdicts that are scores"):
        load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{**ROWS[0], "q": ""}], "questions.jsonl:1: 'q' is empty; a question is needed"),
        ([ROWS[0], {key: value for key, value in ROWS[1].items() if key != "facts"}], "questions.jsonl:2: no 'facts' (it has 'nr', 'q', 'truth', 'kind', 'file'); the set's columns.facts names it"),
        ([ROWS[0], {**ROWS[1], "truth": None}], "questions.jsonl:2: 'truth' is empty, but other rows have a reference"),
        ([ROWS[0], ROWS[0]], "question '0' of mine stands twice"),
        ([], "questions.jsonl: no question of mine in it"),
        (ROWS[:7], "an answer to '7', which is no question of mine"),
        ([*ROWS, {**ROWS[0], "nr": 8}], "8 answers to 9 questions; '8' has none"),
        ([{**ROWS[0], "q": "Who?"}, *ROWS[1:]], "'0' answers 'What is at 0?', but the question is 'Who?'"),
    ],
)  # fmt: skip
def test_questions_that_do_not_fit(tmp_path, rows, line):
    bench = write_set(tmp_path, rows=rows)
    assert line in refused(write_answers(tmp_path), "--bench", bench)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("q.csv", "q,truth\na\n", "q.csv:2: a row of another number of fields than the header has"),
        ("q.csv", 'q,truth\n"a,b\n', "q.csv:2: not a readable row"),
        ("q.json", "3", "q.json: a JSON int, not a list of rows"),
        ("q.json", "[1]", "q.json, row 1: a JSON int, not an object with keys"),
        ("q.json", "[", "q.json:1: not JSON"),
        ("q.txt", "", "q.txt: a file that ends in '.txt'; rows are read from .jsonl, .json, .csv or .tsv"),
        ("folder", None, "folder: a folder; rows are read from"),
        ("nowhere.csv", "", "nowhere.csv: no such file or folder"),
    ],
)  # fmt: skip
def test_files_of_questions_that_cannot_be_read(tmp_path, name, content, line):
    write_set(tmp_path)
    if content is None:
        (tmp_path / name).mkdir()
    elif not name.startswith("nowhere"):
        (tmp_path / name).write_text(content)
    assert line in refused(write_answers(tmp_path), "--bench", f"{tmp_path / 'mine.yaml'}={tmp_path / name}")


def test_a_set_that_is_not_there(tmp_path):
    assert "none.yaml: no such file" in refused(write_answers(tmp_path), "--bench", tmp_path / "none.yaml")


def test_tsv_and_rows_without_ids(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "{name: s, columns: {question: q}, prompt: '{question} {answer}', verdict: {kind: yes-no}}"
    )
    (tmp_path / "q.tsv").write_text("q\tn\nWhat, now?\t1\nWho?\t2\n")
    assert [(q.id, q.question, q.answer) for q in load(tmp_path / "s.yaml").read(tmp_path / "q.tsv")] == [
        ("1", "What, now?", None),
        ("2", "Who?", None),
    ]


def test_a_set_without_references(tmp_path):
    text = SET.replace("reference: truth, ", "").replace("TRUTH: {reference} ", "")
    bench = write_set(tmp_path, text)
    assert "only a judge can score it" in scored(write_answers(tmp_path), "--bench", bench)["why"]
    said = {str(n): "Rating: 4" for n in range(8)}
    write_lines(tmp_path / "reviews.jsonl", own_reviews("mine", said))
    assert scored(tmp_path, "--bench", bench)["figures"]["score"]["value"] == 4
    line = refused(
        write_answers(tmp_path), "--bench", bench, "--judge", "http://127.0.0.1:9", "--reviews", tmp_path / "n"
    )
    assert "http://127.0.0.1:9: not reachable" in line  # it is asked
