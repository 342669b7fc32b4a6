"""The radix tree, on paths small enough to draw."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from vapr.batches.forest import NO_PARENT
from vapr.batches.packing import PackedBatch, count_tokens, fill_packs, pack
from vapr.batches.tokenize import TokenizedPair, TokenPath
from vapr.config import PackingConfig
from vapr.families.processed_image import ProcessedImage


def image(name: str, num_tokens: int = 3) -> ProcessedImage:
    return ProcessedImage(np.zeros((1, 3, 2, 2), np.float32), None, num_tokens, name)


def path(prompt: list[int], completion: list[int], *images: ProcessedImage, image_start: int = 1) -> TokenPath:
    ids = np.array(prompt + completion)
    runs, at = [], image_start
    for one in images:
        runs.append(((at, one.num_tokens),))
        at += one.num_tokens
    positions = np.tile(np.arange(len(ids)), (3, 1))
    return TokenPath(ids, positions, len(prompt), np.ones(len(completion), np.float32), images, tuple(runs))


def pair(
    name: str, prompt: list[int], *completions: list[int], images: tuple[ProcessedImage, ...] = ()
) -> TokenizedPair:
    return TokenizedPair(name, tuple(path(prompt, c, *images) for c in completions), 1.0, "x:1")


def segments(batch: PackedBatch) -> list[tuple[list[int], int]]:
    """(token ids, parent) of every segment."""
    bounds = batch.cu_seqlens.tolist()
    return [
        (batch.input_ids[a:b].tolist(), p) for a, b, p in zip(bounds, bounds[1:], batch.parents.tolist(), strict=False)
    ]


def test_a_pair_is_a_fork_where_the_completions_part():
    batch = pack([pair("a", [1, 2, 3], [7, 8, 9], [7, 5])])
    assert segments(batch) == [([1, 2, 3, 7], NO_PARENT), ([8, 9], 0), ([5], 0)]
    assert batch.num_tokens_unshared == 6 + 5
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 4]


def test_predictions_are_listed_and_shared_ones_counted_twice():
    batch = pack([pair("a", [1, 2, 3], [7, 8, 9], [7, 5])])
    predictions = list(zip(batch.predicting[batch.predict_from.rows].tolist(), batch.labels.tolist(), strict=True))
    assert predictions == [(2, 7), (3, 8), (4, 9), (3, 5)]  # token 3 is followed by 8 and by 5
    by_completion = [[], []]
    for prediction, completion in zip(batch.sum_prediction.rows.tolist(), batch.sum_completion.tolist(), strict=True):
        by_completion[completion].append(batch.labels[prediction].item())
    assert by_completion == [[7, 8, 9], [7, 5]]
    assert batch.completions.lengths.tolist() == [3, 2]


def test_attention_sequences_are_chains_with_all_their_ancestors():
    attention = pack([pair("a", [1, 2, 3], [7, 8, 9], [7, 5])]).attention
    assert attention.lengths_q == (6, 1)  # [1 2 3 7 8 9], then [5]
    assert attention.lengths_k == (6, 5)  # [5] sees 1 2 3 7 5
    assert attention.keys.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6]
    assert attention.cu_seqlens_q.tolist() == [0, 6, 7] and attention.cu_seqlens_k.tolist() == [0, 6, 11]


def test_share_none_merges_nothing():
    batch = pack([pair("a", [1, 2], [7], [8])], "none")
    assert segments(batch) == [([1, 2, 7], NO_PARENT), ([1, 2, 8], NO_PARENT)]


def test_share_pair_keeps_equal_prompts_of_two_pairs_apart():
    pairs = [pair("a", [1, 2], [7], [8]), pair("b", [1, 2], [7], [9])]
    assert pack(pairs, "pair").num_tokens == 8


def test_share_image_merges_pairs_of_one_image_only():
    cat, dog = image("cat"), image("dog")
    pairs = [
        pair("a", [1, 50, 50, 50, 2], [7], [8], images=(cat,)),
        pair("b", [1, 50, 50, 50, 3], [7], [8], images=(cat,)),
        pair("c", [1, 50, 50, 50, 2], [7], [8], images=(dog,)),
    ]
    batch = pack(pairs, "image")
    assert segments(batch) == [
        ([1, 50, 50, 50], NO_PARENT), ([2], 0), ([7], 1), ([8], 1), ([3], 0), ([7], 4), ([8], 4),
        ([1, 50, 50, 50, 2], NO_PARENT), ([7], 7), ([8], 7),
    ]  # fmt: skip
    assert len(batch.images) == 2
    assert batch.image_features.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.image_tokens.tolist() == [1, 2, 3, 11, 12, 13]


def test_an_image_without_sharing_is_still_encoded_once():
    cat = image("cat")
    batch = pack([pair("a", [1, 50, 50, 50, 2], [7], [8], images=(cat,))], "none")
    assert len(batch.images) == 1
    assert batch.image_features.rows.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_completion_that_is_the_beginning_of_another():
    batch = pack([pair("a", [1, 2], [7, 8, 9], [7, 8])])
    assert segments(batch) == [([1, 2, 7, 8, 9], NO_PARENT)]
    assert batch.completions.lengths.tolist() == [3, 2]
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.sum_prediction.rows.tolist() == [0, 1, 2, 0, 1]


def test_four_completions_of_one_prompt():
    batch = pack([pair("a", [1, 2], [7, 8], [7, 9], [5], [7, 8, 6])])
    assert segments(batch) == [([1, 2], NO_PARENT), ([7], 0), ([8], 1), ([6], 2), ([9], 1), ([5], 0)]
    assert batch.completions.lengths.tolist() == [2, 2, 1, 3]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0], [1])


@pytest.mark.parametrize("share", ["none", "pair", "image"])
def test_random_forests_spell_out_their_paths(share):
    """Whatever is merged: a path read through ancestors is the path, ids and positions alike."""
    rng = random.Random(share)
    for _ in range(50):
        cat = image("cat", 2)
        pairs = []
        for n in range(rng.randint(1, 5)):
            with_image = rng.random() < 0.5
            prompt = [1, *([50, 50] if with_image else []), *(rng.randint(2, 4) for _ in range(rng.randint(1, 4)))]
            completions = [[rng.randint(5, 7) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(2, 4))]
            pairs.append(pair(str(n), prompt, *completions, images=(cat,) if with_image else ()))
        batch = pack(pairs, share)
        assert batch.num_tokens == count_tokens(pairs, share)
        paths = [p for one in pairs for p in one.paths]
        parent_token = _previous_tokens(batch)
        for completion, one in enumerate(paths):
            predictions = batch.sum_prediction.rows[batch.sum_completion == completion]
            assert batch.labels[predictions].tolist() == one.input_ids[one.completion_start :].tolist()
            token = int(batch.predicting[batch.predict_from.rows[predictions[-1]]])
            back = []
            while token != NO_PARENT:
                back.append((int(batch.input_ids[token]), int(batch.position_ids[0, token])))
                token = parent_token[token]
            assert back[::-1] == [(int(i), n) for n, i in enumerate(one.input_ids[:-1])]
        _assert_attention_sees_ancestors_only(batch, parent_token)


def _previous_tokens(batch: PackedBatch) -> list[int]:
    bounds = batch.cu_seqlens.tolist()
    previous = [n - 1 for n in range(batch.num_tokens)]
    for start, parent in zip(bounds[:-1], batch.parents.tolist(), strict=True):
        previous[start] = NO_PARENT if parent == NO_PARENT else bounds[parent + 1] - 1
    return previous


def _assert_attention_sees_ancestors_only(batch: PackedBatch, previous: list[int]) -> None:
    keys = batch.attention.keys.rows.tolist()
    q_end, k_end = 0, 0
    for num_q, num_k in zip(batch.attention.lengths_q, batch.attention.lengths_k, strict=True):
        q_end, k_end = q_end + num_q, k_end + num_k
        for back in range(num_q):  # bottom-right causal: the last query sees every key of its sequence
            query, seen = q_end - 1 - back, keys[k_end - num_k : k_end - back]
            ancestors = []
            token = query
            while token != NO_PARENT:
                ancestors.append(token)
                token = previous[token]
            assert seen == ancestors[::-1]
    assert q_end == batch.num_tokens
    assert _keys_of_sequences(batch) == [
        keys[end - num_k : end]
        for num_k, end in zip(batch.attention.lengths_k, np.cumsum(batch.attention.lengths_k), strict=True)
    ]


def _keys_of_sequences(batch: PackedBatch) -> list[list[int]]:
    """The tokens that each sequence attends to, from how branches lay them."""
    branches = batch.attention.branches
    if branches is None:
        return [part.tolist() for part in batch.attention.keys.rows.split(batch.attention.lengths_k)]
    rows = torch.arange(batch.num_tokens) if branches.keys is None else branches.keys.rows
    found, trunk = [], []
    for fork, part in zip(branches.forks, rows.split(branches.lengths_k), strict=True):
        if fork == -1:
            trunk = part.tolist()
        found.append(part.tolist() if fork == -1 else trunk[:fork] + part.tolist())
    return found


def test_branches_are_short_ends_of_the_same_pair():
    """Token lists by eye: a second answer leaves the first one behind the prompt; a second pair is no branch."""
    two = [pair("0", [1, 2, 3], [4, 5], [6]), pair("1", [1, 2, 3], [7], [8, 9])]
    branches = pack(two, "pair").attention.branches
    assert (branches.forks, branches.lengths_k, branches.keys) == ((-1, 3, -1, 3), (5, 1, 4, 2), None)
    cat = image("cat", 2)
    assert pack(two, "none").attention.branches is None
    images = [pair(name, [1, 50, 50, *prompt], [4, 5], [6], images=(cat,)) for name, prompt in (("0", [2]), ("1", [3]))]
    branches = pack(images, "image").attention.branches  # the image's tokens are copied for the second pair
    assert (branches.forks, branches.lengths_k) == ((-1, 4, -1, 4), (6, 1, 6, 1))
    assert branches.keys.rows.tolist() == [*range(7), 0, 1, 2, *range(7, 11)]


@pytest.mark.parametrize(("length", "is_branch"), [(64, True), (65, False)])
def test_long_branches_are_sequences(length, is_branch):
    batch = pack([pair("0", [1, 2], [3] * 100, [4] * length)])
    assert (batch.attention.branches is not None) == is_branch


def test_packs_never_exceed_their_size_and_lose_nobody():
    rng = random.Random(0)
    cat = image("cat", 3)
    pairs = [
        pair(str(n), [1, 50, 50, 50, *range(2, 2 + rng.randint(1, 9))], [7] * rng.randint(1, 5), [8], images=(cat,))
        for n in range(40)
    ]
    for share in ("none", "pair", "image"):
        packing = PackingConfig(max_tokens=48, share=share)
        packs = fill_packs(pairs, packing)
        assert sorted(p.id for members in packs for p in members) == sorted(p.id for p in pairs)
        assert all(pack(members, share).num_tokens <= 48 for members in packs)
    by_share = {s: len(fill_packs(pairs, PackingConfig(max_tokens=48, share=s))) for s in ("none", "pair", "image")}
    assert by_share["image"] < by_share["pair"] < by_share["none"]


def test_moving_a_batch_keeps_everything():
    batch = pack([pair("a", [1, 50, 50, 50, 2], [7], [8], images=(image("cat"),))])
    moved = batch.to("cpu")
    assert moved.pairs == batch.pairs and torch.equal(moved.input_ids, batch.input_ids)
    assert torch.equal(moved.attention.keys.rows, batch.attention.keys.rows)


def test_blocks_are_sequences_of_their_own():
    """Prompt 1 [0 0 0] 2, then two answers: text, block, rest of the first path; the second sees all of the prompt."""
    shown = image("a")
    paths = [dataclasses.replace(path([1, 0, 0, 0, 2], c, shown), blocks=((1, 3),)) for c in ([7, 8], [9])]
    attention = pack([TokenizedPair("a", tuple(paths), 1.0, "x:1")]).attention
    assert attention.both_ways == (False, True, False, False)
    assert attention.lengths_q == (1, 3, 3, 1)
    assert attention.lengths_k == (1, 4, 7, 6)
    assert attention.keys.rows.tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 7]
    assert attention.cu_seqlens_q.tolist() == [0, 1, 4, 7, 8]
    apart = pack([TokenizedPair("a", tuple(paths), 1.0, "x:1")], "none").attention
    assert apart.both_ways == (False, True, False) * 2
