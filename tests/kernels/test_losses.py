"""Every loss against a value worked out by hand, against TRL where TRL has it, and its gradient at the start."""

import math

import pytest
import torch

from vapr.config import LossConfig
from vapr_kernels import losses as loss
from vapr_kernels.losses import PairLogps, preference_losses

# One pair: chosen -10 (reference -12), rejected -9 (reference -8), 5 and 4 tokens; beta 0.5.
# D(w) = 2, D(l) = -1, so beta (D(w) - D(l)) = 1.5.
HAND = [torch.tensor([v]) for v in (-10.0, -9.0, -12.0, -8.0)]
LENGTHS = [torch.tensor([5.0]), torch.tensor([4.0])]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(logp: float) -> float:
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


def softplus(x: float) -> float:  # = -log sigma(-x)
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    ("got", "by_hand"),
    [
        (loss.sigmoid_loss(*HAND, beta=0.5), softplus(-1.5)),
        (loss.sigmoid_loss(*HAND, beta=0.5, label_smoothing=0.1), 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
        (loss.robust_loss(*HAND, beta=0.5, label_smoothing=0.1), (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8),
        (loss.hinge_loss(*HAND, beta=0.5), 0.0),
        (loss.hinge_loss(*HAND, beta=0.1), 0.7),
        (loss.ipo_loss(*HAND, *LENGTHS, beta=0.5), (2 / 5 + 1 / 4 - 1) ** 2),
        (loss.bco_pair_loss(*HAND, beta=0.5), softplus(-1.0) + softplus(-0.5)),
        (loss.apo_zero_loss(*HAND, beta=0.5), 1 - sigma(1.0) + sigma(-0.5)),
        (loss.apo_down_loss(*HAND, beta=0.5), sigma(1.0) + 1 - sigma(1.5)),
        (loss.simpo_loss(HAND[0], HAND[1], *LENGTHS, beta=2.0, gamma=0.5), softplus(-(2 * (-2.0 + 2.25) - 0.5))),
        # D(w) = 2 > 0: no penalty, plain DPO
        (loss.dpop_loss(*HAND, beta=0.5, dpop_lambda=5.0), softplus(-1.5)),
        # chosen below the reference by 1: D(w) = -1, D(l) = -1, penalty 5
        (loss.dpop_loss(HAND[0] - 3, *HAND[1:], beta=0.5, dpop_lambda=5.0), softplus(0.5 * 5)),
        (loss.sft_loss(HAND[0], mean_chosen_length=5.0), 2.0),
        # p(w) = e^-2, p(l) = e^-2.25
        (
            loss.orpo_loss(HAND[0], HAND[1], *LENGTHS, mean_chosen_length=5.0, beta=0.5),
            2.0 + 0.5 * softplus(log_odds(-2.25) - log_odds(-2)),
        ),
    ],
)  # fmt: skip
def test_by_hand(got, by_hand):
    assert got.item() == pytest.approx(by_hand, abs=1e-6)


def random_logps(num_pairs: int = 8, requires_grad: bool = False) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    draw = lambda low: -torch.rand(num_pairs, generator=generator) * low
    lengths = [torch.randint(3, 30, (num_pairs,), generator=generator).float() for _ in range(2)]
    chosen, rejected = (draw(40).requires_grad_(requires_grad) for _ in range(2))
    return PairLogps(
        chosen=chosen, rejected=rejected, reference_chosen=draw(40), reference_rejected=draw(40),
        chosen_lengths=lengths[0], rejected_lengths=lengths[1], mean_chosen_length=float(lengths[0].mean()),
    )  # fmt: skip


def test_a_policy_equal_to_its_reference():
    """Costs log 2, and pushes by beta/2: up on chosen, down on rejected."""
    chosen, rejected = (torch.tensor([-7.0, -3.0], requires_grad=True) for _ in range(2))
    losses = loss.sigmoid_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.05] * 2)
    assert rejected.grad.tolist() == pytest.approx([0.05] * 2)


def test_mpo_is_one_line():
    """MPO (arXiv 2411.10442): 0.8 sigmoid + 0.2 bco_pair + 1.0 sft."""
    logps = random_logps()
    terms = [LossConfig(kind="sigmoid", weight=0.8), LossConfig(kind="bco_pair", weight=0.2), LossConfig(kind="sft")]
    four = (logps.chosen, logps.rejected, logps.reference_chosen, logps.reference_rejected)
    expected = (
        0.8 * loss.sigmoid_loss(*four, beta=0.1)
        + 0.2 * loss.bco_pair_loss(*four, beta=0.1)
        + loss.sft_loss(logps.chosen, mean_chosen_length=logps.mean_chosen_length)
    )
    losses, chosen_rewards, _ = preference_losses(logps, terms)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(chosen_rewards, 0.1 * (logps.chosen - logps.reference_chosen))


def test_an_sft_term_can_be_added_to_any_loss():
    logps = random_logps()
    plain, _, _ = preference_losses(logps, [LossConfig(kind="hinge")])
    anchored, _, _ = preference_losses(logps, [LossConfig(kind="hinge", sft_weight=0.3)])
    torch.testing.assert_close(
        anchored - plain, 0.3 * loss.sft_loss(logps.chosen, mean_chosen_length=logps.mean_chosen_length)
    )


def test_the_mean_sft_loss_is_the_mean_over_tokens():
    logps = random_logps()
    mean = loss.sft_loss(logps.chosen, mean_chosen_length=logps.mean_chosen_length).mean()
    torch.testing.assert_close(mean, -logps.chosen.sum() / logps.chosen_lengths.sum())


KINDS = ["sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind):
    """Finite differences in fp64, and rewards carry no gradient."""
    logps = random_logps()
    term = LossConfig(kind=kind, beta=0.3, label_smoothing=0.1 if kind in ("sigmoid", "robust", "simpo") else 0.0)
    fields = {
        n: v.double() if isinstance(v, torch.Tensor) else v
        for n in logps.__slots__
        if (v := getattr(logps, n)) is not None
    }

    def losses(chosen, rejected):
        return preference_losses(PairLogps(**{**fields, "chosen": chosen, "rejected": rejected}), [term])[0]

    leaves = [fields["chosen"].requires_grad_(), fields["rejected"].requires_grad_()]
    assert torch.autograd.gradcheck(losses, leaves)
    _, *rewards = preference_losses(PairLogps(**{**fields, "chosen": leaves[0], "rejected": leaves[1]}), [term])
    assert not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-6, 3000.0])
def test_extreme_log_probs_stay_finite(kind, size):
    chosen, rejected = (torch.tensor([-size, -size / 2], requires_grad=True) for _ in range(2))
    reference = torch.tensor([-size / 3, -size])
    logps = PairLogps(
        chosen=chosen, rejected=rejected, reference_chosen=reference, reference_rejected=reference,
        chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2), mean_chosen_length=1.0,
    )  # fmt: skip
    losses, _, _ = preference_losses(logps, [LossConfig(kind=kind)])
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad.isfinite().all()
