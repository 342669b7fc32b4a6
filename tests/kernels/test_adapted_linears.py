"""Norms, linear layers and adapters in one function: against the naive twins in fp64, and what they keep."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vapr.plan.counted import COUNTED
from vapr.plan.live_bytes import LiveBytes
from vapr_kernels import gated_mlp, naive, normed_attention, normed_linears
from vapr_kernels.adapted_linears import Linears, Piece

GATED_MLP = importlib.import_module("vapr_kernels.gated_mlp")  # the package has a function of that name
EPS = 1e-5


def linears(
    inputs: int,
    widths,
    ranks,
    *,
    joint: bool,
    bias: bool = False,
    trained: bool = False,
    dtype=torch.float64,
    device="cpu",
):
    """Layers of random weights, in one joint matrix or apart; a rank of 0 is a layer without an adapter."""

    def new(*size):
        return (torch.randn(*size, dtype=torch.float64) / size[-1] ** 0.5).to(device, dtype)

    weights = [new(width, inputs).requires_grad_(trained) for width in widths]
    biases = [new(width).requires_grad_(trained) if bias else None for width in widths]
    downs = [new(rank, inputs).requires_grad_() if rank else None for rank in ranks]
    ups = [new(width, rank).requires_grad_() if rank else None for width, rank in zip(widths, ranks, strict=True)]
    parts = [*weights, *(down for down in downs if down is not None)]
    ends = list(itertools.accumulate(map(len, parts)))
    beside = [*biases, *(None for down in downs if down is not None)]
    pieces = tuple(
        Piece(lambda part=part: part.detach(), None if own is None else own.detach(), slice(end - len(part), end))
        for part, own, end in zip(parts, beside, ends, strict=True)
    )
    if joint:
        matrix = torch.cat([part.detach() for part in parts])
        row = torch.cat([torch.zeros(len(part), dtype=dtype, device=device) if own is None else own.detach() for part, own in zip(parts, beside, strict=True)])  # fmt: skip
        pieces = (Piece(lambda: matrix, row if bias else None, slice(0, ends[-1])),)
    scales = tuple(0.5 + number for number in range(len(widths)))
    return Linears(pieces, tuple(weights), tuple(biases), tuple(downs), tuple(ups), scales, tuple(widths))


def rows(num: int, width: int, dtype=torch.float64):
    return torch.randn(num, width, dtype=torch.float64).to(dtype).requires_grad_()


def compare(outs, expected, inputs, **tolerance):
    """Outputs, and the gradients of a random sum of them in all that is trained."""
    dout = [torch.randn_like(out) for out in outs]
    learn = [x for x in inputs if x is not None and x.requires_grad]
    got = torch.autograd.grad(sum((o * d).sum() for o, d in zip(outs, dout, strict=True)), learn, allow_unused=True)
    truth = torch.autograd.grad(
        sum((o * d).sum() for o, d in zip(expected, dout, strict=True)), learn, allow_unused=True
    )
    assert learn
    for mine, right in zip((*outs, *got), (*expected, *truth), strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right, **tolerance)


CASES = pytest.mark.parametrize(
    ("ranks", "bias", "trained"),
    [((3, 3, 3), True, False), ((3, 0, 5), False, False), ((0, 0, 0), True, True)],
    ids=["adapters", "some adapters", "trained itself"],
)


@CASES
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "first"])
def test_normed_linears(ranks, bias, trained, joint, with_residual):
    torch.manual_seed(0)
    x, weight = rows(7, 6), torch.randn(6, dtype=torch.float64).requires_grad_(trained)
    residual = rows(7, 6) if with_residual else None
    layers = linears(6, (5, 4, 4), ranks, joint=joint, bias=bias, trained=trained)
    total, outs = normed_linears(x, residual, weight, EPS, layers)
    right_total, right = naive.normed_linears(x, residual, weight, EPS, layers)
    compare((*outs, total), (*right, right_total), (x, residual, weight, *layers.parameters))


def attend(q, k, v):
    """Every query attends to all keys, in heads of 2; two heads share keys."""
    q, k, v = (x.unflatten(-1, (-1, 2)) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return torch.einsum("qhk,khe->qhe", torch.einsum("qhe,khe->qhk", q, k).softmax(-1), v).flatten(1)


@CASES
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "first"])
def test_normed_attention(ranks, bias, trained, joint, recompute, with_residual):
    torch.manual_seed(0)
    x, weight = rows(7, 6), torch.randn(6, dtype=torch.float64).requires_grad_(trained)
    residual = rows(7, 6) if with_residual else None
    qkv = linears(6, (8, 4, 4), ranks, joint=joint, bias=bias, trained=trained)
    output = linears(8, (6,), ranks[2:], joint=joint, trained=trained)
    temperature = torch.rand(8, dtype=torch.float64).requires_grad_(trained)
    cooled = lambda q, k, v: attend(q * temperature, k, v)
    got = normed_attention(x, residual, weight, EPS, qkv, output, cooled, (temperature,), recompute=recompute)
    right = naive.normed_attention(x, residual, weight, EPS, qkv, output, cooled)
    compare(got, right, (x, residual, weight, temperature, *qkv.parameters, *output.parameters))


@CASES
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
@pytest.mark.parametrize("rows_at_a_time", [None, 1024, 16], ids=["kept", "recomputed", "recomputed in parts"])
def test_gated_mlp(ranks, bias, trained, joint, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(GATED_MLP, "ROWS", rows_at_a_time)
    torch.manual_seed(0)
    x, residual, weight = rows(40, 6), rows(40, 6), torch.randn(6, dtype=torch.float64).requires_grad_(trained)
    gate_up = linears(6, (9, 9), ranks[:2], joint=joint, bias=bias, trained=trained)
    down = linears(9, (6,), ranks[2:], joint=joint, trained=trained)
    got = gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=rows_at_a_time is not None)
    right = naive.gated_mlp(x, residual, weight, EPS, gate_up, down)
    compare(got, right, (x, residual, weight, *gate_up.parameters, *down.parameters))


def test_an_output_that_nobody_reads_is_not_computed():
    """What a layer runs again for is its backward pass: the sum is right, and so are all gradients."""
    torch.manual_seed(0)
    x, residual, weight = rows(7, 6), rows(7, 6), torch.randn(6, dtype=torch.float64).requires_grad_()
    gate_up = linears(6, (9, 9), (2, 2), joint=True, trained=False)
    down = linears(9, (6,), (2,), joint=True, trained=False)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        out, total = gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=True, unread=True)
    assert counter.get_total_flops() == 0 and out.shape == (7, 6)
    right, right_total = naive.gated_mlp(x, residual, weight, EPS, gate_up, down)
    assert torch.equal(total, right_total)
    parameters = (x, residual, weight, *gate_up.parameters, *down.parameters)
    learned = [p for p in parameters if p is not None and p.requires_grad]
    dout, dtotal = torch.randn(2, 7, 6, dtype=torch.float64)
    got = torch.autograd.grad((out, total), learned, (dout, dtotal))
    truth = torch.autograd.grad((right, right_total), learned, (dout, dtotal))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_little_of_what_is_wide_exists_at_a_time(monkeypatch):
    """Of 64 rows 16 at a time, gate and up and their product at their most: 3 I for each; a weight's gradient is wider."""
    T, D, I, R = 64, 8, 512, 2  # noqa: E741
    peaks = {}
    for trained in (False, True):
        for part in (64, 16):
            monkeypatch.setattr(GATED_MLP, "ROWS", part)
            torch.manual_seed(0)
            x, residual, weight = rows(T, D, torch.float32), rows(T, D, torch.float32), torch.randn(D)
            gate_up = linears(D, (I, I), (R, R), joint=True, dtype=torch.float32, trained=trained)
            down = linears(I, (D,), (R,), joint=True, dtype=torch.float32, trained=trained)
            live = LiveBytes()
            with live:
                out, _ = gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=True)
                live.enter("backward")
                out.sum().backward()
            peaks[trained, part] = [live.peaks[phase].alive for phase in ("start", "backward")]
    wide = 4 * 3 * I
    for whole, parts in zip(peaks[False, 64], peaks[False, 16], strict=True):
        assert whole > T * wide and parts < T // 2 * wide
    assert peaks[True, 16] == peaks[True, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@mock.patch.object(GATED_MLP, "ROWS", 16)
def test_with_kernels_and_in_half_precision(device, dtype):
    """To a few roundings of the dtype; kernels run where the fixture lets them."""
    torch.manual_seed(0)
    to = lambda t: t.detach().to(device).requires_grad_(t.requires_grad)
    x, residual = (to(rows(40, 16, dtype)) for _ in range(2))
    weight = torch.randn(16).to(device, dtype)
    options = {"joint": True, "dtype": dtype, "device": device}
    gate_up, down = linears(16, (24, 24), (4, 4), **options), linears(24, (16,), (4,), **options)
    qkv = linears(16, (16, 8, 8), (4, 4, 4), bias=True, **options)
    tolerance = {"rtol": 3e-5, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.25}
    for recompute in (False, True):
        right = naive.gated_mlp(x, residual, weight, EPS, gate_up, down)
        got = gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=recompute)
        compare(got, right, (x, residual, *gate_up.parameters, *down.parameters), **tolerance)
    output = linears(16, (16,), (4,), **options)
    got = normed_attention(x, residual, weight, EPS, qkv, output, attend)
    right = naive.normed_attention(x, residual, weight, EPS, qkv, output, attend)
    compare(got, right, (x, residual, *qkv.parameters, *output.parameters), **tolerance)
    total, outs = normed_linears(x, residual, weight, EPS, qkv)
    right_total, right_outs = naive.normed_linears(x, residual, weight, EPS, qkv)
    compare((total, *outs), (right_total, *right_outs), (x, residual, *qkv.parameters), **tolerance)


