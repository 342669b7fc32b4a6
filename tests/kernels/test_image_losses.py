"""Losses that compare images, the anchor, and betas of single pairs: by hand, by autograd, and fused against naive."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.test_gpu_kernels import no_waiting
from tests.kernels.test_preference_loss import compare, completions_of
from vapr.config import LossConfig
from vapr_kernels import image_losses, naive
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.losses import Completions, PairLogps, preference_losses
from vapr_kernels.preference_loss import preference_loss

HERE = [[2, 3, 4], [-1, -1, -1], [12, -1, -1], [-1, 18, 19]]
"""Four pairs of five completions each: with all paths, none, the second image alone, the swapped ones alone."""


def softplus(x: float) -> float:  # = -log sigma(-x)
    return math.log1p(math.exp(x))


def one(*logratios: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in logratios]


@pytest.mark.parametrize(
    ("got", "by_hand"),
    [
        # D(w) = 2
        (image_losses.anchor_loss(*one(2.0), beta=0.5), softplus(-1.0)),
        (image_losses.anchor_loss(*one(2.0), beta=0.5, delta=3.0), softplus(2.0)),
        # D(w|m') = -1: beta (2 + 1) = 1.5
        (image_losses.image_loss(*one(2.0, -1.0), beta=0.5), softplus(-1.5)),
        # D(w|m) = 2, D(l|m') = -1, D(w|m') = 0.5, D(l|m) = 4: a = 2 - 4 = -2, b = -1 - 0.5 = -1.5, (a - b)^2 = 0.25
        (
            image_losses.symmetric_loss(*one(2.0, -1.0, 0.5, 4.0), beta=0.5, consistency=0.1),
            (softplus(1.0) + softplus(0.75)) / 2 + softplus(-1.0) + softplus(0.5) + 0.1 * 0.25,
        ),
        (
            image_losses.symmetric_loss(*one(2.0, -1.0, 0.5, 4.0), beta=0.5, delta=0.25),
            (softplus(1.0) + softplus(0.75)) / 2 + softplus(-0.75) + softplus(0.75) + 1e-4 * 0.25,
        ),
    ],
)  # fmt: skip
def test_by_hand(got, by_hand):
    assert got.item() == pytest.approx(by_hand, abs=1e-6)


def five_logps(num_pairs: int = 6, dtype=torch.float64) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: -20 * torch.rand(*shape, generator=generator, dtype=dtype)
    has = torch.ones(num_pairs, 3, dtype=torch.bool)
    has[1], has[2, 1:], has[3, 0] = False, False, False
    lengths = torch.full((num_pairs,), 7.0, dtype=dtype)
    return PairLogps(
        chosen=draw(num_pairs), rejected=draw(num_pairs), reference_chosen=draw(num_pairs),
        reference_rejected=draw(num_pairs), chosen_lengths=lengths, rejected_lengths=lengths, mean_chosen_length=7.0,
        others=draw(num_pairs, 3), reference_others=draw(num_pairs, 3), other_lengths=lengths[:, None].expand(-1, 3),
        has_others=has, betas=torch.tensor([[torch.nan, 0.0], [0.3, 2.0]] * (num_pairs // 2), dtype=dtype),
    )  # fmt: skip


MDPO = [LossConfig(), LossConfig(kind="image"), LossConfig(kind="anchor")]
SYMMETRIC = [LossConfig(kind="symmetric", beta=0.3, consistency=0.01, delta=0.2)]


@pytest.mark.parametrize("terms", [MDPO, SYMMETRIC], ids=["mdpo", "symmetric"])
def test_gradients_are_those_of_the_formula(terms):
    """Finite differences in fp64 by the log-probs of all five paths, with pairs that lack some."""
    logps = five_logps()

    def losses(chosen, rejected, others):
        return preference_losses(dataclasses.replace(logps, chosen=chosen, rejected=rejected, others=others), terms)[0]

    leaves = [x.clone().requires_grad_() for x in (logps.chosen, logps.rejected, logps.others)]
    assert torch.autograd.gradcheck(losses, leaves)
    gradient = torch.autograd.grad(losses(*leaves).sum(), leaves[2])[0]
    assert not gradient[~logps.has_others].any()


def test_mdpo_is_the_authors_sum():
    """As luka-group/mDPO adds it up: three sigmoids of one beta."""
    logps = five_logps()
    logps = dataclasses.replace(logps, has_others=torch.ones(6, 3, dtype=torch.bool), betas=None)
    chosen = logps.chosen - logps.reference_chosen
    rejected = logps.rejected - logps.reference_rejected
    second = (logps.others - logps.reference_others)[:, 0]
    expected = -F.logsigmoid(0.1 * (chosen - rejected)) - F.logsigmoid(0.1 * (chosen - second))
    expected -= F.logsigmoid(0.1 * chosen)
    losses, *rewards = preference_losses(logps, MDPO)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.stack(rewards[:3]), 0.1 * torch.stack([chosen, rejected, second]))


def test_a_policy_equal_to_its_reference():
    """Every sigmoid costs log 2 and pulls with beta/2; what the terms have in common adds up."""
    paths = torch.tensor([-7.0, -6.0, -5.0, -4.0, -3.0], requires_grad=True)
    still = paths.detach()
    logps = PairLogps(
        chosen=paths[:1], rejected=paths[1:2], reference_chosen=still[:1], reference_rejected=still[1:2],
        chosen_lengths=torch.ones(1), rejected_lengths=torch.ones(1), mean_chosen_length=1.0, others=paths[None, 2:],
        reference_others=still[None, 2:], other_lengths=torch.ones(1, 3), has_others=torch.ones(1, 3) > 0,
    )  # fmt: skip
    for terms, expected, pulls in (
        (MDPO, 3 * math.log(2), [-0.15, 0.05, 0.05, 0.0, 0.0]),
        ([LossConfig(kind="symmetric")], 3 * math.log(2), [-0.075, -0.075, 0.0, 0.025, 0.025]),
    ):
        losses, *_ = preference_losses(logps, terms)
        assert losses.item() == pytest.approx(expected)
        assert torch.autograd.grad(losses.sum(), paths)[0].tolist() == pytest.approx(pulls)


def test_beta_of_a_pair():
    """beta (1 + w k): the row's beta or the term's, and the row's margin k (MM-DPO)."""
    logps = five_logps()
    for term, by_hand in (
        (LossConfig(beta=0.2), [0.2, 0.3]),
        (LossConfig(beta=0.2, margin_weight=0.5), [0.2, 0.3 * 2]),
    ):
        losses, chosen_rewards, _ = preference_losses(logps, [term])
        logratios = (logps.chosen - logps.reference_chosen) - (logps.rejected - logps.reference_rejected)
        torch.testing.assert_close(losses, -F.logsigmoid(torch.tensor(by_hand * 3) * logratios))
        torch.testing.assert_close(chosen_rewards, 0.2 * (logps.chosen - logps.reference_chosen))  # the term's beta


