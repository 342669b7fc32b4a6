"""Training steps, vapr against TRL's DPOTrainer and against another commit of vapr: pairs per second and memory.

    python -m bench.train_step
    python -m bench.train_step --quick --against COMMIT
    python -m bench.train_step --models tiny-qwen3_vl tiny-gemma3 ...   # the tiny policy of any family

On a CPU: small models in fp32, two threads. On a GPU: models of the published sizes in bf16. Weights are random; no
number here depends on their values. The last line printed is one JSON document of the ratios. How to read it and the
rows: bench/README.md.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers

from bench.agreement import FirstStep, loss_gap
from bench.arms import VaprArm, new_policy, vapr_config
from bench.cases import KERNELS_OFF, PROFILE, Arm, Case, build_arms, chosen, open_case
from bench.commit_process import BuildArm, BuildProcess
from bench.microbench import FAILURES
from bench.peers import record_absent_peers
from bench.record import REPOSITORY, RUN, Timing, commit, matmul_flops, measure, record
from bench.step_profile import profile_step
from bench.summary import document, show
from bench.work_tree import work_tree
from bench.workloads import MIXES, SHAPES, WORKLOADS
from vapr.training.metrics import UsefulFlops

WARMUP = 2
QUICK_WARMUP = 1
"""Steps that are not timed; another one comes before them, of which only the gradients are looked at."""
QUICK_MODELS = ["small-qwen2.5-vl", "small-llava", "deep-qwen2.5-vl"]
"""Of a CPU."""


def main() -> None:
    began = time.monotonic()
    options = parse_options()
    end_tidily_when_told_to()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    problems, rows = [], []
    ceiling = {} if device.type == "cuda" else matmul_flops(device)  # before other builds start, which takes cores
    with tempfile.TemporaryDirectory() as name, builds(options, Path(name)) as processes:
        if not options.profile:
            record_absent_peers(on_gpu=device.type == "cuda")
        cases: Iterable[Case] = (
            open_case(model, workload, mix, Path(name) / f"{model}-{workload}-{mix}", device, processes, options)
            for model, mix, workload in itertools.product(options.models, options.mix, options.workloads)
        )
        if device.type == "cuda":  # data processes are to be forked before it is touched
            cases = list(cases)
            ceiling = matmul_flops(device)
        run = profile_case if options.profile else run_case
        for case in cases:
            try:
                rows += run(case, ceiling, options)
            except FAILURES as error:  # the cases after it count as much
                traceback.print_exc()
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                rows.append(record("train_step", **case.about, data="as shipped", arm="all", absent=reason))
                problems.append(f"{case.name} ended in {type(error).__name__}")
            case.close()
            free_memory()
            print(f"{case.name}: done after {time.monotonic() - began:.0f} s", flush=True)
    for row in rows:
        if "refused" in row or row.get("agrees") is False:
            why = row.get("refused", "its losses leave TRL's")
            problems.append(f"{row['model']} {row['workload']} {row['mix']}: {row['arm']}: {why}")
    about = {"run": RUN, "commit": commit(), "quick": options.quick, "seconds": round(time.monotonic() - began)}
    for problem in problems:
        print(problem, flush=True)
    if not options.profile:
        print(json.dumps({**document(rows, options.against), **about}), flush=True)
    if problems:
        raise SystemExit(1)


def end_tidily_when_told_to() -> None:
    """Leave by an exception on SIGTERM, so that a work tree is removed; forked data processes still end at once."""
    this = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143) if os.getpid() == this else os._exit(143))


@contextlib.contextmanager
def builds(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, BuildProcess]]:
    """Processes of this tree and of the commit to compare with, by name; none without ``--against``."""
    if options.against is None:
        yield {}
        return
    with work_tree(options.against, folder / "against") as tree, contextlib.ExitStack() as stack:
        processes: dict[str, BuildProcess] = {}
        for name, files in (("vapr", REPOSITORY), (f"vapr {options.against}", tree)):
            processes[name] = BuildProcess(name, files, folder / f"build-{len(processes)}", options.threads)
            stack.callback(processes[name].close)
        yield processes


def free_memory() -> None:
    gc.collect()  # trainers hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse_options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = [name for name in SHAPES if name.startswith(("small-", "deep-"))]
    published = [name for name in SHAPES if name not in small and not name.startswith("tiny-")]
    known = published if on_gpu else small
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=None, help=f"default: {' '.join(known)}")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--mix", nargs="+", choices=list(MIXES), default=None, help="lengths of the rows")
    parser.add_argument("--against", metavar="COMMIT", help="time this commit of vapr on the same rows, too")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, e.g. trl 'vapr shared cached'")
    parser.add_argument("--rounds", type=int, default=None, help="timed steps of every arm")
    parser.add_argument("--pairs-per-step", type=int, default=12 if on_gpu else 4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads() if on_gpu else 2)
    parser.add_argument("--full", action="store_true", help="full fine-tuning of the language model instead of LoRA")
    parser.add_argument("--quick", action="store_true", help="only what the JSON document needs, in few rounds")
    parser.add_argument("--profile", action="store_true", help="only where a step of vapr's goes; times nothing else")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="with --profile: the Chrome trace of one step")
    options = parser.parse_args()
    quick_models = ["qwen2.5-vl-7b", "llava-1.5-7b"] if on_gpu else QUICK_MODELS
    options.models = options.models or (quick_models if options.quick else known)
    options.mix = options.mix or (["equal"] if options.quick or options.profile else list(MIXES))
    options.warmup = QUICK_WARMUP if options.quick else WARMUP
    options.rounds = (
        options.rounds
        or {(True, True): 5, (True, False): 12, (False, True): 5, (False, False): 5}[(on_gpu, options.quick)]
    )
    cases = itertools.product(options.models, options.mix, options.workloads)
    if options.trace and not (options.profile and len(list(cases)) == 1):
        parser.error("--trace is of one step: give --profile, one of --models and one of --workloads")
    return options


def profile_case(case: Case, ceiling: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Profile a step of ``vapr shared cached`` and nothing else."""
    arm = VaprArm(case.subject, case.pairs, options.pairs_per_step, share="pair", cached=True)
    profile_step(arm, case.loaders[PROFILE], case.about, options.trace)
    return []


