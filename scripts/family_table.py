"""README's table of model families: what the code says of each, beside what people use and what is refused.

    python scripts/family_table.py [--write README.md | --check README.md]

What adapters sit on and which kernels run is read off a tiny policy of the family. Speed is that of the last rows in
bench/results that compare tiny policies with TRL: python -m bench.train_step --models tiny-FAMILY ...
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels")]

from vapr.batches.model_config import load_model_config  # noqa: E402
from vapr.config import LoraConfig, PolicyConfig  # noqa: E402
from vapr.demo.tiny_policy import build_tiny_policy  # noqa: E402
from vapr.families import FAMILIES  # noqa: E402
from vapr.plan.block_flops import INTO_MLP  # noqa: E402
from vapr.plan.shapes import decoder_place, read_shapes  # noqa: E402
from vapr.plan.trials import trials_of  # noqa: E402

BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
RESULTS = ROOT / "bench" / "results" / "train_step.jsonl"
ONLINE = "vapr shared online"
"""The arm that does in a step what TRL does in one: the reference is computed there."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the code cannot say of a family."""

    name: str
    sizes: str
    refused: str = ""


ROWS = {
    "llava": Row("LLaVA-1.5", "7B, 13B"),
    "llava_next": Row("LLaVA-NeXT (1.6)", "7B, 8B, 13B, 34B, 72B, 110B", "features that are not one a patch"),
    "llava_onevision": Row("LLaVA-OneVision", "0.5B, 7B, 72B", "features that are not one a patch"),
    "qwen2_vl": Row("Qwen2-VL", "2B, 7B, 72B"),
    "qwen2_5_vl": Row("Qwen2.5-VL", "3B, 7B, 32B, 72B"),
    "qwen3_vl": Row("Qwen3-VL", "2B, 4B, 8B, 32B"),
    "qwen3_vl_moe": Row("Qwen3-VL with experts", "30B-A3B, 235B-A22B"),
    "internvl": Row("InternVL3, 3.5 (`-HF`)", "1B, 2B, 4B, 8B, 14B, 38B, 78B", "features of several layers"),
    "idefics3": Row("Idefics3, SmolVLM", "256M, 500M, 2.2B, 8B"),
    "smolvlm": Row("SmolVLM2", "256M, 500M, 2.2B"),
    "mistral3": Row("Mistral Small 3.1, 3.2; Ministral 3", "3B, 8B, 14B, 24B", "sliding windows"),
    "llava_pixtral": Row("Pixtral, in LLaVA's form", "12B", "sliding windows"),
    "gemma3": Row("Gemma 3", "4B, 12B, 27B", "pan and scan; soft-caps"),
}
"""By the names of ``vapr.families``."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args()
    file = options.write or options.check
    if file is None:
        print(render())
        return 0
    old = file.read_text(encoding="utf-8")
    new = replace_block(old, render())
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{file}: its families are out of date; run scripts/family_table.py --write {file}")
        return 1
    return 0


def replace_block(text: str, block: str) -> str:
    """Return the text with the block between its markers replaced."""
    start, end = text.index(BEGIN), text.index(END)
    return f"{text[:start]}{BEGIN}\n{block}\n{text[end:]}"


def render() -> str:
    """Return the table, a row for each family."""
    assert ROWS.keys() == FAMILIES.keys(), "a family has no row here, or a row no family"
    speeds = {family: _speed(family) for family in FAMILIES}
    heads = ["family", "sizes", "LoRA on linear layers", "fused kernels", "refused"]
    heads += ["pairs/s of a tiny one (times TRL)"] if any(speeds.values()) else []
    lines = [heads, ["---"] * len(heads)]
    for family, row in ROWS.items():
        cells = [f"{row.name} (`{family}`)", row.sizes, *_of_a_tiny_one(family), row.refused, speeds[family]]
        lines.append(cells[: len(heads)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _of_a_tiny_one(family: str) -> tuple[str, str]:
    """Return what adapters sit on by default, and which kernels run in the language model."""
    with tempfile.TemporaryDirectory() as name:
        words = ["It is red. What colour is it?"] * 50
        folder = str(build_tiny_policy(family, Path(name) / "model", words, vocab_size=600))
        shapes = read_shapes(PolicyConfig(model=folder, lora=LoraConfig(rank=4, alpha=8)))
        tried = trials_of(load_model_config(folder))
    outside = [name for name in shapes.linears if decoder_place(name, family) and not shapes.linears[name].rank]
    assert not outside, f"{family}: layers of the decoder without an adapter: {outside}"
    adapters = "all" + (" but experts" if shapes.experts else "")
    if len(tried.written_out) == shapes.num_layers:
        experts = any(INTO_MLP not in joined for joined in tried.joint.values())
        return adapters, "all" + (" but experts" if experts else "")
    named = {"_try_norm": "norms", "_try_mlp": "MLPs"}
    same = {named[trial] for (trial, _), verdicts in tried.verdicts.items() if trial in named and all(verdicts)}
    return adapters, ", ".join(["head", "loss", *sorted(same)])


def _speed(family: str) -> str:
    """Return the newest row's figure of a tiny policy beside TRL's."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for row in reversed(rows):
        if (row.get("model"), row.get("arm")) == (f"tiny-{family}", ONLINE) and row.get("pairs_per_second"):
            times = row.get("speedup_over_trl")
            return f"{row['pairs_per_second']:.1f}" + (f" ({times:.1f})" if times else "")
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
