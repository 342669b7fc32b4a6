"""Packed and shared equals each sequence run alone through the untouched Hugging Face model.

Everything here is judged against ``tests/oracles.py``: log-probs, loss, and the gradient of every trained parameter.
"""

import copy
import dataclasses
import io
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import oracles
from tests.conftest import EVERY_FAMILY
from vapr.batches.packing import fill_packs, pack
from vapr.batches.sequences import last_queries
from vapr.batches.tokenize import Processor, TokenizedPair
from vapr.config import LEVELS, LoraConfig, PackingConfig, PolicyConfig, TrainConfig
from vapr.data.pair import PreferencePair
from vapr.families import FAMILIES
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import Policy, load_policy
from vapr_kernels.losses import sigmoid_loss

EVERYTHING = TrainConfig(language_model=True, projector=True, vision_tower=True)


@pytest.fixture(params=EVERY_FAMILY)
def family(request) -> str:
    return request.param


def policy_of(folder, *, lora=False, **options) -> Policy:
    config = PolicyConfig(
        model=str(folder), dtype="float32", lora=LoraConfig(rank=4, alpha=8) if lora else None, **options
    )
    policy = load_policy(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(0, 0.05, generator=generator)
    return policy


def tokenize(policy: Policy, folder, pairs: list[PreferencePair]) -> list[TokenizedPair]:
    processor = Processor(str(folder), policy.base.config, "pil")
    return [processor.tokenize_pair(pair) for pair in pairs]


def chosen_pairs(photo_pairs: list[PreferencePair]) -> list[PreferencePair]:
    """Few, but of every kind: single image, several images, text only, several turns, one image in many pairs, and one
    whose rejected side shows another image."""
    several = [p for p in photo_pairs if len(p.images) > 1][:2]
    text = [p for p in photo_pairs if not p.images][:2]
    turns = [p for p in photo_pairs if len(p.prompt) > 2 and len(p.images) == 1][:1]
    astronaut = [p for p in photo_pairs if len(p.images) == 1 and p.images[0].name == "astronaut.png"][:3]
    caption = [p for p in photo_pairs if p.category == "caption"][:1]
    coffee = next(p for p in photo_pairs if len(p.images) == 1 and p.images[0].name == "coffee.png")
    other = dataclasses.replace(
        astronaut[0], id="other-image", rejected=astronaut[0].chosen, rejected_images=coffee.images
    )
    pairs = {p.id: p for p in (*several, *text, *turns, *astronaut, *caption, other)}
    return list(pairs.values())


def dpo(logps, reference):
    return sigmoid_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], beta=0.1)


def packed_loss_and_grads(policy: Policy, packs: list[list[TokenizedPair]], share: str):
    """Log-probs by pair id, mean loss, gradients accumulated over packs."""
    parameters = policy.trained_parameters()
    total = sum(len(members) for members in packs)
    logps, loss, grads = {}, 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
    for members in packs:
        batch = pack(members, share)
        out = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
        losses = dpo(out, torch.zeros_like(out))
        for name, grad in oracles.gradients(losses.sum() / total, parameters).items():
            grads[name] += grad
        logps.update(zip([pair.id for pair in members], out.detach(), strict=True))
        loss += float(losses.sum()) / total
    return logps, loss, grads


def oracle_loss_and_grads(model, family: str, parameters, pairs: list[TokenizedPair]):
    logps, loss, grads = {}, 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
    for pair in pairs:
        out = torch.stack([oracles.completion_logps(model, family, path).sum() for path in pair.paths])[None]
        losses = dpo(out, torch.zeros_like(out))
        for name, grad in oracles.gradients(losses.sum() / len(pairs), parameters).items():
            grads[name] += grad
        logps[pair.id] = out[0].detach()
        loss += float(losses.sum()) / len(pairs)
    return logps, loss, grads


def assert_same(got, truth, tolerance: float) -> None:
    for pair, logps in truth[0].items():
        torch.testing.assert_close(got[0][pair].double(), logps.double(), rtol=tolerance, atol=tolerance)
    largest = max(float(logps.abs().max()) for logps in truth[0].values())
    assert got[1] == pytest.approx(truth[1], abs=0.1 * tolerance * largest)  # beta is 0.1, the most that a loss follows
    assert got[2].keys() == truth[2].keys()
    assert oracles.worst_relative_error(got[2], truth[2]) < 50 * tolerance


