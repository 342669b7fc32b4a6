"""The audit finds what was planted, stays near chance where nothing was, and says when it cannot tell."""

import json
import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import scipy.stats
import torch

from tests import oracles
from tests.audit.pair_sets import THINGS, audited, colour_rows, gates, opened, row, swapped, uniform
from vapr.audit.gates import judge
from vapr.audit.measure import audit
from vapr.audit.near_duplicates import near_duplicates, repeated
from vapr.audit.report_text import verdict
from vapr.audit.text_probes import ngram_differences
from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.intervals import bootstrap, percent, relative_gap, wilson

# --- planted facts


def test_uniform_replacement_shows_and_swapping_does_not(picture_folder):
    drawn = audited(picture_folder, colour_rows(600, uniform))
    balanced = audited(picture_folder, colour_rows(600, swapped))
    assert drawn["overall"]["ngrams"]["interval"][0] > 60
    assert balanced["overall"]["ngrams"]["accuracy"] < 55
    assert gates(drawn)["n-gram probe"] in ("warn", "fail") and gates(balanced)["n-gram probe"] == "pass"
    assert gates(balanced)["surface probe"] == "pass"
    assert "red" in [entry["feature"] for entry in drawn["overall"]["ngrams"]["top"]["chosen"][:5]]


def test_a_longer_rejected_text_fails(picture_folder):
    rows = [row(n, "It is red.", "It is red and big.") for n in range(200)]
    one = audited(picture_folder, rows)
    assert gates(one)["rejected longer"] == gates(one)["mean length gap"] == gates(one)["surface probe"] == "fail"
    length = one["overall"]["length"]
    assert length["rejected_longer"]["value"] == 100 and length["equal"] == 0
    assert length["chosen_mean"] == 3 and length["rejected_mean"] == 5
    assert length["gap"]["value"] == pytest.approx(100 * 2 / 3)
    assert length["outside_0.8_1.25"] == 100
    assert one["overall"]["edit_distance"]["median"] == pytest.approx(2 / 6)


def test_a_word_that_marks_rejected_is_on_top(picture_folder):
    rng = random.Random(1)
    rows = [row(n, f"A {rng.choice(THINGS)} here.", f"A {rng.choice(THINGS)} indeed.") for n in range(200)]
    ngrams = audited(picture_folder, rows)["overall"]["ngrams"]
    assert ngrams["accuracy"] == 100 and ngrams["auc"] == pytest.approx(1.0)
    first = ngrams["top"]["rejected"][0]
    assert "indeed" in first["feature"] and (first["more_in_rejected"], first["more_in_chosen"]) == (200, 0)
    assert "here" in ngrams["top"]["chosen"][0]["feature"]


