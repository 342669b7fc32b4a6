"""The decoder of Llama, Qwen2 and Qwen3 written out over packed tokens, as :mod:`vapr.model.patches` lets it run.

A layer whose linear layers are joined runs in functions that are differentiated by hand; others run module by module,
and those that compute something else run transformers' own code.

T = packed tokens; H = query heads, G = key heads, E = head size, D = hidden size.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vapr.batches.packing import PackedBatch
from vapr.batches.sequences import LastQueries
from vapr_kernels import gated_mlp, normed_attention, normed_linears, rms_norm

Attend = Callable[..., Tensor]
Tables = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, E)."""


def rotary_tables(decoder: Any, position_ids: Tensor) -> list[Tables]:
    """Return the tables of each layer for positions (1, T), or (3, T) in time, height and width."""
    positions = position_ids if len(position_ids) == 1 else position_ids[:, None]
    like = decoder.norm.weight.new_empty(0)  # tables are in the dtype of the weights
    # Where layers are of several types, transformers has frequencies for each.
    kinds = decoder.config.layer_types if hasattr(decoder.rotary_emb, "layer_types") else [None] * len(decoder.layers)
    tables = {}
    for kind in dict.fromkeys(kinds):
        cos, sin = decoder.rotary_emb(like, positions, *(() if kind is None else (kind,)))
        tables[kind] = cos[0], sin[0]
    return [tables[kind] for kind in kinds]


