"""The memory-bound operations of a decoder layer, and the gathering of rows, against their naive twins.

Kernels run on the GPU, or in Triton's interpreter; "naive" cases take the CPU's path on purpose.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vapr_kernels import add_rms_norm, gather_keys_values, gather_rows, naive, rms_norm, rotary, swiglu
from vapr_kernels.gather_rows import RowIndex, sum_copies
from vapr_kernels.testing import as_tuple, assert_matches_naive

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FULL, HALF = torch.float32, torch.bfloat16
EPS = 1e-6


@pytest.fixture(params=["triton", "naive"])
def either_device(request) -> torch.device:
    """Both ways an operation can run."""
    return request.getfixturevalue("device") if request.param == "triton" else torch.device("cpu")


def leaf(*shape: int, device="cpu", dtype=FULL, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()


def transposed(x: Tensor) -> Tensor:
    """The same leaf, stored with its first two dimensions swapped."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(x.requires_grad)


def within(x: Tensor) -> Tensor:
    """The same leaf as part of wider rows of NaN, which begin where no 16-byte access can."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = x.detach()
    return wide[..., 1:-2].requires_grad_(x.requires_grad)


def tables(num_tokens: int, head_dim: int, device="cpu", dtype=FULL) -> tuple[Tensor, Tensor]:
    angles = 3 * torch.randn(num_tokens, head_dim // 2)
    both = torch.cat((angles, angles), -1)
    return both.cos().to(device, dtype), both.sin().to(device, dtype)


SWIGLU_SHAPES = [(1, 1), (3, 1024), (2, 1025), (5, 96), (0, 96), (7, 257)]  # blocks have 1024 columns


@DTYPES
@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
def test_swiglu(shape, dtype, device):
    gate, up = (leaf(*shape, device=device, dtype=dtype, scale=3) for _ in range(2))
    assert_matches_naive(swiglu, naive.swiglu, gate, up)


@DTYPES
def test_swiglu_of_strided_rows(dtype, device):
    gate, up = (leaf(5, 72, device=device, dtype=dtype) for _ in range(2))
    halves = torch.cat((gate, up), 1).detach().chunk(2, dim=1)  # as a fused projection gives them
    assert_matches_naive(swiglu, naive.swiglu, *(half.requires_grad_() for half in halves))
    assert_matches_naive(swiglu, naive.swiglu, within(gate), up)
    assert_matches_naive(swiglu, naive.swiglu, gate, within(up))
    assert_matches_naive(swiglu, naive.swiglu, transposed(gate), up)


@DTYPES
@pytest.mark.parametrize("value", [1e4, -1e4, 0.0, -100.0])
def test_swiglu_of_extreme_gates(value, dtype, device):
    """exp(1e4) overflows on the way to a sigmoid of 0, and 0 times infinity must not follow."""
    gate = torch.full((2, 40), value, device=device, dtype=dtype, requires_grad=True)
    assert_matches_naive(swiglu, naive.swiglu, gate, leaf(2, 40, device=device, dtype=dtype, scale=1e4))


NORM_SHAPES = [
    (1, 1),
    (3000, 1),  # more than one tile of the shortest rows
    (1, 96),
    (37, 96),  # 16 rows to a tile: two tiles and a rest
    (5, 257),
    (0, 96),
    (11, 2048),  # one row to a tile; more tiles than programs that sum dweight
    (2, 2050),
]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@DTYPES
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norms(shape, dtype, trained, device):
    x, residual = (leaf(*shape, device=device, dtype=dtype) for _ in range(2))
    weight = leaf(shape[1], device=device, dtype=dtype).requires_grad_(trained)
    floor = 1e-5  # dweight is a sum over thousands of rows, in another order
    assert_matches_naive(rms_norm, naive.rms_norm, x, weight, EPS, floor=floor)
    assert_matches_naive(add_rms_norm, naive.add_rms_norm, x, residual, weight, EPS, floor=floor)


@DTYPES
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_norms_of_extreme_rows(scale, dtype, device):
    x, residual = (leaf(6, 40, device=device, dtype=dtype, scale=scale) for _ in range(2))
    weight = leaf(40, device=device, dtype=dtype)
    assert_matches_naive(add_rms_norm, naive.add_rms_norm, x, residual, weight, EPS)
    assert_matches_naive(rms_norm, naive.rms_norm, x, weight, EPS)


def test_norms_whose_weight_is_wider_than_the_rows(either_device):
    """Of Gemma: 1 and a small weight, which would be 1 in the rows' dtype."""
    x, residual = (leaf(9, 40, device=either_device, dtype=HALF) for _ in range(2))
    weight = (1 + leaf(40, device=either_device, scale=1e-3)).detach().requires_grad_()
    assert_matches_naive(add_rms_norm, naive.add_rms_norm, x, residual, weight, EPS, floor=1e-5)
    assert_matches_naive(rms_norm, naive.rms_norm, x, weight, EPS, floor=1e-5)
    (dweight,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), weight)
    assert dweight.dtype == torch.float32


