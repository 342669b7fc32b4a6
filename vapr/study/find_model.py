"""The MODEL of ``vapr eval``: a hub id, a folder, an adapter, a run or one of its checkpoints."""

import dataclasses
from pathlib import Path

import torch
import transformers

from vapr.batches.model_folder import ADAPTER_FILES, find_model
from vapr.config import Config
from vapr.errors import UserError
from vapr.evaluation.generation.open_model import (
    Answerer,
    as_model_argument,
    files_identity,
    find_answerer,
    remembered_hash,
)
from vapr.model.policy import load_modules
from vapr.training import checkpoint
from vapr.training.trained_model import Trained, find_trained, put_weights, start_policy


def find(model: str) -> Answerer:
    """Find the model that MODEL means: of a run its final one, or its newest checkpoint while it is not finished.

    Raises:
        UserError: if there is none, or it cannot be used.
    """
    folder = Path(model)
    is_checkpoint = folder.is_dir() and checkpoint.is_checkpoint(folder)
    is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()
    if is_run and (folder / "final").is_dir():
        return dataclasses.replace(find_answerer(str(folder / "final")), given=model)
    if not is_run and not is_checkpoint:
        return find_answerer(model)
    said: list[str] = []
    config, trained = find_trained(folder, say=said.append)
    return _of_checkpoint(model, config, trained, said)


def _of_checkpoint(model: str, config: Config, trained: Trained, said: list[str]) -> Answerer:
    start = start_policy(config, trained)
    try:
        source = find_model(start.model, start.base)
        identity = files_identity(source.model)
    except UserError as error:
        raise as_model_argument(error) from None
    if source.adapter is not None:
        identity["adapter"] = remembered_hash([source.adapter / name for name in ADAPTER_FILES])
    if start.base_weights != "bfloat16":
        identity["base_weights"] = start.base_weights
    identity["checkpoint"] = remembered_hash(sorted(trained.folder.glob("weights*.safetensors")))

    def load(dtype: torch.dtype) -> transformers.PreTrainedModel:
        named = "float32" if dtype == torch.float32 else "bfloat16"
        try:
            modules = load_modules(dataclasses.replace(start, dtype=named))  # type: ignore[arg-type]
        except UserError as error:
            raise as_model_argument(error) from None
        put_weights(modules, config, trained, dtype)
        return modules.base

    note = f"{model}: step {trained.step:,} of {trained.run}, with the weights of {trained.folder}"
    name = f"{trained.run.resolve().name}-{trained.folder.name}"
    return Answerer(
        model,
        name,
        source.model,
        None,
        identity,
        getattr(torch, start.dtype),
        load,
        whole=False,
        notes=tuple(said) or (note,),
    )
