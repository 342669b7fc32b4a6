"""Token paths -> a forest of segments -> PackedBatch. Pure functions of the paths.

T = packed tokens, N = segments, S = attention sequences, K = gathered keys, L = predictions, M = predictions counted
once per completion, C = completions, P = pairs.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vapr.batches.forest import build_forest, depth_first, path_keys, tree_groups, walk
from vapr.batches.sequences import LastQueries, SegmentAttention, cumulative, last_queries, sequences_of
from vapr.batches.tokenize import TokenizedPair, TokenPath
from vapr.config import PackingConfig
from vapr.families.processed_image import ProcessedImage, places
from vapr_kernels.gather_rows import RowIndex
from vapr_kernels.image_losses import OTHER_PATHS
from vapr_kernels.losses import Completions


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """P pairs laid end to end as a forest of segments, without padding; shared tokens appear once."""

    # Every distinct image once. Workers copy fields into shared memory one after the other, so the images' pixels lie
    # end to end there, where joined_pixels() finds them.
    images: tuple[ProcessedImage, ...]
    pairs: tuple[TokenizedPair, ...]
    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (3, T); a token's positions are those of its own path
    cu_seqlens: Tensor  # (N + 1,) int32; segment n is the tokens cu_seqlens[n] : cu_seqlens[n + 1]
    parents: Tensor  # (N,) int32; the segment it continues, NO_PARENT for a root; parents come first
    attention: SegmentAttention

    # One packed token can be followed by several next tokens (where a pair branches), so one label per packed token
    # cannot say what to predict. Predictions are listed instead.
    predicting: Tensor  # (predicting tokens,) into T, ascending: those that predict something
    predict_from: RowIndex  # (L,) into predicting: the token whose hidden state predicts each label
    labels: Tensor  # (L,)
    last_queries: LastQueries

    # A prediction shared by several completions is made once and counted in each of their sums.
    sum_prediction: RowIndex  # (M,) into L
    sum_completion: Tensor  # (M,) into C, ascending; within a completion in token order
    token_weights: Tensor  # (M,) fp32
    completion_ends: Tensor  # (C,) int64, where each completion ends in M
    chosen: Tensor  # (P,) into C
    rejected: Tensor  # (P,) into C
    pair_weights: Tensor  # (P,) fp32

    # Where the features of ``images`` go.
    image_tokens: Tensor  # (image tokens,) into T
    image_features: RowIndex  # (image tokens,) into the features of ``images`` laid end to end

    num_tokens_unshared: int
    """Tokens the same paths would have if every one were computed alone."""

    others: Tensor | None = None  # (P, 3) into C, of OTHER_PATHS; -1 where a pair lacks the path; None: all lack all
    betas: Tensor | None = None  # (P, 2) fp32: a pair's own beta, NaN where it has none, and its margin; None: no pair

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    @property
    def completions(self) -> Completions:
        """Return which token log-probs each completion sums, and which completions make a pair."""
        return Completions(
            counted=self.sum_prediction,
            token_weights=self.token_weights,
            completion=self.sum_completion,
            ends=self.completion_ends,
            chosen=self.chosen,
            rejected=self.rejected,
            pair_weights=self.pair_weights,
            others=self.others,
            betas=self.betas,
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on ``device``; images stay on the host until the tower takes them."""
        moved: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif isinstance(value, RowIndex | SegmentAttention | LastQueries):
                moved[name] = value.to(device)
        return dataclasses.replace(self, **moved)


def count_tokens(pairs: Sequence[TokenizedPair], share: str) -> int:
    """Packed tokens T of these pairs, without building the batch."""
    image_numbers: dict[str, int] = {}
    keys = [path_keys(path, image_numbers) for pair in pairs for path in pair.paths]
    segments, _ = build_forest(tree_groups(pairs, share), keys)
    return sum(len(segment.keys) for segment in segments)