@DTYPES
def test_norms_of_strided_rows(dtype, device):
    x, residual = (leaf(9, 40, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(80, device=device, dtype=dtype)[::2].requires_grad_()
    assert_matches_naive(add_rms_norm, naive.add_rms_norm, within(x), transposed(residual), weight, EPS)
    assert_matches_naive(rms_norm, naive.rms_norm, within(x), weight, EPS)


def test_the_norm_is_that_of_the_rounded_total(either_device):
    x, residual = (leaf(33, 96, device=either_device, dtype=HALF) for _ in range(2))
    weight = leaf(96, device=either_device, dtype=HALF)
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS))


def test_add_rms_norm_when_one_output_is_unused(either_device):
    x, residual, weight = (leaf(*shape, device=either_device) for shape in ((5, 24), (5, 24), (24,)))
    for used in (0, 1):
        got, truth = (
            torch.autograd.grad(fn(x, residual, weight, EPS)[used].sum(), (x, residual, weight), allow_unused=True)
            for fn in (add_rms_norm, naive.add_rms_norm)
        )
        for g, t in zip(got, truth, strict=True):
            assert (g is None) == (t is None)
            torch.testing.assert_close(g, t)


HEADS = [
    (1, 1, 2),
    (9, 3, 64),  # 32 half heads to a tile, 27 of them here
    (6, 7, 80),  # 40 elements in a block of 64
    (5, 4, 128),  # 16 to a tile: one tile and a rest
    (3, 2, 6),
    (0, 4, 64),
]


@DTYPES
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotary(shape, dtype, device):
    x = leaf(*shape, device=device, dtype=dtype)
    assert_matches_naive(rotary, naive.rotary, x, *tables(shape[0], shape[2], device, dtype))


@DTYPES
def test_rotary_of_strided_heads(dtype, device):
    x, (cos, sin) = leaf(9, 5, 80, device=device, dtype=dtype), tables(9, 80, device, dtype)
    for strided in (transposed(x), within(x)):
        assert_matches_naive(rotary, naive.rotary, strided, cos, sin)
        assert_matches_naive(rotary, naive.rotary, strided, within(cos), transposed(sin))


def test_rotary_with_tables_in_fp32(device):
    x = leaf(5, 3, 64, device=device, dtype=HALF, scale=1e4)
    assert_matches_naive(rotary, naive.rotary, x, *tables(5, 64, device))


def test_rotary_reads_the_first_half_of_the_tables(device):
    x, (cos, sin) = leaf(5, 3, 64, device=device), tables(5, 64, device)
    expected = rotary(x, cos, sin)
    cos[:, 32:], sin[:, 32:] = torch.nan, torch.nan
    assert torch.equal(rotary(x, cos, sin), expected)


ROWS = {
    "once each": [0, 1, 2, 3, 4],
    "a prefix twice": [0, 1, 2, 3, 0, 1, 4],
    "scrambled, 0 1 2 and 5 times": [3, 2, 4, 3, 3, 4, 1, 3, 3],  # row 0 never, 3 five times
    "one": [4],
    "none": [],
}
GATHERED = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


@DTYPES
@GATHERED
@pytest.mark.parametrize("row", [(), (3,), (2, 96), (1030,)], ids=str)
def test_gather_rows(row, rows, dtype, device):
    rows = torch.tensor(rows, dtype=torch.int64)
    x, index = leaf(5, *row, device=device, dtype=dtype), RowIndex.build(rows, 5).to(device)
    assert_matches_naive(lambda x: gather_rows(x, index), lambda x: naive.gather_rows(x, index.rows), x)


