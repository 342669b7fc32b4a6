"""What a run prints before its first step and after its last."""

import math
import shlex
from collections.abc import Sequence

from vapr.batches.loader import PairLoader
from vapr.config import Config
from vapr.families import FAMILIES
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.training import checkpoint
from vapr.training.engine_deepspeed import AnyEngine
from vapr.training.ledger import compare_with_order
from vapr.training.run_dir import RunDir
from vapr.training.run_state import list_skipped


def print_setup(
    config: Config, policy: Policy, loader: PairLoader, held_out: PairLoader | None, engine: AnyEngine
) -> None:
    """Print what is trained, on what, and with which data and loss."""
    trained = sum(math.prod(shape) for shape in engine.shapes.values())
    how = "LoRA" if policy.adapters is not None else "full"
    eval_pairs = f", {held_out.pairs_per_epoch:,} held out" if held_out is not None else ""
    size = f"{how}, {trained:,} trained parameters, {config.policy.dtype}"
    print(f"policy     {config.policy.model} ({policy.family}), {size}")
    runs_on = f"{policy.device}, attention {policy.attention_backend}, {policy.operations}"
    print(f"runs on    {runs_on}, images by {loader.image_backend}")
    for note in FAMILIES[policy.family].notes(adapted=policy.adapted):
        print(f"note       {note}")
    if policy.quantized is not None:
        print(f"frozen     {policy.quantized}")
    if policy.tower.rests:
        print("tower      waits in host memory, and comes to the GPU for images without cached features")
    if engine.ranks.size > 1 or engine.is_sharded:
        print(f"processes  {engine.ranks.size}, {engine.in_words}")
    steps = f"{engine.num_steps:,} steps of {loader.pairs_per_step} pairs"
    print(f"data       {loader.pairs_per_epoch:,} pairs{eval_pairs}, {steps}")
    if policy.merged is not None:
        print(f"merged     {policy.merged}")
    names = {"sigmoid": "sigmoid (DPO)"}
    if config.second_image is not None:
        names["image"] = f"image (second image: {config.second_image.make}; one for each image of a row)"
    losses = " + ".join(f"{term.weight:g} {names.get(term.kind, term.kind)}" for term in config.loss)
    print(f"loss       {losses}, share {config.packing.share}")
    print(f"run_dir    {config.run_dir}", flush=True)


def print_outcome(
    config: Config, run: RunDir, loaders: Sequence[PairLoader | None], reference: Reference | None, engine: AnyEngine
) -> None:
    """Print where everything lies, what was skipped, whether the ledger adds up, and the command that comes next."""
    ranks, trained_on = engine.ranks, loaders[0]
    if ranks.is_first and trained_on is not None:
        print(f"ledger     {compare_with_order(run.path, trained_on, engine.num_steps)}")
    if reference is not None:
        hits, misses = ranks.gather([reference.hits, reference.misses]).sum(axis=0).astype(int).tolist()
        counted = f"{hits:,} completions found in the cache, {misses:,} computed"
        print(f"reference  {counted} ({reference.folder})")
    if num_skipped := list_skipped(run, loaders):
        print(f"skipped    {num_skipped} pairs, listed with reasons in {run.path / 'skipped.json'}")
    if config.checkpoint.best and (best := checkpoint.best_checkpoint(run.path, config.checkpoint.best_metric)):
        print(f"best       {best[0].name}, {config.checkpoint.best_metric} {best[1]:.4g}")
    print(f"report     {run.path / 'report.html'}")
    print(f"final      {run.final}")
    print(f"next       vapr export {shlex.quote(str(run.path))} --out {shlex.quote(f'{run.path}-model')}")