def five_completions(device, betas: bool = False) -> Completions:
    """Four pairs of five completions, of which some are missing."""
    lengths = [5, 9, 1, 130, 256, 3, 4, 4, 2, 2, 7, 1, 8, 3, 3, 140, 9, 2, 6, 5]
    completions = completions_of(lengths, 300, 4, device)
    move = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)
    return dataclasses.replace(
        completions,
        chosen=move([0, 5, 10, 15], torch.int64),
        rejected=move([1, 6, 11, 16], torch.int64),
        others=move(HERE, torch.int64),
        betas=move([[torch.nan, 0.0], [0.3, 1.0], [torch.nan, 2.0], [0.05, 0.0]], torch.float32) if betas else None,
    )


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize(
    "terms",
    [MDPO, SYMMETRIC, [LossConfig(kind="image", sft_weight=0.2), *SYMMETRIC, LossConfig(kind="simpo", beta=2.0)]],
    ids=["mdpo", "symmetric", "mixed"],
)
def test_fused_against_naive(terms, scale, device):
    completions = five_completions(device)
    token_logps, reference = (-scale * torch.rand(size, device=device) - 1e-3 for size in (300, 600))
    compare(terms, completions, token_logps, reference)


@pytest.mark.parametrize(
    "kind", ["sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft",
             "anchor", "image", "symmetric"],
)  # fmt: skip
def test_fused_with_betas_of_pairs(kind, device):
    completions = five_completions(device, betas=True)
    token_logps, reference = (-torch.rand(size, device=device) - 1e-3 for size in (300, 600))
    terms = [LossConfig(kind=kind, beta=0.2, margin_weight=0.0 if kind == "sft" else 0.5)]
    compare(terms, completions, token_logps, reference)


