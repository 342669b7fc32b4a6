"""causal_attention against its naive twin and PyTorch's attention: outputs, gradients, and what it keeps."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels import causal_attention, naive
from vapr_kernels.testing import assert_matches_naive, outputs_and_grads

MODULE = importlib.import_module("vapr_kernels.causal_attention")  # the package has a function of that name

HEADS = pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)], ids=str)
FORESTS = {
    "one token": [(1, 1)],
    "one query": [(1, 5)],
    "one block": [(7, 7), (3, 10), (1, 8)],
    "whole blocks": [(128, 128), (128, 256)],
    "several blocks": [(300, 300), (129, 140), (2, 300)],  # of at most 128 queries
}


@pytest.fixture(autouse=True)
def _no_blocks_of_other_tests():
    MODULE._blocks.cache_clear()


def arguments(forest: str, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 8) -> tuple[list[Tensor], tuple]:
    """q, k and v as leaves, and the lengths."""
    lengths_q, lengths_k = zip(*FORESTS[forest], strict=True)
    shapes = ((sum(lengths_q), heads[0]), (sum(lengths_k), heads[1]), (sum(lengths_k), heads[1]))
    tensors = [torch.randn(*shape, head_dim, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, (lengths_q, lengths_k)


@HEADS
@pytest.mark.parametrize("forest", FORESTS)
def test_against_naive(forest, heads):
    tensors, lengths = arguments(forest, heads, torch.float32)
    attend, twin = (lambda q, k, v, of=of: of(q, k, v, *lengths, scale=0.7) for of in (causal_attention, naive.causal_attention))  # fmt: skip
    assert_matches_naive(attend, twin, *tensors)


@HEADS
@pytest.mark.parametrize("window", [None, 1, 5, 100, 290])
@pytest.mark.parametrize("both_ways", [None, (True, False, True)], ids=["causal", "both ways"])
@pytest.mark.parametrize("scratch", [2**22, 1000], ids=["usual blocks", "short blocks"])
def test_both_ways_and_windows(scratch, both_ways, window, heads, monkeypatch):
    """Sequences of several blocks and of one: what is seen, against the naive twin's explicit masks."""
    monkeypatch.setattr(MODULE, "SCRATCH", scratch)
    tensors, lengths = arguments("several blocks", heads, torch.float64)
    options = {"scale": 0.7, "both_ways": both_ways, "window": window}
    douts = [torch.randn_like(tensors[0])]
    got, truth = (
        outputs_and_grads(lambda *x, of=of: of(*x, *lengths, **options), (*tensors,), douts)
        for of in (causal_attention, naive.causal_attention)
    )
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_which_values_are_in_sight():
    """Equal scores give the mean of the values in sight: by eye."""
    v = torch.tensor([1.0, 2.0, 3.0, 10.0])[:, None, None]
    q, k = torch.zeros(2, 1, 1), torch.randn(4, 1, 1)  # queries at the third and the fourth key
    see = lambda **options: causal_attention(q, k, v, (2,), (4,), scale=1.0, **options).flatten().tolist()
    assert see() == see(both_ways=[False]) == see(window=4) == [2.0, 4.0]
    assert see(both_ways=[True]) == [4.0, 4.0]
    assert see(window=1) == [3.0, 10.0]
    assert see(window=2) == [2.5, 6.5]
    assert see(window=2, both_ways=[True]) == [5.0, 6.5]


@HEADS
@pytest.mark.parametrize("scratch", [2**22, 1000], ids=["usual blocks", "short blocks"])
def test_against_pytorch_in_fp64(heads, scratch, monkeypatch):
    monkeypatch.setattr(MODULE, "SCRATCH", scratch)
    (q, k, v), lengths = arguments("several blocks", heads, torch.float64)
    douts = [torch.randn_like(q)]
    got = outputs_and_grads(lambda *x: causal_attention(*x, *lengths, scale=0.7), (q, k, v), douts)
    truth = outputs_and_grads(lambda *x: by_pytorch(*x, *lengths, scale=0.7), (q, k, v), douts)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, lengths_q, lengths_k, *, scale: float) -> Tensor:
    group, outs = q.shape[1] // k.shape[1], []
    for q_n, k_n, v_n in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        seen = torch.ones(len(q_n), len(k_n), dtype=torch.bool).tril(len(k_n) - len(q_n))
        q_n, k_n, v_n = q_n.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_n, v_n))
        outs.append(F.scaled_dot_product_attention(q_n, k_n, v_n, seen, scale=scale).transpose(0, 1))
    return torch.cat(outs)


def test_equal_scores_give_the_mean_of_the_values_in_sight():
    """Two queries of zeros at the end of four keys, then one at the end of one."""
    v = torch.tensor([1.0, 2.0, 3.0, 10.0, 5.0])[:, None, None]
    q, k = torch.zeros(3, 1, 1), torch.randn(5, 1, 1)
    out = causal_attention(q, k, v, (2, 1), (4, 1), scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 4.0, 5.0]))


