"""The model card of an exported policy: what it is, how it was trained, and the lines that load it."""

from pathlib import Path
from typing import Any

import yaml

from vapr.batches.model_folder import is_path
from vapr.cache import written_whole
from vapr.config import Config, SourceConfig
from vapr.training import checkpoint

FIGURES = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "rewards/image_margins", "rewards/image_accuracies", "rewards/symmetric_margins",
    "rewards/symmetric_accuracies",
)  # fmt: skip

LOAD_MERGED = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)
```

With vLLM:

```
vllm serve .
```"""

LOAD_ADAPTER = """```python
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the hub
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, folder)
processor = AutoProcessor.from_pretrained(folder)
```

With vLLM, where BASE is what `adapter_config.json` names:

```
vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules aligned=.
```"""


ON_QUANTIZED = {
    "adapter": "The adapter was trained on a base stored as {kind}. It loads on the unquantised base, too, where its "
    "log-probs are not those that it was trained to: every weight of the base differs from the trained one by what "
    "{kind} rounded.",
    "trained": "The adapter was merged into the base as it was trained on: stored as {kind}, and restored. So these "
    "weights carry what {kind} rounded.",
    "original": "The adapter was trained on a base stored as {kind} and merged into the unquantised weights, whose "
    "log-probs are not those that it was trained to.",
}
"""A card's warning about an adapter trained on a quantised base, and about weights that it was merged into."""


def write_model_card(
    folder: Path, config: Config, run_dir: Path, step: int | None, *, adapter: bool, into: str = "trained"
) -> None:
    """Write ``folder/README.md``. Local folders are named without the path to them.

    Args:
        folder: folder of the exported model.
        config: config of the run.
        run_dir: folder of the run, whose held-out figures are shown.
        step: number of optimizer steps of the exported weights; None for the run's end.
        adapter: whether a PEFT adapter was exported.
        into: the base that an adapter was merged into, ``trained`` or ``original``, see :func:`vapr.training.export`.
    """
    evaluations = checkpoint.evaluations(run_dir)
    step = max(evaluations, default=None) if step is None else step
    header = yaml.safe_dump(_header(config, adapter=adapter), sort_keys=False)
    lines = [f"| {name} | {what} |" for name, what in _training(config, step).items()]
    rank = config.policy.lora.rank if config.policy.lora is not None else 0
    kind = config.policy.base_weights
    on_quantized = ON_QUANTIZED["adapter" if adapter else into].format(kind=kind)
    parts = [
        f"# {_name(config.policy.model)}, aligned with preference pairs",
        f"{'A PEFT adapter' if adapter else 'Weights'}, trained with vapr ({_losses(config)}) on pairs of a better "
        "(chosen) and a worse (rejected) answer about images.",
        "\n".join(["| training | |", "| --- | --- |", *lines]),
        *([on_quantized] if kind != "bfloat16" else []),
        *_held_out(evaluations.get(step or 0, {})),
        "## Loading",
        LOAD_ADAPTER.format(rank=rank) if adapter else LOAD_MERGED,
    ]
    text = "\n\n".join(parts)
    with written_whole(folder / "README.md") as file:
        file.write(f"---\n{header}---\n\n{text}\n".encode())


def _header(config: Config, *, adapter: bool) -> dict[str, Any]:
    model = config.policy.model
    on_hub = not is_path(model) and not Path(model).exists()
    return {
        **({"base_model": model} if on_hub else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["dpo", "preference", "vapr"],
    }


def _training(config: Config, step: int | None) -> dict[str, str]:
    policy, optim = config.policy, config.optim
    parts = [part for part in ("language_model", "projector", "vision_tower") if getattr(policy.train, part)]
    how = "full fine-tuning" if policy.lora is None else f"LoRA, rank {policy.lora.rank}, alpha {policy.lora.alpha}"
    return {
        "began with": _name(policy.model) + (f" on {_name(policy.base)}" if policy.base is not None else ""),
        "trained": f"{', '.join(parts).replace('_', ' ')} ({how})",
        "data": ", ".join(_source(source) for source in config.data.sources("train")),
        "loss": _losses(config),
        **({"steps": f"{step:,} of {optim.pairs_per_step:,} pairs each"} if step is not None else {}),
        "learning rate": f"{optim.lr:g}, {optim.schedule}",
        "computed in": policy.dtype,
        **({"base stored as": policy.base_weights} if policy.base_weights != "bfloat16" else {}),
    }  # fmt: skip


def _held_out(figures: dict[str, Any]) -> list[str]:
    if not figures:
        return []
    rows = [
        f"| {name} | {figures[f'eval/{name}']:.4g} |" for name in FIGURES if figures.get(f"eval/{name}") is not None
    ]
    return ["## Held-out pairs", "\n".join(["| figure | value |", "| --- | --- |", *rows])]


def _losses(config: Config) -> str:
    terms = []
    for term in config.loss:
        kind = "DPO" if term.kind == "sigmoid" else term.kind
        terms.append(f"{'' if term.weight == 1 else f'{term.weight:g} x '}{kind} loss, beta {term.beta:g}")
    return " + ".join(terms)


def _source(source: SourceConfig) -> str:
    return _name(source.path) + (f" (weight {source.weight:g})" if source.weight != 1 else "")


def _name(place: str) -> str:
    """Return a hub id as it is, and only the last part of a path, which says nothing of the machine."""
    return Path(place).name if is_path(place) or Path(place).exists() else place
