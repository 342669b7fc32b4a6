"""Find the model that shall answer, and load it: a hub id, a folder, or an adapter on the base that it names."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.utils import cached_file

from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import ADAPTER_FILES, find_model
from vapr.batches.tokenize import Processor
from vapr.cache import files_hash, user_cache
from vapr.errors import UserError, one_line
from vapr.families import family_name
from vapr.model.adapters import attach_adapter
from vapr.model.policy import load_weights

Dtype = Literal["auto", "float32", "bfloat16"]
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Endings of the files that decide a model's answers: config, weights, tokenizer, image processor and chat template."""


@dataclass(frozen=True, slots=True, eq=False)
class Answerer:
    """A model that was found and not loaded yet."""

    given: str  # as the user named it
    name: str  # short, for folders and tables
    folder: str  # folder or hub id of config, tokenizer and image processor, and of the weights below an adapter
    adapter: Path | None
    identity: dict[str, Any]  # of all files that its answers depend on; the same wherever they lie
    own: torch.dtype | None  # of its weights
    load: Callable[[torch.dtype], transformers.PreTrainedModel]
    whole: bool = True  # whether folder and adapter are all of it, so that another engine can load it
    notes: tuple[str, ...] = ()

    def dtype(self, wanted: Dtype) -> torch.dtype:
        """Return the dtype to compute in; ``auto`` is float32 on a CPU, else that of the weights."""
        if wanted != "auto":
            return getattr(torch, wanted)
        return (self.own or torch.bfloat16) if torch.cuda.is_available() else torch.float32

    def processor(self) -> Processor:
        """Open its tokenizer, image processor and chat template."""
        return Processor(self.folder, load_model_config(self.folder))

    def left_out(self) -> list[str]:
        """Return a line on what its generation_config.json asks for and is not done."""
        try:
            asked = transformers.GenerationConfig.from_pretrained(self.folder)
        except OSError:
            return []
        plain = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "do_sample": False}
        ignored = [f"{k} {v}" for k, usual in plain.items() if (v := getattr(asked, k, None)) not in (None, usual)]
        if not ignored:
            return []
        return [f"{self.given}: what generation_config.json asks for is not done: {', '.join(ignored)}"]


def find_answerer(model: str) -> Answerer:
    """Find the files of a hub id, a model's folder or an adapter's folder.

    An adapter stays beside its base's weights, unmerged, as it was trained.

    Raises:
        UserError: if there is no such model, it is of no family that vapr knows, or the adapter's base is not there.
    """
    try:
        source = find_model(model)
        config = load_model_config(source.model)
        identity = files_identity(source.model)
        if source.adapter is not None:
            identity["adapter"] = remembered_hash([source.adapter / name for name in ADAPTER_FILES])
    except UserError as error:
        raise as_model_argument(error) from None

    def load(dtype: torch.dtype) -> transformers.PreTrainedModel:
        try:
            base = load_weights(family_name(config), dataclasses.replace(source, adapter=None), model, dtype)
            if source.adapter is not None:
                attach_adapter(base, source.adapter)
        except UserError as error:
            raise as_model_argument(error) from None
        return base.to(dtype)  # type: ignore[arg-type]

    notes = (f"{model}: an adapter, on {source.base}",) if source.adapter is not None else ()
    return Answerer(
        model, short_name(model), source.model, source.adapter, identity, own_dtype(config), load, notes=notes
    )


def files_identity(model: str) -> dict[str, Any]:
    """Return the hash of a folder's files, or the revision of a hub id."""
    if Path(model).is_dir():
        files = sorted(file for file in Path(model).iterdir() if file.suffix in MODEL_FILES and file.is_file())
        return {"files": remembered_hash(files)}
    try:
        return {"hub": model, "revision": Path(str(cached_file(model, "config.json"))).parent.name}
    except OSError as error:
        raise UserError(f"{model}: not a folder here, and the hub does not give it ({one_line(error)})") from None


def remembered_hash(files: list[Path]) -> str:
    """Return the sha256 over names and contents of files, each of which is read once."""
    return files_hash(files, user_cache() / "index" / "files.json")


def short_name(model: str) -> str:
    """Return the last word of a model's name that tells it apart: ``first`` of runs/first/final."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    if len(parts) > 1 and parts[-1] == "final":
        return parts[-2]
    return parts[-1] if parts else Path(model).resolve().name


def own_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype that a model's config names."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, named) if isinstance(named, str) else named


def as_model_argument(error: UserError) -> UserError:
    """Return the error of a config's ``policy.model`` as one of a MODEL on the command line."""
    text = str(error).removeprefix("policy.model: ")
    return UserError(
        text.replace("give it as policy.base", "correct base_model_name_or_path in its adapter_config.json")
    )
