"""Operations against their naive twins: output and every gradient, judged against the dtype's own error."""

import importlib
import math

import pytest
import torch

from vapr_kernels import gather_rows, linear_logps, naive
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.testing import assert_matches_naive


def head_inputs(num_rows, hidden, vocabulary, dtype=torch.float32, scale=1.0):
    x = torch.randn(num_rows, hidden, dtype=dtype).requires_grad_()
    head = (torch.randn(vocabulary, hidden) * scale / math.sqrt(hidden)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (num_rows,))
    labels[0], labels[-1] = 0, vocabulary - 1
    return x, head, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("chunk_rows", [None, 1, 5], ids=lambda n: f"chunk {n}")
@pytest.mark.parametrize("shape", [(1, 3, 2), (13, 16, 37), (33, 8, 1000)], ids=str)
def test_linear_logps(shape, chunk_rows, frozen, dtype):
    x, head, labels = head_inputs(*shape, dtype=dtype, scale=3.0)
    head.requires_grad_(not frozen)
    # bf16: the naive twin rounds nothing between its fp32 sums, so a bf16 rounding of the result is all we allow for
    floor = 8e-3 if dtype is torch.bfloat16 else 1e-6
    assert_matches_naive(
        lambda *a: linear_logps(*a, chunk_rows=chunk_rows), naive.linear_logps, x, head, labels, floor=floor
    )


@pytest.mark.parametrize(
    ("boost", "low", "high"), [(0, -40, -1), (18, -3, -1e-12), (60, -1e-12, 0), (-400, -700, -300)]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_linear_logps_when_sure_and_when_far_off(boost, low, high, frozen):
    """Near p = 1 the gradient is 1 - p times a direction: 1 - exp(logp) would round it to nothing or to noise."""
    x, head, labels = head_inputs(24, 32, 400)
    head.requires_grad_(not frozen)
    with torch.no_grad():  # push the label's logit by ``boost``
        unit = torch.nn.functional.normalize(head[labels], dim=1)
        x += boost * unit / head[labels].norm(dim=1, keepdim=True)
    logps = linear_logps(x, head, labels)
    truth = naive.linear_logps(x.double(), head.double(), labels)
    assert low <= truth.median() <= high
    allowed = 1e-5 + 1e-6 * truth.abs()
    assert ((logps - truth).abs() <= allowed).all()
    leaves = [x] if frozen else [x, head]
    for got, true in zip(
        torch.autograd.grad(logps.sum(), leaves), torch.autograd.grad(truth.sum(), leaves), strict=True
    ):
        # row by row: a sure row's gradient is tiny beside an unsure one's
        size = true.norm(dim=1)
        # below 1e-11 the fp64 truth, a difference of numbers near 1, is itself noise
        assert ((got - true).norm(dim=1) <= 2e-3 * size + 1e-13).all()


def test_linear_logps_of_equal_logits_is_uniform():
    logps = linear_logps(torch.zeros(3, 4), torch.randn(7, 4), torch.tensor([0, 3, 6]))
    torch.testing.assert_close(logps, torch.full((3,), -math.log(7)))


def test_linear_logps_holds_no_more_than_a_chunk(monkeypatch):
    sizes = []
    module = importlib.import_module("vapr_kernels.linear_logps")  # the package's attribute is the function
    real = module._logits
    monkeypatch.setattr(module, "_logits", lambda x, head: sizes.append(len(x) * len(head)) or real(x, head))
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 100 * 8)
    x, head, labels = head_inputs(20, 4, 100)
    linear_logps(x, head, labels).sum().backward()
    assert max(sizes) == 800 and sum(sizes) == 2 * 20 * 100  # forward and the trained head's recomputation


def test_gradcheck():
    x, head, labels = head_inputs(5, 4, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: linear_logps(*a, labels, chunk_rows=2), (x, head))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, y: (x[0], w, y), "do not fit"),
        (lambda x, w, y: (x, w[:, :2], y), "do not fit"),
        (lambda x, w, y: (x, w, y.int()), "labels must be int64"),
        (lambda x, w, y: (x, w, y[:2]), "labels must be int64 of shape"),
        (lambda x, w, y: (x, w.double(), y), "one float dtype"),
        (lambda x, w, y: (x, w[:1], y), "at least 2 rows"),
        (lambda x, w, y: (x, w, y.to("meta")), "lie on cpu, cpu and meta"),
    ],
)
def test_linear_logps_names_the_wrong_argument(change, message):
    x, head, labels = head_inputs(4, 6, 8)
    with pytest.raises(ValueError, match=message):
        linear_logps(*change(x, head, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [0],  # one row
        [2, 2, 2, 2],  # one row four times, the others never
        [0, 1, 2, 3, 0, 1, 4],  # a prefix gathered twice
        [],  # nothing
    ],
    ids=str,
)
def test_gather_rows(rows, dtype):
    x = torch.randn(5, 2, 3, dtype=dtype).requires_grad_()
    rows = torch.tensor(rows, dtype=torch.int64)
    index = RowIndex.build(rows, 5)
    assert_matches_naive(lambda x: gather_rows(x, index), lambda x: naive.gather_rows(x, rows), x)


def test_gather_rows_sums_copies_in_fp32():
    """256 copies of 1 + 2^-8 in bf16: adding in bf16 would lose every small part."""
    rows = torch.zeros(256, dtype=torch.int64)
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, RowIndex.build(rows, 1)).backward(torch.full((256, 1), 1.0078125, dtype=torch.bfloat16))
    assert x.grad.item() == 258.0


def test_gather_rows_refuses_another_number_of_rows():
    with pytest.raises(ValueError, match="x has 4 rows but the index was built for 5"):
        gather_rows(torch.zeros(4, 2), RowIndex.build(torch.tensor([0]), 5))
