"""8-bit AdamW: near AdamW in fp32, kept in safetensors, resumed to the same bytes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.runs import final_bytes, losses, train_until_crash
from vapr.config import OptimConfig
from vapr.errors import UserError
from vapr.training import trainer
from vapr.training.adamw_8bit import new_optimizer, restore_state, state_tensors

CPU = torch.device("cpu")


def optim(kind: str, **changes) -> dict:
    return {"lr": 1e-3, "pairs_per_step": 8, "epochs": 2, "kind": kind, **changes}


def steps_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, seeds: range) -> None:
    for seed in seeds:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


def made(kind: str, shape: tuple[int, ...], weight_decay: float = 0.1) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    groups = [{"params": [parameter], "weight_decay": weight_decay}]
    return new_optimizer(groups, OptimConfig(lr=1e-2, kind=kind), CPU), parameter


@pytest.mark.parametrize(("shape", "tolerance"), [((64, 96), 0.1), ((32, 16), 1e-5)], ids=["8 bits", "small: fp32"])
def test_the_path_of_weights_is_that_of_adamw(shape, tolerance):
    """Relative to the way that AdamW in double precision goes, weight decay included."""
    optimizer, parameter = made("adamw-8bit", shape)
    start = parameter.detach().clone()
    steps_of(optimizer, parameter, range(10))
    truth = nn.Parameter(start.double())
    peer = torch.optim.AdamW([truth], lr=1e-2, weight_decay=0.1)
    for seed in range(10):
        truth.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
        peer.step()
    way = truth.detach() - start
    assert float((parameter.detach() - truth.detach()).norm() / way.norm()) < tolerance


def test_moments_take_a_quarter_of_the_memory():
    sizes = {}
    for kind in ("adamw", "adamw-8bit"):
        optimizer, parameter = made(kind, (512, 512))
        steps_of(optimizer, parameter, range(1))
        sizes[kind] = sum(t.numel() * t.element_size() for t in state_tensors(optimizer.state[parameter]).values())
    assert 0.25 < sizes["adamw-8bit"] / sizes["adamw"] < 0.26


@pytest.mark.parametrize("kind", ["adamw-8bit", "paged-adamw-8bit"])
def test_a_resumed_run_has_the_bytes_of_an_unbroken_one(kind, make_config, monkeypatch, capsys, recwarn):
    rank = {"rank": 64, "alpha": 64}  # adapters of more than 4,096 numbers
    config = make_config("broken", optim=optim(kind))
    policy = {"model": config.policy.model, "dtype": "float32", "lora": rank}
    unbroken = make_config("unbroken", optim=optim(kind), policy=policy)
    trainer.train(unbroken)
    said = capsys.readouterr().out
    assert ("optim.kind: cpu has no memory to page moments out of" in said) == (kind == "paged-adamw-8bit")
    assert not [warning for warning in recwarn if "Paged" in str(warning.message)]
    config = make_config("broken", optim=optim(kind), policy=policy)
    train_until_crash(config, 4, monkeypatch)
    moments = load_file(Path(config.run_dir) / "checkpoints" / "step-000002" / "optimizer.safetensors")
    kinds = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in moments.items()}
    assert kinds["state1"] == kinds["state2"] == torch.uint8 and kinds["absmax1"] == torch.float32
    assert "qmap1" not in kinds
    trainer.train(config, resume=True)
    assert losses(config) == losses(unbroken) and final_bytes(config) == final_bytes(unbroken)


def test_state_of_another_kind_is_refused():
    eight, full = made("adamw-8bit", (64, 96)), made("adamw", (64, 96))
    for optimizer, parameter in (eight, full):
        steps_of(optimizer, parameter, range(1))
    with pytest.raises(ValueError, match="in 8 bits, and optim.kind is adamw"):
        restore_state(*full, state_tensors(eight[0].state[eight[1]]))
    with pytest.raises(ValueError, match="its optimizer state is step, exp_avg, exp_avg_sq, which is no 8-bit AdamW's"):
        restore_state(*eight, state_tensors(full[0].state[full[1]]))


def test_without_bitsandbytes_it_says_what_to_do(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optim.kind: adamw-8bit needs bitsandbytes, .*, or take adamw"):
        trainer.train(make_config(optim=optim("adamw-8bit")))
