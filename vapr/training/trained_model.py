"""The weights that a run trained: which they are, and the policy that they belong into."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from vapr.batches.model_folder import read_adapter_config
from vapr.config import Config, PolicyConfig
from vapr.errors import UserError, one_line
from vapr.model.policy import Modules, Policy, trained_parameters
from vapr.model.policy_id import cache_root, weights_hash
from vapr.training import checkpoint
from vapr.training.checksums import DamagedCheckpoint, check_checksums
from vapr.training.run_dir import START, weights_at_start


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights of a run: those of a checkpoint, or of its final model."""

    run: Path
    folder: Path  # where the trained weights are
    step: int | None  # None for the run's end


def find_trained(run: Path, which: str = "last", say: Callable[[str], None] = print) -> tuple[Config, Trained]:
    """Find a run's config, and the weights of it that are meant.

    Args:
        run: folder of a run, finished or not, or of one of its checkpoints.
        which: ``last``, ``best`` (by the held-out figure ``checkpoint.best_metric``), or a checkpoint's name.
        say: called with a line on which weights these are, where that is not plain.

    Raises:
        UserError: if there is no run, or no such weights in it.
    """
    if not run.exists() and not checkpoint.is_checkpoint(run):
        raise UserError(f"{run}: no such folder; give that of a run or of a checkpoint")
    run_dir = run
    if checkpoint.is_checkpoint(run) and not (run / "config.yaml").is_file():
        run = run.resolve()
        run_dir = run.parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run}: no run (no config.yaml in {run_dir}); give the folder of a run or of a checkpoint")
    config = Config.load(run_dir / "config.yaml")
    return config, _find(run, run_dir, which, config, say)


def _find(run: Path, run_dir: Path, which: str, config: Config, say: Callable[[str], None]) -> Trained:
    """Find the weights that ``which`` asks for, and say which they are."""
    final = run_dir / "final"
    there = checkpoint.list_checkpoints(run_dir)
    if run != run_dir:
        if which != "last":
            raise UserError(f"--checkpoint {which}: {run} is a checkpoint already; give the run's folder")
        if run not in there:
            raise UserError(f"{run}: no whole checkpoint")
        return Trained(run_dir, run, checkpoint.step_of(run))
    if which == "best":
        metric = config.checkpoint.best_metric
        if (best := checkpoint.best_checkpoint(run_dir, metric)) is None:
            raise UserError(f"{run_dir}: no checkpoint in it has a held-out figure {metric}; see data.eval and probe")
        say(f"best of {len(there)} kept checkpoints: {best[0].name}, {metric} {best[1]:.4g}")
        return Trained(run_dir, best[0], checkpoint.step_of(best[0]))
    if which != "last":
        if (named := run_dir / "checkpoints" / which) not in there:
            names = ", ".join(folder.name for folder in there) or "none"
            raise UserError(f"--checkpoint {which}: {run_dir} holds no such checkpoint; there are: {names}")
        return Trained(run_dir, named, checkpoint.step_of(named))
    if not there and not final.is_dir():
        raise UserError(f"{run_dir}: neither a checkpoint nor a final/ folder is in it; train first")
    if there:
        step, end = checkpoint.step_of(there[-1]), checkpoint.read_state(there[-1]).get("num_steps")
        if not final.is_dir():
            say(f"{run_dir} is not finished; this is its newest checkpoint, step {step:,} of {end or 'unknown'}")
        if not final.is_dir() or step == end:
            return Trained(run_dir, there[-1], step)
    return Trained(run_dir, final, None)


def start_policy(config: Config, trained: Trained) -> PolicyConfig:
    """Return the config of the policy that training began with: the run's own copy if there is one."""
    policy = dataclasses.replace(config.policy, attention="sdpa", checkpointing="none")
    final = trained.run / "final"
    kept = ""
    if (trained.run / START).is_dir():
        kept = str(trained.run / START)
    elif config.policy.lora is None and final.is_dir():
        kept = str(final)
    elif final.is_dir():  # the whole path, where the config's may start at another folder
        kept = read_adapter_config(final)["base_model_name_or_path"]
    return dataclasses.replace(policy, model=kept, base=None) if kept and Path(kept).is_dir() else policy


def put_weights(policy: Policy | Modules, config: Config, trained: Trained, dtype: torch.dtype) -> None:
    """Put trained weights into the policy that training began with.

    Args:
        policy: loaded from :func:`start_policy`.
        config: the run's.
        trained: which weights.
        dtype: that they shall have.

    Raises:
        UserError: if they are damaged, or the run began from other weights than those in ``policy``.
    """
    start = start_policy(config, trained).model
    if not Path(start).is_relative_to(trained.run):
        now = weights_hash(policy, cache_root("reference", config.reference.cache_dir), config=False)
        if weights_at_start(trained.run) not in (None, now):
            raise UserError(f"{trained.run}: the weights of {start} changed since it was started; restore them")
    try:
        weights = _weights(trained.folder)
        for name, parameter in trained_parameters(policy.base).items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"'{name}' has another shape")
            parameter.data = weights[name].to(parameter.device, dtype)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; take another checkpoint") from None
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{trained.folder}: its weights cannot be used ({one_line(error)})") from None


def _weights(folder: Path) -> Mapping[str, Tensor]:
    """Load trained weights by the names they have in the policy."""
    if checkpoint.is_checkpoint(folder):
        check_checksums(folder, only="weights")
        return checkpoint.SavedTensors(folder, "weights")
    weights = load_file(folder / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.").removesuffix(".weight") for name in weights}
    return {f"{names[name]}.default.weight": weight for name, weight in weights.items()}
