"""Write the trained policy of a run as a Hugging Face folder, from the fp32 weights of its checkpoints."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from vapr.batches.loader import open_loaders
from vapr.batches.model_folder import read_adapter_config
from vapr.batches.packing import PackedBatch
from vapr.config import CheckpointConfig, Config, PackingConfig, PolicyConfig
from vapr.errors import UserError, one_line
from vapr.model.adapters import merge_layers
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr.model.policy import Policy, frozen, load_policy
from vapr.model.policy_id import cache_root, weights_hash
from vapr.training import checkpoint
from vapr.training.model_card import write_model_card
from vapr.training.run_dir import START, weights_at_start

NUM_PAIRS = 8
"""Pairs on which the exported model is compared with the trained one."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights that are exported: a checkpoint of a run, or its final model."""

    run: Path
    folder: Path  # where the trained weights are
    step: int | None  # None for the run's end


def export(
    run: Path, out: Path, *, adapter: bool = False, which: str = "last", dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Write a run's trained policy as a Hugging Face folder with a model card.

    Args:
        run: folder of a run, finished or not, or of one of its checkpoints.
        out: new folder.
        adapter: write the PEFT adapter instead of merged weights.
        which: ``last``, ``best`` (by the held-out figure ``checkpoint.best_metric``), or a checkpoint's name.
        dtype: dtype of the written weights; None for ``policy.dtype``.
        say: called with lines on which weights are exported and how much merging rounded.

    Raises:
        UserError: if there is nothing to export, the policy cannot be rebuilt, or ``out`` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder with --out")
    if not run.exists() and not checkpoint.is_checkpoint(run):
        raise UserError(f"{run}: no such folder; give that of a run or of a checkpoint")
    run_dir = run
    if checkpoint.is_checkpoint(run) and not (run / "config.yaml").is_file():
        run = run.resolve()
        run_dir = run.parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run}: no run (no config.yaml in {run_dir}); give the folder of a run or of a checkpoint")
    config = Config.load(run_dir / "config.yaml")
    trained = _find(run, run_dir, which, config, say)
    if adapter and config.policy.lora is None:
        raise UserError(f"{run_dir}: trained without LoRA, so there is no adapter; leave --adapter out")
    wanted: torch.dtype = getattr(torch, dtype or config.policy.dtype)
    try:
        policy = _converted(_rebuild(config, trained, wanted), wanted, adapter=adapter)
        if adapter:
            _name_base(policy, trained, say)
        else:
            policy = _merged(policy, config, trained, say)
    except torch.OutOfMemoryError:
        raise UserError(f"{run}: its policy does not fit the GPU; CUDA_VISIBLE_DEVICES= exports on the CPU") from None
    with checkpoint.new_folder(out) as temporary:
        if adapter:
            checkpoint.save_adapter(policy, temporary)
        else:
            checkpoint.save_model(policy, temporary)
        write_model_card(temporary, config, run_dir, trained.step, adapter=adapter)


def _find(run: Path, run_dir: Path, which: str, config: Config, say: Callable[[str], None]) -> Trained:
    """Find the weights that ``which`` asks for, and say which they are."""
    final = run_dir / "final"
    there = checkpoint.list_checkpoints(run_dir)
    if run != run_dir:
        if which != "last":
            raise UserError(f"--checkpoint {which}: {run} is a checkpoint already; give the run's folder")
        if run not in there:
            raise UserError(f"{run}: no whole checkpoint")
        return Trained(run_dir, run, checkpoint.step_of(run))
    if which == "best":
        metric = config.checkpoint.best_metric
        if (best := checkpoint.best_checkpoint(run_dir, metric)) is None:
            raise UserError(f"{run_dir}: no checkpoint in it has a held-out figure {metric}; see data.eval")
        say(f"best of {len(there)} kept checkpoints: {best[0].name}, {metric} {best[1]:.4g}")
        return Trained(run_dir, best[0], checkpoint.step_of(best[0]))
    if which != "last":
        if (named := run_dir / "checkpoints" / which) not in there:
            names = ", ".join(folder.name for folder in there) or "none"
            raise UserError(f"--checkpoint {which}: {run_dir} holds no such checkpoint; there are: {names}")
        return Trained(run_dir, named, checkpoint.step_of(named))
    if not there and not final.is_dir():
        raise UserError(f"{run_dir}: neither a checkpoint nor a final/ folder is in it; train first")
    if there:
        step, end = checkpoint.step_of(there[-1]), checkpoint.read_state(there[-1]).get("num_steps")
        if not final.is_dir():
            say(f"{run_dir} is not finished; this is its newest checkpoint, step {step:,} of {end or 'unknown'}")
        if not final.is_dir() or step == end:
            return Trained(run_dir, there[-1], step)
    return Trained(run_dir, final, None)


