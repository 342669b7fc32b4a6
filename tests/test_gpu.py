"""What only a GPU can show: the varlen backend, bf16, real vocabulary and widths. Skipped without CUDA.

Every check is a plain function of a device. scripts/gpu_smoke.py takes each once, and tests/test_gpu_smoke.py runs that
script on the CPU, so that a typing mistake shows there too.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.arms import TrlArm, VaprArm, new_policy, vapr_config
from bench.workloads import SHAPES, WORKLOADS, Shape, Subject
from tests.runs import losses
from vapr.batches.loader import load_pairs
from vapr.batches.packing import pack
from vapr.batches.sequences import SegmentAttention
from vapr.batches.tokenize import Processor
from vapr.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    LoraConfig,
    OptimConfig,
    PackingConfig,
    PolicyConfig,
    ProbeConfig,
    ReferenceConfig,
    TrainConfig,
)
from vapr.data.pair import PreferencePair
from vapr.data.pairs import write_pairs
from vapr.model import attention
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr.model.policy import Policy, frozen, image_features, load_policy
from vapr.model.reference import Reference, first_margin
from vapr.training import trainer
from vapr.training.engine import Engine
from vapr.training.step import train_step
from vapr_kernels import gather_rows, linear_logps, naive
from vapr_kernels.gather_rows import RowIndex

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
CUDA = torch.device("cuda")


def relative_error(got: Tensor, truth: Tensor) -> float:
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).norm() / truth.norm())


def random_forest(lengths: list[tuple[int, int]], device: torch.device) -> SegmentAttention:
    """Sequences of (queries, keys above them); each one's extra keys are the first tokens of the sequence before it."""
    starts = np.cumsum([0, *(q for q, _ in lengths)])
    keys: list[np.ndarray] = []
    for n, (num_q, above) in enumerate(lengths):
        assert above == 0 or above <= lengths[n - 1][0]
        keys += [starts[n - 1] + np.arange(above) if above else np.empty(0, np.int64), starts[n] + np.arange(num_q)]
    lengths_q = tuple(q for q, _ in lengths)
    lengths_k = tuple(q + above for q, above in lengths)
    return SegmentAttention(
        cu_seqlens_q=torch.tensor([0, *lengths_q]).cumsum(0).int(),
        cu_seqlens_k=torch.tensor([0, *lengths_k]).cumsum(0).int(),
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        keys=RowIndex.build(torch.from_numpy(np.concatenate(keys)), int(starts[-1])),
    ).to(device)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentAttention, scale: float, window: int | None = None
) -> Tensor:
    """Scores with an explicit mask, sequence by sequence, in the dtype of ``q``; heads repeated."""
    k, v = (x[segments.keys.rows].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs = []
    pieces = (q.split(segments.lengths_q), k.split(segments.lengths_k), v.split(segments.lengths_k))
    kinds = segments.both_ways or (False,) * len(segments.lengths_q)
    for q_n, k_n, v_n, both_ways in zip(*pieces, kinds, strict=True):
        scores = torch.einsum("qhe,khe->hqk", q_n, k_n) * scale
        distance = torch.arange(len(k_n) - len(q_n), len(k_n))[:, None] - torch.arange(len(k_n))
        sees = ((distance >= 0) | both_ways) & (distance < (window or len(k_n)))
        sees = sees.to(q.device)
        outs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~sees, -torch.inf).softmax(-1), v_n))
    return torch.cat(outs)


FORESTS = {
    "lone": [(257, 0)],
    "queries_shorter_than_keys": [(400, 0), (3, 390), (1, 3), (129, 1)],  # bottom-right, one query, one shared key
    "many": [(64, 0), (17, 64), (300, 0), (300, 300), (31, 200)],
}


