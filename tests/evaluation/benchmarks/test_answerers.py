"""Always yes, always no, perfect, wrong, silent and random answerers: what theory says, for every benchmark and policy."""

import random

import pytest

from tests.evaluation.benchmarks.authors_files import MAKE, answered, naturalbench, questions_of
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.score import score
from vapr.evaluation.scoring.answers import POLICIES

BINARY = sorted(set(MAKE) - {"amber-g"})
YES = {"yes": "Yes", "a": "A", "no": "No", "b": "B"}
OTHER = {"yes": "No", "no": "Yes", "a": "B", "b": "A"}
each = pytest.mark.parametrize("policy", POLICIES)
every = pytest.mark.parametrize("name", BINARY)

# Of the small sets: share of yes (or A), and what always-yes and always-no give.
CONSTANT = {
    "pope": (0.5, {"mean_f1_of_splits": (2 / 3, 0.0)}),
    "repope": (0.5, {"mean_f1_of_splits": (2 / 3, 0.0)}),
    # 4 yes of 9; F1 of "no": 0, and 2 x 5 / (9 + 5). Officially 100 x 4 / 9.001, and so on, rounded.
    "amber-d": (4 / 9, {"f1_no": (0.0, 10 / 14), "official_accuracy": (44.4, 55.5), "official_f1": (0.0, 71.4), "f1_no_state": (0, 2 / 3)}),
    "mme": (0.5, {"perception": (100.0, 100.0), "cognition": (50.0, 50.0), "acc_plus": (0.0, 0.0)}),
    "naturalbench": (0.5, {"acc": (0.5, 0.5), "q_acc": (0.0, 0.0), "i_acc": (0.0, 0.0), "g_acc": (0.0, 0.0), "same_answer": (1.0, 1.0)}),
    # Questions all right: VD's for yes. Figures: VS 0_1 is mixed, VD 1_0 and 1_1 are yes.
    "hallusionbench": (4 / 6, {"a_acc": (4 / 6, 2 / 6), "q_acc": (1 / 3, 0), "f_acc": (2 / 3, 0), "easy_acc": (2 / 3, 1 / 3), "hard_acc": (2 / 3, 1 / 3),
                               "figures_inconsistent": (1 / 3, 1 / 3), "figures_wrong": (0, 2 / 3)}),
}  # fmt: skip


def truth(question) -> str:
    return str(question.answer).lower()


def run(name, policy, folder, answer):
    return score(answered(questions_of(name, folder), answer), BENCHMARKS[name], policy)


@each
@every
@pytest.mark.parametrize("constant", ["yes", "no"])
def test_constant_answerers(name, policy, constant, tmp_path):
    said = {"yes": ("Yes", "A"), "no": ("No", "B")}[constant]
    result = run(name, policy, tmp_path, lambda question: said["letter" in question.question])
    rate, figures = CONSTANT[name]
    assert result["accuracy"] == pytest.approx(rate if constant == "yes" else 1 - rate)
    assert result["yes_rate"] == (1 if constant == "yes" else 0) and result["unparsed_rate"] == 0
    for key, values in figures.items():
        assert result["figures"][key]["value"] == pytest.approx(values[constant == "no"]), key
    bias = result["yes_bias"]
    assert (bias["fpr"]["value"], bias["fnr"]["value"]) == ((1, 0) if constant == "yes" else (0, 1))
    assert bias["balanced_accuracy"]["value"] == 0.5 and bias["d_prime"]["value"] == pytest.approx(0, abs=0.4)
    assert (bias["criterion"]["value"] < 0) is (constant == "yes")  # a criterion below 0 leans to yes


@each
@every
def test_a_perfect_answerer(name, policy, tmp_path):
    result = run(
        name, policy, tmp_path, lambda question: YES[{"1": "yes", "0": "no"}.get(truth(question), truth(question))]
    )
    assert result["accuracy"] == result["f1"] == 1 and result["yes_bias"]["gap"]["value"] == 0
    assert result["unparsed_rate"] == 0
    best = {"perception": 400, "cognition": 200, "official_f1": 100, "official_accuracy": 100, "official_precision": 100,
            "official_recall": 100, "figures_wrong": 0, "figures_inconsistent": 0, "existence": 200, "OCR": 200,
            "code_reasoning": 200, "same_answer": 0, "same_answer_yes_or_a": 0, "same_answer_no_or_b": 0}  # fmt: skip
    for key, figure in result["figures"].items():
        assert figure["value"] == pytest.approx(best.get(key, 1), abs=0.11), key
        assert key.startswith("official_") or figure["interval"] is not None, key


