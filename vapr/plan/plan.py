"""plan(config): predict what a run will take, before anything is loaded, as plain data."""

import dataclasses
from typing import Any

from vapr.config import LEVELS, Checkpointing, Config
from vapr.plan.changes import what_to_change
from vapr.plan.engines import check_deepspeed, engine_of
from vapr.plan.flops import Flops, pack_flops, useful_flops
from vapr.plan.gpus import GIB, SIZES, Gpu, find_gpu, gpu_here, gpu_of_size
from vapr.plan.memory import BaseWeights, OptimKind, Storage
from vapr.plan.needs import Needs, Variant, largest_tokens, least_checkpointing
from vapr.plan.packs import LIMIT, Reading, read_packs
from vapr.plan.rates import CACHED, ONLINE, find_rate
from vapr.plan.shapes import Shapes, read_shapes

WORLD_SIZES = (1, 2, 4, 8)
ENDS: tuple[Checkpointing, Checkpointing] = ("none", "full")
"""The two levels of checkpointing that tables with another subject show."""


def plan(
    config: Config, gpu_memory: float | None = None, gpu: str | None = None, world_size: int = 1, limit: int = LIMIT
) -> dict[str, Any]:
    """Predict tokens, FLOPs, memory and time of a run. Reads data, config.json and processor files; no weights.

    Args:
        config: the run's.
        gpu_memory: of each GPU, in GiB as vendors name it.
        gpu: name of the GPU; without both, the one that is here, else common sizes side by side.
        world_size: GPUs that the answer (``fits``, ``time``) is for.
        limit: rows that are read at most, about.

    Returns:
        Plain data; docs/plan.md explains it.

    Raises:
        UserError: for a mistake in config, data or model, or an unknown GPU.
    """
    cards = _cards(gpu, gpu_memory)
    shapes = read_shapes(config.policy)
    reading = read_packs(config, limit)
    kernels = config.kernels == "auto"
    needs = Needs(config, shapes, reading, kernels)
    flops = _flops(config, shapes, reading)
    gpus = [_predict_for(card, config, needs, flops, world_size) for card in cards]
    return {
        "fits": any(found["fits"] for found in gpus),
        "model": _model(config, shapes),
        "data": _data(config, reading),
        "flops": flops,
        "gpus": gpus,
    }


def _cards(gpu: str | None, gpu_memory: float | None) -> list[Gpu]:
    if gpu is not None:
        named = find_gpu(gpu)
        return [named if gpu_memory is None else dataclasses.replace(named, gib=gpu_of_size(gpu_memory).gib)]
    if gpu_memory is not None:
        return [gpu_of_size(gpu_memory)]
    here = gpu_here()
    return [here] if here is not None else [gpu_of_size(size) for size in SIZES]


def _model(config: Config, shapes: Shapes) -> dict[str, Any]:
    return {
        "name": config.policy.model,
        "family": shapes.family,
        "parameters": shapes.count(),
        "trained": shapes.num_trained,
        "tuning": f"lora r={config.policy.lora.rank}" if config.policy.lora else "full",
        "dtype": config.policy.dtype,
        "base_weights": config.policy.base_weights,
        "optimizer": config.optim.kind,
    }


def _data(config: Config, reading: Reading) -> dict[str, Any]:
    packed = sum(step.tokens for step in reading.steps)
    unshared = packed + sum(step.tokens_saved for step in reading.steps)
    fills = [pack.tokens for pack in reading.packs]
    return {
        "sets": reading.sets,
        "notes": reading.notes,
        "rows": reading.rows,
        "rows_read": reading.rows_read,
        "pairs": reading.num_pairs,
        "whole": reading.whole,
        "pairs_per_epoch": reading.pairs_per_epoch,
        "steps": num_steps(config, reading),
        "steps_read": len(reading.steps),
        "tokens_unshared": unshared,
        "tokens": packed,
        "tokens_saved": unshared - packed,
        "tokens_by_step": [step.tokens for step in reading.steps],
        "tokens_saved_by_step": [step.tokens_saved for step in reading.steps],
        "share": config.packing.share,
        "max_tokens": config.packing.max_tokens,
        "packs": len(fills),
        "largest_pack": max(fills),
        "longest": [{"tokens": tokens, "where": where, "id": id} for tokens, where, id in reading.longest],
        "too_long": list(reading.too_long.values()),
        "unusable": reading.unusable(),
    }


def num_steps(config: Config, reading: Reading) -> int:
    """Return the number of updates of the run."""
    return config.optim.max_steps or config.optim.epochs * reading.steps_per_epoch


