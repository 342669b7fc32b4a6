"""Copy packs to the device ahead of their turn, with their pixels and with what the caches know of them.

While a pack is computed, the next one is looked up on the host and copied from pinned memory by a stream of its own. On
a CPU there is nothing to copy, and the look-ups come in the same order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vapr.batches.packing import PackedBatch
from vapr.batches.pinned import pinned
from vapr.batches.processed_image import sent_images
from vapr.model.image_features import ImageFeatures
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.to_device import sent


@dataclass(frozen=True, slots=True, eq=False)
class CopiedPack:
    """A pack on the policy's device, and what of it was in the caches."""

    batch: PackedBatch  # the pixels of its images too, in the policy's dtype, unless ``features`` take their place
    features: Tensor | None = None  # (sum of the images' tokens, D); None: no cache, no image, or not all found
    reference_logps: Tensor | None = None  # (M,), as per_completion lays them out; None: no reference, or not all found


class CopiedAhead:
    """Hands packs over on the policy's device, the next one on its way there.

    Args:
        policy: its device and dtype.
        reference: looked up ahead; what it lacks is computed in the pack's turn. None: there is none.
        features: cache of image features, likewise.
    """

    def __init__(self, policy: Policy, reference: Reference | None, features: ImageFeatures | None) -> None:
        self._policy, self._reference, self._features = policy, reference, features
        self._beside = _copy_stream(policy.device) if policy.device.type == "cuda" else None

    def each(self, packs: Sequence[PackedBatch]) -> Iterator[CopiedPack]:
        """Yield packs, given on the CPU, in their order.

        Raises:
            torch.OutOfMemoryError: if a pack has no room on the device in its own turn.
        """
        ahead: _OnItsWay | None = None
        for number, pack in enumerate(packs):
            turn = ahead or self._send(pack)
            ahead = self._send_if_it_fits(packs[number + 1]) if number + 1 < len(packs) else None
            yield turn.arrived()
            del turn  # the pack that is done makes room for the next but one

    def _send_if_it_fits(self, pack: PackedBatch) -> "_OnItsWay | None":
        try:
            return self._send(pack)
        except torch.OutOfMemoryError:  # the pack before it takes the room; it may do so again in its turn
            return None

    def _send(self, pack: PackedBatch) -> "_OnItsWay":
        if self._beside is None:
            return _OnItsWay(self._copy(pack), None)
        with torch.cuda.stream(self._beside):
            if not pack.input_ids.is_pinned():  # made by this process: no data workers, or packs that were halved
                pack = pinned(pack)
            return _OnItsWay(self._copy(pack), self._beside.record_event())

    def _copy(self, pack: PackedBatch) -> CopiedPack:
        device = self._policy.device
        features = reference_logps = None
        if self._features is not None and pack.images:
            features = self._features.find(pack)
        if self._reference is not None:
            reference_logps = self._reference.find(pack)
        batch = pack.to(device)
        if features is None:
            batch = dataclasses.replace(batch, images=sent_images(pack.images, device, self._policy.dtype))
        return CopiedPack(
            batch,
            None if features is None else sent(features, device),
            None if reference_logps is None else sent(reference_logps, device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _OnItsWay:
    """A pack whose copies were begun."""

    pack: CopiedPack
    copied: Any  # the event at their end; None where there was nothing to copy

    def arrived(self) -> CopiedPack:
        """Return the pack; what the device is given from now on waits until it is there, and the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            for tensor in _tensors((self.pack.batch, self.pack.features, self.pack.reference_logps)):
                tensor.record_stream(stream)  # else its memory could be written to while this stream still reads it
        return self.pack


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    """Return the stream of the copies, always the same, because every stream keeps freed memory to itself."""
    return torch.cuda.Stream(device)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value of dataclasses and tuples that are on the device; none of a pair is."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name != "pairs":
                yield from _tensors(getattr(value, field.name))
