"""The profile's classification, on events written down by hand and against the FLOP model; no time is asserted."""

import dataclasses
import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import step_profile, train_step
from bench.arms import VaprArm, vapr_config
from bench.step_ideal import ideal_work, sizes_of
from bench.step_parts import (
    ADAPTERS,
    ATTENTION,
    COPIES,
    DATA,
    GATED,
    HEAD,
    LOSS,
    NORMS,
    OPTIMIZER,
    OTHER,
    PARTS,
    PRODUCTS,
    PYTHON,
    ROTARY,
    TOWER,
    Event,
    Sizes,
    add_up,
    flops,
    part_of,
)
from bench.workloads import SHAPES, WORKLOADS, Subject
from vapr.batches.loader import load_pairs
from vapr.model import attention
from vapr.plan.flops import pack_flops
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import read_shapes
from vapr_kernels import matmul

CPU = torch.device("cpu")
T, D, M, E, R = 700, 320, 864, 64, 16  # tokens, hidden, intermediate and head size, rank
SIZES = Sizes(
    tokens=frozenset((T, 120)), hidden=D, intermediate=M, head=E, weights=frozenset(((D, D), (3 * R, D), (D, M))),
    adapters=3 * R,
)  # fmt: skip

RECORDED = [
    (Event("aten::mm", 1, ((T, D), (D, D))), PRODUCTS),
    (Event("aten::addmm", 1, ((3 * R,), (T, D), (D, 3 * R), (), ())), PRODUCTS),  # keys: as narrow as ranks
    (Event("aten::mm", 1, ((T, D), (D, D + 2 * E))), PRODUCTS),  # queries, keys and values in one
    (Event("aten::mm", 1, ((120, M), (M, D))), PRODUCTS),  # the last layer's rows
    (Event("aten::mm", 1, ((D, T), (T, D)), backward=True), PRODUCTS),  # a weight's gradient
    (Event("aten::mm", 1, ((T, D), (D, R))), ADAPTERS),
    (Event("aten::addmm_", 1, ((T, M), (T, R), (R, M), (), ())), ADAPTERS),
    (Event("aten::mm", 1, ((R, T), (T, D)), backward=True), ADAPTERS),
    (Event("aten::mm", 1, ((M, T), (T, 2 * R)), backward=True), ADAPTERS),
    (Event("aten::mul_", 1, ((T, R), ()), backward=True), ADAPTERS),
    (Event("aten::pow", 1, ((T, D), ())), NORMS),
    (Event("aten::rsqrt", 1, ((T, 1),)), NORMS),
    (Event("aten::add", 1, ((T, D), (T, D), ()), backward=True), NORMS),
    (Event("aten::silu", 1, ((T, M),)), GATED),
    (Event("aten::mul", 1, ((T, M), (T, M))), GATED),
    (Event("aten::mul", 1, ((T, 5, E), (T, 1, E))), ROTARY),
    (Event("aten::index_select", 1, ((T, 5, E), (), (900,)), under=ROTARY), ROTARY),
    (Event("aten::_scaled_dot_product_flash_attention_for_cpu", 1, ((1, 5, T, E),), under=ATTENTION), ATTENTION),
    (Event("aten::bmm", 1, ((5, T, E), (5, E, T)), under=ATTENTION), ATTENTION),
    (Event("aten::cat", 1, ((), ()), under=ATTENTION), COPIES),
    (Event("aten::copy_", 1, ((T, D), (T, D), ())), COPIES),
    (Event("aten::mm", 1, ((120, D), (D, 4096)), under=HEAD), HEAD),
    (Event("aten::copy_", 1, ((96, 96),), under=TOWER), TOWER),
    (Event("aten::sum", 1, ((8,),), under=LOSS), LOSS),
    (Event("aten::_fused_adamw_", 1, under=OPTIMIZER), OPTIMIZER),
    (Event("aten::stack", 1, ((), ()), under=DATA), DATA),
    (Event("part: waiting for data", 1, under=DATA), DATA),
    (Event("part: tower", 1, under=TOWER), PYTHON),
    (Event("aten::view", 1, ((T, D), ())), PYTHON),
    (Event("_LoraLinearBackward", 1, ((T, D),), backward=True), PYTHON),
    (Event("vapr::gather_rows", 1, ((T, D),)), PYTHON),  # on a CPU: Python, which calls PyTorch's
    (Event("aten::erfinv", 1, ((3, 7),)), OTHER),
    (Event("mylib::never_heard_of", 1), OTHER),
    # Of a GPU: the kernel counts, by the operator that launched it.
    (Event("aten::mm", 1, ((T, D), (D, R)), kernel="nvjet_tst_64x8"), ADAPTERS),
    (Event("vapr::add_rms_norm", 1, ((T, D),), kernel="_rms_norm_fwd_kernel"), NORMS),
    (Event("_FusedMlp", 1, ((T, D),), kernel="_swiglu_fwd_kernel"), GATED),
    (Event("vapr::gather_rows", 1, ((T, D),), kernel="index_elementwise"), COPIES),
    (Event("flash_attn::_flash_attn_varlen_forward", 1, kernel="flash_fwd_kernel"), ATTENTION),
    (Event("Memcpy HtoD (Pinned -> Device)", 1, kernel="Memcpy HtoD (Pinned -> Device)"), COPIES),
    (Event("sm90_xmma_gemm_bf16bf16", 1, kernel="sm90_xmma_gemm_bf16bf16"), PRODUCTS),
    (Event("GPU without work", 1), PYTHON),
    (Event("strange_kernel", 1, kernel="strange_kernel"), OTHER),
]  # fmt: skip