@DTYPES
@GATHERED
@pytest.mark.parametrize("heads", [(4, 128), (1, 64), (3, 80), (2, 2)], ids=str)
def test_gather_keys_values(heads, rows, dtype, device):
    k, v = (leaf(5, *heads, device=device, dtype=dtype) for _ in range(2))
    index = RowIndex.build(torch.tensor(rows, dtype=torch.int64), 5).to(device)
    assert_matches_naive(gather_keys_values, naive.gather_keys_values, k, v, *tables(5, heads[1], device, dtype), index)


@DTYPES
def test_gather_keys_values_of_many_tokens(dtype, device):
    """Several tiles, and counts that differ within them."""
    k, v = (leaf(60, 3, 64, device=device, dtype=dtype, scale=100) for _ in range(2))
    index = RowIndex.build(torch.randint(60, (130,)), 60).to(device)
    assert_matches_naive(gather_keys_values, naive.gather_keys_values, k, v, *tables(60, 64, device, dtype), index)
    assert_matches_naive(lambda k: gather_rows(k, index), lambda k: naive.gather_rows(k, index.rows), k)


@DTYPES
def test_gather_keys_values_of_strided_heads(dtype, device):
    k, v = (leaf(5, 3, 64, device=device, dtype=dtype) for _ in range(2))
    index, (cos, sin) = RowIndex.build(torch.tensor([2, 0, 2, 4]), 5).to(device), tables(5, 64, device)
    for k_strided, v_strided in ((transposed(k), within(v)), (within(k), transposed(v))):
        args = (k_strided, v_strided, within(cos), transposed(sin), index)
        assert_matches_naive(gather_keys_values, naive.gather_keys_values, *args)


def test_gather_keys_values_of_no_tokens(device):
    k, v = (leaf(0, 3, 64, device=device) for _ in range(2))
    index = RowIndex.build(torch.tensor([], dtype=torch.int64), 0).to(device)
    assert_matches_naive(gather_keys_values, naive.gather_keys_values, k, v, *tables(0, 64, device), index)