def check_attention(
    lengths: list[tuple[int, int]], heads: tuple[int, int], device: torch.device, dtype: torch.dtype, backend: str, *,
    head_dim: int = 128, both_ways: tuple[bool, ...] | None = None, window: int | None = None,
) -> None:  # fmt: skip
    """Output and gradients of a backend against explicit masks in fp64."""
    segments = dataclasses.replace(random_forest(lengths, device), both_ways=both_ways)
    num_tokens, scale = segments.keys.num_rows, head_dim**-0.5
    q, k, v = (
        torch.randn(num_tokens, num_heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        for num_heads in (heads[0], heads[1], heads[1])
    )
    dout = torch.randn(num_tokens, heads[0], head_dim, device=device, dtype=dtype)
    out = attention.segment_attention(q, k, v, segments, scale=scale, backend=backend, window=window)
    got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true_out = naive_attention(*wide, segments, scale, window)
    truth = [true_out, *torch.autograd.grad(true_out, wide, dout.double())]
    allowed = 1.5e-2 if dtype == torch.bfloat16 else 1e-4
    for name, g, t in zip(("out", "dq", "dk", "dv"), got, truth, strict=True):
        assert g.isfinite().all(), name
        assert relative_error(g, t) < allowed, f"{name}: {relative_error(g, t):.2e}"


@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (32, 32)], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_varlen_attention_is_bottom_right_causal_with_grouped_heads(forest, heads):
    check_attention(FORESTS[forest], heads, CUDA, torch.bfloat16, "varlen")


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("both_ways", [None, (False, True, False, True)], ids=["causal", "both ways"])
def test_blocks_and_windows_as_gemma_has_them(both_ways, window):
    """Heads of 256 go to varlen attention where it has a gradient for them, else to the loop over SDPA."""
    options = {"head_dim": 256, "both_ways": both_ways, "window": window}
    backend = attention.choose_backend("auto", CUDA, torch.bfloat16, head_dim=256, windows=True)
    forest = FORESTS["queries_shorter_than_keys"]
    check_attention(forest, (8, 4), CUDA, torch.bfloat16, backend, **options)
    check_attention(forest, (8, 4), CUDA, torch.float32, "sdpa", **options)


@pytest.mark.parametrize("forest", FORESTS)
def test_sdpa_loop_on_the_gpu(forest):
    check_attention(FORESTS[forest], (28, 4), CUDA, torch.float32, "sdpa")


def test_varlen_agrees_with_the_sdpa_loop():
    segments = random_forest(FORESTS["queries_shorter_than_keys"], CUDA)
    q, k, v = (torch.randn(533, heads, 128, device=CUDA, dtype=torch.bfloat16) for heads in (28, 4, 4))
    outs = [
        attention.segment_attention(q, k, v, segments, scale=0.1, backend=backend) for backend in ("varlen", "sdpa")
    ]
    assert relative_error(*outs) < 1e-2


def check_gather_determinism(device: torch.device, dtype: torch.dtype) -> None:
    """Two backward runs give the same bits, and the sum of the copies."""
    torch.use_deterministic_algorithms(False)  # conftest's hard mode would hide what users get
    rows = torch.randint(0, 50, (4000,))  # each row about 80 times
    index = RowIndex.build(rows, 60).to(device)
    x = torch.randn(60, 4, 128, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(4000, 4, 128, device=device, dtype=dtype)
    first, second = (torch.autograd.grad(gather_rows(x, index), x, dout)[0] for _ in range(2))
    assert torch.equal(first, second)
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(naive.gather_rows(wide, rows.to(device)), wide, dout.double())[0]
    assert relative_error(first, truth) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gather_backward_is_deterministic(dtype):
    check_gather_determinism(CUDA, dtype)


def check_linear_logps(
    device: torch.device, dtype: torch.dtype, *, vocabulary: int, width: int, num_rows: int, trained_head: bool
) -> None:
    """Log-probs and gradients against fp64 on the same (rounded) inputs; one row is confident, one hopeless."""
    hidden = torch.randn(num_rows, width, device=device).to(dtype)
    head = (torch.randn(vocabulary, width, device=device) * 3 / width**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (num_rows,), device=device)
    labels[1] = vocabulary - 1
    hidden[0] = (3 * head[labels[0]].float()).to(dtype)
    hidden[1] = -head[labels[1]]
    hidden.requires_grad_()
    head.requires_grad_(trained_head)
    logps = linear_logps(hidden, head, labels)
    dout = torch.randn(num_rows, device=device)
    leaves = [hidden, head] if trained_head else [hidden]
    got = torch.autograd.grad(logps, leaves, dout)
    wide = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_(trained_head)]
    truth = naive.linear_logps(*wide, labels)
    expected = torch.autograd.grad(truth, wide[: len(leaves)], dout.double())
    error = (logps.double() - truth).abs()
    allowed = 1e-5 + 1e-7 * truth.abs()
    assert (error <= allowed).all(), f"logp error {float(error.max()):.2e} at logp {float(truth[error.argmax()]):.2f}"
    # The gradient is stored in the inputs' dtype: half a unit in its last place is bf16's 2e-3.
    assert relative_error(got[0], expected[0]) < 2e-3
    if trained_head:
        assert relative_error(got[1], expected[1]) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen_head", "trained_head"])
