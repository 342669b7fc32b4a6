"""The audit finds what was planted, stays near chance where nothing was, and says when it cannot tell."""

import builtins
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests import oracles
from tests.test_report import chromium, needs_chromium
from vapr.audit import audit, named
from vapr.cli import main
from vapr.duplicates import near_duplicates, repeated
from vapr.gates import judge
from vapr.intervals import bootstrap, percent, relative_gap, wilson
from vapr.model import load_model_config
from vapr.pages.audit_report import write_audit_report
from vapr.pairs import write_pairs
from vapr.probes import ngram_differences
from vapr.processor import Processor
from vapr.sources import read_pairs

COLOURS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("dog", "cat", "car", "boat", "hat", "cup")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for place in ("a", "b"):
        (folder / place).mkdir()
        for n in range(60):
            Image.new("RGB", (28, 28), (4 * n, 90, 40)).save(folder / place / f"{n}.png")
    return folder


def row(n: int, chosen: str, rejected: str, **more) -> dict:
    image = f"{'ab'[n % 2]}/{n // 2 % 60}.png"
    return {
        "id": str(n),
        "images": [image],
        "prompt": f"What is it, {n}?",
        "chosen": chosen,
        "rejected": rejected,
        **more,
    }


def opened(folder: Path, rows: list[dict], name: str = "pairs.jsonl"):
    write_pairs(folder / name, rows)
    return read_pairs(folder / name)


def audited(folder: Path, rows: list[dict], **options) -> dict:
    return audit({"set": opened(folder, rows)}, **options)["sets"]["set"]


def gates(one: dict) -> dict[str, str]:
    return {gate["name"]: gate["status"] for gate in one["gates"]}


def colour_rows(count: int, replace, seed: int = 0) -> list[dict]:
    """Chosen colours are unevenly frequent; ``replace(colours, rng)`` gives the rejected ones."""
    rng = random.Random(seed)
    colours = rng.choices(COLOURS, weights=(8, 5, 3, 2, 1, 1), k=count)
    return [
        row(n, f"The {thing} is {old} today.", f"The {thing} is {new} today.", category=("odd", "even")[n % 3 == 0])
        for n, (old, new) in enumerate(zip(colours, replace(colours, rng), strict=True))
        if new is not None
        for thing in (rng.choice(THINGS),)
    ]


def uniform(colours, rng):
    return [rng.choice([new for new in COLOURS if new != old]) for old in colours]


def swapped(colours, rng):
    """Rows trade colours two by two; those that find no partner are left out."""
    rest = {colour: [n for n, own in enumerate(colours) if own == colour] for colour in COLOURS}
    new = [None] * len(colours)
    while len(live := sorted((c for c in COLOURS if rest[c]), key=lambda c: -len(rest[c]))) > 1:
        first, second = rest[live[0]].pop(), rest[live[1]].pop()
        new[first], new[second] = colours[second], colours[first]
    return new


# --- planted facts


def test_uniform_replacement_shows_and_swapping_does_not(folder):
    drawn = audited(folder, colour_rows(600, uniform))
    balanced = audited(folder, colour_rows(600, swapped))
    assert drawn["overall"]["ngrams"]["interval"][0] > 60
    assert balanced["overall"]["ngrams"]["accuracy"] < 55
    assert gates(drawn)["n-gram probe"] in ("warn", "fail") and gates(balanced)["n-gram probe"] == "pass"
    assert gates(balanced)["surface probe"] == "pass"
    assert "red" in [entry["feature"] for entry in drawn["overall"]["ngrams"]["top"]["chosen"][:5]]


def test_a_longer_rejected_text_fails(folder):
    rows = [row(n, "It is red.", "It is red and big.") for n in range(200)]
    one = audited(folder, rows)
    assert gates(one)["rejected longer"] == gates(one)["mean length gap"] == gates(one)["surface probe"] == "fail"
    length = one["overall"]["length"]
    assert length["rejected_longer"]["value"] == 100 and length["equal"] == 0
    assert length["chosen_mean"] == 3 and length["rejected_mean"] == 5
    assert length["gap"]["value"] == pytest.approx(100 * 2 / 3)
    assert length["outside_0.8_1.25"] == 100
    assert one["overall"]["edit_distance"]["median"] == pytest.approx(2 / 6)