def test_pairs_of_an_image_stay_in_one_fold(picture_folder):
    """Every image has a word of its own, which marks chosen or rejected by the toss of a coin: there is nothing to learn
    about another image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, cross_val_score

    rng = random.Random(3)
    side = [rng.random() < 0.5 for _ in range(120)]
    rows = []
    for n in range(720):
        image = n % 2 * 60 + n // 2 % 60
        texts = [f"word{image} is here", "nothing is here"][:: 1 if side[image] else -1]
        rows.append(row(n, *texts))
    one = audited(picture_folder, rows)
    low, high = one["overall"]["ngrams"]["interval"]
    assert one["images"] == 120 and one["overall"]["ngrams"]["groups"] == 120
    assert low < 55 and one["overall"]["ngrams"]["accuracy"] < 65
    differences, _ = ngram_differences([r["chosen"] for r in rows], [r["rejected"] for r in rows])
    signs = np.random.default_rng(0).choice([-1, 1], len(rows))
    model = LogisticRegression(fit_intercept=False)
    folds = KFold(5, shuffle=True, random_state=0)
    leaky = cross_val_score(model, differences.multiply(signs[:, None]).tocsr(), signs, cv=folds)
    assert 100 * leaky.mean() > 95 and high < 95


def test_the_probe_equals_scikit_learn_by_hand(picture_folder):
    """Words counted here, every pair given both ways round (C halved) instead of half of them turned."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    rows = colour_rows(300, uniform, seed=5)
    ngrams = audited(picture_folder, rows)["overall"]["ngrams"]

    def grams(text: str) -> Counter:
        words = text.lower().replace(".", " .").split()
        return Counter(words) + Counter(" ".join(two) for two in pairwise(words))

    apart = [grams(r["chosen"]) for r in rows]
    for difference, r in zip(apart, rows, strict=True):
        difference.subtract(grams(r["rejected"]))
    names = sorted({name for difference in apart for name, count in difference.items() if count})
    names = [name for name in names if sum(difference[name] != 0 for difference in apart) >= 2]
    matrix = np.array([[difference[name] for name in names] for difference in apart], float)
    numbers = {image: n for n, image in enumerate(dict.fromkeys(r["images"][0] for r in rows))}
    groups = [numbers[r["images"][0]] for r in rows]
    scores = np.zeros(len(rows))
    for train, test in GroupKFold(5).split(matrix, groups=groups):
        both = np.concatenate([matrix[train], -matrix[train]])
        model = LogisticRegression(C=0.5, fit_intercept=False, max_iter=1000, tol=1e-8)
        model.fit(both, np.repeat([1, 0], len(train)))
        scores[test] = matrix[test] @ model.coef_[0]
    undecided = 100 * np.mean(np.abs(scores) < 1e-3)  # two solvers may not agree on their signs
    assert undecided < 5 and ngrams["accuracy"] == pytest.approx(100 * np.mean(scores > 0), abs=undecided + 1e-9)
    area = roc_auc_score(np.repeat([1, 0], len(rows)), np.concatenate([scores, -scores]))
    assert ngrams["auc"] == pytest.approx(area, abs=0.005)
    assert ngrams["auc_interval"][0] < area < ngrams["auc_interval"][1]


def test_figures_do_not_depend_on_where_the_set_lies(picture_folder, tmp_path):
    rows = colour_rows(300, uniform, seed=7)
    there = tmp_path / "elsewhere"
    shutil.copytree(picture_folder, there)
    assert audited(picture_folder, rows)["overall"] == audited(there, rows)["overall"]


def test_which_half_is_turned_does_not_matter(picture_folder):
    rows = colour_rows(300, uniform, seed=6)
    first, second = (audited(picture_folder, rows, seed=seed)["overall"] for seed in (0, 1))
    for key in ("surface", "ngrams"):
        assert first[key]["accuracy"] == pytest.approx(second[key]["accuracy"], abs=1.0)
        assert first[key]["auc"] == pytest.approx(second[key]["auc"], abs=0.01)


def test_the_same_seed_gives_the_same_result(picture_folder):
    rows = colour_rows(200, uniform)
    first, second = (audited(picture_folder, rows, seed=4, max_pairs=120) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["probed"] == first["overall"]["ngrams"]["pairs"] == 120 and first["pairs"] == 200
    assert first["overall"]["length"]["rejected_longer"]["pairs"] == 200


# --- intervals


def test_wilson_is_the_published_example():
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3: 81 of 263.
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0.0, 20)[0] == 0.0 and round(wilson(0.0, 20)[1], 4) == 0.1611


