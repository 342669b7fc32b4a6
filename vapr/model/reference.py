"""Reference log-probs per token: computed with the policy's own code, kept on disk, found again by content.

Values are the plain log-probs of each completion token (weights of tokens and losses are applied later), so every loss
shares one cache. A changed row misses alone and a changed model misses everything.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vapr.batches.packing import PackedBatch, pack
from vapr.batches.tokenize import TokenPath
from vapr.errors import UserError
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr.model.policy import Policy, frozen
from vapr.model.policy_id import open_cache_folder
from vapr.model.sharded_cache import KEY_BYTES, ShardedCache
from vapr.to_device import sent

VERSION = 4
_T = TypeVar("_T")


class Reference(ShardedCache):
    """A cache of the reference log-probs of completions, which computes what it lacks.

    ``hits`` and ``misses`` count completions.

    Args:
        policy: the policy before its first update, or with adapters that can be switched off.
        cache_dir: folder of all caches; None means ``$XDG_CACHE_HOME/vapr/reference``.
        share: how missing pairs are packed, as in ``packing.share``.

    Raises:
        UserError: if the folder cannot be made or read.
    """

    def __init__(self, policy: Policy, cache_dir: str | None, share: str = "pair") -> None:
        folder, policy_id = open_cache_folder(policy, "reference", cache_dir, version=VERSION)
        super().__init__(folder, policy_id, np.float32)
        self._policy = policy
        self._policy_is_reference = True
        self._share = share

    def key(self, path: TokenPath) -> bytes:
        """Return the key of a completion's log-probs.

        It covers token ids, where the completion starts, the images' processed pixels, and the policy's identity:
        weights, dtype and kernel path.
        """
        digest = hashlib.sha256(self.policy_id)
        digest.update(np.int64(path.completion_start).tobytes())
        digest.update(np.ascontiguousarray(path.input_ids).tobytes())
        for image in path.images:
            digest.update(image.content_hash.encode())
        return digest.digest()[:KEY_BYTES]

    def stop_computing(self) -> None:
        """Only look values up from now on, because the policy's own weights are about to be updated."""
        self._policy_is_reference = False

    def find(self, batch: PackedBatch) -> Tensor | None:
        """Look the batch's log-probs up; None if something is missing, and then nothing is counted.

        Args:
            batch: on any device.

        Returns:
            As :meth:`logps`, (M,), in host memory.
        """
        values = [self.get(self.key(path)) for pair in batch.pairs for path in pair.paths]
        found = [one for one in values if one is not None]
        if len(found) < len(values):
            return None
        self.hits += len(found)
        return torch.from_numpy(np.concatenate(found))

    def logps(self, batch: PackedBatch, features: Tensor | None = None) -> Tensor:
        """Return the reference log-probs of the batch's completions, laid out as by ``per_completion``.

        Pairs of which something is missing are computed first, packed without the others.

        Args:
            batch: on the policy's device.
            features: image features of the batch, (sum of the images' tokens, D), where policy and reference have them
                in common.

        Returns:
            Log-probs in fp32, (M,), on the batch's device.

        Raises:
            UserError: if a log-prob is not finite, or if something is missing after the policy changed (a row, an image
                or the cache was altered during the run).
        """
        keys = [[self.key(path) for path in pair.paths] for pair in batch.pairs]
        known = {key: values for pair in keys for key in pair if (values := self.get(key)) is not None}
        missing = [number for number, pair in enumerate(keys) if any(key not in known for key in pair)]
        num_found = len(known)
        if missing:
            self._check_still_reference(batch, missing[0])
            if len(missing) == batch.num_pairs:
                computed = self._compute(batch, features)
            else:
                pairs = [batch.pairs[number] for number in missing]
                computed = self._compute(pack(pairs, self._share).to(self._policy.device), None)
            for key, values in zip((key for number in missing for key in keys[number]), computed, strict=True):
                if key not in known:  # its partner was missing, not it
                    known[key] = values
                    self.put(key, values)
            self.flush_if_large()
        num_computed = len(known) - num_found
        self.misses += num_computed
        self.hits += sum(map(len, keys)) - num_computed
        values = np.concatenate([known[key] for pair in keys for key in pair])
        return sent(torch.from_numpy(values), batch.labels.device)

    def _check_still_reference(self, batch: PackedBatch, missing: int) -> None:
        if self._policy_is_reference:
            return
        pair = batch.pairs[missing]
        damage = "".join(f"{line}; " for line in self.messages)
        raise UserError(
            f"{damage}{pair.where}: row '{pair.id}', its image or the reference cache changed since the run began; "
            "restore the row, or continue with --resume, which computes what is missing"
        )

    def _compute(self, batch: PackedBatch, features: Tensor | None) -> list[np.ndarray]:
        """Compute the log-probs of each completion in fp32, path after path of one pair after another."""
        with frozen(self._policy), self._policy.adapters_off():
            logps = per_completion(token_logps(self._policy, batch, features), batch).float().cpu().numpy()
        computed = [values.copy() for values in np.split(logps, batch.completion_ends.tolist()[:-1])]
        rows = [pair for pair in batch.pairs for _ in pair.paths]
        for row, values in zip(rows, computed, strict=True):
            if not np.isfinite(values).all():
                raise UserError(
                    f"policy.model: the reference's log-probs of {row.where} ('{row.id}') are not finite; "
                    f"the weights in {self._policy.folder} are damaged, or bfloat16 overflows"
                )
        return computed