def test_a_word_that_marks_rejected_is_on_top(folder):
    rng = random.Random(1)
    rows = [row(n, f"A {rng.choice(THINGS)} here.", f"A {rng.choice(THINGS)} indeed.") for n in range(200)]
    ngrams = audited(folder, rows)["overall"]["ngrams"]
    assert ngrams["accuracy"] == 100 and ngrams["auc"] == pytest.approx(1.0)
    first = ngrams["top"]["rejected"][0]
    assert "indeed" in first["feature"] and (first["more_in_rejected"], first["more_in_chosen"]) == (200, 0)
    assert "here" in ngrams["top"]["chosen"][0]["feature"]


def test_pairs_of_an_image_stay_in_one_fold(folder):
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
    one = audited(folder, rows)
    low, high = one["overall"]["ngrams"]["interval"]
    assert one["images"] == 120 and one["overall"]["ngrams"]["groups"] == 120
    assert low < 55 and one["overall"]["ngrams"]["accuracy"] < 65
    differences, _ = ngram_differences([r["chosen"] for r in rows], [r["rejected"] for r in rows])
    signs = np.random.default_rng(0).choice([-1, 1], len(rows))
    model = LogisticRegression(fit_intercept=False)
    folds = KFold(5, shuffle=True, random_state=0)
    leaky = cross_val_score(model, differences.multiply(signs[:, None]).tocsr(), signs, cv=folds)
    assert 100 * leaky.mean() > 95 and high < 95