def test_linear_logps_at_a_real_vocabulary(trained_head):
    check_linear_logps(
        CUDA, torch.bfloat16, vocabulary=152_064, width=1024, num_rows=333, trained_head=trained_head
    )  # fmt: skip


def shrink(shape: Shape, layers: int, tower_layers: int) -> Shape:
    """The same widths, fewer layers."""
    text = {**shape.text, "num_hidden_layers": layers}
    vision = dict(shape.vision)
    if shape.family == "llava":
        vision["num_hidden_layers"] = tower_layers
    else:
        vision |= {"depth": tower_layers, "fullatt_block_indexes": [tower_layers - 1]}
    return Shape(
        family=shape.family, text=text, vision=vision, image_size=shape.image_size, lora_rank=8,
        max_tokens=shape.max_tokens, tie_word_embeddings=shape.tie_word_embeddings,
    )  # fmt: skip


def completion_logprobs(policy: Policy, pairs: list, share: str, *, together: bool) -> Tensor:
    """Log-prob of every completion token, pair by pair, in one pack or each path in a pack of its own."""
    batches = [pack(pairs, share)] if together else [pack([pair], "none") for pair in pairs]
    with frozen(policy):
        moved = [batch.to(policy.device) for batch in batches]
        return torch.cat([per_completion(token_logps(policy, batch), batch) for batch in moved]).double()


def check_packing_error(
    shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype, *, num_pairs: int
) -> None:
    """In low precision, sharing and packing cost no more than twice the rounding that separate sequences have.

    The truth is fp32 with the same (rounded) weights, sequences alone.
    """
    subject = Subject(shape, folder, device)
    tokenized = [
        subject.processor.tokenize_pair(pair) for pair in subject.pairs(WORKLOADS["four_per_image"], num_pairs)
    ]
    policy = subject.policy(dtype)
    with torch.no_grad():  # adapters start as nothing; make them count
        for parameter in policy.trained_parameters().values():
            parameter.normal_(0, 0.02)
    low = completion_logprobs(policy, tokenized, "none", together=False)
    packed = {
        share: completion_logprobs(policy, tokenized, share, together=True) for share in ("none", "pair", "image")
    }
    exact = subject.policy(torch.float32)
    exact.base.load_state_dict({name: value.float() for name, value in policy.base.state_dict().items()})
    truth = completion_logprobs(exact, tokenized, "none", together=False)
    own = relative_error(low, truth)
    assert own < 0.05
    for share, values in packed.items():
        error = relative_error(values, truth)
        assert error <= 2 * own + 1e-6, f"{share}: error {error:.2e}, separate sequences {own:.2e}"


@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "llava-1.5-7b"])
def test_packed_bf16_is_as_good_as_separate_sequences_at_7b_widths(model, tmp_path):
    check_packing_error(shrink(SHAPES[model], 2, 3), tmp_path, CUDA, torch.bfloat16, num_pairs=8)


