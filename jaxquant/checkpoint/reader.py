"""Read safetensors files: the header checked to the letter, tensors as views of a memory map.

The `safetensors` package cannot hand FP8 tensors to numpy, so the file is parsed here. The checks
are a superset of that package's: a file refused there is refused here.

Format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without
holes or overlaps up to the end of the file. Elements are little-endian, tensors row-major.
"""

import json
import math
import mmap
import os
import reprlib
import stat
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxquant.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""The format's dtype names and the numpy dtypes that hold them."""

DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The inverse of `DTYPES`."""

# Several elements to the byte, where ml_dtypes keeps one: such a tensor is listed, never read.
_PACKED_DTYPES: dict[str, tuple[np.dtype, int]] = {
    "F4": (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    "F6_E2M3": (np.dtype(ml_dtypes.float6_e2m3fn), 6),
    "F6_E3M2": (np.dtype(ml_dtypes.float6_e3m2fn), 6),
}
_BITS: dict[str, tuple[np.dtype, int]] = {
    name: (dtype, 8 * dtype.itemsize) for name, dtype in DTYPES.items()
} | _PACKED_DTYPES
_PACKED = frozenset(dtype for dtype, _ in _PACKED_DTYPES.values())

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 64  # numpy's own limit
_LFS_POINTER = b"version https://git-lfs"

brief = reprlib.Repr(maxstring=200, maxother=80).repr
"""`repr`, on one line and cut short: values out of a bad file may be of any size."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: bytes `start:stop`, counted from the beginning of the file.

    `nbytes == stop - start == prod(shape) * dtype.itemsize`, but for the packed dtypes F4 and F6,
    whose bytes are fewer.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The size in bytes on disk."""
        return self.stop - self.start


class SafetensorsFile:
    """A safetensors file, checked and memory-mapped read-only on construction.

    `tensors` maps each name to its `TensorInfo`, in the header's order; `metadata` is the header's
    `__metadata__`, empty where there is none. Raises `CheckpointError` for a file that is missing,
    truncated or breaks the format in any way.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._fd, mapped = _open(self.path)
        self._closer = weakref.finalize(self, os.close, self._fd)
        self._opened_as = _identity(self._fd)
        data_start = _header_stop(self.path, mapped)
        header = _parse_json(self.path, mapped[8:data_start])
        self.metadata = _parse_metadata(self.path, header.pop("__metadata__", {}))
        self.tensors = {
            name: _parse_tensor(self.path, name, entry, data_start)
            for name, entry in header.items()
        }
        _check_text(self.path, [*self.tensors, *self.metadata, *self.metadata.values()])
        _check_layout(self.path, self.tensors, data_start, len(mapped))
        self._map: mmap.mmap | None = mapped
        self._bytes: np.ndarray | None = np.frombuffer(mapped, np.uint8)

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name` as a read-only view of the map: nothing is copied or read ahead.

        The view stays valid after `close`, which frees the map once the last view is gone.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: no tensor {brief(name)} among its {len(self.tensors)}"
            )
        if info.dtype in _PACKED:
            raise CheckpointError(
                f"{self.path}: tensor {brief(name)}: packed dtype {info.dtype} cannot be read; "
                f"use a checkpoint in BF16, F16, F32 or FP8"
            )
        if self._bytes is None:
            raise CheckpointError(f"{self.path}: tensor {brief(name)}: read after close()")
        return self._bytes[info.start : info.stop].view(info.dtype).reshape(info.shape)

    def read_rows(
        self,
        name: str,
        rows: slice,
        columns: slice = slice(None),
        *,
        flat: bool = False,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return rows of tensor `name`, or some columns of them.

        With `flat` the tensor counts as a matrix of as many columns, its other axes as one.

        They are read, not mapped: a disk that fails, or a file that someone truncates or writes to
        meanwhile, is a `CheckpointError` here, where a map would end the process or mix old and
        new. A scalar has one row. Any number of threads may read at once.

        Args:
          name: of the tensor.
          rows: which, by numbers.
          columns: which of a matrix; no other bytes are read.
          flat: see above.
          out: bytes to read into, as many or more; None takes memory of its own, aligned to 64.
        """
        info = self.tensors[name]
        whole = info.shape
        if flat and len(whole) > 1:
            whole = (math.prod(whole[:-1]), whole[-1])
        start, stop, _ = rows.indices(whole[0] if whole else 1)
        shape = (stop - start, *whole[1:]) if whole else ()
        pitch = math.prod(whole[1:]) * info.dtype.itemsize
        offset, lines = info.start + start * pitch, 1  # whole rows are one line
        if len(whole) == 2 and len(taken := range(whole[1])[columns]) < whole[1]:
            shape = (stop - start, len(taken))
            offset, lines = offset + taken.start * info.dtype.itemsize, stop - start
        nbytes = math.prod(shape) * info.dtype.itemsize
        out = aligned(nbytes, np.empty) if out is None else out[:nbytes]
        try:
            self._read_into(out.reshape(lines, -1) if nbytes else out, offset, pitch)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: tensor {brief(name)}: cannot be read: {error}"
            ) from error
        return out.view(info.dtype).reshape(shape)

    def _read_into(self, out: np.ndarray, offset: int, pitch: int) -> None:
        """Fills lines of bytes, each of which begins `pitch` after the one before it."""
        if not self._closer.alive:
            raise CheckpointError(f"{self.path}: read after close()")
        complete = True
        for i, line in enumerate(out):
            rest, position = memoryview(line), offset + i * pitch
            while rest and (count := os.preadv(self._fd, [rest], position)):  # 2 GiB at most
                rest, position = rest[count:], position + count
            complete &= not rest
        if not complete or _identity(self._fd) != self._opened_as:
            raise CheckpointError(
                f"{self.path}: changed while it was read (it had {self._opened_as[0]} bytes, and "
                f"has {_identity(self._fd)[0]}); let its writer finish, and start again"
            )

    def close(self) -> None:
        """Let go of the map and the file; `tensors` and `metadata` stay."""
        self._map = self._bytes = None
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def aligned(nbytes: int, make: Callable[[int, Any], np.ndarray]) -> np.ndarray:
    """Bytes of `np.empty` or `np.zeros` that start at a multiple of 64.

    These a CPU device takes as they are: `jax.device_put` copies nothing.
    """
    buffer = make(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes]


def _open(path: Path) -> tuple[int, mmap.mmap]:
    """Return the file's descriptor, and the file as a read-only map of at least 8 bytes."""
    fd = -1
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: a directory, not a safetensors file")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: not a regular file")
        fd = os.open(path, os.O_RDONLY)
        return fd, _map(path, fd)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{path}: no such file") from None
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        raise


def _map(path: Path, fd: int) -> mmap.mmap:
    size = os.fstat(fd).st_size
    if size == 0:
        raise CheckpointError(f"{path}: truncated: the file is empty; download it again")
    mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    if mapped[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise CheckpointError(
            f"{path}: a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        )
    if size < 8:
        raise CheckpointError(
            f"{path}: truncated: expected at least 8 bytes, the file has {size}; download it again"
        )
    return mapped


def _identity(fd: int) -> tuple[int, int]:
    """What changes when a file is written to."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _header_stop(path: Path, mapped: mmap.mmap) -> int:
    """Return the byte where the header ends and the tensors begin."""
    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: header length {length}, "
            f"at most {MAX_HEADER_BYTES} is allowed"
        )
    stop = 8 + length
    if stop > len(mapped):
        raise CheckpointError(
            f"{path}: truncated: expected at least {stop} bytes for the header, "
            f"the file has {len(mapped)}; download it again"
        )
    if mapped[8:9] != b"{" or length == 0:
        raise CheckpointError(f"{path}: not a safetensors file: the header does not begin with {{")
    return stop


def _parse_json(path: Path, header: bytes) -> dict[str, Any]:
    try:
        return json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            # JSON's -0 is no integer; Python would make it 0.
            parse_int=lambda digits: -0.0 if digits == "-0" else int(digits),
        )
    except RecursionError:
        raise CheckpointError(f"{path}: bad header: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: bad header: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {brief(key)}")
        result[key] = value
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parse_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: bad header: __metadata__ must map strings to strings, got {brief(metadata)}"
        )
    return metadata


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Check one tensor of the header by itself."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: expected an object of dtype, shape and data_offsets, got {brief(entry)}"
        )
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _BITS:
        raise CheckpointError(
            f"{where}: unknown dtype {brief(dtype_name)}, expected one of {', '.join(_BITS)}"
        )
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: shape must be non-negative integers, got {brief(shape)}")
    if len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: {len(shape)} dimensions, at most {_MAX_DIMS} are allowed")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets must be integers [begin, end] with 0 <= begin <= end, "
            f"got {brief(offsets)}"
        )
    dtype, bits = _BITS[dtype_name]
    # Without the zeros, so that a shape like [0, 2**62, 2**62] overflows nobody's arithmetic.
    if math.prod(size for size in shape if size) * bits >= 2**63:
        raise CheckpointError(f"{where}: shape {brief(shape)} is too large")
    begin, end = offsets
    nbytes, odd_bits = divmod(math.prod(shape) * bits, 8)
    if odd_bits or nbytes != end - begin:
        size = f"{nbytes} bytes" + (f" and {odd_bits} bits" if odd_bits else "")
        raise CheckpointError(
            f"{where}: {dtype_name} of shape {brief(shape)} takes {size}, "
            f"data_offsets {offsets} hold {end - begin} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: Any) -> bool:
    # type(), not isinstance(): a bool is an int.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_text(path: Path, texts: list[str]) -> None:
    """Refuse the half surrogates that JSON escapes can spell and UTF-8 cannot."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError(f"{path}: bad header: {brief(text)} is not Unicode") from None


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Check that the tensors fill the file from `data_start` to its end, each byte once."""
    stop = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != stop:
            kind = "overlaps the one before it" if info.start < stop else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {brief(info.name)}: begins at byte {info.start} of the file, "
                f"expected {stop}: it {kind}"
            )
        stop = info.stop
    if stop > size:
        raise CheckpointError(
            f"{path}: truncated: expected {stop} bytes, the file has {size}; download it again"
        )
    if stop < size:
        raise CheckpointError(
            f"{path}: {size - stop} bytes after the last tensor: expected {stop} bytes, "
            f"the file has {size}"
        )