@pytest.mark.parametrize(("event", "part"), RECORDED, ids=lambda x: x.name if isinstance(x, Event) else "")
def test_an_operator_is_part_of(event, part):
    assert part_of(event, SIZES) == part


def test_parts_lose_nothing():
    events = [dataclasses.replace(event, seconds=2.0**-n) for n, (event, _) in enumerate(RECORDED)]
    spent = add_up(events, SIZES)
    assert set(spent) == set(PARTS)
    assert sum(one.seconds for one in spent.values()) == sum(event.seconds for event in events)  # powers of 2: exact
    for part, one in spent.items():
        assert sum(one.operators.values()) == one.seconds
        assert one.backward == sum(
            e.seconds for e, (_, p) in zip(events, RECORDED, strict=True) if p == part and e.backward
        )
    assert set(spent[OTHER].operators) == {"erfinv", "mylib::never_heard_of", "strange_kernel"}


def test_without_adapters_nothing_is_one():
    assert part_of(Event("aten::mm", 1, ((T, D), (D, R))), dataclasses.replace(SIZES, adapters=0)) == PRODUCTS


@pytest.fixture(scope="module", params=["small-qwen2.5-vl", "small-llava"])
def profiled(request, tmp_path_factory):
    """An arm of two decoder layers that has taken a profiled step, its pairs' loader and the profile."""
    shape = SHAPES[request.param]
    shape = dataclasses.replace(shape, text={**shape.text, "num_hidden_layers": 2})
    subject = Subject(shape, tmp_path_factory.mktemp("subject"), CPU)
    pairs = subject.pairs(WORKLOADS["answers"], 6)
    arm = VaprArm(subject, pairs, 2, share="pair", cached=True)
    loader = load_pairs(vapr_config(subject, "pair", 2), pairs, subject.new_processor())
    arm.start(prebuilt=True)
    with mock.patch.object(matmul, "_onednn", lambda: None):  # which some CPUs give more rows than there are
        return arm, loader, step_profile.take_profile(arm, CPU)


def test_products_by_onednn_are_products():
    event = Event("mkldnn::_linear_pointwise", 1.0, ((96, 320), (864, 320), (864,)))
    assert flops(event) == 2 * 96 * 320 * 864


def test_products_of_every_part_are_those_of_the_flop_model(profiled):
    arm, _, one = profiled
    shapes = read_shapes(arm.config.policy)
    packs = [PackSizes.of(batch) for batch in one.step.batches]
    sizes, work = sizes_of(shapes, packs), ideal_work(shapes, packs, itemsize=4)
    for backward in (False, True):  # the base's and the adapters' are parts of joint products
        ran = sum(flops(e) for e in one.events if part_of(e, sizes) in (PRODUCTS, ADAPTERS) and e.backward == backward)
        assert ran == work[PRODUCTS].flops[backward] + work[ADAPTERS].flops[backward]
    assert sum(flops(e) for e in one.events if part_of(e, sizes) == HEAD) == sum(work[HEAD].flops)
    assert not [e for e in one.events if part_of(e, sizes) == OTHER and flops(e)]


def test_the_ideal_is_that_of_the_plan_but_for_keys_that_nobody_attends_to(profiled):
    arm, _, one = profiled
    shapes = read_shapes(arm.config.policy)
    (pack,) = (PackSizes.of(batch) for batch in one.step.batches)
    work = ideal_work(shapes, [pack], itemsize=4)
    planned = pack_flops(shapes, pack, checkpointing="none", reference=False, cached_features=False)
    by_layer = [pack.lengths_q] * (shapes.num_layers - 1) + [pack.last_lengths_q]
    unattended = sum(q * (q - 1) / 2 for lengths in by_layer for q in lengths)
    product = 2.0 * shapes.config.get_text_config().hidden_size * unattended
    for number, (name, products) in enumerate((("forward", 2), ("backward", 5))):
        ours = sum(work[part].flops[number] for part in (PRODUCTS, ADAPTERS, ATTENTION))
        assert ours + products * product == pytest.approx(getattr(planned, name), rel=1e-12)
    assert sum(work[HEAD].flops) == planned.head
    assert sum(work[TOWER].flops) == planned.tower


def test_the_parts_of_a_profiled_step_are_the_whole_step(profiled):
    arm, _, one = profiled
    shapes = read_shapes(arm.config.policy)
    spent = add_up(one.events, sizes_of(shapes, [PackSizes.of(batch) for batch in one.step.batches]))
    assert sum(part.seconds for part in spent.values()) == pytest.approx(one.seconds, rel=1e-6)
    assert all(part.seconds > 0 for name, part in spent.items() if name != OTHER)
    assert spent[ATTENTION].backward > 0 and spent[ROTARY].backward > 0  # known by the forward's function alone


