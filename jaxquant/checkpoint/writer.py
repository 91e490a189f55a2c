"""Write checkpoint folders of safetensors files, a few rows of a tensor in memory at a time.

Everything is written into a hidden sibling, `.<name>.jaxquant-partial`, which takes the
destination's place in one rename when it is complete. Whoever stops the process at whatever moment
finds at the destination what was there before, or the whole new folder. (Where the system cannot
swap two folders in one step, replacing one takes two renames, and both folders exist whole under
hidden names in between.)

In the sibling, a shard has its own name when it is complete and on the disk, so that a later run
can go on from there; what remains of a run that nobody continues is removed by the next one.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
_JOB_NAME = ".job"
_UNSYNCED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: dtype and shape known beforehand, the values made by `read()` in its turn.

    `read().dtype == dtype` and `read().shape == shape`; anything `np.asarray` takes will do. An
    iterator gives the tensor in pieces, some rows each.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor, in one piece or in those that `read` gives."""
        # What `read` returns lives in this expression alone, and is gone before the next is made.
        values = self.read()
        return map(np.asarray, values if isinstance(values, Iterator) else iter((values,)))


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
    job: str | None = None,
    resume: bool = False,
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
        job: what the values of the tensors follow from. Shards of an earlier run count as done
            only if it wrote the same tensors for the same job.
        resume: go on where an earlier run stopped, and if this one fails, leave what it finished.

    Raises `CheckpointError` if the destination is taken or being written, the disk has not the
    space, or a tensor is not of the dtype or shape announced. Whatever is raised, the destination
    is as it was before.
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
    digest = hashlib.sha256(f"{job}\n".encode() + small_files[CONFIG_NAME])
    for shard in shards:
        digest.update(shard.header)
    with _partial_folder(directory, digest.hexdigest(), resume, disk) as partial:
        # In order: tensors come as a stream, from the first that is missing to the last.
        rest = list(itertools.dropwhile(lambda s: _is_finished(partial / s.file_name, s), shards))
        with disk:
            disk.needed = sum(shard.nbytes for shard in rest)
            disk.needed += sum(map(len, small_files.values()))
            disk.needed += sum(file.stat().st_size for file in files)
            free = shutil.disk_usage(directory.parent).free
        if disk.needed > free:
            raise CheckpointError(
                f"{directory}: needs {disk.needed} bytes, {free} are free on its disk"
            )
        for shard in rest:
            _write_shard(partial / shard.file_name, shard, disk, on_tensor)
        with disk:
            for file in files:
                with file.open("rb") as source, _durable(partial / file.name) as target:
                    shutil.copyfileobj(source, target)
                shutil.copymode(file, partial / file.name)
        _verify(partial, shards)
        with disk:
            # config.json comes last: until then nothing takes the folder for a checkpoint, and
            # from then on nothing takes it for the rest of an unfinished run.
            (partial / _JOB_NAME).unlink()
            for name, content in small_files.items():
                with _durable(partial / name) as target:
                    target.write(content)
            _sync_directory(partial)
        _check_destination(directory, overwrite)  # again: writing may have taken hours
        with disk:
            _move_into_place(partial, directory)
            _sync_directory(directory.parent)
    return directory


@contextmanager
def _partial_folder(
    directory: Path, digest: str, resume: bool, disk: "_DiskErrors"
) -> Iterator[Path]:
    """Make the folder that everything is written into, or take over the one that is there.

    It is this process's alone meanwhile. In the end what has its name is removed: the unfinished
    folder, unless it is to be resumed, or the checkpoint that was replaced.
    """
    partial = directory.with_name(f".{directory.name}.jaxquant-partial")
    with disk:
        lock = _lock(partial)
    try:
        with disk:
            _take_over(partial, digest, resume, directory)
        yield partial
    except BaseException:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    else:
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _take_over(partial: Path, digest: str, resume: bool, directory: Path) -> None:
    """Leave what an earlier run of the same job finished, or nothing."""
    job = partial / _JOB_NAME
    found = job.read_text() if job.exists() else None
    if resume and found == digest:
        return
    if resume and found is not None:
        raise CheckpointError(
            f"{directory}: the unfinished run beside it was another one (source, config or shard "
            "size); repeat that one, or start anew without resume (--resume)"
        )
    _clear(partial)
    with _durable(job.with_suffix(".new")) as target:
        target.write(digest.encode())
    job.with_suffix(".new").rename(job)


def _lock(folder: Path) -> int:
    """Make a folder if there is none, and return its locked descriptor."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(ModuleNotFoundError):
                _flock(descriptor, folder)
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner finished meanwhile, and moved or removed it


def _flock(descriptor: int, folder: Path) -> None:
    import fcntl  # not on every system

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"{folder}: another process is writing here; let it finish, or end it"
        ) from None
    except OSError:  # some network file systems refuse this
        pass


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_finished(path: Path, shard: _Shard) -> bool:
    """Whether an earlier run wrote this shard: its name is its own only when all is on disk."""
    if not path.exists() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


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
    unfinished = path.with_name(f"{path.name}.unfinished")
    with disk:
        file = unfinished.open("wb", buffering=0)
    with file, _Syncer(file.fileno(), disk) as syncer:
        with disk:
            _write_at(file, 0, shard.header)
        for source in shard.sources:
            _write_tensor(file, shard.infos[source.name], source, disk, syncer)
            if on_tensor is not None:
                on_tensor(source)
    with disk:
        unfinished.rename(path)
        _sync_directory(path.parent)


def _write_tensor(
    file: FileIO, info: TensorInfo, source: TensorSource, disk: "_DiskErrors", syncer: "_Syncer"
) -> None:
    offset, rows = info.start, 0
    for piece in source.pieces():
        rows += piece.shape[0] if piece.ndim else 0
        if piece.dtype != info.dtype or piece.shape[1:] != info.shape[1:]:
            raise _another(info, piece.dtype, piece.shape)
        if offset + piece.nbytes > info.stop or piece.ndim != len(info.shape):
            raise _another(info, piece.dtype, (rows, *piece.shape[1:]))
        with disk:
            # As bytes: the buffer protocol knows no bfloat16.
            _write_at(file, offset, np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        offset += piece.nbytes
        syncer.wrote(piece.nbytes)
    if offset != info.stop:
        raise _another(info, info.dtype, (rows, *info.shape[1:]))


def _another(info: TensorInfo, dtype: np.dtype, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor {brief(info.name)}: announced as {info.dtype} {list(info.shape)}, "
        f"came as {dtype} {list(shape)}"
    )


class _Syncer:
    """Brings a file to the disk while it is written, and out of the page cache.

    So there is no long wait at the end, and an export larger than the memory does not drive out
    what others keep there. On leaving without an exception, all is on the disk.
    """

    def __init__(self, descriptor: int, disk: "_DiskErrors"):
        self._descriptor, self._disk = descriptor, disk
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxquant-sync")
        self._running: Future[None] | None = None
        self._unsynced = 0

    def wrote(self, nbytes: int) -> None:
        """Counts; starts to sync when there is enough, after the sync before has ended."""
        self._unsynced += nbytes
        if self._unsynced >= _UNSYNCED_BYTES:
            self._wait()
            self._running = self._pool.submit(self._sync)
            self._unsynced = 0

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        if self._running is not None:
            with self._disk:
                self._running.result()

    def __enter__(self) -> "_Syncer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._pool:
            if error is None:
                self._wait()
                with self._disk:
                    self._sync()


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
    """Open a file whose content is on the disk when the context ends."""
    with path.open("wb") as file:
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
