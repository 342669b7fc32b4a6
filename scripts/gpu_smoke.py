"""Take every GPU path once, in under two minutes: each failure is printed, and none hides the next.

    python scripts/gpu_smoke.py                      # on a GPU: real widths, bf16
    TRITON_INTERPRET=1 python scripts/gpu_smoke.py   # without one: small sizes in fp32, for typing mistakes
    python scripts/gpu_smoke.py tower "step of"      # only the checks in whose names one of these words stands

Prints one line a check, the tracebacks at the end, and a last line that counts. A broken CUDA context (an illegal
address, a failed device assertion) breaks every later call of its process, so the script then starts itself again at
the next check. Exits 1 if a check fails.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]
if "SMOKE_FOLDER" not in os.environ:  # survives a new start
    os.environ["SMOKE_FOLDER"] = tempfile.mkdtemp(prefix="vapr-smoke-")
FOLDER = Path(os.environ["SMOKE_FOLDER"])
os.environ["XDG_CACHE_HOME"] = str(FOLDER / "cache")
os.environ["OUT"] = str(FOLDER / "rows")  # benchmarks taken once are no results

import torch  # noqa: E402 - after the environment is set

from bench.operations import operations_here  # noqa: E402
from vapr_kernels import launch  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = "bfloat16" if GPU else "float32"
SECONDS = float(os.environ.get("SMOKE_SECONDS", "120" if GPU else "600"))
CHECKS: list[tuple[str, Callable[[], object]]] = []
INTERPRETED = ("layer kernels", "losses", "head", "the host never waits", "step of a tiny qwen2_5_vl, lora")
"""Beginnings of the checks that run Triton's interpreter where there is no GPU; it is too slow for the others."""


def check(function: Callable[[], object]) -> Callable[[], object]:
    CHECKS.append((function.__name__.replace("_", " "), function))
    return function


def from_tests(name: str) -> ModuleType:
    """A file of tests, whose checks are plain functions of a device."""
    return importlib.import_module(f"tests.{name}")


@check
def what_is_here() -> str:
    import peft
    import transformers
    import triton

    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, triton, transformers, peft))
    optional = (
        "bitsandbytes",
        "pydantic",
        "skimage",
        "trl",
        "datasets",
        "liger_kernel",
        "torchvision",
        "flash_attn",
        "deepspeed",
    )
    absent = [name for name in optional if not importlib.util.find_spec(name)]
    note = f"{versions}; absent: {', '.join(absent) or 'nothing'}; C compiler {shutil.which('cc')}"
    if GPU:
        free, total = torch.cuda.mem_get_info()
        note += f"; {torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return note


@check
def library_calls() -> None:
    """PyTorch's own: grouped key heads and windows of width 80 in varlen attention; a strided product into fp32."""
    if not GPU:
        return
    e = torch.rand(300, 1008, device=DEVICE, dtype=torch.bfloat16)[:, :1003]
    w = torch.randn(1003, 256, device=DEVICE, dtype=torch.bfloat16)
    out = torch.mm(e, w, out_dtype=torch.float32)
    assert (out.double() - e.double() @ w.double()).norm() < 1e-5 * out.double().norm()
    for heads, groups, width, causal in ((28, 4, 128, True), (16, 2, 128, True), (16, 16, 80, False)):
        grouped_heads_equal_repeated_ones(heads, groups, width, causal)


