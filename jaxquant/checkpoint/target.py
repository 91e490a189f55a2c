"""Where tensors go: a parameter while it is loaded, and its shards on this process's devices."""

import dataclasses
import functools
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.convert import COMPILER_OPTIONS, convert, converted
from jaxquant.checkpoint.reader import aligned
from jaxquant.config import QuantConfig
from jaxquant.models.fused import pieces


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of a strip, and who has them.

    Attributes:
      columns: which; all of a tensor that is not a matrix.
      devices: that have them; None is JAX's default device.
    """

    columns: slice
    devices: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Strip:
    """Rows of a tensor that the same devices have.

    Attributes:
      rows: which.
      parts: what each device has of them.
    """

    rows: slice
    parts: tuple[Part, ...]

    @property
    def holders(self) -> list[tuple[Part, Any]]:
        """Every part with each of its devices."""
        return [(part, device) for part in self.parts for device in part.devices]

    @property
    def columns(self) -> slice:
        """Those from the first to the last that some device has."""
        columns = [part.columns for part in self.parts]
        if columns[0] == slice(None):
            return columns[0]
        return slice(min(c.start for c in columns), max(c.stop for c in columns))


class Target:
    """A parameter while it is loaded, zeros at first. Any number of threads may put rows into it.

    Args:
      param: holds shape and dtype, and the arrays after `finish`.
      config: how it is quantized, or None.
      dtype: that it computes in, if it is quantized.
      sharding: over the devices of a mesh, matrices at whole blocks; None puts it on the default
        device.

    Attributes:
      held: by device, the numbers along each axis that it has; None is the default device.
    """

    def __init__(
        self, param: nnx.Param, config: QuantConfig | None, dtype: Any, sharding: Any = None
    ):
        self._param, self._config, self._dtype, self._sharding = param, config, dtype, sharding
        self._abstract = param.get_value()
        shape = self._abstract.shape
        indices = (
            {None: (slice(None),) * len(shape)}
            if sharding is None
            else sharding.addressable_devices_indices_map(shape)
        )
        self.held = {
            device: [range(n)[s] for s, n in zip(index, shape, strict=True)]
            for device, index in indices.items()
        }
        self._shards: dict[Any, Any] = {}
        self._locks = {device: threading.Lock() for device in self.held}

    def put(self, device: Any, rows: Any, start: Any, config: Any, dtype: Any) -> jax.Array:
        """Converts rows, all columns of a device's shard, and writes them from `start` on.

        Args:
          device: that they are on.
          rows: as they are in the checkpoint.
          start: leading axes, and row.
          config: see `convert`.
          dtype: likewise.

        Returns:
          What `convert` says of them.
        """
        with self._locks[device]:
            shard = self._shard(device)
            if not _on_host(shard):
                # The device does it in its own time, in the order in which it is asked to.
                self._shards[device], outcome = _put(shard, rows, start, config, dtype)
                return outcome
        value, outcome = converted(rows, config, dtype)
        _put_on_host(shard, value, np.asarray(start).tolist())
        return outcome

    def compile(self, device: Any, rows: Any, start: Any, config: Any, dtype: Any) -> None:
        """Compiles `put` for arguments of these shapes and dtypes."""
        with self._locks[device]:
            shard = self._shard(device)
        sharding = None if device is None else SingleDeviceSharding(device)
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (shard, rows, start),
        )
        _put.lower(*args, config, dtype).compile()

    def finish(self) -> None:
        """Gives the parameter its arrays."""
        shards = {device: jax.device_put(self._shard(device), device) for device in self.held}
        self._shards.clear()
        if self._sharding is None:
            self._param.set_value(shards[None])
            return
        self._param.set_value(
            jax.tree.map(self._join, self._like(jax.ShapeDtypeStruct), *shards.values())
        )

    def _join(self, whole: jax.ShapeDtypeStruct, *shards: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(whole.shape, self._sharding, list(shards))

    def _shard(self, device: Any) -> Any:
        if device not in self._shards:
            self._shards[device] = self._allocate(device)
        return self._shards[device]

    def _allocate(self, device: Any) -> Any:
        # A CPU device takes numpy's memory as it is, in the end. Until then it is simply written
        # to: XLA:CPU copies all of a stack of float8 to change a part of it.
        zeros = _host_zeros if jax.default_backend() == "cpu" else jnp.zeros
        shape = tuple(map(len, self.held[device]))
        return self._like(functools.partial(zeros, device=device), shape)

    def _like(self, make: Any, shape: tuple[int, ...] | None = None) -> Any:
        """`make(shape, dtype)` of the parameter, or of its values and its scales."""
        shape = self._abstract.shape if shape is None else shape
        if self._config is None:
            return make(shape, jnp.dtype(self._abstract.dtype))
        grid = grid_shape(shape, self._config.weight_block_size)
        return QuantizedArray(
            make(shape, self._config.fmt_dtype),
            make((*shape[:-2], *grid), jnp.dtype(jnp.float32)),
            block_size=self._config.weight_block_size,
            dtype=self._dtype,
            activation_scheme=self._config.activation_scheme,
        )


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where one tensor goes.

    Attributes:
      target: the parameter.
      index: of its leading axes.
      row: the first one.
      group: see `jaxquant.models.fused.pieces`.
    """

    target: Target
    index: tuple[int, ...]
    row: int
    group: tuple[int, int] | None = None

    def strips(self, shape: tuple[int, ...]) -> list[Strip]:
        """What the devices of this process have of the tensor, of this shape."""
        found: dict[tuple, dict[tuple, list]] = {}
        for device, held in self.target.held.items():
            rows, *columns = held[-len(shape) :]
            whole = not columns or len(columns[0]) == shape[1]
            key = (None, None) if whole else (columns[0].start, columns[0].stop)
            for piece, row in pieces(shape[0], self.row, self.group):
                offset = piece.start - row
                start, stop = (
                    max(rows.start + offset, piece.start),
                    min(rows.stop + offset, piece.stop),
                )
                if start < stop:
                    found.setdefault((start, stop), {}).setdefault(key, []).append(device)
        return [
            Strip(slice(*rows), tuple(Part(slice(*c), tuple(on)) for c, on in parts.items()))
            for rows, parts in found.items()
        ]

    def start(self, device: Any, rows: slice) -> np.ndarray:
        """Where rows begin in the shard of a device: leading axes, and row."""
        first = self.target.held[device][len(self.index)].start
        *_, (piece, row) = pieces(rows.start + 1, self.row, self.group)
        return np.array([*self.index, row + rows.start - piece.start - first], np.int32)

    def put(self, device: Any, rows: Any, start: Any, config: Any, dtype: Any) -> jax.Array:
        """As `Target.put`."""
        return self.target.put(device, rows, start, config, dtype)

    def compile(self, device: Any, rows: Any, config: Any, dtype: Any) -> None:
        """As `Target.compile`."""
        start = jax.ShapeDtypeStruct((len(self.index) + 1,), np.int32)
        self.target.compile(device, rows, start, config, dtype)


