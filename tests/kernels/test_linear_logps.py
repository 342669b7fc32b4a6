"""linear_logps against its naive twin in fp64: every mode, PyTorch's operations and the kernels."""

import importlib
import math

import pytest
import torch

from vapr_kernels import exp_logits, launch, linear_logps, naive
from vapr_kernels.linear_logps import make_plan
from vapr_kernels.testing import assert_matches_naive

linear_logps_module = importlib.import_module("vapr_kernels.linear_logps")  # the package's attribute is the function
MODES = ("one-pass", "recompute", "chunked")
TRAINED = {"frozen head": (True, False), "trained head": (True, True), "head alone": (False, True)}
HALF = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3}
"""Allowed error relative to the largest value. bf16: the naive twin rounds nothing between its fp32 sums, so one
rounding of the result is all we allow for."""


def head_inputs(num_rows, hidden, vocabulary, dtype=torch.float32, scale=1.0, trained=(True, True), device="cpu"):
    x = torch.randn(num_rows, hidden).to(device, dtype)
    head = (torch.randn(vocabulary, hidden) * scale / math.sqrt(hidden)).to(device, dtype)
    labels = torch.randint(vocabulary, (num_rows,), device=device)
    if num_rows:
        labels[0], labels[-1] = 0, vocabulary - 1
    return x.requires_grad_(trained[0]), head.requires_grad_(trained[1]), labels


@pytest.fixture(params=["80", "90"])
def gpu(request, device, monkeypatch):
    """A device that runs the kernels, with and without the tensor memory accelerator."""
    if device.type == "cpu":
        monkeypatch.setattr(launch, "capability", lambda device: int(request.param))
        monkeypatch.setitem(exp_logits.TILES, 80, exp_logits.TILES[0])
        monkeypatch.setitem(exp_logits.TILES, 90, exp_logits.TILES[0])
        return device
    # Small tiles compile in a tenth of the time; those shipped are tested at real sizes (test_gpu_kernels.py).
    monkeypatch.setattr(exp_logits, "tile_for", lambda x: exp_logits.Tile(64, 64, 32, 4, 2))
    if request.param == "80":
        monkeypatch.setattr(exp_logits, "_has_tma", lambda x: False)
    return device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_rows", [None, 1, 5], ids=lambda n: f"chunk {n}")
@pytest.mark.parametrize("shape", [(1, 3, 2), (13, 16, 37), (33, 8, 1000)], ids=str)
def test_with_pytorch(shape, chunk_rows, mode, trained, dtype):
    x, head, labels = head_inputs(*shape, dtype=dtype, scale=3.0, trained=trained)
    assert_matches_naive(
        lambda *a: linear_logps(*a, mode=mode, chunk_rows=chunk_rows), naive.linear_logps, x, head, labels,
        floor=HALF[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 2),  # less than a tile of anything; rows that no 16-byte access can read
        (16, 16, 64),  # whole tiles
        (37, 24, 101),  # a bit more than whole tiles of each
    ],
    ids=str,
)
def test_with_kernels(shape, mode, trained, dtype, gpu):
    x, head, labels = head_inputs(*shape, dtype=dtype, scale=3.0, trained=trained, device=gpu)
    assert_matches_naive(lambda *a: linear_logps(*a, mode=mode), naive.linear_logps, x, head, labels, floor=HALF[dtype])
    truth = naive.linear_logps(x.double(), head.double(), labels)
    assert ((linear_logps(x, head, labels, mode=mode) - truth).abs() <= 1e-5 + 1e-7 * truth.abs()).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_rows", [1, 20], ids=lambda n: f"chunk {n}")
def test_chunks_of_rows_with_kernels(mode, chunk_rows, gpu):
    x, head, labels = head_inputs(45, 8, 50, device=gpu)
    assert_matches_naive(
        lambda *a: linear_logps(*a, mode=mode, chunk_rows=chunk_rows), naive.linear_logps, x, head, labels
    )


