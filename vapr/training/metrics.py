"""Metrics of a run: metrics.jsonl, the trackers, and the figures in them."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapr.batches.steps import Step
from vapr.config import Config, LossConfig
from vapr.families import FAMILIES
from vapr.model.policy import Policy
from vapr.model.quantized import QuantizedLinear
from vapr.plan.attended import attended
from vapr.training.ranks import Ranks
from vapr.training.trackers import Tracker, open_trackers
from vapr_kernels.image_losses import IMAGE_KINDS

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
"""Dense bf16 peak by device name (vendor datasheets); mfu is null for others."""


class Totals:
    """Sums over the pairs of a step (or of an evaluation), kept on the device until they are asked for.

    Figures of a loss that compares images are means over the pairs that it applies to, whose number is its ``_pairs``.

    Args:
        terms: the losses.
    """

    NAMES = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(self, terms: Sequence[LossConfig] = ()) -> None:
        self._image_kinds = [kind for kind in IMAGE_KINDS if any(term.kind == kind for term in terms)]
        sums = [f"{kind} {name}" for kind in self._image_kinds for name in ("pairs", "margins", "accuracies")]
        self._names = (*self.NAMES, *sums)
        self._sums: Tensor | None = None  # fp64, so that the order of adding does not show
        self.num_pairs = 0

    def add(self, losses: Tensor, rewards: Tensor, logps: Tensor) -> None:
        """Add a micro-batch: ``losses`` (P,), ``rewards`` (P, 2 or 5) and ``logps`` (P, 2), chosen first."""
        sides = rewards[:, :2]
        margins = sides[:, 0] - sides[:, 1]
        rows = [losses, *sides.unbind(1), margins, (margins > 0).float(), *logps.unbind(1)]
        for kind in self._image_kinds:
            rows += _image_sums(kind, *rewards.unbind(1))
        sums = torch.stack([row.detach().double().sum() for row in rows])
        self._sums = sums if self._sums is None else self._sums + sums
        self.num_pairs += len(losses)

    def sums(self, device: torch.device) -> Tensor:
        """Return the sums on ``device``, (figures,) fp64; zeros where nothing was added."""
        return torch.zeros(len(self._names), dtype=torch.float64, device=device) if self._sums is None else self._sums

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean of every figure over the pairs that all ranks added; waits for the device."""
        return self.means_of(self.sums(torch.device("cpu")).tolist(), ranks)

    def means_of(self, own: Sequence[float], ranks: Ranks) -> dict[str, float]:
        """Return the same where this rank's sums have been read."""
        *all_sums, num_pairs = ranks.gather([*own, self.num_pairs]).sum(axis=0).tolist()
        sums = dict(zip(self._names, all_sums, strict=True))
        means = {name: sums[name] / num_pairs for name in self.NAMES}
        for kind in self._image_kinds:
            means[f"{kind}_pairs"] = count = int(sums[f"{kind} pairs"])
            if count:
                means |= {
                    f"rewards/{kind}_{name}": sums[f"{kind} {name}"] / count for name in ("margins", "accuracies")
                }
        return means


def _image_sums(kind: str, chosen: Tensor, rejected: Tensor, second: Tensor, *swapped: Tensor) -> list[Tensor]:
    """Return of a loss that compares images whether it applies to each pair, the margin and whether it is right, (P,).

    ``image``: the chosen completion under its own image against the second one. ``symmetric``: the mean of both images'
    margins; right is a pair whose images both prefer their own answer.
    """
    if kind == "image":
        margins = [chosen - second]
    else:
        chosen_swapped, rejected_swapped = swapped
        margins = [chosen - rejected_swapped, rejected - chosen_swapped]
    both = torch.stack(margins)
    applies = ~both.isnan().any(0)
    return [applies.float(), torch.where(applies, both.mean(0), 0.0), (both > 0).all(0).float()]


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl and sends the numbers to the trackers.

    Args:
        run_dir: the run's folder.
        resume_step: objects after this step are cut off; None starts a new file.
        trackers: see :mod:`vapr.training.trackers`; closed with the log.
        writes: False only remembers what would be written: on all ranks but the first.
    """

    def __init__(
        self, run_dir: Path, resume_step: int | None, trackers: Sequence[Tracker] = (), *, writes: bool = True
    ) -> None:
        self._trackers = trackers
        self._sent: set[tuple[int, str]] = set()  # what was cut off, and a tracker may have: step, kind of figures
        self._path, self._writes = run_dir / "metrics.jsonl", writes
        self.evaluated: dict[int, float] = {}  # held-out loss by step
        self.probed: set[int] = set()  # steps
        if resume_step is None:
            if writes:
                self._path.unlink(missing_ok=True)  # a probe of a run that never took a step
        elif self._path.exists():
            self._cut_off(resume_step)
        self._file = (self._path if writes else Path(os.devnull)).open("a", encoding="utf-8")

    @classmethod
    def open(cls, config: Config, run_dir: Path, resume_step: int | None, *, writes: bool = True) -> "MetricsLog":
        """Open the log of a run and the trackers that its config names; see the class for the arguments."""
        trackers = open_trackers(config, run_dir, resume_step) if writes else ()
        return cls(run_dir, resume_step, trackers, writes=writes)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of a step: training's, an evaluation's or a probe's."""
        # JSON knows no NaN: a number that is none becomes null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        self._note_evaluation(step, clean)
        known = {name: value for name, value in clean.items() if value is not None}
        for tracker in self._trackers:
            if tracker.cuts_off or (step, _kind(values)) not in self._sent:
                tracker.write(step, known)

    def write_evaluation(self, step: int, values: dict[str, Any], say: Callable[[str], None]) -> None:
        """Append the held-out figures of a step and show them beside the best so far; none where there are none."""
        if not values:
            return
        self.write(step, values)
        best = min(self.evaluated, key=lambda one: (self.evaluated[one], one))
        comparison = f"lowest loss {self.evaluated[best]:.4f} at step {best:,}"
        say(
            f"step {step:,} held out: loss {values['eval/loss']:.4f} acc {values['eval/rewards/accuracies']:.2f} "
            f"margin {values['eval/rewards/margins']:+.3f}; "
            + ("the lowest loss so far" if best == step else comparison)
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        """Make the file last and close the trackers."""
        self._file.flush()
        if self._writes:
            os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _note_evaluation(self, step: int, values: dict[str, Any]) -> None:
        if _kind(values) == "probe":
            self.probed.add(step)
        if _kind(values) == "eval":
            loss = values["eval/loss"]
            self.evaluated[step] = math.inf if loss is None else loss

    def _cut_off(self, step: int) -> None:
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if entry["step"] > step:
                    self._sent.add((entry["step"], _kind(entry)))
                    continue
                kept.append(line)
                self._note_evaluation(entry["step"], entry)
            except (ValueError, KeyError):
                continue  # the half-written last line of a killed run
        if self._writes:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self._path)


