"""exp_logits: rows of an LM head as exponentials relative to the target, in one matrix product.

With l = x . W^T, target column y, d_v = l_v - l_y and a whole number of octaves o per row:

    e_v = 2^(d_v log2(e) - o)  for v != y,   e_y = 0
    total = sum of e over v,   largest = max of l_v over v != y
    t     = log total + o log 2    (log-odds of "anything but y", see linear_logps)

Tensor cores truncate where they add, at every step, so a long sum drifts towards zero. Here they add up the products of
one block of D; the blocks are added by ordinary fp32 additions, which round.

No column has to be seen before another, so there is no running maximum, no second pass over the logits, and e @ W is a
plain matrix product. The price is the range: e has to fit fp32. A row whose total leaves [2^-100, 2^100] is listed on
the device and computed again with o from its largest logit. The host never waits to know.

L = rows (predictions), D = hidden, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.launch import operand, rounded, tl, triton
from vapr_kernels.row_stats import LOG2E, RowStats, base_of, is_unsafe, safe_offset, store_row_stats
from vapr_kernels.target_logits import target_logits


class Tile(NamedTuple):
    """What one program computes at a time, and with how many warps and stages of prefetching."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


TILES = {  # by compute capability
    0: Tile(16, 32, 16, 4, 1),  # the interpreter
    80: Tile(128, 128, 64, 8, 4),
    86: Tile(128, 128, 64, 8, 3),
    89: Tile(128, 128, 64, 8, 3),
    90: Tile(128, 128, 128, 8, 3),
    120: Tile(128, 128, 64, 8, 3),
}
FP32_TILE = Tile(64, 64, 32, 4, 2)
"""Exact fp32 products have no tensor cores to feed and need registers instead."""


@triton.jit
def _exponentials(acc, rows, live, cols, V, labels_ptr, target_ptr, offsets_ptr):
    """Return the logits (minus infinity in the target's column and past the last one) and their exponentials."""
    label = tl.load(labels_ptr + rows, mask=live, other=-1)
    target = tl.load(target_ptr + rows, mask=live, other=0.0)
    offset = tl.load(offsets_ptr + rows, mask=live, other=0.0)
    high, low = base_of(target, offset)
    # The target is left out by its column, never by its value: ties must survive.
    others = (cols[None, :] != label[:, None]) & (cols < V)[None, :]
    logits = tl.where(others, acc, float("-inf"))
    return logits, tl.exp2(((logits - high[:, None]) - low[:, None]) * LOG2E)


@triton.jit
def _store_partials(logits, exps, stored, tile_n, num_tiles, rows, live, L, partials_ptr, WITH_EXPS: tl.constexpr):
    """Store what one tile of columns adds to each row: planes of (tiles, L) with sums, maxima and sums as stored."""
    plane = tl.cast(num_tiles, tl.int64) * L
    at = partials_ptr + tile_n.to(tl.int64) * L + rows
    tl.store(at, tl.sum(exps, 1), mask=live)
    tl.store(at + plane, tl.max(logits, 1), mask=live)
    if WITH_EXPS:
        tl.store(at + 2 * plane, tl.sum(stored.to(tl.float32), 1), mask=live)


