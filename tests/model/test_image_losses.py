"""Losses that compare images, packed and shared, equal each path alone through the untouched Hugging Face model.

Log-probs, loss and the gradient of every trained parameter, where a pair has three, four or five paths.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import oracles
from tests.model.test_exactness import EVERYTHING, assert_same, chosen_pairs, policy_of
from vapr.batches.packing import fill_packs, pack
from vapr.batches.second_image import OtherViews
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.config import Config, PackingConfig
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr_kernels import naive, preference_loss

MDPO = [{"kind": "sigmoid"}, {"kind": "image", "weight": 0.7}, {"kind": "anchor", "delta": 0.1}]
LISTS = {
    "mdpo": MDPO,
    "retrieved": [{"kind": "sigmoid"}, {"kind": "image", "second_image": {"make": "retrieved"}}],
    "symmetric": [{"kind": "symmetric", "consistency": 0.01}],
    "everything": [*MDPO, {"kind": "symmetric", "beta": 0.3}],
}


def config_of(folder, loss) -> Config:
    policy = {"model": str(folder), "dtype": "float32"}
    return Config.parse({"run_dir": "unused", "policy": policy, "data": {"train": "unused"}, "loss": loss})


def rows_of(photo_pairs):
    """Few, of every kind: several images, text only, other images on the rejected side with its own answer."""
    pairs = chosen_pairs(photo_pairs)
    two, text, plain = pairs[0], next(p for p in pairs if not p.images), pairs[5]
    own = next(p for p in photo_pairs if len(p.images) == 1 and p.images != plain.images)
    answers = dataclasses.replace(plain, id="own-answers", rejected=own.chosen, rejected_images=own.images, beta=0.2)
    return [two, text, plain, answers]


def tokenize(folder, model_config, pairs, config) -> list[TokenizedPair]:
    processor = Processor(str(folder), model_config, "pil")
    others = OtherViews(config, processor, pairs)
    return [processor.tokenize_pair(pair, None, others) for pair in pairs]


def packed(policy, packs, share, terms):
    """Log-probs of every path by pair id, mean loss, gradients accumulated over packs."""
    parameters = policy.trained_parameters()
    total = sum(len(members) for members in packs)
    logps, loss, grads = {}, 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
    for members in packs:
        batch = pack(members, share)
        predicted = token_logps(policy, batch)
        reference = torch.zeros_like(per_completion(predicted.detach(), batch))
        function = preference_loss if policy.kernels else naive.preference_loss
        losses, *_ = function(predicted, reference, batch.completions, terms, mean_chosen_length=10.0)
        for name, grad in oracles.gradients(losses.sum() / total, parameters).items():
            grads[name] += grad
        sums = completion_sums(per_completion(predicted.detach(), batch) * batch.token_weights, batch)
        for pair, found in zip(members, sums.split([len(pair.paths) for pair in members]), strict=True):
            logps[pair.id] = found
        loss += float(losses.sum()) / total
    return logps, loss, grads


def pair_loss(pair: TokenizedPair, sums, terms):
    """The formulas once more, path by path, with reference log-probs of 0."""
    d = dict(zip(("chosen", "rejected", *pair.roles), sums, strict=True))
    loss = sums[0] * 0
    for term in terms:
        beta = term.beta if pair.beta is None else pair.beta
        s = lambda x: -F.logsigmoid(x)
        if term.kind == "sigmoid":
            loss = loss + term.weight * s(beta * (d["chosen"] - d["rejected"]))
        elif term.kind == "anchor":
            loss = loss + term.weight * s(beta * d["chosen"] - term.delta)
        elif term.kind == "image" and "second" in d:
            loss = loss + term.weight * s(beta * (d["chosen"] - d["second"]))
        elif term.kind == "symmetric" and "chosen swapped" in d:
            a, b = d["chosen"] - d["rejected swapped"], d["rejected"] - d["chosen swapped"]
            anchors = s(beta * d["chosen"]) + s(beta * d["rejected"])
            loss = loss + 0.5 * (s(beta * a) + s(beta * b)) + anchors + term.consistency * (a - b) ** 2
    return loss


def oracle(model, family, parameters, pairs, terms):
    logps, loss, grads = {}, 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
    for pair in pairs:
        sums = torch.stack([oracles.completion_logps(model, family, path).sum() for path in pair.paths])
        one = pair_loss(pair, sums, terms) / len(pairs)
        for name, grad in oracles.gradients(one, parameters).items():
            grads[name] += grad
        logps[pair.id] = sums.detach()
        loss += float(one)
    return logps, loss, grads


@pytest.mark.parametrize("name", LISTS)
def test_full_fine_tuning(family, name, tiny, photo_pairs):
    folder = tiny(family)
    policy, config = policy_of(folder, train=EVERYTHING), config_of(folder, LISTS[name])
    pairs = tokenize(folder, policy.base.config, rows_of(photo_pairs), config)
    swapped = ["chosen swapped", "rejected swapped"]
    second = ["second"] if name != "symmetric" else []
    own = second + (swapped if name in ("symmetric", "everything") else [])
    assert [list(pair.roles) for pair in pairs] == [second, [], second, own]
    model = oracles.load_model(folder, family)
    truth = oracle(model, family, dict(model.named_parameters()), pairs, config.loss)
    for share in ("none", "pair", "image"):
        assert_same(packed(policy, [pairs], share, config.loss), truth, 1e-5)
    longest = max(sum(len(path.input_ids) for path in pair.paths) for pair in pairs)
    packs = fill_packs(pairs[::-1], PackingConfig(max_tokens=longest))
    assert len(packs) > 1
    assert_same(packed(policy, packs, "pair", config.loss), truth, 1e-5)


def test_lora(family, tiny, photo_pairs):
    folder = tiny(family)
    policy, config = policy_of(folder, lora=True), config_of(folder, LISTS["everything"])
    pairs = tokenize(folder, policy.base.config, rows_of(photo_pairs), config)
    model = oracles.load_model(folder, family)
    adapted, parameters = oracles.with_adapters_of(policy, model)
    truth = oracle(adapted, family, parameters, pairs, config.loss)
    for share in ("none", "pair", "image"):
        assert_same(packed(policy, [pairs], share, config.loss), truth, 1e-5)


def test_with_fused_kernels(tiny, photo_pairs, device):
    family = "qwen2_5_vl"
    folder = tiny(family)
    policy, config = policy_of(folder, train=EVERYTHING), config_of(folder, LISTS["everything"])
    assert policy.kernels
    pairs = tokenize(folder, policy.base.config, rows_of(photo_pairs)[1::2], config)
    model = oracles.load_model(folder, family)
    truth = oracle(model, family, dict(model.named_parameters()), pairs, config.loss)
    assert_same(packed(policy, [pairs], "pair", config.loss), truth, 1e-5)


def test_the_second_image_is_what_the_second_path_sees(tiny, photo_pairs):
    """Its placeholders are those of its own size, and its log-prob is another than that of the row's own image."""
    family = "qwen2_5_vl"
    folder = tiny(family)
    policy, config = policy_of(folder), config_of(folder, LISTS["retrieved"])
    pair = tokenize(folder, policy.base.config, rows_of(photo_pairs), config)[2]
    chosen, _, second = pair.paths
    own, other = chosen.images[0], second.images[0]
    assert own.content_hash != other.content_hash
    assert len(second.input_ids) - len(chosen.input_ids) == other.num_tokens - own.num_tokens
    answers = [path.input_ids[path.completion_start :] for path in (chosen, second)]
    assert np.array_equal(*answers) and np.array_equal(chosen.token_weights, second.token_weights)
    model = oracles.load_model(folder, family)
    with torch.no_grad():
        logps = [oracles.completion_logps(model, family, path).sum() for path in (chosen, second)]
    assert abs(logps[0] - logps[1]) > 1e-3
