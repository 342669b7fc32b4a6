"""What an operator of a training step is part of, by what it ran under, its name and its shapes.

Functions that say what they do (head, tower, optimizer) are told apart by what an operator ran under. Inside a decoder
layer that would tie a profile to the code of today, where one autograd function may hold norm, products and adapters;
there names and shapes decide. What fits nothing is ``other``; nothing is dropped.

T = tokens, D = hidden size, I = intermediate size, E = head size, R = rank of an adapter.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

PRODUCTS = "matrix products"
ADAPTERS = "adapters"
NORMS = "norms and residual sums"
GATED = "gated activation"
ROTARY = "rotary and key gathers"
ATTENTION = "attention"
HEAD = "head"
TOWER = "tower"
COPIES = "copies and indexing"
LOSS = "loss and reference"
OPTIMIZER = "optimizer"
DATA = "waiting for data"
PYTHON = "Python and dispatch"
OTHER = "other"
PARTS = (
    PRODUCTS, ADAPTERS, NORMS, GATED, ROTARY, ATTENTION, HEAD, TOWER, COPIES, LOSS, OPTIMIZER, DATA, PYTHON, OTHER,
)  # fmt: skip

WHOLE = (HEAD, TOWER, LOSS, OPTIMIZER, DATA)
"""Parts to which all work belongs that runs under them, products and copies too."""

RANGE = "part: "
"""Begins the name of a range of the profiler; the part follows."""

NAMED = (
    (re.compile("linear_logps|_exp_logits|_exp_rows|_settle|_hidden_gradient|_add_target_rows"), HEAD),
    (re.compile("preference_loss"), LOSS),
    (re.compile("rms_norm"), NORMS),
    (re.compile("swiglu|silu"), GATED),
    (re.compile("rotary|gather_keys_values"), ROTARY),
    (re.compile("AccumulateGrad"), OPTIMIZER),  # sums over packs, and fp32 copies of gradients in bf16
)
"""Operators, kernels and autograd nodes whose names tell their part."""

ATTENDS = re.compile("attention|attn|flash|fmha|softmax", re.IGNORECASE)
MULTIPLIES = re.compile(
    r"::(_?addmm(_activation)?|mm|bmm|baddbmm|linear|mkldnn_linear|_linear_pointwise|_scaled_mm|matmul|dot|mv)_?$|gemm|nvjet|cutlass"
)
COPIES_ROWS = re.compile(
    r"::(cat|stack|index(_select|_copy|_add|_put)?|_index_put_impl|gather|scatter(_add)?|gather_rows(_bwd)?|fill|zero"
    r"|copy|clone|_to_copy|repeat_interleave|constant_pad_nd|embedding(_dense_backward)?|masked_fill|where|arange|tril"
    r"|sort|argsort|nonzero|unique_consecutive|_unique2|cumsum|roll|flip)_?$|^Mem(cpy|set)|CatArray|_gather_rows"
)
MOVES_NOTHING = re.compile(
    r"::(t|numpy_T|transpose|view|_unsafe_view|view_as|reshape|_reshape_alias|as_strided|expand|expand_as|permute|split"
    r"|split_with_sizes|chunk|slice|select|narrow|unbind|unflatten|flatten|squeeze|unsqueeze|detach|alias|empty"
    r"|empty_like|empty_strided|new_empty|new_empty_strided|new_zeros|zeros|zeros_like|ones|ones_like|resize|set"
    r"|lift_fresh|to|contiguous|item|_local_scalar_dense|is_nonzero|resolve_conj|resolve_neg|result_type|matmul|linear"
    r"|scaled_dot_product_attention|select_backward|slice_backward|swapaxes|swapdims|movedim|type_as|_has_compatible.*)_?$"
)
"""Views, allocations, and operators that only call others."""


@dataclass(frozen=True, slots=True)
class Event:
    """Own time of one operator on a CPU, without what it called; or a kernel on a GPU."""

    name: str  # of the operator, also for a kernel that it launched; of the kernel where that is not known
    seconds: float
    shapes: tuple[tuple[int, ...], ...] = ()  # of the operator's tensors; () for others
    under: str = ""  # the part whose function it, or the forward of its backward, ran under; "" where none says
    backward: bool = False
    kernel: str = ""  # on a GPU


@dataclass(frozen=True, slots=True)
class Sizes:
    """What tells operators inside a decoder layer apart."""

    tokens: frozenset[int]  # rows that layers run on
    hidden: int
    intermediate: int
    head: int
    weights: frozenset[tuple[int, int]]  # sides of the base's matrices, the shorter one first
    adapters: int  # largest total rank of linear layers that read the same input; 0: no adapters


@dataclass(slots=True)
class Spent:
    """Time of one part."""

    forward: float = 0.0
    backward: float = 0.0
    operators: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def add_up(events: Iterable[Event], sizes: Sizes) -> dict[str, Spent]:
    """Return the time of every part; together they are that of all events."""
    spent = {part: Spent() for part in PARTS}
    for event in events:
        of = spent[part_of(event, sizes)]
        if event.backward:
            of.backward += event.seconds
        else:
            of.forward += event.seconds
        of.operators[_shown(event)] += event.seconds
    return spent


def part_named(name: str) -> str:
    """Return the part that a range, operator, kernel or autograd node names; "" if it names none."""
    if name.startswith(RANGE):
        return name.removeprefix(RANGE)
    return next((part for pattern, part in NAMED if pattern.search(name)), "")


def part_of(event: Event, sizes: Sizes) -> str:
    """Return the part of a step that an event belongs to."""
    if event.under == DATA:
        return DATA
    if not event.kernel and not _works(event.name):
        return PYTHON
    if event.under in WHOLE:
        return event.under
    both = f"{event.kernel} {event.name}"  # where a pattern wants an end, the operator's
    copies = COPIES_ROWS.search(both) or COPIES_ROWS.search(event.kernel)
    if ATTENDS.search(both) or (event.under == ATTENTION and not copies):
        return ATTENTION
    if (product := product_sizes(event)) is not None or MULTIPLIES.search(both):
        return ADAPTERS if product is not None and _is_skinny(product, sizes) else PRODUCTS
    if part := event.under if event.under in (NORMS, GATED, ROTARY) else part_named(both):
        return part
    if copies:
        return COPIES
    return _by_width(event, sizes) or OTHER


def product_sizes(event: Event) -> tuple[int, int, int] | None:
    """Return m, k and n of a matrix product whose shapes are known; a batch of products counts as more rows."""
    if not MULTIPLIES.search(event.name):
        return None
    matrices = [shape for shape in event.shapes if len(shape) >= 2]
    if "addmm" in event.name or "baddbmm" in event.name:  # what is added comes first
        matrices = [shape for shape in event.shapes[1:] if len(shape) >= 2]
    if len(matrices) < 2:
        return None
    a, b = matrices[:2]
    n = b[-2] if "linear" in event.name else b[-1]
    return math.prod(a[:-1]), a[-1], n


def flops(event: Event) -> float:
    """Return the FLOPs of a matrix product, 0 for anything else."""
    return 2.0 * math.prod(product_sizes(event) or (0,))


def _works(name: str) -> bool:
    """Return whether an operator of a CPU computes or copies by itself; vapr's are Python, which calls PyTorch's."""
    return "::" in name and not name.startswith(("vapr::", "autograd::", RANGE)) and not MOVES_NOTHING.search(name)


def _is_skinny(product: tuple[int, int, int], sizes: Sizes) -> bool:
    """Return whether a product is an adapter's: of its sides, tokens aside, one is a rank, or the ranks of a group.

    A base's matrix with such a side (keys of Qwen2.5-VL-3B beside rank 128) counts as the base's.
    """
    sides = list(product)
    sides.remove(next((side for side in sides if side in sizes.tokens), max(sides)))
    short, long = sorted(sides)
    return short <= sizes.adapters and (short, long) not in sizes.weights


def _by_width(event: Event, sizes: Sizes) -> str:
    """Return the part of pointwise work and of sums over rows inside a decoder layer, by the widest of its rows."""
    shapes = [shape for shape in event.shapes if shape]
    if not shapes:
        return ""
    shape = max(shapes, key=math.prod)
    width = shape[-1]
    if width in (sizes.intermediate, 2 * sizes.intermediate):
        return GATED
    if width == sizes.hidden:
        return NORMS
    if len(shape) > 2 and width in (sizes.head, sizes.head // 2):
        return ROTARY
    if len(shape) == 2 and shape[0] in sizes.tokens and width <= max(1, sizes.adapters):
        return NORMS if width == 1 else ADAPTERS
    return ""


def _shown(event: Event) -> str:
    """Name an event as a table does, a kernel by itself."""
    name = (event.kernel or event.name).removeprefix("aten::").removeprefix(RANGE)
    return name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("torch::autograd::")
