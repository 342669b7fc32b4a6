"""The comparison of an operation with its naive twin, written once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


def outputs_and_grads(
    fn: Callable[..., Outputs], args: tuple[Any, ...], douts: list[Tensor] | None = None
) -> list[Tensor]:
    """Return the outputs of ``fn(*args)`` and the gradient of every argument that requires one, in their own shapes."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outs = as_tuple(fn(*args))
    if not leaves:
        return [*outs]
    douts = [torch.ones_like(out) for out in outs] if douts is None else douts
    douts = [dout.to(out.dtype) for dout, out in zip(douts, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)]


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """Return the outputs of a function that returns one tensor or several, of any shape, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def in_dtype(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the same arguments with floating-point tensors cast to ``dtype``, as fresh leaves."""
    return tuple(
        a.detach().to(dtype).requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )


def assert_matches_naive(
    fn: Callable[..., Outputs], naive: Callable[..., Outputs], *args: Any, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """Assert that every output and gradient is within ``slack`` times the error that the dtype itself costs.

    The truth is ``naive`` in fp64; the yardstick is ``naive`` in the dtype of ``args``. ``floor`` (relative to the
    largest true value) allows for another summation order where the yardstick happens to be exact.
    """
    outs = as_tuple(naive(*args))
    douts = [torch.randn(out.shape, dtype=torch.float64, device=out.device) for out in outs]
    truth = outputs_and_grads(naive, in_dtype(args, torch.float64), douts)
    same_dtype = outputs_and_grads(naive, args, douts)
    got = outputs_and_grads(fn, args, douts)
    names = [*(f"out[{i}]" for i in range(len(outs))), *(f"grad[{i}]" for i in range(len(truth) - len(outs)))]
    for name, t, s, g in zip(names, truth, same_dtype, got, strict=True):
        assert g.shape == t.shape, f"{name}: shape {tuple(g.shape)}, not {tuple(t.shape)}"
        assert g.dtype == s.dtype, f"{name}: {g.dtype}, not {s.dtype}"
        assert g.isfinite().all(), f"{name}: not finite"
        if g.numel() == 0:
            continue
        allowed = slack * (s.double() - t).abs().max() + floor * t.abs().max().clamp(min=1.0)
        error = (g.double() - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"