def test_intervals_cover_when_pairs_of_an_image_agree():
    """Twenty pairs an image, which nearly always agree: an interval over pairs misses the truth most of the time."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 20)
    covered = Counter()
    for _ in range(300):
        share = generator.beta(0.3, 0.2, 60)  # mean 0.6
        values = (generator.random(1200) < share[groups]).astype(float)
        for name, known in (("images", groups), ("pairs", np.arange(1200))):
            low, high = percent(values, known)["interval"]
            covered[name] += low <= 60 <= high
    assert covered["images"] >= 0.92 * 300
    assert covered["pairs"] < 0.6 * 300


def test_independent_pairs_get_wilsons_interval():
    values = (np.arange(400) < 260).astype(float)
    found = percent(values, np.arange(400))["interval"]
    assert found == pytest.approx([100 * x for x in wilson(0.65, 400)], abs=0.05)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95, 0.97])
def test_intervals_cover_near_one_where_pairs_of_an_image_agree(share):
    """20 images of 20 pairs, drawn from a beta-binomial distribution with a correlation of 0.6 within an image: nearly all
    images are all right, and the few that are not decide how much is seen of the correlation."""
    num_draws, images, pairs, correlation = 2_000, 20, 20, 0.6
    generator = np.random.default_rng(0)
    concentration = (1 - correlation) / correlation
    right = generator.binomial(
        pairs, generator.beta(share * concentration, (1 - share) * concentration, (num_draws, images))
    )
    groups = np.repeat(np.arange(images), pairs)
    covered = 0
    for draw in right:
        low, high = percent((np.tile(np.arange(pairs), images) < np.repeat(draw, pairs)).astype(float), groups)[
            "interval"
        ]
        covered += low <= 100 * share <= high
    assert covered >= 0.93 * num_draws


def test_all_alike_is_not_certain():
    low, high = percent(np.ones(40), np.repeat(np.arange(4), 10))["interval"]
    quantile = scipy.stats.t.ppf(0.975, 3)
    assert high == pytest.approx(100) and low == pytest.approx(100 * wilson(1.0, 4, quantile)[0]) and low < 60
    assert percent(np.ones(40), np.zeros(40))["interval"][0] < 1  # one image says nothing about others
    assert percent(np.ones(40), np.arange(40))["interval"] == pytest.approx([100 * x for x in wilson(1.0, 40)])
    assert percent(np.array([]), np.array([])) == {"value": None, "interval": None, "pairs": 0}


def test_relative_gap_and_bootstrap_agree():
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(150), 4)
    base = generator.poisson(20, 600).astype(float)
    values = base + generator.normal(1, 3, 150)[groups]
    gap = relative_gap(values, base, groups)
    drawn = bootstrap(lambda weights: 100 * float(weights @ values / (weights @ base) - 1), groups, 0)
    assert gap["value"] == pytest.approx(100 * (values.mean() / base.mean() - 1))
    assert gap["interval"] == pytest.approx(drawn, abs=0.6)
    assert relative_gap(values[:4], base[:4], groups[:4]) == {"value": ANY, "interval": None, "groups": 1}


def test_few_images_are_no_length_gap(picture_folder):
    rows = [row(n, "one " * 10, "one " * 11) for n in range(38)]
    (gate,) = [gate for gate in audited(picture_folder, rows[:19])["gates"] if gate["name"] == "mean length gap"]
    assert (gate["status"], gate["why"]) == ("not measured", "too few: 19 images, needs 20")
    (gate,) = [gate for gate in audited(picture_folder, rows[:20])["gates"] if gate["name"] == "mean length gap"]
    assert (gate["status"], gate["value"]) == ("fail", pytest.approx(10))


def test_groups_that_agree_to_the_last_digit_vary_by_nothing():
    """One of three in every group, whatever a third is in binary: worth more than 60 pairs and fewer than 180."""
    groups = np.repeat(np.arange(60), 3)
    ones, thirds = (
        percent(v, groups)["interval"] for v in (np.tile([1.0, 0, 0], 60), np.tile([0, 0.1 + 0.2, 0.7], 60))
    )
    assert thirds == pytest.approx(ones)
    quantile = scipy.stats.t.ppf(0.975, 59)
    wide, narrow = (wilson(1 / 3, number, quantile) for number in (60, 180))
    assert 100 * (narrow[1] - narrow[0]) < ones[1] - ones[0] < 100 * (wide[1] - wide[0])


def test_pairs_that_share_any_image_stay_in_one_fold(picture_folder):
    """A word marks one image, the other one is every pair's own: there is nothing to learn about another image."""
    rows = []
    for n in range(60):
        texts = f"there is v{n % 20} here", f"there is u{n % 20} here"
        rows.append(row(n, *texts, images=[f"a/{n}.png", f"b/{n % 20}.png"]))
    for step in (1, -1):
        one = audited(picture_folder, [{**r, "images": r["images"][::step]} for r in rows])
        assert one["images"] == 80 and one["overall"]["groups"] == 20
        assert one["overall"]["ngrams"]["accuracy"] < 65
    chain = [row(n, "It is red.", "It is blue.", images=[f"a/{n}.png", f"a/{n + 1}.png"]) for n in range(30)]
    assert audited(picture_folder, chain)["overall"]["groups"] == 1
    other = [row(n, "It is red.", "It is blue.", rejected_images=["a/59.png"]) for n in range(30)]
    assert audited(picture_folder, other)["overall"]["groups"] == 1


