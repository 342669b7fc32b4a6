"""Reference log-probs per token: computed with the policy's own code, kept on disk, found again by content.

The key of a path covers its token ids, where its completion starts, its images' processed pixels, the reference's
weights, the dtype and the kernel path. So a changed row misses alone, a changed model misses everything, and a value
can never be attached to the wrong row. Values are the plain log-probs of each completion token (weights of tokens and
losses are applied later), so every loss shares one cache.

The cache is a folder of safetensors shards, one a flush, written whole; runs may share it.
"""

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from vapr.errors import UserError
from vapr.logps import completion_sums, per_completion, token_logps
from vapr.model import Policy, frozen
from vapr.packing import PackedBatch, pack
from vapr.processor import TokenPath

KEY_BYTES = 16
FLUSH_BYTES = 64 * 2**20


class Reference:
    """Reference log-probs of completions, cached on disk by content.

    Args:
        policy: the policy before its first update, or with adapters that can be switched off.
        cache_dir: folder of all caches; null: ``$XDG_CACHE_HOME/vapr/reference``.
        share: how missing pairs are packed.

    Attributes:
        hits, misses: completions found and computed so far.
        messages: lines about damaged shards, to be shown to the user.
    """

    def __init__(self, policy: Policy, cache_dir: str | None, share: str = "pair") -> None:
        root = Path(cache_dir) if cache_dir else _user_cache() / "reference"
        self._policy = policy
        self._policy_is_reference = True
        self._share = share
        described = {
            "weights": weights_hash(policy.folder, root),
            "dtype": str(policy.dtype),
            "device": policy.device.type,
            "attention": policy.attention_backend,
            "format": 1,
        }
        self._salt = json.dumps(described, sort_keys=True).encode()
        self.folder = root / hashlib.sha256(self._salt).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"reference.cache_dir: {self.folder} cannot be written ({error.strerror})") from None
        self.hits = 0
        self.misses = 0
        self.messages: list[str] = []
        self._values: dict[bytes, np.ndarray] = {}
        self._unsaved: dict[bytes, np.ndarray] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._load_shard(shard)

    def key(self, path: TokenPath) -> bytes:
        """What identifies a completion's log-probs."""
        digest = hashlib.sha256(self._salt)
        digest.update(np.int64(path.completion_start).tobytes())
        digest.update(np.ascontiguousarray(path.input_ids).tobytes())
        for image in path.images:
            digest.update(image.content_hash.encode())
        return digest.digest()[:KEY_BYTES]

    def policy_changes(self) -> None:
        """From now on the policy's own weights are updated: nothing more can be computed, only looked up."""
        self._policy_is_reference = False

    def logps(self, batch: PackedBatch, features: Tensor | None = None) -> Tensor:
        """Reference log-probs of the batch's completions, laid out as :func:`vapr.logps.per_completion`, (M,).

        What is not in the cache is computed first, packed without the pairs that are. ``features`` are the batch's
        image features, where policy and reference have them in common.

        Raises:
            UserError: if something is missing after the policy changed (a row or image was altered during the run).
        """
        missing = [pair for pair in batch.pairs if any(self.key(path) not in self._values for path in pair.paths)]
        before = self.misses
        if missing:
            if not self._policy_is_reference:
                pair = missing[0]
                raise UserError(f"{pair.where}: row '{pair.id}' or its image changed since the run began; restore it")
            if len(missing) < batch.num_pairs:
                self._compute(pack(missing, self._share).to(self._policy.device))
            else:
                self._compute(batch, features)
        values = [self._values[self.key(path)] for pair in batch.pairs for path in pair.paths]
        self.hits += len(values) - (self.misses - before)
        return torch.from_numpy(np.concatenate(values)).to(batch.labels.device, non_blocking=True)

    def _compute(self, batch: PackedBatch, features: Tensor | None = None) -> None:
        with frozen(self._policy), self._policy.adapters_off():
            values = per_completion(token_logps(self._policy, batch, features), batch).float().cpu().numpy()
        paths = [path for pair in batch.pairs for path in pair.paths]
        pieces = np.split(values, np.cumsum(batch.completion_lengths.tolist())[:-1])
        rows = [pair for pair in batch.pairs for _ in pair.paths]
        for path, piece, row in zip(paths, pieces, rows, strict=True):
            if not np.isfinite(piece).all():
                raise UserError(
                    f"policy.model: the reference's log-probs of {row.where} ('{row.id}') are not finite; "
                    f"the weights in {self._policy.folder} are damaged, or bfloat16 overflows"
                )
            key = self.key(path)
            if key not in self._values:
                self._values[key] = self._unsaved[key] = piece.copy()
                self.misses += 1
        if sum(value.nbytes for value in self._unsaved.values()) > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was computed since the last flush as one shard."""
        if not self._unsaved:
            return
        keys = np.frombuffer(b"".join(self._unsaved), np.uint8).reshape(-1, KEY_BYTES)
        lengths = np.array([len(value) for value in self._unsaved.values()], np.int64)
        values = np.concatenate(list(self._unsaved.values()))
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = shard.with_suffix(".tmp")
        metadata = {"crc32": str(_checksum(keys, lengths, values)), "reference": self._salt.decode()}
        save_file({"keys": keys, "lengths": lengths, "logps": values}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(shard)
        self._unsaved = {}

    def _load_shard(self, shard: Path) -> None:
        try:
            with safetensors.safe_open(shard, "numpy") as file:
                expected = (file.metadata() or {}).get("crc32")
            tensors = load_file(shard)
            keys, lengths, values = tensors["keys"], tensors["lengths"], tensors["logps"]
            if str(_checksum(keys, lengths, values)) != expected:
                raise ValueError("its checksum does not match")
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            damaged = shard.with_suffix(".damaged")
            with contextlib.suppress(FileNotFoundError):  # another run was faster
                shard.rename(damaged)
            reason = " ".join(str(error).split())
            self.messages.append(
                f"{shard} is damaged ({reason}); set aside as {damaged.name}, what it held is computed again"
            )
            return
        ends = np.cumsum(lengths)
        for key, start, end in zip(keys, ends - lengths, ends, strict=True):
            self._values[key.tobytes()] = values[start:end]


def first_margin(policy: Policy, reference: Reference, batches: tuple[PackedBatch, ...]) -> tuple[float, float]:
    """Largest |log-ratio| of a completion before the first update, and the largest that rounding explains.

    The tolerance is ``1e-4 + 1e-6 |logp|`` in fp32. In bf16 the factor of ``|logp|`` is what another layout changes,
    measured on the first pack: four times the largest relative change, and at least a quarter of bf16's resolution.

    Returns:
        ``(largest, tolerance)`` of the completion that uses most of its tolerance.
    """
    relative = 1e-6
    largest, allowed = 0.0, 1e-4
    with frozen(policy):
        for number, cpu_batch in enumerate(batches):
            batch = cpu_batch.to(policy.device)
            logps = completion_sums(per_completion(token_logps(policy, batch), batch), batch)
            if number == 0 and policy.dtype != torch.float32:
                relative = max(torch.finfo(policy.dtype).eps / 4, 4 * _layout_noise(policy, batch, logps))
            margins = (logps - completion_sums(reference.logps(batch), batch)).abs()
            tolerances = 1e-4 + relative * logps.abs()
            worst = int((margins / tolerances).nan_to_num(nan=torch.inf).argmax())
            if not float(margins[worst]) / float(tolerances[worst]) <= largest / allowed:
                largest, allowed = float(margins[worst]), float(tolerances[worst])
    return largest, allowed


def _layout_noise(policy: Policy, batch: PackedBatch, together: Tensor) -> float:
    """Largest relative change of a completion's log-prob when each path is computed alone."""
    alone = []
    for pair in batch.pairs:
        single = pack([pair], "none").to(policy.device)
        alone.append(completion_sums(per_completion(token_logps(policy, single), single), single))
    return float(((torch.cat(alone) - together).abs() / (1 + together.abs())).max())


def weights_hash(folder: Path, root: Path) -> str:
    """sha256 over the weight files of a model folder; remembered by path, size and time in ``root/weights.json``."""
    files = sorted(folder.glob("*.safetensors"))
    memory_file = root / "weights.json"
    try:
        memory = json.loads(memory_file.read_text())
    except (OSError, ValueError):
        memory = {}
    digest = hashlib.sha256()
    known = dict(memory)
    for file in [folder / "config.json", *files]:
        stat = file.stat()
        identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if identity not in known:
            with file.open("rb") as stream:
                known[identity] = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}:{known[identity]}\n".encode())
    if known != memory:
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = memory_file.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(known))
            temporary.rename(memory_file)
        except OSError as error:
            raise UserError(f"reference.cache_dir: {root} cannot be written ({error.strerror})") from None
    return digest.hexdigest()


def _checksum(*arrays: np.ndarray) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vapr"
