"""Segment attention: each token attends to its ancestors and to itself. Registered with transformers by name.

One variable-length call serves the whole forest: keys and values are gathered (ancestors, then the chain itself) and
queries are aligned to the end of their keys. The cost grows with the sum of the squared path lengths, never with the
square of the pack. Where tokens see one another both ways, a second call without the causal triangle serves their
sequences. A window counts tokens of the path, which gathered keys are in the order of.

T = packed tokens, S = attention sequences, K = gathered keys, H = query heads, G = key heads, E = head dim.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vapr.batches.sequences import LastQueries, SegmentAttention
from vapr.errors import UserError
from vapr.to_device import sent
from vapr_kernels import causal_attention, gather_keys_values, gather_rows
from vapr_kernels.rotary import rotary as rotate

LARGE_HEAD = 192
LARGE_HEADS_ON = ((8, 0), (9, 0))
"""Where PyTorch lets FlashAttention differentiate larger heads: elsewhere they do not fit the shared memory."""


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 128, windows: bool = False
) -> str:
    """The backend to use: flash-attn where it imports, PyTorch's varlen FlashAttention on a GPU, else SDPA.

    SDPA, too, where PyTorch's has no windows, or no gradient for so large heads.

    Args:
        wanted: ``auto``, or one of the three.
        device, dtype: of queries, keys and values.
        head_dim: of the language model.
        windows: whether some of its layers see a window only.

    Raises:
        UserError: if the wanted one cannot run here.
    """
    half_precision = dtype in (torch.bfloat16, torch.float16)
    if wanted == "auto":
        if device.type != "cuda" or not half_precision:
            return "sdpa"
        if _flash_attn():
            return "flash-attn"
        return "sdpa" if _varlen_lacks(device, head_dim, windows=windows) else "varlen"
    if wanted in ("flash-attn", "varlen") and (device.type != "cuda" or not half_precision):
        raise UserError(f"policy.attention: {wanted} needs a CUDA device and dtype bfloat16; use auto or sdpa")
    if wanted == "flash-attn" and not _flash_attn():
        raise UserError("policy.attention: flash-attn is not installed; use auto or varlen")
    if wanted == "varlen" and (lacks := _varlen_lacks(device, head_dim, windows=windows)):
        raise UserError(f"policy.attention: varlen knows no {lacks}; use auto or sdpa")
    return wanted


def _varlen_lacks(device: torch.device, head_dim: int, *, windows: bool) -> str | None:
    """Return what a model needs that PyTorch's varlen attention does not have here."""
    if windows and "window_size" not in _varlen_options():
        return f"windows in torch {torch.__version__}"
    if head_dim > LARGE_HEAD and torch.cuda.get_device_capability(device) not in LARGE_HEADS_ON:
        return f"gradient for heads of {head_dim} on this GPU"
    return None


