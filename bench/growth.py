"""How a step's time grows: with the size of packs, images and completions, and with pairs an image.

    python -m bench.growth                       # under 6 minutes on two cores; or on the GPU, with wider layers
    python -m bench.growth --plot docs/growth    # plots and docs/growth.md of the newest rows; nothing is measured

How to read the rows: bench/README.md.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench.arms import new_policy, vapr_config
from bench.growth_page import write_page
from bench.record import measure, record
from bench.workloads import SHAPES, SMALL_QWEN, Subject, Workload
from vapr.batches.loader import load_pairs
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.plan.counted import COUNTED
from vapr.training.engine import Engine
from vapr.training.step import train_step

SIDE = 28
"""Pixels of an image token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is trained on at one value of what grows; one step is timed again and again."""

    value: int
    pairs: int  # of the step
    image: tuple[int, int] = (16, 16)  # in image tokens
    completion_tokens: int = 20
    pairs_per_image: int = 1
    share: str = "pair"
    max_tokens: int = 32_000


SWEEPS = {
    # the same pairs in more or fewer packs: at 32,000 tokens they are one
    "pack_tokens": [Point(value=n, max_tokens=n, pairs=94) for n in (2_000, 4_000, 8_000, 16_000, 32_000)],
    "image_tokens": [
        Point(value=w * h, image=(w, h), pairs=2) for w, h in ((16, 16), (23, 22), (32, 32), (45, 44), (64, 62))
    ],
    "completion_tokens": [Point(value=n, completion_tokens=n, pairs=8) for n in (10, 30, 100, 300, 1_000)],
    "pairs_per_image": [Point(value=n, pairs_per_image=n, share="image", pairs=16) for n in (1, 2, 4, 8)],
}


class StepArm:
    """The step of a point, its packs in memory and its reference known: forward, backward and update."""

    def __init__(self, subject: Subject, point: Point, trained: tuple[Policy, Engine]) -> None:
        config = vapr_config(subject, point.share, point.pairs)
        workload = Workload("growth", point.completion_tokens, point.pairs_per_image)
        loader = load_pairs(config, subject.pairs(workload, point.pairs), subject.new_processor())
        (self.step,) = loader.steps(0, 1)
        loader.close()
        self._loss, (self._policy, self._engine) = config.loss, trained
        self._reference = Reference(self._policy, str(subject.folder.parent / "references"), point.share)
        for pack in self.step.batches:
            self._reference.logps(pack.to(self._policy.device))

    def __call__(self) -> None:
        train_step(self._policy, self._engine, self._reference, self.step, self._loss)
        self._engine.step()

    def count_flops(self) -> int:
        """All that PyTorch's counter sees in a step."""
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            self()
        return int(counter.get_total_flops())


def main() -> None:
    options = parse_options()
    if options.plot:
        print("\n".join(map(str, write_page(options.plot))))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        trained = None
        for sweep in options.sweeps:
            points = [SWEEPS[sweep][0], SWEEPS[sweep][1]] if options.quick else SWEEPS[sweep]
            arms = {}
            for point in points:
                subject = subject_of(point, Path(name) / f"{sweep}-{point.value}", device)
                trained = trained or new_policy(subject, vapr_config(subject, point.share, point.pairs))
                arms[str(point.value)] = StepArm(subject, point, trained)
            for fields in timed(sweep, points, arms, options.rounds, device):
                print(json.dumps(fields if options.quick else record("growth", **fields)), flush=True)


def parse_options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 3, help="timed steps of every point")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads() if on_gpu else 2)
    parser.add_argument("--quick", action="store_true", help="two points each; nothing is recorded")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write plots there and FOLDER.md from the rows")
    return parser.parse_args()


def subject_of(point: Point, folder: Path, device: torch.device) -> Subject:
    """Two layers of width 192 on a CPU; on a GPU four of a 7B model."""
    wide = SHAPES["qwen2.5-vl-7b"]
    text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 3}
    shape = replace(SMALL_QWEN, text={**SMALL_QWEN.text, **text})
    if device.type == "cuda":
        shape = replace(wide, text={**wide.text, "num_hidden_layers": 4})
    width, height = point.image
    shape = replace(shape, image_size=(SIDE * width, SIDE * height), max_tokens=point.max_tokens)
    return Subject(shape, folder, device)


def timed(
    sweep: str, points: list[Point], arms: dict[str, StepArm], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time the points of a sweep in turn; return the fields of a row for each."""
    flops = {name: arm.count_flops() for name, arm in arms.items()}  # a warm-up, too
    timings = measure(arms, rounds=rounds, warmup=1, device=device)
    rows = []
    for point in points:
        timing, step = timings[str(point.value)], arms[str(point.value)].step
        fields = {
            "sweep": sweep, **asdict(point), "tokens": step.num_tokens, "packs": len(step.batches),
            "largest_pack": max(pack.num_tokens for pack in step.batches), "flops": flops[str(point.value)],
            **timing.fields(),
        }  # fmt: skip
        if timing.seconds:
            fields["seconds_per_pair"] = timing.p50 / point.pairs
        rows.append(fields)
    return rows


if __name__ == "__main__":
    main()
