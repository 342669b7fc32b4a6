"""Find the settings with which a run fits, those that cost least first, and predict the peak with each."""

import dataclasses
from typing import Any

from vapr.config import LEVELS, Config
from vapr.plan.gpus import GIB
from vapr.plan.needs import Needs, Variant

LEVEL = "policy.checkpointing="


def what_to_change(config: Config, needs: Needs, own: Variant, gpu_bytes: int, usable: float) -> list[dict[str, Any]]:
    """Return settings, each added to those before it, with the predicted peak, until one fits.

    Levels of checkpointing take the place of each other; further settings are added to the last.

    Returns:
        ``set`` (arguments of --set), ``peak_gib``, ``fits``; empty if the run fits as it is.
    """
    variant, given = own, list[str]()
    if _peak(needs, variant, gpu_bytes) <= usable:
        return []
    found = []
    levels = LEVELS[LEVELS.index(own.checkpointing) + 1 :]
    steps = [(f"{LEVEL}{level}", lambda variant, level=level: {"checkpointing": level}) for level in levels]
    for setting, changed in [*steps, *_steps(config, needs, own)]:
        variant = dataclasses.replace(variant, **changed(variant))
        given = [one for one in given if not (setting.startswith(LEVEL) and one.startswith(LEVEL))] + [setting]
        peak = _peak(needs, variant, gpu_bytes)
        found.append({"set": list(given), "peak_gib": peak / GIB, "fits": peak <= usable})
        if peak <= usable:
            break
    return found


def _peak(needs: Needs, variant: Variant, gpu_bytes: int) -> int:
    return sum(needs.peak(variant, gpu_bytes).values())


def _steps(config: Config, needs: Needs, own: Variant) -> list[tuple[str, Any]]:
    """Return the other settings that save memory and are not set yet, each with what it changes of a variant."""

    def storage(**changed: Any) -> Any:
        return lambda variant: {"storage": dataclasses.replace(variant.storage, **changed)}

    kept = own.storage
    longest = needs.reading.longest[0][0]
    offloaded = storage(engine="deepspeed", optim="adamw", zero=2, offload="optimizer")
    spread = storage(engine="deepspeed", optim="adamw", zero=3, offload="none")
    everything = storage(engine="deepspeed", optim="adamw", zero=3, offload="all")
    lora, deepspeed = config.policy.lora is not None, "optim.kind=adamw parallel.engine=deepspeed parallel.zero="
    zero_3 = kept.engine == "deepspeed" and kept.zero == 3  # which spreads no quantised weights
    few_bits = lora and kept.base_weights != "nf4" and not zero_3
    steps = [
        (few_bits, "policy.base_weights=nf4", storage(base_weights="nf4")),
        (kept.optim == "adamw" and kept.engine == "all-reduce", "optim.kind=adamw-8bit", storage(optim="adamw-8bit")),
        (own.tokens > longest, f"packing.max_tokens={longest}", lambda variant: {"tokens": longest}),
        (
            not needs.shapes.trains_tower and not own.cached_features,
            "features.cache=true",
            lambda variant: {"cached_features": True},
        ),
        (not lora and kept.world_size > 1 and kept.zero < 3, f"{deepspeed}3", spread),
        (kept.offload == "none" and lora, f"{deepspeed}2 parallel.offload=optimizer", offloaded),
        (kept.offload != "all" and not lora, f"{deepspeed}3 parallel.offload=all", everything),
    ]
    return [(setting, changed) for possible, setting, changed in steps if possible]