def test_a_profile_writes_a_row_a_part_and_a_trace(profiled, tmp_path, monkeypatch, capsys):
    arm, loader, _ = profiled
    monkeypatch.setenv("OUT", str(tmp_path))
    attend, step = attention._sdpa, arm.engine.step
    rates = iter([0.1, 0.2, 0.05, 0.3])
    monkeypatch.setattr(step_profile, "matmul_flops", lambda device: {"matmul_tflops": next(rates)})
    monkeypatch.setattr(step_profile, "copy_bandwidth", lambda device: {"copy_gb_per_second": next(rates) * 100})
    monkeypatch.setattr(step_profile, "REPEATS", 2)
    monkeypatch.setattr(arm, "num_steps", 5)
    arm_steps = list(arm.prebuild()) * 2
    monkeypatch.setattr(loader, "steps", lambda first, last: iter(arm_steps))
    step_profile.profile_step(arm, loader, {"model": "m", "workload": "w"}, tmp_path / "trace.json")
    rows = [json.loads(line) for line in (tmp_path / "train_step_profile.jsonl").read_text().splitlines()]
    assert sorted(row["part"] for row in rows) == sorted(PARTS)
    assert {(row["matmul_tflops"], row["copy_gb_per_second"]) for row in rows} == {(0.1, 30.0)}  # the fastest
    assert [row["gap_seconds"] for row in rows] == sorted((row["gap_seconds"] for row in rows), reverse=True)
    assert f"largest gap: {rows[0]['part']}, " in capsys.readouterr().out
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count(step_profile.STEP) == 1 and "part: tower" in names
    assert attention._sdpa is attend and arm.engine.step == step  # the ranges are gone


def test_a_function_that_is_gone_gets_no_range(profiled, monkeypatch):
    arm, _, _ = profiled
    monkeypatch.setattr(step_profile, "FUNCTIONS", (("vapr.model.attention", "gone", ATTENTION),))
    arm.start(prebuilt=True)
    assert step_profile.take_profile(arm, CPU).events


# Events as the profiler gives them.


def recorded(name, start, end, *children, own=0.0, number=-1, kernels=(), host=True):
    e = SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        cpu_time_total=float(end - start), self_cpu_time_total=own, sequence_nr=number, input_shapes=[],
        cpu_children=list(children), cpu_parent=None, is_user_annotation=False,
        device_type=SimpleNamespace(name="CPU" if host else "CUDA"),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
    )  # fmt: skip
    for child in children:
        child.cpu_parent = e
    return e


def test_a_node_of_the_backward_pass_belongs_to_the_last_that_began_with_its_number():
    node = recorded(f"{step_profile.NODE}: XBackward0", 50, 60, recorded("aten::exp", 51, 59, own=8.0), number=7)
    step = recorded(
        step_profile.STEP, 0, 100,
        recorded("aten::detach", 0, 1, number=7),  # makes no node
        recorded(f"part: {HEAD}", 1, 9, recorded("aten::exp", 2, 8, own=6.0, number=7)),
        recorded("aten::exp", 10, 20, own=10.0, number=8),
        node,
    )  # fmt: skip
    found = [(e.under, e.backward, e.seconds) for e in step_profile.operators_of(step) if e.name == "aten::exp"]
    assert found == [(HEAD, False, 6e-6), ("", False, 10e-6), (HEAD, True, 8e-6)]


def test_a_gpu_is_at_work_or_waits_for_its_host():
    product = recorded("aten::mm", 40, 41, kernels=[("gemm", 30.0)], number=3)
    node = recorded(f"{step_profile.NODE}: MmBackward0", 60, 70, recorded("aten::mm", 61, 62, kernels=[("gemm", 20.0)]))
    data = recorded(f"part: {DATA}", 0, 25)
    step = recorded(step_profile.STEP, 0, 100, data, product)
    on_gpu = [
        recorded("gemm", 45, 75, host=False), recorded("gemm", 75, 95, host=False),
        recorded("Memcpy DtoH", 95, 99, host=False), recorded(step_profile.STEP, 45, 99, host=False),
    ]  # fmt: skip
    before = recorded("aten::mm", -20, -10, kernels=[("gemm", 7.0)])
    events = step_profile.kernels_of([before, step, data, product, node, *node.cpu_children, *on_gpu], step)
    spent = add_up(events, SIZES)
    assert sum(one.seconds for one in spent.values()) == pytest.approx(100e-6)
    assert (spent[PRODUCTS].forward, spent[PRODUCTS].backward) == pytest.approx((30e-6, 20e-6))
    assert spent[COPIES].seconds == pytest.approx(4e-6)  # no operator launched it
    assert spent[DATA].seconds == pytest.approx(25e-6)
    assert spent[PYTHON].seconds == pytest.approx(21e-6)


def test_a_trace_is_of_one_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step", "--profile", "--trace", "t.json", "--models", "small-llava"])
    with pytest.raises(SystemExit):
        train_step.parse_options()
    assert "one of --workloads" in capsys.readouterr().err