def test_the_probe_equals_scikit_learn_by_hand(folder):
    """Words counted here, every pair given both ways round (C halved) instead of half of them turned."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    rows = colour_rows(300, uniform, seed=5)
    ngrams = audited(folder, rows)["overall"]["ngrams"]

    def grams(text: str) -> Counter:
        words = text.lower().replace(".", " .").split()
        return Counter(words) + Counter(" ".join(two) for two in pairwise(words))

    apart = [grams(r["chosen"]) for r in rows]
    for difference, r in zip(apart, rows, strict=True):
        difference.subtract(grams(r["rejected"]))
    names = sorted({name for difference in apart for name, count in difference.items() if count})
    names = [name for name in names if sum(difference[name] != 0 for difference in apart) >= 2]
    matrix = np.array([[difference[name] for name in names] for difference in apart], float)
    groups = [r["images"][0] for r in rows]
    scores = np.zeros(len(rows))
    numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    hashes = read_groups(folder, rows)  # GroupKFold breaks ties of equally large groups by their order
    assert len(set(zip(hashes, [numbers[g] for g in groups], strict=True))) == len(numbers)
    for train, test in GroupKFold(5).split(matrix, groups=hashes):
        both = np.concatenate([matrix[train], -matrix[train]])
        model = LogisticRegression(C=0.5, fit_intercept=False, max_iter=1000, tol=1e-8)
        model.fit(both, np.repeat([1, 0], len(train)))
        scores[test] = matrix[test] @ model.coef_[0]
    assert ngrams["accuracy"] == pytest.approx(100 * np.mean(scores > 0), abs=0.5)
    area = roc_auc_score(np.repeat([1, 0], len(rows)), np.concatenate([scores, -scores]))
    assert ngrams["auc"] == pytest.approx(area, abs=0.005)
    assert ngrams["auc_interval"][0] < area < ngrams["auc_interval"][1]


def read_groups(folder: Path, rows: list[dict]) -> np.ndarray:
    from vapr.pair_table import read_table

    return read_table(opened(folder, rows), max_pairs=10_000, seed=0).groups


def test_which_half_is_turned_does_not_matter(folder):
    rows = colour_rows(300, uniform, seed=6)
    first, second = (audited(folder, rows, seed=seed)["overall"] for seed in (0, 1))
    for key in ("surface", "ngrams"):
        assert first[key]["accuracy"] == pytest.approx(second[key]["accuracy"], abs=1.0)
        assert first[key]["auc"] == pytest.approx(second[key]["auc"], abs=0.01)


def test_the_same_seed_gives_the_same_result(folder):
    rows = colour_rows(200, uniform)
    first, second = (audited(folder, rows, seed=4, max_pairs=120) for _ in range(2))
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


def test_all_alike_is_not_certain():
    low, high = percent(np.ones(40), np.repeat(np.arange(4), 10))["interval"]
    assert high == pytest.approx(100) and low == pytest.approx(100 * wilson(1.0, 4)[0]) and low < 60
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
    assert relative_gap(values[:4], base[:4], groups[:4])["interval"] is None


# --- counts by hand


def test_yes_and_no(folder):
    texts = [("Yes.", "No.")] * 30 + [("No, none.", "Yes, one.")] * 10 + [("Yes, red.", "Yes, blue.")] * 3
    texts += [("A cat.", "No cat.")] * 2 + [("No.", "A cat.")]
    one = audited(folder, [row(n, *two, source="left" if n % 2 else "right") for n, two in enumerate(texts)])
    polarity = one["overall"]["polarity"]
    assert polarity["counts"] == {
        "yes": {"yes": 3, "no": 30, "neither": 0},
        "no": {"yes": 10, "no": 0, "neither": 1},
        "neither": {"yes": 0, "no": 0, "neither": 2},
    }
    assert polarity["yes_chosen"]["value"] == 75 and polarity["yes_chosen"]["pairs"] == 40
    assert {name: part["pairs"] for name, part in one["sources"].items()} == {"left": 23, "right": 23}
    assert gates(one)["yes is chosen"] == "fail"
    (gate,) = [gate for gate in one["gates"] if gate["name"] == "yes is chosen"]
    assert gate["value"] == 75 and "source" in gate["why"]


def test_duplicates(folder):
    rows = [row(n, f"It is {n}.", "It is none.") for n in range(100)]
    twin = {**rows[7], "id": "twin", "chosen": "It is something else."}
    other_edit = {**rows[8], "id": "edit", "rejected": "It is all."}
    one = audited(folder, [*rows, twin, other_edit])
    assert one["duplicates"]["extra"] == 1 and one["duplicates"]["percent"] == pytest.approx(100 / 102)
    (example,) = one["duplicates"]["examples"]
    assert [place.rsplit(":", 1)[1] for place in example["places"]] == ["8", "101"]
    assert example["rejected"] == "It is none." and gates(one)["duplicates"] == "warn"
    twice = audited(folder, [*rows, *({**r, "id": f"again {r['id']}"} for r in rows[:10])])
    assert twice["duplicates"]["extra"] == 10 and gates(twice)["duplicates"] == "fail"
    assert gates(audited(folder, rows))["duplicates"] == "pass"


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


def test_categories_and_sources(folder):
    rows = colour_rows(240, uniform)
    for n, r in enumerate(rows):
        r["category"] = "rare" if n < 5 else "common"
    one = audited(folder, rows)
    assert list(one["categories"]) == ["common", "rare"]
    assert one["categories"]["common"]["ngrams"]["accuracy"] is not None
    rare = one["categories"]["rare"]
    assert rare["pairs"] == 5 and rare["ngrams"]["accuracy"] is None and "too few" in rare["ngrams"]["why"]
    assert {name: part["pairs"] for name, part in one["sources"].items()} == {"a": 120, "b": 120}  # the images' folders
    assert "model" not in rare and one["model"] is None


def test_where_a_row_is_from(folder):
    bare = {"prompt": "What?", "chosen": "A.", "rejected": "B."}
    rows = [
        {**bare, "id": "1", "ds_name": "x", "origin_dataset": "coco"},
        {**bare, "id": "2", "ds_name": "x", "source": " own "},
        {**bare, "id": "3", "images": ["a/1.png"]},
        {**bare, "id": "4"},
    ]
    sources = audited(folder, rows, max_pairs=10)["sources"]
    assert sorted(sources) == ["a", "coco", "own", "pairs.jsonl"]


def test_only_the_assistants_turns_count(folder):
    turns = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And then, after that?"}]
    rows = [
        row(n, "x", "y") | {"chosen": [*turns, {"role": "assistant", "content": "Two."}], "rejected": [*turns, {"role": "assistant", "content": "Two or three."}]}
        for n in range(3)
    ]  # fmt: skip
    length = audited(folder, rows)["overall"]["length"]
    assert (length["chosen_mean"], length["rejected_mean"]) == (2, 4)


# --- gates


def test_a_small_set_does_not_fail_by_chance(folder):
    rows = [row(n, "It is red.", "It is red now." if n < 7 else "It is blue.") for n in range(12)]
    one = audited(folder, rows)
    assert one["overall"]["length"]["rejected_longer"]["value"] == pytest.approx(100 * 9.5 / 12)
    assert gates(one)["rejected longer"] == "warn"
    assert gates(one)["n-gram probe"] == "not measured"


@pytest.mark.parametrize(
    ("accuracy", "interval", "status"),
    [(72, [70.5, 74], "fail"), (72, [69, 75], "warn"), (61, [60.5, 62], "warn"), (58, [50, 66], "pass")],
)
def test_the_ngram_gate(folder, accuracy, interval, status):
    one = audited(folder, [row(n, "It is red.", "It is blue.") for n in range(60)])
    one["overall"]["ngrams"] |= {"accuracy": accuracy, "interval": interval}
    (gate,) = [gate for gate in judge(one) if gate["name"] == "n-gram probe"]
    assert gate["status"] == status


@pytest.mark.parametrize(("value", "interval", "status"), [(20, [16, 24], "pass"), (12, [8, 16], "warn"), (12, [9, 14], "fail"), (None, None, "not measured")])  # fmt: skip
def test_the_image_gate(folder, value, interval, status):
    one = audited(folder, [row(n, "It is red.", "It is blue.") for n in range(60)])
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


def test_a_model_scores_some_of_many_images(tiny, folder):
    rows = [row(n, "It is red.", "It is blue.") for n in range(60)]
    pairs = opened(folder, rows)
    one = audit({"set": pairs}, model=str(tiny("llava")), limit=40)["sets"]["set"]
    model = one["model"]
    assert model["asked"] == 40 and model["gap"]["pairs"] == 40
    difference = model["with_image"]["accuracy"]["value"] - model["blind"]["accuracy"]["value"]
    assert model["gap"]["value"] == pytest.approx(difference)
    low, high = model["gap"]["interval"]
    assert low <= model["gap"]["value"] <= high
    assert gates(one)["gain by the image"] in ("pass", "warn", "fail")
    assert sum(part["model"]["with_image"]["accuracy"]["pairs"] for part in one["sources"].values()) == 40


# --- the command


def vapr(*arguments: object):
    result = CliRunner().invoke(main, ["audit", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(folder: Path, name: str, rows: list[dict]) -> Path:
    write_pairs(folder / name, rows)
    return folder / name


def test_exit_codes_and_json(folder):
    good = written(folder, "good.jsonl", colour_rows(300, swapped))
    bad = written(folder, "bad.jsonl", [row(n, "It is red.", "It is very red.") for n in range(100)])
    fine = vapr(good)
    assert fine.exit_code == 0, fine.output
    assert "no gate fails" in fine.stdout
    failing = vapr(good, bad, "--json", "--seed", "3", "--max-pairs", "80")
    assert failing.exit_code == 1
    result = json.loads(failing.stdout)
    assert list(result["sets"]) == ["good.jsonl", "bad.jsonl"]
    assert result["settings"] == {"max_pairs": 80, "seed": 3, "model": None, "limit": None, "folds": 5}
    assert "bad.jsonl: rejected longer" in result["failed"]
    assert not any(line.startswith("good.jsonl: rejected") for line in result["failed"])
    table = vapr(good, bad).stdout
    line = next(line for line in table.splitlines() if line.startswith("rejected longer"))
    assert line.index("pass") < line.index("FAIL")
    assert "1 of 2 sets fail (bad.jsonl)" in table


def test_a_folder_of_vapr_edit(folder, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "ledger.jsonl").write_text('{"not": "a pair"}\n')
    rows = [{k: v for k, v in r.items() if k != "images"} for r in colour_rows(80, swapped)]
    write_pairs(tmp_path / "pairs" / "pairs.jsonl", rows)
    assert f"{len(rows)} rows" in vapr(tmp_path).stdout


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], (), "no pairs in it"),
        ([row(0, "A.", "A.")], (), "the same text"),
        ([row(0, "A.", "A.")], ("--on-bad-row", "skip"), "holds no pair"),
        ([row(0, "A.", "B.")], ("--out", "page.pdf"), ".html"),
        ([row(0, "A.", "B.")], ("--column", "prompt"), "--column prompt"),
        ([row(0, "A.", "B.")], ("--format", "nonsense"), "nonsense"),
        ([row(0, "A.", "B.")], ("--model", "/no/such/model"), "--model"),
    ],
)
def test_mistakes_are_one_line(folder, rows, arguments, message):
    result = vapr(written(folder, "mistake.jsonl", rows), *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and message in lines[0], result.output
    assert "Traceback" not in result.stderr


def test_more_mistakes(folder, monkeypatch):
    good = written(folder, "good.jsonl", colour_rows(20, swapped))
    assert "twice" in vapr(good, good).stderr
    assert "no such file" in vapr(folder / "absent.jsonl").stderr
    plain_import = builtins.__import__

    def without_sklearn(name, *rest):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    result = vapr(good)
    assert result.exit_code == 2 and "sklearn; pip install 'vapr[audit]'" in result.stderr


@pytest.mark.parametrize("rows", [[row(0, "A.", "B.")], [row(n, "...", "!") for n in range(60)], [row(n, "A b.", "B a.", category="one") for n in range(60)]])  # fmt: skip
def test_odd_sets_are_measured_all_the_same(folder, rows, tmp_path):
    file = written(folder, "odd.jsonl", rows)
    result = vapr(file, "--out", tmp_path / "page.html")
    assert result.exit_code in (0, 1) and (tmp_path / "page.html").exists()
    json.loads(vapr(file, "--json").stdout)


def test_texts_are_measured_without_the_image_files(folder, tiny):
    rows = [row(n, "It is red.", "It is blue.") for n in range(60)]
    rows[3]["images"] = ["a/gone.png"]
    file = written(folder, "gone.jsonl", rows)
    assert "(1 pairs whose files are missing)" in vapr(file).stdout
    refused = vapr(file, "--model", tiny("llava"))
    assert refused.exit_code == 2 and "gone.png' not found" in refused.stderr


def test_names_of_sets():
    assert list(named(["x/a.jsonl", "y/b.jsonl"], [1, 2])) == ["a.jsonl", "b.jsonl"]
    assert list(named(["x/pairs", "y/pairs"], [1, 2])) == ["x/pairs", "y/pairs"]


def test_bad_rows_are_counted(folder):
    rows = [*colour_rows(80, swapped), {"id": "bad", "prompt": "What?", "chosen": "A."}]
    file = written(folder, "skips.jsonl", rows)
    assert vapr(file).exit_code == 2
    assert "(1 rows skipped)" in vapr(file, "--on-bad-row", "skip").stdout


# --- the page

ATTACK = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def wide_page(folder, tmp_path_factory) -> Path:
    """Words, names and texts as wide as they come, in two sets."""
    endless = "x" * 300
    rows = [
        row(n, f"Yes {ATTACK} {endless} {n % 7} a b c d e", f"No {endless} {n % 5} {ATTACK} f g h i j", category=(endless, ATTACK, "c")[n % 3], source=f"{endless}{n % 2}")
        for n in range(90)
    ]  # fmt: skip
    rows += [{**rows[0], "id": "twin"}]
    sets = {name: opened(folder, rows, f"wide{n}.jsonl") for n, name in enumerate((endless, ATTACK))}
    result = audit(sets)
    view = {"accuracy": percent(np.ones(30), np.arange(30)), "accuracy_per_token": percent(np.ones(30), np.arange(30)), "margin": 1.0, "margin_per_token": 0.1}  # fmt: skip
    for one in result["sets"].values():
        one["model"] = {"with_image": view, "blind": view, "skipped": {"rows": 1, "first": [endless]}}
    path = tmp_path_factory.mktemp("page") / "audit.html"
    write_audit_report(path, result)
    return path


def test_the_page_needs_nothing_else(wide_page):
    text = wide_page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.findall(r"https?://|src=|url\(|@import", text)
    assert text.count("<svg") == 2 + 4 + 1


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(wide_page, tmp_path):
    ran = chromium(tmp_path / "profile", wide_page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,2200")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert len(Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1 << 20)) > 50


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_the_page_does_not_scroll_sideways(wide_page, tmp_path, width):
    tell = "<script>onload = () => parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "inner.html").write_text(wide_page.read_text().replace("</body>", f"{tell}</body>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<body><script>onmessage = (event) => {{ document.title = 'width ' + event.data }}</script><iframe src='inner.html' style='border:0' width={width} height=900></iframe>"
    )
    ran = chromium(tmp_path / "profile", outer, "--dump-dom", "--virtual-time-budget=5000")
    measured = re.search(r"<title>width (\d+)</title>", ran.stdout)
    assert measured and int(measured[1]) <= width
