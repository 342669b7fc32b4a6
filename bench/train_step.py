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
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.arms import TrlArm, VaprArm, new_policy, vapr_config
from bench.microbench import FAILURES
from bench.record import Timing, matmul_flops, measure, record, synchronize, version
from bench.workloads import SHAPES, WORKLOADS, Subject, Workload
from vapr.batches.loader import PairLoader, load_pairs
from vapr.batches.steps import Step
from vapr.data.pair import PreferencePair
from vapr.model.logps import completion_logps, per_completion
from vapr.model.policy import Policy, hidden_states, image_features
from vapr.training.engine import Engine
from vapr.training.metrics import UsefulFlops
from vapr_kernels import gather_rows, linear_logps
from vapr_kernels.losses import sigmoid_loss

WARMUP = 2
KERNELS_OFF = "vapr shared cached, kernels off"
AGREEMENT = 1e-3
"""Largest accepted difference of a step's loss between TRL and vapr. Step by step, so it covers the updates too."""


@dataclass(frozen=True, slots=True)
class Case:
    """One model and workload, with the data processes of each arm."""

    subject: Subject
    workload: Workload
    about: dict[str, Any]  # what its rows say was measured
    pairs: list[PreferencePair]
    loaders: dict[str, PairLoader]  # by arm; "packed" and a share: packs ahead of time; "breakdown": timing by parts

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        # All at once: the data processes are to be forked before the GPU is touched.
        cases = [
            open_case(model, name, Path(folder) / f"{model}-{name}", device, options)
            for model in options.models
            for name in options.workloads
        ]
        ceiling = matmul_flops(device)
        for case in cases:
            try:
                problems += run_case(case, ceiling, options)
            except FAILURES as error:  # the cases after it count as much
                traceback.print_exc()
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                record("train_step", **case.about, data="as shipped", arm="all", absent=reason)
                problems.append(f"{case.about['model']} {case.about['workload']} ended in {type(error).__name__}")
            case.close()
            free_memory()
    if problems:
        raise SystemExit("; ".join(problems))


def open_case(model: str, workload: str, folder: Path, device: torch.device, options: argparse.Namespace) -> Case:
    folder.mkdir()
    subject = Subject(SHAPES[model], folder, device, lora=not options.full)
    pairs = subject.pairs(WORKLOADS[workload], options.pairs_per_step * (WARMUP + options.rounds))
    arms = vapr_arms(WORKLOADS[workload])
    shares = {name: share for name, share, _ in arms} | {f"packed {share}": share for _, share, _ in arms}
    loaders = {
        name: load_pairs(vapr_config(subject, share, options.pairs_per_step, None), pairs, subject.new_processor())
        for name, share in {**shares, KERNELS_OFF: "pair", "breakdown": "pair"}.items()
    }
    return Case(subject, WORKLOADS[workload], describe(subject, model, workload), pairs, loaders)


def free_memory() -> None:
    gc.collect()  # trainers hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, e.g. trl 'vapr shared cached'")
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


