"""scripts/recipes: current, readable, and of the models they name, which are here as they are published."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from bench.workloads import SHAPES
from tests.published_models import MODELS, VOCABULARY, write_model
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.plan import plan as plan_module

ROOT = Path(__file__).parents[1]


def _write_recipes():
    """scripts/write_recipes.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("write_recipes", ROOT / "scripts" / "write_recipes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


write_recipes = _write_recipes()
RECIPES = write_recipes.RECIPES


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """``published(name)`` -> folder of a model as it is published, without weights."""
    folders: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in folders:
            folders[name] = write_model(name, tmp_path_factory.mktemp("published") / name.split("/")[1])
        return folders[name]

    return write


def file_of(recipe) -> Path:
    return ROOT / "scripts" / "recipes" / f"{recipe.name}.yaml"


def test_the_files_are_those_of_the_table():
    texts = write_recipes.files()
    assert {path: path.read_text() for path in texts} == texts, "run python scripts/write_recipes.py"
    assert {path for path in texts if path.suffix == ".yaml"} == set((ROOT / "scripts" / "recipes").iterdir())
    assert {page.name for page in write_recipes.TABLES} <= {path.name for path in texts}, "a page lost its table"


def test_every_model_has_a_recipe_for_every_card():
    assert {(r.model, r.card) for r in RECIPES if r.tuning == "lora"} == {
        (model, card) for model in write_recipes.MODELS for card in (24, 80, 141)
    }
    assert {write_recipes.MODELS[r.model].hub for r in RECIPES} == set(MODELS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_a_run_config_that_says_what_its_name_says(recipe):
    config = Config.load(file_of(recipe))
    assert config.policy.model == write_recipes.MODELS[recipe.model].hub
    assert (config.policy.lora is None) == (recipe.tuning == "full")
    assert config.run_dir == f"runs/{recipe.name}"
    assert [(term.kind, term.beta) for term in config.loss] == [("sigmoid", 0.1)]
    assert max(len(line) for line in file_of(recipe).read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_as_many_parameters_as_the_hub_counts(name, published):
    config = AutoConfig.from_pretrained(published(name))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name][-1]
    [key] = [key for key, known in write_recipes.MODELS.items() if known.hub == name]
    trained = {*model.model.language_model.parameters(), *model.lm_head.parameters()}  # tied: the same
    billions = sum(parameter.numel() for parameter in trained) / 1e9
    assert round(billions, 2) == write_recipes.MODELS[key].trained


@pytest.mark.parametrize(("shape", "name"), [("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct"), ("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct"), ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf")])  # fmt: skip
def test_benchmarks_measure_the_same_shapes(shape, name):
    _, text, vision, tied, _ = MODELS[name]
    assert SHAPES[shape].tie_word_embeddings == tied
    assert {key: text[key] for key in SHAPES[shape].text if key != "max_position_embeddings"} == {
        key: value for key, value in SHAPES[shape].text.items() if key != "max_position_embeddings"
    }
    assert {key: vision[key] for key in SHAPES[shape].vision} == SHAPES[shape].vision


@pytest.fixture(scope="module")
def photo_rows_of_640(tmp_path_factory) -> Path:
    """36 pairs about nine photographs of 640 x 480 pixels, as in COCO: more than one pack of every recipe."""
    folder = tmp_path_factory.mktemp("planned")
    words = VOCABULARY
    for n in range(9):
        Image.new("RGB", (640, 480), (25 * n, 90, 40)).save(folder / f"{n}.jpg")
    rows = [
        {
            "id": str(n), "images": [str(folder / f"{n // 4}.jpg")],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " ".join(words[:15])}]}],
            "chosen": " ".join([*words, "red", *words]), "rejected": " ".join([*words, "blue", *words]),
        }
        for n in range(36)
    ]  # fmt: skip
    write_pairs(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


MOST_TOKENS = max(recipe.max_tokens for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_fits_its_card_and_does_not_waste_it(recipe, published, photo_rows_of_640, monkeypatch):
    monkeypatch.setattr(plan_module, "WORLD_SIZES", ())  # the table of several GPUs is not looked at here
    model = published(write_recipes.MODELS[recipe.model].hub)
    config = Config.load(
        file_of(recipe), (f"policy.model={model}", f"data.train={photo_rows_of_640}", "data.workers=0")
    )
    [gpu] = plan_module.plan(config, gpu_memory=recipe.card)["gpus"]
    peak, usable = gpu["peak_of_full_pack_gib"], gpu["usable_gib"]
    assert gpu["fits"] and peak <= write_recipes.ROOM * usable, (peak, usable)
    assert peak == pytest.approx(recipe.peak, rel=0.03), "write this peak into scripts/write_recipes.py"
    nothing_saved = (recipe.checkpointing, recipe.base_weights, recipe.optimizer) == ("none", "bfloat16", "adamw")
    assert peak >= 0.6 * usable or (nothing_saved and recipe.max_tokens == MOST_TOKENS), "the card is wasted"
