"""One optimizer step: forward and backward of every pack; and the same forward for held-out pairs.

T = packed tokens, M = completion tokens, P = pairs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vapr.batches.loader import PairLoader
from vapr.batches.packing import PackedBatch
from vapr.batches.steps import Step
from vapr.cache import write_json
from vapr.config import LossConfig
from vapr.errors import UserError
from vapr.interrupts import TrainingStopped
from vapr.model.image_features import ImageFeatures, shared_image_features
from vapr.model.logps import token_logps
from vapr.model.policy import Policy, frozen
from vapr.model.reference import Reference, first_margin
from vapr.training.engine import Engine
from vapr.training.engine_deepspeed import AnyEngine
from vapr.training.metrics import Totals
from vapr.training.out_of_memory import CacheCounts, FittingPacks
from vapr.training.ranks import Ranks
from vapr_kernels import naive, preference_loss


def train_step(
    policy: Policy, engine: AnyEngine, reference: Reference | None, step: Step, loss: Sequence[LossConfig],
    features: ImageFeatures | None = None, fitting: FittingPacks | None = None,
) -> tuple[dict[str, Any], list[tuple[int, float]]]:  # fmt: skip
    """Run forward and backward of every pack of a step; the update is the caller's.

    Args:
        policy: the model being trained.
        engine: accumulates the gradients.
        reference: None if no loss needs one.
        step: at least one pair.
        loss: terms whose weighted sum is taken.
        features: cache of image features, where the tower is frozen.
        fitting: the run's limit on packs that do not fit the GPU; None: one of this step's own.

    Returns:
        The values to log (means over the step's pairs), and (row number, margin) of every pair; of all ranks' pairs.
    """

    def use(pack: PackedBatch) -> Scored:
        scored, losses = _score_pack(policy, reference, pack, step, loss, features)
        if losses.requires_grad:  # not where only the tower is trained and no pair of the pack has an image
            engine.backward(losses.sum() / step.num_pairs)
        return scored

    counts = CacheCounts(reference, features)

    def again() -> None:
        if isinstance(engine, Engine):  # DeepSpeed's passes are not run again
            engine.forget_gradients()
        counts.restore()

    def run_packs() -> list[Scored]:
        return (fitting or FittingPacks(halves=not engine.is_sharded)).each(step.batches, use, again)

    scored = policy.passes.together(run_packs, engine.ranks.agree, len(step.batches))
    values = {
        **_totals(scored, loss).means(engine.ranks),
        "grad_norm": float(engine.gradient_norm()),  # waits for the device
        "lr": engine.lr,
        "pairs": step.num_pairs,
        "tokens": step.num_tokens,
        "tokens_saved": step.num_tokens_unshared - step.num_tokens,
    }
    margins = [one.rewards[:, 0] - one.rewards[:, 1] for one in scored]
    rows = np.empty((len(step.pairs), 2))
    rows[:, 0] = [number for one in scored for number in one.numbers]
    rows[:, 1] = torch.cat(margins).tolist() if margins else []
    return values, [(int(number), float(margin)) for number, margin in engine.ranks.gather_rows(rows)]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A pack of P pairs as it was scored."""

    numbers: list[int]  # of its rows
    losses: Tensor  # (P,)
    rewards: Tensor  # (P, 2), chosen first, or (P, 5) where a loss compares images
    logps: Tensor  # (P, 2)


def _totals(scored: Sequence[Scored], loss: Sequence[LossConfig]) -> Totals:
    totals = Totals(loss)
    for one in scored:
        totals.add(one.losses, one.rewards, one.logps)
    return totals


def steps_of_all(ranks: Ranks, steps: Iterator[Step]) -> Iterator[Step]:
    """Yield this rank's steps as all ranks come to them, with counts of all ranks' pairs and tokens.

    Raises:
        UserError: on every rank, where one of them finds a row that cannot be used.
    """
    while (step := ranks.agree(lambda: next(steps, None))) is not None:
        counts = (step.num_pairs, step.num_chosen_tokens, step.num_tokens, step.num_tokens_unshared)
        pairs, chosen_tokens, tokens, unshared = ranks.gather(counts).sum(axis=0).tolist()
        yield dataclasses.replace(
            step, num_pairs=int(pairs), num_chosen_tokens=chosen_tokens, num_tokens=int(tokens),
            num_tokens_unshared=int(unshared),
        )  # fmt: skip


def score(
    policy: Policy, reference: Reference | None, batch: PackedBatch, step: Step, loss: Sequence[LossConfig],
    features: ImageFeatures | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute log-probs, losses and rewards of a pack on the policy's device.

    Returns:
        Policy log-probs (P, 2), chosen first; weighted losses (P,); rewards (P, 2), detached and scaled by beta;
        (P, 5) where a loss compares images.
    """
    shared = shared_image_features(policy, batch, features)
    reference_logps = reference.logps(batch, shared) if reference is not None else None  # (M,)
    logps = token_logps(policy, batch, shared, reference_logps)  # (L,)
    fused_or_naive = preference_loss if policy.kernels else naive.preference_loss
    losses, rewards, completion_logps = fused_or_naive(
        logps, reference_logps, batch.completions, loss,
        mean_chosen_length=(step.num_chosen_tokens or 1.0) / step.num_pairs,
    )  # fmt: skip
    return completion_logps, losses, rewards


def _score_pack(
    policy: Policy, reference: Reference | None, pack: PackedBatch, step: Step, loss: Sequence[LossConfig],
    features: ImageFeatures | None,
) -> tuple[Scored, Tensor]:  # fmt: skip
    """Score a pack that is on the CPU; return its figures, and its losses (P,) with their graph."""
    logps, losses, rewards = score(policy, reference, pack.to(policy.device), step, loss, features)
    return Scored([pair.number for pair in pack.pairs], losses.detach(), rewards, logps.detach()), losses


def evaluate(
    policy: Policy, reference: Reference | None, held_out: PairLoader, loss: Sequence[LossConfig],
    features: ImageFeatures | None, ranks: Ranks, note: Callable[[str], None], fitting: FittingPacks | None = None,
) -> dict[str, float]:  # fmt: skip
    """Compute the training metrics on held-out pairs, which the ranks divide among them, without gradients.

    ``note`` is shown how far it is before every pack; ``fitting`` is as in :func:`train_step`.

    Returns:
        ``eval/...`` -> mean over the pairs; empty if none could be used.
    """
    totals = Totals(loss)
    fitting = fitting or FittingPacks()

    def run_packs(step: Step) -> None:
        def use(pack: PackedBatch) -> Scored:
            note(f"scoring held-out pairs {totals.num_pairs * ranks.size}/{held_out.pairs_per_epoch}")
            return _score_pack(policy, reference, pack, step, loss, features)[0]

        for one in fitting.each(step.batches, use, CacheCounts(reference, features).restore):
            totals.add(one.losses, one.rewards, one.logps)

    with frozen(policy):
        for step in steps_of_all(ranks, held_out.steps(0, held_out.steps_per_epoch)):
            policy.passes.together(functools.partial(run_packs, step), ranks.agree)
            note(f"scoring held-out pairs {totals.num_pairs * ranks.size}/{held_out.pairs_per_epoch}")
    if not ranks.gather([totals.num_pairs]).any():  # no reason to lose a trained model
        reasons = [reason for part in ranks.gather_objects(list(held_out.skipped.values())) for reason in part]
        print(f"data.eval: no pair could be used; the first: {reasons[0]}")
        return {}
    return {f"eval/{name}": value for name, value in totals.means(ranks).items()}


def check_first_margin(
    policy: Policy, reference: Reference, step: Step, tolerance: float | None, ranks: Ranks,
    say: Callable[[str], None], fitting: FittingPacks | None = None,
) -> None:  # fmt: skip
    """Raise UserError if the policy differs from its reference before the first update by more than rounding.

    ``tolerance`` bounds the |log-ratio| of a completion; None takes what :func:`first_margin` measures. ``fitting`` is
    as in :func:`train_step`.
    """
    counts, fitting = CacheCounts(reference), fitting or FittingPacks()
    found = policy.passes.together(lambda: first_margin(policy, reference, step.batches, fitting.each), ranks.agree)
    margins = ranks.gather(found)
    largest, allowed = margins[(margins[:, 0] / margins[:, 1]).argmax()].tolist()
    counts.restore()  # the step itself looks the same values up again
    allowed = tolerance or allowed
    say(f"first step: largest |log-ratio| to the reference {largest:.2e} (tolerance {allowed:.2e})")
    if not largest <= allowed:
        raise UserError(
            f"the policy differs from its reference before the first update: |log-ratio| {largest:.2e} exceeds "
            f"{allowed:.2e}; delete {reference.folder}, or raise reference.tolerance if you know why"
        )


def stop_unless_finite(values: dict[str, Any], step: Step, number: int, run_dir: Path, ranks: Ranks) -> None:
    """Raise TrainingStopped if the loss or the gradient is not finite, with the step's pairs listed in a file."""
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return
    parts = ranks.gather_objects([f"{pair.where} ({pair.id})" for pair in step.pairs])
    rows = [row for part in parts for row in part]
    listed = run_dir / f"not-finite-step-{number:06d}.json"
    if ranks.is_first:
        write_json(listed, {"step": number, **{name: str(values[name]) for name in bad}, "pairs": rows})
    ranks.agreed = True
    raise TrainingStopped(
        f"step {number}: {' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite; stopped before the update, "
        f"checkpoints are kept. Pairs of this step ({listed}): {', '.join(rows[:8])}"
        + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    )