def _each(batches: Sequence[PackedBatch], use: Callable[[PackedBatch], _T], again: Callable[[], None]) -> list[_T]:
    return [use(batch) for batch in batches]


def first_margin(
    policy: Policy, reference: Reference, batches: Sequence[PackedBatch], each: Callable[..., list[Any]] = _each
) -> tuple[float, float]:  # fmt: skip
    """Return the largest |log-ratio| of a completion before the first update, and the largest that rounding explains.

    The tolerance is ``1e-4 + 1e-6 |logp|`` in fp32. In bf16 the factor of ``|logp|`` is what another layout changes,
    measured on the first pack: four times the largest relative change, and at least a quarter of bf16's resolution.
    ``each`` calls a function with every pack, as vapr.training.out_of_memory does with halves of those that do not fit.

    Returns:
        ``(largest, tolerance)`` of the completion that uses most of its tolerance.
    """
    noise: list[float] = []

    def compare(cpu_batch: PackedBatch) -> tuple[Tensor, Tensor]:
        batch = cpu_batch.to(policy.device)
        logps = completion_sums(per_completion(token_logps(policy, batch), batch), batch)
        if not noise and policy.dtype != torch.float32:
            noise.append(_layout_noise(policy, batch, logps))
        return (logps - completion_sums(reference.logps(batch), batch)).abs(), logps.abs()

    with frozen(policy):
        compared = each(batches, compare, noise.clear)
    relative = max(torch.finfo(policy.dtype).eps / 4, 4 * noise[0]) if noise else 1e-6
    largest, allowed = 0.0, 1e-4
    for margins, sizes in compared:
        tolerances = 1e-4 + relative * sizes
        worst = int((margins / tolerances).nan_to_num(nan=torch.inf).argmax())
        if not float(margins[worst]) / float(tolerances[worst]) <= largest / allowed:
            largest, allowed = float(margins[worst]), float(tolerances[worst])
    return largest, allowed


def _layout_noise(policy: Policy, batch: PackedBatch, together: Tensor) -> float:
    """Return the largest relative change of a completion's log-prob when each pair is computed alone.

    ``together`` are the log-probs of the whole batch, (C,).
    """
    alone = []
    for pair in batch.pairs:
        single = pack([pair], "none").to(policy.device)
        alone.append(completion_sums(per_completion(token_logps(policy, single), single), single))
    return float(((torch.cat(alone) - together).abs() / (1 + together.abs())).max())
