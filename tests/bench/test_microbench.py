"""The harness of the microbenchmarks: what rows say, what is counted, what is reported. Speed is measured, not tested."""

import gc
import importlib
import importlib.util
import json

import pytest
import torch

import vapr_kernels
from bench import gather_keys_values, goals, microbench
from bench import record as rec
from bench.microbench import Absent, Calls, Op, Sizes, Work
from bench.operations import OPERATIONS
from vapr_kernels import matmul

OPS: dict[str, Op] = {name: importlib.import_module(f"bench.{name}").OP for name in OPERATIONS}

THREADS = ("--threads", "1")  # the scripts' own number would be that of the whole process; see tests/conftest.py


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect():
    """Garbage is collected before memory is measured; that need not go through all that was ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def absent():
    raise Absent("only on the moon")


def broken(x):
    raise RuntimeError("no\nway")


def toy(**changes) -> Op:
    sizes = Sizes(
        shapes={"small": {"D": 8}, "wide": {"D": 32}}, rows=[4, 8], quick_shapes=["small"], quick_rows=[4]
    )  # fmt: skip
    fields = {
        "name": "toy",
        "rows_name": "rows",
        "passes": ("forward", "forward + backward"),
        "providers": {
            "vapr": lambda: lambda x: 2 * x,
            "rounding": lambda: lambda x: 2 * x + 1e-4,
            "wrong": lambda: lambda x: 2 * x + 0.25,
            "elsewhere": absent,
            "broken": lambda: broken,
        },
        "inputs": lambda shape, rows, name, device, dtype: (
            torch.randn(rows, shape["D"], device=device, dtype=dtype).requires_grad_(name != "forward"),
        ),
        "work": lambda shape, rows, name, element: Work(moved=2 * rows * shape["D"] * element),
        "truth": lambda x: 2 * x,
        "gpu": sizes,
        "cpu": sizes,
    }
    return Op(**{**fields, **changes})


@pytest.fixture
def run_toy(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(rec, "commit", lambda: "0123456789ab-dirty")  # asking git for every row takes long
    monkeypatch.setattr(microbench, "matmul_flops", lambda device: {"matmul_tflops": 1.0})
    monkeypatch.setattr(microbench, "copy_bandwidth", lambda device: {"copy_gb_per_second": 10.0})
    monkeypatch.setattr(microbench, "input_sets", lambda inputs, device: [inputs])
    return lambda *arguments, **changes: microbench.main(toy(**changes), [*arguments, "--rounds", "2", *THREADS])


def test_rows_say_what_was_measured(run_toy, tmp_path):
    rows = run_toy()
    assert rows == [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 * 5
    row = rows[0]
    assert (row["provider"], row["shape"], row["rows"], row["pass"], row["D"]) == ("vapr", "small", 4, "forward", 8)
    assert {"seconds_p20", "seconds_p50", "seconds_p80", "step_mib", "calls_per_sample", "dtype"} <= row.keys()
    assert row["moved_bytes"] == 2 * 4 * 8 * row_bytes(row)
    assert row["gb_per_second"] == pytest.approx(row["moved_bytes"] / row["seconds_p50"] / 1e9)
    assert row["ceiling_share"] == pytest.approx(row["gb_per_second"] / 10)


def row_bytes(row) -> int:
    return getattr(torch, row["dtype"]).itemsize


def test_what_is_absent_is_a_row_with_the_reason(run_toy):
    rows = run_toy("--quick")
    reasons = {row["provider"]: row["absent"] for row in rows if "absent" in row and row["provider"] != "wrong"}
    assert reasons == {"elsewhere": "only on the moon", "broken": "RuntimeError: no"}
    assert len(rows) == 2 * 5


def test_rounding_shows_in_the_errors(run_toy):
    rows = {row["provider"]: row for row in run_toy("--quick") if row["pass"] == "forward + backward"}
    exact = 1e-6 if row_bytes(rows["vapr"]) == 4 else 1e-2
    assert rows["vapr"]["max_error"] <= exact and rows["vapr"]["relative_error"] <= exact
    assert rows["rounding"]["max_error"] == pytest.approx(1e-4, rel=0.1 if exact < 1e-2 else 100)


def test_who_computes_something_else_is_not_timed(run_toy):
    """Nor with more rows, for which nobody is compared with fp64."""
    rows = [row for row in run_toy("--shapes", "small") if row["provider"] == "wrong"]
    assert [row["rows"] for row in rows] == [4, 4, 8, 8]
    assert all(row["absent"].startswith("computes something else: relative error ") for row in rows)
    assert not any("seconds_p50" in row for row in rows)
    assert rows[0]["max_error"] == pytest.approx(0.25, abs=0.02)


def test_vapr_computing_something_else_fails_the_script(run_toy):
    with pytest.raises(SystemExit, match="bench.toy: vapr did not run"):
        run_toy("--quick", providers={"vapr": lambda: lambda x: 3 * x})


def test_errors_are_taken_at_the_fewest_rows_only(run_toy):
    rows = run_toy("--shapes", "wide", "--rows", "8", "4", "--providers", "vapr")
    assert {row["rows"] for row in rows if "max_error" in row} == {4}


def test_vapr_not_running_fails_the_script(run_toy):
    with pytest.raises(SystemExit, match="bench.toy: vapr did not run"):
        run_toy("--quick", providers={"vapr": lambda: broken})


def test_a_plot_for_each_pass(run_toy, tmp_path):
    pytest.importorskip("matplotlib")
    run_toy("--plot", str(tmp_path / "here"))
    files = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert files == ["toy_0_forward.png", "toy_1_forward_backward.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--providers", "vapr", "tpu"],
            "bench.toy: no provider 'tpu'; there are vapr, rounding, wrong, elsewhere, broken\n",
        ),
        (["--shapes", "huge"], "bench.toy: no shape 'huge'; there are small, wide\n"),
        (["--rows", "0"], "bench.toy: --rows must be positive, got 0\n"),
    ],
)
def test_a_mistake_is_one_line(run_toy, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run_toy(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == message


def test_calls_take_turns_over_their_inputs():
    seen = []
    calls = Calls(lambda x: seen.append(int(x)) or x, [(torch.tensor(n),) for n in range(3)], None, count=2)
    calls(), calls()
    assert seen == [0, 1, 2, 0]


def test_inputs_outgrow_the_cache():
    inputs = torch.zeros(16 * 2**20, requires_grad=True), "index"
    sets = microbench.input_sets(inputs, torch.device("cpu"))
    assert len(sets) == 2  # of 64 MiB each: four caches of 32 MiB
    assert all(x.requires_grad and x is not inputs[0] and other == "index" for x, other in sets)


def test_both_clocks_agree_on_a_cpu():
    step = lambda: torch.ones(1000).sum()
    assert rec.device_clock(step, torch.device("cpu")) > 0


def test_floating_point_operations_are_counted_by_hand():
    shape = {"H": 3584, "V": 152_064}
    once = 2 * 2048 * 3584 * 152_064
    for name, products in (("no-grad", 1), ("frozen head", 2), ("trained head", 3)):
        work = OPS["linear_logps"].work(shape, 2048, name, 2)
        assert (work.flops, work.count) == (products * once, f"{2 * products}NHV")


@pytest.mark.parametrize(
    ("op", "shape", "rows", "forward", "both"),
    [
        ("swiglu", {"I": 100}, 10, 3 * 1000, 8 * 1000),
        ("add_rms_norm", {"D": 100}, 10, 4 * 1000, 8 * 1000),
        ("rotary", {"H": 3, "E": 4}, 10, 2 * 120 + 40, 2 * (2 * 120 + 40)),
        # 2 pairs: 12 tokens, 18 keys, each a key and a value of 2 x 4
        ("gather_keys_values", {"P": 3, "C": 2, "R": 1, "G": 2, "E": 4}, 2, 2 * 8 * (12 + 18) + 48, 2 * 528),
    ],
)
def test_bytes_are_counted_by_hand(op, shape, rows, forward, both):
    passes = OPS[op].passes
    assert OPS[op].work(shape, rows, passes[0], 2).moved == 2 * forward
    assert {OPS[op].work(shape, rows, name, 2).moved for name in passes[1:]} == {2 * both}


def test_operations_of_linear_layers_are_counted_by_hand():
    """A frozen product twice (the output, the input's gradient), an adapter's three times; 7 tokens."""
    shape = {
        "D": 6,
        "I": 10,
        "H": 3,
        "G": 1,
        "R": 2,
        "S": 4,
        "bias": 1,
    }  # heads of 2; one sequence of 7 would be too long
    qkv, out, mlp = 6 * 6 + 2 * 6 * 2, 6 * 6, 3 * 6 * 10
    adapters = {"qkv": 2 * (12 + 8 + 8), "out": 2 * 12, "mlp": 2 * 3 * 16}
    expected = {
        "normed_linears": (qkv, adapters["qkv"], 0),
        "gated_mlp": (mlp, adapters["mlp"], 0),
        # 7 sequences of 1 token: each sees one key, in two products as wide as all heads
        "normed_attention": (qkv + out, adapters["qkv"] + adapters["out"], 2 * 6),
    }
    for name, (frozen, narrow, attended) in expected.items():
        forward, both = (OPS[name].work(shape, 7, which, 4).flops for which in OPS[name].passes)
        assert forward == 2 * 7 * (frozen + narrow + attended)
        assert both == 2 * 7 * (2 * frozen + 3 * narrow + 3 * attended)


def test_kept_is_what_autograd_holds_and_nothing_resident():
    """Of exp(x[:2] * w) the product keeps both factors, all of x with it, and exp what it returns."""
    x, w = (torch.ones(8, 4, requires_grad=True) for _ in range(2))
    compute = lambda x, w: (x[:2] * w[:2]).exp()
    assert microbench.kept_bytes(compute, (x, w), [w, None]) == 4 * (8 * 4 + 2 * 4)
    assert microbench.kept_bytes(compute, (x, w), []) == 4 * (2 * 8 * 4 + 2 * 4)


@pytest.mark.parametrize(
    ("op", "vapr", "by_modules"),
    [
        # (T, .) of 4 bytes: the sum, 1 / rms and x A^T; then also the norm's output, and what it takes to go on from it.
        ("normed_linears", 320 + 1 + 3 * 16, 2 * 320 + 1 + 3 * 16),
        ("gated_mlp", 320 + 1 + 2 * 864 + 3 * 16, 2 * 320 + 1 + 3 * 864 + 3 * 16),
        # queries; then keys and values, what attention returns, and a number for each head
        ("normed_attention", 320 + 1 + 320, 2 * 320 + 1 + 4 * 16 + 2 * 320 + 2 * 64 + 5),
    ],
)
def test_what_is_kept_of_a_layer(op, vapr, by_modules, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn", lambda: None)  # which some CPUs give more rows than there are
    op = OPS[op]
    inputs = op.inputs(op.cpu.shapes["small-qwen2.5-vl"], 6, op.passes[1], torch.device("cpu"), torch.float32)
    keep = lambda name: microbench.kept_bytes(op.providers[name](), inputs, op.resident(inputs))
    assert keep("vapr") == 4 * 6 * vapr
    assert keep("vapr by modules") == 4 * 6 * by_modules


def test_every_operation_has_a_benchmark():
    """Or is part of another one's: rms_norm of add_rms_norm's, gather_rows of gather_keys_values'."""
    assert {*vapr_kernels.__all__} - {*OPERATIONS} <= {"rms_norm", "gather_rows"}


def test_keys_of_a_pair_are_its_prompt_twice():
    rows = gather_keys_values.key_rows({"P": 2, "C": 1, "R": 1}, 2).tolist()
    assert rows == [0, 1, 2, 0, 1, 3, 4, 5, 6, 4, 5, 7]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_providers_of_an_operation_agree_with_fp64(op, run_toy, monkeypatch):
    """What can run here without compiling, at a size of the script's own choosing."""
    on_gpu = torch.cuda.is_available()
    names = ("vapr", "vapr kept", "vapr by modules", "eager", "peft")
    providers = {name: op.providers[name] for name in names if name in op.providers}
    rows = microbench.main(
        Op(**{**{name: getattr(op, name) for name in Op.__dataclass_fields__}, "providers": providers}),
        ["--quick", "--rounds", "1", *THREADS, *([] if on_gpu else ["--rows", "3"])],
    )
    assert {row["provider"] for row in rows} == set(providers) and len(providers) >= 2
    assert all(row["relative_error"] < (3e-2 if row["dtype"] == "bfloat16" else 2e-5) for row in rows)
    assert {row["pass"] for row in rows} == set(op.passes)


def measured(bench, provider="vapr", **fields):
    about = {
        "bench": bench,
        "run": "r",
        "device": "GPU",
        "provider": provider,
        "shape": "s",
        "rows": 2048,
        "V": 152_064,
    }
    return {**about, "seconds_p50": 1.0, "ceiling_share": 0.9, "step_mib": 600.0, "pass": "frozen head", **fields}


def verdicts_of(folder, *rows):
    for row in rows:
        with (folder / f"{row['bench']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    names = ("linear_logps", *goals.MEMORY_BOUND)
    return [verdict[-1] for verdict in goals.verdicts({n: goals.newest_gpu_run(folder / f"{n}.jsonl") for n in names})]


def test_goals_of_a_folder_without_gpu_rows_are_not_measured(tmp_path):
    assert set(verdicts_of(tmp_path, measured("swiglu", device="CPU, 2 cores"))) == {"not measured"}


def test_goals_are_judged_by_the_worst_case_of_the_newest_run(tmp_path):
    head = "linear_logps"
    rows = [
        measured("swiglu", run="old", ceiling_share=0.1),
        measured("swiglu"),
        measured("rotary"),
        measured("rotary", rows=4096, ceiling_share=0.84),
        measured(head, **{"pass": "no-grad"}, ceiling_share=0.86),
        measured(head),
        measured(head, shape="other", ceiling_share=0.8, step_mib=700.0),
        measured(head, rows=512, ceiling_share=0.1),
        measured(head, "trl", seconds_p50=1.9),
        measured(head, "liger", seconds_p50=1.6),
        measured(head, "liger hopper", absent="needs a Hopper GPU"),
        measured(head, "eager", seconds_p50=0.5),
    ]
    no_grad, frozen, speedup, memory, swiglu_, add_rms_norm_, rotary_, gather = verdicts_of(tmp_path, *rows)
    assert (no_grad, frozen, speedup, memory) == ("met", "missed", "met", "missed")
    assert (swiglu_, add_rms_norm_, rotary_, gather) == ("met", "not measured", "missed", "not measured")


def test_results_are_rendered_shape_by_shape():
    path = rec.REPOSITORY / "scripts" / "render_results.py"
    spec = importlib.util.spec_from_file_location("render_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    about = {"time": "2026-01-01T00:00:00+00:00", "commit": "0123456789ab"}
    rows = [
        measured("swiglu", seconds_p50=0.002, **about),
        measured("swiglu", "eager", absent="out of memory", **about),
        measured("swiglu", rows=4096, seconds_p50=0.004, kept_bytes=3 << 19, **about),
    ]
    assert module.render(rows).splitlines() == [
        "**swiglu, frozen head, ms** (GPU; in brackets: of the ceiling measured beside it)",
        "",
        "| shape | rows | vapr | eager | commit |",
        "| --- | --- | --- | --- | --- |",
        "| s | 2,048 | 2 (90%) | out of memory | 01234567 |",
        "| s | 4,096 | 4 (90%), keeps 1.50 MiB |  | 01234567 |",
    ]
