"""A tokenizer of Llama's kind with 32,000 real pieces, out of the PyPI package mistral_common (Apache-2.0)."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from vapr.demo.tiny_policy import llama_tokenizer

FILE = "tokenizer.model.v1"
CACHE = Path.home() / ".cache" / "vapr-tests"


def sentencepiece_file() -> Path:
    """Where scripts/setup.sh or the package itself put the model; the test is skipped if neither did."""
    package = importlib.util.find_spec("mistral_common")
    folders = [CACHE, *(Path(place) / "data" for place in (package and package.submodule_search_locations) or ())]
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    pytest.skip(f"no {FILE} in {CACHE}; scripts/setup.sh puts it there where PyPI can be reached")


def real_llama() -> transformers.PreTrainedTokenizerFast:
    """The pieces and merges of the file, under the normaliser, decoder and special tokens of llava-hf."""
    pytest.importorskip("sentencepiece")
    parts = SentencePieceExtractor(str(sentencepiece_file())).extract(BPE)
    return llama_tokenizer(parts["vocab"], parts["merges"])


def llava_folder(tiny: Path, folder: Path) -> Path:
    """A copy of a tiny LLaVA, without weights and with the real tokenizer, named as llava-hf names it."""
    tokenizer = real_llama()
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    config.save_pretrained(folder)
    return folder
