"""The demo: what its pictures and questions promise, and that the story runs from end to end."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vapr.cli import main
from vapr.config import Config
from vapr.demo.report import line_plot
from vapr.demo.run import DemoSizes, draw_set, run_demo
from vapr.demo.scenes import CATEGORIES, CELL, COLOURS, GRID, NUMBERS, SHAPES, ask, balanced, draw, random_scene

TINY = DemoSizes(sft_pictures=12, dpo_pictures=24, held_out_pictures=16, pairs_per_step=16)


def read_cells(image: Image.Image) -> list[tuple[str, str, int]]:
    """(colour, shape, column) of every thing, from the pixels alone: no code of the drawing is used."""
    pixels = np.asarray(image)
    found = []
    for row in range(GRID):
        for column in range(GRID):
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            counts = {name: int((cell == rgb).all(-1).sum()) for name, rgb in COLOURS.items()}
            colour = max(counts, key=lambda name: counts[name])
            if counts[colour]:
                found.append((colour, shape_of((cell == COLOURS[colour]).all(-1)), column))
    return found


def shape_of(mask: np.ndarray) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fill = box.mean()
    if fill > 0.95:
        return "square"
    if not box[box.shape[0] // 2, box.shape[1] // 2]:
        return "ring"
    return "cross" if box[0].sum() > 3 else "triangle"


def answer_by_looking(question: str, things: list[tuple[str, str, int]]) -> str:
    """The word that answers a question about things read from pixels."""
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        return "Yes" if match.groups() in {thing[:2] for thing in things} else "No"
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (colour,) = [colour for colour, shape, _ in things if shape == match[1]]
        return colour
    if match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (shape,) = [shape for colour, shape, _ in things if colour == match[1]]
        return shape
    if question == "How many objects are there?":
        return NUMBERS[len(things)]
    match = re.fullmatch(r"Is the (\w+) object on the left or on the right\?", question)
    assert match
    (column,) = [column for colour, _, column in things if colour == match[1]]
    return {0: "left", GRID - 1: "right"}[column]


@pytest.mark.parametrize("hard", [False, True])
def test_answers_are_true_of_the_pixels(hard):
    random = np.random.default_rng(1)
    asked = Counter()
    for number in range(150):
        scene = random_scene(random, 1, 3)
        things = read_cells(draw(scene))
        for category in CATEGORIES:
            question = ask(scene, category, random, wants_yes=number % 2 == 0, hard=hard)
            if question is None:
                continue
            asked[category] += 1
            assert question.truth == answer_by_looking(question.text, things)
            assert question.truth in question.answer
    assert min(asked[category] for category in CATEGORIES) > 40


def test_hard_negatives_tempt_and_easy_ones_do_not():
    random = np.random.default_rng(2)
    for _ in range(100):
        scene = random_scene(random)
        present = {thing.colour for thing in scene.things} | {thing.shape for thing in scene.things}
        for hard in (False, True):
            question = ask(scene, "existence", random, wants_yes=False, hard=hard)
            if question is not None:
                named = set(re.findall(r"\w+", question.text)) & {*COLOURS, *SHAPES}
                assert len(named) == 2
                assert named <= present if hard else not named & present


def test_a_rejected_answer_differs_by_one_word_of_the_same_kind(tmp_path):
    draw_set(tmp_path / "set", np.random.default_rng(3), 60, yes_share=0.5, hard=True)
    kinds = [set(COLOURS), set(SHAPES), set(NUMBERS.values()), {"left", "right"}, {"Yes", "No"}]
    for line in (tmp_path / "set" / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        chosen, rejected = row["chosen"].rstrip(".").split(), row["rejected"].rstrip(".").split()
        (changed,) = [words for words in zip(chosen, rejected, strict=True) if words[0] != words[1]]
        assert any(set(changed) <= kind for kind in kinds)
        (edit,) = row["edits"]
        assert row["chosen"][: edit["start"]] + edit["to"] + row["chosen"][edit["end"] :] == row["rejected"]


def test_the_balanced_set_cannot_be_answered_without_looking(tmp_path):
    asked = draw_set(tmp_path / "set", np.random.default_rng(4), 200, yes_share=0.5, hard=True, balance=True)
    swaps = Counter((question.category, question.truth, question.error) for question in asked)
    assert {category for category, _, _ in swaps} == set(CATEGORIES)
    assert all(n == swaps[category, error, truth] for (category, truth, error), n in swaps.items())
    assert swaps["existence", "Yes", "No"] > 50
    assert balanced([(0, question) for question in asked]) == [(0, question) for question in asked]


def test_same_seed_same_bytes(tmp_path):
    for name in ("first", "second"):
        draw_set(tmp_path / name, np.random.default_rng(5), 12, yes_share=0.85, hard=False, grow=True)
    files = sorted((tmp_path / "first").iterdir())
    assert len(files) == 13
    assert all(file.read_bytes() == (tmp_path / "second" / file.name).read_bytes() for file in files)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, seed=1, sizes=TINY)


def test_the_story_runs_from_end_to_end(demo, tmp_path):
    out, result = demo
    assert json.loads((out / "result.json").read_text()) == result
    accuracy = result["accuracy"]
    assert accuracy["overall"]["questions"] == sum(accuracy[category]["questions"] for category in CATEGORIES)
    assert accuracy["overall"]["questions"] == len(result["answers"]) > 10
    assert result["yes_share"]["truth"] == 0.5
    for stage in ("sft", "dpo"):
        assert (out / f"{stage}-run" / "final" / "model.safetensors").is_file()
        assert Config.load(out / f"{stage}.yaml").run_dir == str(out / f"{stage}-run")
    assert any((out / "reference-cache").rglob("*.safetensors"))


def test_the_report_is_one_file_and_agrees_with_the_numbers(demo):
    out, result = demo
    page = (out / "report.html").read_text()
    assert not re.search(r"https?:|//|<script|<link|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert f"{result['accuracy']['overall']['after']:.1%}" in page
    for name in ("fixed", "still_wrong", "broken"):
        assert f"{name.replace('_', ' ').capitalize()}: {result[name]}<" in page


def test_a_plot_of_one_step_or_of_equal_values_is_drawn():
    assert "nan" not in line_plot([0.5], "red") + line_plot([0.0] * 5, "red")


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    ran = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert ran.output.startswith("Error: --out: ") and ran.output.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]
