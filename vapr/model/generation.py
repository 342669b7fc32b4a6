"""A policy as it is while it trains, run by transformers' own forward and ``generate``."""

import contextlib
from collections.abc import Iterator

import transformers

from vapr.model.policy import Policy, frozen


@contextlib.contextmanager
def as_transformers(policy: Policy) -> Iterator[transformers.PreTrainedModel]:
    """Yield the policy's model, adapters included, frozen: its decoder attends over padded rows and a key-value cache.

    Outside, it attends over a forest of segments, which transformers' own forward does not lay out.
    """
    config = policy.decoder.config
    packed = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        with policy.tower, frozen(policy):
            yield policy.base
    finally:
        config._attn_implementation = packed
