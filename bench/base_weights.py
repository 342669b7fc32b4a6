"""What storing a frozen base in fewer bits changes: the weights' error, and log-probs beside those in float32.

    python -m bench.base_weights

Random normal weights (3584, 3584), and a tiny random policy of each family on photographs of scikit-image. Nothing is
timed; the figures follow from seeds and rounding.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import skimage
import torch
from torch import nn

from bench.record import record
from vapr.batches.loader import open_loaders
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.model.logps import token_logps
from vapr.model.policy import frozen, load_policy
from vapr.model.quantized import QuantizedLinear

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
PAIRS = Path(__file__).parent.parent / "tests" / "data" / "photos.jsonl"
NUM_PAIRS = 12
STORED = {"bfloat16": {"dtype": "bfloat16"}, **{kind: {"base_weights": kind} for kind in ("nf4", "fp8", "int8")}}


def weight_error(kind: str) -> float:
    """Return the error of restored weights, relative to their norm."""
    torch.manual_seed(0)
    layer = nn.Linear(3584, 3584, bias=False)
    nn.init.normal_(layer.weight)
    restored = QuantizedLinear(layer, kind, torch.device("cpu")).weight
    weight = layer.weight.detach()
    return float((restored - weight).norm() / weight.norm())


def config_of(folder: Path, family: str) -> Config:
    rows = [row for row in map(json.loads, PAIRS.read_text().splitlines()) if row.get("images")][:NUM_PAIRS]
    write_pairs(folder / "pairs.jsonl", rows)
    texts = [part["text"] for row in rows for part in row["prompt"][0]["content"] if part["type"] == "text"]
    model = build_tiny_policy(family, folder / family, texts, initializer_range=0.15)
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "policy": {"model": str(model), "dtype": "float32", "lora": {"rank": 4, "alpha": 8}},
        "data": {"train": str(folder / "pairs.jsonl"), "image_root": str(Path(skimage.__file__).parent / "data")},
        "optim": {"pairs_per_step": NUM_PAIRS},
    }
    return Config.parse(raw)


def logps_of(config: Config) -> torch.Tensor:
    """Return the log-probs of every predicted token, (L,)."""
    torch.manual_seed(0)
    with open_loaders(config, say=lambda line: None) as loaders:
        (step,) = loaders["train"].steps(0, 1)
        policy = load_policy(config.policy, torch.device("cpu"))
        with frozen(policy):
            return torch.cat([token_logps(policy, batch) for batch in step.batches])


def main() -> None:
    for kind in ("nf4", "fp8", "int8"):
        record("base_weights", shape="normal (3584, 3584)", stored=kind, relative_error=weight_error(kind))
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            config = config_of(Path(name), family)
            plain = logps_of(config)
            for stored, changes in STORED.items():
                policy = dataclasses.replace(config.policy, **changes)
                moved = (logps_of(dataclasses.replace(config, policy=policy)) - plain).abs()
                record(
                    "base_weights", shape=f"tiny {family}", stored=stored, pairs=NUM_PAIRS,
                    mean_logp=float(plain.mean()), mean_logp_change=float(moved.mean()),
                    largest_logp_change=float(moved.max()),
                )  # fmt: skip


if __name__ == "__main__":
    main()
