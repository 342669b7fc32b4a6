"""Figures as tables write them."""

from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]


def percent(figure: Result | None, *, signed: bool = False) -> str:
    """Write a share in percent with its interval: ``86.2 [85.1, 87.3]``; empty for none."""
    if figure is None or figure["value"] is None:
        return ""
    return _written(figure, 100.0, 1, signed)


def plain(figure: Result | None, *, signed: bool = False) -> str:
    """Write a figure that is no share, with its interval; empty for none."""
    if figure is None or figure["value"] is None:
        return ""
    return _written(figure, 1.0, 2, signed)


def own(figure: Result | None, *, signed: bool = False) -> str:
    """Write a benchmark's own figure; one that may be a share gets as many digits as papers give."""
    if figure is None or figure["value"] is None:
        return ""
    return _written(figure, 1.0, 4 if abs(figure["value"]) <= 1 else 2, signed)


def _written(figure: Result, factor: float, decimals: int, signed: bool) -> str:
    value = decimal(factor * figure["value"], decimals, signed)
    if not figure.get("interval"):
        return value
    low, high = (decimal(factor * bound, decimals, signed) for bound in figure["interval"])
    return f"{value} [{low}, {high}]"


def decimal(value: float, decimals: int, signed: bool) -> str:
    """Write a number; one that rounds to zero has no sign."""
    rounded = round(value, decimals) or 0.0
    return f"{rounded:+.{decimals}f}" if signed and rounded else f"{rounded:.{decimals}f}"


def p_text(p: float) -> str:
    """Write a p value in two digits, and a small one as below a bound."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def headline_text(name: str, figure: Result, *, signed: bool = False) -> str:
    """Write a benchmark's headline figure: common ones are shares, its own have their own unit."""
    write = percent if name in ("accuracy", "precision", "recall", "f1") else own
    return f"{name} {write(figure, signed=signed)}"
