"""Kernels at the sizes of real models, against fp64. The same checks run small where there is no GPU."""

import contextlib

import pytest
import torch

from bench.linear_logps import OP, chunked_truth
from bench.microbench import run
from vapr.config import LossConfig
from vapr_kernels import linear_logps, lora_linear, naive, preference_loss, swiglu
from vapr_kernels.add_rms_norm import add_rms_norm
from vapr_kernels.gather_keys_values import gather_keys_values
from vapr_kernels.gather_rows import RowIndex

BF16 = torch.bfloat16


def on_device(device: torch.device, **sizes):
    """Sizes of a 7B model on a GPU; few rows and columns for the interpreter."""
    small = {"rows": 37, "hidden": 64, "vocabulary": 203, "width": 96, "tokens": 21}
    return sizes if device.type == "cuda" else {name: small[name] for name in sizes}


def head_inputs(device, rows, hidden, vocabulary, boost, trained):
    """Random rows whose labels' logits are raised by ``boost``; the first and the last token among the labels."""
    head = torch.randn(vocabulary, hidden, device=device, dtype=BF16).mul_(4 * hidden**-0.5)
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[0], labels[-1] = 0, vocabulary - 1
    w = head[labels].float()
    x = torch.randn(rows, hidden, device=device) + boost * w / w.square().sum(1, keepdim=True)
    return x.to(BF16).requires_grad_(), head.requires_grad_(trained), labels