def _kind(values: dict[str, Any]) -> str:
    """Return what an object of metrics.jsonl holds: ``train``, ``eval`` or ``probe``."""
    return "eval" if "eval/loss" in values else "probe" if "probe/accuracy" in values else "train"


class Speed:
    """Speed and memory of steps.

    Args:
        policy: being trained.
        ranks: the processes that train together.
    """

    def __init__(self, policy: Policy, ranks: Ranks) -> None:
        self._device, self._ranks = policy.device, ranks
        self._peak = peak_flops(policy.device)
        self._useful = UsefulFlops(policy)

    def own(self, step: Step) -> tuple[float, float]:
        """Return this rank's FLOPs in a step, 0 where no peak is known to compare them with, and its memory in MiB."""
        return self._useful.of(step) if self._peak else 0.0, peak_memory_mib(self._device)

    def of(self, num_pairs: int, own: tuple[float, float], seconds: float) -> dict[str, float | None]:
        """Return the figures of a step of ``num_pairs`` on all ranks, which took ``seconds`` from update to update.

        The mfu is the mean over the ranks, the memory the largest of one. Every rank calls it.
        """
        each = self._ranks.gather(own)
        return {
            "pairs_per_second": num_pairs / seconds,
            "mfu": float(each[:, 0].mean()) / (self._peak * seconds) if self._peak else None,
            "peak_memory_mib": float(each[:, 1].max()),
        }


def in_words(values: dict[str, Any]) -> str:
    """Put the figures of a training step in one line."""
    return (
        f"{values['pairs_per_second']:.1f} pairs/s loss {values['loss']:.4f} acc {values['rewards/accuracies']:.2f} "
        f"margin {values['rewards/margins']:+.3f} logps {values['logps/chosen']:.1f}/{values['logps/rejected']:.1f}"
        + "".join(
            f" {kind} margin {values[key]:+.3f}" for kind in IMAGE_KINDS if (key := f"rewards/{kind}_margins") in values
        )
    )


class UsefulFlops:
    """Counts the FLOPs that steps need: neither what sharing saves nor what is computed twice.

    Linear layers 2 FLOPs a weight and token (of experts, those that a token is sent to), attention 4 E H for each
    (query, key) that attend, the head only on predicted tokens; backward twice the forward, or once where only adapters
    are trained. The vision tower is left out.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.base.config.get_text_config()
        layers = policy.decoder.layers
        shapes = {name: whole_shape(weight) for name, weight in layers.named_parameters()}
        weights = sum(shape.numel() for name, shape in shapes.items() if len(shape) == 2 and "lora_" not in name)
        active = getattr(config, "num_experts_per_tok", 0)
        weights += sum(shape.numel() // shape[0] * active for shape in shapes.values() if len(shape) == 3)
        weights += sum(q.in_features * q.out_features for q in layers.modules() if isinstance(q, QuantizedLinear))
        adapters = sum(shape.numel() for name, shape in shapes.items() if "lora_" in name)
        passes = 2 if policy.adapters is not None else 3
        self._a_token = 2.0 * (weights * passes + adapters * 3)
        self._a_prediction = 2.0 * passes * whole_shape(policy.head).numel()
        width = layers[0].self_attn.head_dim * config.num_attention_heads
        self._a_key = 3.5 * 4.0 * width
        self._windows = FAMILIES[policy.family].windows(policy.base.config)

    def of(self, step: Step) -> float:
        """Count those of this process's packs."""
        flops = self._a_token * sum(batch.num_tokens for batch in step.batches)
        for batch in step.batches:
            flops += self._a_prediction * len(batch.labels)
            sequences = batch.attention
            flops += self._a_key * attended(
                sequences.lengths_q, sequences.lengths_k, sequences.both_ways, self._windows
            )
        return flops


def whole_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, of which this rank may hold a part alone (ZeRO 3)."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of the device in FLOP/s, None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def peak_memory_mib(device: torch.device) -> float:
    """Return the largest memory so far in MiB: allocated on the GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
