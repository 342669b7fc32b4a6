"""The arms of the training-step benchmark: vapr as it trains, and TRL's DPOTrainer as it trains.

An arm is called once a step and trains on the next rows: data, forward, backward, clipping and update.
"""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor

from bench.commit_arm import first_step
from bench.workloads import Subject
from vapr.batches.loader import PairLoader, load_pairs
from vapr.batches.steps import Step
from vapr.batches.tokenize import Processor
from vapr.config import Config, DataConfig, OptimConfig, PackingConfig
from vapr.data.pair import PreferencePair
from vapr.model.attention import VISION_TOWER
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.training.engine import Engine
from vapr.training.step import train_step

LR = 1e-3
"""Large, so that a few updates move the loss far enough to compare the arms by it."""


TRL_MICRO_PAIRS = 4
"""Pairs of one TRL forward pass on a GPU; a step accumulates over several."""


class OnlineReference(Reference):
    """Keeps nothing of what it computed: every batch is a miss, as every batch of a first epoch is."""

    def get(self, key: bytes) -> None:
        return None

    def put(self, key: bytes, values: np.ndarray) -> None:
        pass


class VaprArm:
    """vapr's own loader, reference, ``train_step`` and update.

    Args:
        subject: builds the policy.
        pairs: the rows, in the order in which they are trained on.
        pairs_per_step: pairs of one update.
        share: ``packing.share``.
        cached: the reference is in the cache; else computed in the step.
        trained: policy and engine to go on with, so that several arms need one model on a GPU.
        loader: of the pairs, whose data processes have to be started before the GPU is touched. Without one the arm
            tokenises in its own process.
        packed: every step's packs, if known already.
    """

    def __init__(
        self, subject: Subject, pairs: list[PreferencePair], pairs_per_step: int, *, share: str, cached: bool,
        trained: tuple[Policy, Engine] | None = None, loader: PairLoader | None = None,
        packed: list[Step] | None = None,
    ) -> None:  # fmt: skip
        self.config = vapr_config(subject, share, pairs_per_step)
        self.policy, self.engine = trained or new_policy(subject, self.config)
        self._loader = loader or load_pairs(self.config, pairs, subject.new_processor())
        self._packed = packed
        self.num_steps = len(pairs) // pairs_per_step
        cache = str(subject.folder / "references")
        self.reference = (Reference if cached else OnlineReference)(self.policy, cache, share)
        if cached:
            for step in self.prebuild():
                for batch in step.batches:
                    self.reference.logps(batch.to(self.policy.device))
        self.losses: list[float] = []

    def prebuild(self) -> list[Step]:
        """Every step's packs."""
        if self._packed is None:
            self._packed = list(self._loader.steps(0, self.num_steps))
        return self._packed

    def start(self, *, prebuilt: bool, loader: PairLoader | None = None) -> None:
        """Go back to the first row; ``loader`` takes the place of the arm's own."""
        steps = (loader or self._loader).steps(0, self.num_steps)
        self.steps: Iterator[Step] = iter(self.prebuild()) if prebuilt else steps

    def __call__(self) -> None:
        step = next(self.steps)
        taken = train_step(self.policy, self.engine, self.reference, step, self.config.loss)
        self.engine.step()
        self.losses.append(taken.read()[0]["loss"])

    def first_step(self) -> tuple[float, dict[str, Tensor]]:
        """Loss of the first step, and the gradients that its update would use; makes no update."""
        return first_step(self)


def vapr_config(subject: Subject, share: str, pairs_per_step: int, workers: int | None = 0) -> Config:
    """The run config of a vapr arm."""
    return Config(
        run_dir=str(subject.folder / "run"),
        policy=subject.policy_config(),
        data=DataConfig(train="unused", shuffle=False, workers=workers),
        packing=PackingConfig(max_tokens=subject.shape.max_tokens, share=share),
        optim=OptimConfig(lr=LR, schedule="constant", warmup_ratio=0.0, pairs_per_step=pairs_per_step),
    )


