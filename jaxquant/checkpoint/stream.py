"""Tensors of a checkpoint as a stream of slabs, quantized on the device.

A slab is some rows of a tensor. Several threads read slabs, move them to the device, quantize
them there and put them in their place; they come out in the order of the tensors. So the disk, the
link to the device and the device all have work, and what is in memory is a few slabs, whatever the
size of the model.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.buffers import HostBuffers
from jaxquant.checkpoint.convert import converted
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.pipeline import ordered
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.checkpoint.target import Destination, Part, Strip
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError
from jaxquant.report import TensorReport


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How wide the stream is.

    Attributes:
      threads: that read, transfer and quantize.
      slab_elements: of a slab, about.
    """

    threads: int
    slab_elements: int


@functools.cache
def lanes() -> Lanes:
    """What suits the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if jax.default_backend() == "cpu":
        # XLA runs cheap programs on one core each. Their temporaries, 10 bytes per element, stay
        # in the cache, and under the size from which malloc asks the kernel for pages each time.
        return Lanes(min(cores, 16), 1024 * 1024)
    # On an H200 with 16 cores 12 threads read as fast as 16 do, 20 GB/s; slabs of half the size
    # load at 16, as all threads share what a slab costs Python and the driver.
    return Lanes(max(8, min(cores, 12)), 32 * 1024 * 1024)


@dataclasses.dataclass(frozen=True)
class Slab:
    """Rows of a tensor as they are kept.

    Attributes:
      item: the tensor.
      rows: which; whole blocks of a matrix that is or becomes FP8.
      value: they, on the device; None if they are in their place.
      report: of the tensor, with its last slab.
    """

    item: Item
    rows: slice
    value: Any
    report: TensorReport | None


def stream(
    folder: CheckpointFolder,
    items: Sequence[Item],
    dtypes: Mapping[str, np.dtype] | None,
    progress: Progress,
    places: Mapping[str, Destination] | None = None,
) -> Generator[Slab]:
    """The slabs of some tensors, in order.

    Close it (`contextlib.closing`): its threads end then.

    Args:
      folder: the checkpoint.
      items: the tensors.
      dtypes: by name, what a tensor becomes, or, if it is quantized, computes in; None leaves
        them as they are.
      progress: told of every slab.
      places: by name, where a tensor goes; only what is held there is read. None has the slabs
        themselves come out, whole rows on the default device.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name; a file that cannot be read.
    """

    def dtype_of(item: Item) -> np.dtype | None:
        return None if dtypes is None else dtypes[item.name]

    def place_of(item: Item) -> Destination | None:
        return None if places is None else places[item.name]

    def work(task: tuple[Item, Strip, bool]) -> tuple[Any, list[np.ndarray], int]:
        item, strip, _ = task
        dtype, place = dtype_of(item), place_of(item)
        with buffers.take() as buffer:
            with progress.stage("read"):
                piece = _read(folder, item, strip, dtype, buffer)
            with progress.stage("transfer"):
                # The numbers of where rows go come with them: later they would wait for other
                # slabs to be transferred.
                copies = [
                    jax.device_put(
                        (_columns(piece, strip, part), place and place.start(device, strip.rows)),
                        device,
                    )
                    for part, device in strip.holders
                ]
                jax.block_until_ready(copies)
        value, outcomes = None, []
        with progress.stage("convert" if item.config is None else "quantize"):
            for (part, device), (rows, start) in zip(strip.holders, copies, strict=True):
                if place is None:
                    value, outcome = converted(rows, _numerics(item), dtype)
                else:
                    outcome = place.put(device, rows, start, _numerics(item), dtype)
                if device is part.devices[0]:  # the others have the same
                    outcomes.append(outcome)
            outcomes = jax.device_get(outcomes)
        return value, outcomes, sum(leaf.nbytes for leaf in jax.tree.leaves(piece))

    tasks = [(item, *task) for item in items for task in slabs(item, place_of(item))]
    largest = max((_nbytes(folder, item, strip) for item, strip, _ in tasks), default=0)
    threads = lanes().threads
    if places is not None and jax.default_backend() != "cpu":
        _compile(folder, tasks, places, dtype_of)
    with (
        HostBuffers(largest) as buffers,
        contextlib.closing(ordered(work, tasks, threads=threads, ahead=2 * threads)) as results,
    ):
        tally = _Tally()
        for (item, strip, last), (value, outcomes, nbytes) in zip(tasks, results, strict=True):
            for outcome in outcomes:
                tally.add(outcome)
            report = None
            if last:
                _check_finite(folder, item, tally, dtype_of(item))
                report = tensor_report(folder, item, dtype_of(item), tally.relative_error())
                tally = _Tally()
            progress.advance(nbytes, item.name)
            yield Slab(item, strip.rows, value, report)


def slabs(item: Item, place: Destination | None = None) -> list[tuple[Strip, bool]]:
    """What is wanted of a tensor, cut into slabs of about equal size; whether it is the last.

    A slab of a matrix is whole blocks. Without a place all of the tensor is wanted.
    """
    shape = item.slot.shape
    if place is None:
        strips = [Strip(slice(0, math.prod(shape[:1])), (Part(slice(None), (None,)),))]
    else:
        strips = place.strips(shape)
    cut = [dataclasses.replace(strip, rows=rows) for strip in strips for rows in _cut(item, strip)]
    return [(slab, slab is cut[-1]) for slab in cut]


def _cut(item: Item, strip: Strip) -> list[slice]:
    if len(item.slot.shape) != 2:
        return [strip.rows]
    block = 1 if item.config is None else item.config.weight_block_size[0]
    start, stop = strip.rows.start, strip.rows.stop
    blocks = -(-(stop - start) // block)
    width = len(range(item.slot.shape[1])[strip.columns])
    count = max(1, round((stop - start) * width / lanes().slab_elements))
    # Slabs of one size, if a few more of them are: each size is compiled for.
    count = next((n for n in range(count, 2 * count) if blocks % n == 0), count)
    step = max(1, -(-blocks // count)) * block
    return [slice(row, min(row + step, stop)) for row in range(start, max(stop, start + 1), step)]


def _read(folder: CheckpointFolder, item: Item, strip: Strip, dtype: Any, out: Any) -> Any:
    """A strip of a tensor as it is in the checkpoint; of an FP8 one with its scales in float32."""
    piece = folder.read_rows(item.name, strip.rows, strip.columns, out=out)
    if item.scale_name is None:
        return piece
    assert item.config is not None
    bo, bi = item.config.weight_block_size
    rows, columns = _blocks(strip.rows, bo), _blocks(strip.columns, bi)
    scale = folder.read_rows(item.scale_name, rows, columns)
    return _stored(item, piece, scale.astype(np.float32), dtype)


def _abstract(folder: CheckpointFolder, item: Item, strip: Strip, part: Part, dtype: Any) -> Any:
    """The shapes and dtypes of a part of a strip, as it is read."""
    shape = item.slot.shape
    if len(shape) == 2:
        rows, columns = (
            range(n)[s] for n, s in zip(shape, (strip.rows, part.columns), strict=True)
        )
        shape = len(rows), len(columns)
    piece = jax.ShapeDtypeStruct(shape, folder.info(item.name).dtype)
    if item.scale_name is None:
        return piece
    assert item.config is not None
    grid = grid_shape(shape, item.config.weight_block_size)
    return _stored(item, piece, jax.ShapeDtypeStruct(grid, jnp.float32), dtype)


def _stored(item: Item, qvalue: Any, scale: Any, dtype: Any) -> QuantizedArray:
    assert item.config is not None
    return QuantizedArray(
        qvalue,
        scale,
        block_size=item.config.weight_block_size,
        dtype=dtype,
        activation_scheme=item.config.activation_scheme,
    )


def _nbytes(folder: CheckpointFolder, item: Item, strip: Strip) -> int:
    """Of a strip in the checkpoint, without its scales."""
    whole = Part(strip.columns, ())
    piece = jax.tree.leaves(_abstract(folder, item, strip, whole, None))[0]
    return math.prod(piece.shape) * piece.dtype.itemsize


def _columns(piece: Any, strip: Strip, part: Part) -> Any:
    """The columns of a strip that a part has."""
    if part.columns == strip.columns:
        return piece
    first = strip.columns.start
    columns = slice(part.columns.start - first, part.columns.stop - first)
    if not isinstance(piece, QuantizedArray):
        return piece[:, columns]
    scale = piece.scale[:, _blocks(columns, piece.block_size[1])]
    return dataclasses.replace(piece, qvalue=piece.qvalue[:, columns], scale=scale)


def _blocks(numbers: slice, block: int) -> slice:
    """The blocks of these rows or columns, which begin with a block."""
    if numbers == slice(None):
        return numbers
    return slice(numbers.start // block, -(-numbers.stop // block))


def _compile(
    folder: CheckpointFolder,
    tasks: Sequence[tuple[Item, Strip, bool]],
    places: Mapping[str, Destination],
    dtype_of: Callable[[Item], Any],
) -> None:
    """Compiles what the tasks run side by side; in its turn each would keep the others waiting."""
    programs = {}
    for item, strip, _ in tasks:
        place, dtype = places[item.name], dtype_of(item)
        for part, device in strip.holders:
            rows = _abstract(folder, item, strip, part, dtype)
            key = place.target, device, jax.tree.leaves(rows)[0].shape
            programs[key] = place, device, rows, _numerics(item), dtype
    with ThreadPoolExecutor(lanes().threads, thread_name_prefix="jaxquant") as pool:
        for program in [pool.submit(place.compile, *rest) for place, *rest in programs.values()]:
            program.result()


def _numerics(item: Item) -> QuantConfig | None:
    return None if item.config is None else item.config.numerics()


class _Tally:
    """Outcomes of a tensor's slabs."""

    def __init__(self):
        self.finite, self._squares = True, np.zeros(0)

    def add(self, outcome: np.ndarray) -> None:
        finite, *norms = outcome
        self.finite &= bool(finite)
        squares = np.square(np.array(norms, np.float64))
        self._squares = self._squares + squares if self._squares.size else squares

    def relative_error(self) -> float | None:
        """Of all slabs; None if it was not measured."""
        if not self._squares.size:
            return None
        error, norm = np.sqrt(self._squares)
        return float(error / norm) if norm else float(error)


