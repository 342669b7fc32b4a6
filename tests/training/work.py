"""The work of one training step, counted: exact on every machine, so a count that grows is a change of the code.

    python -m tests.training.work            # what has changed against work.json
    python -m tests.training.work --write    # accept it

Saved for the backward pass is what autograd saves, and what custom functions keep in attributes of their ctx: tensors,
and lists and tuples of them.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vapr.batches.loader import open_loaders
from vapr.config import LEVELS, Config
from vapr.data.pairs import write_pairs
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.families import FAMILIES
from vapr.model import logps
from vapr.model.policy import Policy, load_policy
from vapr.plan.counted import COUNTED
from vapr.training.engine import Engine
from vapr.training.fill_caches import open_reference
from vapr.training.out_of_memory import FittingPacks
from vapr.training.ranks import Ranks
from vapr.training.step import train_step
from vapr_kernels import matmul

TABLE = Path(__file__).with_name("work.json")
COMMAND = "python -m tests.training.work --write"
SHARES = ("none", "pair", "image")
TUNINGS = ("lora", "full")
CASES = [" ".join(case) for case in itertools.product(("llava", "qwen2_vl", "qwen2_5_vl"), TUNINGS, SHARES)]
CASES += [f"qwen2_5_vl lora pair checkpointing:{level}" for level in LEVELS[1:]]
# Formulas of PyTorch and modules of transformers decide what is saved, and how often.
VERSIONS = {
    "torch": torch.__version__.split("+")[0],
    "transformers": ".".join(transformers.__version__.split(".")[:2]),
}
OF_THESE_VERSIONS = ("saved_tensors", "saved_bytes")


@dataclass(slots=True)
class Work:
    """What one step of eight pairs takes; the reference's pass is in it under LoRA, as in a first epoch."""

    tokens: int = 0  # packed, after sharing
    tower_calls: int = 0
    tower_images: int = 0
    head_rows: int = 0  # hidden states that reach the LM head
    flops: int = 0
    saved_tensors: int = 0  # for the backward pass, one saved twice counted twice; without weights
    saved_bytes: int = 0  # of the storages that they keep, each once in a pack


def count(case: str, folder: Path) -> Work:
    """Count the work of the first step of a case such as ``llava lora pair``.

    Args:
        folder: empty; model, rows and caches are written to it.
    """
    family, tuning, share, *level = case.split()
    config = small_run(folder, family, tuning, share, level[0].split(":")[1] if level else "none")
    work = Work()
    with open_loaders(config, say=lambda line: None) as loaders, ordinary_operations():
        policy = load_policy(config.policy, torch.device("cpu"))
        reference = open_reference(config, policy, None, [loaders["train"]], Ranks(), FittingPacks())
        engine = Engine(policy, config.optim, 1)
        (step,) = loaders["train"].steps(0, 1)
        work.tokens = sum(batch.num_tokens for batch in step.batches)
        with (
            counting_tower(policy, work), counting_head(work), counting_saved(policy.base, work),
            FlopCounterMode(display=False, custom_mapping=COUNTED) as counter,
        ):  # fmt: skip
            train_step(policy, engine, reference, step, config.loss, None)
    work.flops = counter.get_total_flops()
    return work


