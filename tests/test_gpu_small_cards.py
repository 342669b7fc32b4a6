"""What serves cards with little memory, on a GPU: quantised bases, a resting tower, 8-bit AdamW, halved packs.

As in test_gpu.py, every check is a plain function of a device, which scripts/gpu_smoke.py takes on the CPU as well.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_gpu import relative_error
from vapr.batches.loader import load_pairs
from vapr.batches.tokenize import Processor
from vapr.config import Config, DataConfig, LoraConfig, OptimConfig, PackingConfig, PolicyConfig
from vapr.data.pair import PreferencePair
from vapr.model.image_features import ImageFeatures
from vapr.model.logps import token_logps
from vapr.model.policy import Policy, image_features, load_policy
from vapr.model.quantized import QuantizedLinear, dequantize
from vapr.model.reference import Reference, first_margin
from vapr.training import step as step_module
from vapr.training.engine import Engine
from vapr.training.out_of_memory import FittingPacks
from vapr.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
CUDA = torch.device("cuda")


def kinds() -> list[str]:
    """Storages that this machine can make."""
    return [*(["nf4"] if importlib.util.find_spec("bitsandbytes") else []), "fp8", "int8"]


def config_of(folder: Path, dtype: str, cache: Path, base_weights: str = "bfloat16", **optim) -> Config:
    return Config(
        run_dir=str(cache / "run"),
        policy=PolicyConfig(
            model=str(folder), dtype=dtype, base_weights=base_weights, lora=LoraConfig(rank=64, alpha=64)
        ),
        data=DataConfig(train="unused", shuffle=False, workers=0),
        packing=PackingConfig(max_tokens=400),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.0, pairs_per_step=8, clip=None, **optim),
    )


def seeded(config: Config, device: torch.device) -> Policy:
    torch.manual_seed(0)
    return load_policy(config.policy, device)


def gradient_of(engine: Engine) -> torch.Tensor:
    return torch.cat([m.grad.flatten() for m in engine.masters.values() if m.grad is not None])


def step_of(config: Config, policy, pairs: list[PreferencePair]):
    (step,) = load_pairs(config, pairs, Processor(config.policy.model, policy.base.config)).steps(0, 1)
    return step


def check_quantised_layers(device: torch.device) -> str:
    """A layer of a 7B's size quantised here and on the CPU: the same weights, or nearly (nf4 has ties)."""
    notes = []
    sizes = (1024, 3584) if device.type == "cuda" else (64, 224)
    torch.manual_seed(0)
    layer = nn.Linear(sizes[1], sizes[0], bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(0, 0.02)
    for kind in kinds():
        here, host = (
            QuantizedLinear(layer, kind, device).weight.cpu(),
            QuantizedLinear(layer, kind, torch.device("cpu")).weight,
        )
        same = float((here == host).float().mean())
        assert same > 0.999, f"{kind}: {same:.3%} of the weights are those that the CPU makes"
        assert relative_error(here, layer.weight) < 0.1
        notes.append(f"{kind} {same:.4%} as on the CPU")
    return ", ".join(notes)


def check_quantised_step(
    folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str
) -> str:
    """Before the first update policy and reference are one, and gradients are those of plain layers."""
    notes = []
    for kind in kinds():
        config = config_of(folder, dtype, cache, kind)
        gradients = []
        for plain in (False, True):  # quantised, and on plain layers with the restored weights
            policy = seeded(config, device)
            step, reference = step_of(config, policy, pairs), Reference(policy, str(cache))
            stored = policy.quantized
            assert stored is not None and stored.layers == stored.linear - 1
            if plain:
                dequantize(policy.base)
            else:
                largest = first_margin(policy, reference, step.batches)[0]
                assert largest == 0.0, f"{kind}: |log-ratio| {largest:.2e} before the first update"
            engine = Engine(policy, config.optim, 1)
            values, _ = train_step(policy, engine, reference, step, config.loss).read()
            gradients.append(gradient_of(engine))
            assert abs(values["loss"] - 0.693147) < 1e-5
        error = relative_error(gradients[0], gradients[1])
        assert error < 1e-3, f"{kind}: gradients differ by {error:.1e} from those of plain layers"
        notes.append(f"{kind} {stored.num_bytes / 2**20:.2f} MiB, gradients differ by {error:.0e}")
    return ", ".join(notes)


def check_resting_tower(
    folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str
) -> str:
    """Features are the same, and on a GPU the tower's memory is free while it rests."""
    config = config_of(folder, dtype, cache)
    policy = load_policy(config.policy, device)
    batch = step_of(config, policy, [pair for pair in pairs if pair.images]).batches[0].to(device)
    with torch.no_grad():
        truth = image_features(policy, batch.images)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    features = ImageFeatures(policy, str(cache / "features"))
    assert policy.tower.rests == (device.type == "cuda") and policy.device.type == device.type
    freed = before - torch.cuda.memory_allocated() if device.type == "cuda" else 0
    for _ in range(2):
        assert torch.equal(features.of_batch(batch), truth)
    assert policy.tower.num_moves == int(device.type == "cuda") and features.hits == features.misses
    assert token_logps(policy, batch, truth).isfinite().all()
    assert device.type != "cuda" or freed > 0.9 * sum(
        p.numel() * p.element_size()
        for n, p in policy.base.named_parameters()
        if ".visual." in n or "vision_tower" in n
    )
    return f"{freed / 2**20:.1f} MiB free"


def check_adamw_8bit(folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str) -> str:
    """A step of each kind, and state that comes back through host memory: the next step has the same bytes."""
    if not importlib.util.find_spec("bitsandbytes"):
        return "bitsandbytes is absent"
    for kind in ("adamw-8bit", "paged-adamw-8bit"):
        config = config_of(folder, dtype, cache, kind=kind)
        weights = []
        for stopped in (False, True):
            policy = seeded(config, device)
            engine, reference = Engine(policy, config.optim, 2), Reference(policy, str(cache))
            step = step_of(config, policy, pairs)
            for number in range(2):
                train_step(policy, engine, reference, step, config.loss)
                engine.step()
                if stopped and number == 0:
                    saved = [{name: x.detach().cpu().clone() for name, x in part.items()} for part in engine.state()]
                    policy = seeded(config, device)
                    engine, reference = Engine(policy, config.optim, 2), Reference(policy, str(cache))
                    engine.load_state(*saved, 1)
            weights.append(torch.cat([master.detach().flatten() for master in engine.masters.values()]))
        error = relative_error(weights[1], weights[0])
        assert error < 1e-6 if dtype == "float32" else error < 1e-3, f"{kind}: {error:.1e}"
    return ""


def check_out_of_memory(
    folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str
) -> str:
    """A real allocation that fails inside a step; the gradient is that of a step that fitted."""
    config = dataclasses.replace(config_of(folder, dtype, cache), packing=PackingConfig(max_tokens=4000))
    gradients, said, real = [], [], step_module.score

    def score(policy, reference, batch, *rest):
        result = real(policy, reference, batch, *rest)
        if batch.num_pairs > len(pairs) // 2:
            if device.type == "cuda":
                torch.empty(2**46, dtype=torch.uint8, device=device)
            raise torch.OutOfMemoryError("as on a GPU")
        return result

    for failing in (False, True):
        policy = seeded(config, device)
        step, reference = step_of(config, policy, pairs), Reference(policy, str(cache))
        engine = Engine(policy, config.optim, 1)
        step_module.score = score if failing else real
        try:
            train_step(policy, engine, reference, step, config.loss, None, FittingPacks("pair", said.append))
        finally:
            step_module.score = real
        gradients.append(gradient_of(engine))
    error = relative_error(gradients[1], gradients[0])
    assert said and error < (1e-4 if dtype == "float32" else 0.05), f"{error:.1e} {said}"
    return f"gradients differ by {error:.0e}"


def check_no_waiting(folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str) -> str:
    """Steps with a cached reference, in which whatever has the host wait for a GPU is an error; then figures as ever.

    The last step has a loss that is not finite: weights and moments stay as they are.
    """
    config = config_of(folder, dtype, cache)
    policy = seeded(config, device)
    step, reference = step_of(config, policy, pairs), Reference(policy, str(cache))
    assert len(step.batches) > 1
    for batch in step.batches:
        reference.logps(batch.to(policy.device))
    engine = Engine(policy, config.optim, 4)
    train_step(policy, engine, reference, step, config.loss)  # whatever is compiled or allocated once
    engine.step()
    torch.cuda.set_sync_debug_mode("error") if device.type == "cuda" else None
    try:
        taken, kept = [], {}
        for loss in (0.0, 0.0, float("inf")):
            kept = {name: x.clone() for part in engine.state() for name, x in part.items()}
            engine.backward(torch.full((), loss, device=device))
            taken.append(train_step(policy, engine, reference, step, config.loss))
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default") if device.type == "cuda" else None
    first, second, last = (one.read()[0] for one in taken)
    assert second["loss"] < first["loss"] < 0.6932 and 0 < second["grad_norm"] < float("inf")
    assert last["loss"] < second["loss"]  # that of the pairs alone
    state = {name: x for part in engine.state() for name, x in part.items()}
    assert all(torch.equal(state[name], x) for name, x in kept.items())
    return f"loss {first['loss']:.4f}, {second['loss']:.4f}"


CHECKS = {
    "quantised step": check_quantised_step, "resting tower": check_resting_tower, "8-bit AdamW": check_adamw_8bit,
    "halved packs": check_out_of_memory, "no waiting": check_no_waiting,
}  # fmt: skip


def test_quantised_layers():
    check_quantised_layers(CUDA)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_small_card(name, dtype, tiny, photo_pairs, tmp_path):
    CHECKS[name](tiny("qwen2_5_vl"), photo_pairs[:8], tmp_path, CUDA, dtype)
