"""Whether the arms of a case do the same work: otherwise it means nothing that one of them is faster.

Before anything is timed, every arm computes its first step without an update: the loss, which at the start is the same
for any row, and the gradients, which are not. Over the timed steps losses are compared again, updates included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.commit_process import BuildFailed

LOSS_TOLERANCE = 1e-3
"""Largest accepted difference of a step's loss between two arms in fp32, on any step; in bf16, on the first."""

GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest accepted |g - g'| / |g'| of the whole gradient. In bf16 it tells other work, which gives 1 and more, from
rounding: two completions that differ in one word cancel most of what they have in common."""


class Arm(Protocol):
    """What is compared."""

    losses: list[float]

    def first_step(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first step, without an update."""


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The first step of the arm that all others are compared with."""

    arm: str
    loss: float
    gradients: dict[str, Tensor]

    def compare(self, arms: Mapping[str, Arm], dtype: str) -> dict[str, dict[str, Any]]:
        """Compute the first steps of all other arms.

        Returns:
            Fields of their rows by arm: ``first_loss_gap``, ``gradient_gap``, ``compared_with``; and ``refused``, why
            its speed means nothing, where it did other work.
        """
        fields: dict[str, dict[str, Any]] = {}
        for name in arms:
            if name == self.arm:
                continue
            try:
                loss, gradients = arms[name].first_step()
            except BuildFailed as error:  # another commit's failure costs its own rows only
                fields[name] = {"refused": str(error)}
                continue
            loss_gap, gap = abs(loss - self.loss), gradient_gap(gradients, self.gradients)
            fields[name] = {"compared_with": self.arm, "first_loss_gap": loss_gap, "gradient_gap": gap}
            if not loss_gap <= LOSS_TOLERANCE:
                fields[name]["refused"] = f"its first loss differs from {self.arm}'s by {loss_gap:.1e}"
            elif not gap <= GRADIENT_TOLERANCE[dtype]:
                fields[name]["refused"] = f"its first gradient differs from {self.arm}'s by {gap:.1e} of its length"
        return fields


def gradient_gap(gradients: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """|g - g'| / |g'| over all parameters; one that has no gradient has zeros. Lengths over 1 are clipped first."""
    scale, other_scale = clipping(gradients), clipping(others)
    zero = torch.zeros(())
    squares = [
        (scale * gradients.get(name, zero) - other_scale * others.get(name, zero)).square().sum()
        for name in {**gradients, **others}
    ]
    return float(torch.stack(squares).sum().sqrt()) / (other_scale * length(others))


def clipping(gradients: Mapping[str, Tensor]) -> float:
    """Factor that clipping at 1 puts to gradients; one that were clipped already have about 1."""
    return min(1.0, 1.0 / length(gradients))


def length(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean length over all parameters."""
    return float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())


def loss_gap(arms: Mapping[str, Arm], name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Largest difference to TRL's losses, step by step, and whether it is that of rounding.

    Asked of fp32 and rows as shipped only. With full fine-tuning vapr's online arm scores the reference with the policy
    as it is by then, so it may differ.
    """
    if "trl" not in arms or name == "trl" or about["data"] != "as shipped" or about["dtype"] != "float32":
        return {}
    gap = max(abs(ours - theirs) for ours, theirs in zip(arms[name].losses, arms["trl"].losses, strict=True))
    comparable = not (about["tuning"] == "full" and "online" in name)
    return {"loss_gap": gap, "agrees": gap <= LOSS_TOLERANCE if comparable else None}