def _flops(config: Config, shapes: Shapes, reading: Reading) -> dict[str, Any]:
    """Count what the steps that were read take, and the mean of a pair and of a step."""
    checkpointing = _level_of(config)
    references = any(term.needs_reference for term in config.loss)
    by_step, useful = [], []
    for step in reading.steps:
        total = Flops()
        for pack in step.packs:
            total += pack_flops(
                shapes, pack, checkpointing=checkpointing, reference=False, cached_features=config.features.cache
            )
        by_step.append(total)
        useful.append(useful_flops(shapes, step.packs))
    whole = sum(by_step, Flops())
    reference = sum(
        pack_flops(shapes, pack, checkpointing="none", reference=True, cached_features=True).reference
        for pack in reading.packs
    )
    pairs, steps = reading.num_pairs, max(len(by_step), 1)
    return {
        "useful_per_pair": sum(useful) / pairs,
        "useful_per_step": sum(useful) / steps,
        "useful_by_step": useful,
        "total_by_step": [step.total for step in by_step],
        "total_per_pair": whole.total / pairs,
        "parts_per_pair": {
            name: getattr(whole, name) / pairs for name in ("tower", "forward", "backward", "recomputed", "head")
        },
        "reference_per_pair": reference / pairs if references else 0.0,
        "checkpointing": checkpointing,
    }


def _predict_for(
    card: Gpu, config: Config, needs: Needs, flops: dict[str, Any], world_size: int
) -> dict[str, Any]:  # fmt: skip
    """Predict memory and time of a run on one kind of GPU."""
    gpu_bytes, usable = int(card.gib * GIB), card.usable_gib * GIB
    own = variant_of(config, needs, world_size, card)
    if config.policy.checkpointing == "auto":
        own = least_checkpointing(needs, own, gpu_bytes, usable)
    parts = needs.peak(own, gpu_bytes)
    peak = sum(parts.values())
    full = dataclasses.replace(own, tokens=config.packing.max_tokens)
    spread = [storage for number in WORLD_SIZES for storage in _ways_to_spread(config, number)]
    return {
        "gpu": card.name,
        "memory_gib": card.gib,
        "usable_gib": card.usable_gib,
        "gpus": world_size,
        "storage": own.storage.name,
        "checkpointing": own.checkpointing,
        "tokens_of_pack": own.tokens,
        "parts_gib": {name: num_bytes / GIB for name, num_bytes in parts.items()},
        "peak_gib": peak / GIB,
        "peak_of_full_pack_gib": sum(needs.peak(full, gpu_bytes).values()) / GIB,
        "fits": peak <= usable,
        "max_tokens_that_fits": largest_tokens(needs, own, gpu_bytes, usable),
        "levels": _levels(needs, own, gpu_bytes, usable),
        "changes": what_to_change(config, needs, own, gpu_bytes, usable),
        "table": _peaks(spread, needs, own, card),
        "kept": _peaks(_ways_to_store(config, own.storage), needs, own, card),
        "time": _time(card, config, needs, flops, own),
    }


def _levels(needs: Needs, own: Variant, gpu_bytes: int, usable: float) -> list[dict[str, Any]]:
    """Predict what each level of checkpointing saves and costs, everything else as in ``own``."""
    rows = []
    for level in LEVELS:
        variant = dataclasses.replace(own, checkpointing=level)
        peak = sum(needs.peak(variant, gpu_bytes).values())
        rows.append(
            {
                "checkpointing": level,
                "peak_gib": peak / GIB,
                "fits": peak <= usable,
                "max_tokens_that_fits": largest_tokens(needs, variant, gpu_bytes, usable),
                "times_flops": _times_flops(needs, variant),
            }
        )
    return rows


def _peaks(storages: list[Storage], needs: Needs, own: Variant, card: Gpu) -> list[dict[str, Any]]:
    """Predict the peak with each storage, without checkpointing and with all of it, everything else as in ``own``."""
    rows = []
    for storage in storages:
        for checkpointing in ENDS:
            variant = dataclasses.replace(own, storage=storage, checkpointing=checkpointing)
            peak = sum(needs.peak(variant, int(card.gib * GIB)).values())
            rows.append(
                {
                    "gpus": storage.world_size,
                    "storage": storage.name,
                    "base_weights": storage.base_weights,
                    "optimizer": storage.optim,
                    "checkpointing": checkpointing,
                    "peak_gib": peak / GIB,
                    "fits": peak <= card.usable_gib * GIB,
                }
            )
    return rows


