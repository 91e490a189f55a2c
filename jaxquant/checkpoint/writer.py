"""Write checkpoint folders of safetensors files, one tensor in memory at a time.

Everything is written into a hidden sibling, `.<name>.partial-<random>`, which takes the
destination's place in one rename when it is complete. Whoever stops the process at whatever moment
finds at the destination what was there before, or the whole new folder. (Where the system cannot
swap two folders in one step, replacing one takes two renames, and both folders exist whole under
hidden names in between.)
"""

import ctypes
import errno
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxquant.checkpoint.folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from jaxquant.checkpoint.reader import (
    DTYPE_NAMES,
    SafetensorsFile,
    TensorInfo,
    brief,
)
from jaxquant.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 1024**3
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: dtype and shape known beforehand, the values made by `read()` in its turn.

    `read().dtype == dtype` and `read().shape == shape`; anything `np.asarray` takes will do.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Shard:
    file_name: str
    sources: tuple[TensorSource, ...]
    header: bytes  # with its length in front
    infos: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(source.nbytes for source in self.sources)


def write_folder(
    directory: str | os.PathLike,
    tensors: Iterable[TensorSource],
    *,
    config: Mapping[str, Any],
    files: Iterable[Path] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_tensor: Callable[[TensorSource], None] | None = None,
) -> Path:
    """Write a Hugging Face style checkpoint folder and return its path.

    Args:
        directory: the folder to make; it may exist if it is empty.
        tensors: in the order in which their `read` is called; shards are filled in that order.
        config: the content of config.json.
        files: files to copy in under their own names, see `CheckpointFolder.other_files`.
        max_shard_bytes: how many bytes of tensors a shard holds at most, but for a single tensor
            that is larger.
        overwrite: replace a checkpoint that is there already, as a whole, at the very end.
            A folder without a config.json is no checkpoint and is never replaced.
        on_tensor: called after each tensor is written, for progress.

    Raises `CheckpointError` if the destination is taken, the disk has not the space, or a tensor is
    not of the dtype or shape announced. Whatever is raised, the destination is as it was before.
    """
    directory = Path(directory).expanduser().resolve()
    files = [Path(file) for file in files]
    shards = _plan(tensors, max_shard_bytes)
    small_files = {INDEX_NAME: _to_json(_index(shards))} if len(shards) > 1 else {}
    try:
        small_files[CONFIG_NAME] = _to_json(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: not JSON: {error}") from error
    _check_names(files, [*small_files, *(shard.file_name for shard in shards)])
    _check_destination(directory, overwrite)

    disk = _DiskErrors(directory)
    with disk:
        directory.parent.mkdir(parents=True, exist_ok=True)
        disk.needed = sum(shard.nbytes for shard in shards)
        disk.needed += sum(map(len, small_files.values()))
        disk.needed += sum(file.stat().st_size for file in files)
        free = shutil.disk_usage(directory.parent).free
    if disk.needed > free:
        raise CheckpointError(
            f"{directory}: needs {disk.needed} bytes, {free} are free on its disk"
        )

    partial = directory.with_name(f".{directory.name}.partial-{secrets.token_hex(4)}")
    try:
        with disk:
            partial.mkdir()
        for shard in shards:
            _write_shard(partial / shard.file_name, shard, disk, on_tensor)
        with disk:
            for file in files:
                with file.open("rb") as source, _durable(partial / file.name) as target:
                    shutil.copyfileobj(source, target)
        _verify(partial, shards)
        with disk:
            # config.json comes last: until then nothing takes the folder for a checkpoint.
            for name, content in small_files.items():
                with _durable(partial / name) as target:
                    target.write(content)
            _sync_directory(partial)
        _check_destination(directory, overwrite)  # again: writing may have taken hours
        with disk:
            _move_into_place(partial, directory)
            _sync_directory(directory.parent)
    finally:
        # What has this name by now: the unfinished folder, or the one that was replaced.
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _plan(tensors: Iterable[TensorSource], max_shard_bytes: int) -> list[_Shard]:
    """Deal the tensors out to shards, in order, and lay each shard out."""
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    seen: set[str] = set()
    groups: list[list[TensorSource]] = []
    filled = 0
    for source in tensors:
        _check_source(source, seen)
        seen.add(source.name)
        if not groups or filled + source.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.nbytes
    if not groups:
        raise CheckpointError("no tensors to write")
    if len(groups) == 1:
        return [_lay_out(WEIGHTS_NAME, groups[0])]
    count = len(groups)
    return [
        _lay_out(f"model-{i:05}-of-{count:05}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _check_source(source: TensorSource, seen: set[str]) -> None:
    where = f"tensor {brief(source.name)}"
    if source.name in seen:
        raise CheckpointError(f"{where}: two tensors of that name")
    if source.name == "__metadata__":
        raise CheckpointError(f"{where}: the name is reserved by the safetensors format")
    if source.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{where}: dtype {source.dtype} has no place in safetensors, allowed are "
            f"{', '.join(str(dtype) for dtype in DTYPE_NAMES)}"
        )


def _lay_out(file_name: str, sources: Sequence[TensorSource]) -> _Shard:
    """Give every tensor its place: the wide dtypes first, so that all are aligned."""
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for source in sorted(sources, key=lambda source: -source.dtype.itemsize):
        header[source.name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": [int(size) for size in source.shape],
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    infos = {}
    for source in sources:
        begin, end = header[source.name]["data_offsets"]
        infos[source.name] = TensorInfo(
            source.name, source.dtype, tuple(source.shape), start + begin, start + end
        )
    return _Shard(file_name, tuple(sources), len(text).to_bytes(8, "little") + text, infos)


def _index(shards: list[_Shard]) -> dict[str, Any]:
    file_of = {name: shard.file_name for shard in shards for name in shard.infos}
    total = sum(source.nbytes for shard in shards for source in shard.sources)
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file_of[name] for name in sorted(file_of)},
    }


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_names(files: list[Path], own_names: list[str]) -> None:
    taken = set(own_names)
    for file in files:
        if file.name in taken:
            raise CheckpointError(f"{file}: another file of the folder has that name")
        taken.add(file.name)


def _check_destination(directory: Path, overwrite: bool) -> None:
    with _DiskErrors(directory):
        if not directory.exists():
            return
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: a file of that name is in the way")
        if not any(directory.iterdir()):
            return
        is_checkpoint = (directory / CONFIG_NAME).is_file()
    if not overwrite:
        raise CheckpointError(
            f"{directory}: not empty; choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    if not is_checkpoint:
        raise CheckpointError(
            f"{directory}: not empty and no checkpoint (no {CONFIG_NAME}), so never overwritten; "
            f"choose another folder"
        )


def _write_shard(
    path: Path,
    shard: _Shard,
    disk: "_DiskErrors",
    on_tensor: Callable[[TensorSource], None] | None,
) -> None:
    """Write one shard, each tensor at its place in the order in which they come."""
    with disk:
        file = path.open("xb", buffering=0)
    with file:
        with disk:
            _write_at(file, 0, shard.header)
        for source in shard.sources:
            # The values live in this expression alone: gone before the next ones are made.
            _write_tensor(file, shard.infos[source.name], source, disk)
            if on_tensor is not None:
                on_tensor(source)
        with disk:
            os.fsync(file.fileno())


def _write_tensor(
    file: FileIO, info: TensorInfo, source: TensorSource, disk: "_DiskErrors"
) -> None:
    values = np.asarray(source.read())
    if values.dtype != info.dtype or values.shape != info.shape:
        raise CheckpointError(
            f"tensor {brief(info.name)}: announced as {info.dtype} {list(info.shape)}, "
            f"came as {values.dtype} {list(values.shape)}"
        )
    with disk:
        # As bytes: the buffer protocol knows no bfloat16.
        _write_at(file, info.start, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _write_at(file: FileIO, offset: int, data: bytes | memoryview) -> None:
    file.seek(offset)
    rest = memoryview(data)
    while rest:  # one call writes 2 GiB at most
        rest = rest[file.write(rest) :]


def _verify(partial: Path, shards: list[_Shard]) -> None:
    """Read every header back and hold it against the plan."""
    for shard in shards:
        with SafetensorsFile(partial / shard.file_name) as file:
            if file.tensors != shard.infos:
                raise CheckpointError(f"{file.path}: does not read back as it was written")


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """Open a new file whose content is on the disk when the context ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some network file systems refuse this
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_into_place(partial: Path, directory: Path) -> None:
    """Give `partial` the name `directory`; what was there, if anything, is then at `partial`."""
    if not directory.exists() or not any(directory.iterdir()):
        os.rename(partial, directory)
        return
    if _exchange(partial, directory):
        return
    old = partial.with_name(f"{partial.name}-replaced")
    try:
        os.rename(directory, old)
        os.rename(partial, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise
    os.rename(old, partial)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step, or return False where the system has no such step."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


class _DiskErrors:
    """Context that turns what the disk raises into a `CheckpointError` with the figures."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.needed = 0

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError):
            return
        message = f"{self.directory}: cannot be written: {error}"
        if error.errno in _DISK_FULL:
            free = shutil.disk_usage(self.directory.parent).free
            message += (
                f"; {self.needed} bytes are needed, {free} are free on the disk "
                f"(a quota or a limit on the size of files may allow less)"
            )
        raise CheckpointError(message) from error