@pytest.mark.parametrize("boost", [0, 10, 20, 60, -300])
@pytest.mark.parametrize("mode", ["one-pass", "recompute", "chunked"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_the_head(trained, mode, boost, device):
    """Log-probs to 1e-5 + 1e-7 |logp|, gradients of the rows to 0.2 %, whatever the model is sure of."""
    if trained and boost not in (0, 20):
        pytest.skip("the head's gradient does not depend on how sure the row is")
    sizes = on_device(device, rows=700, hidden=3584, vocabulary=151_936)
    inputs = head_inputs(device, **sizes, boost=boost, trained=trained)
    douts = (torch.randn(sizes["rows"], device=device),)
    truth = chunked_truth(inputs, douts)
    got = run(lambda *a: linear_logps(*a, mode=mode), inputs, douts)
    # The library's bf16 product leaves long sums to tensor cores, which truncate (docs/kernels.md).
    factor = 30 if mode == "chunked" and device.type == "cuda" else 1
    assert ((got[0] - truth[0]).abs() <= factor * (1e-5 + 1e-7 * truth[0].abs())).all()
    for g, t, allowed in zip(got[1:], truth[1:], (2e-3, 4e-3), strict=False):
        assert (g.double() - t).norm() <= allowed * t.norm()


@pytest.mark.parametrize("family", list(OP.gpu.shapes))
def test_the_heads_of_all_models_without_gradients(family, device):
    shape = OP.gpu.shapes[family]
    sizes = on_device(device, rows=1000, hidden=shape["H"], vocabulary=shape["V"])
    inputs = head_inputs(device, **sizes, boost=8, trained=False)
    [truth] = chunked_truth(inputs, None)
    with torch.no_grad():
        got = linear_logps(*inputs)
    assert ((got - truth).abs() <= 1e-5 + 1e-7 * truth.abs()).all()


def test_rows_out_of_range_among_others(device):
    """One row in seven at log-probs down to -2000."""
    sizes = on_device(device, rows=900, hidden=2048, vocabulary=151_936)
    boost = torch.zeros(sizes["rows"], 1, device=device)
    boost[::7] = torch.linspace(-2500, 400, len(boost[::7]), device=device)[:, None]
    inputs = head_inputs(device, **sizes, boost=boost, trained=False)
    douts = (torch.ones(sizes["rows"], device=device),)
    truth = chunked_truth(inputs, douts)
    got = run(lambda *a: linear_logps(*a, mode="one-pass"), inputs, douts)
    assert ((got[0] - truth[0]).abs() <= 1e-5 + 1e-6 * truth[0].abs()).all()
    assert (got[1].double() - truth[1]).norm() <= 2e-3 * truth[1].norm()


@contextlib.contextmanager
def no_waiting(device):
    """On a GPU whatever makes the host wait for it raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_the_host_never_waits(trained, device):
    sizes = on_device(device, rows=300, hidden=512, vocabulary=32_064)
    x, head, labels = head_inputs(device, **sizes, boost=5, trained=trained)
    from tests.kernels.test_preference_loss import completions_of

    rows = sizes["rows"]
    completions = completions_of([rows // 4] * 4, rows, 2, device)
    reference = -torch.rand(rows // 4 * 4, device=device)
    terms = [LossConfig(), LossConfig(kind="sft", weight=0.1)]
    leaves = [x, head] if trained else [x]

    def step():
        logps = linear_logps(x, head, labels, reference_logps=-torch.ones(rows, device=device))
        out = preference_loss(logps, reference, completions, terms, mean_chosen_length=9.0)
        return [out.losses, *torch.autograd.grad(out.losses.sum(), leaves)]

    first = step()  # compiles, and copies the terms to the GPU
    with no_waiting(device):
        again = step()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # the same bits, too


def assert_close_to_fp64(kernel, twin, *inputs):
    exact = [x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in inputs]
    outs, truths = kernel(*inputs), twin(*exact)
    outs, truths = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (outs, truths))
    douts = [torch.randn_like(out) for out in outs]
    leaves, true_leaves = ([x for x in all if torch.is_tensor(x) and x.requires_grad] for all in (inputs, exact))
    got = torch.autograd.grad(outs, leaves, douts)
    true = torch.autograd.grad(truths, true_leaves, [d.double() for d in douts])
    for g, t in zip([*outs, *got], [*truths, *true], strict=True):
        assert (g.double() - t).norm() <= 4e-3 * t.norm()


def leaf(device, *shape):
    return torch.randn(shape, device=device, dtype=BF16).requires_grad_()


def test_swiglu(device):
    sizes = on_device(device, tokens=3001, width=18_944)
    shape = (sizes["tokens"], sizes["width"])
    assert_close_to_fp64(swiglu, naive.swiglu, leaf(device, *shape), leaf(device, *shape))


@pytest.mark.parametrize("width", [1536, 2048, 3584, 4096, 5120])
def test_add_rms_norm(width, device):
    sizes = on_device(device, tokens=3001, width=width)
    x, residual = (leaf(device, sizes["tokens"], sizes["width"]) for _ in range(2))
    norm = lambda *a: add_rms_norm(*a, 1e-6)
    twin = lambda x, residual, weight: naive.add_rms_norm(x, residual, weight, 1e-6)
    assert_close_to_fp64(norm, twin, x, residual, leaf(device, sizes["width"]))


def test_gather_keys_values(device):
    tokens = on_device(device, tokens=10_400)["tokens"]
    k, v = (leaf(device, tokens, 4, 128) for _ in range(2))
    angles = torch.rand(tokens, 64, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    index = RowIndex.build(torch.cat([torch.arange(tokens), torch.arange(tokens // 2)]), tokens).to(device)
    assert_close_to_fp64(
        lambda k, v: gather_keys_values(k, v, cos, sin, index),
        lambda k, v: naive.gather_keys_values(k, v, cos.double(), sin.double(), index),
        k,
        v,
    )


def test_lora_linear(device):
    sizes = on_device(device, tokens=3001, hidden=3584, width=18_944)
    tokens, hidden, width = sizes.values()
    weight = torch.randn(width, hidden, device=device, dtype=BF16) / hidden**0.5
    x, a, b = leaf(device, tokens, hidden), leaf(device, 8, hidden), leaf(device, width, 8)
    assert_close_to_fp64(lora_linear, naive.lora_linear, x, weight, None, a, b, 2.0)
