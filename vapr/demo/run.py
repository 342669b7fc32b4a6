"""The demo: draw pictures, teach with ``sft``, align with DPO on hard negatives, and measure before and after."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

from vapr.batches.families import load_model_config
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.demo.report import write_report
from vapr.demo.scenes import CATEGORIES, Question, ask, balanced, draw, random_scene
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.errors import UserError
from vapr.progress import Display
from vapr.training import trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSizes:
    """Numbers of what is drawn and trained. The defaults take about four minutes on two CPU cores."""

    sft_pictures: int = 6000
    dpo_pictures: int = 2200
    held_out_pictures: int = 250
    pairs_per_step: int = 32
    yes_share: float = 0.7
    """Share of the sft stage's existence questions whose true answer is yes: the bias the demo plants."""
    sft_lr: float = 1e-3
    dpo_lr: float = 4e-4
    beta: float = 0.1
    sft_weight: float = 0.2
    """Weight of the chosen answer's log-prob in the DPO stage. Without it, DPO on one-word errors pushes the wrong word
    down and lets other wrong words rise: the other kinds of question get worse."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out question and what each policy said."""

    picture: str  # path relative to the demo's folder
    category: str
    question: str
    truth: str
    before: str
    after: str


def run_demo(out: Path, seed: int = 0, sizes: DemoSizes | None = None) -> dict[str, Any]:
    """Run all stages of the demo, and leave everything that they make in ``out``.

    Args:
        out: a new or empty folder.
        seed: seed of the pictures, the weights and the order.
        sizes: how much is drawn and trained; small sizes make a quick check that teaches the policy nothing.

    Returns:
        The content of ``out/result.json``.

    Raises:
        UserError: if ``out`` holds something already or cannot be written.
    """
    # Matrices this small gain nothing from a second thread, and on a busy machine the two wait for each other.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run_stages(out, seed, sizes or DemoSizes())
    finally:
        torch.set_num_threads(num_threads)


