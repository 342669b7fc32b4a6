"""Reference log-probs per token: computed with the policy's own code, kept on disk, found again by content.

The key of a path covers its token ids, where its completion starts, its images' processed pixels, the reference's
weights, the dtype and the kernel path. So a changed row misses alone, a changed model misses everything, and a value
can never be attached to the wrong row. Values are the plain log-probs of each completion token (weights of tokens and
losses are applied later), so every loss shares one cache.

The cache is a folder of safetensors shards, one a flush, written whole; runs may share it. Values stay on disk: what is
held in memory is where each lies, 24 bytes a completion. Every value has its own checksum, looked at when it is read.
"""

import contextlib
import hashlib
import json
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vapr.batches.model_folder import ADAPTER_FILES
from vapr.batches.packing import PackedBatch, pack
from vapr.batches.tokenize import TokenPath
from vapr.cache import files_hash, user_cache
from vapr.errors import UserError
from vapr.model.logps import completion_sums, per_completion, token_logps
from vapr.model.policy import Policy, frozen
from vapr.model.sharded_cache import KEY_BYTES, Index, Shard, write_shard

FLUSH_BYTES = 64 * 2**20
UNMERGED_SHARDS = 8


class Reference:
    """Reference log-probs of completions, cached on disk by content.

    Args:
        policy: the policy before its first update, or with adapters that can be switched off.
        cache_dir: folder of all caches; null: ``$XDG_CACHE_HOME/vapr/reference``.
        share: how missing pairs are packed.

    Attributes:
        hits, misses: completions found and computed so far.
        messages: lines about damaged files, to be shown to the user and then cleared.
    """

    def __init__(self, policy: Policy, cache_dir: str | None, share: str = "pair") -> None:
        root = reference_root(cache_dir)
        self._policy = policy
        self._policy_is_reference = True
        self._share = share
        self.folder, self._salt = folder_of_policy(policy, root, "reference.cache_dir", version=3)
        self.hits = 0
        self.misses = 0
        self.messages: list[str] = []
        self._unsaved: dict[bytes, np.ndarray] = {}
        self._shards: list[Shard] = []
        self._indexes: list[Index] = []
        self._damaged: set[int] = set()  # numbers of shards that the user knows to be damaged
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open_shard(path)
        self._merge()

    def __len__(self) -> int:
        """Completions on disk."""
        return sum(len(index.heads) for index in self._indexes)

    @property
    def shards(self) -> list[str]:
        """Names of the files in use."""
        return [shard.path.name for shard in self._shards]

    def verify(self) -> None:
        """Read every value once; files with a damaged one are set aside."""
        damaged = {shard.path for number, shard in enumerate(self._shards) if not shard.sound(shard.index(number))}
        paths = [shard.path for shard in self._shards]
        self._shards, self._indexes = [], []
        for path in paths:
            if path in damaged:
                self._set_aside(path, "a value's checksum does not match")
            else:
                self._open_shard(path)
        self._merge()

    def _tell_damaged(self, shard: int) -> None:
        if shard not in self._damaged:
            self._damaged.add(shard)
            self.messages.append(f"{self._shards[shard].path} is damaged; values that it lost are computed again")

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

    def forget(self) -> None:
        """Leave the cache on disk out of sight, so that everything is computed again."""
        self._indexes, self._unsaved = [], {}

    def logps(self, batch: PackedBatch, features: Tensor | None = None) -> Tensor:
        """Reference log-probs of the batch's completions, laid out as :func:`vapr.model.logps.per_completion`, (M,).

        What is not in the cache is computed first, packed without the pairs that are. ``features`` are the batch's
        image features, where policy and reference have them in common.

        Raises:
            UserError: if something is missing after the policy changed (a row, an image or the cache was altered
                during the run).
        """
        keys = [[self.key(path) for path in pair.paths] for pair in batch.pairs]
        known = {key: value for pair in keys for key in pair if (value := self._find(key)) is not None}
        missing = [n for n, pair in enumerate(keys) if any(key not in known for key in pair)]
        num_known = len(known)
        if missing:
            if not self._policy_is_reference:
                pair = batch.pairs[missing[0]]
                told = "".join(f"{line}; " for line in self.messages)
                raise UserError(
                    f"{told}{pair.where}: row '{pair.id}', its image or the reference cache changed since the run "
                    "began; restore the row, or continue with --resume, which computes what is missing"
                )
            if len(missing) < batch.num_pairs:
                batch_of_missing = pack([batch.pairs[n] for n in missing], self._share).to(self._policy.device)
                known |= self._compute(batch_of_missing, None)
            else:
                known |= self._compute(batch, features)
        self.misses += len(known) - num_known
        self.hits += sum(len(pair) for pair in keys) - (len(known) - num_known)
        values = [known[key] for pair in keys for key in pair]
        return torch.from_numpy(np.concatenate(values)).to(batch.labels.device, non_blocking=True)

    def _compute(self, batch: PackedBatch, features: Tensor | None) -> dict[bytes, np.ndarray]:
        with frozen(self._policy), self._policy.adapters_off():
            values = per_completion(token_logps(self._policy, batch, features), batch).float().cpu().numpy()
        paths = [path for pair in batch.pairs for path in pair.paths]
        pieces = np.split(values, batch.completion_ends.tolist()[:-1])
        rows = [pair for pair in batch.pairs for _ in pair.paths]
        computed: dict[bytes, np.ndarray] = {}
        for path, piece, row in zip(paths, pieces, rows, strict=True):
            if not np.isfinite(piece).all():
                raise UserError(
                    f"policy.model: the reference's log-probs of {row.where} ('{row.id}') are not finite; "
                    f"the weights in {self._policy.folder} are damaged, or bfloat16 overflows"
                )
            key = self.key(path)
            if key not in self._unsaved and (known := self._find(key)) is not None:
                computed[key] = known  # its partner was missing, not it
            else:
                computed[key] = self._unsaved.setdefault(key, piece.copy())
        if sum(value.nbytes for value in self._unsaved.values()) > FLUSH_BYTES:
            self.flush()
        return computed

    def _find(self, key: bytes) -> np.ndarray | None:
        if key in self._unsaved:
            return self._unsaved[key]
        for index in reversed(self._indexes):
            for shard, start, length in index.places(key):
                value = self._shards[shard].read(key, start, length)
                if value is not None:
                    return value
                self._tell_damaged(shard)
        return None

    def flush(self) -> None:
        """Write what was computed since the last flush as one shard.

        Raises:
            UserError: if it cannot be written, a full disk included.
        """
        if not self._unsaved:
            return
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_shard(shard, self._unsaved, self._salt.decode())
        self._unsaved = {}
        self._open_shard(shard)
        if len(self._indexes) > UNMERGED_SHARDS:
            self._merge()

    def _open_shard(self, path: Path) -> None:
        try:
            shard = Shard(path)
            index = shard.index(len(self._shards))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            self._set_aside(path, " ".join(str(error).split()))
            return
        self._shards.append(shard)
        self._indexes.append(index)

    def _set_aside(self, path: Path, reason: str) -> None:
        damaged = path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):  # another run was faster
            path.rename(damaged)
        self.messages.append(
            f"{path} is damaged ({reason}); set aside as {damaged.name}, what it held is computed again"
        )

    def _merge(self) -> None:
        """One sorted index out of all, so that a look-up does not slow down with the number of shards."""
        if self._indexes:
            columns = zip(*(index.columns() for index in self._indexes), strict=True)
            heads, shards, starts, lengths = (np.concatenate(column) for column in columns)
            order = np.argsort(heads, kind="stable")
            self._indexes = [Index(heads[order], shards[order], starts[order], lengths[order])]


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


