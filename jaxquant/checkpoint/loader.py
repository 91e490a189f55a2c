"""Loading: a stream of slabs, FP8 already, each written in its place on the device.

The place is in a stack of layers that was allocated once.
"""

import contextlib
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.checkpoint.reader import aligned
from jaxquant.checkpoint.stream import skipped_reports, stream
from jaxquant.config import QuantConfig
from jaxquant.models.layers import Stack
from jaxquant.models.registry import places
from jaxquant.report import QuantReport


def load(
    folder: CheckpointFolder, plan: Plan, dtype: Any, *, progress: bool | None = None
) -> tuple[Any, QuantReport]:
    """Loads the tensors of a plan, each read once and nothing else.

    Args:
      folder: the checkpoint.
      plan: made from it. What a plan of some layers (`Plan.only`) leaves out stays abstract.
      dtype: of parameters that are not quantized, and of activations.
      progress: whether to show a bar; None shows it on a terminal.

    Returns:
      The family's model with its parameters, and the report.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name; a file that cannot be read, or changes.
    """
    dtype = jnp.dtype(dtype)
    model = plan.family.abstract_model(dtype, _stacks(plan))
    place_of = places(model, {item.name: item.slot for item in plan.items})
    # A router's correction bias stays float32, whatever the model is in.
    dtypes = {name: jnp.dtype(place.param.get_value().dtype) for name, place in place_of.items()}
    total = sum(folder.info(item.name).nbytes for item in plan.items)
    entries = []
    with (
        Progress(f"Loading {folder.path.name}", total, progress) as bar,
        contextlib.closing(stream(folder, plan.items, dtypes, bar)) as slabs,
    ):
        for slab in slabs:
            place = place_of[slab.item.name]
            param = place.param.get_value()
            if isinstance(param, jax.ShapeDtypeStruct):
                param = _allocate(param, slab.item.config, dtype)
            with bar.stage("place"):
                param = _put(param, slab.value, place.index, place.row + slab.rows.start)
            place.param.set_value(param)
            if slab.report is not None:
                entries.append(slab.report)
        for param in {id(place.param): place.param for place in place_of.values()}.values():
            param.set_value(jax.device_put(param.get_value()))
        entries += skipped_reports(folder, plan)
        return model, QuantReport(tuple(entries), bar.timing())


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


def _allocate(param: jax.ShapeDtypeStruct, config: QuantConfig | None, dtype: Any) -> Any:
    # A CPU device takes numpy's memory as it is, in the end. Until then it is simply written to:
    # XLA:CPU copies all of a stack of float8 to change a part of it.
    zeros = _host_zeros if jax.default_backend() == "cpu" else jnp.zeros
    if config is None:
        return zeros(param.shape, jnp.dtype(param.dtype))
    grid = grid_shape(param.shape, config.weight_block_size)
    return QuantizedArray(
        zeros(param.shape, config.fmt_dtype),
        zeros((*param.shape[:-2], *grid), jnp.dtype(jnp.float32)),
        block_size=config.weight_block_size,
        dtype=dtype,
        activation_scheme=config.activation_scheme,
    )


def _host_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return aligned(math.prod(shape) * dtype.itemsize, np.zeros).view(dtype).reshape(shape)


def _put(param: Any, rows: Any, index: tuple[int, ...], row: int) -> Any:
    """The parameter with rows of a tensor in it; `index` is of its leading axes."""
    if not isinstance(param, QuantizedArray):
        return _put_rows(param, rows, index, row)
    return dataclasses.replace(
        param,
        qvalue=_put_rows(param.qvalue, rows.qvalue, index, row),
        scale=_put_rows(param.scale, rows.scale, index, row // param.block_size[0]),
    )


def _put_rows(array: Any, rows: jax.Array, index: tuple[int, ...], row: int) -> Any:
    if isinstance(array, np.ndarray):
        target = array[index]
        # As bytes: numpy copies elements of other packages' dtypes one by one.
        target[row : row + len(rows)].view(np.uint8)[:] = np.asarray(rows).view(np.uint8)
        return array
    return jax.block_until_ready(_put_on_device(array, rows, index, row))


_put_on_device = jax.jit(blocked.put, donate_argnums=0)