def _check_finite(folder: CheckpointFolder, item: Item, tally: _Tally, dtype: Any) -> None:
    if not tally.finite:
        cast = "" if item.config or dtype is None else f" as {dtype.name}"
        raise CheckpointError(
            f"{folder.shard_of(item.name)}: tensor {item.name} holds NaN or Inf{cast}"
        )


def tensor_report(
    folder: CheckpointFolder, item: Item, dtype: Any, error: float | None
) -> TensorReport:
    """What becomes of a tensor.

    Args:
      folder: that it is in.
      item: the tensor.
      dtype: that it is converted to; None leaves it.
      error: relative, if it was measured.
    """
    info = folder.info(item.name)
    if item.config is None:
        after = math.prod(info.shape) * (dtype or info.dtype).itemsize
    else:
        grid = grid_shape(info.shape, item.config.weight_block_size)
        after = math.prod(info.shape) + 4 * math.prod(grid)
    return TensorReport(
        path=item.name.replace(".", "/"),
        shape=info.shape,
        quantized=item.config is not None,
        reason=item.reason,
        bytes_before=info.nbytes,
        bytes_after=after,
        relative_error=error,
    )


def skipped_reports(folder: CheckpointFolder, plan: Plan) -> Iterator[TensorReport]:
    """The reports of tensors that the model does without."""
    for name in plan.skipped:
        info, reason = folder.info(name), "multi-token prediction: not loaded"
        yield TensorReport(name.replace(".", "/"), info.shape, False, reason, info.nbytes, 0)
