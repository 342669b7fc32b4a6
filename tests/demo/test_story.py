"""The story runs from end to end, at sizes that teach nothing; its page says what the figures say."""

import json
import re

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.cli import main
from vapr.config import Config
from vapr.demo import trainings
from vapr.demo.questions import CATEGORIES
from vapr.demo.report import line_plot
from vapr.demo.run import COMMON, POLICY, DemoSizes, run_demo
from vapr.demo.scenes import GRID, SIDE
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.demo.trainings import Training, Trainings
from vapr.errors import UserError
from vapr.training import trainer

TINY = DemoSizes(
    easy_pictures=24, sft_pictures=24, pair_pictures=50, held_out_pictures=20, pairs_per_step=32, at_a_time=1
)
NAMES = ("sft", "dpo", "dpo-half", "dpo-quarter", "length-biased", "more-sft")


class RunHere:
    """A training in this process, which saves the seconds that a process of its own takes to start."""

    seconds = 1.0

    def __init__(self, out, training, config):
        trainer.train(Config.load(config))
        self.training = training

    def steps_done(self):
        return len((self.training.run / "metrics.jsonl").read_text().splitlines())

    def ended(self):
        return True


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "_Process", RunHere)
        return out, run_demo(out, seed=1, sizes=TINY)


def test_everything_measured_is_on_disk(demo):
    out, result = demo
    saved = json.loads((out / "result.json").read_text())
    assert saved["policies"] == result["policies"] and saved["answers"] == result["answers"]
    assert set(saved["policies"]) == set(saved["trainings"]) - {"sft-easy"} == set(NAMES)
    for policy in saved["policies"].values():
        accuracy = policy["accuracy"]
        assert accuracy["overall"]["count"] == sum(accuracy[name]["count"] for name in CATEGORIES) > 60
        assert accuracy["overall"]["interval"][0] <= accuracy["overall"]["value"] <= accuracy["overall"]["interval"][1]
    for name in NAMES:
        assert (out / f"{name}-run" / "final" / "model.safetensors").is_file()


def test_controls_differ_from_dpo_in_what_they_are_for_alone(demo):
    out, result = demo
    configs = {name: yaml.safe_load((out / f"{name}.yaml").read_text()) for name in NAMES}
    for name in ("dpo-half", "dpo-quarter", "length-biased"):
        assert configs[name] == configs["dpo"] | {
            "run_dir": str(out / f"{name}-run"), "data": {**configs["dpo"]["data"], "train": configs[name]["data"]["train"]}
        }  # fmt: skip
    assert configs["more-sft"]["data"] == configs["dpo"]["data"]
    steps = {name: len((out / f"{name}-run" / "metrics.jsonl").read_text().splitlines()) for name in NAMES}
    assert steps["more-sft"] == steps["dpo"] == steps["length-biased"] > steps["dpo-half"] > steps["dpo-quarter"]
    assert steps["dpo"] == -(-result["editing"]["accepted"] // 32)


def test_length_gives_the_biased_pairs_away_and_not_the_edited_ones(demo):
    _, result = demo
    longer = {
        name: one["overall"]["length"]["rejected_longer"]["value"] for name, one in result["audit"]["sets"].items()
    }
    assert longer["length-biased"] == 100
    assert 40 < longer["edited"] < 60


def test_the_page_is_one_file_and_agrees_with_the_figures(demo):
    out, result = demo
    page = (out / "report.html").read_text()
    assert not re.search(r"https?:|//|<script|<link|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    for policy in result["policies"].values():
        for figure in policy["accuracy"].values():
            assert f"{100 * figure['value']:.1f} %" in page
    right = [[one["said"][name] == one["truth"] for name in ("sft", "dpo")] for one in result["answers"]]
    assert f"Fixed: {right.count([False, True])}<" in page
    assert f"Broken: {right.count([True, False])}<" in page
    garbled = sum(one["said"]["dpo"] is None for one in result["answers"])
    assert f"Garbled: {garbled}<" in page and garbled == result["policies"]["dpo"]["garbled"]["answers"]
    # A policy of a few steps has learned nothing, and the page does not say that it has.
    assert ">not shown<" in page


def test_what_was_said_of_the_time_is_kept(demo):
    _, result = demo
    assert [one["stage"] for one in result["estimates"]] == ["draw", "teach", "ask", "align", "ask again", "write"]
    lefts = [one["were_left"] for one in result["estimates"]]
    assert lefts == sorted(lefts, reverse=True) and lefts[0] == pytest.approx(result["seconds"]["total"], abs=0.1)


@pytest.mark.parametrize("family", POLICY)
def test_an_image_token_is_a_cell(family, tmp_path):
    """Whatever the family: 3 x 3 cells, 9 tokens; and every family can be asked for on the command line."""
    folder = build_tiny_policy(
        family, tmp_path / family, ["It is red. What colour is it?"] * 50, **COMMON, **POLICY[family]
    )
    processor = Processor(str(folder), load_model_config(str(folder)))
    image = processor.process(Image.new("RGB", (SIDE, SIDE), (255, 0, 0)), "red.png")
    assert image.num_tokens == processor.expected_image_tokens([(SIDE, SIDE)]) == GRID**2
    [option] = [option for option in main.commands["demo"].params if option.name == "family"]
    assert set(option.type.choices) == set(POLICY) and option.default in POLICY


def test_a_training_that_fails_is_one_line_with_its_log(tmp_path):
    training = Training(
        name="dpo", run=tmp_path / "run", model=tmp_path / "nothing", data=tmp_path / "none.jsonl",
        loss={"kind": "sft"}, lr=1e-3, num_pairs=10, pairs_per_step=2,
    )  # fmt: skip
    with Trainings(tmp_path, 0, 2) as running, pytest.raises(UserError) as failed:
        running.start([training])
        running.wait(lambda steps: None)
    assert re.match(r"dpo: vapr train ended with exit code 2 and said: .*no such .*dpo\.log$", str(failed.value))


def test_a_plot_of_one_step_or_of_equal_values_is_drawn():
    assert "nan" not in line_plot([0.5], "red") + line_plot([0.0] * 5, "red")


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    ran = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert ran.output.startswith("Error: --out: ") and ran.output.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]
