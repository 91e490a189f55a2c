"""Loading with online quantization: slab by slab from the memory map to the device, as FP8.

BF16 exists for a few slabs at a time: each is quantized on the device and written in its place in
a stack that was allocated once.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from jaxquant import blocked
from jaxquant.array import QuantizedArray, nbytes
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError
from jaxquant.models.layers import Stack
from jaxquant.models.registry import places
from jaxquant.report import QuantReport, TensorReport
from jaxquant.tree import error_norms

# Small enough that float32 copies of a few slabs stay small, large enough to be worth a call.
SLAB_ELEMENTS = 4 * 1024 * 1024
_IN_FLIGHT = 2


def load(
    folder: CheckpointFolder, plan: Plan, dtype: Any, *, progress: bool | None = None
) -> tuple[Any, QuantReport]:
    """Loads the model of a plan.

    Args:
      folder: the checkpoint.
      plan: made from it.
      dtype: of parameters that are not quantized, and of activations.
      progress: whether to show a bar; None shows it on a terminal.

    Returns:
      The family's model with its parameters, and the report.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name.
    """
    dtype = jnp.dtype(dtype)
    model = plan.family.abstract_model(dtype, _stacks(plan))
    place_of = places(model, {item.name: item.slot for item in plan.items})
    entries = []
    bar = tqdm(
        total=sum(folder.info(item.name).nbytes for item in plan.items),
        unit="B",
        unit_scale=True,
        desc=f"Loading {folder.path.name}",
        disable=None if progress is None else not progress,
        leave=False,
    )
    queue: collections.deque[_Slab] = collections.deque()
    tally = Tally()

    def settle(slab: _Slab) -> None:  # waits for the device, which bounds what is in flight
        tally.add(*jax.device_get(slab.outcome))
        bar.update(slab.nbytes)
        if slab.last:
            kept_dtype = jnp.dtype(place_of[slab.item.name].param.get_value().dtype)
            if not tally.finite:
                as_dtype = "" if slab.item.config else f" as {kept_dtype.name}"
                raise CheckpointError(
                    f"{folder.shard_of(slab.item.name)}: tensor {slab.item.name} holds NaN or Inf"
                    + as_dtype
                )
            entries.append(tensor_report(folder, slab.item, kept_dtype, tally.relative_error()))
            tally.clear()
            folder.release(slab.item.name)

    with bar:
        for item in plan.items:
            place = place_of[item.name]
            value = place.param.get_value()
            if isinstance(value, jax.ShapeDtypeStruct):
                value = _allocate(value, item.config, dtype)
            for rows, last in row_slabs(item):
                piece, row = _read(folder, item, rows, dtype), place.row + rows.start
                value, *outcome = _store(
                    value, piece, place.index, row, _numerics(item.config), dtype
                )
                queue.append(_Slab(item, outcome, nbytes(piece), last))
                if len(queue) > _IN_FLIGHT:
                    settle(queue.popleft())
            place.param.set_value(value)
        while queue:
            settle(queue.popleft())
    return model, QuantReport((*entries, *skipped_reports(folder, plan)))


@dataclasses.dataclass(frozen=True)
class _Slab:
    item: Item
    outcome: Any  # on the device: finite, norm of the error, norm
    nbytes: int
    last: bool


class Tally:
    """Outcomes of a tensor's slabs."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self.finite, self.squares = True, None

    def add(self, finite: Any, error: Any, norm: Any) -> None:
        """Adds a slab: whether it is finite, and the norms of its error and of itself, or None."""
        self.finite &= bool(finite)
        if error is not None:
            new = np.square([float(error), float(norm)])
            self.squares = new if self.squares is None else self.squares + new

    def relative_error(self) -> float | None:
        """Of all slabs; None if it was not measured."""
        if self.squares is None:
            return None
        error, norm = np.sqrt(self.squares)
        return float(error / norm) if norm else float(error)


def row_slabs(item: Item) -> Iterator[tuple[slice, bool]]:
    """Row ranges of a tensor, whole blocks each, and whether it is the last."""
    rows, step = item.slot.shape[0], item.slot.shape[0]
    if len(item.slot.shape) == 2:
        block = 1 if item.config is None else item.config.weight_block_size[0]
        step = max(1, SLAB_ELEMENTS // (item.slot.shape[1] * block)) * block
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), start + step >= rows


