"""The most recent processed images, and several laid end to end."""

import dataclasses
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vapr.data.remote import fetched
from vapr.errors import UserError, one_line
from vapr.families.processed_image import ProcessedImage
from vapr.to_device import sent


class RecentImages:
    """Processed images by source, the least recently used dropped first. Several threads may share them."""

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum_bytes = maximum_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._images: OrderedDict[object, ProcessedImage] = OrderedDict()

    def get(self, key: object) -> ProcessedImage | None:
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def put(self, key: object, image: ProcessedImage) -> None:
        with self._lock:
            if key not in self._images:
                self._images[key] = image
                self._num_bytes += image.pixel_values.nbytes
            while self._num_bytes > self._maximum_bytes and len(self._images) > 1:
                _, dropped = self._images.popitem(last=False)
                self._num_bytes -= dropped.pixel_values.nbytes


def joined_pixels(images: Sequence[ProcessedImage]) -> Tensor:
    """Return the pixels of images laid end to end: a view where they lie so, as a worker leaves them, else a copy.

    Returns:
        (sum of the images' rows, ...), in their dtype: rows of patches for Qwen, whole images for LLaVA.
    """
    pixels = [image.pixel_values for image in images]
    storage = pixels[0].untyped_storage()._cdata  # its address, which tensors without memory have, too
    starts = itertools.accumulate((part.numel() for part in pixels), initial=pixels[0].storage_offset())
    if all(
        part.untyped_storage()._cdata == storage and part.storage_offset() == start
        for part, start in zip(pixels, starts, strict=False)
    ):
        return pixels[0].as_strided((sum(len(part) for part in pixels), *pixels[0].shape[1:]), pixels[0].stride())
    return torch.cat(pixels)


def sent_images(
    images: Sequence[ProcessedImage], device: torch.device, dtype: torch.dtype
) -> tuple[ProcessedImage, ...]:
    """Return images with their pixels end to end on ``device``, for whose arrival there the host does not wait."""
    if not images:
        return ()
    pixels = sent(joined_pixels(images).to(dtype), device).split([len(image.pixel_values) for image in images])
    return tuple(dataclasses.replace(image, pixel_values=part) for image, part in zip(images, pixels, strict=True))


def image_key(source: Path | bytes) -> object:
    """Return what changes when another image, or another version of its file, is meant. Raises UserError."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    try:
        stat = fetched(source).stat()
    except OSError as error:
        raise UserError(f"image {source} cannot be read: {one_line(error)}") from None
    return str(source), stat.st_size, stat.st_mtime_ns
