"""The recipes in scripts/recipes: a file for each model, way of tuning and card, all written from the table in here.

    python scripts/write_recipes.py            # write them, and the tables of docs/recipes.md and README
    python scripts/write_recipes.py --check    # exit 1 if one of them is out of date

A recipe is a whole run config that stands alone. tests/test_recipes.py holds each against vapr plan.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "scripts" / "recipes"
TABLES = (ROOT / "README.md", ROOT / "docs" / "recipes.md")
BEGIN, END = "<!-- recipes:begin -->", "<!-- recipes:end -->"

CARDS = (24, 80, 141)
ROOM = 0.93
"""Share of what a card leaves to a program that a recipe's predicted peak may reach. Of 24 GB it is what is left of an
L4 or A10G, too, whose check bits take a sixteenth."""


@dataclass(frozen=True)
class Model:
    """A model of the paper; ``trained`` is the number of its language model's parameters, in billions."""

    title: str
    hub: str
    trained: float
    lora_lr: str
    full_lr: str

    @property
    def llava(self) -> bool:
        return self.hub.startswith("llava-hf")


MODELS = {
    "llava_1_5_7b": Model("LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", 6.74, "2e-6", "5e-7"),
    "llava_1_5_13b": Model("LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf", 13.02, "2e-6", "5e-7"),
    "qwen2_vl_2b": Model("Qwen2-VL-2B", "Qwen/Qwen2-VL-2B-Instruct", 1.54, "5e-6", "1e-6"),
    "qwen2_vl_7b": Model("Qwen2-VL-7B", "Qwen/Qwen2-VL-7B-Instruct", 7.62, "5e-6", "1e-6"),
    "qwen2_5_vl_3b": Model("Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct", 3.09, "5e-6", "1e-6"),
    "qwen2_5_vl_7b": Model("Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", 7.62, "5e-6", "1e-6"),
}


@dataclass(frozen=True)
class Recipe:
    """The settings with which a model fits a card, and the peak in GiB that vapr plan then predicts."""

    model: str
    tuning: Literal["lora", "full"]
    card: int
    max_tokens: int
    peak: float
    checkpointing: str = "none"
    base_weights: str = "bfloat16"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        return f"{self.model}_{self.tuning}_{self.card}gb"


RECIPES = (
    Recipe("llava_1_5_7b", "lora", 24, 6144, 20.7, checkpointing="full"),
    Recipe("llava_1_5_7b", "lora", 80, 16384, 52.9),
    Recipe("llava_1_5_7b", "lora", 141, 16384, 52.9),
    Recipe("llava_1_5_7b", "full", 80, 4096, 72.0, optimizer="paged-adamw-8bit"),
    Recipe("llava_1_5_7b", "full", 141, 6144, 126.4),
    Recipe("llava_1_5_13b", "lora", 24, 8192, 19.9, checkpointing="full", base_weights="nf4"),
    Recipe("llava_1_5_13b", "lora", 80, 8192, 60.1),
    Recipe("llava_1_5_13b", "lora", 141, 16384, 86.9),
    Recipe("llava_1_5_13b", "full", 141, 4096, 127.2, checkpointing="mlp", optimizer="paged-adamw-8bit"),
    Recipe("qwen2_vl_2b", "lora", 24, 10240, 18.8),
    Recipe("qwen2_vl_2b", "lora", 80, 16384, 26.1),
    Recipe("qwen2_vl_2b", "lora", 141, 16384, 26.1),
    Recipe("qwen2_vl_2b", "full", 24, 4096, 20.3, checkpointing="mlp", optimizer="adamw-8bit"),
    Recipe("qwen2_vl_2b", "full", 80, 16384, 47.5),
    Recipe("qwen2_vl_2b", "full", 141, 16384, 47.5),
    Recipe("qwen2_vl_7b", "lora", 24, 6144, 20.7, checkpointing="full", optimizer="adamw-8bit"),
    Recipe("qwen2_vl_7b", "lora", 80, 10240, 46.8),
    Recipe("qwen2_vl_7b", "lora", 141, 16384, 62.4),
    Recipe("qwen2_vl_7b", "full", 141, 8192, 108.6, optimizer="adamw-8bit"),
    Recipe("qwen2_5_vl_3b", "lora", 24, 4096, 18.9),
    Recipe("qwen2_5_vl_3b", "lora", 80, 16384, 42.2),
    Recipe("qwen2_5_vl_3b", "lora", 141, 16384, 42.2),
    Recipe("qwen2_5_vl_3b", "full", 80, 4096, 61.5),
    Recipe("qwen2_5_vl_3b", "full", 141, 16384, 85.1),
    Recipe("qwen2_5_vl_7b", "lora", 24, 6144, 20.7, checkpointing="full", optimizer="adamw-8bit"),
    Recipe("qwen2_5_vl_7b", "lora", 80, 10240, 46.8),
    Recipe("qwen2_5_vl_7b", "lora", 141, 16384, 62.4),
    Recipe("qwen2_5_vl_7b", "full", 141, 8192, 108.6, optimizer="adamw-8bit"),
)

WHY_LORA = "LLaVA-1.5's own LoRA script; so HA-DPO, POVID, CSR"
WHY_LR = {
    ("lora", True): "HA-DPO and SeVa on LLaVA-1.5-7B",
    ("lora", False): "LLaMA-Factory's DPO example of a Qwen VL model",
    ("full", True): "RLAIF-V and CHiP",
    ("full", False): "MM-RLHF and MPO",
}
WHY_BASE = {
    "nf4": "4 bits: the base does not fit otherwise; needs vapr[quant]",
    "int8": "8 bits: the base does not fit otherwise",
    "fp8": "8 bits: the base does not fit otherwise",
}


