"""causal_attention against its naive twin and PyTorch's attention: outputs, gradients, and what it keeps."""

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels import causal_attention, naive, query_blocks
from vapr_kernels.query_blocks import QueryBlocks
from vapr_kernels.testing import assert_matches_naive, outputs_and_grads

MODULE = importlib.import_module("vapr_kernels.causal_attention")  # the package has a function of that name

HEADS = pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)], ids=str)
SCRATCH = pytest.mark.parametrize("scratch", [2**22, 1000], ids=["usual blocks", "short blocks"])
FORESTS = {
    "one token": [(1, 1)],
    "one query": [(1, 5)],
    "one block": [(7, 7), (3, 10), (1, 8)],
    "whole blocks": [(128, 128), (128, 256)],
    "several blocks": [(300, 300), (129, 140), (2, 300)],  # of at most 128 queries
}


def arguments(forest: str, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 8) -> tuple[list[Tensor], tuple]:
    """q, k and v as leaves, and the lengths."""
    lengths_q, lengths_k = zip(*FORESTS[forest], strict=True)
    shapes = ((sum(lengths_q), heads[0]), (sum(lengths_k), heads[1]), (sum(lengths_k), heads[1]))
    tensors = [torch.randn(*shape, head_dim, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, (lengths_q, lengths_k)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, lengths_q, lengths_k, *, scale: float, **options) -> Tensor:
    """causal_attention where every sequence has keys of its own."""
    blocks = QueryBlocks.build(lengths_q, lengths_k, np.arange(len(k)), num_heads=q.shape[1], **options)
    return causal_attention(q, k, v, blocks, scale=scale)


@HEADS
@pytest.mark.parametrize("forest", FORESTS)
def test_against_naive(forest, heads):
    tensors, lengths = arguments(forest, heads, torch.float32)
    attend, twin = (lambda q, k, v, of=of: of(q, k, v, *lengths, scale=0.7) for of in (in_blocks, naive.causal_attention))  # fmt: skip
    assert_matches_naive(attend, twin, *tensors)


def branches(trunk: int, *lengths: int) -> tuple[list[int], list[int], np.ndarray]:
    """Sequences that share their first ``trunk`` keys; the first one's queries include them."""
    starts = trunk + np.cumsum([0, *lengths])
    keys = [[*range(trunk), *range(start, start + length)] for start, length in zip(starts[:-1], lengths, strict=True)]
    return [trunk + lengths[0], *lengths[1:]], [len(own) for own in keys], np.concatenate(keys)


@HEADS
@SCRATCH
@pytest.mark.parametrize(
    ("window", "both_ways"), [(None, False), (5, False), (60, False), (None, True), (20, True)], ids=str
)
@pytest.mark.parametrize("tree", [(300, 20, 20), (300, 150, 150), (10, 3, 1, 2, 1), (40, 700, 100), (1, 1, 1)], ids=str)
def test_branches_of_a_tree(tree, window, both_ways, scratch, heads, monkeypatch):
    """Keys that sequences share, against the naive twin on copies of them; copied where strangers are many, too."""
    monkeypatch.setattr(query_blocks, "SCRATCH", scratch)
    lengths_q, lengths_k, keys = branches(*tree)
    options = {"both_ways": [both_ways and n == 1 for n in range(len(lengths_q))], "window": window}
    shapes = ((sum(lengths_q), heads[0]), (sum(tree), heads[1]), (sum(tree), heads[1]))
    tensors = [torch.randn(*shape, 8, dtype=torch.float64).requires_grad_() for shape in shapes]
    douts = [torch.randn_like(tensors[0])]
    blocks = QueryBlocks.build(lengths_q, lengths_k, keys, num_heads=heads[0], **options)
    copies = lambda q, k, v: naive.causal_attention(q, k[keys], v[keys], lengths_q, lengths_k, scale=0.7, **options)
    got = outputs_and_grads(lambda *x: causal_attention(*x, blocks, scale=0.7), (*tensors,), douts)
    for g, t in zip(got, outputs_and_grads(copies, (*tensors,), douts), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_blocks_of_two_short_branches():
    """Four tokens, then two branches of two: one block, in which the second branch does not see the first."""
    blocks = QueryBlocks.build(*branches(4, 2, 2), num_heads=1)
    assert blocks.bounds == (
        0,
        8,
        0,
        8,
        0,
        7,
    )  # queries 0 to 8, keys 0 to 8, none copied, all but the first column hides
    seen = torch.ones(8, 8).tril()
    seen[6:, 4:6] = 0
    assert torch.equal(blocks.hidden.view(8, 7) == 0, seen[:, 1:] == 1)
    assert set(blocks.hidden.tolist()) == {0, -torch.inf}


def test_strangers_are_left_out_where_they_are_many():
    """A branch of 100 behind one of 700: its keys are copied, and nothing but its own triangle is hidden."""
    blocks = QueryBlocks.build(*branches(40, 700, 100), num_heads=1)
    assert blocks.bounds[-6:] == (740, 840, 0, 840, 140, 99)
    assert blocks.gathered.tolist() == [*range(40), *range(740, 840)]


@HEADS
@pytest.mark.parametrize("window", [None, 1, 5, 100, 290])
@pytest.mark.parametrize("both_ways", [None, (True, False, True)], ids=["causal", "both ways"])
@SCRATCH
def test_both_ways_and_windows(scratch, both_ways, window, heads, monkeypatch):
    """Sequences of several blocks and of one: what is seen, against the naive twin's explicit masks."""
    monkeypatch.setattr(query_blocks, "SCRATCH", scratch)
    tensors, lengths = arguments("several blocks", heads, torch.float64)
    options = {"scale": 0.7, "both_ways": both_ways, "window": window}
    douts = [torch.randn_like(tensors[0])]
    got, truth = (
        outputs_and_grads(lambda *x, of=of: of(*x, *lengths, **options), (*tensors,), douts)
        for of in (in_blocks, naive.causal_attention)
    )
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_which_values_are_in_sight():
    """Equal scores give the mean of the values in sight: by eye."""
    v = torch.tensor([1.0, 2.0, 3.0, 10.0])[:, None, None]
    q, k = torch.zeros(2, 1, 1), torch.randn(4, 1, 1)  # queries at the third and the fourth key
    see = lambda **options: in_blocks(q, k, v, (2,), (4,), scale=1.0, **options).flatten().tolist()
    assert see() == see(both_ways=[False]) == see(window=4) == [2.0, 4.0]
    assert see(both_ways=[True]) == [4.0, 4.0]
    assert see(window=1) == [3.0, 10.0]
    assert see(window=2) == [2.5, 6.5]
    assert see(window=2, both_ways=[True]) == [5.0, 6.5]


@HEADS
@SCRATCH
def test_against_pytorch_in_fp64(heads, scratch, monkeypatch):
    monkeypatch.setattr(query_blocks, "SCRATCH", scratch)
    (q, k, v), lengths = arguments("several blocks", heads, torch.float64)
    douts = [torch.randn_like(q)]
    got = outputs_and_grads(lambda *x: in_blocks(*x, *lengths, scale=0.7), (q, k, v), douts)
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
    out = in_blocks(q, k, v, (2, 1), (4, 1), scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 4.0, 5.0]))