def _stacks(plan: Plan) -> list[Stack]:
    """Runs of layers in which the same parameters are quantized."""
    layers: dict[int, list[Item]] = {}
    for item in plan.items:
        if item.slot.layer is not None:
            layers.setdefault(item.slot.layer, []).append(item)
    alignment = 1 if plan.config is None else plan.config.weight_block_size[0]
    stacks = []
    for _, run in itertools.groupby(
        layers, key=lambda l: [(item.slot.path, item.config) for item in layers[l]]
    ):
        first, *others = run
        numbers = range(first, first + len(others) + 1)
        stacks.append(Stack(numbers, row_alignment=alignment, separate=_mixed(layers[first])))
    return stacks


def _mixed(layer: list[Item]) -> frozenset[str]:
    """The fused products of which some weights are quantized and some are kept."""
    configs: dict[str, set] = {}
    for item in layer:
        if item.slot.product is not None and len(item.slot.shape) == 2:
            configs.setdefault(item.slot.product, set()).add(item.config)
    return frozenset(product for product, found in configs.items() if len(found) > 1)


def _read(folder: CheckpointFolder, item: Item, rows: slice, dtype: Any) -> Any:
    """Rows of a tensor as they are in the checkpoint; FP8 ones with their scales in float32."""
    piece = folder.read(item.name)[rows]
    if item.scale_name is None:
        return piece
    assert item.config is not None
    bo, bi = item.config.weight_block_size
    scale = folder.read(item.scale_name)[rows.start // bo : -(-rows.stop // bo)]
    return QuantizedArray(
        piece,
        scale.astype(np.float32),
        block_size=(bo, bi),
        dtype=dtype,
        activation_scheme=item.config.activation_scheme,
    )


def _allocate(param: jax.ShapeDtypeStruct, config: QuantConfig | None, dtype: Any) -> Any:
    if config is None:
        return jnp.zeros(param.shape, param.dtype)
    grid = grid_shape(param.shape, config.weight_block_size)
    return QuantizedArray(
        jnp.zeros(param.shape, config.fmt_dtype),
        jnp.zeros((*param.shape[:-2], *grid), jnp.float32),
        block_size=config.weight_block_size,
        dtype=dtype,
        activation_scheme=config.activation_scheme,
    )


def _numerics(config: QuantConfig | None) -> QuantConfig | None:
    return None if config is None else config.numerics()


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(4, 5))
def _store(
    param: Any, piece: Any, index: Any, row: Any, config: QuantConfig | None, dtype: Any
) -> tuple[Any, jax.Array, jax.Array | None, jax.Array | None]:
    """The parameter with rows of a tensor in it; whether they are finite; norms of error and rows.

    `index` is of the leading axes of the parameter.
    """
    error = norm = None
    if isinstance(piece, QuantizedArray):
        finite = jnp.isfinite(piece.dequantize(jnp.float32)).all()
    elif config is None:
        piece = piece.astype(param.dtype)  # for which a value may be too large
        finite = jnp.isfinite(piece).all()
    else:
        # The barrier keeps XLA from quantizing again in each fusion that uses the result.
        w, piece = piece, lax.optimization_barrier(blocked.quantize(piece, config))
        piece = dataclasses.replace(piece, dtype=dtype)
        error, norm = error_norms(w, piece)
        # A block's scale is finite exactly when all of its weights are.
        finite = jnp.isfinite(piece.scale).all()
    if not isinstance(piece, QuantizedArray):
        return blocked.put(param, piece, index, row), finite, error, norm
    param = dataclasses.replace(
        param,
        qvalue=blocked.put(param.qvalue, piece.qvalue, index, row),
        scale=blocked.put(param.scale, piece.scale, index, row // param.block_size[0]),
    )
    return param, finite, error, norm


def skipped_reports(folder: CheckpointFolder, plan: Plan) -> Iterator[TensorReport]:
    """The reports of tensors that the model does without."""
    for name in plan.skipped:
        info, reason = folder.info(name), "multi-token prediction: not loaded"
        yield TensorReport(name.replace(".", "/"), info.shape, False, reason, info.nbytes, 0)


def tensor_report(
    folder: CheckpointFolder, item: Item, dtype: np.dtype, error: Any
) -> TensorReport:
    """The report of one tensor; `dtype` is what it has if it is kept."""
    shape, before = item.slot.shape, folder.info(item.name).nbytes
    if item.config is None:
        after = math.prod(shape) * dtype.itemsize
    else:
        after = math.prod(shape) + 4 * math.prod(grid_shape(shape, item.config.weight_block_size))
    return TensorReport(
        path=item.name.replace(".", "/"),
        shape=shape,
        quantized=item.config is not None,
        reason=item.reason,
        bytes_before=before,
        bytes_after=after,
        relative_error=None if error is None else float(error),
    )