def test_adapters_that_are_off_change_no_bit_and_learn_nothing():
    torch.manual_seed(0)
    x, weight = rows(7, 6, torch.float32), torch.randn(6)
    layers = linears(6, (5, 4), (3, 2), joint=True, dtype=torch.float32)
    for up in layers.ups:
        up.data.zero_()
    _, on = normed_linears(x, None, weight, EPS, layers)
    _, off = normed_linears(x, None, weight, EPS, layers, adapted=False)
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    grads = torch.autograd.grad(sum(out.sum() for out in off), [x, *layers.downs, *layers.ups], allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1:] == (None,) * 4


def saved_bytes(run) -> int:
    """Bytes of all memory that is kept for a backward pass."""
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_what_is_kept():
    """Of T = 64 rows: the sum (D), one number a row, gate and up (2 I), and the rank of each adapter; nothing else."""
    T, D, I, R = 64, 32, 128, 2  # noqa: E741
    torch.manual_seed(0)
    x, residual, weight = rows(T, D, torch.float32), rows(T, D, torch.float32), torch.randn(D)
    gate_up = linears(D, (I, I), (R, R), joint=True, dtype=torch.float32)
    down = linears(I, (D,), (R,), joint=True, dtype=torch.float32)
    keep = lambda recompute: saved_bytes(
        lambda: gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=recompute)
    )
    assert keep(False) == 4 * (T * (D + 1 + 2 * I + 3 * R) + D)
    assert keep(True) == 4 * (T * (D + 1) + D)
    qkv = linears(D, (D, D, D), (R, R, R), joint=True, dtype=torch.float32)
    assert saved_bytes(lambda: normed_linears(x, residual, weight, EPS, qkv)) == 4 * (T * (D + 1 + 3 * R) + D)