def run_decoder(
    decoder: Any, x: Tensor, tables: Sequence[Tables], attend: Attend, batch: PackedBatch, *,
    written_out: frozenset[int], kernels: bool, windows: Sequence[int | None], checkpointing: str = "none",
    deep: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """Run the layers and the last norm of a language model over packed tokens.

    Args:
        decoder: transformers' Llama, Qwen2 or Qwen3 language model.
        x: embeddings, shape (T, D).
        tables: what :func:`rotary_tables` returns for the tokens' positions.
        attend: ``segment_attention`` over the batch's forest.
        batch: which tokens predict something.
        written_out: numbers of the layers that run as :func:`decoder_layer`; the others run transformers' code.
        kernels: as :func:`patch` was given.
        windows: how many tokens up to its own a token sees in each layer; None: all.
        checkpointing: what of each layer the backward pass computes again: none, attention, mlp or full. Layers that
            are not written out have no parts: they are computed again as a whole, at any level but none. Without
            gradients, too, it decides by which products a layer runs, so that scores round alike.
        deep: features of the image tokens that are added to what the first layers return, one (image tokens, D) each.

    Returns:
        Hidden states of ``batch.predicting``, (predicting tokens, D).
    """
    last = len(decoder.layers) - 1
    assert len(deep) <= last
    level = checkpointing if decoder.training and torch.is_grad_enabled() else "none"
    own = functools.partial(transformers_layer, position_ids=batch.position_ids[:1])
    attend_scaled = scaled_queries(attend, query_scales(decoder, batch.position_ids[0]))
    stream = Stream(x)
    for number, layer in enumerate(decoder.layers):
        mine = attend_scaled if number in written_out else attend
        here = tables[number], functools.partial(mine, window=windows[number])
        if number not in written_out:
            stream = Stream(_run(own, layer, stream.total(), *here, again=level != "none"))
            stream = _with_deep(stream, deep[number : number + 1], batch)
            continue
        only = batch.last_queries if number == last else None
        run = functools.partial(decoder_layer, only=only, kernels=kernels, checkpointing=checkpointing)
        if level in ("attention", "full"):
            stream = Stream(stream.total())  # one tensor to keep, not two
        stream = _run_for_its_gradient(run, layer, stream, *here) if level == "full" else run(layer, stream, *here)
        stream = _with_deep(stream, deep[number : number + 1], batch)
    if last not in written_out:
        return decoder.norm(stream.total().index_select(0, batch.predicting))
    if kernels and stream.update is not None:
        return decoder.norm(stream.update, residual=stream.x)[0]
    return decoder.norm(stream.total())


def _with_deep(stream: "Stream", deep: Sequence[Tensor], batch: PackedBatch) -> "Stream":
    """Add features of the image tokens to the residual stream, if there are some for this layer."""
    for rows in deep:
        stream = Stream(stream.total().index_add(0, batch.image_tokens, rows))
    return stream


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """The residual stream between layers, (T, D): its value, and what is to be added to it.

    The next norm adds both in its own pass.
    """

    x: Tensor
    update: Tensor | None = None

    def total(self) -> Tensor:
        """Return the sum."""
        return self.x if self.update is None else self.x + self.update


def decoder_layer(
    layer: Any, stream: Stream, tables: Tables, attend: Attend, *,
    kernels: bool, only: LastQueries | None = None, checkpointing: str = "none", unread: bool = False,
) -> Stream:  # fmt: skip
    """Run a layer of Llama, Qwen2 or Qwen3 on (T, D). Returns (T, D); of the last one what predicts something.

    Keys and values of every token are attended to. That is all that tokens that predict nothing need of the last layer:
    no query, no output projection and no MLP.

    At level ``attention`` the backward pass runs from the norm to attention again, and at level ``mlp`` the MLP's first
    products. At level ``full`` it runs the layer again from its input on, but for the MLP's output (``unread``).
    """
    attend_part = plain_attention if layer.joint is None else joint_attention
    again = checkpointing == "attention"
    if layer.joint is not None and kernels and only is None and checkpointing != "full":
        update, x = whole_attention(layer, stream.x, stream.update, tables, attend, again=again)
    else:
        attended, x = _run(attend_part, layer, stream.x, stream.update, tables, attend, only, kernels, again=again)
        update = layer.self_attn.o_proj(attended)
    if only is not None:
        x = x.index_select(0, only.tokens.index_select(0, only.predicting))
    if layer.joint is None or layer.joint.gate_up is None:
        return Stream(*_run(plain_mlp, layer, update, x, kernels, again=checkpointing == "mlp"))
    return Stream(*joint_mlp(layer, update, x, again=checkpointing in ("mlp", "full"), unread=unread))


def whole_attention(
    layer: Any, x: Tensor, update: Tensor | None, tables: tuple[Tensor, Tensor], attend: Attend, *, again: bool
) -> tuple[Tensor, Tensor]:
    """Add, norm, project, attend and project again in one function: (T, D) -> (T, D), and the sum.

    Its backward pass attends again, which a GPU does in a small part of a layer's time. A CPU's attention is slower
    beside its products, and keeps as little as this, so there :func:`joint_attention` runs; as it does at level
    ``full``, whose layer attends again in any case.
    """
    attention, norm, joint = layer.self_attn, layer.input_layernorm, layer.joint

    def attended(*heads: Tensor) -> Tensor:
        return attend(*heads_of(attention, *heads), scale=attention.scaling, rotary=tables).flatten(1)

    learned = tuple(head_norm.weight for head_norm in head_norms(attention))
    first, residual = (x, None) if update is None else (update, x)
    return normed_attention(
        first, residual, norm.weight, norm.variance_epsilon, joint.qkv.now(), joint.output.now(), attended, learned,
        adapted=joint.qkv.adapted or joint.output.adapted, recompute=again,
    )  # fmt: skip


def joint_attention(
    layer: Any, x: Tensor, update: Tensor | None, tables: Tables, attend: Attend,
    only: LastQueries | None, kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add, norm and project in one function, and attend: (T, D) -> (T, H E), and the sum.

    The output projection is not in it: it keeps what attention returns, and would be computed again for nothing.
    """
    attention, norm, joint = layer.self_attn, layer.input_layernorm, layer.joint
    first, residual = (x, None) if update is None else (update, x)
    run = functools.partial(normed_linears, weight=norm.weight, eps=norm.variance_epsilon)
    if only is None:
        total, (q, k, v) = run(first, residual, linears=joint.qkv.now(), adapted=joint.qkv.adapted)
    else:
        total, (k, v) = run(first, residual, linears=joint.kv.now(), adapted=joint.kv.adapted)
        _, (q,) = run(total.index_select(0, only.tokens), None, linears=joint.q.now(), adapted=joint.q.adapted)
    q, k, v = heads_of(attention, q, k, v)
    attended = attend(q, k, v, scale=attention.scaling, rotary=tables, only=only).flatten(1)
    return attended if only is None else attended.index_select(0, only.predicting), total


def head_norms(attention: Any) -> list[Any]:
    """Return the norms of Qwen3's queries and keys, which run over each head before it is rotated; Qwen2 has none."""
    return [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []


def heads_of(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return heads (T, H, E) and twice (T, G, E), normed, of what the projections give."""
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in (q, k, v))
    if norms := head_norms(attention):
        q, k = (
            rms_norm(x.flatten(0, 1), norm.weight, norm.variance_epsilon).view(x.shape)
            for norm, x in zip(norms, (q, k), strict=True)
        )
    return q, k, v


def joint_mlp(layer: Any, update: Tensor, x: Tensor, *, again: bool, unread: bool) -> tuple[Tensor, Tensor]:
    """Add, norm and run the gated MLP in one function: the sum, and what the MLP adds to it, (T, D) each."""
    norm, joint = layer.post_attention_layernorm, layer.joint
    out, total = gated_mlp(
        update, x, norm.weight, norm.variance_epsilon, joint.gate_up.now(), joint.down.now(),
        adapted=joint.gate_up.adapted or joint.down.adapted, recompute=again, unread=unread,
    )  # fmt: skip
    return total, out


def plain_attention(
    layer: Any, x: Tensor, update: Tensor | None, tables: Tables, attend: Attend,
    only: LastQueries | None, kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do what :func:`joint_attention` does, module by module."""
    attention = layer.self_attn
    x = x if update is None else x + update
    normed = layer.input_layernorm(x)
    q = attention.q_proj(normed if only is None else normed.index_select(0, only.tokens))
    k, v = attention.k_proj(normed), attention.v_proj(normed)
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in (q, k, v))
    if norms := head_norms(attention):
        q, k = (norm(x) for norm, x in zip(norms, (q, k), strict=True))
    if kernels:
        attended = attend(q, k, v, scale=attention.scaling, rotary=tables, only=only).flatten(1)
    else:
        of_queries = tables if only is None else tuple(table.index_select(0, only.tokens) for table in tables)
        q, k = apply_rotary_pos_emb(q, q, *of_queries)[0], apply_rotary_pos_emb(k, k, *tables)[0]
        attended = attend(q, k, v, scale=attention.scaling, only=only).flatten(1)
    return attended if only is None else attended.index_select(0, only.predicting), x


def plain_mlp(layer: Any, update: Tensor, x: Tensor, kernels: bool) -> tuple[Tensor, Tensor]:
    """Do what :func:`joint_mlp` does, module by module."""
    if kernels:
        normed, x = layer.post_attention_layernorm(update, residual=x)
    else:
        x = x + update
        normed = layer.post_attention_layernorm(x)
    return x, layer.mlp(normed[None])[0]  # a mixture of experts asks for (1, T, D)


def _run(part: Callable[..., Any], *arguments: Any, again: bool) -> Any:
    """Run a layer or a part of one; ``again``: only its arguments are kept, and the backward pass runs it again."""
    again = again and torch.is_grad_enabled()
    return checkpoint(part, *arguments, use_reentrant=False) if again else part(*arguments)


def _run_for_its_gradient(layer: Callable[..., Stream], *arguments: Any) -> Stream:
    """Run a layer and keep its arguments; the backward pass runs it again, without the MLP's output."""
    calls = itertools.count()

    def run(*arguments: Any) -> Stream:
        return layer(*arguments, unread=next(calls) > 0)

    out: Stream = checkpoint(run, *arguments, use_reentrant=False)
    return out


def transformers_layer(
    layer: Any, x: Tensor, tables: Tables, attend: Attend, position_ids: Tensor | None = None
) -> Tensor:
    """Run transformers' own code of a decoder layer, which attends through ``LANGUAGE_MODEL``, on (T, D).

    ``position_ids``, (1, T), are for Ministral3, which scales its queries by them.
    """
    cos, sin = tables
    return layer(
        x[None], attention_mask=None, position_ids=position_ids, position_embeddings=(cos[None], sin[None]),
        attend=attend,
    )[0]  # fmt: skip


# Queries that grow with their position, as in Llama 4 and Ministral3: scores of far tokens stay apart.


def query_scale_step(decoder: Any) -> int:
    """Return after how many tokens a decoder's queries are next scaled by more, or 1 where they never are."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("llama_4_scaling_beta") else 1


def query_scales(decoder: Any, positions: Tensor) -> Tensor | None:
    """Return the factors of the queries of tokens at positions (T,), (T, 1, 1); None where there are none."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    if not (beta := rope.get("llama_4_scaling_beta")):
        return None
    steps = torch.floor(positions / query_scale_step(decoder))
    return (1 + beta * torch.log(1 + steps)).to(decoder.norm.weight.dtype)[:, None, None]


def scaled_queries(attend: Attend, scales: Tensor | None) -> Attend:
    """Return ``attend`` on queries times ``scales``. Rotation is linear, so they may be rotated before or after."""
    if scales is None:
        return attend

    def attend_scaled(q: Tensor, k: Tensor, v: Tensor, *, only: LastQueries | None = None, **options: Any) -> Tensor:
        factors = scales if only is None else scales.index_select(0, only.tokens)
        return attend(q * factors, k, v, only=only, **options)

    return attend_scaled
