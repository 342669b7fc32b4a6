"""Every way to attend over a forest sees the same: blocks that look both ways, windows, queries of the last layer."""

import pytest
import torch
from torch import Tensor

from vapr.batches.sequences import SegmentAttention, last_queries
from vapr.model import attention
from vapr_kernels import naive
from vapr_kernels.gather_rows import RowIndex

LENGTHS = [(5, 5), (9, 14), (20, 34), (6, 20)]  # text, a block, the rest of a path; another path's end
KEYS = [*range(5), *range(14), *range(34), *range(14), *range(34, 40)]
SEGMENTS = SegmentAttention(
    cu_seqlens_q=torch.tensor([0, 5, 14, 34, 40]).int(),
    cu_seqlens_k=torch.tensor([0, 5, 19, 53, 73]).int(),
    lengths_q=tuple(q for q, _ in LENGTHS),
    lengths_k=tuple(k for _, k in LENGTHS),
    keys=RowIndex.build(torch.tensor(KEYS), 40),
    both_ways=(False, True, False, False),
)


def flash_by_its_words(q, k, v, bounds, *, scale, causal, backend, window=None) -> Tensor:
    """What FlashAttention's documentation says it computes, with explicit masks."""
    cu_q, cu_k, max_q, max_k = bounds
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths_q), max(lengths_k))
    kinds = [not causal] * len(lengths_q)
    return naive.causal_attention(q, k, v, lengths_q, lengths_k, scale=scale, both_ways=kinds, window=window)


@pytest.mark.parametrize("window", [None, 1, 7, 12, 100])
@pytest.mark.parametrize("some", [False, True], ids=["all queries", "last queries"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_all_ways_agree(some, window, heads, monkeypatch):
    q, k, v = (torch.randn(40, h, 8, dtype=torch.float64) for h in (heads[0], heads[1], heads[1]))
    only = last_queries(torch.tensor([16, 17, 30, 39]).numpy(), SEGMENTS.lengths_q) if some else None
    rows = torch.arange(40) if only is None else only.tokens
    lengths_q = SEGMENTS.lengths_q if only is None else only.lengths
    gathered = k[SEGMENTS.keys.rows], v[SEGMENTS.keys.rows]
    truth = naive.causal_attention(
        q[rows], *gathered, lengths_q, SEGMENTS.lengths_k, scale=0.3, both_ways=SEGMENTS.both_ways, window=window
    )
    monkeypatch.setattr(attention, "_varlen", flash_by_its_words)
    options = {"scale": 0.3, "only": only, "window": window}
    for backend in ("sdpa", "varlen"):
        out = attention.segment_attention(q[rows], k, v, SEGMENTS, backend=backend, **options)
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(attention, "_attends_by_products", lambda q: False)  # as in half precision, and on a GPU
    out = attention.segment_attention(q[rows], k, v, SEGMENTS, backend="sdpa", **options)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


def test_a_window_hands_flash_attention_one_key_less():
    """It counts keys before the query's own; transformers counts that one, too."""
    seen = {}

    def flash(*arguments, **options):
        seen.update(options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "_flash_attn", lambda: flash)
        bounds = (None, None, 1, 1)
        attention._varlen(None, None, None, bounds, scale=1.0, causal=True, backend="flash-attn", window=5)
        assert seen == {"softmax_scale": 1.0, "causal": True, "window_size": (4, 0)}
        attention._varlen(None, None, None, bounds, scale=1.0, causal=False, backend="flash-attn", window=5)
        assert seen == {"softmax_scale": 1.0, "causal": False, "window_size": (4, -1)}


def test_where_varlen_lacks_something(monkeypatch):
    gpu = torch.device("cuda")
    choose = lambda wanted="auto", **needs: attention.choose_backend(wanted, gpu, torch.bfloat16, **needs)
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset({"is_causal"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choose() == "varlen" and choose(windows=True) == choose(head_dim=256) == "sdpa"
    with pytest.raises(attention.UserError, match="varlen knows no windows in torch"):
        choose("varlen", windows=True)
    with pytest.raises(attention.UserError, match="varlen knows no gradient for heads of 256 on this GPU"):
        choose("varlen", head_dim=256)
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset({"window_size"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(windows=True, head_dim=256) == "varlen"