# --- counts by hand


def test_yes_and_no(picture_folder):
    texts = [("Yes.", "No.")] * 30 + [("No, none.", "Yes, one.")] * 10 + [("Yes, red.", "Yes, blue.")] * 3
    texts += [("A cat.", "No cat.")] * 2 + [("No.", "A cat.")]
    one = audited(picture_folder, [row(n, *two, source="left" if n % 2 else "right") for n, two in enumerate(texts)])
    polarity = one["overall"]["polarity"]
    assert polarity["counts"] == {
        "yes": {"yes": 3, "no": 30, "neither": 0},
        "no": {"yes": 10, "no": 0, "neither": 1},
        "neither": {"yes": 0, "no": 0, "neither": 2},
    }
    assert polarity["yes_chosen"]["value"] == 75 and polarity["yes_chosen"]["pairs"] == 40
    assert {name: part["pairs"] for name, part in one["sources"].items()} == {"left": 23, "right": 23}
    assert gates(one)["yes is chosen"] == "fail"
    assert [gate["value"] for gate in one["gates"] if gate["name"] == "yes is chosen"] == [75]


def polarity_gate(one: dict) -> tuple:
    (gate,) = [gate for gate in one["gates"] if gate["name"] == "yes is chosen"]
    return gate["status"], gate["value"], gate["why"]


def test_yes_and_no_are_counted_over_all_sources_and_in_each(picture_folder):
    both = ("Yes.", "No."), ("No.", "Yes.")

    def answers(each: list[list[int]]) -> dict:
        """``each[source][n]``: which of the two is chosen."""
        told = [(source, both[n]) for source, sides in enumerate(each) for n in sides]
        return audited(picture_folder, [row(n, *two, source=f"s{source}") for n, (source, two) in enumerate(told)])

    scattered = answers([[0]] * 120)
    assert polarity_gate(scattered)[:2] == ("fail", 100) and scattered["sources"]["(others)"]["pairs"] == 80
    opposite = answers([[0] * 30, [1] * 30])
    assert opposite["overall"]["polarity"]["yes_chosen"]["value"] == 50
    assert polarity_gate(opposite)[:2] == ("fail", 100) and "source 's0'" in polarity_gate(opposite)[2]
    small = answers([*[[0, 1] * 3] * 40, *[[0] * 5] * 8])  # beyond the forty largest
    assert polarity_gate(small) == ("fail", 100, "source '(others)'; above 52 %")


def test_duplicates(picture_folder):
    rows = [row(n, f"It is {n}.", "It is none.") for n in range(100)]
    twin = {**rows[7], "id": "twin", "chosen": "It is something else."}
    other_edit = {**rows[8], "id": "edit", "rejected": "It is all."}
    one = audited(picture_folder, [*rows, twin, other_edit])
    assert one["duplicates"]["extra"] == 1 and one["duplicates"]["percent"] == pytest.approx(100 / 102)
    (example,) = one["duplicates"]["examples"]
    assert [place.rsplit(":", 1)[1] for place in example["places"]] == ["8", "101"]
    assert example["rejected"] == "It is none." and gates(one)["duplicates"] == "warn"
    twice = audited(picture_folder, [*rows, *({**r, "id": f"again {r['id']}"} for r in rows[:10])])
    assert twice["duplicates"]["extra"] == 10 and gates(twice)["duplicates"] == "fail"
    assert gates(audited(picture_folder, rows))["duplicates"] == "pass"