def _rebuild(config: Config, trained: Trained, wanted: torch.dtype) -> Policy:
    """Load the policy as its run loaded it, and put the trained weights in, in fp32 for adapters."""
    start = _start(config, trained)
    policy = load_policy(start, kernels="off")
    if policy.adapters is None and trained.step is None:
        return policy  # final/ itself
    if not Path(start.model).is_relative_to(trained.run):
        now = weights_hash(policy, cache_root("reference", config.reference.cache_dir), config=False)
        if weights_at_start(trained.run) not in (None, now):
            raise UserError(f"{trained.run}: the weights of {start.model} changed since it was started; restore them")
    dtype = wanted if policy.adapters is None else torch.float32
    try:
        weights = _weights(trained.folder)
        for name, parameter in policy.trained_parameters().items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"'{name}' has another shape")
            parameter.data = weights[name].to(parameter.device, dtype)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{trained.folder}: its weights cannot be used ({one_line(error)})") from None
    return policy


def _start(config: Config, trained: Trained) -> PolicyConfig:
    """Return the config of the policy that training began with: the run's own copy if there is one."""
    policy = dataclasses.replace(config.policy, attention="sdpa", gradient_checkpointing=False)
    final = trained.run / "final"
    kept = ""
    if (trained.run / START).is_dir():
        kept = str(trained.run / START)
    elif config.policy.lora is None and final.is_dir():
        kept = str(final)
    elif final.is_dir():  # the whole path, where the config's may start at another folder
        kept = read_adapter_config(final)["base_model_name_or_path"]
    return dataclasses.replace(policy, model=kept, base=None) if kept and Path(kept).is_dir() else policy


def _weights(folder: Path) -> dict[str, Tensor]:
    """Load trained weights by the names they have in the policy."""
    if checkpoint.is_checkpoint(folder):
        return load_file(folder / "weights.safetensors")
    weights = load_file(folder / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.").removesuffix(".weight") for name in weights}
    return {f"{names[name]}.default.weight": weight for name, weight in weights.items()}


def _name_base(policy: Policy, trained: Trained, say: Callable[[str], None]) -> None:
    """Name the base of an adapter whose run began from another one: the merged policy that the run keeps."""
    start = (trained.run / START).resolve()
    if start.is_dir():
        assert policy.adapters is not None
        policy.adapters.peft_config["default"].base_model_name_or_path = str(start)
        say(f"the adapter's base is {start}; keep that folder, or export merged weights")


def _merged(policy: Policy, config: Config, trained: Trained, say: Callable[[str], None]) -> Policy:
    """Merge the adapters, if there are any, and say how much that rounded."""
    if policy.adapters is None:
        return policy
    pairs = _some_pairs(config, trained, say)
    masters = {name: parameter.data for name, parameter in policy.trained_parameters().items()}
    for parameter in policy.trained_parameters().values():
        parameter.data = parameter.data.to(policy.dtype)  # as the run computed with them
    before = _logps(policy, pairs)
    for name, parameter in policy.trained_parameters().items():
        parameter.data = masters[name]
    say(f"merged {merge_layers(policy.adapters, policy.dtype)}")
    policy = dataclasses.replace(policy, adapters=None)
    if pairs:
        difference = (_logps(policy, pairs) - before).abs()
        kind = "training" if config.data.eval is None else "held-out"
        say(
            f"log-probs of {sum(batch.num_pairs for batch in pairs)} {kind} pairs, merged against adapter on base: "
            f"largest difference {float(difference.max()):.1e}, mean {float(difference.mean()):.1e} (the log-probs are "
            f"{float(before.mean()):.1f} on average)"
        )
    return policy


def _some_pairs(config: Config, trained: Trained, say: Callable[[str], None]) -> tuple[PackedBatch, ...]:
    """Pack a few held-out pairs, or training pairs if none are held out; say so if they are no longer there."""
    data = dataclasses.replace(config.data, shuffle=False, workers=0, on_bad_row="skip", too_long="skip", verdicts=None)
    few = dataclasses.replace(
        config, policy=_start(config, trained), data=data, checkpoint=CheckpointConfig(),
        packing=PackingConfig(max_tokens=config.packing.max_tokens),
        optim=dataclasses.replace(config.optim, pairs_per_step=NUM_PAIRS),
    )  # fmt: skip
    try:
        name: Literal["train", "eval"] = "train" if config.data.eval is None else "eval"
        with open_loaders(few, [name], say=lambda line: None) as loaders:
            return next(loaders[name].steps(0, 1)).batches
    except UserError as error:
        say(f"log-probs of the merged model are not compared: {error}")
        return ()


def _logps(policy: Policy, batches: tuple[PackedBatch, ...]) -> Tensor:
    """Return the fp32 log-probs of the completions, (C,)."""
    sums = [torch.empty(0)]
    with frozen(policy):
        for cpu_batch in batches:
            batch = cpu_batch.to(policy.device)
            sums.append(completion_sums(per_completion(token_logps(policy, batch), batch), batch).cpu())
    return torch.cat(sums)


def _converted(policy: Policy, dtype: torch.dtype, *, adapter: bool) -> Policy:
    """Round the weights to be written. Adapters to be merged stay in fp32, and are rounded after that."""
    for name, parameter in policy.base.named_parameters():
        if adapter or ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return dataclasses.replace(policy, dtype=dtype)
