"""Runs with losses that compare images: against a plain loop, resumed, from caches, with figures and messages."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from tests import oracles, several_ranks
from tests.runs import final_bytes, losses, metrics, train_until_crash
from tests.test_docs import fenced
from vapr.batches.second_image import changed
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.loss_config import SecondImageConfig
from vapr.training import trainer
from vapr.training.fill_caches import prepare

MDPO = [{"kind": "sigmoid"}, {"kind": "image"}, {"kind": "anchor"}]
DOCS = Path(__file__).parents[2] / "docs"


def single_image_rows(photo_rows, count: int) -> list[dict]:
    rows = [row for row in photo_rows if len(row.get("images", [])) == 1 and isinstance(row["prompt"], list)]
    return [row for row in rows if len(row["prompt"]) == 1][:count]


def mixed_rows(photo_rows) -> list[dict]:
    """Return 24 rows, some of them without an image."""
    text = [row for row in photo_rows if not row.get("images")][:5]
    return [row for pair in zip(photo_rows[:5], text, strict=True) for row in pair] + photo_rows[5:19]


def own_answers(rows: list[dict], root: Path) -> list[dict]:
    """Rows of two images with an answer each: another row's."""
    other = next(row for row in rows if row["images"] != rows[0]["images"])
    return [
        {**row, "id": f"own-{n}", "rejected": row["rejected"], "rejected_images": other["images"]}
        for n, row in enumerate(rows)
        if row["images"] != other["images"]
    ]