def test_repeated():
    assert repeated(np.array([5, 1, 5, 2, 1, 5])) == [[0, 2, 5], [1, 4]]


def test_near_duplicates():
    sentence = "a small brown dog lies on the red mat beside an old wooden door in the late sun"
    texts = [
        sentence,
        sentence.replace("sun", "rain"),  # 14 of 17 different threes are shared
        sentence.replace("brown", "white").replace("red", "blue").replace("old", "new"),
        "short and equal",
        "short and equal",
        sentence,
    ]
    found = near_duplicates(texts, np.array([1, 2, 3, 4, 5, 1]))
    assert found["compared"] == 4 and found["found"] == 3
    assert {tuple(sorted(two[:2])) for two in found["examples"]} == {(0, 1)}
    assert found["examples"][0][2] == pytest.approx(15 / 17)
    assert near_duplicates([sentence, sentence], np.array([1, 1]))["found"] == 0  # edits of one answer
    assert near_duplicates(["short one"], np.array([1]))["percent"] is None


def test_near_duplicates_are_found_nearly_all():
    """400 texts of 30 words and a copy with one word changed: 25 of 31 different threes are shared."""
    rng = random.Random(0)
    texts = []
    for n in range(400):
        text = [f"w{rng.randrange(5_000)}" for _ in range(30)]
        texts += [" ".join(text), " ".join([*text[:15], f"new{n}", *text[16:]])]
    assert near_duplicates(texts, np.arange(800))["found"] >= 792


def test_categories_and_sources(picture_folder):
    rows = colour_rows(240, uniform)
    for n, r in enumerate(rows):
        r["category"] = "rare" if n < 5 else "common"
    one = audited(picture_folder, rows)
    assert list(one["categories"]) == ["common", "rare"]
    assert one["categories"]["common"]["ngrams"]["accuracy"] is not None
    rare = one["categories"]["rare"]
    assert rare["pairs"] == 5 and rare["ngrams"]["accuracy"] is None and "too few" in rare["ngrams"]["why"]
    assert {name: part["pairs"] for name, part in one["sources"].items()} == {"a": 120, "b": 120}  # the images' folders
    assert "model" not in rare and one["model"] is None


def test_editors(picture_folder):
    rows = colour_rows(240, uniform)
    for n, r in enumerate(rows):
        r["provenance"] = {"editor": ("big", "small", " ", 7)[n % 4]}
    rows[3]["provenance"] = "by hand"
    one = audited(picture_folder, rows)
    assert {name: part["pairs"] for name, part in one["editors"].items()} == {"(none)": 120, "big": 60, "small": 60}
    assert one["editors"]["big"]["ngrams"]["accuracy"] is not None
    assert audited(picture_folder, colour_rows(60, uniform))["editors"] == {}


def test_where_a_row_is_from(picture_folder):
    bare = {"prompt": "What?", "chosen": "A.", "rejected": "B."}
    rows = [
        {**bare, "id": "1", "ds_name": "x", "origin_dataset": "coco"},
        {**bare, "id": "2", "ds_name": "x", "source": " own "},
        {**bare, "id": "3", "images": ["a/1.png"]},
        {**bare, "id": "4"},
    ]
    sources = audited(picture_folder, rows, max_pairs=10)["sources"]
    assert sorted(sources) == ["a", "coco", "own", "pairs.jsonl"]


def test_only_the_assistants_turns_count(picture_folder):
    turns = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And then, after that?"}]
    rows = [
        row(n, "x", "y") | {"chosen": [*turns, {"role": "assistant", "content": "Two."}], "rejected": [*turns, {"role": "assistant", "content": "Two or three."}]}
        for n in range(3)
    ]  # fmt: skip
    length = audited(picture_folder, rows)["overall"]["length"]
    assert (length["chosen_mean"], length["rejected_mean"]) == (2, 4)