def _run_stages(out: Path, seed: int, sizes: DemoSizes) -> dict[str, Any]:
    began = time.monotonic()
    _make_folder(out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "[bold]1. Drawing[/bold] pictures of coloured shapes, with questions, true answers and hard negatives"
    )
    _draw_everything(out, seed, sizes, console)
    seconds = {"drawing": time.monotonic() - began}
    answers = {}
    stages = (
        ("sft", "before", f"on true answers; the answer to {sizes.yes_share:.0%} of its yes/no questions is Yes"),
        ("dpo", "after", "on balanced hard negatives: the true answer, and the same with one word wrong"),
    )
    for number, (stage, when, explained) in enumerate(stages, start=2):
        console.print(f"\n[bold]{number}. Training with {stage}[/bold] {explained}")
        started = time.monotonic()
        final = trainer.train(Config.load(_config_file(out, stage, seed, sizes)))
        seconds[stage] = time.monotonic() - started
        console.print(f"   Asking the policy of {final} about pictures it has never seen")
        answers[when] = answer_all(final, out / "held_out" / "pairs.jsonl")
    pairs = read_pairs(out / "held_out" / "pairs.jsonl")
    answered = [
        Answered(
            picture=f"held_out/{Path(str(pair.images[0])).name}",
            category=str(pair.category),
            question=pair.prompt[0]["content"][1]["text"],
            truth=pair.chosen[0]["content"][0]["text"],
            before=before,
            after=after,
        )
        for pair, before, after in zip(pairs, answers["before"], answers["after"], strict=True)
    ]
    seconds["total"] = time.monotonic() - began
    result = {
        "seed": seed, "sizes": asdict(sizes), "seconds": seconds, **score(answered),
        "answers": [asdict(one) for one in answered],
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_report(out, result)
    _say_result(console, out, result)
    return result


def _make_folder(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out: {out} is not an empty folder; give a new one or empty it")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None


def _draw_everything(out: Path, seed: int, sizes: DemoSizes, console: Console) -> None:
    """Draw the pictures and write the pair files of the three sets, and build the untrained policy."""
    random = np.random.default_rng(seed)
    sft = draw_set(out / "sft", random, sizes.sft_pictures, yes_share=sizes.yes_share, hard=False, grow=True)
    dpo = draw_set(out / "dpo", random, sizes.dpo_pictures, yes_share=0.5, hard=True, balance=True)
    held_out = draw_set(out / "held_out", random, sizes.held_out_pictures, yes_share=0.5, hard=True, balance=True)
    for name, asked in (("sft", sft), ("dpo", dpo), ("held out", held_out)):
        existence = [question.truth for question in asked if question.category == "existence"]
        share = existence.count("Yes") / max(1, len(existence))
        console.print(f"   {name:9} {len(asked):6,} questions; the answer to {share:.0%} of the yes/no ones is Yes")
    # Enough for every word; what only the sft stage asks is spelled in smaller pieces.
    corpus = [f"{question.text} {answer}" for question in dpo[:2000] for answer in (question.answer, question.rejected)]
    # Weights of about 1 / sqrt(hidden_size): with the usual 0.02 a model this narrow takes many times as long to learn.
    build_tiny_policy("qwen2_5_vl", out / "policy", corpus, seed=seed, vocab_size=360, initializer_range=0.08)


def draw_set(
    folder: Path, random: np.random.Generator, num_pictures: int, *,
    yes_share: float, hard: bool, balance: bool = False, grow: bool = False,
) -> list[Question]:  # fmt: skip
    """Write pictures and ``pairs.jsonl`` into ``folder``.

    Args:
        folder: created.
        random: source of everything random.
        num_pictures: how many; each gets up to seven questions.
        yes_share: share of existence questions whose true answer is yes, before balancing.
        hard: whether absent things are made of a colour and a shape that are present.
        balance: leave questions out until no answer can be told without looking.
        grow: begin with one thing in a picture, end with up to three, and ask for descriptions: how the policy
            learns to see. Else two or three things throughout.

    Returns:
        The questions, in file order.
    """
    folder.mkdir()
    asked: list[tuple[int, Question]] = []
    for number in range(num_pictures):
        most = min(3, 1 + 5 * number // num_pictures) if grow else 3
        scene = random_scene(random, 1 if grow else 2, most)
        draw(scene).save(folder / f"{number:05d}.png")
        for category in (*CATEGORIES, "existence", *(("describe",) if grow else ())):
            wants_yes = bool(random.random() < yes_share)
            question = ask(scene, category, random, wants_yes=wants_yes, hard=hard)
            if question is not None and (number, question) not in asked[-7:]:
                asked.append((number, question))
    if balance:
        asked = balanced(asked)
    write_pairs(folder / "pairs.jsonl", [_row(n, picture, question) for n, (picture, question) in enumerate(asked)])
    return [question for _, question in asked]


def _row(number: int, picture: int, question: Question) -> dict[str, Any]:
    return {
        "id": f"{number:06d}",
        "images": [f"{picture:05d}.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
        "chosen": question.answer,
        "rejected": question.rejected,
        "category": question.category,
        "edits": [question.edit],
    }


def _config_file(out: Path, stage: str, seed: int, sizes: DemoSizes) -> Path:
    """Write the config of a stage as YAML, with which ``vapr train`` repeats it."""
    sft = stage == "sft"
    config = {
        "run_dir": str(out / f"{stage}-run"),
        "seed": seed,
        "policy": {
            "model": str(out / "policy" if sft else out / "sft-run" / "final"),
            "dtype": "float32",
            "train": {"language_model": True, "projector": True, "vision_tower": True},
        },
        # The sft file goes from easy pictures to full ones; its order matters.
        "data": {"train": str(out / stage / "pairs.jsonl"), "shuffle": not sft},
        "loss": {"kind": "sft"} if sft else {"kind": "sigmoid", "beta": sizes.beta, "sft_weight": sizes.sft_weight},
        "packing": {"share": "image"},
        "optim": {
            "lr": sizes.sft_lr if sft else sizes.dpo_lr,
            "schedule": "linear",
            "warmup_ratio": 0.03,
            # The gradients of the first steps are large; the usual 0.999 would remember them for most of the run.
            "betas": [0.9, 0.98],
            "pairs_per_step": sizes.pairs_per_step,
        },
        "reference": {"cache_dir": str(out / "reference-cache")},
        "checkpoint": {"every": 1000, "keep": 1},
    }
    path = out / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def answer_all(model: Path, pairs_file: Path) -> list[str]:
    """Answer every question of a pair file greedily with an untouched Hugging Face model, in the file's order."""
    pairs = list(read_pairs(pairs_file))
    config = load_model_config(str(model))
    processor = Processor(str(model), config)
    policy = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenized = [processor.tokenize_pair(pair) for pair in pairs]
    answers = [""] * len(pairs)
    with Display("answer", len(pairs), unit="question") as display:
        for numbers in _batches_of_equal_length(tokenized, batch_size=64):
            for number, ids in zip(numbers, _generate(policy, [tokenized[n] for n in numbers]), strict=True):
                answers[number] = str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            display.advance("", len(numbers))
    return answers


def _batches_of_equal_length(tokenized: list[TokenizedPair], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of questions whose prompts are equally long, so that a batch needs no padding."""
    by_length: dict[int, list[int]] = {}
    for number, pair in enumerate(tokenized):
        by_length.setdefault(pair.paths[0].completion_start, []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def _generate(policy: Any, pairs: list[TokenizedPair]) -> list[list[int]]:
    """Complete prompts of one length greedily; they are tokenised as the trainer does it."""
    paths = [pair.paths[0] for pair in pairs]
    prompts = torch.from_numpy(np.stack([path.input_ids[: path.completion_start] for path in paths]))
    images = [image for path in paths for image in path.images]
    with torch.inference_mode():
        out = policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            mm_token_type_ids=(prompts == policy.config.image_token_id).int(),
            pixel_values=torch.cat([image.pixel_values for image in images]),
            image_grid_thw=torch.tensor([image.grid_thw for image in images]),
            max_new_tokens=24,
            do_sample=False,
        )
    return out[:, prompts.shape[1] :].tolist()


def score(answered: list[Answered]) -> dict[str, Any]:
    """Return exact-match accuracy, overall and by category, and the share of "Yes" among the yes/no questions."""

    def share(holds: list[bool]) -> float:
        return sum(holds) / max(1, len(holds))

    groups: dict[str, list[Answered]] = {
        "overall": answered,
        **{c: [one for one in answered if one.category == c] for c in CATEGORIES},
    }
    accuracy = {
        name: {
            "questions": len(members),
            "before": share([one.before == one.truth for one in members]),
            "after": share([one.after == one.truth for one in members]),
        }
        for name, members in groups.items()
    }
    said = ("truth", "before", "after")
    yes_share = {name: share([getattr(one, name).startswith("Yes") for one in groups["existence"]]) for name in said}
    changes = Counter((one.before == one.truth, one.after == one.truth) for one in answered)
    return {
        "accuracy": accuracy,
        "yes_share": yes_share,
        "fixed": changes[False, True],
        "broken": changes[True, False],
        "still_wrong": changes[False, False],
    }


def _say_result(console: Console, out: Path, result: dict[str, Any]) -> None:
    """Print the accuracies as a table, and where to look next."""
    table = Table(title="Held-out pictures, greedy answers, exact match")
    for column in ("", "questions", "after sft", "after DPO"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["accuracy"].items():
        table.add_row(name, f"{row['questions']:,}", f"{row['before']:.1%}", f"{row['after']:.1%}")
        if name == "overall":
            table.add_section()
    yes = result["yes_share"]
    table.add_section()
    table.add_row(f"says 'Yes' (true: {yes['truth']:.1%})", "", f"{yes['before']:.1%}", f"{yes['after']:.1%}")
    console.print()
    console.print(table)
    lines = (
        f"DPO fixed {result['fixed']} answers and broke {result['broken']}; {result['still_wrong']} are still wrong.",
        f"It took {result['seconds']['total']:.0f} s.",
        f"Report: {out / 'report.html'}",
        f"Repeat the second stage: vapr train {out / 'dpo.yaml'} --set run_dir={out / 'again'}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