@functools.cache
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentAttention, *, scale: float, backend: str,
    rotary: tuple[Tensor, Tensor] | None = None, only: LastQueries | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention over a forest of segments.

    Args:
        q: queries, shape (T, H, E), or (Q, H, E) for ``only`` some. k, v: keys and values, shape (T, G, E), with H a
            multiple of G.
        segments: the forest's sequences and gathered keys.
        scale: factor of the scores.
        backend: ``flash-attn``, ``varlen`` or ``sdpa``; that is causal_attention on a CPU in fp32 or fp64.
        rotary: cosines and sines, each (T, E), to rotate q and k by; None if that was done.
        only: which queries there are; None: all.
        window: how many tokens of its path a token sees up to its own; None: all.

    Returns:
        The shape of ``q``: what each token would get within its own path.
    """
    lengths_q, cu_seqlens_q = segments.lengths_q, segments.cu_seqlens_q
    if only is not None:
        lengths_q, cu_seqlens_q = only.lengths, only.cu_seqlens
    if window is not None and window >= max(segments.lengths_k):
        window = None  # it hides nothing
    see: dict[str, Any] = {"scale": scale, "window": window}
    by_products = backend == "sdpa" and _attends_by_products(q)
    branches = segments.branches if by_products else None
    keys, lengths_k = (segments.keys, segments.lengths_k) if branches is None else (branches.keys, branches.lengths_k)
    if rotary is not None:
        q = rotate(q, *(rotary if only is None else (table.index_select(0, only.tokens) for table in rotary)))
    if keys is None:
        k, v = k if rotary is None else rotate(k, *rotary), v.contiguous()  # a part of a wider tensor would keep it all
    elif rotary is not None:
        k, v = gather_keys_values(k, v, *rotary, keys)  # (K, G, E)
    else:
        k, v = gather_rows(k, keys), gather_rows(v, keys)
    if branches is not None:
        return causal_attention(q, k, v, lengths_q, lengths_k, forks=branches.forks, **see)
    if by_products:
        return causal_attention(q, k, v, lengths_q, lengths_k, both_ways=segments.both_ways, **see)
    if backend == "sdpa":
        if q.is_cuda and k.shape[1] != q.shape[1]:
            # SDPA's memory-efficient kernel, the one for fp32, knows no grouped key heads.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return _sdpa(q, k, v, lengths_q, lengths_k, both_ways=segments.both_ways, **see)
    call = functools.partial(_varlen, scale=scale, backend=backend, window=window)
    if segments.both_ways is not None:
        return _by_kind(q, k, v, lengths_q, lengths_k, segments.both_ways, call)
    bounds = (cu_seqlens_q, segments.cu_seqlens_k, max(lengths_q), max(lengths_k))
    return call(q, k, v, bounds, causal=True)


def _attends_by_products(q: Tensor) -> bool:
    """Return whether SDPA is causal_attention for such queries."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


