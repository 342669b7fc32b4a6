"""Studies of tiny policies: the grid, nested subsets, interruptions, and figures worked out by other means."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from vapr.cli import main
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.scoring.prediction import Prediction, write_predictions
from vapr.study.config import StudyConfig
from vapr.study.grid import make_grid
from vapr.study.measures import Measured, figures_of
from vapr.study.run_study import run_study
from vapr.training import trainer

REPOSITORY = Path(__file__).resolve().parents[2]


class InThisProcess:
    """Trains a cell without a process of its own, and notes that it was begun."""

    def __init__(self, cell):
        self._cell = cell
        with (cell.run_dir.parent.parent / "begun.txt").open("a") as file:
            file.write(f"{cell.run_dir.name}\n")

    def wait(self, look):
        try:
            trainer.train(Config.load(self._cell.write_config()), resume=self._cell.run_dir.is_dir())
        except UserError as error:
            return str(error)
        return None

    def stop(self):
        pass


@pytest.fixture
def study_file(tiny, photo_rows, photo_root, tmp_path):
    """``study_file(...)`` writes a study of two sizes, losses and seeds; keys replace its own, None removes one."""
    write_pairs(tmp_path / "pairs.jsonl", photo_rows[:24])
    write_pairs(tmp_path / "held_out.jsonl", [row for row in photo_rows[24:] if row["category"] == "existence"])
    base = {
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "workers": 0},
        "optim": {"lr": 1e-3, "pairs_per_step": 4},
        "reference": {"cache_dir": str(tmp_path / "reference")},
        "probe": {"every": 100, "data": str(tmp_path / "held_out.jsonl"), "pairs": 3, "questions": 2, "shown": 0},
        "trackers": [],
    }

    def write(name: str = "study.yaml", base_changes: dict | None = None, **changes) -> Path:
        whole = {
            "out": str(tmp_path / "out"),
            "base": {**base, **(base_changes or {})},
            "losses": {"dpo": {"kind": "dpo"}, "sft": {"kind": "sft"}},
            "sizes": [4, 8],
            "seeds": [0, 1],
        }
        whole = {key: value for key, value in {**whole, **changes}.items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(whole))
        return tmp_path / name

    return write


def study_of(path: Path, *overrides: str) -> StudyConfig:
    return StudyConfig.load(path, overrides)


def begun(tmp_path: Path) -> list[str]:
    file = tmp_path / "out" / "begun.txt"
    return file.read_text().splitlines() if file.exists() else []


def ids(path: str) -> list[str]:
    return [pair.id for pair in read_pairs(path)]


def test_subsets_are_nested_and_the_same_for_every_loss_and_seed(study_file):
    cells = make_grid(study_of(study_file()))
    assert [(cell.size, cell.loss, cell.seed) for cell in cells] == [
        (size, loss, seed) for size in (4, 8) for loss in ("dpo", "sft") for seed in (0, 1)
    ]
    small, large = ({str(cell.config.data.train) for cell in cells if cell.size == size} for size in (4, 8))
    assert len(small) == len(large) == 1
    assert len(ids(*small)) == 4 and len(ids(*large)) == 8 and set(ids(*small)) < set(ids(*large))
    assert [cell.num_steps for cell in cells] == [1] * 4 + [2] * 4
    equal = make_grid(study_of(study_file(equal="steps")))
    assert [cell.num_steps for cell in equal] == [2] * 8
    assert all(cell.config.optim.max_steps == 2 for cell in equal)


def test_a_subset_holds_what_its_rows_hold(study_file, photo_rows, photo_root):
    cell = make_grid(study_of(study_file(sizes=[24])))[0]
    whole = {pair.id: pair for pair in read_pairs(str(cell.config.data.train))}
    for pair in read_pairs(str(study_of(study_file()).base["data"]["train"]), image_root=photo_root):
        same = whole.pop(pair.id)
        assert dataclasses.replace(same, images=()) == dataclasses.replace(pair, images=())
        assert [Path(image).samefile(other) for image, other in zip(same.images, pair.images, strict=True)]
    assert not whole


def test_everything_is_trained_once_and_shown(study_file, tmp_path, capsys):
    said = []
    result = run_study(study_of(study_file()), said.append, start=InThisProcess)
    assert [cell["state"] for cell in result["cells"]] == ["trained"] * 8
    assert len(begun(tmp_path)) == len(set(begun(tmp_path))) == 8
    assert "runs       8, 0 of them done, 8 left: 12 steps" in said
    assert set(result["measures"]) == {"held-out pairs", "held-out questions"}
    groups = result["measures"]["held-out pairs"]["groups"]
    assert [(group["size"], group["loss"], group["seeds"]) for group in groups] == [
        (4, "dpo", [0, 1]), (4, "sft", [0, 1]), (8, "dpo", [0, 1]), (8, "sft", [0, 1]),
    ]  # fmt: skip
    said.clear()
    again = run_study(study_of(study_file()), said.append, start=InThisProcess)
    assert again == result and len(begun(tmp_path)) == 8
    assert "runs       8, 8 of them done, 0 left: 0 steps" in said
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == result
    page = (tmp_path / "out" / "study.html").read_text()
    assert "8 runs: 8 trained." in page and "held-out questions" in page and page.count("<svg") >= 3


def test_the_caches_are_shared(study_file, capsys):
    run_study(
        study_of(study_file(losses={"dpo": {"kind": "dpo"}, "ipo": {"kind": "ipo"}}, sizes=[8], seeds=[0])),
        print,
        start=InThisProcess,
    )
    computed = re.findall(r"found in the cache, (\d+) computed", capsys.readouterr().out)
    assert list(map(int, computed)) == [16, 0]


def test_only_what_changed_is_trained_again(study_file, tmp_path):
    run_study(study_of(study_file(seeds=[0], sizes=[4])), print, start=InThisProcess)
    said = []
    losses = {"dpo": {"kind": "dpo", "beta": 0.5}, "sft": {"kind": "sft"}}
    run_study(study_of(study_file(seeds=[0], sizes=[4], losses=losses)), said.append, start=InThisProcess)
    assert [name.split(".")[1] for name in begun(tmp_path)] == ["dpo", "sft", "dpo"]
    assert f"other      1 runs in {tmp_path}/out/runs are of other settings or data; left alone" in said
    rows = read_rows(tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "pairs.jsonl", [{**row, "chosen": "Another answer.", "edits": []} for row in rows])
    run_study(study_of(study_file(seeds=[0], sizes=[4], losses=losses)), print, start=InThisProcess)
    assert [name.split(".")[1] for name in begun(tmp_path)] == ["dpo", "sft", "dpo", "dpo", "sft"]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_fails_is_one_line_and_the_others_go_on(study_file, tmp_path, photo_rows, capsys):
    bad = [{**row, "images": ["nowhere.png"] * len(row.get("images", []))} for row in photo_rows[:4]]
    write_pairs(tmp_path / "other.jsonl", photo_rows[:4])
    study = study_of(
        study_file(
            data={"good": str(tmp_path / "pairs.jsonl"), "other": str(tmp_path / "other.jsonl")}, sizes=None, seeds=[0]
        )
    )

    class Spoiled(InThisProcess):
        def __init__(self, cell):
            super().__init__(cell)
            if cell.data == "other":
                write_pairs(tmp_path / "other.jsonl", bad)

    result = run_study(study, print, start=Spoiled)
    states = {(cell["data"], cell["loss"]): (cell["state"], cell["why"]) for cell in result["cells"]}
    assert states["good", "dpo"] == states["good", "sft"] == ("trained", None)
    assert all(
        states["other", loss][0] == "failed" and "nowhere.png" in states["other", loss][1] for loss in ("dpo", "sft")
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed ")]
    assert len(told) == 2 and result["failed"] == 2
    assert "4 runs: 2 trained, 2 failed." in (tmp_path / "out" / "study.html").read_text()


def pope(folder: Path, count: int = 30) -> Path:
    folder.mkdir()
    rows = [
        {
            "question_id": n,
            "image": f"{n // 3}.png",
            "text": f"Is there a cat {n} in the image?",
            "label": "yes" if n % 2 else "no",
        }
        for n in range(count)
    ]
    (folder / "coco_pope_random.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def answer_by_name(model: str, benches, folder: Path, study: StudyConfig) -> None:
    """The base says yes to everything; run of seed s is right but for every (s + 3)rd question, where it mumbles."""
    assert [bench.partition("=")[0] for bench in benches] == ["pope"]
    rows = read_rows(Path(benches[0].partition("=")[2]) / "coco_pope_random.json")
    seed = re.search(r"seed(\d)", model)
    said = [
        "Yes." if seed is None else "Hm." if n % (int(seed[1]) + 3) == 0 else row["label"] for n, row in enumerate(rows)
    ]
    predictions = [
        Prediction(benchmark="pope", id=f"random-{row['question_id']}", question=row["text"], prediction=text,
                   answer=row["label"], meta={"split": "random", "image": row["image"]})
        for row, text in zip(rows, said, strict=True)
    ]  # fmt: skip
    write_predictions(folder / "predictions.jsonl", predictions)
    (folder / "scores.json").write_text("{}")


def test_answers_to_benchmarks_are_compared_with_the_base(study_file, tmp_path):
    asked = []

    def evaluate(model, benches, folder, study):
        asked.append(model)
        answer_by_name(model, benches, folder, study)

    study = study_of(study_file(sizes=[4], losses=None, bench={"pope": str(pope(tmp_path / "pope"))}))
    result = run_study(study, print, start=InThisProcess, evaluate=evaluate)
    assert len(asked) == 3  # the base, and two seeds
    measure = result["measures"]["pope"]
    assert measure["base"]["accuracy"]["value"] == 0.5 and measure["base"]["yes_rate"]["value"] == 1
    [group] = measure["groups"]
    figures = {name: figure["value"] for name, figure in group["figures"].items()}
    wrong = (len(range(0, 30, 3)) + len(range(0, 30, 4))) / 60
    assert figures["accuracy"] == pytest.approx(1 - wrong) and figures["unparsed_rate"] == pytest.approx(wrong)
    assert figures["difference"] == pytest.approx(0.5 - wrong)
    said_yes = sum(n % 2 for s in (3, 4) for n in range(30) if n % s) / 60
    assert figures["yes_rate"] == pytest.approx(said_yes) and figures["gold_yes_rate"] == 0.5
    run_study(study, print, start=InThisProcess, evaluate=evaluate)
    assert len(asked) == 3


def test_vapr_eval_answers_the_benchmarks(study_file, tmp_path, capsys):
    folder = pope(tmp_path / "pope", 6)
    for n in range(2):
        Image.new("RGB", (56, 56), (90 * n, 60, 40)).save(folder / f"{n}.png")
    study = study_of(study_file(sizes=[4], seeds=[0], losses=None, bench={"pope": str(folder)}, max_new_tokens=3))
    result = run_study(study, print, start=InThisProcess)
    [cell] = result["cells"]
    for name in ("base", Path(cell["run"]).name):
        [file] = (tmp_path / "out" / "answers").glob(f"*/{name}/predictions.jsonl")
        assert len(read_rows(file)) == 6
    assert result["measures"]["pope"]["groups"][0]["figures"]["accuracy"]["count"] == 6


def test_the_interval_holds_questions_and_seeds():
    random = np.random.default_rng(0)
    truth, covered, rounds = 0.7, 0, 400
    for _ in range(rounds):  # 60 pictures of which some are harder, three seeds of which some are worse
        hard = random.normal(0, 0.15, 60)
        seeds = [
            Measured(
                tuple(map(str, range(60))),
                tuple(map(str, range(60))),
                (random.random(60) < truth + hard + shift).astype(float),
            )
            for shift in random.normal(0, 0.06, 3)
        ]
        low, high = figures_of(seeds)["accuracy"].interval
        covered += low <= truth <= high
    assert 0.93 <= covered / rounds <= 1.0
    one, three = figures_of(seeds[:1])["accuracy"], figures_of([seeds[0]] * 3)["accuracy"]
    assert three == one  # equal seeds add nothing
    worse = Measured(seeds[0].questions, seeds[0].pictures, np.zeros(60))
    spread = figures_of([seeds[0], worse])["accuracy"]
    assert spread.interval == (0.0, 1.0)  # with two seeds this far apart nothing is known


SCRIPT = """
import sys
from tests.study.test_study import InThisProcess
from vapr.study.config import StudyConfig
from vapr.study.run_study import run_study
run_study(StudyConfig.load(sys.argv[1]), print, start=InThisProcess)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}


