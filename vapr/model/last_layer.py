"""In the last decoder layer only tokens that predict something need a query, an output projection and an MLP.

Keys and values of every token are still attended to, so nothing that is predicted changes; the other rows of the last
hidden states lose their meaning. The prompt's share of the layer is saved, forward and backward.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def trim_last_layer(layer: nn.Module) -> None:
    """Make ``layer`` skip the rows that its keyword ``predicting`` does not name, (R,) int64; all count without it.

    ``layer`` is a decoder layer of transformers with ``self_attn.q_proj``, ``self_attn.o_proj`` and ``mlp``. Their code
    is not touched: each gets fewer rows, and zeros stand for the rest.
    """
    attention: Any = layer.self_attn
    selected: list[Tensor] = []
    # partial, not closures: a deep copy of the layer then has forwards of its own
    attention.forward = functools.partial(_select, attention.forward, selected)
    for module in (attention.q_proj, attention.o_proj, layer.mlp):
        assert isinstance(module, nn.Module)
        module.forward = functools.partial(_selected_rows, module.forward, selected)


def _select(forward: Any, selected: list[Tensor], *args: Any, predicting: Tensor | None = None, **kwargs: Any) -> Any:
    """Attention, remembering the rows for its own projections and for the MLP that follows it.

    They come with every call of the layer, also with the one that gradient checkpointing makes much later.
    """
    selected[:] = [] if predicting is None else [predicting]
    return forward(*args, **kwargs)


def _selected_rows(forward: Any, selected: list[Tensor], x: Tensor) -> Tensor:
    """``forward`` of the selected rows of ``x`` (1, T, .), zeros elsewhere."""
    if not selected:
        return forward(x)
    (rows,) = selected
    out = forward(x.index_select(1, rows))
    return torch.zeros(*x.shape[:-1], out.shape[-1], dtype=out.dtype, device=out.device).index_copy(1, rows, out)
