"""preference_loss against the pure formulas: losses, rewards, sums and the gradient of every token."""

import dataclasses

import pytest
import torch

from vapr.config import LossConfig, TokenWeights
from vapr_kernels import naive
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.losses import Completions
from vapr_kernels.preference_loss import KINDS, preference_loss

OPTIONS = {
    "sigmoid": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"label_smoothing": 0.1, "gamma": 0.5, "beta": 2.0},
    "dpop": {"dpop_lambda": 5.0},
}


def completions_of(lengths, num_tokens, num_pairs, device="cpu") -> Completions:
    """Two completions a pair, the rejected one first in memory; some tokens counted in both, some never."""
    num_counted = sum(lengths)
    rows = torch.randint(max(num_tokens, 1), (num_counted,))
    lengths = torch.tensor(lengths, dtype=torch.int64)
    ends = lengths.cumsum(0)
    completion = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    move = lambda x: x.to(device)
    return Completions(
        counted=RowIndex.build(rows, num_tokens).to(device),
        token_weights=move(torch.rand(num_counted) + 0.5),
        completion=move(completion),
        ends=move(ends),
        chosen=move(torch.arange(num_pairs) * 2 + 1),
        rejected=move(torch.arange(num_pairs) * 2),
        pair_weights=move(torch.rand(num_pairs) + 0.5),
    )


def compare(terms, completions, token_logps, reference_logps, mean_chosen_length=7.5):
    """Kernel against the formulas in fp64, judged by what fp32 costs the formulas."""
    out = []
    for function, dtype in ((preference_loss, torch.float32), (naive.preference_loss, torch.float64), (naive.preference_loss, torch.float32)):  # fmt: skip
        x = token_logps.detach().to(dtype).requires_grad_()
        reference = None if reference_logps is None else reference_logps.to(dtype)
        c = dataclasses.replace(
            completions,
            token_weights=completions.token_weights.to(dtype),
            pair_weights=completions.pair_weights.to(dtype),
        )
        losses, rewards, logps = function(x, reference, c, terms, mean_chosen_length=mean_chosen_length)
        assert not rewards.requires_grad and not logps.requires_grad
        dlosses = torch.linspace(-1, 2, len(losses), device=x.device, dtype=dtype)
        (gradient,) = torch.autograd.grad(losses, x, dlosses)
        out.append((losses.detach(), rewards, logps, gradient))
    for name, got, true, plain in zip(("losses", "rewards", "logps", "gradient"), *out, strict=True):
        assert got.shape == true.shape and torch.equal(got.isnan(), true.isnan()), name
        assert name == "rewards" or not got.isnan().any(), name  # NaN: the reward of a path that a pair lacks
        got, true, plain = (x.nan_to_num(nan=0.0) for x in (got, true, plain))
        assert got.isfinite().all(), name
        if got.numel():
            allowed = 3 * (plain - true).abs().max() + 1e-6 * true.abs().max().clamp(min=1.0)
            assert (got - true).abs().max() <= allowed, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_every_loss(kind, scale, device):
    """From hardly any log-ratio to saturated ones, chosen above and below the reference."""
    completions = completions_of([5, 9, 1, 130, 256, 3, 4, 4], 300, 4, device)
    token_logps = -scale * torch.rand(300, device=device) - 1e-3
    reference = -scale * torch.rand(412, device=device) - 1e-3
    compare([LossConfig(kind=kind, **OPTIONS.get(kind, {}))], completions, token_logps, reference)


@pytest.mark.parametrize("kind", ["simpo", "orpo", "sft"])
def test_without_a_reference(kind, device):
    completions = completions_of([5, 9, 1, 130], 80, 2, device)
    compare([LossConfig(kind=kind, beta=2.0)], completions, -torch.rand(80, device=device) - 0.01, None)