def small_run(folder: Path, family: str, tuning: str, share: str, level: str) -> Config:
    """A run of one step: three pairs about a picture, three about another, one about a third, one without any."""
    sentence = "is there a red green blue box ball kite ring on the left right of picture"
    words = sentence.split()
    build_tiny_policy(family, folder / "policy", [sentence] * 4)
    draws = np.random.default_rng(0)
    for name, width, height in (("a", 112, 84), ("b", 84, 140), ("c", 56, 56)):
        Image.fromarray(draws.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    rows: list[dict[str, Any]] = []
    for number, image in enumerate((*"aaabbbc", None)):
        question = [{"type": "text", "text": " ".join(draws.choice(words, 8))}]
        answer = list(draws.choice(words, 6 + 2 * number))
        other = [*answer[:4], "wrong", *answer[5:]]
        rows.append(
            {
                "id": str(number),
                "images": [f"{image}.png"] if image else [],
                "prompt": [{"role": "user", "content": [{"type": "image"}] * bool(image) + question}],
                "chosen": [{"role": "assistant", "content": " ".join(answer)}],
                "rejected": [{"role": "assistant", "content": " ".join(other)}],
            }
        )
    write_pairs(folder / "pairs.jsonl", rows)
    lora = {"lora": {"rank": 4, "alpha": 8}} if tuning == "lora" else {}
    return Config.parse(
        {
            "run_dir": str(folder / "run"),
            "policy": {
                "model": str(folder / "policy"), "dtype": "float32", "checkpointing": level, **lora
            },
            "data": {"train": str(folder / "pairs.jsonl"), "image_root": str(folder), "shuffle": False},
            "packing": {"max_tokens": 300, "share": share},
            "optim": {"pairs_per_step": len(rows)},
            "reference": {"cache_dir": str(folder / "reference")},
        }
    )  # fmt: skip


@contextlib.contextmanager
def ordinary_operations() -> Iterator[None]:
    """The operations of a run, the same on every CPU.

    Tests ask PyTorch for deterministic ones, which may save something else, and oneDNN gets more rows than there are.
    """
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with mock.patch.object(matmul, "_onednn", lambda: None):
            yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=True)


@contextlib.contextmanager
def counting_tower(policy: Policy, work: Work) -> Iterator[None]:
    tower = policy.base.model.get_submodule(FAMILIES[policy.family].tower[0])

    def note(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        work.tower_calls += 1
        work.tower_images += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[0])

    hook = tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def counting_head(work: Work) -> Iterator[None]:
    linear_logps = logps.linear_logps

    def counted(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        work.head_rows += len(rows)
        return linear_logps(rows, *args, **kwargs)

    with mock.patch.object(logps, "linear_logps", counted):
        yield


@contextlib.contextmanager
def counting_saved(model: nn.Module, work: Work) -> Iterator[None]:
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # kept, or the next pack's would lie where this pack's lay

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            work.saved_tensors += 1
            held[storage.data_ptr()] = storage
        return tensor.detach()  # the tensor itself would hold the node that saved it

    backward = Tensor.backward

    def after_looking(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for tensor in tensors_on_nodes(loss):
            save(tensor)
        backward(loss, *args, **kwargs)

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, mock.patch.object(Tensor, "backward", after_looking):
        yield
    work.saved_bytes = sum(storage.nbytes() for storage in held.values())


def tensors_on_nodes(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors in attributes of the graph's nodes, which custom functions know as their ctx."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            values = value if isinstance(value, list | tuple) else [value]
            yield from (one for one in values if isinstance(one, Tensor))


def read_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write_table(counts: dict[str, dict[str, int]]) -> None:
    """Write a line a case, so that a diff shows what changed."""
    lines = [f'"versions": {json.dumps(VERSIONS)}', *(f'"{case}": {json.dumps(counts[case])}' for case in CASES)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def changes(case: str, counted: dict[str, int], table: dict[str, Any]) -> list[str]:
    """Say what differs from the table; what other versions of torch and transformers may change is left out."""
    left_out = () if table["versions"] == VERSIONS else OF_THESE_VERSIONS
    lines = []
    for name, now in counted.items():
        before = table.get(case, {}).get(name, 0)
        if name in left_out or now == before:
            continue
        if now > before:
            hint = f"undo that, or accept it with {COMMAND} and say why in the commit"
            lines.append(f"{case}: {name} grew from {before:,} to {now:,}; {hint}")
        else:
            hint = f"write the smaller figure down with {COMMAND}"
            lines.append(f"{case}: {name} shrank from {before:,} to {now:,}; {hint}, so that it cannot grow back")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write the counts to {TABLE.name}")
    options = parser.parse_args()
    counts = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            counts[case] = asdict(count(case, Path(folder)))
    table = read_table()
    found = [line for case in CASES for line in changes(case, counts[case], table)]
    print("\n".join(found) or "no count has changed")
    if options.write:
        write_table(counts)
    return 1 if found and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
