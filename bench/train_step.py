"""Training steps, vapr against TRL's DPOTrainer: pairs per second and memory, and where vapr's time goes.

    python -m bench.train_step

On a CPU: small models in fp32, two threads. On a GPU: models of the published sizes in bf16. Weights are random; no
number here depends on their values. How to read the rows: bench/README.md.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.arms import TrlArm, VaprArm, new_policy, vapr_config
from bench.record import Timing, matmul_flops, measure, record, synchronize, version
from bench.workloads import SHAPES, WORKLOADS, Subject, Workload
from vapr.engine import Engine
from vapr.logps import completion_logps, per_completion
from vapr.loss import sigmoid_loss
from vapr.metrics import useful_flops
from vapr.model import Policy, hidden_states, image_features
from vapr_kernels import gather_rows, linear_logps

WARMUP = 2
AGREEMENT = 1e-3
"""Largest accepted difference of a step's loss between TRL and vapr. Step by step, so it covers the updates too."""


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ceiling = matmul_flops(device)
    disagreements = []
    for model in options.models:
        for name in options.workloads:
            with tempfile.TemporaryDirectory() as folder:
                subject = Subject(SHAPES[model], Path(folder), device, lora=not options.full)
                disagreements += run_case(subject, WORKLOADS[name], describe(subject, model, name), ceiling, options)
            gc.collect()  # trainers hold themselves in cycles
            torch.cuda.empty_cache()
    if disagreements:
        raise SystemExit("the arms did not do the same work: " + "; ".join(disagreements))


def describe(subject: Subject, model: str, workload: str) -> dict[str, Any]:
    """What a row measured."""
    return {
        "model": model,
        "workload": workload,
        "tuning": f"lora r={subject.shape.lora_rank}" if subject.lora else "full",
        "dtype": str(subject.dtype).removeprefix("torch."),
        "layers": subject.shape.text["num_hidden_layers"],
    }


def parse_options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name in SHAPES if name.startswith("small-") != on_gpu]
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=None, help=f"default: {' '.join(known)}")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=None)
    parser.add_argument("--rounds", type=int, default=None, help="timed steps of every arm")
    parser.add_argument("--pairs-per-step", type=int, default=12 if on_gpu else 4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads() if on_gpu else 2)
    parser.add_argument("--full", action="store_true", help="full fine-tuning of the language model instead of LoRA")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds; no prebuilt batches")
    options = parser.parse_args()
    quick_models = ["qwen2.5-vl-7b", "llava-1.5-7b"] if on_gpu else ["small-qwen2.5-vl"]
    options.models = options.models or (quick_models if options.quick else known)
    options.workloads = options.workloads or (["answers", "captions"] if options.quick else list(WORKLOADS))
    options.rounds = (
        options.rounds
        or {(True, True): 5, (True, False): 12, (False, True): 3, (False, False): 5}[(on_gpu, options.quick)]
    )
    return options