def test_orpo_of_nearly_certain_completions(device):
    """log(1 - p) where p rounds to 1, and where it rounds to 0."""
    completions = completions_of([2, 2, 2, 2, 2, 2], 6, 3, device)
    completions = dataclasses.replace(completions, counted=RowIndex.build(torch.arange(12) // 2, 6).to(device))
    token_logps = torch.tensor([-1e-6, -80.0, -1e-9, -1e-9, -50.0, -0.693], device=device)
    compare([LossConfig(kind="orpo")], completions, token_logps, None)


def test_a_weighted_sum_with_sft(device):
    """MPO's three terms (arXiv 2411.10442), and an SFT term inside the first."""
    terms = [
        LossConfig(kind="sigmoid", weight=0.8, sft_weight=0.3),
        LossConfig(kind="bco_pair", weight=0.2, beta=0.3),
        LossConfig(kind="sft", weight=1.0),
    ]
    completions = completions_of([5, 9, 1, 130], 80, 2, device)
    compare(terms, completions, -torch.rand(80, device=device), -torch.rand(145, device=device))


def test_rewards_are_those_of_the_first_term_that_prefers(device):
    completions = completions_of([5, 9], 20, 1, device)
    token_logps, reference = -torch.rand(20, device=device), -torch.rand(14, device=device)
    alone = preference_loss(token_logps, reference, completions, [LossConfig(beta=0.3)], mean_chosen_length=9.0)
    mixed = [LossConfig(kind="sft"), LossConfig(beta=0.3), LossConfig(kind="simpo", beta=2.0)]
    both = preference_loss(token_logps, reference, completions, mixed, mean_chosen_length=9.0)
    assert torch.equal(alone.rewards, both.rewards)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_masked(kind, device):
    """A completion whose tokens all weigh nothing has log-prob 0 and length 1, and moves nothing."""
    completions = completions_of([3, 4], 7, 1, device)
    completions = dataclasses.replace(completions, token_weights=torch.zeros(7, device=device))
    x = -torch.rand(7, device=device).requires_grad_()
    out = preference_loss(
        x, -torch.rand(7, device=device), completions, [LossConfig(kind=kind)], mean_chosen_length=1.0
    )
    true = naive.preference_loss(x, -torch.rand(7, device=device), completions, [LossConfig(kind=kind)], mean_chosen_length=1.0)  # fmt: skip
    torch.testing.assert_close(out.losses, true[0])
    assert not out.logps.any() and not torch.autograd.grad(out.losses.sum(), x)[0].any()


def test_policy_equal_to_reference_costs_log_2(device):
    """And pulls with -beta/2 at chosen, beta/2 at rejected; a token in both feels nothing."""
    counted = torch.tensor([0, 1, 2, 0, 1, 3])  # tokens 0 and 1 are common
    completions = Completions(
        counted=RowIndex.build(counted, 4).to(device),
        token_weights=torch.ones(6, device=device),
        completion=torch.tensor([0, 0, 0, 1, 1, 1], device=device),
        ends=torch.tensor([3, 6], device=device),
        chosen=torch.tensor([0], device=device),
        rejected=torch.tensor([1], device=device),
        pair_weights=torch.ones(1, device=device),
    )
    x = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device, requires_grad=True)
    losses, rewards, logps = preference_loss(
        x, x.detach()[counted.to(device)], completions, [LossConfig(beta=0.1)], mean_chosen_length=3.0
    )
    assert losses.item() == pytest.approx(0.6931472)
    assert rewards.tolist() == [[0.0, 0.0]] and logps.tolist() == [[-6.0, -7.0]]
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([0.0, 0.0, -0.05, 0.05]))


def test_weights_that_are_one_number(device):
    """An expanded tensor has no memory behind its rows."""
    completions = completions_of([5, 9], 20, 1, device)
    ones = torch.ones(1, device=device)
    compare(
        [LossConfig()],
        dataclasses.replace(completions, token_weights=ones.expand(14), pair_weights=ones.expand(1)),
        -torch.rand(20, device=device),
        -torch.rand(14, device=device),
    )


def test_no_pairs(device):
    completions = completions_of([], 0, 0, device)
    x = torch.zeros(0, device=device, requires_grad=True)
    out = preference_loss(x, None, completions, [LossConfig(kind="simpo")], mean_chosen_length=1.0)
    assert out.losses.shape == (0,) and torch.autograd.grad(out.losses.sum(), x)[0].shape == (0,)


def test_registration_and_compilation(device):
    completions = completions_of([5, 9, 1, 13], 30, 2, device)
    c = completions
    x = (-torch.rand(30, device=device)).requires_grad_()
    reference = -torch.rand(28, device=device)
    args = (
        x, reference, c.counted.rows, c.counted.order, c.counted.starts, c.token_weights, c.completion, c.ends, c.chosen,
        c.rejected, c.pair_weights, None, None, [0.0, 1.0, 0.1] + 7 * [0.0], 5.0, 0.1, False,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.vapr.preference_loss, args, test_utils=tests)
    others = torch.tensor([[0, 1, -1], [-1, 2, 3]], device=device)
    with_others = (*args[:11], others, torch.ones(2, 2, device=device), [12.0, 1.0, 0.1] + 7 * [0.0], *args[14:])
    torch.library.opcheck(torch.ops.vapr.preference_loss, with_others, test_utils=tests)

    terms = [LossConfig()]

    def loss(x):
        return preference_loss(x, reference, completions, terms, mean_chosen_length=5.0).losses.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_logps": torch.zeros(3)}, r"token_logps must be fp32 of shape \(20,\), got torch.float32 \(3,\)"),
        ({"token_logps": torch.zeros(20).double()}, "token_logps must be fp32 of shape .*, got torch.float64"),
        (
            {"reference_logps": torch.zeros(3)},
            r"reference_logps must be fp32 of shape \(14,\), got torch.float32 \(3,\)",
        ),
        ({"reference_logps": torch.zeros(14, device="meta")}, "lie on cpu and meta"),
        ({"terms": []}, "terms must name at least one loss"),
    ],
)
def test_the_wrong_argument_is_named(change, message):
    arguments = {
        "token_logps": torch.zeros(20),
        "reference_logps": torch.zeros(14),
        "completions": completions_of([5, 9], 20, 1),
        "terms": [LossConfig(token_weights=TokenWeights())],
    }
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**arguments, **change}, mean_chosen_length=1.0)
