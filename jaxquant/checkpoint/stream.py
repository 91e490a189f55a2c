"""Tensors of a checkpoint as a stream of slabs, quantized on the device.

A slab is some rows of a tensor. Several threads read slabs, move them to the device and quantize
them there; they come out in the order of the plan. So the disk, the link to the device and the
device all have work, and what is in memory is a few slabs, whatever the size of the model.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.pipeline import ordered
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError
from jaxquant.report import TensorReport
from jaxquant.tree import error_norms


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
    # One thread gives an H200 8 GB/s from pageable memory, 8 to 16 give 23 to 27.
    return Lanes(max(8, min(cores, 16)), 16 * 1024 * 1024)


@dataclasses.dataclass(frozen=True)
class Slab:
    """Rows of a tensor as they are kept.

    Attributes:
      item: the tensor.
      rows: which; whole blocks of a matrix that is or becomes FP8.
      value: they, on the device.
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
) -> Generator[Slab]:
    """The slabs of some tensors, in order.

    Close it (`contextlib.closing`): its threads end then.

    Args:
      folder: the checkpoint.
      items: the tensors.
      dtypes: by name, what a tensor becomes, or, if it is quantized, computes in; None leaves
        them as they are.
      progress: told of every slab.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name; a file that cannot be read.
    """

    def dtype_of(item: Item) -> np.dtype | None:
        return None if dtypes is None else dtypes[item.name]

    def work(task: tuple[Item, slice, bool]) -> tuple[Any, np.ndarray, int]:
        item, rows, _ = task
        dtype = dtype_of(item)
        with progress.stage("read"):
            piece = _read(folder, item, rows, dtype)
        with progress.stage("transfer"):
            piece = jax.block_until_ready(jax.device_put(piece))
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(piece))
        with progress.stage("convert" if item.config is None else "quantize"):
            value, outcome = _convert(piece, _numerics(item), dtype)
            return value, np.asarray(outcome), nbytes

    tasks = [(item, *task) for item in items for task in row_slabs(item)]
    threads = lanes().threads
    tally = _Tally()
    with contextlib.closing(ordered(work, tasks, threads=threads, ahead=2 * threads)) as results:
        for (item, rows, last), (value, outcome, nbytes) in zip(tasks, results, strict=True):
            tally.add(outcome)
            report = None
            if last:
                _check_finite(folder, item, tally, dtype_of(item))
                report = _report(folder, item, dtype_of(item), tally.relative_error())
                tally = _Tally()
            progress.advance(nbytes, item.name)
            yield Slab(item, rows, value, report)


def row_slabs(item: Item) -> list[tuple[slice, bool]]:
    """Row ranges of a tensor of about equal size, whole blocks each; whether it is the last."""
    if len(item.slot.shape) != 2:
        return [(slice(0, math.prod(item.slot.shape[:1])), True)]
    rows, columns = item.slot.shape
    block = 1 if item.config is None else item.config.weight_block_size[0]
    count = max(1, round(rows * columns / lanes().slab_elements))
    step = -(-rows // (count * block)) * block
    starts = range(0, max(rows, 1), max(step, 1))
    return [(slice(start, min(start + step, rows)), start == starts[-1]) for start in starts]


def _read(folder: CheckpointFolder, item: Item, rows: slice, dtype: Any) -> Any:
    """Rows of a tensor as they are in the checkpoint; FP8 ones with their scales in float32."""
    piece = folder.read_rows(item.name, rows)
    if item.scale_name is None:
        return piece
    assert item.config is not None
    bo, bi = item.config.weight_block_size
    scale = folder.read_rows(item.scale_name, slice(rows.start // bo, -(-rows.stop // bo)))
    return QuantizedArray(
        piece,
        scale.astype(np.float32),
        block_size=(bo, bi),
        dtype=dtype,
        activation_scheme=item.config.activation_scheme,
    )


def _numerics(item: Item) -> QuantConfig | None:
    return None if item.config is None else item.config.numerics()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(piece: Any, config: QuantConfig | None, dtype: Any) -> tuple[Any, jax.Array]:
    """A slab as it is kept; whether it is finite and, if quantized, norms of error and slab."""
    if isinstance(piece, QuantizedArray):
        return piece, _all_finite(piece.dequantize(jnp.float32))[None]
    if config is None:
        piece = piece if dtype is None else piece.astype(dtype)  # which may have no such value
        return piece, _all_finite(piece)[None]
    # The barrier keeps XLA from quantizing again in each fusion that uses the result.
    qa = lax.optimization_barrier(blocked.quantize(piece, config))
    # A block's scale is finite exactly when all of its weights are.
    outcome = jnp.stack([_all_finite(qa.scale), *error_norms(piece, qa)])
    return qa if dtype is None else dataclasses.replace(qa, dtype=dtype), outcome


def _all_finite(x: jax.Array) -> jax.Array:
    # 0 * x is NaN exactly where x is not finite; XLA:CPU vectorizes sums, unlike `all`.
    return jnp.isfinite(jnp.sum(0 * x.astype(jnp.float32))).astype(jnp.float32)


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


def _report(folder: CheckpointFolder, item: Item, dtype: Any, error: float | None) -> TensorReport:
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
