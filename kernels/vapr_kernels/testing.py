"""The comparison of an operation with its naive twin, written once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def outputs_and_grads(fn: Callable[..., Tensor], args: tuple[Any, ...], dout: Tensor | None = None) -> list[Tensor]:
    """The output of ``fn(*args)`` and the gradient of every floating-point argument that requires one."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = fn(*args)
    if not leaves:
        return [out]
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def in_dtype(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The same arguments with floating-point tensors cast to ``dtype``, as fresh leaves."""
    return tuple(
        a.detach().to(dtype).requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )


def assert_matches_naive(
    fn: Callable[..., Tensor], naive: Callable[..., Tensor], *args: Any, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """Output and every gradient are within ``slack`` times the error that the dtype itself costs.

    The truth is ``naive`` in fp64; the yardstick is ``naive`` in the dtype of ``args``. ``floor`` (relative to the
    largest true value) allows for another summation order where the yardstick happens to be exact.
    """
    out = fn(*args)
    dout = torch.randn(out.shape, dtype=torch.float64, device=out.device)
    truth = outputs_and_grads(naive, in_dtype(args, torch.float64), dout)
    same_dtype = outputs_and_grads(naive, args, dout)
    got = outputs_and_grads(fn, args, dout)
    names = ["out", *(f"grad[{i}]" for i in range(len(truth) - 1))]
    for name, t, s, g in zip(names, truth, same_dtype, got, strict=True):
        assert g.shape == t.shape, f"{name}: shape {tuple(g.shape)}, not {tuple(t.shape)}"
        assert g.isfinite().all(), f"{name}: not finite"
        if g.numel() == 0:
            continue
        allowed = slack * (s.double() - t).abs().max() + floor * t.abs().max().clamp(min=1.0)
        error = (g.double() - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"