def leaves_of(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def test_copies_are_added_in_fp32_in_the_order_in_which_they_appear(either_device):
    """1e8 - 1e8 + 1 is 1 in this order only; 256 times 1 + 2^-5 is 264 in fp32 only."""
    one, zero = torch.ones(2, 2, device=either_device), torch.zeros(2, 2, device=either_device)
    index = RowIndex.build(torch.tensor([1, 0, 1, 1]), 2).to(either_device)
    many = RowIndex.build(torch.zeros(256, dtype=torch.int64), 2).to(either_device)
    douts = torch.tensor([1e8, 7.0, -1e8, 1.0], device=either_device)[:, None, None].expand(4, 1, 2)
    dmany = torch.full((256, 1, 2), 1.03125, device=either_device, dtype=HALF)
    for gather in (
        gather_rows,
        lambda x, index: gather_keys_values(x, x.detach(), one, zero, index)[0],
        lambda x, index: gather_keys_values(x.detach(), x, one, zero, index)[1],
    ):
        x = torch.zeros(2, 1, 2, device=either_device, requires_grad=True)
        assert torch.autograd.grad(gather(x, index), x, douts)[0].tolist() == [[[7.0, 7.0]], [[1.0, 1.0]]]
        x = x.detach().to(HALF).requires_grad_()
        assert torch.autograd.grad(gather(x, many), x, dmany)[0].tolist() == [[[264.0, 264.0]], [[0.0, 0.0]]]


def test_both_devices_add_copies_alike(device):
    """To the last bit: a run on a CPU says what a run on a GPU will do."""
    index = RowIndex.build(torch.randint(40, (200,)), 40)
    dout = torch.randn(200, 1, 64, dtype=torch.float32)
    x = torch.zeros(40, 1, 64, device=device, requires_grad=True)
    got = torch.autograd.grad(gather_rows(x, index.to(device)), x, dout.to(device))[0]
    assert torch.equal(got.cpu(), sum_copies(dout, index.order, index.starts))


def test_the_index_inverts_the_rows():
    index = RowIndex.build(torch.tensor([3, 2, 4, 3, 3, 4, 1, 3, 3]), 5)
    copies = [index.order[a:b].tolist() for a, b in zip(index.starts, index.starts[1:], strict=False)]
    assert copies == [[], [6], [1], [0, 3, 4, 7, 8], [2, 5]]


def calls(device, dtype=FULL) -> dict[str, tuple]:
    """One call of every operation: function, its arguments, and calls of its custom ops."""
    x, y, weight = (leaf(*shape, device=device, dtype=dtype) for shape in ((5, 24), (5, 24), (24,)))
    k, v = (leaf(5, 3, 8, device=device, dtype=dtype) for _ in range(2))
    cos, sin = tables(5, 8, device, dtype)
    index = RowIndex.build(torch.tensor([2, 0, 2, 2, 4, 3, 4]), 5).to(device)
    rows, order, starts = index.rows, index.order, index.starts
    rstd = torch.rand(5, device=device, dtype=torch.promote_types(dtype, FULL))
    dy, dk = torch.randn_like(x).detach(), leaf(7, 3, 8, device=device, dtype=dtype).detach()
    saved = (y.detach(), weight.detach(), rstd)
    ops = torch.ops.vapr
    return {
        "swiglu": (swiglu, (x, y), {ops.swiglu: (x, y), ops.swiglu_bwd: (dy, x.detach(), y.detach())}),
        "rms_norm": (rms_norm, (x, weight, EPS), {ops.rms_norm: (x, weight, EPS), ops.rms_norm_bwd: (dy, None, *saved, True)}),
        "add_rms_norm": (add_rms_norm, (x, y, weight, EPS), {ops.add_rms_norm: (x, y, weight, EPS), ops.rms_norm_bwd: (dy, dy.clone(), *saved, False)}),
        "rotary": (rotary, (k, cos, sin), {ops.rotary: (k, cos, sin), ops.rotary_bwd: (k.detach(), cos, sin)}),
        "gather_keys_values": (
            gather_keys_values,
            (k, v, cos, sin, index),
            {ops.gather_keys_values: (k, v, cos, sin, rows, order, starts), ops.gather_keys_values_bwd: (dk, dk.clone(), cos, sin, order, starts)},
        ),
        "gather_rows": (gather_rows, (k, index), {ops.gather_rows: (k, rows, order, starts), ops.gather_rows_bwd: (dk, order, starts)}),
    }  # fmt: skip


CALLS = pytest.mark.parametrize("name", calls("cpu"))


@CALLS
def test_opcheck(name, either_device):
    for op, args in calls(either_device)[name][2].items():
        torch.library.opcheck(op, args)


@CALLS
def test_compiles_as_one_graph(name, either_device):
    fn, args, _ = calls(either_device)[name]

    def outputs_and_grads(fn):
        outs = as_tuple(fn(*args))
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves_of(args))]

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, expected in zip(outputs_and_grads(compiled), outputs_and_grads(fn), strict=True):
        assert torch.equal(got, expected)


@CALLS
def test_gradients_with_strides_of_their_own(name, either_device):
    """Attention hands its gradients back transposed, and a sum hands back one element expanded."""
    fn, args, _ = calls(either_device)[name]
    outs, leaves = as_tuple(fn(*args)), leaves_of(args)
    douts = [torch.randn_like(out) for out in outs]
    plain = torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    for n in range(len(douts)):
        changed = [transposed(dout) if m == n else dout for m, dout in enumerate(douts)]
        torch.testing.assert_close(torch.autograd.grad(outs, leaves, changed, retain_graph=True), plain)
    ones = [torch.ones_like(dout) for dout in douts]
    expanded = [dout.new_ones(()).expand(dout.shape) for dout in douts]
    plain = torch.autograd.grad(outs, leaves, ones, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(outs, leaves, expanded), plain)


