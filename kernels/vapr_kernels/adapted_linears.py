"""Linear layers that read the same rows, and their low-rank adapters: one joint product in each direction.

    y_i = x W_i^T + c_i + s_i (x A_i^T) B_i^T                                             (LoRA: arXiv 2106.09685, 4.1)

The layers' weights and the adapters' first matrices lie below one another in joint matrices, J = [W_1; ..; A_1; ..], so
that x is read once and products as narrow as an adapter's rank are columns of a wide one. The second product of an
adapter is added in the epilogue of the library's matrix product. With D = [dy_1 .. dy_n, ddown_1 .. ddown_n] beside one
another, where ddown_i = s_i dy_i B_i:

    dx   = D J
    dW_i = dy_i^T x              dc_i = sum over tokens of dy_i
    dA_i = ddown_i^T x           dB_i = s_i dy_i^T (x A_i^T)

T = packed tokens, D = input width, O = outputs of all layers, R = ranks of all adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from vapr_kernels.matmul import matmul


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the joint matrix, and the columns of the joint output that it makes."""

    matrix: Callable[[], Tensor]  # (rows, D); called where it is needed, so that it may be restored from fewer bits
    bias: Tensor | None  # (rows,)
    columns: slice


@dataclass(frozen=True)
class Linears:
    """Layers that read the same rows.

    ``parameters`` are the weights, biases, first and second adapter matrices of layer after layer, None where there is
    none; the pieces hold the same values.
    """

    pieces: tuple[Piece, ...]
    weights: tuple[Tensor | None, ...]  # (O_i, D); None: in fewer bits, and frozen
    biases: tuple[Tensor | None, ...]  # (O_i,)
    downs: tuple[Tensor | None, ...]  # A_i (R_i, D)
    ups: tuple[Tensor | None, ...]  # B_i (O_i, R_i)
    scales: tuple[float, ...]
    widths: tuple[int, ...]  # O_i

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return what may be trained, in the order in which :func:`gradients` returns gradients."""
        return (*self.weights, *self.biases, *self.downs, *self.ups)

    @cached_property
    def outputs(self) -> tuple[slice, ...]:
        """Return each layer's columns."""
        ends = list(accumulate(self.widths))
        return tuple(slice(end - width, end) for end, width in zip(ends, self.widths, strict=True))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Return the rank of each layer's adapter; 0: it has none."""
        return tuple(0 if down is None else len(down) for down in self.downs)

    @cached_property
    def inner(self) -> tuple[slice, ...]:
        """Return the columns of each layer's ``x A_i^T``."""
        ends = list(accumulate(self.ranks, initial=self.num_outputs))[1:]
        return tuple(slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True))

    @cached_property
    def num_outputs(self) -> int:
        """Return O."""
        return sum(self.widths)

    @cached_property
    def num_columns(self) -> int:
        """Return O + R."""
        return self.num_outputs + sum(self.ranks)


def project(x: Tensor, linears: Linears, *, adapted: bool, skip: int = 0) -> Tensor:
    """Return outputs and ``x A^T`` of all layers beside one another, (T, O + R), for x (T, D).

    Without adapters the same product is computed, so that an adapter of zeros changes no bit. The outputs of the first
    ``skip`` layers are left out: what is returned begins with the next one's.
    """
    first = sum(linears.widths[:skip])
    pieces = [piece for piece in linears.pieces if piece.columns.stop > first]

    def factors(piece: Piece) -> tuple[Tensor, Tensor | None]:
        rows = slice(max(first - piece.columns.start, 0), None)
        return piece.matrix()[rows].T, None if piece.bias is None else piece.bias[rows]

    if len(pieces) == 1:
        y = matmul(x, *factors(pieces[0]))
    else:
        y = x.new_empty(len(x), linears.num_columns - first)
        for piece in pieces:
            matrix, bias = factors(piece)
            matmul(x, matrix, bias, out=y[:, max(first, piece.columns.start) - first : piece.columns.stop - first])
    if adapted:
        layers = list(zip(linears.outputs, linears.inner, linears.ups, linears.scales, strict=True))
        for columns, inner, up, scale in layers[skip:]:
            if up is not None:
                out = y[:, columns.start - first : columns.stop - first]
                out.addmm_(y[:, inner.start - first : inner.stop - first], up.T, alpha=scale)
    return y


def input_gradient(dy: Tensor, linears: Linears, *, adapted: bool, with_dx: bool) -> Tensor | None:
    """Return the gradient of x, (T, D), from that of all outputs, and leave ``ddown`` beside it.

    Args:
        dy: (T, O + R), the gradients of the outputs in its first O columns; the others are written.
        linears, adapted: as the forward pass had them.
        with_dx: False only writes ``ddown``.
    """
    if adapted:
        for out, inner, up, scale in zip(linears.outputs, linears.inner, linears.ups, linears.scales, strict=True):
            if up is not None:
                torch.mm(dy[:, out], up, out=dy[:, inner])
                dy[:, inner].mul_(scale)
    else:
        dy[:, linears.num_outputs :].zero_()
    dx: Tensor | None = None
    for piece in linears.pieces if with_dx else ():
        part, matrix = dy[:, piece.columns], piece.matrix()
        dx = matmul(part, matrix) if dx is None else dx.addmm_(part, matrix)
    return dx


def gradients(
    dy: Tensor, x: Tensor, down: Tensor, linears: Linears, needed: tuple[bool, ...], *, adapted: bool
) -> list[Tensor | None]:
    """Return the gradients of ``linears.parameters``, None where none is needed.

    Args:
        dy: what :func:`input_gradient` made of it, (T, O + R).
        x: (T, D). down: ``x A^T`` of all layers, (T, R).
        needed: for each parameter.
        adapted: as the forward pass had it.
    """
    num = len(linears.widths)
    weights, biases, downs, ups = (needed[start : start + num] for start in range(0, 4 * num, num))
    if not adapted:
        downs = ups = (False,) * num
    inner = dy[:, linears.num_outputs :].T @ x if any(downs) else None  # (R, D)
    found: list[Tensor | None] = []
    found += [dy[:, out].T @ x if need else None for out, need in zip(linears.outputs, weights, strict=True)]
    found += [dy[:, out].sum(0) if need else None for out, need in zip(linears.outputs, biases, strict=True)]
    for columns, need in zip(linears.inner, downs, strict=True):
        rows = slice(columns.start - linears.num_outputs, columns.stop - linears.num_outputs)
        found.append(inner[rows] if need and inner is not None else None)
    for out, columns, scale, need in zip(linears.outputs, linears.inner, linears.scales, ups, strict=True):
        part = down[:, columns.start - linears.num_outputs : columns.stop - linears.num_outputs]
        found.append((dy[:, out].T @ part).mul_(scale) if need else None)
    return found