class PlainMdpo:
    """mDPO in plain PyTorch on a Hugging Face model, a path at a time; nothing of vapr but how a picture is cropped."""

    def __init__(self, folder, family, root) -> None:
        self.model = oracles.load_model(folder, family)
        self.processor = oracles.hugging_face_processor(folder, family)
        self.root = root

    def logp(self, row: dict, side: str, picture: Image.Image) -> torch.Tensor:
        def rendered(messages, **options) -> str:
            parts = [
                {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]}
                for m in messages
            ]  # fmt: skip
            return self.processor.apply_chat_template(parts, tokenize=False, **options)

        answer = row[side] if isinstance(row[side], list) else [{"role": "assistant", "content": row[side]}]
        prompt = rendered(row["prompt"], add_generation_prompt=True)
        said = rendered([*row["prompt"], *answer]).removeprefix(prompt)
        inputs = self.processor.image_processor(images=[picture], return_tensors="pt")
        placeholder = self.processor.image_token
        num_tokens = int(inputs["image_grid_thw"].prod()) // self.processor.image_processor.merge_size**2
        assert prompt.count(placeholder) == 1
        tokenizer = self.processor.tokenizer
        before = tokenizer(prompt.replace(placeholder, placeholder * num_tokens))["input_ids"]
        after = tokenizer(said, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + after])
        logits = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs,
            mm_token_type_ids=(ids == self.processor.image_token_id).long(),
        ).logits  # fmt: skip
        return logits[0, len(before) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(before) :, None]).sum()

    def logps(self, row: dict) -> torch.Tensor:
        """Log-probs of (w, m), (l, m) and (w, m')."""
        picture = Image.open(self.root / row["images"][0]).convert("RGB")
        digest = hashlib.blake2b(repr((0, row["id"], 0)).encode(), digest_size=16).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        second = Image.fromarray(changed(np.asarray(picture), SecondImageConfig(), random))
        sides = (("chosen", picture), ("rejected", picture), ("chosen", second))
        return torch.stack([self.logp(row, side, shown) for side, shown in sides])

    def train(self, rows: list[dict], pairs_per_step: int, lr: float) -> list[float]:
        with torch.no_grad():
            reference = {row["id"]: self.logps(row) for row in rows}
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0)
        out = []
        for start in range(0, len(rows), pairs_per_step):
            members = rows[start : start + pairs_per_step]
            total = 0.0
            for row in members:
                chosen, rejected, second = 0.1 * (self.logps(row) - reference[row["id"]])
                loss = -F.logsigmoid(chosen - rejected) - F.logsigmoid(chosen - second) - F.logsigmoid(chosen)
                (loss / len(members)).backward()
                total += loss.item() / len(members)
            optimizer.step()
            optimizer.zero_grad()
            out.append(total)
        return out


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_steps_of_mdpo_are_those_of_a_plain_loop(family, tiny, make_config, photo_rows, photo_root):
    """The third loss shows the first two updates."""
    rows = single_image_rows(photo_rows, 6)
    theirs = PlainMdpo(tiny(family), family, photo_root).train(rows, 2, 2e-4)
    everything = {"projector": True, "vision_tower": True}
    config = make_config(
        rows=rows, loss=MDPO, policy={"model": str(tiny(family)), "dtype": "float32", "train": everything},
        optim={"lr": 2e-4, "schedule": "constant", "warmup_ratio": 0, "clip": None, "pairs_per_step": 2},
        data={
            "train": str(Path(make_config().data.train)), "image_root": str(photo_root), "shuffle": False,
            "image_backend": "pil",
        },
    )  # fmt: skip
    trainer.train(config)
    ours = losses(config)
    assert ours[0] == pytest.approx(3 * math.log(2), abs=1e-5) and abs(ours[2] - ours[0]) > 0.01
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_figures_messages_and_held_out_pairs(make_config, photo_rows, capsys):
    """Of 24 rows some have no image: their other losses count, and that is said once."""
    rows = mixed_rows(photo_rows)
    config = make_config(rows=rows, loss=MDPO)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=config.data.train))
    trainer.train(config)
    out, said = capsys.readouterr()
    assert "1 sigmoid (DPO) + 1 image (second image: crop; one for each image of a row) + 1 anchor" in out
    assert len(re.findall(r"no image loss for row '.*' and its like: the row has no image", said)) == 2  # train, eval
    report = (Path(config.run_dir) / "report.html").read_text()
    assert "rewards/image_margins" in report and "rewards/symmetric_margins" not in report
    with_image = sum(bool(row.get("images")) for row in rows)
    assert 0 < with_image < 24
    entries = metrics(config)
    steps = [entry for entry in entries if "loss" in entry]
    assert [sum(entry["image_pairs"] for entry in steps[n : n + 3]) for n in (0, 3)] == [with_image] * 2
    assert steps[0]["rewards/image_margins"] == pytest.approx(0, abs=1e-5)
    share = steps[0]["image_pairs"] / 8
    assert steps[0]["loss"] == pytest.approx((2 + share) * math.log(2), abs=1e-5)  # left out costs nothing
    assert steps[-1]["rewards/image_margins"] > 0.01 and steps[-1]["rewards/image_accuracies"] > 0.5
    evaluated = [entry for entry in entries if "eval/loss" in entry]
    assert [entry["eval/image_pairs"] for entry in evaluated] == [with_image] * len(evaluated)
    assert evaluated[-1]["eval/rewards/image_margins"] > evaluated[0]["eval/rewards/image_margins"] - 1e-3
    assert not any("symmetric" in key for entry in entries for key in entry)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_a_symmetric_run(lora, make_config, photo_rows, photo_root):
    rows = own_answers(single_image_rows(photo_rows, 20), photo_root)[:8]
    plain = single_image_rows(photo_rows, 28)[20:]
    loss = [{"kind": "symmetric"}, {"kind": "image", "weight": 0.5}]
    config = make_config(
        rows=[*rows, *plain], lora=lora, loss=loss, optim={"lr": 1e-3, "pairs_per_step": 16, "epochs": 4}
    )
    trainer.train(config)
    first, *_, last = metrics(config)
    assert first["symmetric_pairs"] == 8 and first["image_pairs"] == 16
    assert first["loss"] == pytest.approx((0.5 * 3 + 0.5) * math.log(2), abs=1e-5)
    assert last["rewards/symmetric_margins"] > first["rewards/symmetric_margins"] + 0.01
    assert 0 <= last["rewards/symmetric_accuracies"] <= 1


@pytest.mark.parametrize("make", ["noise", "retrieved"])
def test_a_resumed_run_ends_with_the_same_bytes(make, make_config, monkeypatch):
    loss = [*MDPO[::2], {"kind": "image", "second_image": {"make": make}}]
    changes = {"loss": loss, "packing": {"share": "image", "max_tokens": 900}, "lora": False}
    unbroken, broken = make_config("unbroken", **changes), make_config("broken", **changes)
    trainer.train(unbroken)
    train_until_crash(broken, 4, monkeypatch)
    trainer.train(broken, resume=True)
    assert final_bytes(broken) == final_bytes(unbroken) and losses(broken) == losses(unbroken)


def test_reference_log_probs_of_second_images_are_found_again(make_config, photo_rows):
    """Other second images miss alone; a text-only row has none."""
    rows = mixed_rows(photo_rows)
    with_image = sum(bool(row.get("images")) for row in rows)
    make_config(rows=rows)

    def counts(second_image: dict, **changes) -> tuple[int, int]:
        loss = [{"kind": "sigmoid"}, {"kind": "image", "second_image": second_image}]
        found = prepare(make_config(loss=loss, **changes), say=lambda line: None)["reference"]
        return found["found"], found["computed"]

    assert counts({}) == (0, 2 * 24 + with_image)
    assert counts({}) == (0, 0)  # all steps were prepared before
    assert counts({}, packing={"share": "image"}) == (2 * 24 + with_image, 0)
    assert counts({"make": "retrieved"}) == (2 * 24, with_image)
    assert counts({"make": "retrieved"}) == (2 * 24 + with_image, 0)  # another row's image may have changed: no note
    assert counts({"make": "mask"}) == (2 * 24, with_image)
    assert counts({}, seed=1) == (2 * 24, with_image)
    assert counts({}, seed=1, packing={"share": "none"}) == (2 * 24 + with_image, 0)


