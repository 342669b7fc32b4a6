"""Quick facts about the benchmark's own code; the speed itself is measured, not tested."""

import importlib.util
import json
import multiprocessing
import random
import sys
from pathlib import Path

import pytest
import torch

from bench import data_arms, data_path, editing_rows, shortcuts
from bench import record as rec
from bench.arms import VaprArm
from bench.data_rows import DataFolder
from bench.workloads import SHAPES, WORKLOADS, Subject

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]


def load(path: Path, name: str):
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def render_results():
    return load(REPOSITORY / "scripts" / "render_results.py", "render_results")


@pytest.fixture(scope="module")
def gpu_checks():
    return load(REPOSITORY / "tests" / "test_gpu.py", "gpu_checks")


@pytest.fixture(scope="module", params=["small-qwen2.5-vl", "small-llava"])
def subject(request, tmp_path_factory):
    return Subject(SHAPES[request.param], tmp_path_factory.mktemp("subject"), CPU)


def test_record_writes_a_whole_row_to_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    rec.record("op", shape="short", seconds_p50=0.5)
    rec.record("op", shape="long", seconds_p50=1.5)
    rows = [json.loads(line) for line in (tmp_path / "new" / "op.jsonl").read_text().splitlines()]
    assert [row["shape"] for row in rows] == ["short", "long"]
    assert rows[0]["run"] == rows[1]["run"]
    assert {"bench", "run", "time", "commit", "device", "threads", "versions"} <= rows[0].keys()
    assert rows[0]["versions"].keys() == {"torch", "triton", "transformers", "trl", "peft"}


def test_measure_runs_every_arm_once_a_round():
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = rec.measure(arms, rounds=3, warmup=1, device=CPU)
    assert order == [*"abc", *"bca", *"cab", *"abc"]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3, 3]
    assert timings["a"].fields()["timed"] == 3


def test_percentiles_lie_in_order():
    assert rec.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert rec.percentiles([1.0]) == (1.0, 1.0, 1.0)


def row(**fields):
    about = {"bench": "train_step", "run": "r1", "time": "2026-01-01T00:00:00+00:00", "commit": "0123456789ab-dirty"}
    case = {"device": "CPU x", "model": "m", "workload": "answers", "tuning": "lora", "data": "as shipped"}
    return {**about, **case, **fields}


def test_render_results_shows_the_newest_run_and_marks_dirty(render_results):
    rows = [
        row(arm="trl", pairs_per_second=9.0, run="r0"),
        row(arm="trl", pairs_per_second=2.0),
        row(arm="vapr shared cached", pairs_per_second=8.0, speedup_over_trl=4.0),
        row(arm="trl cached", absent="trl is not installed"),
        {**row(bench="op", shape="short", seconds_p50=0.25), "versions": {}},
    ]
    text = render_results.render(rows)
    assert "| m | answers | 2.00 | 8.00 (4.0x) | trl is not installed | 01234567 (dirty) |" in text
    assert "9.00" not in text
    assert "0.25" in text


def test_render_results_keeps_spread_rows_apart_and_says_what_was_refused(render_results):
    rows = [
        row(arm="trl", pairs_per_second=2.0),  # of a time in which rows had no mix: all were of one length
        row(arm="trl", pairs_per_second=3.0, mix="spread", run="r2"),
        row(arm="vapr shared cached", refused="other work", mix="spread", run="r2"),
        row(arm="trl", pairs_per_second=4.0, mix="equal", run="r2"),
    ]
    lines = render_results.render(rows).splitlines()
    assert "| m | answers | 4.00 |  | 01234567 (dirty) |" in lines
    assert "| m | answers, spread | 3.00 | refused: other work | 01234567 (dirty) |" in lines
    assert "2.00" not in "".join(lines)


