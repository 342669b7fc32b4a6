"""Predict the peak memory of a rank by part: stored tensors by formula, a pack from its run on fake tensors."""

from dataclasses import dataclass
from typing import Literal

from vapr.plan.fake_step import Profile
from vapr.plan.opaque import head_budget
from vapr.plan.shapes import Shapes, Weight

BaseWeights = Literal["bfloat16", "nf4", "fp8", "int8"]
OptimKind = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]

NF4_BLOCK, NF4_GROUP = 64, 256
"""Weights that share a scale of one byte, and scales that share one of four."""

MOMENTS_BLOCK = 256
"""Values of an 8-bit moment that share a scale of four bytes (bitsandbytes)."""

SMALLEST_8BIT = 4096
"""Parameters of fewer values keep 32-bit moments (bitsandbytes)."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How weights, gradients and optimizer state are kept, and on how many GPUs."""

    base_weights: BaseWeights
    optim: OptimKind
    engine: Literal["all-reduce", "deepspeed"]
    zero: int  # of deepspeed
    offload: Literal["none", "optimizer", "all"]
    world_size: int

    @property
    def module_by_module(self) -> bool:
        """Return whether decoder layers run module by module, whose weights are gathered one by one."""
        return self.engine == "deepspeed" and self.zero == 3

    @property
    def name(self) -> str:
        if self.engine == "all-reduce":
            return "one GPU" if self.world_size == 1 else "all-reduce"
        return f"zero {self.zero}" + ("" if self.offload == "none" else f", offload {self.offload}")


@dataclass(frozen=True, slots=True)
class Need:
    """Everything that decides a run's peak besides its storage."""

    shapes: Shapes
    itemsize: int  # bytes of a value in the compute dtype
    kernels: bool
    cached_features: bool  # the tower is off the GPU
    profile: Profile
    several_packs: bool  # whether a rank runs more than one pack in a step


def base_bytes(need: Need, base_weights: BaseWeights) -> dict[str, int]:
    """Return the bytes of the model's own weights, by part."""
    parts = {"language model": 0, "embeddings and head": 0, "image tower": 0}
    for weight in need.shapes.weights:
        part = "image tower" if weight.part == "image tower and projector" else weight.part
        if part == "image tower" and need.cached_features:
            continue
        parts[part] += weight_bytes(weight, base_weights, need)
    return parts


def weight_bytes(weight: Weight, base_weights: BaseWeights, need: Need) -> int:
    """Return the bytes that one weight is stored in."""
    if base_weights == "bfloat16" or not weight.quantizable:
        return (weight.padded if need.kernels else weight.numel) * need.itemsize
    if base_weights == "nf4":
        groups = -(-weight.numel // (NF4_BLOCK * NF4_GROUP))
        return -(-weight.numel // 2) + groups * (NF4_GROUP + 4)
    return weight.numel + 4 * weight.shape[0]


def restored_bytes(need: Need, base_weights: BaseWeights) -> int:
    """Return the bytes of the largest weight that is restored where it is used, in the compute dtype."""
    if base_weights == "bfloat16":
        return 0
    return max((w.numel for w in need.shapes.weights if w.quantizable), default=0) * need.itemsize


def moments_bytes(need: Need, optim: OptimKind) -> int:
    """Return the bytes of AdamW's two moments."""
    sizes = trained_sizes(need.shapes)
    if optim == "adamw":
        return 8 * sum(sizes)
    small = sum(size for size in sizes if size < SMALLEST_8BIT)
    large = [size for size in sizes if size >= SMALLEST_8BIT]
    return 8 * small + 2 * sum(size + 4 * -(-size // MOMENTS_BLOCK) for size in large)


def trained_sizes(shapes: Shapes) -> list[int]:
    """Return the number of values of every trained parameter."""
    if shapes.num_adapter:
        pairs = [(x.rank * x.inputs, x.rank * x.outputs) for x in shapes.linears.values() if x.rank]
        return [size for pair in pairs for size in pair]
    return [weight.numel for weight in shapes.weights if weight.trained]


def peak_by_part(need: Need, storage: Storage, gpu_bytes: int) -> dict[str, int]:
    """Return the bytes of every part at the moment when most is alive on one rank's GPU; their sum is the peak.

    ``gpu_bytes`` decides how many logits exist at a time.
    """
    world, spread = storage.world_size, storage.engine == "deepspeed"
    zero, shapes = (storage.zero if spread else 0), need.shapes
    gpu_state = storage.offload == "none" or not spread
    base = base_bytes(need, storage.base_weights)
    whole = 1 if zero < 3 else world
    adapters = shapes.num_adapter * need.itemsize
    masters = 0 if need.itemsize == 4 and not spread else 4 * shapes.num_trained
    moments = 0 if storage.optim == "paged-adamw-8bit" else moments_bytes(need, storage.optim)
    state = 1 / world if zero >= 1 else 1.0
    held = 1 / world if zero >= 2 else 1.0
    all_gradients = 4 * shapes.num_trained * held if gpu_state or zero < 2 else 0
    on_gpu = 0 if storage.offload == "all" else 1
    parts = {
        **{f"weights: {name}": int(num * on_gpu / whole) for name, num in base.items()},
        "adapters": int(adapters * on_gpu / whole),
        "master weights": int(masters * state) if gpu_state else 0,
        "moments": int(moments * state) if gpu_state else 0,
    }
    gathered = _gathered_bytes(need) if zero == 3 and (world > 1 or storage.offload == "all") else 0
    budget = head_budget(gpu_bytes)
    if need.several_packs or held < 1 or not all_gradients:
        gradients, pack, share = all_gradients, need.profile.peak(budget), None
    else:
        gradients, pack = _at_the_peak(need.profile, budget, int(all_gradients))
        share = 1.0
    restored = restored_bytes(need, storage.base_weights)
    more = need.profile.peak(budget, gradients_share=share, restored=restored)
    return {
        **parts,
        "gradients": int(gradients),
        **_pack_parts(need.profile, pack),
        "gathered for a layer": gathered,
        "restored weight": more - need.profile.peak(budget, gradients_share=share),
    }


def _at_the_peak(profile: Profile, budget: int, gradients: int) -> tuple[int, int]:
    """Return gradients and the rest when both together are most, in a step of one pack; the update comes after it."""
    both, alone = profile.peak(budget, gradients_share=1.0), profile.peak(budget)
    if both <= gradients:
        return gradients, 0
    return max(both - alone, 0), min(both, alone)


def _pack_parts(profile: Profile, peak: int) -> dict[str, int]:
    """Divide a pack's peak into what is kept for the backward pass and what comes and goes."""
    features = min(profile.features, peak)
    activations = min(max(profile.activations, 0), peak - features)
    head = min(max(profile.head, 0), peak - features - activations)
    return {
        "image features": features,
        "activations": activations,
        "head and loss": head,
        "transient": peak - features - activations - head,
    }


def _gathered_bytes(need: Need) -> int:
    """Return what ZeRO-3 gathers at a time: a decoder layer, and the two largest weights (embeddings and head)."""
    shapes = need.shapes
    layer = shapes.count("language model") // max(shapes.num_layers, 1) + shapes.num_adapter // max(
        shapes.num_layers, 1
    )
    largest = sorted((weight.numel for weight in shapes.weights), reverse=True)[:2]
    return (layer + sum(largest)) * need.itemsize