def check_vision_tower(model: str, folder: Path, device: torch.device) -> None:
    """Windows and full attention as the policy runs them, against transformers' own SDPA path, in bf16.

    The truth is fp32 with the same (rounded) weights.
    """
    subject = Subject(shrink(SHAPES[model], 2, 4), folder, device)
    policy = subject.policy(torch.bfloat16)
    vision = policy.base.model.visual.config
    assert (vision._attn_implementation == attention.VISION_TOWER) == (device.type == "cuda")
    pairs = [subject.processor.tokenize_pair(pair) for pair in subject.pairs(WORKLOADS["answers"], 3)]
    images = pack(pairs).to(device).images
    with torch.no_grad():
        got = image_features(policy, images)
        vision._attn_implementation = "sdpa"
        same_dtype = image_features(policy, images)
        exact = subject.policy(torch.float32)
        exact.base.load_state_dict({name: value.float() for name, value in policy.base.state_dict().items()})
        truth = image_features(exact, images)
    assert got.shape == (sum(image.num_tokens for image in images), subject.shape.text["hidden_size"])
    assert relative_error(got, truth) <= 2 * relative_error(same_dtype, truth)


def test_vision_tower_attention_against_sdpa(tmp_path):
    check_vision_tower("qwen2.5-vl-7b", tmp_path, CUDA)


def check_training_step(
    folder: Path, pairs: list[PreferencePair], cache: Path, device: torch.device, dtype: str, family: str, *, lora: bool
) -> None:
    """One update end to end: the loss starts at log 2, gradients are finite, the reference is met to rounding."""
    config = Config(
        run_dir=str(cache / "run"),
        policy=PolicyConfig(model=str(folder), dtype=dtype, lora=LoraConfig(rank=8, alpha=16) if lora else None),
        data=DataConfig(train="unused", shuffle=False, workers=0),
        packing=PackingConfig(max_tokens=160),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.0, pairs_per_step=len(pairs)),
    )
    policy = load_policy(config.policy, device)
    processor = Processor(str(folder), policy.base.config)
    loader = load_pairs(config, pairs, processor)
    engine, reference = Engine(policy, config.optim, 1), Reference(policy, str(cache))
    (step,) = loader.steps(0, 1)
    assert len(step.batches) > 1  # gradients are accumulated over packs
    largest, allowed = first_margin(policy, reference, step.batches)
    assert largest <= allowed, f"{family}: |log-ratio| {largest:.2e}, tolerance {allowed:.2e}"
    values, _ = train_step(policy, engine, reference, step, config.loss).read()
    assert abs(values["loss"] - np.log(2)) < (1e-5 if dtype == "float32" else 0.05)
    assert 0 < values["grad_norm"] < float("inf")
    assert all(master.grad.isfinite().all() for master in engine.masters.values() if master.grad is not None)
    before = {name: master.detach().clone() for name, master in engine.masters.items()}
    engine.step()
    assert any(not torch.equal(before[name], master) for name, master in engine.masters.items())
    with frozen(policy):
        batch = step.batches[0].to(device)
        assert completion_sums(per_completion(token_logps(policy, batch), batch), batch).isfinite().all()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_training_step_in_bf16(family, tiny, photo_pairs, tmp_path, lora):
    check_training_step(tiny(family), photo_pairs[:8], tmp_path, CUDA, "bfloat16", family, lora=lora)


