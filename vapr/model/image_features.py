"""Image features of a frozen tower and projector, cached on disk by content.

A folder of safetensors shards, written whole and read by memory map. Each feature has a checksum, looked at when it is
first read. The key covers the processed pixels, the model's weights, the dtype and the kernel path.
"""

import json
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from vapr.batches.packing import PackedBatch
from vapr.batches.tokenize import ProcessedImage
from vapr.cache import user_cache, written_whole
from vapr.errors import UserError
from vapr.model.policy import Policy, image_features
from vapr.model.reference import folder_of_policy

FLUSH_BYTES = 128 * 2**20


class Features:
    """Features of processed images, (tokens, D) each in the policy's dtype.

    Args:
        policy: its tower and projector must be frozen.
        cache_dir: folder of all caches; null: ``$XDG_CACHE_HOME/vapr/features``.

    Attributes:
        hits, misses: distinct images of a pack found and computed so far.
        messages: lines about damaged files, to be shown to the user and then cleared.
    """

    def __init__(self, policy: Policy, cache_dir: str | None) -> None:
        root = Path(cache_dir) if cache_dir else user_cache() / "features"
        self.folder, _ = folder_of_policy(policy, root, "features.cache_dir", version=1)
        self.hits = 0
        self.misses = 0
        self.messages: list[str] = []
        self._policy = policy
        self._unsaved: dict[str, Tensor] = {}
        self._shards: dict[Path, tuple[Any, int, dict[str, int]]] = {}  # open file, its size, checksum by image
        self._shard_of: dict[str, Path] = {}
        self._sound: set[str] = set()  # images whose checksum was looked at
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        """Images on disk."""
        return len(self._shard_of)

    @property
    def shards(self) -> list[str]:
        """Names of the files in use."""
        return [path.name for path in self._shards]

    def of_batch(self, batch: PackedBatch) -> Tensor:
        """Features of the batch's distinct images laid end to end, as :func:`vapr.model.policy.image_features`."""
        known = {image.content_hash: self._find(image) for image in batch.images}
        missing = [image for image in batch.images if known[image.content_hash] is None]
        self.hits += len(batch.images) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = image_features(self._policy, missing).split([image.num_tokens for image in missing])
            for image, feature in zip(missing, computed, strict=True):
                known[image.content_hash] = feature
                self._unsaved[image.content_hash] = feature.detach().cpu()
            if sum(feature.nbytes for feature in self._unsaved.values()) > FLUSH_BYTES:
                self.flush()
        return torch.cat([known[image.content_hash].to(self._policy.device) for image in batch.images])  # type: ignore[union-attr]

    def flush(self) -> None:
        """Write what was computed since the last flush as one shard."""
        if not self._unsaved:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        checksums = {name: _checksum(feature) for name, feature in self._unsaved.items()}
        with written_whole(path) as file:
            file.write(save({n: f.contiguous() for n, f in self._unsaved.items()}, {"crc32": json.dumps(checksums)}))
        self._unsaved = {}
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safetensors.safe_open(path, "pt")
            checksums = json.loads(file.metadata()["crc32"])
            self._shards[path] = file, path.stat().st_size, checksums
            self._shard_of.update(dict.fromkeys(file.keys(), path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            self._set_aside(path, " ".join(str(error).split()))

    def _set_aside(self, path: Path, reason: str) -> None:
        self._shards.pop(path, None)
        self._shard_of = {name: shard for name, shard in self._shard_of.items() if shard != path}
        if path.exists():
            path.rename(path.with_suffix(".damaged"))
        self.messages.append(f"{path} is damaged ({reason}); set aside, what it held is computed again")

    def _find(self, image: ProcessedImage) -> Tensor | None:
        name = image.content_hash
        if name in self._unsaved:
            return self._unsaved[name]
        path = self._shard_of.get(name)
        if path is None:
            return None
        file, size, checksums = self._shards[path]
        # Reading a memory map beyond the end of its file would kill the process.
        if not path.exists() or path.stat().st_size != size:
            self._set_aside(path, "cut short or removed")
            return None
        feature: Tensor = file.get_tensor(name)
        if name not in self._sound:
            if _checksum(feature) != checksums.get(name):
                self._set_aside(path, "its checksum does not match")
                return None
            self._sound.add(name)
        return feature


def announce(policy: Policy, features: Features, num_images: int, tokens_per_image: float) -> str:
    """A line with the size that the cache will have.

    Raises:
        UserError: if the disk has less room than that.
    """
    hidden_size = policy.base.config.get_text_config().hidden_size
    each = tokens_per_image * hidden_size * policy.dtype.itemsize
    wanted = max(num_images - len(features), 0) * each
    free = shutil.disk_usage(features.folder).free
    size = f"about {num_images:,} images x {each / 2**20:.2f} MiB = {num_images * each / 2**30:.2f} GiB"
    line = f"{size} in {features.folder} ({len(features):,} there already, {free / 2**30:.1f} GiB free)"
    if wanted > free:
        raise UserError(f"features.cache: {line} do not fit; set features.cache_dir to a larger disk, or cache: false")
    return line


def _checksum(feature: Tensor) -> int:
    return zlib.crc32(feature.contiguous().view(torch.uint8).numpy().data)