def grouped_heads_equal_repeated_ones(heads: int, groups: int, width: int, causal: bool) -> None:
    from vapr.model.attention import _varlen

    cu_q = torch.tensor([0, 40, 43, 300], device=DEVICE, dtype=torch.int32)
    cu_k = torch.tensor([0, 40, 83, 340], device=DEVICE, dtype=torch.int32) if causal else cu_q.clone()
    shapes = [(300, heads, width)] + 2 * [(int(cu_k[-1]), groups, width)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    results = []
    for repeat in (1, heads // groups):
        keys, values = (x.repeat_interleave(repeat, 1) for x in (k, v))
        out = _varlen(
            q, keys, values, (cu_q, cu_k, 257, 257), scale=width**-0.5, causal=causal, backend="varlen"
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for name, got, truth in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error = float((got.double() - truth.double()).norm() / truth.double().norm())
        assert error < 2e-2, f"{heads}/{groups} heads of {width}: {name} differs by {error:.1e}"


@check
def layer_kernels() -> None:
    kernels = from_tests("kernels.test_gpu_kernels")
    kernels.test_swiglu(DEVICE)
    kernels.test_add_rms_norm(3584, DEVICE)
    kernels.test_gather_keys_values(DEVICE)
    kernels.test_lora_linear(DEVICE)
    for dtype in (torch.bfloat16, torch.float32):
        from_tests("test_gpu").check_gather_determinism(DEVICE, dtype)
        from_tests("kernels.test_adapted_linears").test_with_kernels_and_in_half_precision(DEVICE, dtype)


@check
def losses_that_compare_images() -> None:
    """Five paths a pair, some of them missing, and betas of single pairs."""
    kernels = from_tests("kernels.test_image_losses")
    for terms in (kernels.MDPO, kernels.SYMMETRIC):
        kernels.test_fused_against_naive(terms, 1.0, DEVICE)
    for kind in ("sigmoid", "image", "symmetric"):
        kernels.test_fused_with_betas_of_pairs(kind, DEVICE)
    kernels.test_a_pack_of_pairs_that_all_lack_the_second_image(DEVICE)
    kernels.check_host_never_waits(DEVICE)


def check_head(mode: str, trained: bool, boost: int) -> None:
    from_tests("kernels.test_gpu_kernels").test_the_head(trained, mode, boost, DEVICE)


for mode, trained, boost in (
    ("one-pass", False, 20), ("one-pass", True, 0), ("recompute", True, 0), ("chunked", False, 20),
):  # fmt: skip
    name = f"head {mode}, {'trained' if trained else 'frozen'}"
    CHECKS.append((name, lambda mode=mode, trained=trained, boost=boost: check_head(mode, trained, boost)))


@check
def head_without_gradients() -> None:
    kernels = from_tests("kernels.test_gpu_kernels")
    kernels.test_the_heads_of_all_models_without_gradients("qwen2.5-vl-7b", DEVICE)
    kernels.test_the_heads_of_all_models_without_gradients("llava-1.5-7b", DEVICE)


@check
def head_rows_out_of_range() -> None:
    from_tests("kernels.test_gpu_kernels").test_rows_out_of_range_among_others(DEVICE)


@check
def the_host_never_waits() -> None:
    for trained in (False, True):
        from_tests("kernels.test_gpu_kernels").test_the_host_never_waits(trained, DEVICE)


@check
def attention_against_fp64() -> None:
    policies = from_tests("test_gpu")
    low, backend = (torch.bfloat16, "varlen") if GPU else (torch.float32, "sdpa")
    for forest in policies.FORESTS.values():
        policies.check_attention(forest, (28, 4), DEVICE, low, backend)
    policies.check_attention(policies.FORESTS["many"], (28, 4), DEVICE, torch.float32, "sdpa")
    forest = policies.FORESTS["queries_shorter_than_keys"]
    blocks = (False, True, False, True)
    for both_ways, window in ((blocks, None), (None, 20), (blocks, 20)):  # as in Gemma 3
        for dtype in dict.fromkeys((low, torch.float32)):
            where = backend if dtype == low else "sdpa"
            policies.check_attention(forest, (8, 4), DEVICE, dtype, where, both_ways=both_ways, window=window)


@check
def vision_tower_against_sdpa() -> None:
    policies = from_tests("test_gpu")
    shape = "qwen2.5-vl-7b" if GPU else "small-qwen2.5-vl"
    policies.check_vision_tower(shape, FOLDER / "tower", DEVICE)


@check
def packing_at_7b_widths() -> None:
    policies = from_tests("test_gpu")
    for model in ("qwen2.5-vl-7b", "llava-1.5-7b") if GPU else ("small-qwen2.5-vl",):
        policies.check_packing_error(
            policies.shrink(policies.SHAPES[model], 2, 3), FOLDER / model, DEVICE, torch.bfloat16, num_pairs=4
        )


def check_training_step(family: str, lora: bool) -> None:
    policies = from_tests("test_gpu")
    folder = FOLDER / f"{family}-{lora}"
    policy, pairs, _, _ = tiny_policy(family)
    policies.check_training_step(policy, pairs[:8], folder, DEVICE, DTYPE, family, lora=lora)


def tiny_policy(family: str) -> tuple[Path, list, list[dict], Path]:
    """Folder of a tiny policy, the pairs about photographs, their rows, and where the photographs are."""
    import skimage

    from vapr.data.sources import read_pairs
    from vapr.demo.tiny_policy import build_tiny_policy

    images, file = Path(skimage.__file__).parent / "data", REPOSITORY / "tests" / "data" / "photos.jsonl"
    pairs = list(read_pairs(file, image_root=images))
    messages = [message for pair in pairs for message in (*pair.prompt, *pair.chosen, *pair.rejected)]
    corpus = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    policy = FOLDER / "policies" / family
    if not policy.exists():
        build_tiny_policy(family, policy, corpus, initializer_range=0.15)
    return policy, pairs, [json.loads(line) for line in file.read_text().splitlines()], images


for family in ("qwen2_5_vl", "qwen2_vl", "llava"):
    for lora in (True, False):
        name = f"step of a tiny {family}, {'lora' if lora else 'full'}"
        CHECKS.append((name, lambda family=family, lora=lora: check_training_step(family, lora)))


# Each for what only it has: experts, DeepStack and norms of heads; blocks, windows and (1 + w) norms; a tower that
# attends by image; tiles, newlines and scaled features; marks between tiles.
CHECKS.extend(
    (f"step of a tiny {family}", lambda family=family: check_training_step(family, False))
    for family in ("qwen3_vl_moe", "gemma3", "mistral3", "llava_onevision", "idefics3")
)


@check
def quantised_layers() -> str:
    return from_tests("test_gpu_small_cards").check_quantised_layers(DEVICE)


def check_small_card(name: str) -> str:
    policy, pairs, _, _ = tiny_policy("qwen2_5_vl")
    cache = FOLDER / name.replace(" ", "-")
    return from_tests("test_gpu_small_cards").CHECKS[name](policy, pairs[:8], cache, DEVICE, DTYPE)


CHECKS.extend(
    (f"small cards: {name}", lambda name=name: check_small_card(name))
    for name in ("quantised step", "resting tower", "8-bit AdamW", "halved packs", "no waiting")
)


@check
def runs_with_workers_features_and_kernels_off() -> None:
    policy, _, rows, images = tiny_policy("qwen2_5_vl")
    folder = FOLDER / "runs"
    folder.mkdir(exist_ok=True)
    tolerance = 0.1 if GPU else 1e-4
    from_tests("test_gpu").check_whole_runs(policy, rows[:16], images, folder, DTYPE, tolerance)


@check
def questions_are_answered_in_batches() -> str:
    """In fp32 as each question alone; in the GPU's dtype they are counted."""
    from vapr.evaluation.generation.answer import answer_questions
    from vapr.evaluation.generation.open_model import find_answerer
    from vapr.evaluation.generation.settings import Settings
    from vapr.evaluation.scoring.prediction import Question

    notes = []
    for family in ("qwen2_5_vl", "qwen2_vl", "llava"):
        policy, pairs, _, _ = tiny_policy(family)
        questions = [
            Question(
                benchmark="smoke", id=str(n), images=pair.images, answer="yes",
                question="".join(part["text"] for part in pair.prompt[-1]["content"] if part["type"] == "text"),
            )
            for n, pair in enumerate(pairs[:8])
        ]  # fmt: skip
        answerer = find_answerer(str(policy))
        for dtype in dict.fromkeys(("float32", DTYPE)):
            model = answerer.load(getattr(torch, dtype)).to(DEVICE).eval()
            said = [
                answer_questions(model, answerer.processor(), questions, Settings(max_new_tokens=8, batch_size=size))
                for size in (4, 1)
            ]
            assert all(one.meta["log_p_yes"] < 0 for one in said[0])
            same = sum(a.prediction == b.prediction for a, b in zip(*said, strict=True))
            assert same == len(questions) or dtype != "float32", f"{family}: {same} of {len(questions)}"
            notes.append(f"{family} {dtype}: {same} of {len(questions)} as alone")
    return ", ".join(notes)


@check
def a_broken_off_run_goes_on() -> None:
    policy, _, rows, images = tiny_policy("qwen2_5_vl")
    folder = FOLDER / "resumed"
    folder.mkdir(exist_ok=True)
    from_tests("test_gpu").check_resume(policy, rows[:16], images, folder, DTYPE)


@check
def three_steps_of_a_7b_model() -> str:
    """Seconds, useful FLOPs and memory at real size, the last step at level full; no benchmark."""
    from bench.arms import VaprArm
    from bench.workloads import SHAPES, WORKLOADS, Subject
    from vapr.training.metrics import UsefulFlops

    model, pairs_per_step = ("qwen2.5-vl-7b", 12) if GPU else ("small-qwen2.5-vl", 2)
    subject = Subject(SHAPES[model], FOLDER / "steps", DEVICE)
    pairs = subject.pairs(WORKLOADS["captions"], 3 * pairs_per_step)
    arm = VaprArm(subject, pairs, pairs_per_step, share="pair", cached=False)
    arm.start(prebuilt=True)
    seconds = []
    for level in ("none", "none", "full"):
        arm.policy = dataclasses.replace(arm.policy, checkpointing=level)
        began = time.perf_counter()
        arm()
        seconds.append(time.perf_counter() - began)
    rate = UsefulFlops(arm.policy).of(arm.prebuild()[0]) / seconds[1] / 1e12
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    assert abs(arm.losses[0] - 0.693147) < 0.05
    timed = f"{seconds[1]:.2f} s a step, {seconds[2]:.2f} at level full"
    return f"{model}: {timed}, {rate:.0f} TFLOP/s, peak {peak:.1f} GiB, losses {arm.losses}"


def one_round(name: str) -> str:
    """Every provider that is here, once: a mistake in a peer's call shows before it costs a benchmark."""
    op = importlib.import_module(f"bench.{name}").OP
    microbench = importlib.import_module("bench.microbench")
    providers = [provider for provider in op.providers if "compile" not in provider]
    rows = microbench.main(op, ["--quick", "--rounds", "1", "--no-plot", "--providers", *providers])
    verdicts = {row["provider"]: row.get("absent", "runs") for row in rows}
    return "; ".join(f"{provider}: {verdict}" for provider, verdict in verdicts.items())


CHECKS.extend((f"bench {name}", lambda name=name: one_round(name)) for name in operations_here())


@check
def trl_takes_the_steps_that_vapr_takes() -> str | None:
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")):
        return "trl or datasets is absent: nothing to compare with"
    from_tests("test_gpu").check_trl_arm(FOLDER / "trl", DEVICE)
    return None


def run_checks(state: dict) -> None:
    for number in range(state["next"], len(CHECKS)):
        name, function = CHECKS[number]
        if time.time() - state["began"] > SECONDS:
            state["failed"].append([name, "not reached: out of time"])
            continue
        began, verdict = time.time(), "ok"
        state["next"] = number + 1
        launch.interpret = not GPU and name.startswith(INTERPRETED)
        try:
            torch.manual_seed(0)
            with contextlib.redirect_stdout(io.StringIO()):  # what a run prints would hide the verdicts
                note = function()
            if note:
                verdict += f" ({note})"
            if GPU:
                torch.cuda.synchronize()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the next check must run, whatever this one did
            verdict = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            state["failed"].append([name, "".join(traceback.format_exception(error))[-2500:]])
        (FOLDER / "state.json").write_text(json.dumps(state))
        print(f"{time.time() - began:6.1f} s  {name}: {verdict}", flush=True)
        if GPU and not context_lives():
            print("the CUDA context is lost; starting again at the next check", flush=True)
            os.execv(sys.executable, [sys.executable, *sys.argv])


def context_lives() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return True


def main() -> int:
    saved = FOLDER / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"next": 0, "failed": [], "began": time.time()}
    if wanted := sys.argv[1:]:
        CHECKS[:] = [(name, function) for name, function in CHECKS if any(word in name for word in wanted)]
    run_checks(state)
    for name, trace in state["failed"]:
        print(f"-- {name}\n{trace}")
    passed = len(CHECKS) - len(state["failed"])
    print(f"gpu_smoke: {passed} of {len(CHECKS)} checks passed in {time.time() - state['began']:.0f} s")
    shutil.rmtree(FOLDER, ignore_errors=True)
    return int(bool(state["failed"]))


if __name__ == "__main__":
    sys.exit(main())
