"""matmul by oneDNN against fp64, whatever the rows behind a matrix hold; on any CPU whose PyTorch has it."""

import pytest
import torch

from tests.conftest import ONEDNN
from vapr_kernels import matmul as module
from vapr_kernels.matmul import matmul, new_rows

ROWS = (0, 1, 2, 15, 16, 17, 100, 1023, 1024, 1025)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("layout", ["weight", "transposed weight"])
@pytest.mark.parametrize("rows", ["contiguous", "parts of wider rows", "with room"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_fp64(with_bias, rows, layout, num_rows, by_onednn):
    a = torch.randn(num_rows, 40)
    if rows == "parts of wider rows":
        a = torch.randn(num_rows, 60)[:, 10:50]
    elif rows == "with room":  # for rows of anything at all
        a = new_rows(a, num_rows, 40).copy_(a)
        behind = a.untyped_storage().nbytes() // 4 - a.numel()
        a.as_strided((behind,), (1,), a.numel()).fill_(torch.nan)
    b = torch.randn(40, 24) if layout == "weight" else torch.randn(24, 40).T
    bias = torch.randn(24) if with_bias else None
    right = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    got = matmul(a, b, bias)
    assert got.is_contiguous() and len(by_onednn) == (num_rows > 1)
    torch.testing.assert_close(got, right.float(), rtol=1e-5, atol=1e-5)


def test_rows_are_multiplied_in_numbers_that_come_again(by_onednn):
    assert [module._round_up(n) for n in (0, 1, 16, 17, 1023, 1025, 4000)] == [0, 16, 16, 32, 1024, 1056, 4032]
    asked = {module._round_up(n) for n in range(1024, 2048)}
    assert len(asked) == 33 and max(module._round_up(n) / n for n in range(512, 8192)) < 1.07
    for num_rows in range(1025, 1040):
        matmul(torch.randn(num_rows, 8), torch.randn(8, 4))
    assert {*by_onednn} == {(1056, 8, 4)}


def test_a_row_does_not_depend_on_how_many_there_are(by_onednn):
    a, b = torch.randn(600, 96), torch.randn(96, 400)
    whole = matmul(a, b)
    for start, stop in ((0, 2), (5, 22), (100, 131), (0, 300), (77, 600)):
        assert torch.equal(matmul(a[start:stop], b), whole[start:stop])


def test_what_goes_to_pytorchs_own(by_onednn):
    """Other dtypes, and layouts for which oneDNN has no kernel."""
    a, b = torch.randn(40, 30), torch.randn(30, 20)
    torch.testing.assert_close(matmul(a.double(), b.double()), a.double() @ b.double())
    torch.testing.assert_close(matmul(a.bfloat16(), b.bfloat16()), a.bfloat16() @ b.bfloat16())
    torch.testing.assert_close(matmul(a.T.contiguous().T, b), a @ b)
    torch.testing.assert_close(matmul(a, torch.randn(30, 60)[:, ::3]), a @ torch.zeros(30, 20), atol=1e3, rtol=0)
    assert by_onednn == []


@pytest.mark.parametrize(
    ("capability", "cpus", "asked"),
    [("AVX512", "vendor_id : AuthenticAMD", True), ("AVX512", "vendor_id : GenuineIntel", False), ("AVX2", "", False)],
)
def test_which_cpus_take_onednn(capability, cpus, asked, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpus)
    monkeypatch.setattr(module, "Path", lambda path: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (module._onednn.__wrapped__() is not None) == (asked and ONEDNN is not None)