def run_case(case: Case, ceiling: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Build the arms, time them as shipped and with batches prebuilt, record and show; returns disagreements."""
    pairs = case.pairs
    config = vapr_config(case.subject, "pair", options.pairs_per_step)
    packed = {
        share: list(case.loaders[f"packed {share}"].steps(0, len(pairs) // options.pairs_per_step))
        for share in {share for _, share, _ in vapr_arms(case.workload)}
    }
    first = new_policy(case.subject, config)
    arms, absent = build_arms(case, pairs, packed, first, options)
    rows = [
        record("train_step", **case.about, data="as shipped", arm=arm, absent=reason) for arm, reason in absent.items()
    ]
    rows += time_arms(arms, case, ceiling, options)
    if isinstance(shared := arms.get("vapr shared cached"), VaprArm):
        breakdown(shared, case)
    if first[0].kernels and KERNELS_OFF in (options.arms or [KERNELS_OFF]):  # what the fused kernels are worth
        del arms, shared, first  # one 7B policy at a time
        free_memory()
        plain = VaprArm(
            case.subject, pairs, options.pairs_per_step, share="pair", cached=True, packed=packed["pair"],
            trained=new_policy(case.subject, config, kernels="off"), loader=case.loaders[KERNELS_OFF],
        )  # fmt: skip
        rows += time_arms({KERNELS_OFF: plain}, case, ceiling, options)
    show(rows, case.about)
    name = f"{case.about['model']} {case.about['workload']}"
    return [f"{name}: {row['arm']} did other work than TRL" for row in rows if row.get("agrees") is False]


def time_arms(
    arms: dict[str, TrlArm | VaprArm], case: Case, ceiling: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of interleaved arms, as shipped and (unless --quick) with batches prebuilt."""
    rows = []
    for prebuilt in (False,) if options.quick else (False, True):
        for arm in arms.values():
            arm.start(prebuilt=prebuilt)
        rounds = max(2, options.rounds // 2) if prebuilt else options.rounds
        timings = measure(arms, rounds=rounds, warmup=WARMUP, device=case.subject.device)
        about = {**case.about, "data": "prebuilt" if prebuilt else "as shipped"}
        rows += record_arms(arms, timings, about, ceiling, options.pairs_per_step)
    return rows


def vapr_arms(workload: Workload) -> list[tuple[str, str, bool]]:
    """(name, ``packing.share``, whether the reference is cached) of every arm of vapr's."""
    shares = {"none": "unshared", "pair": "shared", "image": "image-shared"}
    kinds = [("none", False), ("pair", False), ("pair", True)]
    if workload.pairs_per_image > 1:
        kinds += [("image", False), ("image", True)]
    return [
        (f"vapr {shares[share]} {'cached' if cached else 'online'}", share, cached) for share, cached in kinds
    ]  # fmt: skip


def build_arms(
    case: Case, pairs: list, packed: dict[str, list[Step]], first: tuple[Policy, Engine], options: argparse.Namespace
) -> tuple[dict[str, TrlArm | VaprArm], dict[str, str]]:
    """Every arm by name, TRL's first, and why others are absent. All start from the same weights."""
    arms: dict[str, TrlArm | VaprArm] = {}
    absent: dict[str, str] = {}
    on_gpu = case.subject.device.type == "cuda"
    kinds = {"trl": (False, False), "trl cached": (False, True)}
    if not on_gpu:  # on a GPU Triton runs, and TRL scores completion tokens only by itself
        kinds |= {"trl compact": (True, False), "trl compact cached": (True, True)}
    for name, (compact, cached) in kinds.items():
        if name not in (options.arms or kinds):
            continue
        if missing := [package for package in ("trl", "datasets") if version(package) is None]:
            absent[name] = f"{missing[0]} is not installed"
            continue
        # On a CPU every arm has a model of its own, so that their losses can be compared; on a GPU one must do.
        shared = arms.get("trl") if on_gpu else None
        try:
            arms[name] = TrlArm(
                case.subject, pairs, options.pairs_per_step, first[0], compact=compact, cached=cached, trained=shared
            )  # fmt: skip
        except FAILURES as error:  # a peer that breaks costs its own rows only
            traceback.print_exc()
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, share, cached in vapr_arms(case.workload):
        if name not in (options.arms or [name]):
            continue
        arms[name] = VaprArm(
            case.subject, pairs, options.pairs_per_step, share=share, cached=cached, trained=first if on_gpu else None,
            loader=case.loaders[name], packed=packed[share],
        )  # fmt: skip
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
        fields["useful_tflops"] = UsefulFlops(arm.policy).of(step) / timing.p50 / 1e12
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


def breakdown(arm: VaprArm, case: Case, repeats: int = 3) -> None:
    """Seconds of each part of a step: the median of a few steps, timed one part at a time."""
    device = arm.policy.device
    arm.start(prebuilt=False, loader=case.loaders["breakdown"])
    samples = [_parts_of_a_step(arm, device) for _ in range(min(repeats + 1, arm.num_steps))]
    medians = {part: sorted(s[part] for s in samples[1:])[len(samples[1:]) // 2] for part in samples[0]}
    record(
        "train_step_breakdown",
        **case.about,
        arm="vapr shared cached",
        **{f"seconds_{k}": v for k, v in medians.items()},
    )
    about = case.about
    table = Table(title=f"{about['model']} {about['workload']}: where a step's time goes", title_justify="left")
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
