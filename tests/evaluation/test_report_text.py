"""Scores for the terminal: the policy in every header, the yes-bias as a table."""

from tests.evaluation.benchmarks.authors_files import answered, questions_of
from vapr.evaluation import report_text
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction


def shown(tmp_path, policy="strict", name="pope", **meta) -> list[str]:
    """Yes to half of the yes questions, no to the others, "Perhaps" to two of 16, one of them a yes."""
    rows = answered(questions_of(name, tmp_path), lambda q: "Yes")
    said = {"1": "Yes", "2": "Yes", "3": "No", "4": "Perhaps", "5": "No", "6": "No", "7": "Perhaps", "8": "Yes"}
    rows = [type(row).of(q, said[q.id[-1]], **meta) for row, q in zip(rows, questions_of(name, tmp_path), strict=True)]
    return report_text.show(score(rows, BENCHMARKS[name], policy)).splitlines()


def line(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


def test_the_yes_bias_is_a_table_that_names_its_policy(tmp_path):
    lines = shown(tmp_path)
    assert line(lines, "yes-bias of") == "yes-bias of 16 answers, read as 'strict'"
    # Of each split's 8: said yes 3, of 4 yes 2 found, of 4 no 1 wrong; 2 unparsed
    for name, value in {
        "yes rate ": "37.50", "yes rate of the truth": "50.00", "gap": "-12.50", "false yes (FPR)": "25.00",
        "missed yes (FNR)": "50.00", "unparsed ": "25.00", "balanced accuracy": "50.00", "F1 of no": "57.14",
    }.items():  # fmt: skip
        assert line(lines, name)[26:35].strip() == value and "[" in line(lines, name), name
    assert line(lines, "unparsed taken for yes").endswith("accuracy 62.50, yes 62.50")
    assert line(lines, "read as official").endswith("accuracy 62.50, yes 62.50, unparsed 25.00, guessed 4")


def test_logits_are_shown_and_what_lacks_them_is_counted(tmp_path):
    lines = shown(tmp_path, log_p_yes=-0.1, log_p_no=-2.4)
    assert "at the first answer token, 16 answers" in lines
    assert line(lines, "accuracy, likelier of two").split()[4] == "50.00"
    assert not [text for text in shown(tmp_path / "none") if "first answer token" in text]


def test_the_header_names_the_policy_for_every_benchmark(tmp_path):
    for name in ("amber-g", "mme"):
        rows = answered(questions_of(name, tmp_path / name), lambda q: "No man.")
        assert "read as 'last-answer'" in report_text.show(score(rows, BENCHMARKS[name], "last-answer")).splitlines()[0]


def test_other_policies_and_intervals_are_shown_where_answers_are_letters_too():
    facts = {"split": "Instance Interaction", "options": ["red", "blue"]}
    rows = [
        Prediction(
            benchmark="seed-bench", id=str(n), question="Which?", prediction="<think>Hm.</think>A", answer="A",
            meta={**facts, "image": f"{n}.jpg"},
        )
        for n in range(4)
    ]  # fmt: skip
    lines = report_text.show(score(rows, BENCHMARKS["seed-bench"], "strict")).splitlines()
    assert line(lines, "read as strict").endswith("accuracy 0.00, unparsed 100.00")
    assert line(lines, "read as last-answer").endswith("accuracy 100.00, unparsed 0.00")
    assert line(lines, "accuracy of all, 95 % interval [0.00, ")
    assert line(lines, "Instance Interaction ")  # whole


def test_a_figure_of_almost_nothing_has_no_sign():
    assert report_text._with_interval({"value": -0.001, "interval": (-0.004, 0.004)}, 1).split() == [
        "0.00", "[0.00,", "0.00]",
    ]  # fmt: skip