def reference_root(cache_dir: str | None) -> Path:
    """The folder of all reference caches that ``reference.cache_dir`` means."""
    return Path(cache_dir) if cache_dir else user_cache() / "reference"


def folder_of_policy(policy: Policy, root: Path, key: str, *, version: int) -> tuple[Path, bytes]:
    """The cache folder of whatever a policy's frozen weights determine, and what tells it from others.

    Args:
        policy: whose weights, dtype, device and attention path the values depend on.
        root: folder of all caches.
        key: the config's key for ``root``, for the message.
        version: of the files' format.

    Raises:
        UserError: if it cannot be made.
    """
    described = {
        "weights": weights_hash(policy, root),
        "dtype": str(policy.dtype),
        "device": policy.device.type,
        "attention": policy.attention_backend,
        "kernels": policy.kernels,
        "format": version,
    }
    salt = json.dumps(described, sort_keys=True).encode()
    folder = root / hashlib.sha256(salt).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written ({error.strerror})") from None
    return folder, salt


def weights_hash(policy: Policy, root: Path, *, config: bool = True) -> str:
    """sha256 over the files of weights, of an adapter merged into them, and of the model's config.

    ``config=False`` leaves the config out, which may change without any effect. Files are read once: their hashes are
    remembered in ``root/weights.json``.
    """
    files = [policy.folder / "config.json"] if config else []
    files += sorted(policy.folder.glob("*.safetensors"))
    if policy.source.adapter is not None:
        files += [policy.source.adapter / name for name in ADAPTER_FILES]
    return files_hash(files, root / "weights.json")