def test_what_attention_keeps():
    """The sum and the queries (2 D), and one number a row; neither keys and values nor what attention returns."""
    T, D, R = 64, 32, 2
    torch.manual_seed(0)
    x, residual, weight = rows(T, D, torch.float32), rows(T, D, torch.float32), torch.randn(D)
    qkv = linears(D, (D, D // 2, D // 2), (R, R, R), joint=True, dtype=torch.float32)
    output = linears(D, (D,), (R,), joint=True, dtype=torch.float32)
    keep = lambda recompute: saved_bytes(
        lambda: normed_attention(x, residual, weight, EPS, qkv, output, attend, recompute=recompute)
    )
    assert keep(False) == 4 * (T * (2 * D + 1) + D)
    assert keep(True) == 4 * (T * (D + 1) + D)


def test_a_second_backward_pass_is_an_error():
    """The first one writes over gate and up."""
    torch.manual_seed(0)
    gate_up, down = linears(6, (9, 9), (2, 2), joint=True), linears(9, (6,), (2,), joint=True)
    out, _ = gated_mlp(rows(7, 6), rows(7, 6), torch.randn(6, dtype=torch.float64), EPS, gate_up, down)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_parts_in_half_precision_add_up_in_fp32(monkeypatch):
    """Forty parts of bfloat16: as near to the truth as one, where sums in bfloat16 would be several times as far off."""
    torch.manual_seed(0)
    T, D, I, R = 640, 16, 32, 2  # noqa: E741
    make = {"joint": True, "dtype": torch.bfloat16}
    gate_up, down = linears(D, (I, I), (R, R), **make), linears(I, (D,), (R,), **make)
    x, residual = (rows(T, D, torch.bfloat16) for _ in range(2))
    weight = torch.ones(D, dtype=torch.bfloat16)
    dout = torch.randn(T, D).abs().bfloat16()  # of one sign, so that sums grow
    learned = [p for p in (*gate_up.parameters, *down.parameters) if p is not None and p.requires_grad]
    found = {}
    for part in (T, 16):
        monkeypatch.setattr(GATED_MLP, "ROWS", part)
        out, _ = gated_mlp(x, residual, weight, EPS, gate_up, down, recompute=True)
        found[part] = torch.autograd.grad(out, learned, dout)
    for whole, parts in zip(found[T], found[16], strict=True):
        assert parts.dtype == torch.bfloat16
        assert (parts.float() - whole.float()).norm() < 4e-3 * whole.float().norm()