@pytest.fixture(scope="module")
def full_oracle(tiny, photo_pairs):
    """Everything trained, fp32: computed once for each family."""
    results = {}

    def compute(family: str):
        if family not in results:
            folder = tiny(family)
            policy = policy_of(folder, train=EVERYTHING)
            pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
            model = oracles.load_model(folder, family)
            parameters = dict(model.named_parameters())
            results[family] = policy, pairs, oracle_loss_and_grads(model, family, parameters, pairs)
        return results[family]

    return compute


@pytest.mark.parametrize("share", ["none", "pair", "image"])
def test_full_fine_tuning(family, share, full_oracle):
    policy, pairs, truth = full_oracle(family)
    assert set(policy.trained_parameters()) == set(truth[2])  # every parameter of the model
    assert_same(packed_loss_and_grads(policy, [pairs], share), truth, 1e-5)


@pytest.mark.parametrize("checkpointing", LEVELS)
def test_lora_on_the_language_model(family, checkpointing, tiny, photo_pairs, few_rows):
    folder = tiny(family)
    policy = policy_of(folder, lora=True, checkpointing=checkpointing)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    model = oracles.load_model(folder, family)
    adapted, parameters = oracles.with_adapters_of(policy, model)
    assert {FAMILIES[policy.family].part_of(name) for name in parameters} == {"language_model"}
    assert set(parameters) == set(policy.trained_parameters())
    truth = oracle_loss_and_grads(adapted, family, parameters, pairs)
    for share in ("pair", "image"):
        assert_same(packed_loss_and_grads(policy, [pairs], share), truth, 1e-5)


def test_with_products_by_onednn(family, tiny, photo_pairs, by_onednn):
    """As some CPUs take them, in numbers of rows that come again: adapters, head, and what is frozen."""
    folder = tiny(family)
    policy = policy_of(folder, lora=True)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    model = oracles.load_model(folder, family)
    adapted, parameters = oracles.with_adapters_of(policy, model)
    by_onednn.clear()  # modules were tried
    truth = oracle_loss_and_grads(adapted, family, parameters, pairs)
    assert by_onednn == []  # transformers' own forward
    assert_same(packed_loss_and_grads(policy, [pairs], "pair"), truth, 1e-5)
    assert len(by_onednn) > 10 and all(rows % 16 == 0 for rows, *_ in by_onednn)


def test_in_double_precision(family, tiny, photo_pairs):
    """fp64 leaves only the rounding of transformers' norms and rotary tables, which compute in fp32."""
    folder = tiny(family)
    policy = policy_of(folder, train=EVERYTHING)
    policy = dataclasses.replace(policy, base=policy.base.double(), dtype=torch.float64)
    if family.endswith("_moe"):
        policy.base.set_experts_implementation("eager")  # PyTorch's grouped products know no fp64
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    model = oracles.load_model(folder, family).double()
    truth = oracle_loss_and_grads(model, family, dict(model.named_parameters()), pairs)
    got = packed_loss_and_grads(policy, [pairs], "image")
    assert_same((*got[:2], judged(got[2])), (*truth[:2], judged(truth[2])), 2e-7)


