"""A linear layer with its adapter in one: against the naive twin in fp64, and against peft's own module."""

import peft
import pytest
import torch
from torch import nn

from vapr_kernels import lora_linear, naive
from vapr_kernels.testing import assert_matches_naive

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def arguments(shape, width, rank, dtype, bias, device="cpu"):
    new = lambda *size: torch.randn(size, device=device).to(dtype)
    x, a, b = (t.requires_grad_() for t in (new(*shape), new(rank, shape[-1]) / shape[-1] ** 0.5, new(width, rank) / 4))
    return x, new(width, shape[-1]) / shape[-1] ** 0.5, new(width) if bias else None, a, b, 0.5


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("shape", "width", "rank"),
    [
        ((1, 1), 1, 1),
        ((37, 24), 40, 3),  # nothing a multiple of anything
        ((1, 37, 24), 16, 8),  # as transformers calls it, with a batch dimension
        ((0, 24), 16, 8),  # no rows
    ],
    ids=str,
)
def test_output_and_gradients(shape, width, rank, bias, dtype):
    assert_matches_naive(lora_linear, naive.lora_linear, *arguments(shape, width, rank, dtype, bias))


def test_by_hand():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    a, b = torch.tensor([[1.0, -1.0]], requires_grad=True), torch.tensor([[1.0], [0.0], [2.0]], requires_grad=True)
    out = lora_linear(x, weight, torch.tensor([10.0, 20.0, 30.0]), a, b, 3.0)
    assert out.tolist() == [[11.0 - 3.0, 22.0, 33.0 - 6.0]]  # x A^T is -1
    out[0, 2].backward()
    assert x.grad.tolist() == [[1.0 + 6.0, 1.0 - 6.0]]
    assert a.grad.tolist() == [[6.0, 12.0]]
    assert b.grad.tolist() == [[0.0], [0.0], [-3.0]]


def test_inputs_that_need_no_gradient_get_none():
    x, *rest = arguments((5, 8), 4, 2, torch.float32, bias=True)
    lora_linear(x.detach(), *rest).sum().backward()
    assert x.grad is None and rest[2].grad.abs().sum() > 0


@DTYPES
def test_an_untrained_adapter_changes_no_bit(dtype):
    x, weight, bias, a, b, scale = arguments((37, 24), 40, 3, dtype, bias=True)
    out = lora_linear(x, weight, bias, a, torch.zeros_like(b), scale)
    assert torch.equal(out, nn.functional.linear(x, weight, bias))


def test_peft_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0))
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x, dout = torch.randn(7, 24, requires_grad=True), torch.randn(7, 40)
    truth = torch.autograd.grad((layer(x) * dout).sum(), (x, a, b))
    out = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 1.5)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-6)
    for got, expected in zip(torch.autograd.grad((out * dout).sum(), (x, a, b)), truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_saves_what_the_backward_pass_needs_and_no_more():
    """The inputs, and rank numbers a row: nothing as wide as the output."""
    x, *rest = arguments((64, 32), 512, 2, torch.float32, bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, *rest)
    assert sum(t.numel() for t in saved if t.shape[0] == 64) == 64 * 32 + 64 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 7)}, "weight must have shape (4, 7), got (4, 8)"),
        ({3: torch.zeros(2, 9)}, "a must have shape (2, 8), got (2, 9)"),
        ({4: torch.zeros(4, 3)}, "b must have shape (4, 2), got (4, 3)"),
        ({4: torch.zeros(4, 2, dtype=torch.float64)}, "b must be torch.float32, got torch.float64"),
        ({2: torch.zeros(5)}, "bias must have shape (4,), got (5,)"),
        ({1: torch.zeros(4, 8, requires_grad=True)}, "weight must be frozen; only the adapter is trained here"),
    ],
)
def test_mistakes_name_the_argument(change, message):
    values = list(arguments((5, 8), 4, 2, torch.float32, bias=True))
    for place, value in change.items():
        values[place] = value
    with pytest.raises(ValueError) as error:
        lora_linear(*values)
    assert str(error.value) == message