def new_policy(subject: Subject, config: Config, kernels: Literal["auto", "off"] = "auto") -> tuple[Policy, Engine]:
    """A policy before its first update, and its optimizer."""
    policy = subject.policy(kernels=kernels)
    return policy, Engine(policy, config.optim, num_steps=10**6)


class TrlArm:
    """TRL's DPOTrainer on the same weights and rows, through its own data loader, collator and training step.

    The trainer's outer loop (callbacks, logging, schedule) is left out, which is in TRL's favour.

    Args:
        subject, pairs, pairs_per_step: as for vapr.
        policy: vapr's, before its first update: TRL gets the same adapters, or the same trained parameters.
        compact: score completion tokens only, which TRL does on Triton devices alone.
        cached: reference log-probs are handed over by the collator.
        trained: an arm whose trainer to go on with, so that several arms need one model on a GPU.
    """

    def __init__(
        self, subject: Subject, pairs: list[PreferencePair], pairs_per_step: int, policy: Policy, *,
        compact: bool, cached: bool, trained: "TrlArm | None" = None,
    ) -> None:  # fmt: skip
        self._compact, self._cached = compact, cached
        # Unpacked, unshared pairs of a 7B model without checkpointing: more than four do not fit beside each other.
        micro_pairs = min(pairs_per_step, TRL_MICRO_PAIRS) if subject.device.type == "cuda" else pairs_per_step
        assert pairs_per_step % micro_pairs == 0
        self._micro_batches = pairs_per_step // micro_pairs
        if trained is None:
            self.trainer = _dpo_trainer(subject, pairs, micro_pairs, policy)
            self.trainer.create_optimizer()
            accelerator = self.trainer.accelerator
            self._model, self._optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
            self._model.train()
            self.trainer.current_gradient_accumulation_steps = self._micro_batches
        else:
            self.trainer, self._model, self._optimizer = trained.trainer, trained._model, trained._optimizer
        self._collator = _Collator(self.trainer.data_collator.collator)
        if cached:
            self._collator.reference = self._reference_of_all_rows()
        self.losses: list[float] = []

    def _reference_of_all_rows(self) -> dict[str, tuple[float, float]]:
        """What the collator adds to each batch: the reference's log-probs of every row, computed now."""
        known: dict[str, tuple[float, float]] = {}
        for batch in self.trainer.get_train_dataloader():
            ids = batch.pop("ids")
            chosen, rejected = self.trainer.compute_ref_log_probs(self._model, self.trainer._prepare_inputs(batch))
            known.update(zip(ids, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        return known

    def start(self, *, prebuilt: bool) -> None:
        """Go back to the first row."""
        self.trainer.data_collator = self._collator
        loader = self.trainer.get_train_dataloader()
        self.steps = iter(list(loader)) if prebuilt else iter(loader)

    def __call__(self) -> None:
        loss = self._backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss))

    def first_step(self) -> tuple[float, dict[str, Tensor]]:
        """Loss of the first step, and the gradients that its update would use, named as vapr's; makes no update."""
        self.start(prebuilt=False)
        loss = float(self._backward())
        gradients = {
            name.removeprefix("base_model.model."): parameter.grad.detach().float().cpu().clone()
            for name, parameter in self.trainer.accelerator.unwrap_model(self._model).named_parameters()
            if parameter.grad is not None
        }
        self._optimizer.zero_grad(set_to_none=True)
        return loss, gradients

    def _backward(self) -> Tensor:
        """Forward and backward of the next step, clipping included; returns its loss, a scalar on the device."""
        loss = torch.zeros((), device=self.trainer.accelerator.device)
        self.trainer.precompute_ref_logps = self._cached  # another arm may have the same trainer
        for _ in range(self._micro_batches):
            batch = dict(next(self.steps))
            batch.pop("ids")
            with self._compact_head():
                loss = loss + self.trainer.training_step(self._model, batch)  # already divided by their number
        self.trainer.accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
        return loss

    def _compact_head(self) -> contextlib.AbstractContextManager[Any]:
        if not self._compact:
            return contextlib.nullcontext()
        return mock.patch("trl.trainer.utils._use_triton", return_value=True)