@each
@every
def test_a_wrong_answerer(name, policy, tmp_path):
    result = run(name, policy, tmp_path, lambda question: OTHER[truth(question)])
    assert result["accuracy"] == result["f1"] == result["yes_bias"]["balanced_accuracy"]["value"] == 0
    assert result["yes_bias"]["d_prime"]["value"] < 0


@each
@every
@pytest.mark.parametrize("silence", ["", "   ", "I am not sure about it.", "多分。", "<think>Yes, no, yes"])
def test_silence_is_unparsed(name, policy, silence, tmp_path):
    result = run(name, policy, tmp_path, lambda question: silence)
    assert result["unparsed_rate"] == 1
    if policy != "official":
        assert result["accuracy"] == result["yes_rate"] == 0 and result["f1"] == 0
        assert result["yes_bias"]["unparsed_as"]["yes"]["yes_rate"] == 1
        assert result["yes_bias"]["unparsed_as"]["drop"]["accuracy"] is None


@each
@every
def test_reasoning_is_for_last_answer(name, policy, tmp_path):
    result = run(name, policy, tmp_path, lambda question: f"<think>No? Yes? Hm.</think>\n{YES[truth(question)]}")
    if policy == "last-answer":
        assert result["accuracy"] == 1 and result["unparsed_rate"] == 0
    elif policy == "strict":
        assert result["unparsed_rate"] == 1
    assert result["policies"]["last-answer"]["accuracy"] == 1


@pytest.mark.parametrize("name", ["pope", "mme", "naturalbench", "amber-d", "hallusionbench"])
def test_a_random_answerer_is_in_the_middle(name, tmp_path):
    """Mean over many random answerers: half right, yes in half; pairs a quarter, groups of four a sixteenth."""
    rng, runs = random.Random(0), 60
    questions = questions_of(name, tmp_path)
    if name == "naturalbench":  # a sixteenth needs many groups
        questions, runs = BENCHMARKS[name].read(naturalbench(tmp_path, 1500)), 1
    means: dict[str, float] = {}
    for _ in range(runs):
        rows = answered(questions, lambda q: rng.choice(["A", "B"] if "letter" in q.question else ["Yes", "No"]))
        result = score(rows, BENCHMARKS[name], "strict")
        values = {key: figure["value"] for key, figure in result["figures"].items()} | {"accuracy": result["accuracy"]}
        for key, value in values.items():
            means[key] = means.get(key, 0) + (value or 0) / runs
    expected = {
        "mme": {"accuracy": 1 / 2, "acc_plus": 1 / 4, "perception": 2 * 75, "cognition": 75},
        "naturalbench": {"accuracy": 1 / 2, "q_acc": 1 / 4, "i_acc": 1 / 4, "g_acc": 1 / 16, "same_answer": 1 / 2},
        "hallusionbench": {"accuracy": 1 / 2, "q_acc": 1 / 4, "f_acc": (1 / 4 + 1 / 2 + 1 / 2) / 3},
    }.get(name, {"accuracy": 1 / 2})
    for key, value in expected.items():
        assert means[key] == pytest.approx(value, rel=0.2), key


WORDS = """
the a picture shows dog no not table red there is some lorem ipsum dolor sit amet consectetur nothing another with and
sky person can be seen in on blue tempor incididunt under two small wooden eiusmod know cannot note
"""


def noise(count: int) -> list[str]:
    """Sentences of random words, "no" and "not" inside them."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        said = []
        for _ in range(rng.randint(1, 4)):
            words = rng.choices(WORDS.split(), k=rng.randint(4, 12))
            words[0] = rng.choice(["The", "A", "Some", "Lorem", "Dolor"])
            said.append(" ".join(words) + ".")
        texts.append(" ".join(said))
    return texts


@every
def test_3000_answers_of_noise_are_unparsed(name, tmp_path):
    texts = noise(3000)
    question = next(q for q in questions_of(name, tmp_path) if "letter" not in q.question)
    benchmark = BENCHMARKS[name]
    for policy in POLICIES:
        read = [
            benchmark.read_answer(row, policy)
            for row in (answered([question], lambda q, t=text: t)[0] for text in texts)
        ]
        unparsed = sum(reading.unparsed for reading in read) / len(read)
        # Officially "there is no" and "is not" are denials, by chance, too.
        assert unparsed == 1 if policy != "official" else unparsed > 0.99
