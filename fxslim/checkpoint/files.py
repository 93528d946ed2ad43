"""Safetensors files without the library: headers read with strict bounds, rows of tensors read with plain reads.

The library maps whole files into memory; what is read through a mapping counts as the process's own. Format: 8 bytes
with the header's length, the header (JSON: name -> dtype, shape, data_offsets), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxslim.errors import StorageError, UnsupportedModelError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER = 100_000_000
"""Longest header that is read, in bytes; the safetensors library has the same limit."""
MAX_INDEX = 100_000_000
MAX_RANK = 16
MAX_SIZE = 1 << 48
"""Largest dimension of a tensor, so that products of a few stay small numbers."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

QUANTIZED = frozenset("F4 F6_E2M3 F6_E3M2 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0".split())
"""Dtypes of quantized weights."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file.
        name: its name there.
        code: its dtype, as safetensors spells it.
        shape: its shape.
        start: where its bytes begin, from the beginning of the file.
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype."""
        return DTYPES[self.code]

    @property
    def bytes(self) -> int:
        """Return how many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Read the tensor, or its rows from ``first`` up to ``last`` along dimension 0.

        Raises:
            StorageError: the file cannot be read, or ends before the tensor does.
        """
        shape = self.shape if last is None else (last - first, *self.shape[1:])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(shape) * self.dtype.itemsize
        buffer = torch.empty(count, dtype=torch.uint8)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + first * row)
                view, done = buffer.numpy().data, 0
                while done < count:
                    got = file.readinto(view[done:])
                    if not got:
                        raise StorageError(f"{self.file} ends inside {self.name}: it was cut short; fetch it again.")
                    done += got
        except OSError as error:
            raise _unreadable(self.file, error) from error
        return buffer.view(self.dtype).reshape(shape)


@dataclass(frozen=True)
class Shard:
    """A safetensors file: where it is, what it holds, and its free-form metadata."""

    file: Path
    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(stored.bytes for stored in self.tensors)


def read_shard(file: Path) -> Shard:
    """Read a safetensors file's header.

    Raises:
        StorageError: the file is missing, cut short, or its header is not one: wrong length or JSON, an unknown dtype,
            repeated names, tensors that overlap, leave holes or lie outside the file.
        UnsupportedModelError: a tensor is quantized.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            prefix = opened.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise _broken(file, f"its header would be {length} bytes long, the file is {size}")
            text = opened.read(length)
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is no JSON ({_short(error)})") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "its metadata are not text by name")
    begin = 8 + length
    entries = [(name, *_entry(file, name, entry)) for name, entry in header.items()]
    tensors, at = [], 0
    for name, code, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        stored = Stored(file, name, code, shape, begin + first)
        if first != at or last - first != stored.bytes:
            raise _broken(file, f"{_short(name)} is at bytes {first} to {last}, which does not fit its shape or place")
        tensors.append(stored)
        at = last
    if begin + at != size:
        raise StorageError(
            f"{file} has {size} bytes, its header says {begin + at}: it was cut short or added to; fetch it again."
        )
    return Shard(file, tuple(tensors), metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice")
    return made


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape and place of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"{_short(name)} does not say exactly dtype, shape and data_offsets")
    code, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(code, str) and code in QUANTIZED:
        raise UnsupportedModelError(
            f"{file} holds {_short(name)} in {code}: its weights are quantized, and fxslim takes nothing out of those. "
            "Narrow the model in 16 or 32 bits, and quantize the result."
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise _broken(file, f"{_short(name)} has dtype {_short(code)}, of which fxslim knows nothing")
    numbers = all(isinstance(part, list) and all(_whole(one) for one in part) for part in (shape, place))
    if not numbers or len(place) != 2 or len(shape) > MAX_RANK:
        raise _broken(file, f"shape or place of {_short(name)} are not lists of whole numbers")
    return code, tuple(shape), place[0], place[1]


def _whole(one: Any) -> bool:
    return type(one) is int and 0 <= one < MAX_SIZE


def _short(what: object) -> str:
    text = ascii(what if not isinstance(what, Exception) else str(what))
    return text if len(text) <= 80 else f"{text[:77]}…"


def _unreadable(file: Path, error: OSError) -> StorageError:
    """Return what to raise; what is said already is said once."""
    return (
        error if isinstance(error, StorageError) else StorageError(f"{file} cannot be read: {error.strerror or error}.")
    )


def _broken(file: Path, why: str) -> StorageError:
    return StorageError(f"{file} is no valid safetensors file: {why}. Fetch or write it again.")


def header_of(tensors: Iterator[Stored] | tuple[Stored, ...], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a file that holds tensors in this order, up to the first one's bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for stored in tensors:
        place = [at, at + stored.bytes]
        entries[stored.name] = {"dtype": stored.code, "shape": list(stored.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """Read the headers of all weight files of a checkpoint.

    Raises:
        StorageError: the folder holds no safetensors weights, a shard is missing, or a file or the index is broken.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    if not (folder / WEIGHTS).is_file():
        raise StorageError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; weights of another kind are loaded with transformers and "
            "saved with save_pretrained first."
        )
    return (read_shard(folder / WEIGHTS),)


def _indexed(folder: Path, index: Path) -> tuple[Shard, ...]:
    if index.stat().st_size > MAX_INDEX:
        raise StorageError(f"{index} is larger than {MAX_INDEX} bytes: it is no index of tensors.")
    try:
        weight_map = json.loads(index.read_bytes().decode("utf-8"), object_pairs_hook=_once)["weight_map"]
        names = dict.fromkeys(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{index} is no index of tensors: {_short(error)}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise StorageError(f"{index} names the file {_short(name)}, which is no safetensors file beside it.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise StorageError(f"{folder} lacks {', '.join(missing[:5])}, which {INDEX} names; fetch the checkpoint again.")
    shards = tuple(read_shard(folder / name) for name in sorted(names))
    found = [(stored.name, shard.file.name) for shard in shards for stored in shard.tensors]
    if dict(found) != weight_map or len(found) != len(weight_map):
        strange = [name for name, file in found if weight_map.get(name) != file]
        strange += sorted(weight_map.keys() - dict(found).keys())
        raise StorageError(f"{index} and the shards do not agree about {', '.join(map(_short, strange[:5]))}.")
    return shards
