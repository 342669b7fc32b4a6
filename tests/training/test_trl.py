"""Wherever the token ids agree, vapr's step losses equal those of TRL's DPOTrainer: same rows, settings, order; fp32."""

import json
import shutil

import pytest
import torch
from PIL import Image

from tests import oracles
from vapr.config import Config
from vapr.training import trainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS, PAIRS = 10, 4


def rows_with_images(photo_rows, photo_root) -> list[dict]:
    rows = [row for row in photo_rows if len(row.get("images", [])) >= 1][: STEPS * PAIRS]
    small = {}
    for row in rows:
        for name in row["images"]:
            small.setdefault(name, Image.open(photo_root / name).convert("RGB"))
    return [{**row, "pil": [small[name] for name in row["images"]]} for row in rows]


def parts(messages: list[dict]) -> list[dict]:
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"],
        }
        for m in messages
    ]


def trl_losses(folder, family, rows, tmp_path, *, peft_config=None, **options) -> list[float]:
    examples = [{"images": r["pil"], **{key: parts(r[key]) for key in ("prompt", "chosen", "rejected")}} for r in rows]
    processor = oracles.hugging_face_processor(folder, family)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=2e-4, lr_scheduler_type="cosine",
        warmup_steps=2, max_grad_norm=1.0, optim="adamw_torch", disable_dropout=True, **options,
    )  # fmt: skip

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = oracles.load_model(folder, family)
    dpo = InOrder(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
        peft_config=peft_config,
    )
    dpo.train()
    return [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]


def vapr_losses(folder, rows, photo_root, tmp_path, **changes) -> list[float]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "pil"}) + "\n" for row in rows))
    config = Config.parse(
        {
            "run_dir": str(tmp_path / "run"),
            "policy": {"model": str(folder), "dtype": "float32", "train": {"projector": True, "vision_tower": True}},
            "data": {"train": str(data), "image_root": str(photo_root), "shuffle": False, "image_backend": "pil"},
            "optim": {
                "lr": 2e-4,
                "schedule": "cosine",
                "warmup_ratio": 0.2,
                "pairs_per_step": PAIRS,
                "max_steps": STEPS,
            },
            "reference": {"cache_dir": str(tmp_path / "reference")},
            **changes,
        }
    )
    trainer.train(config)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in metrics if "loss" in entry]


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "idefics3", "smolvlm", "llava_pixtral", "mistral3",
        "ministral3", "gemma3",
    ],
)  # fmt: skip
def test_ten_steps_of_full_fine_tuning(family, tiny, photo_rows, photo_root, tmp_path):
    rows = rows_with_images(photo_rows, photo_root)
    # TRL adds the auxiliary loss of a model's router unless told otherwise; vapr has none.
    options = {"router_aux_loss_coef": 0.0} if family == "qwen3_vl_moe" else {}
    theirs = trl_losses(tiny(family), family, rows, tmp_path, beta=0.1, **options)
    ours = vapr_losses(tiny(family), rows, photo_root, tmp_path)
    assert len(ours) == len(theirs) == STEPS
    assert max(theirs) - min(theirs) > 0.01  # something was learned, so the updates agree too
    assert ours == pytest.approx(theirs, abs=1e-4)


def llava_tokenised_alike(folder, copy):
    """A LLaVA for which TRL's ids are those of inference.

    TRL 1.16 leaves out the BOS of image rows, so this template writes it; it tokenises completions by themselves, so
    this tokenizer marks the first word of a text only if no space is there; and it scores what the template writes
    after an answer, so that is the token at which the model stops.
    """
    shutil.copytree(folder, copy)
    template = copy / "chat_template.jinja"
    ended = "{% generation %}{{ content['text'] + '</s>'}}{% endgeneration %}"
    text = template.read_text().replace("{% generation %}{{ content['text'] + ' '}}{% endgeneration %}", ended)
    assert ended in text
    template.write_text("{{ bos_token }}" + text)
    mark_first_words_only(copy)
    return copy


def mark_first_words_only(folder):
    """Let a tokenizer of SentencePiece's kind mark the first word of a text only where no space is."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_ten_steps_of_llava_where_trl_tokenises_as_inference_does(tiny, photo_rows, photo_root, tmp_path):
    rows = rows_with_images(photo_rows, photo_root)
    folder = llava_tokenised_alike(tiny("llava"), tmp_path / "llava")
    theirs = trl_losses(folder, "llava", rows, tmp_path, beta=0.1)
    assert vapr_losses(folder, rows, photo_root, tmp_path) == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "theirs"),
    [
        ("robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("hinge", {}, {}),
        ("ipo", {}, {}),
        ("bco_pair", {}, {}),
        ("apo_zero", {}, {}),
        ("apo_down", {}, {}),
        ("sft", {}, {}),
    ],
)
def test_other_losses(kind, options, theirs, tiny, photo_rows, photo_root, tmp_path):
    family = "qwen2_5_vl"
    rows = rows_with_images(photo_rows, photo_root)
    expected = trl_losses(tiny(family), family, rows, tmp_path, beta=0.2, loss_type=[kind], **theirs)
    ours = vapr_losses(tiny(family), rows, photo_root, tmp_path, loss={"kind": kind, "beta": 0.2, **options})
    # the loss of ipo and sft is of size 6, where fp32 resolves no better
    assert ours == pytest.approx(expected, abs=1e-4, rel=2e-5)


def test_a_weighted_sum(tiny, photo_rows, photo_root, tmp_path):
    """MPO: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft."""
    family = "qwen2_vl"
    rows = rows_with_images(photo_rows, photo_root)
    kinds, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    expected = trl_losses(tiny(family), family, rows, tmp_path, beta=0.1, loss_type=kinds, loss_weights=weights)
    terms = [{"kind": kind, "weight": weight} for kind, weight in zip(kinds, weights, strict=True)]
    ours = vapr_losses(tiny(family), rows, photo_root, tmp_path, loss=terms)
    assert ours == pytest.approx(expected, abs=1e-4, rel=2e-5)