def fill_packs(pairs: list[TokenizedPair], packing: PackingConfig) -> list[list[TokenizedPair]]:
    """Split pairs over packs of at most ``packing.max_tokens``: first-fit, longest first.

    With ``share: image`` the items are groups of pairs that show one image; a group too large for a pack is split.
    Which pack a pair lands in changes no result, only how full the packs are.
    """
    items = []  # (tokens, pairs)
    for group in _image_groups(pairs, packing.share):
        while group:
            take = len(group)
            while take > 1 and count_tokens(group[:take], packing.share) > packing.max_tokens:
                take = max(1, take // 2)
            items.append((count_tokens(group[:take], packing.share), group[:take]))
            group = group[take:]
    items.sort(key=lambda item: -item[0])  # stable: equal lengths keep their order
    packs: list[tuple[int, list[TokenizedPair]]] = []
    for num_tokens, members in items:
        for n, (used, packed) in enumerate(packs):
            if used + num_tokens <= packing.max_tokens:
                packs[n] = (used + num_tokens, packed + members)
                break
        else:
            packs.append((num_tokens, members))
    return [members for _, members in packs]


def _image_groups(pairs: list[TokenizedPair], share: str) -> list[list[TokenizedPair]]:
    groups: dict[object, list[TokenizedPair]] = {}
    for number, pair in enumerate(pairs):
        images = pair.paths[0].images
        groups.setdefault(images[0].content_hash if share == "image" and images else number, []).append(pair)
    return list(groups.values())


def _ending_pairs(
    num_segments: int, starts: np.ndarray, packed_index: list[np.ndarray], pairs: Sequence[TokenizedPair]
) -> list[set[int]]:
    """Number the pairs whose paths end in each segment."""
    ending: list[set[int]] = [set() for _ in range(num_segments)]
    tokens = iter(packed_index)
    for number, pair in enumerate(pairs):
        for where in itertools.islice(tokens, len(pair.paths)):
            ending[int(np.searchsorted(starts, where[-1], side="right")) - 1].add(number)
    return ending


def _blocks(paths: list[TokenPath], packed_index: list[np.ndarray], num_tokens: int) -> np.ndarray | None:
    """Number the tokens that see one another both ways, (T,): that of their block's first one; None: there are none."""
    if not any(path.blocks for path in paths):
        return None
    blocks = np.full(num_tokens, -1)
    for path, where in zip(paths, packed_index, strict=True):
        for start, length in path.blocks:
            blocks[where[start : start + length]] = where[start]
    return blocks


def pack(pairs: Sequence[TokenizedPair], share: str = "pair") -> PackedBatch:
    """Lay pairs end to end, merging equal beginnings.

    Args:
        pairs: tokenised pairs, at least one; each may have more than two paths (chosen first, rejected second).
        share: ``none`` merges nothing, ``pair`` merges within a pair, ``image`` also across pairs that show one image.

    Returns:
        A batch on the CPU. Completions are numbered pair by pair, in path order.
    """
    paths = [path for pair in pairs for path in pair.paths]
    image_numbers: dict[str, int] = {}
    keys = [path_keys(path, image_numbers) for path in paths]
    groups = tree_groups(pairs, share)
    segments, roots = build_forest(groups, keys)
    order, parents = depth_first(segments, [root for tree in roots for root in tree])
    lengths = [len(segments[n].keys) for n in order]
    starts = np.cumsum([0, *lengths])

    first_token = dict(zip(order, starts, strict=False))
    packed_index = [np.empty(0, np.int64)] * len(paths)  # of each path's tokens
    for group, tree in zip(groups, roots, strict=True):
        for path in group:
            runs = [first_token[n] + np.arange(length) for n, length in walk(segments, tree, keys[path])]
            packed_index[path] = np.concatenate(runs)

    num_tokens = int(starts[-1])
    input_ids = np.empty(num_tokens, np.int64)
    position_ids = np.empty((3, num_tokens), np.int64)
    for token_path, where in zip(paths, packed_index, strict=True):
        input_ids[where] = token_path.input_ids
        position_ids[:, where] = token_path.position_ids

    first_path = np.cumsum([0, *(len(pair.paths) for pair in pairs)])[:-1]
    ending = _ending_pairs(len(order), starts, packed_index, pairs)
    attention = sequences_of(starts, parents, ending, _blocks(paths, packed_index, num_tokens))
    predictions = _predictions(paths, packed_index, input_ids)
    return PackedBatch(
        pairs=tuple(pairs),
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=cumulative(lengths),
        parents=torch.tensor(parents, dtype=torch.int32),
        attention=attention,
        **predictions,
        last_queries=last_queries(predictions["predicting"].numpy(), attention.lengths_q),
        chosen=torch.from_numpy(first_path),
        rejected=torch.from_numpy(first_path + 1),
        pair_weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        **_image_layout(paths, packed_index, num_tokens),
        num_tokens_unshared=sum(len(path.input_ids) for path in paths),
        others=_others(pairs, first_path),
        betas=_betas(pairs),
    )


def _others(pairs: Sequence[TokenizedPair], first_path: np.ndarray) -> Tensor | None:
    """Find the paths beside chosen and rejected, (P, 3) into C; None if no pair has any."""
    if not any(pair.roles for pair in pairs):
        return None
    others = np.full((len(pairs), len(OTHER_PATHS)), -1)
    for number, (pair, first) in enumerate(zip(pairs, first_path, strict=True)):
        for place, role in enumerate(pair.roles, start=2):
            others[number, OTHER_PATHS.index(role)] = first + place
    return torch.from_numpy(others)


def _betas(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """Return beta and margin of each pair, (P, 2); None if no pair has either."""
    if all(pair.beta is None and not pair.margin for pair in pairs):
        return None
    rows = [(np.nan if pair.beta is None else pair.beta, pair.margin) for pair in pairs]
    return torch.tensor(rows, dtype=torch.float32)


def _predictions(paths: list[TokenPath], packed_index: list[np.ndarray], input_ids: np.ndarray) -> dict[str, Any]:
    """Every completion token is predicted once, by the packed token before it, whichever completions count it."""
    predicted = [where[path.completion_start :] for path, where in zip(paths, packed_index, strict=True)]
    previous = [where[path.completion_start - 1 : -1] for path, where in zip(paths, packed_index, strict=True)]
    # A packed token has one parent, so it identifies the prediction of itself.
    targets, first, inverse = np.unique(np.concatenate(predicted), return_index=True, return_inverse=True)
    lengths = torch.tensor([len(tokens) for tokens in predicted])
    predicting, row = np.unique(np.concatenate(previous)[first], return_inverse=True)
    return {
        "predicting": torch.from_numpy(predicting),
        "predict_from": RowIndex.build(torch.from_numpy(row), len(predicting)),
        "labels": torch.from_numpy(input_ids[targets]),
        "sum_prediction": RowIndex.build(torch.from_numpy(inverse), len(targets)),
        "sum_completion": torch.arange(len(paths)).repeat_interleave(lengths),
        "token_weights": torch.from_numpy(np.concatenate([path.token_weights for path in paths])),
        "completion_ends": lengths.cumsum(0),
    }


def _image_layout(paths: list[TokenPath], packed_index: list[np.ndarray], num_tokens: int) -> dict[str, Any]:
    """Each distinct image once; every packed image token points at its row of the features laid end to end."""
    images: dict[str, ProcessedImage] = {}
    first_feature: dict[str, int] = {}
    num_features = 0
    feature_of_token = np.full(num_tokens, -1)
    for path, where in zip(paths, packed_index, strict=True):
        for image, runs in zip(path.images, path.image_runs, strict=True):
            if image.content_hash not in images:
                images[image.content_hash] = image
                first_feature[image.content_hash] = num_features
                num_features += image.num_tokens
            rows = first_feature[image.content_hash] + np.arange(image.num_tokens)
            feature_of_token[where[places(runs)]] = rows
    tokens = np.flatnonzero(feature_of_token >= 0)
    return {
        "images": tuple(images.values()),
        "image_tokens": torch.from_numpy(tokens),
        "image_features": RowIndex.build(torch.from_numpy(feature_of_token[tokens]), num_features),
    }
