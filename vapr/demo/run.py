"""The demo: draw, teach with ``sft``, edit and audit hard negatives, align with DPO and its controls, and measure."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from vapr.audit.measure import audit
from vapr.cache import written_whole
from vapr.data.sources import read_pairs
from vapr.demo.answers import answer_all
from vapr.demo.datasets import (
    Asked,
    draw_pictures,
    edit,
    length_biased,
    subset,
    without_rejected,
    write_instructions,
    write_set,
)  # fmt: skip
from vapr.demo.measure import Answers, compare
from vapr.demo.outcome import POLICIES, print_outcome
from vapr.demo.remaining import Remaining
from vapr.demo.report import write_report
from vapr.demo.scenes import CELL, SIDE
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.demo.trainings import Training, Trainings
from vapr.errors import UserError
from vapr.pages.audit_report import write_audit_report
from vapr.progress import Display


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSizes:
    """Numbers of what is drawn and trained. docs/demo.md says how long the defaults take."""

    easy_pictures: int = 7000
    """Of the first sft run, from one toy in a picture to three: how the policy learns to see."""
    sft_pictures: int = 5000
    """Of the second, with two or three toys. One run over all, whose learning rate falls once, left colour at 57 %."""
    pair_pictures: int = 1200
    held_out_pictures: int = 400
    pairs_per_step: int = 32
    yes_share: float = 0.7
    """Share of the sft stage's existence questions whose true answer is yes: the bias that the demo plants."""
    sft_lr: float = 1e-3
    dpo_lr: float = 4e-4
    more_sft_lr: float = 4e-4
    beta: float = 0.1
    sft_weight: float = 0.5
    """Weight of the chosen answer's log-prob in the DPO stage. With less, DPO on one-word errors pushes the wrong word
    down and lets words rise that are no answer at all: more answers are garbled."""
    at_a_time: int = 2
    """Trainings that run side by side, each on one thread."""


SFT = "sft"
DPO = "dpo"
COSTS = {"draw": 8.0, "teach": 175.0, "ask": 5.0, "align": 90.0, "ask again": 14.0, "write": 1.0}
"""Seconds of the stages on two quiet cores, in the proportions that were measured."""


def run_demo(out: Path, seed: int = 0, sizes: DemoSizes | None = None, family: str = "llava") -> dict[str, Any]:
    """Run all stages of the demo, and leave everything that they make in ``out``.

    Args:
        out: a new or empty folder.
        seed: seed of the pictures, the weights and the order.
        sizes: how much is drawn and trained; small sizes make a quick check that teaches the policy nothing.
        family: of the policy, one of ``POLICY``.

    Returns:
        The content of ``out/result.json``.

    Raises:
        UserError: if ``out`` holds something already or cannot be written, or if a training fails.
    """
    # Matrices this small gain nothing from a second thread, and on a busy machine the two wait for each other.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run_stages(out, seed, sizes or DemoSizes(), family)
    finally:
        torch.set_num_threads(num_threads)


def _run_stages(out: Path, seed: int, sizes: DemoSizes, family: str) -> dict[str, Any]:
    began = time.monotonic()
    _make_folder(out)
    console = Console(highlight=False, soft_wrap=True)
    remaining = Remaining(COSTS)

    def stage(name: str, explained: str) -> None:
        console.print(f"\n[bold]{explained}[/bold] ({remaining.begin(name)})")

    stage("draw", "Drawing pictures of coloured toys, with questions and true answers")
    instructions, held_out = _draw_everything(out, seed, sizes, family, console)
    with Trainings(out, seed, sizes.at_a_time) as trainings:
        stage("teach", f"Teaching with sft; to {sizes.yes_share:.0%} of its yes/no questions the answer is Yes")
        easy, teaching = _teaching(out, sizes)
        trainings.start([easy])
        ledger, audited = _make_pairs(out, instructions, seed, console)
        _watch(trainings, [easy], remaining, of=(easy, teaching))
        trainings.start([teaching])
        _watch(trainings, [teaching], remaining, of=(easy, teaching))
        stage("ask", "Asking the policy about pictures that it has never seen")
        answers = {SFT: answer_all(teaching.final, out / "held_out" / "pairs.jsonl", SFT)}
        aligning = _aligning(out, teaching.final, sizes)
        stage("align", f"Aligning it in {len(aligning)} ways: DPO, on less and on biased data, and more sft instead")
        trainings.start(aligning)
        _watch(trainings, aligning, remaining)
    stage("ask again", "Asking the policies the same questions")
    for training in aligning:
        answers[training.name] = answer_all(training.final, out / "held_out" / "pairs.jsonl", training.name)
    stage("write", "Writing the page")
    result = {
        "seed": seed,
        "family": family,
        "sizes": asdict(sizes),
        "editing": ledger,
        "audit": audited,
        "trainings": {one.name: asdict(one) for one in (easy, teaching, *aligning)},
        **measured(held_out, {name: answers[name] for name in POLICIES}, seed),
    }
    remaining.end()
    total = time.monotonic() - began
    result["seconds"] = {**remaining.seconds, "total": total, "trainings": trainings.seconds}
    result["estimates"] = [{**one, "were_left": total - float(one["after"])} for one in remaining.said]
    with written_whole(out / "result.json") as file:
        file.write(json.dumps(result, indent=1, default=str).encode() + b"\n")
    write_report(out, result)
    print_outcome(console, out, result)
    return result