def test_a_pack_of_pairs_that_all_lack_the_second_image(device):
    """The other terms of the list are what they are without it, in bits."""
    completions = completions_of([5, 9, 1, 130], 80, 2, device)
    x = (-torch.rand(80, device=device)).requires_grad_()
    reference = -torch.rand(145, device=device)
    for function in (preference_loss, naive.preference_loss):
        results = []
        for terms in ([LossConfig()], [LossConfig(), LossConfig(kind="image")]):
            losses, rewards, _ = function(x, reference, completions, terms, mean_chosen_length=5.0)
            results.append((losses, rewards, torch.autograd.grad(losses.sum(), x)[0]))
        (losses, rewards, gradient), (with_image, more_rewards, same_gradient) = results
        assert torch.equal(losses, with_image) and torch.equal(gradient, same_gradient)
        assert torch.equal(rewards, more_rewards[:, :2]) and more_rewards[:, 2:].isnan().all()


def test_a_token_in_three_completions_feels_the_sum(device):
    """Token 0 begins the chosen answer under m, the rejected one and, elsewhere, nothing: DPO leaves it alone."""
    counted = torch.tensor([0, 1, 0, 2, 3, 4])  # chosen, rejected; the second image's tokens are its own
    completions = Completions(
        counted=RowIndex.build(counted, 5).to(device),
        token_weights=torch.ones(6, device=device),
        completion=torch.tensor([0, 0, 1, 1, 2, 2], device=device),
        ends=torch.tensor([2, 4, 6], device=device),
        chosen=torch.tensor([0], device=device),
        rejected=torch.tensor([1], device=device),
        pair_weights=torch.ones(1, device=device),
        others=torch.tensor([[2, -1, -1]], device=device),
    )
    x = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], device=device, requires_grad=True)
    losses, rewards, _ = preference_loss(x, x.detach()[counted.to(device)], completions, MDPO, mean_chosen_length=2.0)
    assert losses.item() == pytest.approx(3 * math.log(2))
    assert rewards[0, :3].tolist() == [0.0, 0.0, 0.0] and rewards[0, 3:].isnan().all()
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([-0.1, -0.15, 0.05, 0.05, 0.05]))


def check_host_never_waits(device) -> None:
    """Nor is anything copied to it, but the terms once."""
    completions = five_completions(device, betas=True)
    x = (-torch.rand(300, device=device)).requires_grad_()
    reference = -torch.rand(600, device=device)

    def step():
        losses, rewards, _ = preference_loss(x, reference, completions, [*MDPO, *SYMMETRIC], mean_chosen_length=9.0)
        return [losses, rewards, *torch.autograd.grad(losses.sum(), x)]

    first = step()
    with no_waiting(device):
        again = step()
    assert all(torch.equal(a, b) for a, b in zip(first[::2], again[::2], strict=True))  # the same bits, too


def test_the_host_never_waits(device):
    check_host_never_waits(device)
