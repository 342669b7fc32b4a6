"""Files of small float arrays found by key: read one by one, each with its own checksum.

A shard is a safetensors file. What is held in memory is where each array lies, 24 bytes apiece.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from vapr.cache import written_whole

KEY_BYTES = 16
HEAD_BYTES = KEY_BYTES + 4
"""The key and the checksum stand before a record's values."""


class Index:
    """Where values lie, sorted by the first eight bytes of their keys."""

    def __init__(self, heads: np.ndarray, shards: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.heads = heads  # uint64
        self._shards, self._starts, self._lengths = shards, starts, lengths  # int32, int64, int32

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.heads, self._shards, self._starts, self._lengths

    def places(self, key: bytes) -> list[tuple[int, int, int]]:
        """(shard, start of the record, number of values) of the records whose keys begin like ``key``."""
        head = np.frombuffer(key[:8], ">u8")[0]
        first = int(np.searchsorted(self.heads, head, "left"))
        places = []
        while first < len(self.heads) and self.heads[first] == head:
            places.append((int(self._shards[first]), int(self._starts[first]), int(self._lengths[first])))
            first += 1
        return places


class Shard:
    """A file of records: key, checksum, values. It is read by position, so that a file cut short is no crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            if not 0 < header_length <= path.stat().st_size:
                raise ValueError("no safetensors header")
            self._header = json.loads(file.read(header_length))
        self._data = 8 + header_length
        try:
            end = max(entry["data_offsets"][1] for name, entry in self._header.items() if name != "__metadata__")
            self._crc32 = self._header["__metadata__"]["crc32"]
            self._records = self._data + self._header["records"]["data_offsets"][0]
        except (AttributeError, TypeError, KeyError):
            raise ValueError("not a shard") from None
        if self._data + end != path.stat().st_size:
            raise ValueError("cut short")

    def index(self, number: int) -> Index:
        """Where its values lie. Raises ValueError if the checksum of that is wrong."""
        heads, starts, lengths = (
            np.frombuffer(self._bytes(name), dtype)
            for name, dtype in (("heads", "<u8"), ("starts", "<i8"), ("lengths", "<i4"))
        )
        if str(_checksum(heads, starts, lengths)) != self._crc32:
            raise ValueError("its checksum does not match")
        return Index(heads, np.full(len(heads), number, np.int32), starts, lengths)

    def sound(self, index: Index) -> bool:
        """Whether every record agrees with its checksum; the whole file is read for that."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._records)
                for _, _, _, length in zip(*index.columns(), strict=True):
                    record = file.read(HEAD_BYTES + 4 * int(length))
                    if _head(record[:KEY_BYTES], record[HEAD_BYTES:]) != record[:HEAD_BYTES]:
                        return False
        except OSError:
            return False
        return True

    def _bytes(self, name: str) -> bytes:
        begin, end = self._header[name]["data_offsets"]
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), end - begin, self._data + begin)

    def read(self, key: bytes, start: int, length: int) -> np.ndarray | None:
        """The values of a record, (tokens,) fp32; None if it is another key's, damaged or gone."""
        try:
            with self.path.open("rb") as file:  # opened each time: a cache has more shards than a process may hold open
                record = os.pread(file.fileno(), HEAD_BYTES + 4 * length, self._records + start)
        except OSError:
            return None
        values = record[HEAD_BYTES:]
        if len(values) != 4 * length or record[:HEAD_BYTES] != _head(key, values):
            return None
        return np.frombuffer(values, np.float32)


def write_shard(path: Path, values: dict[bytes, np.ndarray], reference: str) -> None:
    """Write values by key as one file, sorted by key."""
    keys = sorted(values)
    records = []
    for key in keys:
        data = values[key].astype("<f4").tobytes()
        records.append(_head(key, data) + data)
    sizes = np.array([len(record) for record in records], np.int64)
    tensors = {
        "heads": np.array([int.from_bytes(key[:8], "big") for key in keys], np.uint64),
        "starts": np.cumsum(sizes) - sizes,
        "lengths": ((sizes - HEAD_BYTES) // 4).astype(np.int32),
        "records": np.frombuffer(b"".join(records), np.uint8),
    }
    checksum = _checksum(tensors["heads"], tensors["starts"], tensors["lengths"])
    with written_whole(path) as file:
        file.write(save(tensors, {"crc32": str(checksum), "reference": reference}))


def _head(key: bytes, values: bytes) -> bytes:
    return key + zlib.crc32(key + values).to_bytes(4, "little")


def _checksum(*arrays: np.ndarray) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value