@launch.Kernel
def _exp_logits_kernel(
    x_ptr,  # (L, D)
    w_ptr,  # (V, D)
    labels_ptr,  # (L,)
    target_ptr,  # (L,) fp64
    offsets_ptr,  # (L,)
    unsafe_ptr,  # (L,) rows to compute, if LISTED
    num_unsafe_ptr,  # (1,)
    e_ptr,  # (L, V), rows stride_e apart
    partials_ptr,  # planes of (tiles, L)
    L,
    V,
    D,
    stride_e,
    zero,  # 0.0
    LISTED: tl.constexpr,
    WITH_EXPS: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_rows = tl.load(num_unsafe_ptr) if LISTED else L
    num_row_tiles = tl.cdiv(num_rows, BLOCK_L)
    # Tiles of rows first: programs that run together read the same rows of W.
    for tile in range(tl.program_id(0), num_row_tiles * tl.cdiv(V, BLOCK_V), tl.num_programs(0)):
        tile_n = tile // num_row_tiles
        rows = (tile % num_row_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
        live = rows < num_rows
        if LISTED:
            rows = tl.load(unsafe_ptr + rows, mask=live, other=0)
        cols = tile_n * BLOCK_V + tl.arange(0, BLOCK_V)
        # Rows and columns past the end read the last one instead of carrying a mask through the loop.
        k = tl.arange(0, BLOCK_D)
        x_tile_ptr = x_ptr + tl.minimum(rows, L - 1).to(tl.int64)[:, None] * D + k[None, :]
        w_tile_ptr = w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * D + k[:, None]
        acc = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
        zeros = tl.full((BLOCK_L, BLOCK_V), zero, tl.float32)  # known to be 0, it would be folded into one long sum
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(x_tile_ptr + start)
                w = tl.load(w_tile_ptr + start)
            else:
                x = tl.load(x_tile_ptr + start, mask=(start + k < D)[None, :], other=0.0)
                w = tl.load(w_tile_ptr + start, mask=(start + k < D)[:, None], other=0.0)
            acc += tl.dot(operand(x), operand(w), zeros, input_precision="ieee")
        logits, exps = _exponentials(acc, rows, live, cols, V, labels_ptr, target_ptr, offsets_ptr)
        stored = rounded(exps, x_ptr.dtype.element_ty)
        num_tiles = tl.cdiv(V, BLOCK_V)
        _store_partials(logits, exps, stored, tile_n, num_tiles, rows, live, L, partials_ptr, WITH_EXPS)
        if STORE_EXPS:
            at = rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
            tl.store(e_ptr + at, stored, mask=live[:, None] & (cols < V)[None, :])


@launch.Kernel
def _exp_logits_tma_kernel(
    x_desc,  # (L, D)
    w_desc,  # (V, D)
    labels_ptr,
    target_ptr,
    offsets_ptr,
    e_desc,  # (L, V)
    partials_ptr,
    L,
    V,
    D,
    zero,  # 0.0
    WITH_EXPS: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same through Hopper's tensor memory accelerator, which reads zeros past the end and stores nothing there."""
    num_row_tiles = tl.cdiv(L, BLOCK_L)
    for tile in range(tl.program_id(0), num_row_tiles * tl.cdiv(V, BLOCK_V), tl.num_programs(0)):
        tile_n = tile // num_row_tiles
        first_row, first_col = (tile % num_row_tiles) * BLOCK_L, tile_n * BLOCK_V
        acc = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
        zeros = tl.full((BLOCK_L, BLOCK_V), zero, tl.float32)  # known to be 0, it would be folded into one long sum
        for start in range(0, D, BLOCK_D):
            x = x_desc.load([first_row, start])
            w = w_desc.load([first_col, start])
            acc += tl.dot(operand(x), operand(w).T, zeros, input_precision="ieee")
        rows = first_row + tl.arange(0, BLOCK_L)
        live = rows < L
        cols = first_col + tl.arange(0, BLOCK_V)
        logits, exps = _exponentials(acc, rows, live, cols, V, labels_ptr, target_ptr, offsets_ptr)
        stored = rounded(exps, x_desc.dtype)
        num_tiles = tl.cdiv(V, BLOCK_V)
        _store_partials(logits, exps, stored, tile_n, num_tiles, rows, live, L, partials_ptr, WITH_EXPS)
        if STORE_EXPS:
            e_desc.store([first_row, first_col], stored)


@launch.Kernel
def _settle_kernel(
    partials_ptr,  # planes of (tiles, L)
    target_ptr,  # (L,) fp64
    offsets_ptr,  # (L,), replaced in unsafe rows
    unsafe_ptr,  # (L,), the rows to settle, if LISTED
    num_unsafe_ptr,  # (1,)
    is_unsafe_ptr,  # (L,), written unless LISTED
    out_ptr,  # (3, L)
    L,
    num_tiles,
    LISTED: tl.constexpr,
    WITH_EXPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    num_rows = tl.load(num_unsafe_ptr) if LISTED else L
    for start in range(tl.program_id(0) * BLOCK_L, num_rows, tl.num_programs(0) * BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        live = rows < num_rows
        if LISTED:
            rows = tl.load(unsafe_ptr + rows, mask=live, other=0)
        total = tl.zeros((BLOCK_L,), tl.float32)
        largest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
        stored = tl.zeros((BLOCK_L,), tl.float32)
        plane = tl.cast(num_tiles, tl.int64) * L
        for first in range(0, num_tiles, BLOCK_TILES):
            n = first + tl.arange(0, BLOCK_TILES)
            at = partials_ptr + n.to(tl.int64)[:, None] * L + rows[None, :]
            inside = (n < num_tiles)[:, None] & live[None, :]
            total += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            largest = tl.maximum(largest, tl.max(tl.load(at + plane, mask=inside, other=float("-inf")), 0))
            if WITH_EXPS:
                stored += tl.sum(tl.load(at + 2 * plane, mask=inside, other=0.0), 0)
        offset = tl.load(offsets_ptr + rows, mask=live, other=0.0)
        store_row_stats(total, stored if WITH_EXPS else total, offset, rows, live, out_ptr, L)
        if not LISTED:
            unsafe = is_unsafe(total)
            target = tl.load(target_ptr + rows, mask=live, other=0.0)
            tl.store(is_unsafe_ptr + rows, unsafe.to(tl.int32), mask=live)
            tl.store(offsets_ptr + rows, safe_offset(largest, target), mask=live & unsafe)


@launch.Kernel
def _list_kernel(
    is_unsafe_ptr,  # (L,)
    unsafe_ptr,  # (L,), written: the unsafe rows, ascending
    num_unsafe_ptr,  # (1,), written
    L,
    BLOCK_L: tl.constexpr,
):
    count = 0
    for start in range(0, L, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        unsafe = tl.load(is_unsafe_ptr + rows, mask=rows < L, other=0)
        tl.store(unsafe_ptr + count + tl.cumsum(unsafe, 0) - 1, rows, mask=unsafe > 0)
        count += tl.sum(unsafe, 0)
    tl.store(num_unsafe_ptr, count)


@dataclass(slots=True, eq=False)
class _Scratch:
    """What the kernels of one call hand to one another."""

    target: Tensor  # (L,) fp64
    offsets: Tensor  # (L,)
    partials: Tensor  # planes of (tiles, L), see _store_partials
    flags: Tensor  # (L,) int32
    unsafe: Tensor  # (L,) int32
    num_unsafe: Tensor  # (1,) int32


def tile_for(x: Tensor) -> Tile:
    """Return the tile shipped for the device and the dtype of ``x``, shape (L, D)."""
    capability = launch.capability(x.device)
    if x.dtype == torch.float32 and capability:
        return FP32_TILE
    return TILES.get(capability) or TILES[min(TILES, key=lambda known: (known > capability, abs(known - capability)))]


def exp_logits(
    x: Tensor, w: Tensor, labels: Tensor, offsets: Tensor, exps: Tensor | None, *, with_exps: bool
) -> RowStats:
    """Compute log-prob, odds and scale of each row in one pass over its logits.

    Args:
        x: rows, shape (L, D), contiguous.
        w: LM head, shape (V, D), same dtype as ``x``, contiguous.
        labels: target columns, int64, shape (L,).
        offsets: octaves, whole numbers in fp32, shape (L,); unsafe rows get others.
        exps: where the exponentials are stored if wanted, made by :func:`exp_buffer` in the dtype of ``x``.
        with_exps: whether they will be wanted, now or from :func:`exponentials`: ``scale`` then fits them as stored.
    """
    tile = tile_for(x)
    num_rows, num_tiles = len(x), triton.cdiv(len(w), tile.columns)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=x.device)
    scratch = _Scratch(
        target=target_logits(x, w, labels),
        offsets=offsets.clone(),
        partials=new(2 + with_exps, num_tiles, num_rows),
        flags=new(num_rows, dtype=torch.int32),
        unsafe=new(num_rows, dtype=torch.int32),
        num_unsafe=new(1, dtype=torch.int32),
    )
    out = new(3, num_rows)
    # The second time nearly always nothing is listed, and both return at once; asking the device would cost more.
    for listed in (False, True) if num_rows else ():
        _tiles(x, w, labels, scratch, exps, tile, listed=listed, with_exps=with_exps)
        _settle(scratch, out, num_rows, listed=listed, with_exps=with_exps)
        if not listed:
            _list_kernel[(1,)](scratch.flags, scratch.unsafe, scratch.num_unsafe, num_rows, BLOCK_L=1024)
    logps, log_odds, scale = out
    return RowStats(logps, log_odds, scale, scratch.target, scratch.offsets)


def exponentials(x: Tensor, w: Tensor, labels: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
    """Compute the exponentials alone, shape (L, V), where the rows' sums and safe offsets are known already.

    ``w`` may be a slice of the head; labels count from its first row and may lie outside it.
    """
    tile = tile_for(x)
    exps = exp_buffer(len(x), len(w), x.dtype, x.device)
    partials = torch.empty(2, triton.cdiv(len(w), tile.columns), len(x), dtype=torch.float32, device=x.device)
    if len(x):
        none = torch.empty(0, dtype=torch.int32, device=x.device)
        scratch = _Scratch(target, offsets, partials, none, none, none)
        _tiles(x, w, labels, scratch, exps, tile, listed=False, with_exps=False)
    return exps


def exp_buffer(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate room for exponentials, shape (L, V); rows begin at 16-byte boundaries."""
    padded = -(-num_columns // 8) * 8
    return torch.empty(num_rows, padded, dtype=dtype, device=device)[:, :num_columns]


def _tiles(
    x: Tensor, w: Tensor, labels: Tensor, scratch: _Scratch, exps: Tensor | None, tile: Tile, *, listed: bool,
    with_exps: bool,
) -> None:  # fmt: skip
    """Launch the matrix product over all rows, or over the listed ones."""
    if listed:  # few rows, scattered: half the tile leaves registers for their addresses
        tile = tile._replace(rows=max(16, tile.rows // 2))
    L, D = x.shape
    V = len(w)
    num_tiles = triton.cdiv(L, tile.rows) * triton.cdiv(V, tile.columns)
    options: dict[str, Any] = {
        "WITH_EXPS": with_exps,
        "STORE_EXPS": exps is not None,
        "BLOCK_L": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_D": tile.inner,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    rows = (labels, scratch.target, scratch.offsets)
    if not listed and _has_tma(x) and D % 8 == 0 and x.dtype == torch.bfloat16:
        grid = min(num_tiles, launch.num_sms(x.device))
        x_desc = _descriptor(x, D, tile.rows, tile.inner)
        w_desc = _descriptor(w, D, tile.columns, tile.inner)
        e_desc = _descriptor(exps, exps.stride(0), tile.rows, tile.columns) if exps is not None else x_desc
        _exp_logits_tma_kernel[(grid,)](x_desc, w_desc, *rows, e_desc, scratch.partials, L, V, D, 0.0, **options)
        return
    grid = min(num_tiles, 4 * launch.num_sms(x.device)) if listed else num_tiles
    _exp_logits_kernel[(grid,)](
        x, w, *rows, scratch.unsafe, scratch.num_unsafe, x if exps is None else exps, scratch.partials,
        L, V, D, 0 if exps is None else exps.stride(0), 0.0, LISTED=listed, EVEN_D=D % tile.inner == 0, **options,
    )  # fmt: skip


def _has_tma(x: Tensor) -> bool:
    return launch.capability(x.device) == 90


def _descriptor(x: Tensor, stride: int, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [stride, 1], [rows, columns])


def _settle(scratch: _Scratch, out: Tensor, num_rows: int, *, listed: bool, with_exps: bool) -> None:
    block = 32
    grid = 1 if listed else triton.cdiv(num_rows, block)
    _settle_kernel[(grid,)](
        scratch.partials, scratch.target, scratch.offsets, scratch.unsafe, scratch.num_unsafe, scratch.flags, out,
        num_rows, scratch.partials.shape[1], LISTED=listed, WITH_EXPS=with_exps, BLOCK_L=block, BLOCK_TILES=64,
    )  # fmt: skip
