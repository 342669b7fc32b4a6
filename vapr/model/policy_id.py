"""What a policy's frozen values depend on, hashed: values in a cache belong to exactly one such policy."""

import hashlib
import json
from pathlib import Path

from vapr.batches.model_folder import ADAPTER_FILES
from vapr.cache import files_hash, user_cache
from vapr.errors import UserError
from vapr.model.policy import Modules, Policy


def cache_root(section: str, cache_dir: str | None) -> Path:
    """Return the folder of all caches that ``cache_dir`` of a config's section (``reference``, ``features``) means."""
    return Path(cache_dir) if cache_dir else user_cache() / section


def open_cache_folder(policy: Policy, section: str, cache_dir: str | None, *, version: int) -> tuple[Path, bytes]:
    """Make the folder for what a policy's frozen weights, dtype, device and attention path determine.

    ``section`` and ``cache_dir`` are those of :func:`cache_root`; ``version`` says how values are computed and kept.

    Returns:
        The folder, and the policy's identity as JSON, from whose hash the folder has its name.

    Raises:
        UserError: if it cannot be made.
    """
    root = cache_root(section, cache_dir)
    described = {
        "weights": weights_hash(policy, root),
        "dtype": str(policy.dtype),
        "device": policy.device.type,
        "attention": policy.attention_backend,
        "kernels": policy.kernels,
        "joint_layers": sum(layer.joint is not None for layer in policy.decoder.layers),
        "format": version,
        # Left out where nothing is quantised, so that what earlier versions computed is found again.
        **({"base_weights": policy.quantized.kind} if policy.quantized is not None else {}),
    }
    policy_id = json.dumps(described, sort_keys=True).encode()
    folder = root / hashlib.sha256(policy_id).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{section}.cache_dir: {folder} cannot be written ({error.strerror})") from None
    return folder, policy_id


def weights_hash(policy: Policy | Modules, root: Path, *, config: bool = True) -> str:
    """Return the sha256 over the files of weights, of an adapter merged into them, and of the model's config.

    ``config=False`` leaves the config out, which may change without any effect. Files are read once: their hashes are
    remembered in ``root/weights.json``.
    """
    files = [policy.folder / "config.json"] if config else []
    files += sorted(policy.folder.glob("*.safetensors"))
    if policy.source.adapter is not None:
        files += [policy.source.adapter / name for name in ADAPTER_FILES]
    return files_hash(files, root / "weights.json")