def judged(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the key biases of towers that rotate nothing: they move all scores of a query alike, so that their
    gradient is nothing but rounding."""
    return {name: grad for name, grad in grads.items() if not re.search(r"vision_tower\..*\.k_proj\.bias", name)}


@pytest.mark.parametrize("checkpointing", LEVELS[1:])
def test_checkpointing_changes_nothing(family, checkpointing, tiny, full_oracle):
    _, pairs, truth = full_oracle(family)
    policy = policy_of(tiny(family), train=EVERYTHING, checkpointing=checkpointing)
    assert_same(packed_loss_and_grads(policy, [pairs], "pair"), truth, 1e-5)


@pytest.mark.parametrize("share", ["pair", "image"])
def test_order_pack_size_and_accumulation(family, share, full_oracle):
    policy, pairs, truth = full_oracle(family)
    shuffled = random.Random(3).sample(pairs, len(pairs))
    longest = max(sum(len(path.input_ids) for path in pair.paths) for pair in pairs)
    packs = fill_packs(shuffled, PackingConfig(max_tokens=longest, share=share))
    assert len(packs) > 1
    assert sorted(p.id for members in packs for p in members) == sorted(p.id for p in pairs)
    assert_same(packed_loss_and_grads(policy, packs, share), truth, 1e-5)


@pytest.mark.parametrize(
    ("family", "tuning", "checkpointing"),
    [(family, "everything", "none") for family in oracles.CLASSES]
    + [("qwen2_5_vl", "everything", level) for level in LEVELS[1:]]
    + [("qwen2_5_vl", "lora", "none"), ("qwen2_5_vl", "lora", "mlp"), ("qwen2_5_vl", "lora", "full")]
    + [("qwen3_vl", "lora", "none"), ("qwen3_vl", "everything", "attention"), ("qwen3_vl_moe", "lora", "full")],
)
def test_with_fused_kernels(family, tuning, checkpointing, tiny, photo_pairs, device, few_rows):
    """Head, norms, MLPs, rotary embeddings and gathers through Triton."""
    folder = tiny(family)
    options = {"lora": True} if tuning == "lora" else {"train": EVERYTHING}
    policy = policy_of(folder, checkpointing=checkpointing, **options)
    assert policy.kernels
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    pairs = [pairs[2], pairs[-1]]  # text alone, and another image on the rejected side
    model = oracles.load_model(folder, family)
    if tuning == "lora":
        adapted, parameters = oracles.with_adapters_of(policy, model)
        truth = oracle_loss_and_grads(adapted, family, parameters, pairs)
    else:
        truth = oracle_loss_and_grads(model, family, dict(model.named_parameters()), pairs)
    assert_same(packed_loss_and_grads(policy, [pairs], "image"), truth, 1e-5)


def test_frozen_parts_get_no_gradient(family, tiny, full_oracle):
    _, pairs, truth = full_oracle(family)
    policy = policy_of(tiny(family), train=TrainConfig(language_model=False, projector=True))
    trained = set(policy.trained_parameters())
    assert {FAMILIES[policy.family].part_of(name) for name in trained} == {"projector"}
    _, _, grads = packed_loss_and_grads(policy, [pairs], "pair")
    assert oracles.worst_relative_error(grads, {name: truth[2][name] for name in trained}) < 1e-3


def test_two_images_with_equal_placeholder_counts_are_not_shared(family, tiny, photo_pairs):
    """Same question about two photographs of one size: same token ids, different pixels."""
    folder = tiny(family)
    policy = policy_of(folder)
    astronaut = next(p for p in photo_pairs if len(p.images) == 1 and p.images[0].name == "astronaut.png")
    camera = next(p for p in photo_pairs if len(p.images) == 1 and p.images[0].name == "camera.png")
    twin = dataclasses.replace(astronaut, id="twin", images=camera.images)
    pairs = tokenize(policy, folder, [astronaut, twin])
    assert np.array_equal(pairs[0].paths[0].input_ids, pairs[1].paths[0].input_ids)
    batch = pack(pairs, "image")
    assert len(batch.images) == 2
    model = oracles.load_model(folder, family)
    got = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
    truth = oracles.pair_logps(model, family, batch)
    assert (truth[0] - truth[1]).abs().min() > 1e-3  # the picture matters, so a mix-up would show
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", ["swapped", "other second"])
def test_two_images_in_a_prompt_are_told_apart(family, images, tiny, photo_pairs, photo_root):
    """Whole paths with equal token ids, whose images differ in order, or only after a shared first one."""
    folder = tiny(family)
    policy = policy_of(folder)
    pair = next(p for p in photo_pairs if len(p.images) == 2)
    second = next(photo_root / name for name in ("coffee.png", "rocket.jpg") if photo_root / name not in pair.images)
    resized = [np.asarray(Image.open(path).convert("RGB").resize((112, 112))) for path in (*pair.images, second)]
    first, middle, last = (_png(pixels) for pixels in resized)
    pair = dataclasses.replace(pair, images=(first, middle))
    other = dataclasses.replace(pair, id="other", images=(middle, first) if images == "swapped" else (first, last))
    tokenized = tokenize(policy, folder, [pair, other])
    assert np.array_equal(tokenized[0].paths[0].input_ids, tokenized[1].paths[0].input_ids)
    batch = pack(tokenized, "image")
    got = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
    truth = oracles.pair_logps(oracles.load_model(folder, family), family, batch)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_two_classic_bugs_would_show(tiny, full_oracle):
    """Rejected that sees chosen, and positions that do not restart, both train without complaint: make sure that this
    suite's tolerance tells them apart from the right answer."""
    family = "qwen2_5_vl"
    policy, pairs, truth = full_oracle(family)
    batch = pack(pairs, "pair")

    one_sequence = copy.copy(batch.attention)
    total = batch.num_tokens
    sees_chosen = dataclasses.replace(
        one_sequence,
        lengths_q=(total,), lengths_k=(total,),
        keys=type(one_sequence.keys).build(torch.arange(total), total), branches=None,
    )  # fmt: skip
    not_restarted = batch.position_ids.clone()
    starts = batch.cu_seqlens[1:-1].long()[
        (batch.parents[1:] >= 0) & (batch.parents[1:] != torch.arange(len(batch.parents) - 1))
    ]
    for start in starts.tolist():  # the second child of a branch goes on counting after the first
        not_restarted[:, start:] += 5
    for broken in (
        dataclasses.replace(
            batch, attention=sees_chosen, last_queries=last_queries(batch.predicting.numpy(), sees_chosen.lengths_q)
        ),
        dataclasses.replace(batch, position_ids=not_restarted),
    ):
        logps = completion_logps(per_completion(token_logps(policy, broken), broken), broken)
        right = torch.stack([truth[0][pair.id] for pair in batch.pairs])
        assert (logps - right).abs().max() > 1e-2


def test_rejected_gradient_ignores_chosen_tokens(tiny, photo_pairs):
    """The rejected log-prob's gradient is the same whatever the chosen completion says."""
    family = "qwen2_vl"
    folder = tiny(family)
    policy = policy_of(folder)
    pair = next(p for p in photo_pairs if p.category == "caption")
    other = dataclasses.replace(
        pair, chosen=({"role": "assistant", "content": [{"type": "text", "text": "Quite another answer."}]},)
    )
    grads = []
    for variant in (pair, other):
        batch = pack(tokenize(policy, folder, [variant]), "pair")
        logps = completion_logps(per_completion(token_logps(policy, batch), batch), batch)
        grads.append(oracles.gradients(logps[0, 1], policy.trained_parameters()))
    assert oracles.worst_relative_error(grads[0], grads[1]) < 1e-4


def test_more_than_two_completions(family, tiny, photo_pairs):
    folder = tiny(family)
    policy = policy_of(folder)
    first, second = chosen_pairs(photo_pairs)[4:6]
    tokenized = tokenize(
        policy, folder, [first, dataclasses.replace(first, id="b", chosen=second.chosen, rejected=second.rejected)]
    )
    four = dataclasses.replace(tokenized[0], paths=(*tokenized[0].paths, *tokenized[1].paths))
    batch = pack([four], "pair")
    counted = per_completion(token_logps(policy, batch), batch)
    model = oracles.load_model(folder, family)
    truth = torch.cat([oracles.completion_logps(model, family, path) for path in four.paths])
    torch.testing.assert_close(counted, truth, rtol=1e-5, atol=1e-5)
    assert batch.num_tokens < sum(len(path.input_ids) for path in four.paths) / 2


def test_same_numbers_on_every_run(tiny, photo_pairs):
    """Two backward passes give the same bits, several threads or not."""
    folder = tiny("qwen2_5_vl")
    policy = policy_of(folder, train=EVERYTHING)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs))
    runs = [packed_loss_and_grads(policy, [pairs], "image") for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][2][name], runs[1][2][name]) for name in runs[0][2])


