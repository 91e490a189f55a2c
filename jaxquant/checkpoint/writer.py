"""Write checkpoint folders of safetensors files, a few rows of a tensor in memory at a time.

The folder appears whole or not at all: see `atomic`. While it is written a shard has its own name
when it is complete and on the disk, so that a later run can go on from there; what remains of a run
that nobody continues is removed by the next one.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.checkpoint.atomic import (
    JOB_NAME,
    DiskErrors,
    Syncer,
    durable,
    move_into_place,
    partial_folder,
    sync_directory,
    write_at,
)
from jaxquant.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from jaxquant.checkpoint.reader import SafetensorsFile, TensorInfo, brief
from jaxquant.checkpoint.shard_files import (
    DEFAULT_SHARD_BYTES,
    Shard,
    TensorSource,
    deal_out,
    index_of,
)
from jaxquant.errors import CheckpointError


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
    shards = deal_out(tensors, max_shard_bytes)
    small_files = {INDEX_NAME: _to_json(index_of(shards))} if len(shards) > 1 else {}
    try:
        small_files[CONFIG_NAME] = _to_json(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: not JSON: {error}") from error
    _check_names(files, [*small_files, *(shard.file_name for shard in shards)])
    _check_destination(directory, overwrite)

    disk = DiskErrors(directory)
    with disk:
        directory.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{job}\n".encode() + small_files[CONFIG_NAME])
    for shard in shards:
        digest.update(shard.header)
    with partial_folder(directory, digest.hexdigest(), resume, disk) as partial:
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
                with file.open("rb") as source, durable(partial / file.name) as target:
                    shutil.copyfileobj(source, target)
                shutil.copymode(file, partial / file.name)
        _verify(partial, shards)
        with disk:
            # config.json comes last: until then nothing takes the folder for a checkpoint, and
            # from then on nothing takes it for the rest of an unfinished run.
            (partial / JOB_NAME).unlink()
            for name, content in small_files.items():
                with durable(partial / name) as target:
                    target.write(content)
            sync_directory(partial)
        _check_destination(directory, overwrite)  # again: writing may have taken hours
        with disk:
            move_into_place(partial, directory)
            sync_directory(directory.parent)
    return directory


def _is_finished(path: Path, shard: Shard) -> bool:
    """Whether an earlier run wrote this shard: its name is its own only when all is on disk."""
    if not path.exists() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_names(files: list[Path], own_names: list[str]) -> None:
    taken = set(own_names)
    for file in files:
        if file.name in taken:
            raise CheckpointError(f"{file}: another file of the folder has that name")
        taken.add(file.name)


def _check_destination(directory: Path, overwrite: bool) -> None:
    with DiskErrors(directory):
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
    shard: Shard,
    disk: "DiskErrors",
    on_tensor: Callable[[TensorSource], None] | None,
) -> None:
    """Write one shard, each tensor at its place in the order in which they come."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with disk:
        file = unfinished.open("wb", buffering=0)
    with file, Syncer(file.fileno(), disk) as syncer:
        with disk:
            write_at(file, 0, shard.header)
        for source in shard.sources:
            _write_tensor(file, shard.infos[source.name], source, disk, syncer)
            if on_tensor is not None:
                on_tensor(source)
    with disk:
        unfinished.rename(path)
        sync_directory(path.parent)


def _write_tensor(
    file: FileIO, info: TensorInfo, source: TensorSource, disk: "DiskErrors", syncer: "Syncer"
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
            write_at(file, offset, np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        offset += piece.nbytes
        syncer.wrote(piece.nbytes)
    if offset != info.stop:
        raise _another(info, info.dtype, (rows, *info.shape[1:]))


def _another(info: TensorInfo, dtype: np.dtype, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor {brief(info.name)}: announced as {info.dtype} {list(info.shape)}, "
        f"came as {dtype} {list(shape)}"
    )


def _verify(partial: Path, shards: list[Shard]) -> None:
    """Read every header back and hold it against the plan."""
    for shard in shards:
        with SafetensorsFile(partial / shard.file_name) as file:
            if file.tensors != shard.infos:
                raise CheckpointError(f"{file.path}: does not read back as it was written")
