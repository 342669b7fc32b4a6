"""Write the trained policy of a run as a Hugging Face folder, from the fp32 weights of its checkpoints."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vapr.batches.loader import open_loaders
from vapr.batches.packing import PackedBatch
from vapr.config import CheckpointConfig, Config, PackingConfig
from vapr.errors import UserError
from vapr.model.adapters import merge_layers
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr.model.policy import Policy, frozen, load_policy
from vapr.model.quantized import dequantize
from vapr.training import checkpoint
from vapr.training.model_card import write_model_card
from vapr.training.run_dir import START
from vapr.training.trained_model import Trained, find_trained, put_weights, start_policy

NUM_PAIRS = 8
"""Pairs on which the exported model is compared with the trained one."""


def export(
    run: Path, out: Path, *, adapter: bool = False, which: str = "last", dtype: str | None = None,
    into: Literal["trained", "original"] = "trained", say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Write a run's trained policy as a Hugging Face folder with a model card.

    Args:
        run: folder of a run, finished or not, or of one of its checkpoints.
        out: new folder.
        adapter: write the PEFT adapter instead of merged weights.
        which: ``last``, ``best`` (by the held-out figure ``checkpoint.best_metric``), or a checkpoint's name.
        dtype: dtype of the written weights; None for ``policy.dtype``.
        into: which base adapters are merged into, where it was quantised for training (``policy.base_weights``):
            ``trained`` is the base as trained on, restored; ``original`` the unquantised weights.
        say: called with lines on which weights are exported and how much merging rounded.

    Raises:
        UserError: if there is nothing to export, the policy cannot be rebuilt, or ``out`` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder with --out")
    config, trained = find_trained(run, which, say)
    run_dir = trained.run
    if adapter and config.policy.lora is None:
        raise UserError(f"{run_dir}: trained without LoRA, so there is no adapter; leave --adapter out")
    if into == "original" and (config.policy.base_weights == "bfloat16" or adapter):
        why = "an adapter is not merged" if adapter else "the base was not quantised, so there is no other one"
        raise UserError(f"--into original: {why}; leave it out")
    wanted: torch.dtype = getattr(torch, dtype or config.policy.dtype)
    try:
        policy = _converted(_rebuild(config, trained, wanted), wanted, adapter=adapter)
        if adapter:
            _name_base(policy, trained, say)
        else:
            policy = _merged(policy, config, trained, into, say)
    except torch.OutOfMemoryError:
        raise UserError(f"{run}: its policy does not fit the GPU; CUDA_VISIBLE_DEVICES= exports on the CPU") from None
    with checkpoint.new_folder(out) as temporary:
        if adapter:
            checkpoint.save_adapter(policy, temporary)
        else:
            checkpoint.save_model(policy, temporary)
        write_model_card(temporary, config, run_dir, trained.step, adapter=adapter, into=into)


def _rebuild(config: Config, trained: Trained, wanted: torch.dtype, base_weights: Any = None) -> Policy:
    """Load the policy as its run loaded it, and put the trained weights in, in fp32 for adapters.

    ``base_weights`` is how its base is stored; None: as it was for the run.
    """
    start = start_policy(config, trained)
    policy = load_policy(dataclasses.replace(start, base_weights=base_weights or start.base_weights), kernels="off")
    if policy.adapters is not None or trained.step is not None:  # else it is final/ itself
        put_weights(policy, config, trained, wanted if policy.adapters is None else torch.float32)
    return policy


def _name_base(policy: Policy, trained: Trained, say: Callable[[str], None]) -> None:
    """Name the base of an adapter whose run began from another one: the merged policy that the run keeps."""
    start = (trained.run / START).resolve()
    if start.is_dir():
        assert policy.adapters is not None
        policy.adapters.peft_config["default"].base_model_name_or_path = str(start)
        say(f"the adapter's base is {start}; keep that folder, or export merged weights")


def _merged(
    policy: Policy, config: Config, trained: Trained, into: Literal["trained", "original"], say: Callable[[str], None]
) -> Policy:
    """Merge the adapters, if there are any, and say how much that rounded, and how far it is from what was trained."""
    if policy.adapters is None:
        return policy
    pairs = _some_pairs(config, trained, say)
    masters = {name: parameter.data for name, parameter in policy.trained_parameters().items()}
    for parameter in policy.trained_parameters().values():
        parameter.data = parameter.data.to(policy.dtype)  # as the run computed with them
    before = _logps(policy, pairs)
    for name, parameter in policy.trained_parameters().items():
        parameter.data = masters[name]
    policy = _on_plain_base(policy, config, trained, into, say)
    assert policy.adapters is not None
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
        if config.policy.base_weights != "bfloat16":
            tokens = sum(len(batch.sum_completion) for batch in pairs)
            say(f"a token: {float(difference.sum()) / tokens:.1e}, of {float(before.sum()) / tokens:.2f} on average")
    return policy


def _on_plain_base(
    policy: Policy, config: Config, trained: Trained, into: Literal["trained", "original"], say: Callable[[str], None]
) -> Policy:
    """Return the policy with its adapters on plain linear layers, into which they can be merged."""
    if policy.quantized is None:
        return policy
    kind = policy.quantized.kind
    if into == "trained":
        say(f"merging into the base as trained on, restored from {kind} (--into original: the unquantised one)")
        dequantize(policy.base)
        return _converted(dataclasses.replace(policy, quantized=None), policy.dtype, adapter=False)
    say(f"merging into the unquantised weights, which are not what was trained on ({kind})")
    return _converted(_rebuild(config, trained, policy.dtype, "bfloat16"), policy.dtype, adapter=False)


def _some_pairs(config: Config, trained: Trained, say: Callable[[str], None]) -> tuple[PackedBatch, ...]:
    """Pack a few held-out pairs, or training pairs if none are held out; say so if they are no longer there."""
    data = dataclasses.replace(config.data, shuffle=False, workers=0, on_bad_row="skip", too_long="skip", verdicts=None)
    few = dataclasses.replace(
        config, policy=start_policy(config, trained), data=data, checkpoint=CheckpointConfig(),
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