def _host_zeros(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> np.ndarray:
    return aligned(math.prod(shape) * dtype.itemsize, np.zeros).view(dtype).reshape(shape)


def _on_host(shard: Any) -> bool:
    return isinstance(jax.tree.leaves(shard)[0], np.ndarray)


def _put_on_host(shard: Any, rows: Any, start: list[int]) -> None:
    *index, row = start
    if isinstance(shard, QuantizedArray):
        _put_on_host(shard.qvalue, rows.qvalue, start)
        _put_on_host(shard.scale, rows.scale, [*index, row // shard.block_size[0]])
        return
    target = shard[*index]
    # As bytes: numpy copies elements of other packages' dtypes one by one.
    target[row : row + len(rows)].view(np.uint8)[:] = np.asarray(rows).view(np.uint8)


@functools.partial(
    jax.jit, static_argnums=(3, 4), donate_argnums=0, compiler_options=COMPILER_OPTIONS
)
def _put(
    shard: Any, rows: Any, start: jax.Array, config: QuantConfig | None, dtype: Any
) -> tuple[Any, jax.Array]:
    value, outcome = convert(rows, config, dtype)
    *index, row = start
    if not isinstance(shard, QuantizedArray):
        return blocked.put(shard, value, tuple(index), row), outcome
    qvalue = blocked.put(shard.qvalue, value.qvalue, tuple(index), row)
    scale = blocked.put(shard.scale, value.scale, tuple(index), row // shard.block_size[0])
    return dataclasses.replace(shard, qvalue=qvalue, scale=scale), outcome
