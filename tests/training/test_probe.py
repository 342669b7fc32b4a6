"""Probes while training: they change nothing, and their figures are those of untouched Hugging Face models."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch

from tests import oracles
from tests.runs import final_bytes, losses, metrics, train_until_crash
from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.config import Config, LoraConfig, PolicyConfig
from vapr.data.pair import PreferencePair
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.model.policy import load_policy
from vapr.training import checkpoint, probe, trainer
from vapr.training.probe_slice import Slice

KEYS = {
    "accuracy", "accuracy_blind", "gap", "answers/accuracy", "answers/yes_rate", "answers/gold_yes_rate",
    "answers/unparsed_rate", "seconds",
}  # fmt: skip


@pytest.fixture
def held_out(photo_rows, tmp_path) -> str:
    """Twenty pairs that are not trained on: yes/no questions, several turns, two images, texts without an image."""
    file = tmp_path / "held_out.jsonl"
    rows = photo_rows[24:]
    kinds = [
        [row for row in rows if not row.get("images")][:4],
        [row for row in rows if len(row.get("images", [])) == 2][:4],
        [row for row in rows if row["category"] == "existence" and len(row.get("images", [])) == 1][:8],
        [row for row in rows if row["category"] == "reasoning" and len(row.get("images", [])) == 1][:4],
    ]
    assert [len(kind) for kind in kinds] == [4, 4, 8, 4]
    write_pairs(file, [row for kind in kinds for row in kind])
    return str(file)


@pytest.fixture
def probed(make_config, held_out):
    """``probed(name, ...)`` -> a config that probes every 3 of its 6 steps; ``probe`` replaces keys of the section."""

    def make(name: str = "probed", probe: dict | None = None, **changes) -> Config:
        section = {"every": 3, "data": held_out, "pairs": 12, "questions": 5, "shown": 2, "max_new_tokens": 6}
        return make_config(name, probe={**section, **(probe or {})}, **changes)

    return make


def probes(config: Config) -> list[dict]:
    return [entry for entry in metrics(config) if "probe/accuracy" in entry]


def without_time(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def written(config: Config, step: int) -> dict:
    return json.loads((Path(config.run_dir) / "probe" / f"step-{step:06d}.json").read_text())


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_probe_changes_no_byte(make_config, probed, family, lora):
    plain, looked_at = make_config("plain", family=family, lora=lora), probed(family=family, lora=lora)
    trainer.train(plain)
    trainer.train(looked_at)
    assert final_bytes(looked_at) == final_bytes(plain)
    assert losses(looked_at) == losses(plain)
    last = [checkpoint.list_checkpoints(Path(config.run_dir))[-1] for config in (plain, looked_at)]
    moments, same = ((folder / "optimizer.safetensors").read_bytes() for folder in last)
    assert moments == same  # they hold the random state, too
    assert [entry["step"] for entry in probes(looked_at)] == [0, 3, 6]
    assert all({key.removeprefix("probe/") for key in entry} == {*KEYS, "step"} for entry in probes(looked_at))


def preferred(model: torch.nn.Module, processor: Processor, family: str, pair: PreferencePair) -> bool:
    chosen, rejected = processor.tokenize_pair(pair).paths
    with torch.no_grad():
        sums = [oracles.completion_logps(model, family, path).sum() for path in (chosen, rejected)]
    return bool(sums[0] > sums[1])


def without_pictures(pair: PreferencePair) -> PreferencePair:
    """Return the pair as a row without ``images`` would be read."""
    prompt = [{**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in pair.prompt]
    return dataclasses.replace(pair, prompt=tuple(prompt), images=())


def answered(model: torch.nn.Module, processor: Processor, family: str, pair: PreferencePair, most: int) -> str:
    """Answer greedily, token by token, each time by a forward of the whole sequence alone."""
    path = processor.tokenize_pair(pair).paths[0]
    ids, said = torch.from_numpy(path.input_ids[: path.completion_start])[None], []
    pixels = {"pixel_values": torch.cat([image.pixel_values for image in path.images])} if path.images else {}
    if family != "llava" and path.images:
        pixels["image_grid_thw"] = torch.tensor([image.layout for image in path.images])
    for _ in range(most):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **pixels}
        if family != "llava":
            inputs["mm_token_type_ids"] = (ids == processor.image_token_id).long()
        with torch.no_grad():
            token = int(model(**inputs).logits[0, -1].argmax())
        if token in processor.eos_token_ids:
            break
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_figures_are_those_of_plain_forwards(probed, family, lora):
    config = probed(family=family, lora=lora, optim={"lr": 1e-2, "pairs_per_step": 8, "epochs": 2})
    final = trainer.train(config)
    base = Path(config.policy.model)
    processor = Processor(str(base), load_model_config(str(base)))
    looked_at = Slice(config, processor)
    assert {len(pair.images) for pair in looked_at.pairs} == {0, 1, 2}
    before = oracles.load_model(base, family)
    after = peft.PeftModel.from_pretrained(oracles.load_model(base, family), str(final)) if lora else None
    for step, model in ((0, before), (6, after or oracles.load_model(final, family))):
        shown = [preferred(model, processor, family, pair) for pair in looked_at.pairs]
        with_images = [n for n, pair in enumerate(looked_at.pairs) if pair.images]
        blind = [preferred(model, processor, family, without_pictures(looked_at.pairs[n])) for n in with_images]
        found = written(config, step)
        figures = {name: figure["value"] for name, figure in found["figures"].items()}
        assert figures["accuracy"] == pytest.approx(sum(shown) / 12)
        assert figures["accuracy_blind"] == pytest.approx(sum(blind) / len(blind))
        assert figures["gap"] == pytest.approx((sum(shown[n] for n in with_images) - sum(blind)) / len(blind))
        asked = [*looked_at.questions, *looked_at.pairs[:2]]
        assert [one["said"] for one in found["answers"]] == [answered(model, processor, family, p, 6) for p in asked]
        gold = [pair.chosen[0]["content"][0]["text"].lower().startswith("yes") for pair in looked_at.questions]
        assert figures["answers/gold_yes_rate"] == pytest.approx(sum(gold) / 5)
    changed = [one["said"] for one in written(config, 0)["answers"]] != [one["said"] for one in found["answers"]]
    assert changed, "the training was to show in the answers"


def test_a_policy_with_kernels_answers_like_one_without(tiny, photo_rows, photo_root, tmp_path, device, family):
    """Fused norms, MLPs and adapters run inside transformers' own generate, through Triton's interpreter on a CPU."""
    write_pairs(tmp_path / "pairs.jsonl", photo_rows[:3])
    section = PolicyConfig(model=str(tiny(family)), dtype="float32", lora=LoraConfig(rank=2, alpha=4))
    said = []
    for kernels in ("auto", "off"):
        policy = load_policy(section, device, kernels=kernels)
        assert policy.kernels == (kernels == "auto")
        processor = Processor(section.model, load_model_config(section.model))
        pairs = list(read_pairs(tmp_path / "pairs.jsonl", image_root=photo_root))
        said.append(probe.answer(policy, processor, pairs, 3))
        assert policy.base.training
    assert said[0] == said[1]


@pytest.mark.parametrize("before_update", [1, 4, 6])
def test_a_resumed_run_has_the_probes_of_an_unbroken_one(probed, monkeypatch, before_update):
    unbroken, broken = probed("unbroken"), probed("broken")
    trainer.train(unbroken)
    train_until_crash(broken, before_update, monkeypatch)
    trainer.train(broken, resume=before_update > 1)  # a run that never took a step begins anew without being asked
    assert final_bytes(broken) == final_bytes(unbroken)
    assert without_time(probes(broken)) == without_time(probes(unbroken))
    assert [entry["step"] for entry in metrics(broken)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_the_probe_decides_the_best_checkpoint(probed, monkeypatch, capsys):
    gold = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1, 6: 0.3}
    monkeypatch.setattr(
        probe.Probe, "take", lambda self, policy, step, *_: ({"probe/accuracy": gold.get(step, 1.0)}, "probed")
    )
    keep = {"every": 1, "keep": 1, "best": True, "best_metric": "probe/accuracy"}
    config = probed(probe={"every": 1}, checkpoint=keep)
    trainer.train(config)
    there = [folder.name for folder in checkpoint.list_checkpoints(Path(config.run_dir))]
    assert there == ["step-000002", "step-000006"]
    assert "best       step-000002, probe/accuracy 0.9" in capsys.readouterr().out


def test_what_is_said_and_shown(probed, capsys):
    config = probed()
    trainer.train(config)
    printed = capsys.readouterr()
    assert "every 3 steps: 12 pairs, " in printed.out and "5 yes/no questions, " in printed.out
    assert "step 0 probe: acc 0." in printed.err and "step 6 probe: acc 0." in printed.err
    page = (Path(config.run_dir) / "report.html").read_text()
    assert "<h2>Probe</h2>" in page and "truth is yes" in page
    assert page.count("true answer") == 4  # two of each kind


def test_fewer_questions_than_wanted_are_said(probed, capsys):
    trainer.train(probed(probe={"questions": 500, "every": 6}))
    assert "yes/no questions (of 500; no more in 20 rows)" in capsys.readouterr().out


def test_the_slice_does_not_depend_on_the_seed(probed):
    drawn = []
    for seed in (0, 1):
        config = probed(seed=seed)
        processor = Processor(config.policy.model, load_model_config(config.policy.model))
        looked_at = Slice(config, processor)
        drawn.append([pair.id for pair in (*looked_at.pairs, *looked_at.questions)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) >= 12


def test_a_bad_row_is_found_before_the_training(probed, photo_rows, tmp_path, held_out):
    rows = [{**row, "images": ["broken.png"] * len(row.get("images", []))} for row in photo_rows[24:]]
    write_pairs(Path(held_out), rows)
    with pytest.raises(UserError, match=r"held_out.jsonl:\d+: image 'broken.png' not found"):
        trainer.train(probed())
    assert not (tmp_path / "probed" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": {"every": 2}}, "probe.every: a probe needs held-out pairs; name them in probe.data or data.eval"),
        ({"probe": {"evry": 2}}, "unknown key 'probe.evry'; did you mean 'every'?"),
        ({"probe": {"every": 0}}, "probe.every must be null or at least 1, got 0"),
        ({"probe": {"every": 2, "data": 3}}, "probe.data: should be a path or hub id"),
        (
            {"checkpoint": {"best": True, "best_metric": "probe/gap"}},
            "checkpoint.best_metric: probe/gap is known where a probe was taken; set probe.every so that",
        ),
        (
            {
                "checkpoint": {"best": True, "best_metric": "probe/gap", "every": 5},
                "probe": {"every": 2, "data": "pairs.jsonl"},
            },
            "checkpoint.best_metric: probe/gap is known where a probe was taken; set probe.every so that",
        ),
        (
            {"probe": {"every": 2, "data": {"path": "p", "columns": {"promt": "q"}}}},
            "probe.data.columns: unknown key 'promt'; did you mean 'prompt'?",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(make_config, changes, message):
    with pytest.raises(UserError) as error:
        make_config(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