@HEADS
def test_tokens_of_any_layout(heads):
    tensors, lengths = arguments("one block", heads, torch.float32)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    douts = [torch.randn_like(tensors[0])]
    attend = lambda q, k, v: in_blocks(q, k, v, *lengths, scale=0.7)
    for g, t in zip(
        outputs_and_grads(attend, (*strided,), douts), outputs_and_grads(attend, (*tensors,), douts), strict=True
    ):
        torch.testing.assert_close(g, t)


@HEADS
def test_gradients_are_those_of_the_function(heads):
    tensors, lengths = arguments("one block", heads, torch.float64, head_dim=2)
    assert torch.autograd.gradcheck(lambda q, k, v: in_blocks(q, k, v, *lengths, scale=0.7), tensors)


def test_keeps_queries_keys_and_values_only():
    (q, k, v), lengths = arguments("several blocks", (6, 2), torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        in_blocks(q, k, v, *lengths, scale=0.7)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (q, k, v)]


def test_runs_on_fake_tensors():
    lengths_q, lengths_k, keys = branches(40, 700, 100)
    blocks = QueryBlocks.build(lengths_q, lengths_k, keys, num_heads=4)
    tensors = [torch.randn(840, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    rest = (blocks.gathered, blocks.hidden, blocks.bounds, 0.7)
    torch.library.opcheck(MODULE._causal_attention, (*tensors, *rest))
    tensors = [x.detach() for x in (tensors[0], *tensors)]
    torch.library.opcheck(MODULE._causal_attention_bwd, (*tensors, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.bfloat16)}, "q must be torch.float32 or torch.float64"),
        ({"q": torch.zeros(3, 3, 8)}, "a multiple of the heads of k, got 3 and 2"),
        ({"q": torch.zeros(4, 4, 8)}, "blocks must be of the 4 queries and 5 keys, got 3 and 5"),
        ({"k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8)}, "blocks must be of the 3 queries and 4 keys, got 3 and 5"),
        ({"k": torch.zeros(5, 2, 6)}, r"k must have shape \(5, 2, 8\)"),
        ({"v": torch.zeros(5, 2, 6)}, r"v must have shape \(5, 2, 8\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refuses(change, message):
    blocks = QueryBlocks.build((2, 1), (4, 1), np.arange(5), num_heads=4)
    right = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    with pytest.raises(ValueError, match=message):
        causal_attention(**{**right, **change}, blocks=blocks, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_q": (0, 3)}, "from 1 query to as many as keys, got 0 and 4"),
        ({"lengths_q": (1, 2)}, "from 1 query to as many as keys, got 2 and 1"),
        ({"lengths_k": (4, 2)}, "lengths_k must sum to the 5 keys, got 6"),
        ({"keys": np.array([0, 1, 1, 2, 0])}, "keys of a sequence must ascend, but key 2 does not"),
        ({"keys": np.array([0, 1, 2, 3, -1])}, "keys must not be negative, got -1"),
        ({"both_ways": [True]}, "both_ways must have an entry for each of 2 sequences, got 1"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_blocks(change, message):
    right = {"lengths_q": (2, 1), "lengths_k": (4, 1), "keys": np.arange(5)}
    with pytest.raises(ValueError, match=message):
        QueryBlocks.build(**{**right, **change}, num_heads=1)
