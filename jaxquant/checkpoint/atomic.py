"""Folders that appear whole or not at all, and files whose content is on the disk.

Everything is written into a hidden sibling, `.<name>.jaxquant-partial`, which takes the
destination's place in one rename when it is complete. Whoever stops the process at whatever moment
finds at the destination what was there before, or the whole new folder. (Where the system cannot
swap two folders in one step, replacing one takes two renames, and both folders exist whole under
hidden names in between.)
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from jaxquant.errors import CheckpointError

JOB_NAME = ".job"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSYNCED_BYTES = 64 * 2**20


@contextmanager
def partial_folder(
    directory: Path, digest: str, resume: bool, disk: "DiskErrors"
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
            _remove(partial)
        raise
    else:
        _remove(partial)
    finally:
        os.close(lock)


def _take_over(partial: Path, digest: str, resume: bool, directory: Path) -> None:
    """Leave what an earlier run of the same job finished, or nothing."""
    job = partial / JOB_NAME
    found = job.read_text() if job.exists() else None
    if resume and found == digest:
        return
    if resume and found is not None:
        raise CheckpointError(
            f"{directory}: the unfinished run beside it was another one (source, config or shard "
            "size); repeat that one, or start anew without resume (--resume)"
        )
    _clear(partial)
    with durable(job.with_suffix(".new")) as target:
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


def _remove(folder: Path) -> None:
    with suppress(OSError):
        (folder / "config.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    # First, so that whoever is stopped meanwhile leaves no checkpoint that lacks files.
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose content is on the disk when the context ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Brings the names in a folder to the disk."""
    with suppress(OSError):  # some network file systems refuse this
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into_place(partial: Path, directory: Path) -> None:
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


class Syncer:
    """Brings a file to the disk while it is written, and out of the page cache.

    So there is no long wait at the end, and an export larger than the memory does not drive out
    what others keep there. On leaving without an exception, all is on the disk.
    """

    def __init__(self, descriptor: int, disk: "DiskErrors"):
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

    def __enter__(self) -> "Syncer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._pool:
            if error is None:
                self._wait()
                with self._disk:
                    self._sync()


def write_at(file: FileIO, offset: int, data: bytes | memoryview) -> None:
    """Writes all of `data` at a place of a file."""
    file.seek(offset)
    rest = memoryview(data)
    while rest:  # one call writes 2 GiB at most
        rest = rest[file.write(rest) :]


class DiskErrors:
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
