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
    forward = attention.forward
    selected: list[Tensor] = []

    @functools.wraps(forward)
    def attend(*args: Any, predicting: Tensor | None = None, **kwargs: Any) -> Any:
        # The rows come with every call of the layer, also with the one that gradient checkpointing makes much later;
        # the MLP follows its attention.
        selected[:] = [] if predicting is None else [predicting]
        return forward(*args, **kwargs)

    attention.forward = attend
    for module in (attention.q_proj, attention.o_proj, layer.mlp):
        assert isinstance(module, nn.Module)
        module.forward = functools.partial(_selected_rows, module.forward, selected)


def _selected_rows(forward: Any, selected: list[Tensor], x: Tensor) -> Tensor:
    """``forward`` of the selected rows of ``x`` (1, T, .), zeros elsewhere."""
    if not selected:
        return forward(x)
    (rows,) = selected
    out = forward(x.index_select(1, rows))
    return torch.zeros(*x.shape[:-1], out.shape[-1], dtype=out.dtype, device=out.device).index_copy(1, rows, out)