def render(recipe: Recipe) -> str:
    """Return the text of a recipe's file."""
    model = MODELS[recipe.model]
    how = "LoRA" if recipe.tuning == "lora" else "full fine-tuning of the language model"
    lines = [
        f"# {model.title} on one card of {recipe.card} GB: {how}.",
        "#",
        f"#   vapr train scripts/recipes/{recipe.name}.yaml      (on what vapr edit ... --out pairs made)",
        f"#   bash scripts/reproduce.sh {recipe.model} ...      (edit, audit, train, eval, one page)",
        "#",
        "# [paper] is said by VaPR (arXiv 2510.01700), of which only the abstract was at hand. All else is vapr's own",
        "# choice, with the work it is taken from; [card] is what makes it fit. --set KEY=VALUE changes any of it.",
        *(f"# {line}" for line in _notes(recipe, model)),
        f"run_dir: runs/{recipe.name}",
        "policy:",
        _line(f"  model: {model.hub}", "[paper] this family, 2B to 13B"),
    ]
    if recipe.tuning == "lora":
        lines.append(_line("  lora: {rank: 128, alpha: 256}", WHY_LORA))
    if recipe.base_weights != "bfloat16":
        lines.append(_line(f"  base_weights: {recipe.base_weights}", f"[card] {WHY_BASE[recipe.base_weights]}"))
    if recipe.checkpointing != "none":
        lines.append(_line(f"  checkpointing: {recipe.checkpointing}", "[card] less memory, more time"))
    lr = model.lora_lr if recipe.tuning == "lora" else model.full_lr
    lines += [
        _line("  train: {language_model: true, projector: false, vision_tower: false}", "LLaMA-Factory's default"),
        "data:",
        _line("  train: pairs", "[paper] 30K edited pairs: vapr edit ... --target 30000"),
        _line("loss: {kind: sigmoid, beta: 0.1}", "[paper] DPO; 0.1 is what all who state it took"),
        _line(f"packing: {{max_tokens: {recipe.max_tokens}}}", f"[card] peak {recipe.peak:.1f} GiB by vapr plan"),
        "optim:",
        _line(f"  lr: {lr}", f"{WHY_LR[recipe.tuning, model.llava]}; sweep it"),
        _line("  schedule: cosine", "LLaVA's scripts"),
        _line("  warmup_ratio: 0.03", "LLaVA's scripts"),
        _line("  pairs_per_step: 64", "IC-VCO, UE-DPO, ChartCF"),
        _line("  epochs: 1", "most who train on 8K pairs or more"),
    ]  # fmt: skip
    if recipe.optimizer != "adamw":
        paged = " or in host memory" if recipe.optimizer.startswith("paged") else ""
        lines.append(_line(f"  kind: {recipe.optimizer}", f"[card] moments in 8 bits{paged}; needs vapr[quant]"))
    return "\n".join(lines) + "\n"


def _line(setting: str, comment: str) -> str:
    return f"{setting:<44} # {comment}"


def _notes(recipe: Recipe, model: Model) -> Iterator[str]:
    """Yield what else a reader of this recipe would ask: of the other way of tuning, and of more cards."""
    if recipe.tuning == "full":
        yield "On N cards: torchrun --nproc_per_node N $(command -v vapr) train THIS --set parallel.engine=deepspeed"
        yield "--set parallel.zero=2 (or 3) spreads what is trained, so that larger packs or AdamW in fp32 fit."
    elif not any(r.model == recipe.model and r.card == recipe.card and r.tuning == "full" for r in RECIPES):
        most, least = (f"{_full_gib(model, size):.0f}" for size in (18, 10))
        yield f"No full fine-tuning on this card: {model.trained:g} billion parameters take {most} GiB and activations,"
        yield f"{least} with AdamW's moments in 8 bits and in host memory. Several cards share them: docs/recipes.md."


def _full_gib(model: Model, bytes_a_parameter: int) -> float:
    """Memory of full fine-tuning without tower and activations: bf16 weights 2, fp32 copy 4, gradient 4, moments 8."""
    return model.trained * 1e9 * bytes_a_parameter / 2**30


def table(links_from: Path) -> str:
    """Return a table of models and cards, whose cells link to the recipes."""
    to = "scripts/recipes" if links_from == ROOT else "../scripts/recipes"
    rows = ["| | 24 GB | 80 GB | 141 GB |", "| --- | --- | --- | --- |"]
    for key, model in MODELS.items():
        cells = []
        for card in CARDS:
            found = [r for r in RECIPES if (r.model, r.card) == (key, card)]
            cells.append(", ".join(f"[{_words(r)}]({to}/{r.name}.yaml)" for r in found) or "does not fit")
        rows.append(f"| {model.title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _words(recipe: Recipe) -> str:
    if recipe.tuning == "full":
        return "full"
    return "LoRA" if recipe.base_weights == "bfloat16" else f"LoRA ({recipe.base_weights})"


def files() -> dict[Path, str]:
    """Return every file that this script writes, with its text."""
    written = {FOLDER / f"{recipe.name}.yaml": render(recipe) for recipe in RECIPES}
    for page in TABLES:
        text = page.read_text(encoding="utf-8")
        if BEGIN in text:
            before, rest = text.split(BEGIN, 1)
            written[page] = f"{before}{BEGIN}\n{table(page.parent)}\n{END}{rest.split(END, 1)[1]}"
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    texts = files()
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in FOLDER.glob("*.yaml") if path not in texts]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date; run python scripts/write_recipes.py")
        elif path in texts:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
        else:
            path.unlink()
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
