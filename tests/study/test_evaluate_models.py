"""``vapr eval``: result folders that resume to the same bytes, belong to one model, and hold what models say."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests.evaluation.judged_answers import write_lines, write_set
from vapr.cli import main
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.evaluation import benchmarks
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.generation import evaluate, open_model
from vapr.evaluation.generation.journal import FolderLock, Journal
from vapr.evaluation.scoring.prediction import read_predictions
from vapr.study.evaluate_models import named_apart
from vapr.study.find_model import find
from vapr.training import trainer
from vapr.training.export import export

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", "8", "--batch-size", "5")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def vapr(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def ask(*arguments: object) -> dict:
    """What ``vapr eval ... --json`` prints."""
    code, out, error = vapr("eval", *arguments, *SHORT, "--json")
    assert code == 0, error
    return json.loads(out)


def refused(*arguments: object) -> str:
    """The one line that refuses the command."""
    code, out, error = vapr("eval", *arguments, *SHORT)
    assert (code, out) == (2, ""), (out, error)
    *_, line = error.splitlines()
    return line


def test_answers_are_written_in_the_order_of_the_questions_and_scored(tiny, pope, tmp_path):
    out = tmp_path / "out"
    [result] = ask(tiny("qwen2_5_vl"), "--bench", f"pope={pope}", "--out", out)["models"]
    predictions = read_predictions(out)
    asked = [question.id for question in POPE.read(pope)]
    assert [one.id for one in predictions] == asked
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "evaluation.json", "predictions.jsonl", "scores.json",
    ]  # fmt: skip
    code, scored, _ = vapr("score", out, "--bench", f"pope={pope}", "--json")
    assert code == 0
    assert json.loads(scored) == result["scores"]["pope"] == json.loads((out / "scores.json").read_text())["pope"]
    assert all(one.meta["log_p_yes"] < 0 and one.meta["log_p_no"] < 0 for one in predictions)


def test_the_table_names_policy_cut_off_answers_and_what_to_run_next(tiny, pope, tmp_path):
    out = tmp_path / "out"
    code, text, error = vapr("eval", tiny("llava"), "--bench", f"pope={pope}", "--out", out, *SHORT)
    assert code == 0, error
    assert "pope, read as 'strict', 24 answers" in text
    assert f"vapr score {out} --bench pope={pope} --policy last-answer" in text
    cut_off = sum(bool(one.meta.get("cut_off")) for one in read_predictions(out))
    assert f"{cut_off} answers were cut off" in text
    assert "question 24/24" in error  # progress, in a log


KILLED = """
import os, signal, sys
from vapr.cli import main
from vapr.evaluation.generation.journal import Journal

add, calls = Journal.add, []

