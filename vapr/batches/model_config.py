"""Read a model's config, and refuse what cannot be packed exactly."""

from pathlib import Path

import transformers
from packaging.specifiers import SpecifierSet
from transformers import AutoConfig

from vapr.batches.model_folder import is_path
from vapr.errors import UserError
from vapr.families import FAMILIES, family_name

TRANSFORMERS = ">=5.17,<5.25"
"""Versions whose modules and pixels were tested, as in pyproject.toml."""

BIDIRECTIONAL = ("paligemma",)
SHARED_LAYERS = ("gemma3n", "gemma4")
RECURRENT = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "rwkv")


def load_model_config(model: str) -> transformers.PreTrainedConfig:
    """The model's transformers config, refused if its architecture cannot be packed exactly.

    Raises:
        UserError: for that, for a folder that is no model, and for a version of transformers that was never tested.
    """
    if not SpecifierSet(TRANSFORMERS).contains(transformers.__version__):
        raise UserError(
            f"transformers {transformers.__version__} is installed, but vapr is tested with {TRANSFORMERS}; "
            f"install one of those: pip install 'transformers{TRANSFORMERS}'"
        )
    if is_path(model) and not Path(model).exists():
        raise UserError(f"policy.model: {model}: no such folder")
    if Path(model).is_file():
        raise UserError(
            f"policy.model: {model} is a file; give the folder it lies in, which holds config.json, tokenizer and "
            "image processor as well"
        )
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"policy.model: {model} is a folder without config.json; give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"policy.model: {model} is no readable model ({' '.join(str(error).split())})") from None
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    where = f"policy.model: {model} ({config.model_type})"
    if recurrent := kinds.intersection(RECURRENT) or {text.model_type}.intersection(RECURRENT):
        raise UserError(
            f"{where} has recurrent layers ({', '.join(sorted(recurrent))}); packing cannot fork their state"
        )
    if config.model_type in BIDIRECTIONAL:
        raise UserError(f"{where} lets a prompt's text see later text (prefix-LM), where completions cannot share it")
    if config.model_type in SHARED_LAYERS:
        raise UserError(
            f"{where} has layers that take keys and values from others, and embeddings for each layer; vapr's loop "
            "over layers knows neither"
        )
    if (family := family_name(config)) not in FAMILIES:
        raise UserError(f"{where} is not supported; vapr trains {', '.join(FAMILIES)}")
    if reason := FAMILIES[family].refusal(config):
        raise UserError(f"{where} {reason}")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{where} is quantized, which is not supported yet; use the unquantized model")
    return config