def test_cached_features_change_nothing(make_config):
    plain, cached = (
        make_config(name, loss=MDPO, features={"cache": name == "cached", "cache_dir": str(Path("/tmp") / "unused")})
        for name in ("plain", "cached")
    )
    cached = dataclasses.replace(
        cached, features=dataclasses.replace(cached.features, cache_dir=str(Path(cached.run_dir).parent / "features"))
    )
    trainer.train(plain)
    trainer.train(cached)
    assert losses(cached) == pytest.approx(losses(plain), abs=1e-5)


def test_betas_and_margins_of_rows(make_config, photo_rows):
    """A row's beta in place of the loss's, times 1 + w k: as if the config had named that beta for all."""
    rows = photo_rows[:8]
    optim = {"lr": 1e-3, "pairs_per_step": 8, "epochs": 3}
    plain = make_config("plain", rows=rows, loss={"beta": 0.3}, optim=optim)
    trainer.train(plain)
    marked = make_config(
        "marked", rows=[{**row, "beta": 0.1, "margin": 4} for row in rows],
        loss={"beta": 0.3, "margin_weight": 0.5}, optim=optim,
    )  # fmt: skip
    trainer.train(marked)
    assert losses(marked) == losses(plain)
    other = make_config("other", rows=[{**row, "margin": 4} for row in rows], loss={"beta": 0.3}, optim=optim)
    trainer.train(other)
    assert losses(other) == losses(plain)  # a margin does nothing unless a loss asks for it


def test_the_configs_of_the_page_run(make_config, photo_rows, photo_root):
    """Each config of docs/losses.md, with a tiny policy and rows of every kind in place of its own."""
    blocks = fenced((DOCS / "losses.md").read_text(encoding="utf-8"), "yaml")
    rows = [*photo_rows[:6], *own_answers(single_image_rows(photo_rows, 8), photo_root)[:2]]
    usual = make_config(rows=rows).as_dict()
    ran = 0
    for number, block in enumerate(blocks):
        config = Config.parse(yaml.safe_load(block))  # complete, as it stands there
        names = ("policy", "data", "reference", "checkpoint")
        raw = {**config.as_dict(), **{name: usual[name] for name in names}, "run_dir": f"{usual['run_dir']}-{number}"}
        small = Config.parse({**raw, "optim": {"pairs_per_step": 8, "max_steps": 1}})
        trainer.train(small)
        assert losses(small)[0] > 0
        ran += 1
    assert ran >= 3


def test_the_row_of_the_page_is_a_pair(photo_root, tmp_path):
    [block] = fenced((DOCS / "losses.md").read_text(encoding="utf-8"), "json")
    row = json.loads(block)
    for name in (*row["images"], *row.get("rejected_images", [])):
        Image.new("RGB", (28, 28)).save(tmp_path / name)
    write_pairs(tmp_path / "pairs.jsonl", [row])
    from vapr.data.sources import read_pairs

    [pair] = read_pairs(tmp_path / "pairs.jsonl")
    assert pair.rejected_images and pair.beta and pair.margin


def test_two_processes_train_as_one(make_config, tmp_path, photo_rows):
    """Every rank makes the same second images; figures are means over the pairs of both that the loss applies to."""
    rows = mixed_rows(photo_rows)[:12]
    optim = {"lr": 1e-3, "pairs_per_step": 5, "epochs": 2, "eps": 1e-5}
    one, two = (make_config(name, rows=rows, loss=MDPO, optim=optim) for name in ("one", "two"))
    trainer.train(one)
    file = several_ranks.config_file(two, tmp_path / "run.yaml")
    ranks = several_ranks.run(2, tmp_path / "out", several_ranks.vapr, "train", file)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert losses(two) == pytest.approx(losses(one), rel=2e-6, abs=2e-6)
    for key in ("image_pairs", "rewards/image_margins", "rewards/image_accuracies"):
        assert [row.get(key) for row in metrics(two)] == pytest.approx(
            [row.get(key) for row in metrics(one)], rel=1e-4, abs=1e-5
        )