def test_a_killed_study_goes_on_and_trains_no_run_twice(study_file, tmp_path):
    """Killed after its first run, somewhere in its second."""
    file = study_file(losses=None)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)], cwd=REPOSITORY, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and len(begun(tmp_path)) < 2:
        os.sched_yield()
    process.kill()
    process.wait()
    first, second = begun(tmp_path)
    done = [run.parent.name for run in (tmp_path / "out" / "runs").glob("*/final")]
    assert done == [first]
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs" / first).rglob("*") if file.is_file()
    }
    result = run_study(study_of(file), print, start=InThisProcess)
    assert [cell["state"] for cell in result["cells"]] == ["trained"] * 4
    assert sorted(begun(tmp_path)) == sorted([second, *{Path(cell["run"]).name for cell in result["cells"]}])
    after = {file: file.stat().st_mtime_ns for file in before}
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_ended_study_leaves_no_run_going_on(study_file, tmp_path, number):
    """The real thing: vapr study in a process, whose run in another must not outlive it."""
    file = study_file(
        sizes=[24], seeds=[0], losses=None,
        base_changes={"optim": {"lr": 1e-3, "pairs_per_step": 4, "epochs": 500}},
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "vapr.cli", "study", str(file)], cwd=REPOSITORY, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    runs = tmp_path / "out" / "runs"
    while process.poll() is None and not any(steps(file) for file in runs.glob("*/metrics.jsonl")):
        os.sched_yield()
    assert process.poll() is None, process.stdout.read()
    process.send_signal(number)
    output, _ = process.communicate()
    [lock] = runs.glob("*/.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the run is dead as soon as it lets go
    assert not list(runs.glob("*/final"))
    saved = [int(folder.name[5:]) for folder in runs.glob("*/checkpoints/step-*")]
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Stopped: SIGTERM: 0 of 1 runs are trained; the same command goes on from there" in output
        assert max(saved) == steps(*runs.glob("*/metrics.jsonl"))


def steps(metrics: Path) -> int:
    return metrics.read_text().count('"loss"')


def test_the_command(study_file, tmp_path):
    file = study_file(sizes=[4], seeds=[0], losses={"sft": {"kind": "sft"}})
    planned = CliRunner().invoke(main, ["study", str(file), "--plan"])
    assert planned.exit_code == 0 and "runs       1, 0 of them done, 1 left: 1 steps" in planned.output
    ran = CliRunner().invoke(main, ["study", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "held-out pairs: 3 questions" in ran.output and "1 runs: 1 trained." in ran.output
    assert f"page       {tmp_path}/out/study.html" in ran.output and "next       vapr export " in ran.output
    spoiled = study_file(
        sizes=[4],
        seeds=[0],
        losses={"sft": {"kind": "sft"}},
        base_changes={"policy": {"model": str(tmp_path / "none")}},
    )
    refused = CliRunner().invoke(main, ["study", str(spoiled)])
    assert refused.exit_code == 2 and "none: no such folder" in refused.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizs": [4]}, "unknown key 'sizs'; did you mean 'sizes'?"),
        ({"only": []}, "unknown key 'only'; leave out what is not wanted with exclude"),
        ({"sizes": [4, 25]}, "sizes: 25 is more than the 24 pairs of data.data; take it out, or leave the combination out"),
        ({"sizes": [4, 4]}, "sizes: 4 is given twice"),
        ({"sizes": [0]}, "sizes: 0 is too small"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"sizes": None, "seeds": None, "losses": None}, "nothing varies; give at least one of data, losses, sizes, seeds"),
        ({"losses": {"a/b": {"kind": "dpo"}}}, "losses: 'a/b' becomes a folder's name"),
        ({"losses": {"dpo": {"kind": "dppo"}}}, "losses.dpo.kind: should be 'sigmoid'"),
        ({"bench": {"pop": "x"}}, "bench.pop: pop: no such benchmark; did you mean pope?"),
        ({"bench": {"pope": "nowhere"}}, "bench.pope: pope=nowhere: no such file or folder"),
        ({"data": {"a": "nowhere.jsonl"}}, "data.a: nowhere.jsonl: no such file or folder"),
        ({"exclude": [{"sizes": 4}]}, "exclude.0: unknown key 'sizes'; did you mean 'size'?"),
        ({"exclude": [{"loss": "dop"}]}, "exclude.0.loss: there is no 'dop' in the study; did you mean 'dpo'?"),
        ({"exclude": [{"size": [4, 8]}]}, "exclude: every combination is left out; nothing would be trained"),
        ({"base_changes": {"probe": {}}}, "nothing would be measured; give benchmarks in bench, or a probe in base.probe"),
        ({"base_changes": {"optim": {"lrr": 1}}}, "base: unknown key 'optim.lrr'; did you mean 'lr'?"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"base": None}, "'base' is missing"),
        ({"equal": "pairs"}, "equal: should be 'epochs' or 'steps', got 'pairs'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(study_file, changes, message):
    with pytest.raises(UserError) as error:
        run_study(study_of(study_file(**changes)), print, start=InThisProcess)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sets_that_need_a_judge_are_refused_before_the_training(study_file, tmp_path, monkeypatch):
    study = study_of(study_file(bench={"pope": str(pope(tmp_path / "pope"))}, parsing="official"))
    for changes in (
        {"scored": "a judge has to read them"},
        {"lacks": lambda answers, policy: f"{len(answers)} of {policy}"},
    ):
        monkeypatch.setitem(BENCHMARKS, "pope", dataclasses.replace(BENCHMARKS["pope"], **changes))
        with pytest.raises(
            UserError, match=r"bench.pope: a study cannot compare its answers under 'official': (a judge|30)"
        ):
            run_study(study, print, start=InThisProcess)
        monkeypatch.undo()
    assert not begun(tmp_path)


def test_names_that_stand_twice(study_file):
    file = study_file()
    file.write_text(file.read_text().replace("losses:\n", "losses:\n  dpo: {kind: dpo}\n", 1))
    with pytest.raises(UserError, match="key 'dpo' is given twice"):
        study_of(file)


def test_a_study_in_use_is_refused(study_file, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another vapr process; wait for it"):
            run_study(study_of(study_file()), print, start=InThisProcess)


def test_weights_would_be_lost(study_file, tmp_path):
    data = {"mixed": [{"path": str(tmp_path / "pairs.jsonl"), "weight": 2}]}
    with pytest.raises(UserError, match=r"data.mixed: .*pairs.jsonl has a weight, which sizes would lose"):
        make_grid(study_of(study_file(data=data)))
    assert make_grid(study_of(study_file(data=data, sizes=None)))[0].num_steps == 12


def test_settings_of_the_base_are_overridden(study_file, tmp_path):
    base = study_of(study_file()).base
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "run_dir": "x"}))
    cells = make_grid(study_of(study_file(base=str(tmp_path / "base.yaml")), "base.optim.lr=0.5"))
    assert {cell.config.optim.lr for cell in cells} == {0.5}