def _tied(config):
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True


def _full_strategy(config):
    config.vision_feature_select_strategy = "full"


def _two_feature_layers(config):
    config.vision_feature_layer = [-2, -1]


def _ungrouped_heads(config):
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads


def _windows(config):
    """Narrower than most prompts, in every layer but the first."""
    text = config.text_config
    text.use_sliding_window, text.sliding_window = True, 9
    text.layer_types = ["full_attention", *["sliding_attention"] * (text.num_hidden_layers - 1)]


def _mistral(config):
    """Mistral's window is every layer's."""
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")  # fmt: skip
    config.text_config = transformers.MistralConfig(
        sliding_window=9, **{name: getattr(config.text_config, name) for name in shared}
    )


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2_vl", _windows),
        ("qwen2_5_vl", _windows),
        ("llava", _mistral),
        ("qwen2_vl", _tied),
        ("qwen2_5_vl", _tied),
        ("llava", _full_strategy),
        ("llava", _two_feature_layers),
        ("qwen2_5_vl", _ungrouped_heads),
        ("qwen3_vl", _tied),
        ("qwen3_vl", _ungrouped_heads),
    ],
)
def test_other_shapes_of_the_families(family, change, tiny, photo_pairs, tmp_path):
    folder = tmp_path / "variant"
    shutil.copytree(tiny(family), folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    change(config)
    torch.manual_seed(5)
    oracles.CLASSES[family](config).save_pretrained(folder)
    if change is _full_strategy:
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["vision_feature_select_strategy"] = "full"
        (folder / "processor_config.json").write_text(json.dumps(settings))
    policy = policy_of(folder, train=EVERYTHING)
    pairs = tokenize(policy, folder, chosen_pairs(photo_pairs)[:5])
    model = oracles.load_model(folder, family)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(policy.trained_parameters())
    truth = oracle_loss_and_grads(model, family, parameters, pairs)
    assert_same(packed_loss_and_grads(policy, [pairs], "image"), truth, 1e-5)
