"""A tower that rests: on the device while it computes, in host memory else, and the same values."""

import pytest
import torch

from tests import oracles
from tests.model.test_exactness import chosen_pairs, tokenize
from vapr.batches.packing import pack
from vapr.config import LoraConfig, PolicyConfig
from vapr.model import tower_place
from vapr.model.generation import as_transformers
from vapr.model.image_features import ImageFeatures
from vapr.model.logps import per_completion, token_logps
from vapr.model.policy import load_policy

CPU = torch.device("cpu")


@pytest.fixture
def host_elsewhere(monkeypatch):
    """Make the host another device than the policy's, though both are the CPU; what rests there is unusable."""
    monkeypatch.setattr(tower_place, "HOST", torch.device("cpu", 0))

    def leave(place):
        for tensor, values in place._waiting:
            tensor.data = torch.full_like(values, torch.nan if values.is_floating_point() else 0)

    monkeypatch.setattr(tower_place.TowerPlace, "_leave", leave)


def policy_of(folder, kind="bfloat16"):
    config = PolicyConfig(model=str(folder), dtype="float32", base_weights=kind, lora=LoraConfig(rank=4, alpha=8))
    return load_policy(config, CPU)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_cached_features_and_log_probs_stay_the_same(family, kind, tiny, photo_pairs, tmp_path, host_elsewhere):
    folder = tiny(family)
    plain = policy_of(folder, kind)
    batch = pack(tokenize(plain, folder, chosen_pairs(photo_pairs)))
    truth = per_completion(token_logps(plain, batch), batch)
    assert plain.tower.num_moves == 0

    policy = policy_of(folder, kind)
    features = ImageFeatures(policy, str(tmp_path))
    assert policy.tower.rests and policy.device == CPU
    resting = [p for n, p in policy.base.named_parameters() if "vision_tower" in n or ".visual." in n]
    assert all(bool(p.isnan().all()) for p in resting if p.is_floating_point())
    for _ in range(2):  # computed, and found
        got = per_completion(token_logps(policy, batch, features.of_batch(batch)), batch)
        assert torch.equal(got, truth)
    assert (features.misses, features.hits) == (len(batch.images), len(batch.images))
    assert policy.tower.num_moves == 1
    assert torch.equal(per_completion(token_logps(policy, batch), batch), truth)  # no features given: it comes again
    assert policy.tower.num_moves == 2
    assert all(bool(p.isnan().all()) for p in resting if p.is_floating_point())


def test_generation_brings_it_along(tiny, photo_pairs, tmp_path, host_elsewhere):
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder)
    pair = next(p for p in tokenize(policy, folder, chosen_pairs(photo_pairs)) if p.paths[0].images)
    path = pair.paths[0]
    truth = oracles.completion_logps(oracles.load_model(folder, "qwen2_5_vl"), "qwen2_5_vl", path)
    ImageFeatures(policy, str(tmp_path))
    with as_transformers(policy) as model, policy.adapters_off():
        got = oracles.completion_logps(model, "qwen2_5_vl", path)
    torch.testing.assert_close(got, truth.detach(), rtol=1e-5, atol=1e-5)
    assert policy.tower.num_moves == 1


def test_parts_of_one_memory_stay_parts_of_one(host_elsewhere):
    """As the padded MLPs of a tower on a GPU: a weight and a buffer that holds it."""
    whole = torch.arange(12.0).view(3, 4)
    module = torch.nn.Module()
    module.register_buffer("padded", whole)
    module.weight = torch.nn.Parameter(whole[:, :3], requires_grad=False)
    place = tower_place.TowerPlace([module], CPU)
    place.rest()
    assert bool(module.padded.isnan().all())
    with place, place:  # within itself
        assert torch.equal(module.padded, torch.arange(12.0).view(3, 4))
        module.padded[0, 0] = 7.0
        assert float(module.weight[0, 0]) == 7.0
    assert place.num_moves == 1


def test_on_the_host_itself_nothing_moves(tiny, tmp_path):
    policy = policy_of(tiny("llava"))
    ImageFeatures(policy, str(tmp_path))
    assert not policy.tower.rests
    with policy.tower:
        assert policy.tower.num_moves == 0
