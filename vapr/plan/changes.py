"""What to change so that a run fits: settings in the order in which they cost least, and what each would take."""

import dataclasses
from typing import Any

from vapr.config import Config
from vapr.plan.gpus import GIB
from vapr.plan.needs import Needs, Variant


def what_to_change(config: Config, needs: Needs, own: Variant, gpu_bytes: int, usable: float) -> list[dict[str, Any]]:
    """Return settings, each added to those before it, with the predicted peak, until one fits.

    Returns:
        ``set`` (arguments of --set), ``peak_gib``, ``fits``; empty if the run fits as it is.
    """
    variant, given = own, list[str]()
    if _peak(needs, variant, gpu_bytes) <= usable:
        return []
    found = []
    for setting, changed in _steps(config, needs, own):
        variant = dataclasses.replace(variant, **changed(variant))
        given.append(setting)
        peak = _peak(needs, variant, gpu_bytes)
        found.append({"set": list(given), "peak_gib": peak / GIB, "fits": peak <= usable})
        if peak <= usable:
            break
    return found


def _peak(needs: Needs, variant: Variant, gpu_bytes: int) -> int:
    return sum(needs.peak(variant, gpu_bytes).values())


def _steps(config: Config, needs: Needs, own: Variant) -> list[tuple[str, Any]]:
    """Return settings that save memory and are not set yet, each with what it changes of a variant."""

    def storage(**changed: Any) -> Any:
        return lambda variant: {"storage": dataclasses.replace(variant.storage, **changed)}

    steps: list[tuple[str, Any]] = []
    kept = own.storage
    frozen_tower = not needs.shapes.trains_tower
    if not own.checkpointing:
        steps.append(("policy.gradient_checkpointing=true", lambda variant: {"checkpointing": True}))
    if frozen_tower and not own.cached_features:
        steps.append(("features.cache=true", lambda variant: {"cached_features": True}))
    if kept.optim == "adamw" and config.policy.dtype == "bfloat16":
        steps.append(("optim.kind=adamw-8bit", storage(optim="adamw-8bit")))
    if config.policy.lora is not None and kept.base_weights != "nf4":
        steps.append(("policy.base_weights=nf4", storage(base_weights="nf4")))
    longest = needs.reading.longest[0][0]
    if own.tokens > longest:
        steps.append((f"packing.max_tokens={longest}", lambda variant: {"tokens": longest}))
    if kept.engine == "all-reduce":
        steps.append(
            ("parallel.engine=deepspeed parallel.zero=2 parallel.offload=optimizer",
             storage(engine="deepspeed", zero=2, offload="optimizer"))
        )  # fmt: skip
    if config.policy.lora is None and kept.offload != "all":
        steps.append(
            ("parallel.engine=deepspeed parallel.zero=3 parallel.offload=all",
             storage(engine="deepspeed", zero=3, offload="all"))
        )  # fmt: skip
    return steps
