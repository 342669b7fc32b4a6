"""A cache of arrays on disk, found by key and shared by runs; every value has its own checksum.

A cache is a folder of safetensors shards. Each flush writes one, whole or not at all, so neither a killed run nor a
second run in the folder leaves half a file. A shard holds records (key, checksum, values), sorted by key, and an index
of them. Values stay on disk: what is held in memory is where each record lies, 25 bytes apiece.
"""

import contextlib
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vapr.cache import written_whole
from vapr.errors import UserError

KEY_BYTES = 16
HEAD_BYTES = KEY_BYTES + 4  # the key and the checksum stand before a record's values
FLUSH_BYTES = 64 * 2**20  # of values held in memory
PLACE = np.dtype([("start", "<i8"), ("length", "<i4"), ("shard", "<i4")])  # byte in the file, number of values


class ShardedCache:
    """Flat arrays of one dtype, kept in a folder of shards.

    Args:
        folder: an existing folder of this cache alone.
        policy_id: whose values they are; written into each shard.
        dtype: of the values.

    Attributes:
        hits, misses: values found and computed so far, as whoever computes them counts.
        messages: lines about damaged files, to be shown to the user and then cleared.

    Raises:
        UserError: if a shard cannot be read.
    """

    CHECKS_ONCE = False
    """Whether a value's checksum is compared at its first read only; the key always is."""

    def __init__(self, folder: Path, policy_id: bytes, dtype: DTypeLike) -> None:
        self.folder = folder
        self.policy_id = policy_id
        self.hits = 0
        self.misses = 0
        self.messages: list[str] = []
        self._dtype = np.dtype(dtype)
        self._unsaved: dict[bytes, np.ndarray] = {}
        self._unsaved_bytes = 0
        self._reported: set[int] = set()  # shards of whose damage the user was told
        self._open_folder()

    def __len__(self) -> int:
        """Return the number of values on disk."""
        return len(self._heads)

    @property
    def shards(self) -> list[str]:
        """Names of the files in use."""
        return [path.name for path in self._paths]

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the values of a key, (values,), or None if they are missing or damaged."""
        if key in self._unsaved:
            return self._unsaved[key]
        head = np.uint64(int.from_bytes(key[:8], "big"))
        first, last = self._heads.searchsorted(head, "left"), self._heads.searchsorted(head, "right")
        for record in reversed(range(first, last)):
            start, length, shard = self._places[record].item()
            values = self._read(shard, start, length, key, check=not self._checked[record])
            if values is not None:
                self._checked[record] = self.CHECKS_ONCE
                return values
            if shard not in self._reported:
                self._reported.add(shard)
                self.messages.append(f"{self._paths[shard]} is damaged; values that it lost are computed again")
        return None

    def put(self, key: bytes, values: np.ndarray) -> None:
        """Keep values, (values,), until they are flushed; they must not be changed afterwards."""
        self._unsaved[key] = values
        self._unsaved_bytes += values.nbytes

    def flush_if_large(self) -> None:
        """Flush what takes much memory, once all values of a pack are put.

        A run that is killed then finds all values of a pack or none, and computes it in the layout of an unbroken run.
        """
        if self._unsaved_bytes > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was put since the last flush as one shard.

        Raises:
            UserError: if it cannot be written, a full disk included.
        """
        if not self._unsaved:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        _write_shard(path, self._unsaved, self.policy_id)
        self._unsaved, self._unsaved_bytes = {}, 0
        self._open_shards([path])

    def find_new_shards(self) -> None:
        """Open the shards that other processes have written to the folder since."""
        known = set(self._paths)
        self._open_shards([path for path in sorted(self.folder.glob("*.safetensors")) if path not in known])

    def verify(self) -> None:
        """Read every value once and set aside the files that hold a damaged one."""
        for shard, path in enumerate(self._paths):
            places = self._places[self._places["shard"] == shard]
            sizes = HEAD_BYTES + places["length"].astype(np.int64) * self._dtype.itemsize
            if not _is_sound(path, places["start"], places["start"] + sizes):
                self._set_aside(path, "a value's checksum does not match")
        self._open_folder()

    def _open_folder(self) -> None:
        self._paths: list[Path] = []
        self._heads = np.empty(0, np.uint64)  # (records,) first eight bytes of the keys, sorted
        self._places = np.empty(0, PLACE)  # (records,)
        self._checked = np.empty(0, bool)  # (records,)
        self._reported.clear()
        self._open_shards(sorted(self.folder.glob("*.safetensors")))

    def _open_shards(self, paths: list[Path]) -> None:
        """Merge the shards' indexes into one, so that a look-up does not slow down with the number of shards."""
        heads, places, num_known = [self._heads], [self._places], len(self._heads)
        for path in paths:
            try:
                more_heads, more_places = _read_index(path, len(self._paths), self._dtype.itemsize)
            except FileNotFoundError:
                continue  # another run has just set it aside
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
            except SafetensorError:
                self._set_aside(path, "cut short, or not of safetensors")
                continue
            except ValueError as error:
                self._set_aside(path, str(error))
                continue
            self._paths.append(path)
            heads.append(more_heads)
            places.append(more_places)
        joined = np.concatenate(heads)
        order = np.argsort(joined, kind="stable")  # takes linear time where two sorted runs follow each other
        self._heads, self._places = joined[order], np.concatenate(places)[order]
        self._checked = np.pad(self._checked, (0, len(joined) - num_known))[order]

    def _set_aside(self, path: Path, reason: str) -> None:
        damaged = path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):  # another run was faster
            path.rename(damaged)
        self.messages.append(
            f"{path} is damaged ({reason}); set aside as {damaged.name}, what it held is computed again"
        )

    def _read(self, shard: int, start: int, length: int, key: bytes, *, check: bool) -> np.ndarray | None:
        """Read the values of a record; None if it is damaged or another key's, or if its file is gone or cut short.

        The file is read by position, because reading a memory map of one that was cut short kills the process. It is
        opened each time, because a cache may have more shards than a process may hold open.
        """
        head, values = bytearray(HEAD_BYTES), np.empty(length, self._dtype)
        try:
            with self._paths[shard].open("rb", buffering=0) as file:
                num_read = os.preadv(file.fileno(), [head, values.data], start)
        except OSError:
            return None
        if num_read != HEAD_BYTES + values.nbytes or head[:KEY_BYTES] != key:
            return None
        return values if not check or head[KEY_BYTES:] == _checksum(key, values.data) else None