def variant_of(config: Config, needs: Needs, world_size: int, card: Gpu) -> Variant:
    """Return the variant that the config itself asks for; checkpointing: auto counts as none.

    Raises:
        UserError: for what its engine cannot do.
    """
    engine, zero, _ = engine_of(config, world_size, needs.frozen_bytes / GIB, card.shown_gib)
    if engine == "deepspeed":
        check_deepspeed(config, zero)
    storage = Storage(
        base_weights=config.policy.base_weights,
        optim=config.optim.kind,
        engine=engine,
        zero=zero,
        offload=config.parallel.offload,
        world_size=world_size,
    )
    return Variant(
        storage=storage,
        checkpointing=_level_of(config),
        cached_features=config.features.cache,
        tokens=needs.tokens,
    )


def _level_of(config: Config) -> Checkpointing:
    """Return the config's level of checkpointing; auto, which depends on the card, counts as none."""
    return "none" if config.policy.checkpointing == "auto" else config.policy.checkpointing


def _ways_to_store(config: Config, own: Storage) -> list[Storage]:
    """Return the ways of keeping a frozen base and AdamW's moments, everything else as the config has it."""
    spread = own.engine == "deepspeed"  # whose moments are in fp32, and whose ZeRO-3 spreads no quantised weights
    few_bits = config.policy.lora and not (spread and own.zero == 3)
    bases: tuple[BaseWeights, ...] = ("bfloat16", "fp8", "int8", "nf4") if few_bits else ("bfloat16",)
    optims: tuple[OptimKind, ...] = ("adamw",) if spread else ("adamw", "adamw-8bit")
    return [dataclasses.replace(own, base_weights=base, optim=optim) for base in bases for optim in optims]


def _ways_to_spread(config: Config, world_size: int) -> list[Storage]:
    """Return the ways of spreading a run over so many GPUs."""
    base = Storage(config.policy.base_weights, config.optim.kind, "all-reduce", 0, "none", world_size)
    spread = dataclasses.replace(base, engine="deepspeed", optim="adamw")  # whose moments are in fp32
    zeros = (1, 2) if config.policy.base_weights != "bfloat16" else (1, 2, 3)  # ZeRO-3 spreads no quantised weights
    ways = [base]
    if world_size > 1:
        ways += [dataclasses.replace(spread, zero=zero) for zero in zeros]
    ways.append(dataclasses.replace(spread, zero=2, offload="optimizer"))
    if 3 in zeros:
        ways.append(dataclasses.replace(spread, zero=3, offload="all"))
    return ways


def _time(card: Gpu, config: Config, needs: Needs, flops: dict[str, Any], own: Variant) -> dict[str, Any] | None:
    """Predict seconds from a measured rate; None: nothing like this was measured on such a GPU."""
    storage = own.storage
    if config.policy.dtype != "bfloat16" or storage.world_size > 1 or storage.base_weights != "bfloat16":
        return None
    tokens = sum(step.tokens for step in needs.reading.steps) / len(needs.reading.steps)
    tuning = "lora" if config.policy.lora else "full"
    rate = find_rate(card, needs.shapes.family, tuning, CACHED, tokens)
    if rate is None:
        return None
    steps = num_steps(config, needs.reading)
    slower = _times_flops(needs, own)
    per_step = flops["useful_per_step"] / rate.flops_per_second * slower
    result = {
        "seconds_per_step": per_step,
        "steps": steps,
        "seconds": per_step * steps,
        "rate": rate.describe(),
        "times_for_checkpointing": slower,
    }
    online = find_rate(card, needs.shapes.family, tuning, ONLINE, tokens)
    if online is not None and flops["reference_per_pair"] and config.policy.lora is not None:
        first = min(steps, needs.reading.steps_per_epoch)
        computed = flops["useful_per_step"] / online.flops_per_second + per_step * (1 - 1 / slower)
        result |= {
            "seconds_with_reference": per_step * (steps - first) + computed * first,
            "rate_with_reference": online.describe(),
        }
    return result


def _times_flops(needs: Needs, own: Variant) -> float:
    """Return how many times the FLOPs are what they would be without checkpointing."""
    pack = max(needs.reading.packs, key=lambda pack: pack.tokens)

    def total(level: Checkpointing) -> float:
        return pack_flops(
            needs.shapes, pack, checkpointing=level, reference=False, cached_features=own.cached_features,
            kernels=needs.kernels, module_by_module=own.storage.module_by_module,
        ).total  # fmt: skip

    return total(own.checkpointing) / total("none")