def _by_kind(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...],
    both_ways: tuple[bool, ...], call: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Serve causal sequences in one call of FlashAttention, and those that look both ways in another."""
    splits = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    outs: dict[int, Tensor] = {}
    for kind in set(both_ways):
        numbers = [n for n, later in enumerate(both_ways) if later == kind]
        count_q, count_k = (tuple(lengths[n] for n in numbers) for lengths in (lengths_q, lengths_k))
        bounds = (_cumulative(count_q, q.device), _cumulative(count_k, q.device), max(count_q), max(count_k))
        out = call(*(torch.cat([parts[n] for n in numbers]) for parts in splits), bounds, causal=not kind)
        outs |= zip(numbers, out.split(count_q), strict=True)
    return torch.cat([outs[n] for n in range(len(both_ways))])


@functools.lru_cache(maxsize=32)  # every layer of a batch asks for the same ones
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return sent(torch.tensor([0, *lengths]).cumsum(0).int(), device)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor, int, int], *,
    scale: float, causal: bool, backend: str, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Call FlashAttention; ``bounds`` are cumulative lengths and longest lengths, of queries and of keys."""
    cu_q, cu_k, max_q, max_k = bounds
    window_size = (-1 if window is None else window - 1, 0 if causal else -1)  # keys before and behind the query's own
    if backend == "flash-attn":
        return _flash_attn()(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, window_size=window_size
        )
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    if "window_size" in _varlen_options():
        options["window_size"] = window_size
    else:
        assert window is None  # choose_backend saw to it
        options["is_causal"] = causal
    if k.shape[1] != q.shape[1] and "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True  # torch 2.11 has no such option: its FlashAttention always takes grouped heads
    if cu_k is cu_q:
        # For one tensor in both places newer versions of PyTorch may take cuDNN, whose results are not those of
        # FlashAttention and whose causal masks start at the first key.
        cu_k = cu_k.view_as(cu_k)
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp was asked for
    return out


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], *, scale: float,
    both_ways: tuple[bool, ...] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Call PyTorch's attention once per sequence: in half precision on a CPU, in fp32 on a GPU."""
    outs = []
    splits = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    for q_n, k_n, v_n, later in zip(*splits, both_ways or (False,) * len(lengths_q), strict=True):
        num_q, num_k = len(q_n), len(k_n)
        causal = not later and num_q > 1
        mask = None
        if window is not None and window < num_k:
            mask = _in_window(num_q, num_k, window, q.device, causal=causal)
        elif causal and num_q < num_k:
            mask = _bottom_right(num_q, num_k, q.device)
        q_n, k_n, v_n = (x.transpose(0, 1)[None] for x in (q_n, k_n, v_n))  # (1, H, tokens, E)
        out = F.scaled_dot_product_attention(
            q_n, k_n, v_n, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q_n.shape[1] != k_n.shape[1]
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@functools.lru_cache(maxsize=32)  # every layer of a batch asks for the same ones
def _bottom_right(num_q: int, num_k: int, device: torch.device) -> Tensor:
    """Causal with the last query at the last key; SDPA's own ``is_causal`` aligns to the first."""
    return torch.ones(num_q, num_k, dtype=torch.bool, device=device).tril(num_k - num_q)


@functools.lru_cache(maxsize=32)
def _in_window(num_q: int, num_k: int, window: int, device: torch.device, *, causal: bool) -> Tensor:
    """The keys that are less than ``window`` before the query's own, and if causal not behind it."""
    mask = torch.ones(num_q, num_k, dtype=torch.bool, device=device).triu(num_k - num_q - window + 1)
    return mask.tril_(num_k - num_q) if causal else mask


def _language_model_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    attend: Callable[..., Tensor], scaling: float, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Let transformers' own attention call ``attend``, which its layer was given: segment_attention over a forest."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, E) and twice (T, G, E)
    return attend(q, k, v, scale=scaling)[None], None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float) -> Tensor:
    """Full attention inside each of several sequences laid end to end, on a GPU in half precision.

    Args:
        q, k, v: shape (T, H, E).
        cu_seqlens: int32, where the sequences begin and the last one ends.
        longest: tokens of the longest sequence.
        scale: factor of the scores.

    Returns:
        Shape (T, H, E).
    """
    backend = "flash-attn" if _flash_attn() else "varlen"
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    return _varlen(q, k, v, bounds, scale=scale, causal=False, backend=backend)


def _vision_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    scaling: float, cu_seq_lens_q: Tensor, max_length_q: int, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend inside the images or windows of Qwen's tower."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attention(q, k, v, cu_seq_lens_q, int(max_length_q), scale=scaling)[None], None


LANGUAGE_MODEL = "vapr_segments"


def _image_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    varlen: bool, scaling: float, bounds: tuple[Tensor, tuple[int, ...]] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend inside the images of a tower that lays them end to end.

    ``bounds``: where they begin and the last one ends, on the device, and their lengths. Without it transformers' own
    forward runs the tower (a policy answers while it trains), and masks what lies in other images.
    """
    if bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=False, **kwargs
        )
    cu_seqlens, lengths = bounds
    if varlen:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return varlen_attention(q, k, v, cu_seqlens, max(lengths), scale=scaling)[None], None
    images = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in images]
    return torch.cat(outs, dim=2).transpose(1, 2), None


BY_IMAGE = {"sdpa": "vapr_images", "varlen": "vapr_images_varlen", "flash-attn": "vapr_images_varlen"}
"""Attention of a tower that lays images end to end, for each backend."""

VISION_TOWER = "vapr_flash_vision"  # transformers hands over cu_seqlens only where the name contains "flash"

AttentionInterface.register(LANGUAGE_MODEL, _language_model_attention)
AttentionInterface.register(VISION_TOWER, _vision_attention)
AttentionInterface.register(BY_IMAGE["sdpa"], functools.partial(_image_attention, varlen=False))
AttentionInterface.register(BY_IMAGE["varlen"], functools.partial(_image_attention, varlen=True))