class _Collator:
    """TRL's vision collator; keeps the rows' ids and adds their reference log-probs, if known."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.reference: dict[str, tuple[float, float]] = {}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [example.pop("id") for example in examples]
        batch = dict(self.collator(examples))
        batch["ids"] = ids
        if self.reference:
            values = torch.tensor([self.reference[name] for name in ids])
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = values.unbind(1)
        return batch


def _dpo_trainer(subject: Subject, pairs: list[PreferencePair], pairs_per_step: int, policy: Policy) -> Any:
    import peft
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    on_gpu = subject.device.type == "cuda"
    args = trl.DPOConfig(
        output_dir=str(subject.folder / "trl"), per_device_train_batch_size=pairs_per_step, use_cpu=not on_gpu,
        bf16=on_gpu, gradient_checkpointing=False, max_length=None, remove_unused_columns=False, report_to=[],
        save_strategy="no", logging_steps=10**6, disable_dropout=True, learning_rate=LR, max_grad_norm=1.0,
        lr_scheduler_type="constant", optim="adamw_torch_fused", train_sampling_strategy="sequential",
        dataloader_num_workers=8 if on_gpu else 0, dataloader_pin_memory=on_gpu, disable_tqdm=True,
    )  # fmt: skip
    model = subject.model()
    if on_gpu and hasattr(model.model, "visual"):
        # What flash-attn would give it: transformers' SDPA path calls the tower's attention window by window.
        model.model.visual.config._attn_implementation = VISION_TOWER
    lora = _trl_freeze(model, policy)
    processor = trl_processor(subject.new_processor(), subject.folder)
    out = trl.DPOTrainer(
        model=model,
        ref_model=None if lora else subject.model(),
        args=args,
        train_dataset=_trl_rows(pairs),
        processing_class=processor,
        data_collator=_Collator(DataCollatorForVisionPreference(processor=processor)),
        peft_config=peft.LoraConfig(**lora) if lora else None,
    )
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            out.model.get_parameter(f"base_model.model.{name}" if lora else name).copy_(parameter)
    return out


def _trl_freeze(model: torch.nn.Module, policy: Policy) -> dict[str, Any] | None:
    """Train what vapr trains: returns the arguments of the same adapters, or freezes the rest for full fine-tuning."""
    trained = policy.trained_parameters()
    if policy.adapters is not None:
        config = policy.adapters.peft_config["default"]
        ending = ".lora_A.default.weight"
        targets = [name.removesuffix(ending) for name in trained if name.endswith(ending)]
        return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": targets, "lora_dropout": 0.0}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return None


def _trl_rows(pairs: list[PreferencePair]) -> Any:
    import datasets

    def message(messages: tuple[dict[str, Any], ...]) -> list[dict[str, str]]:
        text = "".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")
        return [{"role": messages[0]["role"], "content": text}]  # TRL puts the image in front

    rows = [
        {
            "id": pair.id,
            "images": [str(image) for image in pair.images if isinstance(image, Path)],
            **{part: message(getattr(pair, part)) for part in ("prompt", "chosen", "rejected")},
        }
        for pair in pairs
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def trl_processor(parts: Processor, folder: Path) -> Any:
    """The family's processor class around vapr's tokenizer and image processor, without a video processor.

    Many of them insist on one, which needs torchvision, which cannot be had beside a CPU build of torch.

    Raises:
        ImportError: for a class that needs torchvision for more (Pixtral's), or another package (SmolVLM's).
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.processing_utils import ProcessorMixin

    named = parts.files.settings.get("processor_class") or PROCESSOR_MAPPING[type(parts.files.config)].__name__
    processor_class: Any = getattr(transformers, named)
    known = inspect.signature(processor_class.__init__).parameters
    settings = {name: value for name, value in parts.files.settings.items() if name in known}
    settings |= {"video_processor": None} if "video_processor" in known else {}

    class ImagesOnly(processor_class):  # type: ignore[misc]
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            own = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": chat_template}
            with mock.patch.object(ProcessorMixin, "__init__", lambda *arguments, **options: None):
                super().__init__(**{**settings, **own})
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImagesOnly(parts.image_processor, parts.tokenizer, chat_template=parts.chat_template)