def run_case(
    subject: Subject, workload: Workload, case: dict[str, Any], ceiling: dict[str, Any], options: argparse.Namespace
) -> list[str]:
    """Build the arms, time them as shipped and with batches prebuilt, record and show; returns disagreements."""
    pairs = subject.pairs(workload, options.pairs_per_step * (WARMUP + options.rounds))
    arms, absent = build_arms(subject, workload, pairs, options.pairs_per_step)
    rows = [record("train_step", **case, data="as shipped", arm=arm, absent=reason) for arm, reason in absent.items()]
    for prebuilt in (False,) if options.quick else (False, True):
        for arm in arms.values():
            arm.start(prebuilt=prebuilt)
        rounds = max(2, options.rounds // 2) if prebuilt else options.rounds
        timings = measure(arms, rounds=rounds, warmup=WARMUP, device=subject.device)
        data = "prebuilt" if prebuilt else "as shipped"
        rows += record_arms(arms, timings, {**case, "data": data}, ceiling, options.pairs_per_step)
    show(rows, case)
    breakdown(arms["vapr shared cached"], case)
    return [f"{case['model']} {case['workload']}: {row['arm']}" for row in rows if row.get("agrees") is False]


def build_arms(
    subject: Subject, workload: Workload, pairs: list, pairs_per_step: int
) -> tuple[dict[str, TrlArm | VaprArm], dict[str, str]]:
    """Every arm by name, TRL's first, and why others are absent. All start from the same weights."""
    config = vapr_config(subject, "pair", pairs_per_step)
    first = new_policy(subject, config)
    arms: dict[str, TrlArm | VaprArm] = {}
    absent: dict[str, str] = {}
    on_gpu = subject.device.type == "cuda"
    kinds = {"trl": (False, False), "trl cached": (False, True)}
    if not on_gpu:  # on a GPU Triton runs, and TRL scores completion tokens only by itself
        kinds |= {"trl compact": (True, False), "trl compact cached": (True, True)}
    for name, (compact, cached) in kinds.items():
        if missing := [package for package in ("trl", "datasets") if version(package) is None]:
            absent[name] = f"{missing[0]} is not installed"
            continue
        arms[name] = TrlArm(subject, pairs, pairs_per_step, first[0], compact=compact, cached=cached)
    # On a CPU every arm has a model of its own, so that their losses can be compared; on a GPU one must do.
    trained = first if on_gpu else None
    shares = {"none": "unshared", "pair": "shared", "image": "image-shared"}
    for share, cached in (("none", False), ("pair", False), ("pair", True), ("image", False), ("image", True)):
        if share == "image" and workload.pairs_per_image == 1:
            continue
        name = f"vapr {shares[share]} {'cached' if cached else 'online'}"
        arms[name] = VaprArm(subject, pairs, pairs_per_step, share=share, cached=cached, trained=trained)
    if first[0].kernels:  # what the fused kernels are worth
        plain = new_policy(subject, config, kernels="off")
        arms["vapr shared cached, kernels off"] = VaprArm(
            subject, pairs, pairs_per_step, share="pair", cached=True, trained=plain
        )
    return arms, absent


def record_arms(
    arms: dict[str, TrlArm | VaprArm], timings: dict[str, Timing], case: dict[str, Any], ceiling: dict[str, Any],
    pairs_per_step: int,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for name, arm in arms.items():
        fields: dict[str, Any] = timings[name].fields()
        if timings[name].seconds:
            fields["pairs_per_second"] = pairs_per_step / timings[name].p50
            for against in ("trl", "trl compact"):
                if against in timings and timings[against].seconds:
                    fields[f"speedup_over_{against.replace(' ', '_')}"] = timings[against].p50 / timings[name].p50
        if isinstance(arm, VaprArm):
            fields |= work_of(arm, timings[name], ceiling)
        fields |= agreement(arms, name, case)
        rows.append(record("train_step", **case, arm=name, pairs_per_step=pairs_per_step, **ceiling, **fields))
    return rows


def work_of(arm: VaprArm, timing: Timing, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Tokens of a step, and the rate of useful FLOPs (reference forward and tower are not counted as useful)."""
    step = arm.prebuild()[0]
    fields: dict[str, Any] = {"tokens": step.num_tokens, "tokens_unshared": step.num_tokens_unshared}
    if timing.seconds:
        fields["useful_tflops"] = useful_flops(arm.policy, step) / timing.p50 / 1e12
        fields["useful_share"] = fields["useful_tflops"] / ceiling["matmul_tflops"]
    return fields


def agreement(arms: dict[str, TrlArm | VaprArm], name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Largest difference to TRL's losses, step by step.

    LLaVA differs by design: TRL 1.16 leaves the BOS out and tokenises completions by themselves, stop token included.
    """
    if "trl" not in arms or name == "trl" or case["data"] != "as shipped" or case["dtype"] != "float32":
        return {}
    both = zip(arms[name].losses, arms["trl"].losses, strict=True)
    gap = max(abs(ours - theirs) for ours, theirs in both)
    # Full fine-tuning: vapr's "online" arm scores the reference with the policy as it is by then.
    comparable = not ("llava" in case["model"] and name.startswith("vapr"))
    comparable &= not (case["tuning"] == "full" and "online" in name)
    return {"loss_gap": gap, "agrees": gap <= AGREEMENT if comparable else None}


def breakdown(arm: VaprArm, case: dict[str, Any], repeats: int = 3) -> None:
    """Seconds of each part of a step: the median of a few steps, timed one part at a time."""
    device = arm.policy.device
    arm.start(prebuilt=False)
    samples = [_parts_of_a_step(arm, device) for _ in range(min(repeats + 1, arm.num_steps))]
    medians = {part: sorted(s[part] for s in samples[1:])[len(samples[1:]) // 2] for part in samples[0]}
    record("train_step_breakdown", **case, arm="vapr shared cached", **{f"seconds_{k}": v for k, v in medians.items()})
    table = Table(title=f"{case['model']} {case['workload']}: where a step's time goes", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in medians.items():
        table.add_row(part.replace("_", " "), f"{1e3 * seconds:.1f}", f"{seconds / sum(medians.values()):.0%}")
    console().print(table)


def _parts_of_a_step(arm: VaprArm, device: torch.device) -> dict[str, float]:
    parts: dict[str, float] = {}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        synchronize(device)
        began = time.perf_counter()
        out = function()
        synchronize(device)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - began
        return out

    policy: Policy = arm.policy
    engine: Engine = arm.engine
    step = timed("data_wait", lambda: next(arm.steps))
    for cpu_batch in step.batches:
        batch = cpu_batch.to(device)
        reference = timed("reference_lookup", lambda b=batch: completion_logps(arm.reference.logps(b), b))
        features = timed("tower", lambda b=batch: image_features(policy, b.images))
        hidden = timed("language_model", lambda b=batch, f=features: hidden_states(policy, b, f))
        rows = gather_rows(hidden, batch.predict_from)
        logps = timed("head", lambda r=rows, b=batch: linear_logps(r, policy.head, b.labels))
        chosen, rejected = completion_logps(per_completion(logps, batch), batch).unbind(1)
        losses = sigmoid_loss(chosen, rejected, *reference.unbind(1), beta=0.1)
        timed("backward", lambda x=losses: engine.backward(x.sum() / step.num_pairs))
    timed("optimizer", lambda: (engine.gradient_norm(), engine.step()))
    return parts


def console() -> Console:
    """Wide enough for the tables, also where a log is all there is."""
    return Console(width=max(Console().width, 130))


def show(rows: list[dict[str, Any]], case: dict[str, Any]) -> None:
    table = Table(title=" ".join(str(value) for value in case.values()), title_justify="left")
    for column in (
        "arm",
        "data",
        "pairs/s",
        "ms p20/p50/p80",
        "vs trl",
        "vs compact",
        "step MiB",
        "tokens",
        "loss gap",
    ):
        table.add_column(column, justify="left" if column in ("arm", "data") else "right")
    for row in rows:
        if row.get("absent"):
            table.add_row(row["arm"], row["data"], row["absent"])
            continue
        ms = "/".join(f"{1e3 * row[f'seconds_{p}']:.0f}" for p in ("p20", "p50", "p80"))
        optional = [
            (f"{row[key]:{form}}" if row.get(key) is not None else "")
            for key, form in (
                ("speedup_over_trl", ".2f"), ("speedup_over_trl_compact", ".2f"), ("step_mib", ".0f"), ("tokens", "d"),
                ("loss_gap", ".1e"),
            )
        ]  # fmt: skip
        table.add_row(row["arm"], row["data"], f"{row['pairs_per_second']:.2f}", ms, *optional)
    console().print(table)


if __name__ == "__main__":
    main()
