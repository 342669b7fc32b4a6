"""One step's work is what work.json says, neither more nor less; no clock is read."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from tests.training.work import CASES, VERSIONS, Work, changes, count, counting_saved, read_table, write_table


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_no_more_work_than_before(case, tmp_path):
    assert not (found := changes(case, asdict(count(case, tmp_path)), read_table())), "\n".join(found)


def test_the_table_shows_what_sharing_saves():
    table = read_table()
    for case in CASES:
        if case.endswith("pair"):
            none, pair, image = (table[case.replace("pair", share)] for share in ("none", "pair", "image"))
            assert none["tokens"] > pair["tokens"] > image["tokens"]
            assert none["flops"] > pair["flops"] > image["flops"]
            assert pair["tower_images"] == 5 and image["tower_images"] == 3, "three pictures; two are split over packs"


def test_a_storage_counts_once_and_weights_do_not():
    layer, work = nn.Linear(8, 8, bias=False), Work()
    x = torch.randn(4, 8)
    with counting_saved(layer, work):
        y = layer(x).exp()  # saves x, and its own result
        (y[:2] * y[2:]).sum().backward()  # saves two halves of that result, which are the same storage
    assert (work.saved_tensors, work.saved_bytes) == (4, 2 * 4 * 8 * 4)
    assert layer.weight.grad is not None


class Doubled(torch.autograd.Function):
    """Keeps a tensor where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x * 2]
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout * ctx.kept[0] * 0 + 2 * dout


def test_what_a_custom_function_keeps_on_its_own_counts():
    work, x = Work(), torch.randn(4, 8, requires_grad=True)
    with counting_saved(nn.Linear(1, 1), work):
        Doubled.apply(x).sum().backward()
    assert (work.saved_tensors, work.saved_bytes) == (1, 4 * 8 * 4)
    assert torch.equal(x.grad, torch.full((4, 8), 2.0))


CASE = "llava lora pair"
BEFORE = {"tokens": 10, "saved_bytes": 1000}


def test_what_grew_and_what_shrank_is_said():
    table = {"versions": VERSIONS, CASE: BEFORE}
    assert changes(CASE, BEFORE, table) == []
    [line] = changes(CASE, {"tokens": 12, "saved_bytes": 1000}, table)
    assert line == (
        "llava lora pair: tokens grew from 10 to 12; undo that, or accept it with python -m tests.training.work --write "
        "and say why in the commit"
    )
    [line] = changes(CASE, {"tokens": 10, "saved_bytes": 999}, table)
    assert "saved_bytes shrank from 1,000 to 999; write the smaller figure down with python -m" in line


def test_other_versions_may_save_something_else_but_compute_nothing_else():
    table = {"versions": {**VERSIONS, "torch": "1.0"}, CASE: BEFORE}
    [line] = changes(CASE, {"tokens": 12, "saved_bytes": 5000}, table)
    assert "tokens grew" in line


def test_a_written_table_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.work.TABLE", tmp_path / "work.json")
    counts = {case: asdict(Work(tokens=number)) for number, case in enumerate(CASES)}
    write_table(counts)
    assert read_table() == {"versions": VERSIONS, **counts}