def _is_sound(path: Path, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Read a shard and return whether the records between ``starts`` and ``ends`` agree with their checksums."""
    try:
        data = memoryview(path.read_bytes())
    except OSError:
        return False
    records = (data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
    return all(record[KEY_BYTES:HEAD_BYTES] == _checksum(record[:KEY_BYTES], record[HEAD_BYTES:]) for record in records)


def _write_shard(path: Path, values: dict[bytes, np.ndarray], policy_id: bytes) -> None:
    keys = sorted(values)
    records = [b"".join((key, _checksum(key, values[key].data), values[key].data)) for key in keys]
    sizes = np.array([len(record) for record in records], np.int64)
    index = {
        "heads": np.array([int.from_bytes(key[:8], "big") for key in keys], np.uint64),
        "starts": np.cumsum(sizes) - sizes,
        "lengths": np.array([values[key].size for key in keys], np.int32),
    }
    metadata = {"crc32": _index_checksum(**index), "policy": policy_id.decode()}
    with written_whole(path) as file:
        file.write(save({**index, "records": np.frombuffer(b"".join(records), np.uint8)}, metadata))


def _read_index(path: Path, shard: int, value_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the heads and places of a shard's records; ValueError or SafetensorError if the file is damaged."""
    with safe_open(path, "np") as file:
        heads, starts, lengths = (file.get_tensor(name) for name in ("heads", "starts", "lengths"))
        crc32 = (file.metadata() or {}).get("crc32")
    if crc32 != _index_checksum(heads, starts, lengths):
        raise ValueError("its checksum does not match")
    num_bytes = starts[-1] + HEAD_BYTES + lengths[-1].astype(np.int64) * value_bytes
    places = np.empty(len(heads), PLACE)
    places["start"] = starts + path.stat().st_size - num_bytes  # safetensors puts the smallest dtype, the records, last
    places["length"], places["shard"] = lengths, shard
    return heads, places


def _checksum(key: bytes | memoryview, values: memoryview) -> bytes:
    return zlib.crc32(values, zlib.crc32(key)).to_bytes(4, "little")


def _index_checksum(heads: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> str:
    return str(zlib.crc32(heads.tobytes() + starts.tobytes() + lengths.tobytes()))
