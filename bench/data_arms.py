"""The arms of the data-path benchmark, each measured in a process that does nothing else."""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.arms import trl_processor
from vapr.batches import loader
from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.batches.workers import default_workers
from vapr.config import Config, DataConfig, OptimConfig, PackingConfig, PolicyConfig

PAIRS_PER_STEP = 64
SETTLING_STEPS = 2
"""Steps before the timed ones: the first fills the queues, the second finds them as every later one does."""
PREFETCH = 2
"""Batches a worker of torch's DataLoader may be ahead, its default."""

Steps = Iterator[tuple[int, Any]]
"""The number of pairs of each step, and its batches."""


@contextlib.contextmanager
def vapr_steps(file: Path, processor: Processor, *, share: str) -> Iterator[Steps]:
    """What ``vapr train`` opens before it loads a policy, and the steps it is given."""
    config = Config(
        run_dir="unused",
        policy=PolicyConfig(model="unused"),
        data=DataConfig(train=str(file), workers=default_workers()),
        packing=PackingConfig(share=share),
        optim=OptimConfig(pairs_per_step=PAIRS_PER_STEP),
    )
    loaded = mock.patch.object(loader, "open_processor", lambda config: processor)  # no clock runs while it loads
    with loaded, loader.open_loaders(config, say=lambda line: None) as loaders:
        yield ((step.num_pairs, step) for step in loaders["train"].steps(0, 10**9))


@contextlib.contextmanager
def trl_steps(file: Path, processor: Processor, *, batch_pairs: int) -> Iterator[Steps]:
    """What a user of TRL's DPOTrainer writes, and the loader the trainer makes of it.

    The collator is TRL's own; DataLoader and shuffling are as transformers' Trainer sets them up, without accelerate's
    wrapper, which has nothing to do on a CPU.
    """
    import datasets
    from torch.utils.data import DataLoader
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    dataset = datasets.load_dataset("json", data_files=str(file), split="train")
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    loader = DataLoader(
        dataset.remove_columns("id"),  # as the trainer does with columns it has no use for
        batch_size=batch_pairs,
        shuffle=True,
        num_workers=default_workers(),
        prefetch_factor=PREFETCH,
        collate_fn=DataCollatorForVisionPreference(processor=processor),
    )
    yield accumulated(loader, PAIRS_PER_STEP // batch_pairs)


def accumulated(loader: Any, batches_per_step: int) -> Steps:
    """Epoch after epoch, the batches of a step together: transformers' Trainer fetches them all before the first."""
    while True:
        batches = iter(loader)
        while step := list(itertools.islice(batches, batches_per_step)):
            yield sum(len(batch["input_ids"]) for batch in step) // 2, step


ARMS = {
    "vapr": partial(vapr_steps, share="pair"),
    "vapr image": partial(vapr_steps, share="image"),
    "trl": partial(trl_steps, batch_pairs=PAIRS_PER_STEP),
    "trl by 4": partial(trl_steps, batch_pairs=4),
}


def measure_arm(provider: str, file: str, model: str, timed_steps: int) -> dict[str, Any]:
    """Open the file, take the first step, and go on; this process must have opened nothing before.

    Args:
        provider: one of ``ARMS``.
        file: the rows.
        model: folder of the processor, which is loaded before any clock starts.
        timed_steps: steps timed after the first two; 0 ends after the first step.

    Returns:
        Seconds, pairs a second, and MiB of this process and its children.
    """
    processor: Any = Processor(model, load_model_config(model), dtype=torch.bfloat16)
    if provider.startswith("trl"):
        import_trl()
        processor = trl_processor(processor, Path(model))
    gc.collect()
    before = resident_mib()
    began = time.perf_counter()
    with ARMS[provider](Path(file), processor) as steps:
        numbers: dict[str, Any] = {"open_seconds": time.perf_counter() - began}
        next(steps)
        numbers["first_step_seconds"] = time.perf_counter() - began
        if not timed_steps:
            return numbers
        for _ in range(SETTLING_STEPS - 1):
            next(steps)
        began = time.perf_counter()
        num_pairs = 0
        for _ in range(timed_steps):
            in_step, step = next(steps)  # the name keeps the step in memory, as training on it does
            num_pairs += in_step
        seconds = time.perf_counter() - began
        assert step is not None
        # While a device computes, the queues fill up; so they must have before memory is read.
        time.sleep((PREFETCH * default_workers() + 1) * seconds / timed_steps)
        after = resident_mib()
    return {
        **numbers,
        "pairs": num_pairs,
        "pairs_per_second": num_pairs / seconds,
        "resident_mib": after["all"],
        "resident_growth_mib": after["all"] - before["all"],
        "file_growth_mib": after["file"] - before["file"],
    }


def import_trl() -> None:
    """What TRL's arm imports, before any clock starts."""
    import datasets  # noqa: F401
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference  # noqa: F401


def resident_mib(pid: int | None = None) -> dict[str, float]:
    """MiB in memory of a process (None: this one) and its children: ``all``, and ``file``, in pages of mapped files.

    A page that n of them share counts as 1/n for each. Shared memory is counted by its open files instead, each once:
    what torch's workers have written there appears in no process's tables until somebody reads it.
    """
    kib = {"Pss_Anon": 0, "Pss_File": 0}
    shared: dict[int, int] = {}  # bytes by inode
    for process in family(pid or os.getpid()):
        for line in (process / "smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] += int(value.split()[0])
        for opened in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                if os.readlink(opened).startswith("/dev/shm/"):
                    stat = opened.stat()
                    shared[stat.st_ino] = stat.st_blocks * 512
    in_file = kib["Pss_File"] / 1024
    return {"all": kib["Pss_Anon"] / 1024 + in_file + sum(shared.values()) / 2**20, "file": in_file}


def family(pid: int) -> list[Path]:
    """Folders in /proc of a process, its children and theirs."""
    found, waiting = [], [Path(f"/proc/{pid}")]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for children in process.glob("task/*/children"):
            waiting += [Path("/proc") / child for child in children.read_text().split()]
    return found