def test_two_training_steps_in_bf16_give_the_same_gradient(tiny, photo_pairs, tmp_path):
    """From the same seed, up to the atomics of FlashAttention's backward."""
    norms = []
    for _ in range(2):
        torch.manual_seed(0)
        config = Config(
            run_dir="run",
            policy=PolicyConfig(model=str(tiny("qwen2_5_vl")), lora=LoraConfig(rank=8, alpha=16)),
            data=DataConfig(train="unused", shuffle=False, workers=0),
            optim=OptimConfig(pairs_per_step=4),
        )
        policy = load_policy(config.policy, CUDA)
        engine = Engine(policy, config.optim, 1)
        processor = Processor(config.policy.model, policy.base.config)
        loader = load_pairs(config, photo_pairs[:4], processor)
        (step,) = loader.steps(0, 1)
        reference = Reference(policy, str(tmp_path))
        norms.append(train_step(policy, engine, reference, step, config.loss).read()[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def check_whole_runs(folder: Path, rows: list[dict], images: Path, cache: Path, dtype: str, tolerance: float) -> None:
    """With workers and cached features, with neither but layers computed again, without kernels: the same losses.

    The second is probed: transformers' own forward and generate run on its patched modules before and after.
    """
    write_pairs(cache / "pairs.jsonl", rows)
    limits = {"pairs": 4, "questions": 2, "shown": 1, "max_new_tokens": 4}
    probe = ProbeConfig(every=100, data=str(cache / "pairs.jsonl"), **limits)
    runs = {"all on": ("auto", 2, True), "all off": ("auto", 0, False), "no kernels": ("off", 2, False)}
    curves = {}
    for name, (kernels, workers, features) in runs.items():
        config = Config(
            run_dir=str(cache / name),
            kernels=kernels,
            policy=PolicyConfig(
                model=str(folder),
                dtype=dtype,
                lora=LoraConfig(rank=4, alpha=8),
                checkpointing="full" if name == "all off" else "none",
            ),
            data=DataConfig(train=str(cache / "pairs.jsonl"), image_root=str(images), workers=workers),
            features=FeaturesConfig(cache=features, cache_dir=str(cache / "features")),
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.0, pairs_per_step=8, epochs=2),
            reference=ReferenceConfig(cache_dir=str(cache / "reference")),
            probe=probe if name == "all off" else ProbeConfig(),
        )
        assert (trainer.train(config) / "adapter_model.safetensors").is_file()
        curves[name] = losses(config)
    assert len(curves["all on"]) == 2 * len(rows) // 8 and curves["all on"][-1] < curves["all on"][0]
    for curve in curves.values():
        assert curve == pytest.approx(curves["all on"], rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_whole_runs(tiny, photo_rows, photo_root, tmp_path, dtype, tolerance):
    check_whole_runs(tiny("qwen2_5_vl"), photo_rows[:16], photo_root, tmp_path, dtype, tolerance)


def check_resume(folder: Path, rows: list[dict], images: Path, cache: Path, dtype: str) -> None:
    """A run that goes on from its first checkpoint has the losses of the unbroken one, vision tower trained."""
    write_pairs(cache / "pairs.jsonl", rows)
    config = Config(
        run_dir=str(cache / "run"),
        policy=PolicyConfig(model=str(folder), dtype=dtype, train=TrainConfig(vision_tower=True)),
        data=DataConfig(train=str(cache / "pairs.jsonl"), image_root=str(images), workers=2),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.0, pairs_per_step=8, epochs=2),
        reference=ReferenceConfig(cache_dir=str(cache / "reference")),
        checkpoint=CheckpointConfig(every=2),
    )
    trainer.train(config)
    unbroken = losses(config)
    for folder in ("checkpoints/step-000004", "final"):  # as if it had been stopped right after step 2
        shutil.rmtree(cache / "run" / folder)
    trainer.train(config, resume=True)
    tolerance = 1e-6 if dtype == "float32" else 2e-2  # FlashAttention's backward adds in no fixed order
    assert len(unbroken) == 4 and losses(config) == pytest.approx(unbroken, rel=tolerance)


def test_a_resumed_run(tiny, photo_rows, photo_root, tmp_path):
    check_resume(tiny("qwen2_5_vl"), photo_rows[:16], photo_root, tmp_path, "bfloat16")


def check_trl_arm(folder: Path, device: torch.device) -> None:
    """TRL's DPOTrainer, as the benchmark calls it, has vapr's loss in the first two steps."""
    subject = Subject(shrink(SHAPES["small-qwen2.5-vl"], 2, 2), folder, device)
    pairs = subject.pairs(WORKLOADS["answers"], 8)
    config = vapr_config(subject, "pair", 4)
    first = new_policy(subject, config)
    peer = TrlArm(subject, pairs, 4, first[0], compact=False, cached=True)
    arm = VaprArm(subject, pairs, 4, share="pair", cached=True, trained=first)
    for each in (peer, arm):
        each.start(prebuilt=False)
        each(), each()
    assert arm.losses == pytest.approx(peer.losses, abs=1e-3 if device.type == "cpu" else 3e-2)


def test_trl_takes_the_steps_that_vapr_takes(tmp_path):
    pytest.importorskip("trl")
    check_trl_arm(tmp_path, CUDA)