def test_words_of_one_pair_alone_teach_nothing(picture_folder):
    ngrams = audited(picture_folder, [row(n, f"u{n}", f"v{n}") for n in range(80)])["overall"]["ngrams"]
    assert (ngrams["pairs"], ngrams["usable"], ngrams["accuracy"]) == (80, 0, None)
    assert "too few: 0 pairs that differ" in ngrams["why"]


# --- gates


def test_a_small_set_does_not_fail_by_chance(picture_folder):
    rows = [row(n, "It is red.", "It is red now." if n < 7 else "It is blue.") for n in range(12)]
    one = audited(picture_folder, rows)
    assert one["overall"]["length"]["rejected_longer"]["value"] == pytest.approx(100 * 9.5 / 12)
    assert gates(one)["rejected longer"] == "warn"
    assert gates(one)["n-gram probe"] == "not measured"


def test_a_small_set_does_not_pass_by_chance(picture_folder):
    """Half of ten pairs is 50 %, and the interval from 24 to 76: no evidence of balance."""
    texts = [("It is red.", "It is red now."), ("It is blue now.", "It is blue.")] * 5 + [
        ("Yes.", "No."),
        ("No.", "Yes."),
    ] * 5
    one = audited(picture_folder, [row(n, *pair, images=[f"a/{n}.png"]) for n, pair in enumerate(texts)])
    named = {gate["name"]: gate for gate in one["gates"]}
    assert named["yes is chosen"]["value"] == 50 and named["yes is chosen"]["status"] == "too small to tell"
    assert (
        named["yes is chosen"]["why"]
        == "the interval reaches from 23.7 to 76.3; more pairs, of more images, would tell"
    )
    assert named["rejected longer"]["status"] == named["mean length gap"]["status"] == "too small to tell"
    result = {"sets": {"set": one}, "failed": []}
    assert verdict(result) == "no gate fails; too small to tell in 3 gates"
    big = audited(picture_folder, [row(n, *texts[10 + n % 2], images=[f"a/{n // 2}.png"]) for n in range(120)])
    assert gates(big)["yes is chosen"] == "pass"


@pytest.mark.parametrize(("value", "interval", "status"), [(50, [41, 59], "pass"), (50, [37, 63], "too small to tell"), (50, [15, 85], "too small to tell"), (55, [51, 59], "warn"), (60, [53, 67], "fail")])  # fmt: skip
def test_the_balance_gates(picture_folder, value, interval, status):
    one = audited(picture_folder, [row(n, "Yes.", "No.", images=["a/0.png"]) for n in range(60)])
    one["overall"]["length"]["rejected_longer"] |= {"value": value, "interval": interval}
    one["overall"]["polarity"]["yes_chosen"] |= {"value": value, "interval": interval}
    assert {gates({"gates": judge(one)})[name] for name in ("rejected longer", "yes is chosen")} == {status}


def test_a_source_too_small_to_tell_leaves_the_verdict_to_the_set(picture_folder):
    rows = [row(n, *(("Yes.", "No."), ("No.", "Yes."))[n % 2], source="large") for n in range(120)]
    rows += [row(120 + n, *(("Yes.", "No."), ("No.", "Yes."))[n % 2], source="small") for n in range(4)]
    one = audited(picture_folder, rows)
    assert one["sources"]["small"]["polarity"]["yes_chosen"]["value"] == 50
    assert gates(one)["yes is chosen"] == "pass"


@pytest.mark.parametrize(
    ("accuracy", "interval", "status"),
    [
        (72, [70.5, 74], "fail"),
        (72, [69, 75], "warn"),
        (61, [60.5, 62], "warn"),
        (58, [50, 66], "pass"),
        (52, [33, 71], "too small to tell"),
    ],
)
def test_the_ngram_gate(picture_folder, accuracy, interval, status):
    one = audited(picture_folder, [row(n, "It is red.", "It is blue.") for n in range(60)])
    one["overall"]["ngrams"] |= {"accuracy": accuracy, "interval": interval}
    (gate,) = [gate for gate in judge(one) if gate["name"] == "n-gram probe"]
    assert gate["status"] == status