def test_render_results_writes_and_checks_the_block(render_results, tmp_path, monkeypatch, capsys):
    (tmp_path / "train_step.jsonl").write_text(json.dumps(row(arm="trl", pairs_per_second=2.0)) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- results:begin -->\nold\n<!-- results:end -->\nbelow\n")

    def run(option: str) -> int:
        monkeypatch.setattr(sys, "argv", ["render_results.py", str(tmp_path), option, str(readme)])
        return render_results.main()

    assert run("--check") == 1
    assert "out of date" in capsys.readouterr().out
    assert run("--write") == 0
    assert run("--check") == 0
    assert readme.read_text().startswith("above\n") and readme.read_text().endswith("\nbelow\n")
    readme.write_text("no markers")
    assert run("--check") == 2


def test_render_results_of_the_data_path(render_results):
    def measured(num_rows: int, **fields):
        return row(bench="data_path", rows=num_rows, provider="vapr", **fields)

    numbers = {"pairs_per_second": 61.25, "first_step_seconds": 1.5, "resident_mib": 1700.4}
    old = measured(10_000, **{**numbers, "pairs_per_second": 77.0}, run="r0")
    lines = render_results.render([old, measured(10_000, **numbers), measured(1_000, absent="no trl")]).splitlines()
    assert lines[-2:] == [
        "| 1,000 | vapr | no trl |  |  | 01234567 (dirty) |",
        "| 10,000 | vapr | 61.2 | 1.50 | 1,700 | 01234567 (dirty) |",
    ]


def test_render_results_of_editing(render_results):
    numbers = {"seconds": 301.4, "scan_seconds": 80.6, "rows_per_second": 3318.4, "accepted": 812_345}
    scale = [
        row(bench="editing", part="scale", rows=n, workers=2, peak_private_mib=400.4, **numbers) for n in (10**6, 10**4)
    ]
    over = {"seconds_p50": 12.345, "ms_per_turn": 192.89, "overhead_percent": 1.26}
    unit = row(bench="editing", part="overhead", model="small", turns=64, arm="vapr edit", **over)
    lines = render_results.render([*scale, unit]).splitlines()
    assert "| small | 64 | vapr edit | 12.35 | 192.9 | 1.3 | 01234567 (dirty) |" in lines
    assert lines[-2:] == [
        "| 10,000 | 2 | 301 | 81 | 3,318 | 812,345 | 400 | 01234567 (dirty) |",
        "| 1,000,000 | 2 | 301 | 81 | 3,318 | 812,345 | 400 | 01234567 (dirty) |",
    ]


def test_rows_to_edit_are_all_different_and_agree_with_one_another():
    images = [f"{n}.png" for n in range(50)]
    answers: dict[tuple[str, str], set[str]] = {}
    for made in editing_rows.rows(50 * 400, images):
        question, answer = (turn["value"] for turn in made["conversations"])
        answers.setdefault((made["image"], question.partition("\n")[2]), set()).add(answer)
    assert sum(map(len, answers.values())) == 50 * 400
    assert max(map(len, answers.values())) == 1


def test_skewed_rows_are_skewed():
    made = list(shortcuts.skewed_rows(900, [f"{n}.png" for n in range(300)], random.Random(0)))
    colours = [m["conversations"][1]["value"] for m in made if "banana" in m["conversations"][1]["value"]]
    counts = [sum(colour in answer for answer in colours) for colour in shortcuts.PLAUSIBLE["banana"]]
    assert counts[0] > counts[1] > counts[2] > 0
    assert not any("purple" in answer for answer in colours)


def test_data_path_measures_the_pairs_it_was_asked_for(tmp_path):
    data = DataFolder(tmp_path, 20)
    file = data.write_rows(200)
    row = data_path.run_case("vapr", file, data.model, 64)
    assert row["pairs"] == 64
    assert set(data_path.COLUMNS) <= row.keys()
    # Pages of mapped files are shared with whatever else runs here, so their share may shrink.
    assert all(row[name] > 0 for name in data_path.COLUMNS if name != "file_growth_mib")
    assert row["open_seconds"] < row["first_step_seconds"]
    # At least the pixels of every image lie in memory: of each image token 4 patches of 1,176 numbers in fp32.
    images_mib = 20 * data.image_tokens * 4 * 1176 * 4 / 2**20
    assert row["resident_growth_mib"] > images_mib
    assert data.image_tokens == 300


def test_data_path_rows_show_every_image_equally_often(tmp_path):
    data = DataFolder(tmp_path, 5)
    rows = [json.loads(line) for line in data.write_rows(15).read_text().splitlines()]
    shown = [row["images"][0] for row in rows]
    assert all(len(set(shown[start : start + 5])) == 5 for start in (0, 5, 10))
    for row in rows:
        chosen, rejected = (row[side][0]["content"].split() for side in ("chosen", "rejected"))
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def test_resident_memory_counts_forked_pages_once_and_shared_memory_unseen_by_any_process():
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    before = data_arms.resident_mib()
    context = multiprocessing.get_context("fork")
    wait = context.Event()
    child = context.Process(target=wait.wait)
    child.start()
    shared = torch.empty(32 * 2**20, dtype=torch.uint8).share_memory_()
    shared.fill_(1)
    try:
        grown = data_arms.resident_mib()["all"] - before["all"]
    finally:
        wait.set()
        child.join()
    assert held.sum() == len(held)
    assert 32 <= grown < 64


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_rows_of_a_workload_have_equal_lengths(subject, workload):
    pairs = [subject.processor.tokenize_pair(pair) for pair in subject.pairs(workload, 8)]
    paths = [path for pair in pairs for path in pair.paths]
    assert {len(path.input_ids) - path.completion_start for path in paths} == {workload.completion_tokens}
    assert len({path.completion_start for path in paths}) == 1
    assert paths[0].images[0].num_tokens == 256
    assert len({path.images[0].content_hash for path in paths}) == 8 // workload.pairs_per_image


def test_two_models_of_a_subject_are_equal(subject):
    first, second = subject.model(), subject.model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_vapr_arms_agree_whatever_is_shared_and_cached(gpu_checks, tmp_path):
    subject = Subject(gpu_checks.shrink(SHAPES["small-llava"], 1, 2), tmp_path, CPU)
    pairs = subject.pairs(WORKLOADS["four_per_image"], 8)
    losses = {}
    for share, cached in (("none", False), ("pair", True), ("image", True)):
        arm = VaprArm(subject, pairs, 4, share=share, cached=cached)
        arm.start(prebuilt=share == "image")
        arm(), arm()
        losses[share] = arm.losses
    assert losses["pair"] == pytest.approx(losses["none"], abs=1e-4)
    assert losses["image"] == pytest.approx(losses["none"], abs=1e-4)
    assert losses["none"][0] == pytest.approx(0.693147, abs=1e-5)
    assert losses["none"][1] != losses["none"][0]


# What tests/test_gpu.py checks on a GPU and scripts/gpu_smoke.py leaves out, here on the CPU.


@pytest.mark.parametrize("trained_head", [False, True])
def test_gpu_check_of_linear_logps(gpu_checks, trained_head):
    gpu_checks.check_linear_logps(
        CPU, torch.bfloat16, vocabulary=997, width=64, num_rows=33, trained_head=trained_head
    )  # fmt: skip


@pytest.mark.parametrize("model", ["small-qwen2.5-vl", "small-llava"])
def test_gpu_check_of_packing_in_bf16(gpu_checks, model, tmp_path):
    shape = gpu_checks.shrink(SHAPES[model], 2, 3)
    gpu_checks.check_packing_error(shape, tmp_path, CPU, torch.bfloat16, num_pairs=4)