def run_case(case: Case, ceiling: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build the arms, time those that do the same work, record and show; returns the rows."""
    config = vapr_config(case.subject, "pair", options.pairs_per_step)
    packed = {
        name.removeprefix("packed "): list(loader.steps(0, len(case.pairs) // options.pairs_per_step))
        for name, loader in case.loaders.items()
        if name.startswith("packed ")
    }
    first = new_policy(case.subject, config)
    arms, absent = build_arms(case, packed, first, options)
    about = {**case.about, "data": "as shipped"}
    rows = [record("train_step", **about, arm=arm, absent=reason) for arm, reason in absent.items()]
    if not arms:
        return rows
    compared_with = next(iter(arms))
    truth = FirstStep(compared_with, *arms[compared_with].first_step())
    rows += time_arms(arms, case, truth, ceiling, options)
    for build in case.builds.values():
        build.close()
    if PROFILE in case.loaders and "vapr shared cached" in arms:
        profile_step(arms["vapr shared cached"], case.loaders[PROFILE], case.about, ceiling)
    if first[0].kernels and chosen([KERNELS_OFF], options):  # what the fused kernels are worth
        arms.clear()  # one 7B policy at a time
        del first
        free_memory()
        plain = VaprArm(
            case.subject, case.pairs, options.pairs_per_step, share="pair", cached=True, packed=packed["pair"],
            trained=new_policy(case.subject, config, kernels="off"), loader=case.loaders[KERNELS_OFF],
        )  # fmt: skip
        rows += time_arms({KERNELS_OFF: plain}, case, truth, ceiling, options)
    show(rows, case.about)
    return rows


def time_arms(
    arms: dict[str, Arm], case: Case, truth: FirstStep, ceiling: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of interleaved arms, as shipped and (unless --quick) with batches prebuilt; drops those that are refused."""
    compared = truth.compare(arms, case.about["dtype"])
    refused = {name: fields for name, fields in compared.items() if "refused" in fields}
    rows = [
        record("train_step", **case.about, data="as shipped", arm=name, **fields) for name, fields in refused.items()
    ]
    for name in refused:
        del arms[name]
    for prebuilt in (False,) if options.quick else (False, True):
        for arm in arms.values():
            arm.start(prebuilt=prebuilt)
        rounds = max(2, options.rounds // 2) if prebuilt else options.rounds
        timings = measure(arms, rounds=rounds, warmup=options.warmup, device=case.subject.device)
        about = {**case.about, "data": "prebuilt" if prebuilt else "as shipped"}
        rows += record_arms(arms, timings, about, compared, ceiling, options)
    return rows


def record_arms(
    arms: dict[str, Arm], timings: dict[str, Timing], about: dict[str, Any], compared: dict[str, dict[str, Any]],
    ceiling: dict[str, Any], options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for name, arm in arms.items():
        fields: dict[str, Any] = {**compared.get(name, {}), **timings[name].fields()}
        if timings[name].seconds:
            fields["pairs_per_second"] = options.pairs_per_step / timings[name].p50
            for against in ("trl", "trl compact"):
                if against in timings and timings[against].seconds:
                    fields[f"speedup_over_{against.replace(' ', '_')}"] = timings[against].p50 / timings[name].p50
        if isinstance(arm, VaprArm):
            fields |= work_of(arm, timings[name], ceiling)
        if isinstance(arm, BuildArm):
            fields |= over_commit(name, timings, options.against)
        fields |= loss_gap(arms, name, about)
        rows.append(
            record("train_step", **about, arm=name, pairs_per_step=options.pairs_per_step, **ceiling, **fields)
        )  # fmt: skip
    return rows


def over_commit(name: str, timings: dict[str, Timing], against: str) -> dict[str, Any]:
    """Speed (median of the rounds' ratios) and memory of this tree's build over the other commit's, each on its own."""
    other = next((n for n in timings if n.startswith(f"vapr {against} ")), None)
    if other in (None, name) or not (timings[name].seconds and timings[other].seconds):
        return {}
    ours, theirs = timings[name], timings[other]
    ratios = [old / new for old, new in zip(theirs.seconds, ours.seconds, strict=True)]
    fields: dict[str, Any] = {"against": against, "speed_over_commit": statistics.median(ratios)}
    if ours.step_mib is not None and theirs.step_mib:
        fields["memory_over_commit"] = ours.step_mib / theirs.step_mib
    return fields


def work_of(arm: VaprArm, timing: Timing, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Tokens of a step, and the rate of useful FLOPs (reference forward and tower are not counted as useful)."""
    step = arm.prebuild()[0]
    fields: dict[str, Any] = {"tokens": step.num_tokens, "tokens_unshared": step.num_tokens_unshared}
    if timing.seconds:
        fields["useful_tflops"] = UsefulFlops(arm.policy).of(step) / timing.p50 / 1e12
        fields["useful_share"] = fields["useful_tflops"] / ceiling["matmul_tflops"]
    return fields


if __name__ == "__main__":
    main()
