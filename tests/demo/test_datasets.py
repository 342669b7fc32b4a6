"""The demo's data: pictures that are apart, instructions that the rules edit, pairs whose rejected answers are wrong."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.demo.looking import COLOURS, NUMBERS, is_true, read_cells
from vapr.data.sources import read_pairs
from vapr.demo.datasets import (
    CLAUSE,
    contents,
    draw_pictures,
    edit,
    length_biased,
    subset,
    write_instructions,
    write_set,
)  # fmt: skip
from vapr.text import polarity


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    out = tmp_path_factory.mktemp("edited")
    asked = draw_pictures(out / "instructions", np.random.default_rng(4), 120, yes_share=0.5, hard=True)
    ledger = edit(write_instructions(out / "instructions", asked), out / "pairs", 0, print)
    return asked, ledger, read_pairs(out / "pairs")


def said(messages):
    return messages[-1]["content"][0]["text"]


def test_every_chosen_answer_is_true_and_every_rejected_one_wrong_of_the_picture(edited):
    _, _, pairs = edited
    for pair in pairs:
        things = read_cells(Image.open(pair.images[0]))
        question = pair.prompt[0]["content"][-1]["text"]
        assert is_true(question, said(pair.chosen), things)
        assert not is_true(question, said(pair.rejected), things)


def test_the_rules_edit_every_kind_of_question_and_say_what_they_leave(edited):
    asked, ledger, pairs = edited
    assert ledger["accepted"] == len(pairs)
    assert ledger["turns"]["total"] == len(asked) == len(pairs) + sum(ledger["rejected"].values())
    assert set(ledger["rejected"]) <= {"no other row to trade values with"}
    assert set(ledger["categories"]) == {"attribute", "count", "existence", "kind", "spatial"}
    assert all(one["accept_rate"] > 0.8 for one in ledger["categories"].values())


def test_no_word_tells_which_answer_is_wrong(edited):
    _, _, pairs = edited
    chosen, rejected = Counter(), Counter()
    answers = Counter()
    for pair in pairs:
        chosen.update(re.findall(r"\w+", said(pair.chosen).lower()))
        rejected.update(re.findall(r"\w+", said(pair.rejected).lower()))
        answers[polarity(said(pair.chosen))] += 1
    assert answers["yes"] == answers["no"] > 30
    for word in (*COLOURS, *NUMBERS, "box", "ball", "kite", "ring", "left", "right", "yes", "no"):
        assert chosen[word] == rejected[word]


def test_smaller_sets_lie_inside_larger_ones_by_picture(edited):
    _, _, pairs = edited
    ids = [[row["id"] for row in subset(pairs, pictures)] for pictures in (30, 60, 120)]
    assert ids[0] == ids[1][: len(ids[0])] and ids[1] == ids[2][: len(ids[1])]
    assert 0 < len(ids[0]) < len(ids[1]) < len(ids[2]) == len(pairs)
    pictures = {Path(row["images"][0]).stem for row in subset(pairs, 30)}
    assert pictures <= {f"{n:05d}" for n in range(30)}


def test_length_biased_answers_are_the_same_and_longer(edited, tmp_path):
    _, _, pairs = edited
    again = read_pairs(write_set(tmp_path / "set", length_biased(pairs)))
    for pair, longer in zip(pairs, again, strict=True):
        assert said(longer.chosen) == said(pair.chosen)
        assert said(longer.rejected) == said(pair.rejected)[:-1] + CLAUSE
        assert longer.images[0].samefile(pair.images[0])


def test_held_out_pictures_show_nothing_that_another_set_shows(tmp_path):
    random = np.random.default_rng(6)
    first = draw_pictures(tmp_path / "first", random, 400, yes_share=0.5, hard=False, grow=True)
    held_out = draw_pictures(tmp_path / "held_out", random, 100, yes_share=0.5, hard=True, other_than=first)
    seen = {frozenset(read_cells(Image.open(path))) for path in (tmp_path / "first").glob("*.png")}
    assert len({one.picture for one in held_out}) > 90
    assert not {contents(one.scene) for one in held_out} & {contents(one.scene) for one in first}
    assert len(seen) > 100  # the draw was not of a few pictures over and over


def test_same_seed_same_bytes(tmp_path):
    for name in ("first", "second"):
        asked = draw_pictures(tmp_path / name, np.random.default_rng(5), 12, yes_share=0.7, hard=False, grow=True)
        write_instructions(tmp_path / name, asked)
    files = sorted((tmp_path / "first").iterdir())
    assert len(files) == 13
    assert all(file.read_bytes() == (tmp_path / "second" / file.name).read_bytes() for file in files)


def test_instructions_hold_no_rejected_answers(tmp_path):
    asked = draw_pictures(tmp_path / "set", np.random.default_rng(7), 5, yes_share=0.5, hard=True)
    lines = write_instructions(tmp_path / "set", asked).read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"id", "image", "question", "answer", "source"}] * len(asked)
