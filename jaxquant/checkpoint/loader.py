"""Loading with online quantization: one tensor at a time from the map to the device, as FP8.

BF16 exists for one tensor at a time: each is quantized on the device and written into its layer
of a stack that was allocated once.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import Item, Plan
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError
from jaxquant.models.registry import get_param
from jaxquant.report import QuantReport, TensorReport
from jaxquant.tree import relative_error


def load(
    folder: CheckpointFolder, plan: Plan, dtype: Any, *, progress: bool | None = None
) -> tuple[Any, QuantReport]:
    """Loads the model of a plan.

    Args:
      folder: the checkpoint.
      plan: made from it.
      dtype: of parameters that are not quantized, and of activations.
      progress: whether to show a bar; None shows it on a terminal or in a notebook.

    Returns:
      The family's model with its parameters, and the report.

    Raises:
      CheckpointError: NaN or Inf in a tensor, by name.
    """
    dtype = jnp.dtype(dtype)
    segments = _segments(plan)
    model = plan.family.abstract_model(dtype, [len(segment) for segment in segments])
    places = _places(plan, segments)
    entries = []
    bar = tqdm(
        total=sum(folder.info(item.name).nbytes for item in plan.items),
        unit="B",
        unit_scale=True,
        desc=f"Loading {folder.path.name}",
        disable=None if progress is None else not progress,
        leave=False,
    )
    with bar:
        for _, group in itertools.groupby(plan.items, key=lambda item: item.slot.layer):
            pending = []
            for item in group:
                path, index = places[item.name]
                param = get_param(model, path)
                value, finite, error = _load_tensor(folder, item, param.get_value(), index, dtype)
                param.set_value(value)
                pending.append((item, finite, error))
            for item, finite, error in pending:  # waits, which bounds what is in flight
                if not finite:
                    raise CheckpointError(
                        f"{folder.shard_of(item.name)}: tensor {item.name} holds NaN or Inf"
                    )
                entries.append(tensor_report(folder, item, dtype, error))
                folder.release(item.name)
                bar.update(folder.info(item.name).nbytes)
    return model, QuantReport(tuple(entries))


def read_quantized(folder: CheckpointFolder, item: Item) -> tuple[np.ndarray, np.ndarray]:
    """The qvalue and the float32 scale of a tensor that is FP8 in the checkpoint."""
    assert item.scale_name is not None
    return folder.read(item.name), folder.read(item.scale_name).astype(np.float32)


def _segments(plan: Plan) -> list[range]:
    """Runs of layers in which the same parameters are quantized: each becomes one stack."""
    layers = {}
    for item in plan.items:
        if item.slot.layer is not None:
            layers.setdefault(item.slot.layer, []).append((item.slot.path, item.config))
    segments = []
    for _, run in itertools.groupby(layers, key=layers.__getitem__):
        run = list(run)
        segments.append(range(run[0], run[-1] + 1))
    return segments


def _places(plan: Plan, segments: list[range]) -> dict[str, tuple[str, int | None]]:
    """Name -> path of the parameter in the model, and index in its stack."""
    places = {}
    for item in plan.items:
        path, layer = item.slot.path, item.slot.layer
        if layer is None:
            places[item.name] = (path, None)
        else:
            s = next(i for i, segment in enumerate(segments) if layer in segment)
            places[item.name] = (f"layers/{s}/{path}", layer - segments[s].start)
    return places


def _load_tensor(
    folder: CheckpointFolder, item: Item, param: Any, index: int | None, dtype: Any
) -> tuple[Any, Any, Any]:
    """The parameter with this tensor in it, whether the tensor is finite, and its error."""
    if item.scale_name is not None:
        assert item.config is not None
        qvalue, scale = read_quantized(folder, item)
        value = QuantizedArray(
            qvalue,
            scale,
            block_size=item.config.weight_block_size,
            dtype=dtype,
            activation_scheme=item.config.activation_scheme,
        )
    else:
        value = folder.read(item.name)
    config = None if item.config is None else item.config.numerics()
    stack = None
    if index is not None:
        fresh = isinstance(param, jax.ShapeDtypeStruct)
        stack = _empty_stack(value, param.shape[0], config, dtype) if fresh else param
    return _store(stack, value, index, config, dtype)


def _empty_stack(value: Any, L: int, config: QuantConfig | None, dtype: Any) -> Any:
    one = jax.eval_shape(lambda v: _convert(v, config, dtype)[0], value)
    return jax.tree.map(lambda x: jnp.zeros((L, *x.shape), x.dtype), one)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _store(
    stack: Any, value: Any, index: Any, config: QuantConfig | None, dtype: Any
) -> tuple[Any, jax.Array, jax.Array | None]:
    value, finite, error = _convert(value, config, dtype)
    if stack is not None:
        value = jax.tree.map(lambda s, v: blocked.put_layer(s, v, index), stack, value)
    return value, finite, error


def _convert(
    value: Any, config: QuantConfig | None, dtype: Any
) -> tuple[Any, jax.Array, jax.Array | None]:
    """What the model holds for a checkpoint's tensor, whether it is finite, its relative error."""
    if isinstance(value, QuantizedArray):
        unit = value.dequantize(jnp.float32)
        return value, jnp.isfinite(unit).all(), None
    if config is None:
        return value.astype(dtype), jnp.isfinite(value).all(), None
    qa = blocked.quantize(value, config)
    error = relative_error(value, qa)
    # A block's scale is finite exactly when all of its weights are.
    return dataclasses.replace(qa, dtype=dtype), jnp.isfinite(qa.scale).all(), error


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
