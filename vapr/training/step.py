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
from vapr.training.copied_ahead import CopiedAhead, CopiedPack
from vapr.training.engine import Engine
from vapr.training.engine_deepspeed import AnyEngine
from vapr.training.metrics import Totals
from vapr.training.out_of_memory import CacheCounts, FittingPacks
from vapr.training.ranks import Ranks
from vapr.training.read_late import ReadLate
from vapr_kernels import naive, preference_loss


def train_step(
    policy: Policy, engine: AnyEngine, reference: Reference | None, step: Step, loss: Sequence[LossConfig],
    features: ImageFeatures | None = None, fitting: FittingPacks | None = None,
) -> "TakenStep":  # fmt: skip
    """Give the device forward and backward of every pack of a step; the update is the caller's.

    Nothing is read back: the host may be done long before the device is.

    Args:
        policy: the model being trained.
        engine: accumulates the gradients.
        reference: None if no loss needs one.
        step: at least one pair.
        loss: terms whose weighted sum is taken.
        features: cache of image features, where the tower is frozen.
        fitting: the run's limit on packs that do not fit the GPU; None: one of this step's own.
    """

    def use(pack: CopiedPack) -> Scored:
        scored, losses = _score_pack(policy, reference, pack, step, loss, features)
        engine.backward(losses.sum() / step.num_pairs)
        return scored

    counts = CacheCounts(reference, features)

    def again() -> None:
        if isinstance(engine, Engine):  # DeepSpeed's passes are not run again
            engine.forget_gradients()
        counts.restore()

    def run_packs() -> list[Scored]:
        packs = fitting or FittingPacks(halves=not engine.is_sharded)
        return packs.each(step.batches, use, again, CopiedAhead(policy, reference, features).each)

    scored = policy.passes.together(run_packs, engine.ranks.agree, len(step.batches))
    totals, norm = _totals(scored, loss), engine.gradient_norm()
    margins = [one.rewards[:, 0] - one.rewards[:, 1] for one in scored]
    parts = [norm.to(policy.device)[None], totals.sums(policy.device), *margins]
    known = {
        "lr": engine.lr,
        "pairs": step.num_pairs,
        "tokens": step.num_tokens,
        "tokens_saved": step.num_tokens_unshared - step.num_tokens,
    }
    return TakenStep(
        engine.num_updates + 1, step.num_pairs, tuple((pair.number, pair.id, pair.where) for pair in step.pairs),
        [number for one in scored for number in one.numbers], known, totals,
        ReadLate(torch.cat([part.double() for part in parts])), engine.ranks,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class TakenStep:
    """A step that the device was given, and what there is to tell of it."""

    number: int  # from 1
    num_pairs: int  # of all ranks
    pairs: tuple[tuple[int, str, str], ...]  # this rank's: row number, id, place in the file
    _order: list[int]  # row numbers as their margins come
    _known: dict[str, Any]
    _totals: Totals
    _numbers: ReadLate  # the gradient's norm, the sums of the totals, the margins
    _ranks: Ranks

    def read(self) -> tuple[dict[str, Any], list[tuple[int, float]]]:
        """Wait for the device. Every rank calls it.

        Returns:
            The values to log (means over the step's pairs), and (row number, margin) of every pair; of all ranks'
            pairs.
        """
        norm, *numbers = self._numbers.read()
        num_sums = len(numbers) - len(self._order)
        values = {**self._totals.means_of(numbers[:num_sums], self._ranks), "grad_norm": norm, **self._known}
        rows = np.empty((len(self._order), 2))
        rows[:, 0], rows[:, 1] = self._order, numbers[num_sums:]
        return values, [(int(number), float(margin)) for number, margin in self._ranks.gather_rows(rows)]


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
    features: ImageFeatures | None = None, shared: Tensor | None = None, reference_logps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute log-probs, losses and rewards of a pack on the policy's device.

    Args:
        shared: the image features of the pack that the cache was found to have; None: look them up, or compute them.
        reference_logps: its reference log-probs, (M,), likewise.

    Returns:
        Policy log-probs (P, 2), chosen first; weighted losses (P,); rewards (P, 2), detached and scaled by beta;
        (P, 5) where a loss compares images.
    """
    if shared is None:
        shared = shared_image_features(policy, batch, features)
    if reference is not None and reference_logps is None:
        reference_logps = reference.logps(batch, shared)
    logps = token_logps(policy, batch, shared, reference_logps)  # (L,)
    fused_or_naive = preference_loss if policy.kernels else naive.preference_loss
    losses, rewards, completion_logps = fused_or_naive(
        logps, reference_logps, batch.completions, loss,
        mean_chosen_length=(step.num_chosen_tokens or 1.0) / step.num_pairs,
    )  # fmt: skip
    return completion_logps, losses, rewards


def _score_pack(
    policy: Policy, reference: Reference | None, pack: CopiedPack, step: Step, loss: Sequence[LossConfig],
    features: ImageFeatures | None,
) -> tuple[Scored, Tensor]:  # fmt: skip
    """Score a pack; return its figures, and its losses (P,) with their graph."""
    logps, losses, rewards = score(
        policy, reference, pack.batch, step, loss, features, pack.features, pack.reference_logps
    )
    return Scored([pair.number for pair in pack.batch.pairs], losses.detach(), rewards, logps.detach()), losses


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
        def use(pack: CopiedPack) -> Scored:
            note(f"scoring held-out pairs {totals.num_pairs * ranks.size}/{held_out.pairs_per_epoch}")
            return _score_pack(policy, reference, pack, step, loss, features)[0]

        again, ahead = CacheCounts(reference, features).restore, CopiedAhead(policy, reference, features)
        for one in fitting.each(step.batches, use, again, ahead.each):
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


def stop_unless_finite(values: dict[str, Any], taken: TakenStep, run_dir: Path, ranks: Ranks) -> None:
    """Raise TrainingStopped if the loss or the gradient is not finite, with the step's pairs listed in a file."""
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return
    parts = ranks.gather_objects([f"{where} ({id})" for _, id, where in taken.pairs])
    rows = [row for part in parts for row in part]
    listed = run_dir / f"not-finite-step-{taken.number:06d}.json"
    if ranks.is_first:
        write_json(listed, {"step": taken.number, **{name: str(values[name]) for name in bad}, "pairs": rows})
    ranks.agreed = True
    raise TrainingStopped(
        f"step {taken.number}: {' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite; stopped before the "
        f"update, checkpoints are kept. Pairs of this step ({listed}): {', '.join(rows[:8])}"
        + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    )