@HEADS
def test_tokens_of_any_layout(heads):
    tensors, lengths = arguments("one block", heads, torch.float32)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    douts = [torch.randn_like(tensors[0])]
    attend = lambda q, k, v: causal_attention(q, k, v, *lengths, scale=0.7)
    for g, t in zip(
        outputs_and_grads(attend, (*strided,), douts), outputs_and_grads(attend, (*tensors,), douts), strict=True
    ):
        torch.testing.assert_close(g, t)


@HEADS
def test_gradients_are_those_of_the_function(heads):
    tensors, lengths = arguments("one block", heads, torch.float64, head_dim=2)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, *lengths, scale=0.7), tensors)


def test_what_is_kept():
    """Queries, keys and values, and nothing besides."""
    (q, k, v), lengths = arguments("several blocks", (6, 2), torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        causal_attention(q, k, v, *lengths, scale=0.7)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("window", [None, 1, 5, 100, 290])
@pytest.mark.parametrize("scratch", [2**22, 1000], ids=["usual blocks", "short blocks"])
@pytest.mark.parametrize("some", [False, True], ids=["all queries", "last queries"])
@HEADS
def test_branches(heads, some, scratch, window, monkeypatch):
    """Branches at the root, inside and at the end of what they leave, and another unit: against the naive twin."""
    monkeypatch.setattr(MODULE, "SCRATCH", scratch)
    lengths_k, forks = (300, 40, 7, 1, 9, 3), (-1, 260, 300, 0, -1, 4)
    lengths_q = (20, 33, 7, 1, 9, 2) if some else (290, 40, 7, 1, 9, 3)
    shapes = ((sum(lengths_q), heads[0]), (sum(lengths_k), heads[1]), (sum(lengths_k), heads[1]))
    tensors = [torch.randn(*shape, 8, dtype=torch.float64).requires_grad_() for shape in shapes]
    douts = [torch.randn_like(tensors[0])]
    options = {"scale": 0.7, "window": window, "forks": forks}
    got, truth = (
        outputs_and_grads(lambda *x, of=of: of(*x, lengths_q, lengths_k, **options), (*tensors,), douts)
        for of in (causal_attention, naive.causal_attention)
    )
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_which_values_a_branch_sees():
    """Equal scores: a branch behind the second of three values does not see the third; by eye."""
    v = torch.tensor([1.0, 3.0, 100.0, 5.0, 7.0])[:, None, None]
    q, k = torch.zeros(5, 1, 1), torch.randn(5, 1, 1)
    see = lambda **options: causal_attention(q, k, v, (3, 2), (3, 2), scale=1.0, forks=(-1, 2), **options).flatten()
    torch.testing.assert_close(see(), torch.tensor([1.0, 2.0, 104 / 3, 3.0, 4.0]))
    torch.testing.assert_close(see(window=2), torch.tensor([1.0, 2.0, 103 / 2, 4.0, 6.0]))


def test_runs_on_fake_tensors():
    tensors, lengths = arguments("one block", (4, 2), torch.float32)
    torch.library.opcheck(MODULE._causal_attention, (*tensors, *lengths, 0.7))
    torch.library.opcheck(MODULE._causal_attention, (*tensors, *lengths, 0.7, [True, False, True], 3))
    torch.library.opcheck(MODULE._causal_attention, (*tensors, *lengths, 0.7, None, None, [-1, 2, -1]))
    tensors = [x.detach() for x in (tensors[0], *tensors)]
    torch.library.opcheck(MODULE._causal_attention_bwd, (*tensors, *lengths, 0.7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.bfloat16)}, "q must be torch.float32 or torch.float64"),
        ({"q": torch.zeros(3, 3, 8)}, "a multiple of the heads of k, got 3 and 2"),
        ({"q": torch.zeros(4, 4, 8)}, "lengths_q must sum to the 4 queries, got 3"),
        ({"k": torch.zeros(4, 2, 8)}, r"k must have shape \(5, 2, 8\)"),
        ({"v": torch.zeros(5, 2, 6)}, r"v must have shape \(5, 2, 8\)"),
        ({"lengths_q": (0, 3)}, "from 1 query to as many as keys, got 0 and 4"),
        ({"lengths_q": (1, 2)}, "from 1 query to as many as keys, got 2 and 1"),
        ({"both_ways": [True]}, "both_ways must have an entry for each of 2 sequences, got 1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"forks": (-1,)}, "forks must have an entry for each of 2 sequences, got 1"),
        ({"forks": (-1, 5)}, "forks must be -1 or keys of a sequence before, got 5 for sequence 1"),
        ({"forks": (0, -1)}, "forks must be -1 or keys of a sequence before, got 0 for sequence 0"),
        ({"forks": (-1, 1), "both_ways": (True, False)}, "forks must be None where a sequence looks both ways"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    right = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8), "lengths_q": (2, 1), "lengths_k": (4, 1)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        causal_attention(**{**right, **change}, scale=1.0)
