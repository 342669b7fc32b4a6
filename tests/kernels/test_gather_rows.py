"""gather_rows against its naive twin: output and gradient, judged against the dtype's own error."""

import pytest
import torch

from vapr_kernels import gather_rows, naive
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.testing import assert_matches_naive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [0],  # one row
        [2, 2, 2, 2],  # one row four times, the others never
        [0, 1, 2, 3, 0, 1, 4],  # every row, a prefix twice
        [0, 1, 3, 0, 1, 4, 0],  # all but one row, a prefix twice or three times
        [],  # nothing
    ],
    ids=str,
)
def test_gather_rows(rows, dtype):
    x = torch.randn(5, 2, 3, dtype=dtype).requires_grad_()
    rows = torch.tensor(rows, dtype=torch.int64)
    index = RowIndex.build(rows, 5)
    assert_matches_naive(lambda x: gather_rows(x, index), lambda x: naive.gather_rows(x, rows), x)


def test_gather_rows_sums_copies_in_fp32():
    """256 copies of 1 + 2^-5 in bf16: adding in bf16 would round most of the small parts away and give 258."""
    rows = torch.zeros(256, dtype=torch.int64)
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, RowIndex.build(rows, 1)).backward(torch.full((256, 1), 1.03125, dtype=torch.bfloat16))
    assert x.grad.item() == 264.0


def test_gather_rows_refuses_another_number_of_rows():
    with pytest.raises(ValueError, match="x has 4 rows but the index was built for 5"):
        gather_rows(torch.zeros(4, 2), RowIndex.build(torch.tensor([0]), 5))