def _make_folder(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out: {out} is not an empty folder; give a new one or empty it")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None


def _draw_everything(out: Path, seed: int, sizes: DemoSizes, family: str, console: Console) -> tuple[Path, list[Asked]]:
    """Draw the three sets and build the untrained policy; return the instruction file and the held-out questions."""
    random = np.random.default_rng(seed)
    share = sizes.yes_share
    easy = draw_pictures(out / "sft-easy", random, sizes.easy_pictures, yes_share=share, hard=False, grow=True)
    sft = draw_pictures(out / "sft", random, sizes.sft_pictures, yes_share=share, hard=False)
    asked = draw_pictures(out / "instructions", random, sizes.pair_pictures, yes_share=0.5, hard=True)
    held_out = draw_pictures(
        out / "held_out", random, sizes.held_out_pictures, yes_share=0.5, hard=True, other_than=[*easy, *sft, *asked]
    )
    write_set(out / "sft-easy", without_rejected(easy))
    write_set(out / "sft", without_rejected(sft))
    write_set(out / "held_out", without_rejected(held_out))
    for name, one in (("for sft", [*easy, *sft]), ("to be edited", asked), ("held out", held_out)):
        truths = [a.question.truth for a in one if a.question.category == "existence"]
        share = truths.count("yes") / max(1, len(truths))
        console.print(f"   {name:12} {len(one):6,} questions; the answer to {share:.0%} of the yes/no ones is Yes")
    corpus = [f"USER: {a.question.text} ASSISTANT: {a.question.answer}" for a in (*asked, *easy[::-1][:2000])]
    build_tiny_policy(family, out / "policy", corpus, seed=seed, **COMMON, **POLICY[family])
    return write_instructions(out / "instructions", asked), held_out


# Weights of about 1 / sqrt(hidden_size): with the usual 0.02 a model this narrow takes many times as long to learn.
COMMON: dict[str, Any] = {"vocab_size": 640, "initializer_range": 0.08}

# An image token is a cell of the grid. The position embeddings are about as large as what a patch gives: at their own
# scale, about 1/40 of that in CLIP and 1/20 in Qwen3-VL, where something is would hardly be told.
POLICY: dict[str, dict[str, Any]] = {
    "llava": {
        "position_scale": 25.0,
        "vision": {"image_size": SIDE, "patch_size": CELL, "hidden_size": 128, "intermediate_size": 256},
    },
    "qwen3_vl": {
        "position_scale": 12.0,
        "vision": {"patch_size": CELL // 2, "hidden_size": 128, "intermediate_size": 256},
    },
}  # fmt: skip
"""Families of which the demo trains a policy, and the sizes of each."""


def _teaching(out: Path, sizes: DemoSizes) -> list[Training]:
    """The two runs of sft. The file of the first goes from easy pictures to full ones; its order matters."""
    easy, full = (
        Training(
            name=name, run=out / f"{name}-run", model=out / model, data=out / name / "pairs.jsonl",
            loss={"kind": "sft"}, lr=sizes.sft_lr, num_pairs=len(read_pairs(out / name / "pairs.jsonl")),
            pairs_per_step=sizes.pairs_per_step, shuffle=name == SFT,
        )
        for name, model in (("sft-easy", "policy"), (SFT, "sft-easy-run/final"))
    )  # fmt: skip
    return [easy, full]


def _make_pairs(out: Path, instructions: Path, seed: int, console: Console) -> tuple[dict[str, Any], dict[str, Any]]:
    """Edit, and audit the pairs beside those that length tells; return the job's ledger and the audit."""
    console.print("   meanwhile, as vapr edit and vapr audit do:")
    ledger = edit(instructions, out / "pairs", seed, console.print)
    pairs = read_pairs(out / "pairs")
    pictures = 1 + max(int(Path(str(pair.images[0])).stem) for pair in pairs)
    for name, share in (("dpo-half", 2), ("dpo-quarter", 4)):
        write_set(out / name, subset(pairs, -(-pictures // share)))
    write_set(out / "length-biased", length_biased(pairs))
    sets = {"edited": pairs, "length-biased": read_pairs(out / "length-biased" / "pairs.jsonl")}
    audited = audit(sets, seed=seed)
    write_audit_report(out / "audit.html", audited)
    return ledger, audited


def _aligning(out: Path, model: Path, sizes: DemoSizes) -> list[Training]:
    """Everything that starts from the taught policy, the longest first."""
    dpo = {"kind": "sigmoid", "beta": sizes.beta, "sft_weight": sizes.sft_weight}
    kinds: dict[str, tuple[Path, dict[str, Any], float]] = {
        DPO: (out / "pairs", dpo, sizes.dpo_lr),
        "length-biased": (out / "length-biased" / "pairs.jsonl", dpo, sizes.dpo_lr),
        "more-sft": (out / "pairs", {"kind": "sft"}, sizes.more_sft_lr),
        "dpo-half": (out / "dpo-half" / "pairs.jsonl", dpo, sizes.dpo_lr),
        "dpo-quarter": (out / "dpo-quarter" / "pairs.jsonl", dpo, sizes.dpo_lr),
    }
    return [
        Training(
            name=name, run=out / f"{name}-run", model=model, data=data, loss=loss, lr=lr,
            num_pairs=len(read_pairs(data)), pairs_per_step=sizes.pairs_per_step,
        )
        for name, (data, loss, lr) in kinds.items()
    ]  # fmt: skip


def _watch(trainings: Trainings, those: Sequence[Training], remaining: Remaining, of: Sequence[Training] = ()) -> None:
    """Show the steps of trainings until all are finished; ``of`` are all trainings of the stage, if there are more."""
    total, whole = sum(one.num_steps for one in those), of or those
    steps = trainings.look()  # some may have run while something else was shown
    shown = sum(steps.get(one.name, 0) for one in those)
    with Display("train", total, shown) as display:

        def watch(steps: dict[str, int]) -> None:
            nonlocal shown
            done = sum(steps.get(one.name, 0) for one in those)
            running = [f"{one.name} {steps[one.name]}/{one.num_steps}" for one in those
                       if one.name in steps and steps[one.name] < one.num_steps]  # fmt: skip
            share = sum(steps.get(one.name, 0) for one in whole) / sum(one.num_steps for one in whole)
            note = ", ".join([*running, remaining.line(share)])
            if done > shown:
                display.advance(note, done - shown)
                shown = done
            else:
                display.note(note)

        trainings.wait(watch)


def measured(held_out: Sequence[Asked], answers: dict[str, list[str]], seed: int) -> dict[str, Any]:
    """Return all figures, comparisons and answers, as ``result.json`` holds them."""
    read = {name: Answers(held_out, texts) for name, texts in answers.items()}
    pairs = [(SFT, name) for name in read if name != SFT] + [
        (name, DPO) for name in ("length-biased", "more-sft", "dpo-half", "dpo-quarter")
    ]
    return {
        "policies": {name: one.figures(seed) for name, one in read.items()},
        "compared": {f"{a} -> {b}": compare(read[a], read[b], seed) for a, b in pairs},
        "answers": [
            {
                "picture": f"held_out/{one.picture:05d}.png",
                "category": one.question.category,
                "question": one.question.text,
                "truth": one.question.truth,
                "answers": {name: given.texts[n] for name, given in read.items()},
                "said": {name: given.said[n] for name, given in read.items()},
            }
            for n, one in enumerate(held_out)
        ],
    }
