"""Image features of a frozen tower and projector: computed once a pack for policy and reference, or found on disk."""

import shutil

import numpy as np
import torch
from torch import Tensor

from vapr.batches.packing import PackedBatch
from vapr.errors import UserError
from vapr.families import FAMILIES
from vapr.families.processed_image import ProcessedImage
from vapr.model.policy import Policy, image_features
from vapr.model.policy_id import open_cache_folder
from vapr.model.sharded_cache import KEY_BYTES, ShardedCache
from vapr.to_device import sent

VERSION = 2


def shared_image_features(policy: Policy, batch: PackedBatch, features: "ImageFeatures | None") -> Tensor | None:
    """Return the image features that policy and reference have in common, or None if they have none.

    Args:
        policy: where its tower or projector is trained, nothing is shared.
        batch: on the policy's device.
        features: the cache, if there is one.

    Returns:
        Features of the batch's distinct images laid end to end, (sum of their tokens, D), in the policy's dtype.
    """
    if not batch.images or policy.vision_trained:
        return None
    return image_features(policy, batch.images) if features is None else features.of_batch(batch)


class ImageFeatures(ShardedCache):
    """A cache of the features of processed images, whose key covers the pixels and all that the policy's identity does.

    ``hits`` and ``misses`` count distinct images of a pack. Features are kept as bytes, because NumPy has no bfloat16.

    Args:
        policy: its tower and projector must be frozen.
        cache_dir: folder of all caches; None means ``$XDG_CACHE_HOME/vapr/features``.

    Raises:
        UserError: if the folder cannot be made or read.
    """

    CHECKS_ONCE = True  # some MiB an image, read again every epoch

    def __init__(self, policy: Policy, cache_dir: str | None) -> None:
        folder, policy_id = open_cache_folder(policy, "features", cache_dir, version=VERSION)
        super().__init__(folder, policy_id, np.uint8)
        self._policy = policy
        policy.tower.rest()

    def of_batch(self, batch: PackedBatch) -> Tensor:
        """Find or compute the features of the batch's distinct images.

        Returns:
            Features laid end to end, (sum of the images' tokens, D), in the policy's dtype and on its device.
        """
        features = [self._find(image) for image in batch.images]
        missing = [number for number, found in enumerate(features) if found is None]
        if missing:
            images = [batch.images[number] for number in missing]
            computed = image_features(self._policy, images).split([image.num_tokens for image in images])
            for number, image, feature in zip(missing, images, computed, strict=True):
                features[number] = feature
                self.put(_key(image), feature.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1))
            self.flush_if_large()
        self.misses += len(missing)
        self.hits += len(features) - len(missing)
        return torch.cat([sent(feature, self._policy.device) for feature in features if feature is not None])

    def find(self, batch: PackedBatch) -> Tensor | None:
        """Look the features of the batch's images up; None if one is missing, and then nothing is counted.

        Returns:
            As :meth:`of_batch`, in host memory.
        """
        features = [self._find(image) for image in batch.images]
        found = [one for one in features if one is not None]
        if len(found) < len(features):
            return None
        self.hits += len(found)
        return torch.cat(found)

    def _find(self, image: ProcessedImage) -> Tensor | None:
        values = self.get(_key(image))
        return None if values is None else torch.from_numpy(values).view(self._policy.dtype).view(image.num_tokens, -1)

    def describe_size(self, num_images: int, tokens_per_image: float) -> str:
        """Describe how much disk the features of ``num_images`` images take, and how many are there already.

        Raises:
            UserError: if the disk has less room than that.
        """
        config = self._policy.base.config
        width = config.get_text_config().hidden_size * (1 + FAMILIES[self._policy.family].num_deep(config))
        mib = tokens_per_image * width * self._policy.dtype.itemsize / 2**20  # of an image
        free_gib = shutil.disk_usage(self.folder).free / 2**30
        line = (
            f"about {num_images:,} images x {mib:.2f} MiB = {num_images * mib / 2**10:.2f} GiB in {self.folder} "
            f"({len(self):,} there already, {free_gib:.1f} GiB free)"
        )
        if (num_images - len(self)) * mib / 2**10 > free_gib:
            raise UserError(
                f"features.cache: {line} do not fit; set features.cache_dir to a larger disk, or cache: false"
            )
        return line


def _key(image: ProcessedImage) -> bytes:
    return bytes.fromhex(image.content_hash)[:KEY_BYTES]