@pytest.mark.parametrize("where", ["pytorch", "kernels"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_slices_of_the_vocabulary(trained, where, request, monkeypatch):
    """The backward pass of ``recompute`` sees 256 columns at a time, and each label in one slice only."""
    device = request.getfixturevalue("device") if where == "kernels" else "cpu"
    monkeypatch.setattr(linear_logps_module, "_budget", lambda device: 1)
    x, head, labels = head_inputs(9, 16, 600, scale=3.0, trained=trained, device=device)
    labels[:] = torch.tensor([0, 255, 256, 300, 511, 512, 599, 3, 599])
    assert_matches_naive(lambda *a: linear_logps(*a, mode="recompute"), naive.linear_logps, x, head, labels)


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode, gpu):
    x, head, labels = head_inputs(0, 8, 50, device=gpu)
    logps = linear_logps(x, head, labels, mode=mode)
    assert logps.shape == (0,)
    dx, dhead = torch.autograd.grad(logps.sum(), (x, head))
    assert dx.shape == (0, 8) and not dhead.any()


@pytest.mark.parametrize("where", ["pytorch", "kernels"])
@pytest.mark.parametrize("mode", MODES)
def test_a_label_that_repeats(mode, where, request):
    """The rows of one label are added up in fp32: in bf16 the 300th would vanish beside the sum of the others."""
    device = request.getfixturevalue("device") if where == "kernels" else "cpu"
    x = torch.ones(300, 8, device=device, dtype=torch.bfloat16)
    head = torch.zeros(4, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.ones(300, dtype=torch.int64, device=device)
    (dhead,) = torch.autograd.grad(linear_logps(x, head, labels, mode=mode).sum(), head)
    torch.testing.assert_close(dhead[1].cpu(), torch.full((8,), 225.0).bfloat16())
    torch.testing.assert_close(dhead[0].cpu(), torch.full((8,), -75.0).bfloat16())


def test_the_naive_twin_is_a_log_softmax():
    x, head, labels = head_inputs(24, 32, 400, dtype=torch.float64, scale=4.0)
    truth = (x @ head.T).log_softmax(1)[torch.arange(24), labels]
    got = naive.linear_logps(x, head, labels)
    torch.testing.assert_close(got, truth)
    for g, t in zip(
        torch.autograd.grad(got.sum(), (x, head)), torch.autograd.grad(truth.sum(), (x, head)), strict=True
    ):
        torch.testing.assert_close(g, t)


def pushed(x, head, labels, boost):
    """``x`` with the logits of its labels raised by about ``boost``."""
    w = head.detach().float()[labels]
    return (
        (x.detach().float() + boost * w / w.square().sum(1, keepdim=True)).to(x.dtype).requires_grad_(x.requires_grad)
    )


REGIMES = {  # boost, range of the median log-prob
    "unsure": (0, -40, -1),
    "halfway": (9, -9, -0.3),
    "confident": (20, -0.3, -1e-10),
    "certain": (60, -1e-10, 0),
    "unlikely": (-60, -110, -50),
    "extreme": (-300, -500, -250),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("trained", [(True, False), (True, True)], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["naive", "pytorch", "pytorch recompute", *MODES])
def test_accuracy(mode, dtype, trained, regime, request):
    """Near p = 1 the gradient is 1 - p times a direction: 1 - exp(logp) would round it to nothing or to noise."""
    device = request.getfixturevalue("gpu80") if mode in MODES else "cpu"
    boost, low, high = REGIMES[regime]
    x, head, labels = head_inputs(24, 32, 400, dtype=dtype, scale=4.0, trained=trained, device=device)
    x = pushed(x, head, labels, boost)
    leaves = [leaf for leaf in (x, head) if leaf.requires_grad]
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (x, head)]
    truth = naive.linear_logps(*exact, labels)
    assert low <= truth.median() <= high
    if mode == "naive":
        logps = naive.linear_logps(x, head, labels)
    else:
        mode = {"pytorch": "auto", "pytorch recompute": "recompute"}.get(mode, mode)
        logps = linear_logps(x, head, labels, mode=mode)
    # On a GPU fp32 sums round at every product: two units in the last place of a logit of that size.
    relative = 2**-22 if x.is_cuda and dtype is torch.float32 else 1e-7
    assert ((logps - truth).abs() <= 1e-5 + relative * truth.abs()).all()
    got = torch.autograd.grad(logps.sum(), leaves)
    true = torch.autograd.grad(truth.sum(), [leaf for leaf in exact if leaf.requires_grad])
    # dhead of bf16 inputs is a product of two rounded factors, and rounded
    for g, t, allowed in zip(got, true, (2e-3, 4e-3 if dtype is torch.bfloat16 else 2e-3), strict=False):
        assert (g - t).norm() <= allowed * t.norm()
        # row by row: a sure row's gradient is tiny beside an unsure one's
        assert ((g - t).norm(dim=1) <= 2 * allowed * t.norm(dim=1) + 1e-30).all()


@pytest.fixture
def gpu80(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(launch, "capability", lambda device: 0)
    return device


@pytest.mark.parametrize("known", ["nothing", "the reference", "a reference 400 nats off"])
@pytest.mark.parametrize("mode", [*MODES, "no-grad"])
def test_rows_out_of_range_are_computed_again(mode, known, gpu):
    """Log-probs from 0 down to -2000 in one call: no offset fits all, and nobody may notice."""
    x, head, labels = head_inputs(40, 24, 70, dtype=torch.bfloat16, scale=4.0, trained=(True, False), device=gpu)
    boost = torch.linspace(300, -2500, 40, device=gpu)[:, None]
    x = pushed(x, head, labels, boost)
    exact = x.detach().double().requires_grad_()
    truth = naive.linear_logps(exact, head.double(), labels)
    assert truth.min() < -1500 and truth.max() > -1e-6
    reference = {"nothing": None, "the reference": truth, "a reference 400 nats off": truth - 400}[known]
    with torch.set_grad_enabled(mode != "no-grad"):
        logps = linear_logps(x, head, labels, mode="auto" if mode == "no-grad" else mode, reference_logps=reference)
    assert ((logps - truth).abs() <= 1e-5 + 1e-7 * truth.abs()).all()
    if mode == "no-grad":
        assert not logps.requires_grad
        return
    dout = torch.randn(40, device=gpu)
    (got,) = torch.autograd.grad(logps, x, dout)
    (true,) = torch.autograd.grad(truth, exact, dout.double())
    assert ((got - true).norm(dim=1) <= 4e-3 * true.norm(dim=1) + 1e-13).all()


@pytest.mark.parametrize("where", ["pytorch", "kernels"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_row_only(value, where, request):
    device = request.getfixturevalue("device") if where == "kernels" else "cpu"
    x, head, labels = head_inputs(20, 8, 50, dtype=torch.bfloat16, device=device, trained=(False, False))
    x[3, 2] = value
    logps = linear_logps(x, head, labels, mode="one-pass")
    assert logps[3].isnan()
    kept = torch.arange(20) != 3
    torch.testing.assert_close(logps[kept], naive.linear_logps(x, head, labels)[kept])


def test_equal_logits_are_uniform(gpu):
    for mode in MODES:
        logps = linear_logps(
            torch.zeros(3, 8, device=gpu), torch.randn(7, 8).to(gpu), torch.tensor([0, 3, 6], device=gpu), mode=mode
        )
        torch.testing.assert_close(logps.cpu(), torch.full((3,), -math.log(7)))


def test_reference_logps_tell_where_the_logits_will_be(device, monkeypatch):
    """So that no row has to be computed again."""
    flags = []
    settle = exp_logits._settle
    monkeypatch.setattr(
        exp_logits, "_settle",
        lambda scratch, *a, **k: (settle(scratch, *a, **k), flags.append(scratch.flags.sum().item())),
    )  # fmt: skip
    x, head, labels = head_inputs(20, 24, 70, dtype=torch.bfloat16, scale=4.0, device=device)
    x = pushed(x, head, labels, -400)
    reference = naive.linear_logps(x, head, labels).detach() + 30
    with torch.no_grad():
        linear_logps(x, head, labels, mode="one-pass")
        linear_logps(x, head, labels, mode="one-pass", reference_logps=reference)
    without, _, known, _ = flags
    assert without > 10 and known == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_head_gets_no_gradient(mode, device, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the gradient of a frozen head was formed")

    monkeypatch.setattr(linear_logps_module, "add_target_rows", never)
    x, head, labels = head_inputs(9, 8, 30, trained=(True, False), device=device)
    linear_logps(x, head, labels, mode=mode).sum().backward()
    assert x.grad is not None and head.grad is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label", [-100, -1, 50])
def test_a_label_that_is_no_token_is_nan(mode, label, device):
    """Refusing it would make the host wait; a number would be wrong."""
    x, head, labels = head_inputs(5, 8, 50, trained=(True, False), device=device)
    labels[2] = label
    logps = linear_logps(x, head, labels, mode=mode)
    (dx,) = torch.autograd.grad(logps.sum(), x)
    assert logps.isnan().tolist() == [False, False, True, False, False]
    assert dx.isnan().any(1).tolist() == [False, False, True, False, False]


def test_pytorch_means_pytorch(device, monkeypatch):
    def never(self, grid):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch.Kernel, "__getitem__", never)
    x, head, labels = head_inputs(9, 8, 30, device=device)
    linear_logps(x, head, labels, mode="torch").sum().backward()


def test_no_second_derivative():
    x, head, labels = head_inputs(9, 8, 30, trained=(True, False))
    (dx,) = torch.autograd.grad(linear_logps(x, head, labels).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


def test_rows_that_are_a_column(gpu):
    """One row, whose stride says nothing."""
    x = torch.randn(16, 1).to(gpu, torch.bfloat16).T
    head = torch.randn(40, 16).to(gpu, torch.bfloat16)
    labels = torch.tensor([3], device=gpu)
    torch.testing.assert_close(linear_logps(x, head, labels, mode="one-pass"), naive.linear_logps(x, head, labels))


def test_the_same_bits_on_every_run(gpu):
    x, head, labels = head_inputs(40, 24, 70, dtype=torch.bfloat16, device=gpu)
    labels[:] = labels % 3
    for mode in MODES:
        runs = []
        for _ in range(2):
            logps = linear_logps(x, head, labels, mode=mode)
            runs.append([logps, *torch.autograd.grad(logps.sum(), (x, head))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def plan_of(num_rows, vocabulary, mode="auto", trained=(True, False), dtype=torch.float32, grad=True):
    x = torch.empty(num_rows, 8, dtype=dtype, requires_grad=trained[0])
    return make_plan(x, torch.empty(vocabulary, 8, dtype=dtype, requires_grad=trained[1]), mode, grad=grad)


def test_the_plan(device):
    if device.type == "cuda":
        pytest.skip("the numbers below are those of a CPU")
    mib = 2**20
    assert plan_of(100, 50, grad=False).gradient == "none"
    assert plan_of(100, 50, "one-pass", trained=(False, False)).gradient == "none"
    assert plan_of(100, 50).gradient == "dx"
    assert plan_of(100, 50, trained=(True, True)).gradient == "keep"
    assert plan_of(mib, 193, trained=(True, True)).gradient == "recompute"  # fp32: 772 MiB of 768
    assert plan_of(mib, 193, trained=(True, True), dtype=torch.bfloat16).gradient == "keep"
    assert plan_of(mib, 193, "one-pass", trained=(True, True)).gradient == "keep"  # as asked for
    assert plan_of(100, 50).product == "library" and plan_of(100, 50, dtype=torch.bfloat16).product == "fused"
    assert plan_of(100, 50, dtype=torch.float16).product == "torch"  # whose range is too small for E
    assert plan_of(9000, 32000, dtype=torch.bfloat16).chunk_rows == 1024  # nine pieces, whole tiles
    assert plan_of(1100, 32000, dtype=torch.bfloat16).chunk_rows == 640  # two, and the last is not small
    assert plan_of(1100, 300_000, dtype=torch.bfloat16).chunk_rows == 384  # three, of at most 447 rows in 256 MiB
    assert plan_of(9000, 32000, dtype=torch.bfloat16, grad=False).chunk_rows == 9000


def test_on_a_cpu_every_mode_is_pytorch():
    assert {plan_of(100, 50, mode).product for mode in ("auto", *MODES, "torch")} == {"torch"}
    assert plan_of(9000, 32000).chunk_rows == 1000
    assert plan_of(9000, 130_000).chunk_rows == 500  # of at most 516 rows of 4 bytes in 256 MiB


def test_gradcheck():
    x, head, labels = head_inputs(5, 4, 9, dtype=torch.float64)
    for mode in ("one-pass", "recompute"):
        assert torch.autograd.gradcheck(
            lambda *a, mode=mode: linear_logps(*a, labels, chunk_rows=2, mode=mode), (x, head)
        )


@pytest.mark.parametrize("where", ["pytorch", "kernels"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_registration(trained, where, request):
    """Schema, fake tensors and autograd, as torch.compile and export need them."""
    device = request.getfixturevalue("device") if where == "kernels" else "cpu"
    x, head, labels = head_inputs(5, 8, 9, trained=trained, device=device)
    product = "fused" if where == "kernels" else "torch"
    for gradient in ["dx"] if not trained[1] else ["keep", "recompute"]:
        args = (x, head, labels, None, product, gradient, trained[0], 4)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.vapr.linear_logps, args, test_utils=tests)


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_compiles_without_a_break(trained):
    x, head, labels = head_inputs(9, 8, 30, trained=trained)
    leaves = [leaf for leaf in (x, head) if leaf.requires_grad]
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    got, true = (f(x, head, labels) for f in (compiled, linear_logps))
    torch.testing.assert_close(got, true)
    for g, t in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(true.sum(), leaves), strict=True):
        torch.testing.assert_close(g, t)


def test_exports():
    class Head(torch.nn.Module):
        def forward(self, x, head, labels):
            return linear_logps(x, head, labels)

    x, head, labels = head_inputs(9, 8, 30, trained=(False, False))
    program = torch.export.export(Head(), (x, head, labels))
    torch.testing.assert_close(program.module()(x, head, labels), linear_logps(x, head, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, y: (x[0], w, y), "do not fit"),
        (lambda x, w, y: (x, w[:, :2], y), "do not fit"),
        (lambda x, w, y: (x, w, y.int()), "labels must be int64"),
        (lambda x, w, y: (x, w, y[:2]), "labels must be int64 of shape"),
        (lambda x, w, y: (x, w.double(), y), "one float dtype"),
        (lambda x, w, y: (x, w[:1], y), "at least 2 rows"),
        (lambda x, w, y: (x, w, y.to("meta")), "lie on cpu, cpu and meta"),
    ],
)
def test_the_wrong_argument_is_named(change, message):
    x, head, labels = head_inputs(4, 6, 8)
    with pytest.raises(ValueError, match=message):
        linear_logps(*change(x, head, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode must be one of auto, .*, got 'fast'"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"reference_logps": torch.zeros(3)}, r"reference_logps must have shape \(4,\) on cpu, got \(3,\) on cpu"),
    ],
)
def test_the_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        linear_logps(*head_inputs(4, 6, 8), **options)