def killed(journal, predictions):
    calls.append(1)
    add(journal, predictions if len(calls) < 3 else predictions[:2])
    if len(calls) == 3:
        with journal.partial.open("ab") as file:
            file.write(predictions[2].as_json().encode()[:40])
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = killed
main(sys.argv[1:])
"""
"""``vapr eval`` that is killed while it writes its third batch: two lines of it, and half of a third."""


def test_a_killed_run_loses_its_batch_and_resumes_to_the_same_answers(tiny, family, pope, tmp_path):
    model = tiny(family)
    common = (model, "--bench", f"pope={pope}", "--blind")
    ask(*common, "--out", tmp_path / "whole")
    command = ["eval", *common, "--out", tmp_path / "killed", *SHORT]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    partial = tmp_path / "killed" / "predictions.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 13
    assert not (tmp_path / "killed" / "predictions.jsonl").exists()
    code, _, error = vapr(*command)
    assert code == 0, error
    assert "its last line was cut short and is dropped" in error
    assert "12 of 24 questions are answered in predictions" in error
    assert "2 answers of a batch that was not complete are given again" in error
    for name in ("predictions.jsonl", "predictions.blind.jsonl", "scores.json"):
        resumed, whole = ((tmp_path / folder / name).read_text() for folder in ("killed", "whole"))
        words, figures = NUMBER.sub("#", resumed), [float(number) for number in NUMBER.findall(resumed)]
        assert words == NUMBER.sub("#", whole)
        # Another process may round a log-prob otherwise in its last place.
        assert figures == pytest.approx([float(number) for number in NUMBER.findall(whole)], rel=0, abs=3e-5)
    assert not partial.exists()


def test_ctrl_c_keeps_the_answers_so_far_and_says_how_to_go_on(tiny, pope, tmp_path, monkeypatch):
    add = Journal.add

    def interrupted(journal, predictions):
        if journal.answered:
            raise KeyboardInterrupt
        add(journal, predictions)

    monkeypatch.setattr(Journal, "add", interrupted)
    command = ("eval", tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out", *SHORT)
    code, _, error = vapr(*command)
    assert code == 130
    assert f"Stopped: SIGINT: 5 of 24 answers are kept in {tmp_path / 'out'}; the same command goes on" in error
    monkeypatch.undo()
    assert vapr(*command)[0] == 0
    assert len(read_predictions(tmp_path / "out")) == 24


def test_two_processes_do_not_write_to_one_folder(tiny, pope, tmp_path):
    with FolderLock(tmp_path / "out"):
        line = refused(tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out")
    assert "is in use by another vapr process" in line


def test_truths_that_are_withheld_are_answered_and_not_scored(tiny, pope, tmp_path):
    for file in pope.glob("*.json"):
        file.write_text(file.read_text().replace('"label": "yes"', '"label": "?"'))
    out = tmp_path / "out"
    [result] = ask(tiny("llava"), "--bench", f"pope={pope}", "--out", out, "--blind")["models"]
    assert len(read_predictions(out)) == 24
    assert (result["scores"]["pope"]["scored"], result["scores"]["pope"]["accuracy"]) == (False, None)
    assert "no truth that POPE has" in result["scores"]["pope"]["why"]


def test_a_judge_set_is_answered_and_scored_once_it_is_reviewed(tiny, tmp_path):
    for n in range(4):
        Image.new("RGB", (60, 60), (60 * n, 90, 40)).save(tmp_path / f"{n}.jpg")
    bench, out = write_set(tmp_path), tmp_path / "out"
    command = ("eval", tiny("llava"), "--bench", bench, "--out", out, *SHORT)
    code, text, error = vapr(*command)
    assert code == 0, error
    assert "mine  not scored: only a judge can score it" in text
    assert f"have it judged: vapr score {out} --bench {bench} --judge http://HOST:PORT/v1" in text
    reviews = [
        {"benchmark": "mine", "id": one.id, "judge": "j", "review": f"rating: {n % 2 * 6}", "answer": one.prediction}
        for n, one in enumerate(read_predictions(out))
    ]
    write_lines(out / "reviews.jsonl", reviews)
    code, scored, error = vapr("score", out, "--bench", bench, "--json")
    assert code == 0, error
    [result] = ask(*command[1:6])["models"]
    assert result["scores"]["mine"] == json.loads(scored)
    assert result["scores"]["mine"]["figures"]["score"]["value"] == 3


def test_what_is_answered_is_not_asked_again(tiny, pope, tmp_path, monkeypatch):
    common = (tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out")
    first = ask(*common)
    monkeypatch.setattr(evaluate, "TransformersEngine", None)  # cannot be called
    again = ask(*common)
    assert again["models"][0]["scores"] == first["models"][0]["scores"]


def test_a_benchmark_is_added_to_the_answers_of_others(tiny, pope, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "pope-2", dataclasses.replace(POPE, name="pope-2", read=read_as_pope_2))
    out = tmp_path / "out"
    ask(tiny("llava"), "--bench", f"pope={pope}", "--out", out)
    ask(tiny("llava"), "--bench", f"pope-2={pope}", "--out", out)
    both = tmp_path / "both"
    ask(tiny("llava"), "--bench", f"pope={pope}", "--bench", f"pope-2={pope}", "--out", both)
    assert (out / "predictions.jsonl").read_bytes() == (both / "predictions.jsonl").read_bytes()
    assert set(json.loads((out / "scores.json").read_text())) == {"pope", "pope-2"}
    assert set(json.loads((out / "evaluation.json").read_text())["questions"]) == {"pope", "pope-2"}


def read_as_pope_2(path):
    return [dataclasses.replace(question, benchmark="pope-2") for question in POPE.read(path)]


def test_the_blind_control_asks_without_pictures_and_tells_the_gap(tiny, pope, tmp_path):
    out = tmp_path / "out"
    [result] = ask(tiny("qwen2_vl"), "--bench", f"pope={pope}", "--out", out, "--blind")["models"]
    seen, blind = read_predictions(out), read_predictions(out / "predictions.blind.jsonl")
    assert [one.id for one in seen] == [one.id for one in blind]
    # A blind answer depends on the question's text alone.
    assert [one.prediction for one in seen] != [one.prediction for one in blind]
    scores = result["scores"]
    assert scores["pope (blind)"]["benchmark"] == "pope (blind)"
    gap = scores["pope (blind)"]["gap"]["accuracy"]
    assert gap["value"] == pytest.approx(scores["pope"]["accuracy"] - scores["pope (blind)"]["accuracy"])
    assert gap["interval"][0] <= gap["value"] <= gap["interval"][1]


def test_a_sample_is_scored_as_partial_and_said(tiny, pope, tmp_path):
    code, text, error = vapr(
        "eval", tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out", "--limit", 9, *SHORT
    )
    assert code == 0, error
    splits = [one.meta["split"] for one in read_predictions(tmp_path / "out")]
    assert all(2 <= splits.count(name) <= 4 for name in ("adversarial", "popular", "random"))
    assert f"pope: {len(splits)} of 24 questions are asked (--limit 9)" in error
    assert f"partial: {len(splits)} of 24 questions were asked" in text
    line = refused(tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out")
    assert f"holds answers of other questions of pope ({len(splits)} of pope=" in line


def test_a_folder_belongs_to_one_model_one_setting_and_one_set_of_questions(tiny, pope, tmp_path):
    out = tmp_path / "out"
    common = ("--bench", f"pope={pope}", "--out", out)
    copied = shutil.copytree(tiny("llava"), tmp_path / "model")
    ask(copied, *common)
    assert f"holds answers of another model, {copied}; give another folder" in refused(tiny("qwen2_vl"), *common)
    assert "holds answers of temperature 0.0, not 0.5" in refused(copied, *common, "--temperature", 0.5)
    assert "holds answers of dtype float32, not bfloat16" in refused(copied, *common, "--dtype", "bfloat16")
    text = (copied / "chat_template.jinja").read_text() if (copied / "chat_template.jinja").is_file() else None
    assert text is not None
    (copied / "chat_template.jinja").write_text(text.replace("ASSISTANT", "Assistant"))
    assert f"holds answers of {copied} with other weights or files than it has now" in refused(copied, *common)
    (copied / "chat_template.jinja").write_text(text)
    with (pope / "coco_pope_random.json").open("a") as file:
        file.write(
            json.dumps({"question_id": 9, "image": "coins.jpg", "text": "Is there a hat?", "label": "no"}) + "\n"
        )
    assert "holds answers of other questions of pope (24 of pope=" in refused(copied, *common)
    (out / "evaluation.json").unlink()
    assert "holds predictions.jsonl but no evaluation.json says whose it is" in refused(copied, *common)


def test_another_batch_size_is_allowed_and_said(tiny, pope, tmp_path):
    common = ("eval", tiny("llava"), "--bench", f"pope={pope}", "--out", tmp_path / "out", "--max-new-tokens", 8)
    assert vapr(*common, "--batch-size", 5)[0] == 0
    code, _, error = vapr(*common, "--batch-size", 3)
    assert code == 0
    assert "batch_size was 5 and is 3 now" in error


def fault(case: str, pope: Path, tmp_path: Path, model: Path) -> list[object]:
    """Arguments of ``vapr eval`` with one mistake."""
    bench, out, models = f"pope={pope}", tmp_path / "out", [model]
    random = pope / "coco_pope_random.json"
    match case:
        case "no model":
            models = []
        case "no benchmark":
            return [model, "--out", out]
        case "no temperature":
            return [model, "--bench", bench, "--out", out, "--temperature", "nan"]
        case "no folder":
            return [model, "--bench", bench]
        case "no questions":
            bench = "pope"
        case "unknown benchmark":
            bench = f"popes={pope}"
        case "missing picture":
            (pope / "coins.jpg").unlink()
        case "picture cut short":
            (pope / "coins.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        case "id twice":
            random.write_text(random.read_text() * 2)
        case "half a line":
            random.write_text(random.read_text()[:-20])
        case "wrong columns":
            random.write_text('{"question": "Is there a dog?"}\n')
        case "no such model":
            models = ["/no/such/model"]
        case "model without config":
            models = [tmp_path / "pope"]
        case "more marks than pictures":
            random.write_text(random.read_text().replace("dog", "<image> beside <image>"))
        case "the same model twice":
            models = [model, model]
        case "the same benchmark twice":
            return [model, "--bench", bench, "--bench", bench, "--out", out]
        case "damaged answers":
            assert vapr("eval", model, "--bench", bench, "--out", out, *SHORT)[0] == 0
            (out / "predictions.jsonl").write_text('{"id": 3}\n')
        case "damaged record":
            out.mkdir()
            (out / "evaluation.json").write_text("[]")
        case "unwritable":
            out.write_text("a file")
    return [*models, "--bench", bench, "--out", out]


def test_models_called_alike_are_told_apart_by_the_folders_above_them(tiny):
    found = open_model.find_answerer(str(tiny("llava")))

    def names(*places: str) -> list[str]:
        return [one.name for one in named_apart([dataclasses.replace(found, given=p, name="final") for p in places])]

    assert names("first/final", "second/final") == ["first-final", "second-final"]
    assert names("/a/x/runs/first/final", "/b/x/runs/first/final") == ["a-x-runs-first-final", "b-x-runs-first-final"]
    with pytest.raises(UserError, match="MODEL ./first/final is given twice"):
        names("first/final", "./first/final")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no model", "MODEL is missing; write: vapr eval MODEL --bench NAME=PATH --out DIR"),
        ("no benchmark", "--bench NAME=PATH is missing"),
        ("no folder", "--out DIR is missing"),
        ("no temperature", "--temperature nan: give a number from 0 on"),
        ("no questions", "--bench pope: which questions? Give --bench pope=PATH"),
        ("unknown benchmark", "--bench popes: no such benchmark; did you mean pope?"),
        ("missing picture", "coins.jpg' is not there (3 of 24 questions lack a picture); put the pictures where"),
        ("picture cut short", "coins.jpg' "),
        ("id twice", "question 'random-1' of pope stands twice"),
        ("half a line", "coco_pope_random.json:8: not a line of JSON; the file's last line is cut short"),
        ("wrong columns", "coco_pope_random.json:1: no 'question_id'"),
        ("no such model", "/no/such/model: no such folder"),
        ("model without config", "is a folder without config.json"),
        ("more marks than pictures", "question 'random-1' of pope: 2 '<image>' for 1 image(s); correct"),
        ("the same model twice", "is given twice; give each model once"),
        ("the same benchmark twice", "--bench pope is given twice"),
        ("damaged answers", "predictions.jsonl:1: no 'benchmark'"),
        ("damaged record", "evaluation.json: cannot be read"),
        ("unwritable", "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_found_before_weights_are_loaded(tiny, pope, tmp_path, monkeypatch, case, says):
    arguments = fault(case, pope, tmp_path, tiny("llava"))
    monkeypatch.setattr(open_model, "load_weights", None)  # cannot be called
    line = refused(*arguments)
    assert line.startswith("Error: ")
    assert says in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, photo_rows, photo_root):
    """Two finished runs of four steps, with LoRA and without, checkpoints at steps 2 and 4."""
    from vapr.config import Config

    folder = tmp_path_factory.mktemp("runs")
    write_pairs(folder / "pairs.jsonl", photo_rows[:16])
    for name, lora in (("lora", {"rank": 4, "alpha": 8}), ("full", None)):
        raw = {
            "run_dir": str(folder / name),
            "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", **({"lora": lora} if lora else {})},
            "data": {"train": str(folder / "pairs.jsonl"), "image_root": str(photo_root), "workers": 0},
            "optim": {"lr": 2e-3, "pairs_per_step": 8, "epochs": 2},
            "reference": {"cache_dir": str(folder / "reference")},
            "checkpoint": {"every": 2, "keep": 2},
        }
        trainer.train(Config.parse(raw))
    return folder


def weights(model: str | Path) -> dict[str, torch.Tensor]:
    """All weights, those of adapters merged."""
    loaded = find(str(model)).load(torch.float32)
    layers = [module for module in loaded.modules() if hasattr(module, "merge")]
    for layer in layers:
        layer.merge()
    return {name.replace(".base_layer", ""): w for name, w in loaded.state_dict().items() if ".lora_" not in name}


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_a_checkpoint_and_its_export_are_the_same_model(trained, tiny, tmp_path, name):
    run = trained / name
    export(run, tmp_path / "exported", which="step-000002", dtype="float32", say=lambda line: None)
    for model, same in ((run / "checkpoints" / "step-000002", tmp_path / "exported"), (run, run / "final")):
        ours, theirs = weights(model), weights(same)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)
    first, last, base = (weights(model) for model in (run / "checkpoints" / "step-000002", run, tiny("qwen2_5_vl")))
    changed = [key for key in base if not torch.equal(base[key], first[key])]
    assert changed and any(not torch.equal(first[key], last[key]) for key in changed)


def test_an_unfinished_run_answers_with_its_newest_checkpoint_and_says_so(trained, tmp_path):
    run = shutil.copytree(trained / "lora", tmp_path / "lora")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    found = find(str(run))
    assert found.notes == (f"{run} is not finished; this is its newest checkpoint, step 2 of 4",)
    assert found.identity == find(str(run / "checkpoints" / "step-000002")).identity
    assert found.identity != find(str(trained / "lora")).identity


def test_base_adapter_and_merged_model_side_by_side(trained, tiny, pope, tmp_path):
    export(trained / "lora", tmp_path / "merged", dtype="float32", say=lambda line: None)
    out = tmp_path / "out"
    models = (tiny("qwen2_5_vl"), trained / "lora" / "final", tmp_path / "merged")
    result = ask(*models, "--bench", f"pope={pope}", "--out", out)["models"]
    assert [one["name"] for one in result] == ["qwen2_5_vl", "lora", "merged"]
    base, adapter, merged = ([one.prediction for one in read_predictions(Path(one["folder"]))] for one in result)
    assert adapter == merged != base
    code, text, _ = vapr("eval", *models, "--bench", f"pope={pope}", "--out", out, *SHORT)
    assert code == 0
    assert "side by side" in text
    assert f"vapr eval --compare {out / 'qwen2_5_vl'} {out / 'lora'} --out compare.html" in text
    assert "<html" in (out / "comparison.html").read_text()
    compared = json.loads((out / "comparison.json").read_text())
    assert [folder["name"] for folder in compared["folders"]] == ["qwen2_5_vl", "lora", "merged"]


def test_options_for_models_are_refused_beside_compare(tmp_path):
    code, _, error = vapr("eval", "--compare", tmp_path / "a", tmp_path / "b", "--batch-size", 3)
    assert code == 2
    assert "--batch-size is for asking models; --compare takes result folders, --out and --policy" in error


def test_an_adapter_whose_base_is_gone_is_refused(trained, tmp_path):
    adapter = shutil.copytree(trained / "lora" / "final", tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/gone"}))
    with pytest.raises(UserError, match=r"^the base of the adapter .*, /gone, is not here; correct base_model_name"):
        find(str(adapter))
