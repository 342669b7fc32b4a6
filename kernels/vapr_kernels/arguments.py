"""One-line errors that name the argument."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect_float(name: str, x: Tensor, letters: str) -> None:
    """Check that ``x`` is a floating-point tensor with one dimension for each of ``letters``, as in ``"(T, D)"``.

    Raises:
        ValueError: naming the argument.
    """
    if x.ndim != letters.count(",") + 1:
        raise ValueError(f"{name} must have shape {letters}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be one of {', '.join(map(str, FLOATS))}, got {x.dtype}")


def expect_like(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, *more_dtypes: torch.dtype) -> None:
    """Check that ``x`` has ``shape``, lies where ``like`` lies, and has its dtype or one of ``more_dtypes``.

    Raises:
        ValueError: naming the argument.
    """
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    dtypes = dict.fromkeys((like.dtype, *more_dtypes))
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must lie on {like.device}, got {x.device}")