@CALLS
def test_gradcheck(name, either_device):
    """fp64 takes the naive path wherever it lies."""
    fn, args, _ = calls(either_device, torch.float64)[name]
    assert torch.autograd.gradcheck(fn, args)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("swiglu", lambda g, u: (g[0], u), r"gate must have shape \(T, I\), got \(24,\)"),
        ("swiglu", lambda g, u: (g.int(), u), "gate must be one of torch.float64, .* got torch.int32"),
        ("swiglu", lambda g, u: (g, u[:, :3]), r"up must have shape \(5, 24\), got \(5, 3\)"),
        ("swiglu", lambda g, u: (g, u.to(HALF)), "up must be torch.float32, got torch.bfloat16"),
        ("swiglu", lambda g, u: (g, u.to("meta")), "up must lie on .*, got meta"),
        ("rms_norm", lambda x, w, e: (x[None], w, e), r"x must have shape \(T, D\), got \(1, 5, 24\)"),
        ("rms_norm", lambda x, w, e: (x, w[:3], e), r"weight must have shape \(24,\), got \(3,\)"),
        ("rms_norm", lambda x, w, e: (x, w.to(HALF), e), "weight must be torch.float32, got torch.bfloat16"),
        ("rms_norm", lambda x, w, e: (x[:, :0], w[:0], e), "x must have between 1 and 8192 columns, got 0"),
        ("rms_norm", lambda x, w, e: (x.new_empty(1, 8193), w.new_empty(8193), e), "8192 columns, got 8193"),
        ("add_rms_norm", lambda x, r, w, e: (x, r[:4], w, e), r"residual must have shape \(5, 24\), got \(4, 24\)"),
        ("add_rms_norm", lambda x, r, w, e: (x, r.to(HALF), w, e), "residual must be torch.float32, got torch.bfloat16"),
        ("add_rms_norm", lambda x, r, w, e: (x, r, w[:1], e), r"weight must have shape \(24,\), got \(1,\)"),
        ("rotary", lambda x, c, s: (x[0], c, s), r"x must have shape \(T, H, E\), got \(3, 8\)"),
        ("rotary", lambda x, c, s: (x[..., :7], c, s), r"x must have heads of an even size, got \(5, 3, 7\)"),
        ("rotary", lambda x, c, s: (x, c[:, :4], s), r"cos must have shape \(5, 8\), got \(5, 4\)"),
        ("rotary", lambda x, c, s: (x, c, s.to(HALF)), "sin must be torch.float32, got torch.bfloat16"),
        ("rotary", lambda x, c, s: (x, c.clone().requires_grad_(), s), "cos must not require a gradient"),
        ("gather_keys_values", lambda k, v, c, s, i: (k.int(), v, c, s, i), "k must be one of"),
        ("gather_keys_values", lambda k, v, c, s, i: (k, v[:, :2], c, s, i), r"v must have shape \(5, 3, 8\), got \(5, 2, 8\)"),
        ("gather_keys_values", lambda k, v, c, s, i: (k[:, :0], v[:, :0], c, s, i), "k must have heads of an even size"),
        ("gather_keys_values", lambda k, v, c, s, i: (k, v, c, s[:4], i), r"sin must have shape \(5, 8\), got \(4, 8\)"),
        ("gather_keys_values", lambda k, v, c, s, i: (k[:4], v[:4], c[:4], s[:4], i), "k has 4 rows but the index was built for 5"),
        ("gather_keys_values", lambda k, v, c, s, i: (k, v, c, s, i.to("meta")), "index must lie on .*, got meta"),
        ("gather_rows", lambda x, i: (x.to("meta"), i), "index must lie on meta, got"),
    ],
)  # fmt: skip
def test_names_the_wrong_argument(name, change, message):
    fn, args, _ = calls("cpu")[name]
    with pytest.raises(ValueError, match=message):
        fn(*change(*args))


@pytest.mark.parametrize("rows", [[0, 5], [-1, 2]], ids=str)
def test_the_index_refuses_rows_that_do_not_exist(rows):
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 5\), got"):
        RowIndex.build(torch.tensor(rows), 5)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
from vapr_kernels import add_rms_norm, gather_keys_values, launch, linear_logps, rotary, swiglu
from vapr_kernels.gather_rows import RowIndex

assert not launch.installed
x = torch.randn(4, 8, requires_grad=True)
h, total = add_rms_norm(swiglu(x, x), x, torch.ones(8), 1e-6)
index = RowIndex.build(torch.tensor([0, 1, 0, 3]), 4)
k, v = gather_keys_values(h[:, None], total[:, None], torch.ones(4, 8), torch.zeros(4, 8), index)
q = rotary(h[:, None], torch.ones(4, 8), torch.zeros(4, 8))
linear_logps((q + k + v)[:, 0], torch.randn(9, 8), torch.tensor([0, 8, 3, 4])).sum().backward()
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
"""


def test_every_operation_runs_where_triton_is_not_installed():
    folders = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
