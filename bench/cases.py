"""The cases of the training-step benchmark, a model and a workload each, and the arms of a case."""

import argparse
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.arms import TrlArm, VaprArm, vapr_config
from bench.commit_process import BuildArm, BuildFailed, BuildProcess
from bench.microbench import FAILURES
from bench.record import version
from bench.workloads import MIXES, SHAPES, Subject, Workload
from vapr.batches.loader import PairLoader, load_pairs
from vapr.batches.steps import Step
from vapr.data.pair import PreferencePair
from vapr.data.sources import read_pairs
from vapr.model.policy import Policy
from vapr.training.engine import Engine

KERNELS_OFF = "vapr shared cached, kernels off"
PROFILE = "profile"
Arm = TrlArm | VaprArm | BuildArm


@dataclass(frozen=True, slots=True)
class Case:
    """One model and workload, with the data processes of each arm."""

    subject: Subject
    workload: Workload
    about: dict[str, Any]  # what its rows say was measured
    pairs: list[PreferencePair]
    loaders: dict[str, PairLoader]  # by arm; "packed" and a share: packs ahead of time; ``PROFILE``: timing by parts
    builds: dict[str, BuildArm] = field(default_factory=dict)  # by arm; in processes of their own
    absent: dict[str, str] = field(default_factory=dict)  # why an arm is not there

    @property
    def name(self) -> str:
        return " ".join(str(self.about[key]) for key in ("model", "workload", "mix"))

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


def open_case(
    model: str, workload: str, mix: str, folder: Path, device: torch.device, builds: dict[str, BuildProcess],
    options: argparse.Namespace,
) -> Case:  # fmt: skip
    """Write a case's model folder and rows and start its data processes; no GPU is touched."""
    folder.mkdir()
    subject, wanted = Subject(SHAPES[model], folder, device, lora=not options.full), MIXES[mix][workload]
    rows = subject.write_rows(wanted, options.pairs_per_step * (options.warmup + options.rounds))
    pairs = list(read_pairs(rows))
    arms = [] if options.profile else vapr_arms(wanted, options)
    shares = {name: share for name, share, _ in arms} | {f"packed {share}": share for _, share, _ in arms}
    if options.profile or not options.quick:
        shares |= {PROFILE: "pair"}
    if not options.profile and KERNELS_OFF in chosen([KERNELS_OFF], options) and device.type == "cuda":
        shares |= {KERNELS_OFF: "pair", "packed pair": "pair"}
    loaders = {
        name: load_pairs(vapr_config(subject, share, options.pairs_per_step, None), pairs, subject.new_processor())
        for name, share in shares.items()
    }
    case = Case(subject, wanted, describe(subject, model, workload, mix), pairs, loaders)
    share = "image" if wanted.pairs_per_image > 1 else "pair"
    for name, process in builds.items():
        arm = build_name(name, share)
        try:
            case.builds[arm] = BuildArm(process, folder.name, subject, rows, options.pairs_per_step, share)
        except BuildFailed as error:
            case.absent[arm] = str(error)
    return case


def describe(subject: Subject, model: str, workload: str, mix: str) -> dict[str, Any]:
    """What a row measured."""
    return {
        "model": model,
        "workload": workload,
        "mix": mix,
        "tuning": f"lora r={subject.shape.lora_rank}" if subject.lora else "full",
        "dtype": str(subject.dtype).removeprefix("torch."),
        "layers": subject.config.get_text_config().num_hidden_layers,
    }


def chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    """Those of an arm's names that were asked for."""
    return [name for name in names if name in (options.arms or names)]


def vapr_arms(workload: Workload, options: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """(name, ``packing.share``, whether the reference is cached) of vapr's arms; ``--quick``: those with a ratio."""
    shares = {"none": "unshared", "pair": "shared", "image": "image-shared"}
    own = "image" if workload.pairs_per_image > 1 else "pair"
    kinds = [(own, False), (own, True)]
    if not options.quick or options.arms:
        kinds = [("none", False), ("pair", False), ("pair", True), *(kinds if own == "image" else ())]
    named = [(f"vapr {shares[share]} {'cached' if cached else 'online'}", share, cached) for share, cached in kinds]
    return [arm for arm in named if arm[0] in chosen([arm[0]], options)]


def trl_arms(options: argparse.Namespace, *, on_gpu: bool) -> dict[str, tuple[bool, bool]]:
    """Name -> (compact, cached) of TRL's arms; ``--quick``: as shipped."""
    kinds = {"trl": (False, False)}
    if not options.quick or options.arms:
        kinds |= {"trl cached": (False, True)}
        if not on_gpu:  # on a GPU Triton runs, and TRL scores completion tokens only by itself
            kinds |= {"trl compact": (True, False), "trl compact cached": (True, True)}
    return {name: kind for name, kind in kinds.items() if name in chosen([name], options)}


def build_name(build: str, share: str) -> str:
    """Name of the arm of a build in a process of its own."""
    return f"{build} {'image-shared' if share == 'image' else 'shared'} cached, alone"


def build_arms(
    case: Case, packed: dict[str, list[Step]], first: tuple[Policy, Engine], options: argparse.Namespace
) -> tuple[dict[str, Arm], dict[str, str]]:
    """Every arm by name, TRL's first, and why others are absent. All start from the same weights."""
    arms: dict[str, Arm] = {}
    absent = dict(case.absent)
    on_gpu = case.subject.device.type == "cuda"
    for name, (compact, cached) in trl_arms(options, on_gpu=on_gpu).items():
        if missing := [package for package in ("trl", "datasets") if version(package) is None]:
            absent[name] = f"{missing[0]} is not installed"
            continue
        # On a CPU every arm has a model of its own, so that their losses can be compared; on a GPU one must do.
        shared = arms.get("trl") if on_gpu else None
        assert shared is None or isinstance(shared, TrlArm)
        try:
            arms[name] = TrlArm(
                case.subject, case.pairs, options.pairs_per_step, first[0], compact=compact, cached=cached,
                trained=shared,
            )  # fmt: skip
        except FAILURES as error:  # a peer that breaks costs its own rows only
            traceback.print_exc()
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, share, cached in vapr_arms(case.workload, options):
        arms[name] = VaprArm(
            case.subject, case.pairs, options.pairs_per_step, share=share, cached=cached,
            trained=first if on_gpu else None, loader=case.loaders[name], packed=packed[share],
        )  # fmt: skip
    for name, build in case.builds.items():
        try:
            build.build(first[0])
            arms[name] = build
        except (BuildFailed, torch.OutOfMemoryError) as error:
            absent[name] = str(error)
    return arms, absent
