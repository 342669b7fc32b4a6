"""Finds the files behind ``policy.model``: a model, or a PEFT adapter together with its base."""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.utils import find_adapter_config_file

from vapr.cache import user_cache
from vapr.errors import UserError, one_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    *TEMPLATE_FILES, *TOKENIZER_FILES,
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The places that a policy is read from."""

    model: str  # hub id, or folder of config, weights and processor files that holds no adapter
    adapter: Path | None = None  # folder of the adapter to be merged into it
    base: str = ""  # what the adapter is merged into, as it was named


def find_model(model: str, base: str | None = None) -> ModelSource:
    """Find the weights and the adapter that ``policy.model`` and ``policy.base`` name.

    transformers applies an adapter that lies beside weights without being asked, and then saves nothing else. So the
    base is read through a folder of links that leaves the adapter out, and the adapter is merged on purpose.

    Args:
        model: folder or hub id of a model, of a PEFT adapter, or of both in one.
        base: folder or hub id of the adapter's base; None: the weights beside it, or what its config names.

    Raises:
        UserError: if the adapter is not whole or its base cannot be found.
    """
    adapter = _adapter_folder(model)
    if adapter is None:
        if base is not None:
            raise UserError(f"policy.base: {model} is no adapter (no adapter_config.json in it); leave policy.base out")
        return ModelSource(model)
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(
            f"policy.model: {model} has adapter_config.json but no adapter_model.safetensors; save the adapter as "
            "safetensors (a pickle such as adapter_model.bin is not read)"
        )
    if (adapter / "non_lora_trainables.bin").is_file():
        raise UserError(
            f"policy.model: {model} holds trained weights as a pickle (non_lora_trainables.bin), which is not read; "
            "merge the adapter with the code that wrote it"
        )
    if base is None:
        base = str(adapter) if _holds_weights(adapter) else read_adapter_config(adapter)["base_model_name_or_path"]
    folder = _base_folder(model, base)
    if folder != adapter and (folder / "adapter_config.json").is_file():
        raise UserError(f"policy.model: {base}, the base of {model}, holds an adapter itself; merge that one first")
    return ModelSource(str(_linked(folder, adapter)), adapter, base)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``. Raises UserError if it is no JSON object."""
    return {"base_model_name_or_path": None, "peft_type": None, **_read_json(folder / "adapter_config.json")}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None


def copy_processor_files(source: Path, target: Path) -> None:
    """Copy tokenizer, image processor and chat template as they are."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def is_path(name: str) -> bool:
    """Tell whether a name can only be a folder, never a hub id."""
    return name.startswith(("/", "./", "../", "~"))


def _adapter_folder(model: str) -> Path | None:
    """The folder of ``adapter_config.json``, fetched from the hub if need be; None: there is no adapter."""
    try:
        found = None if is_path(model) and not Path(model).is_dir() else find_adapter_config_file(model)
    except (OSError, ValueError):  # no such hub id, or no network: reading the config says so
        return None
    if found is None:
        return None
    return Path(model).resolve() if Path(model).is_dir() else _download(model, "policy.model")


def _holds_weights(folder: Path) -> bool:
    """Tell whether there is a model beside the adapter: some trainers leave its config alone."""
    files = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return (folder / "config.json").is_file() and any(not file.name.startswith("adapter_") for file in files)


def _base_folder(model: str, base: str | None) -> Path:
    if not base:
        raise UserError(f"policy.model: {model} is an adapter that names no base; give it as policy.base")
    if Path(base).is_dir():
        return Path(base).resolve()
    if is_path(base):
        raise UserError(f"policy.model: the base of the adapter {model}, {base}, is not here; give it as policy.base")
    return _download(base, f"policy.model: {model} is an adapter, and its base (policy.base)")


def _download(name: str, where: str) -> Path:
    kinds = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=kinds))
    except (OSError, ValueError) as error:  # the hub's errors are among these
        raise UserError(
            f"{where}: {name} is no folder here, and the hub does not give it ({one_line(error)})"
        ) from None


def _linked(base: Path, adapter: Path) -> Path:
    """A folder of links to the base's files, with the adapter's tokenizer and processor in place of the base's."""
    files = {f.name: f for f in base.iterdir() if not f.name.startswith("adapter_") and not f.is_dir()}
    own = {name: adapter / name for name in PROCESSOR_FILES if (adapter / name).is_file()}
    replaced: set[str] = set()
    if "tokenizer_config.json" in own:  # files of two tokenizers must not mix
        replaced |= set(TOKENIZER_FILES)
        if "chat_template" in _read_json(adapter / "tokenizer_config.json"):
            replaced |= set(TEMPLATE_FILES)
    if not own.keys().isdisjoint(TEMPLATE_FILES):
        replaced |= set(TEMPLATE_FILES)
    links = {name: file for name, file in files.items() if name not in replaced} | own
    for place in (base, adapter):
        if (place / "additional_chat_templates").is_dir():
            links["additional_chat_templates"] = place / "additional_chat_templates"
    name = hashlib.sha256(f"{base}\n{adapter}".encode()).hexdigest()[:16]
    folder = user_cache() / "policies" / f"{adapter.name}-{name}"
    if _is_linked(folder, links):
        return folder
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for link, file in links.items():
            (temporary / link).symlink_to(file)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_linked(folder, links):  # else another process was faster
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); XDG_CACHE_HOME can name another"
            ) from None
    return folder


def _is_linked(folder: Path, links: dict[str, Path]) -> bool:
    try:
        return {file.name: file.readlink() for file in folder.iterdir()} == links
    except OSError:
        return False