@pytest.mark.parametrize(("value", "interval", "status"), [(20, [16, 24], "pass"), (20, [4, 36], "too small to tell"), (12, [8, 16], "warn"), (12, [9, 14], "fail"), (None, None, "not measured")])  # fmt: skip
def test_the_image_gate(picture_folder, value, interval, status):
    one = audited(picture_folder, [row(n, "It is red.", "It is blue.") for n in range(60)])
    one["model"] = {"gap": {"value": value, "interval": interval}, "why": "too few"}
    assert {gate["name"]: gate["status"] for gate in judge(one)}["gain by the image"] == status


# --- with a model


def test_the_model_is_asked_with_and_without_the_image(tiny, photo_pairs, photo_rows, photo_root, tmp_path):
    rows = photo_rows[:24]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs(tmp_path / "pairs.jsonl", image_root=photo_root)
    model = str(tiny("qwen2_5_vl"))
    found = audit({"set": pairs}, model=model)["sets"]["set"]["model"]

    processor = Processor(model, load_model_config(model))
    plain = oracles.load_model(Path(model), "qwen2_5_vl")
    margins: dict[str, list[float]] = {"with_image": [], "blind": []}
    for pair in pairs:
        image_free = [{**m, "content": [p for p in m["content"] if p["type"] == "text"]} for m in pair.prompt]
        paths = processor.tokenize_pair(pair).paths
        with torch.no_grad():
            logps = [oracles.completion_logps(plain, "qwen2_5_vl", path) for path in paths]
            margins["with_image"].append(
                [float(logps[0].sum() - logps[1].sum()), float(logps[0].mean() - logps[1].mean())]
            )
            prompt = processor.tokenizer.apply_chat_template(
                image_free,
                chat_template=processor.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            assert processor.image_token_id not in prompt
            sides = []
            for path in paths:
                ids = torch.tensor([[*prompt, *path.input_ids[path.completion_start :]]])
                logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                sides.append(logits.gather(-1, ids[0, len(prompt) :, None])[:, 0])
            margins["blind"].append([float(sides[0].sum() - sides[1].sum()), float(sides[0].mean() - sides[1].mean())])
    for view, values in margins.items():
        truth = np.array(values)
        assert found[view]["margin"] == pytest.approx(truth[:, 0].mean(), abs=1e-3)
        assert found[view]["margin_per_token"] == pytest.approx(truth[:, 1].mean(), abs=1e-3)
        assert found[view]["accuracy"]["value"] == pytest.approx(100 * np.mean(truth[:, 0] > 0))
        assert found[view]["accuracy_per_token"]["value"] == pytest.approx(100 * np.mean(truth[:, 1] > 0))
    images = {pair.images[0] for pair in pairs}
    assert found["asked"] == 24 and found["skipped"]["rows"] == 0
    if len(images) < 20:
        assert found["gap"]["value"] is None and "too few" in found["why"]


def test_a_model_scores_some_of_many_images(tiny, picture_folder):
    rows = [row(n, "It is red.", "It is blue.") for n in range(60)]
    pairs = opened(picture_folder, rows)
    one = audit({"set": pairs}, model=str(tiny("llava")), limit=40)["sets"]["set"]
    model = one["model"]
    assert model["asked"] == 40 and model["gap"]["pairs"] == 40
    difference = model["with_image"]["accuracy"]["value"] - model["blind"]["accuracy"]["value"]
    assert model["gap"]["value"] == pytest.approx(difference)
    low, high = model["gap"]["interval"]
    assert low <= model["gap"]["value"] <= high
    assert gates(one)["gain by the image"] in ("pass", "warn", "fail")
    assert sum(part["model"]["with_image"]["accuracy"]["pairs"] for part in one["sources"].values()) == 40
