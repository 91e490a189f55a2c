"""How a kernel's product is cut where its operands lie on several devices.

XLA knows nothing of what a kernel computes, and would gather its operands on every device. Here it
is told that a product is cut as its weight is: by rows without communication, by columns with a
sum over devices, both in whole blocks. Tokens stay apart on the axes of the mesh that the weight
leaves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxquant.hopper import interpreted
from jaxquant.matmul.tokens import QuantizedTokens
from jaxquant.matmul.xla import finish

# Rows and columns of the weight that share a scale.
_BLOCK = 128


# Jitted, since outside of jit nothing is partitioned.
@functools.partial(jax.jit, static_argnames=("run", "out_dtype", "sms", "tokens_apart"))
def across_devices(
    run: Callable[..., Any],
    x: Float[Array, "M A"] | QuantizedTokens,
    residual: Float[Array, "M N"] | None,
    stacks: Any,
    index: Any,
    *,
    out_dtype: Any,
    sms: int,
    tokens_apart: bool = True,
) -> Float[Array, "T N"]:
    """`run(x, residual, stacks, index, out_dtype=out_dtype, sms=sms)`, on the devices of a mesh.

    Args:
      run: computes the product.
      x: tokens.
      residual: added to the product, or None.
      stacks: (qvalue `[L, N, K]`, its scales, a prologue or None, bias `[Lb, N]` or None).
      index: which matrix of the stacks, `[1]` int32; or that with more vectors of int32, which
        every device gets whole.
      out_dtype: of the result.
      sms: multiprocessors of each device.
      tokens_apart: whether a device can do with some of the tokens.
    """
    run = functools.partial(run, sms=sms)
    quantized = isinstance(x, QuantizedTokens)
    tokens_apart = tokens_apart and not quantized  # they are padded
    if interpreted():  # its effects may not be partitioned
        return run(x, residual, stacks, index, out_dtype=out_dtype)

    @custom_partitioning
    def product(x, residual, stacks, index):
        return run(x, residual, stacks, index, out_dtype=out_dtype)

    def partition(mesh, args, _):
        local, of_args, of_y = _divided(run, mesh, args, out_dtype, tokens_apart)
        return mesh, local, of_y, of_args

    # Which dimensions are cut alike. Others are left to `partition`.
    factors = (
        ["t a", "xk xm"] if quantized else "m a" if tokens_apart else "t a",
        None if residual is None else "m n",
        _factors_of(stacks, "n", "w"),
        [f"i{i}" for i, _ in enumerate(jax.tree.leaves(index))],
    )
    operands = jax.tree.leaves(factors)
    product.def_partition(partition, sharding_rule=f"{', '.join(operands)} -> m n")
    return product(x, residual, stacks, index)


def mlp_across_devices(
    run: Callable[..., Any],
    product: Callable[..., Any],
    x: Float[Array, "M A"],
    residual: Float[Array, "M N"] | None,
    up: Any,
    down: Any,
    index: Any,
    *,
    groups: int,
    sms: int,
) -> Float[Array, "M N"]:
    """A gated MLP, `run(x, residual, up, down, index, groups=..., out_dtype=..., sms=sms)`.

    Where the rows of `up` and the columns of `down` are cut alike, by whole groups, each device
    computes its share of the hidden values, and the results are summed.

    Args:
      run: computes the MLP.
      product: computes one product, as `run` of `across_devices`.
      x: tokens.
      residual: added to the result, or None.
      up: `stacks` of the first product, as in `across_devices`.
      down: of the second, whose prologue makes hidden values of what the first gives.
      index: which matrix of the stacks, `[1]` int32.
      groups: of rows of `up`, each with gates and then with what these gate.
      sms: multiprocessors of each device.
    """
    run, product = (functools.partial(f, sms=sms) for f in (run, product))
    dtype = x.dtype
    if interpreted():  # its effects may not be partitioned
        return run(x, residual, up, down, index, groups=groups, out_dtype=dtype)

    @custom_partitioning
    def mlp(x, residual, up, down, index):
        return run(x, residual, up, down, index, groups=groups, out_dtype=dtype)

    def partition(mesh, args, _):
        x, residual, up, down, index = args
        rows, columns = axes_of(up[0], 1, _BLOCK, mesh), axes_of(down[0], 2, _BLOCK, mesh)
        others = axes_of(up[0], 2, _BLOCK, mesh), axes_of(down[0], 1, _BLOCK, mesh)
        devices = math.prod(mesh.shape[axis] for axis in rows)
        apart = rows != columns or any(others) or groups % devices
        # Hidden values that lie apart from their gates meet on every device.
        first, of_first, _ = _divided(product, mesh, (x, None, up, index), dtype, not apart)
        y = jax.ShapeDtypeStruct((x.shape[0], up[0].shape[1]), dtype, sharding=of_first[0])
        second, of_second, of_y = _divided(
            product, mesh, (y, residual, down, index), dtype, not apart
        )

        def exchanged(x, residual, up, down, index):
            y = first(x, None, up, index)
            if rows:
                y = lax.all_gather(y, rows, axis=1, tiled=True)
            return second(ungrouped(y, groups), residual, down, index)

        def local(x, residual, up, down, index):
            local_groups = groups // devices
            if not rows:
                return run(x, residual, up, down, index, groups=local_groups, out_dtype=dtype)
            *stacks, bias = down
            y = run(x, None, up, (*stacks, None), index, groups=local_groups, out_dtype=jnp.float32)
            return finish(lax.psum(y, rows), index[0], dtype, bias, residual)

        of_args = of_first[0], of_second[1], of_first[2], of_second[2], of_first[3]
        return mesh, exchanged if apart else local, of_y, of_args

    factors = (
        "m a",
        None if residual is None else "m n",
        _factors_of(up, "f", "u"),
        _factors_of(down, "n", "d"),
        "i",
    )
    mlp.def_partition(partition, sharding_rule=f"{', '.join(jax.tree.leaves(factors))} -> m n")
    return mlp(x, residual, up, down, index)


def ungrouped(y: Float[Array, "*batch F2"], groups: int) -> Float[Array, "*batch F2"]:
    """Gates of all groups, and then what they gate."""
    parts = y.reshape(*y.shape[:-1], groups, 2, -1)
    return jnp.swapaxes(parts, -3, -2).reshape(y.shape)


def _divided(
    run: Callable[..., Any],
    mesh: Any,
    args: tuple[Any, Any, Any, Any],
    out_dtype: Any,
    tokens_apart: bool,
) -> tuple[Callable[..., Any], Any, Any]:
    """What each device runs of a product, and the shardings of its arguments and its result."""
    x, residual, (qvalue, _, prologue, bias), index = args
    rows = axes_of(qvalue, 1, _BLOCK, mesh)
    columns = axes_of(qvalue, 2, _BLOCK, mesh)
    tokens = axes_of(x, 0, 1, mesh) if tokens_apart else ()
    if set(tokens) & {*rows, *columns}:
        tokens = ()

    def local(x, residual, stacks, index):
        if not columns:
            return run(x, residual, stacks, index, out_dtype=out_dtype)
        qvalue, scale, prologue, bias = stacks
        layer, *_ = jax.tree.leaves(index)
        if prologue is not None:
            K = qvalue.shape[-1]
            start = lax.axis_index(columns) * K
            x = lax.dynamic_slice_in_dim(prologue(x, layer[0]), start, K, 1)
        y = run(x, None, (qvalue, scale, None, None), index, out_dtype=jnp.float32)
        return finish(lax.psum(y, columns), layer[0], out_dtype, bias, residual)

    def spec(*entries):
        return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))

    # A prologue needs whole tokens.
    of_x: Any = spec(tokens, columns if prologue is None else None)
    if isinstance(x, QuantizedTokens):
        of_x = dataclasses.replace(x, qvalue=of_x, scale=spec(columns))
    weight = spec(None, rows, columns)
    around = jax.tree.map(lambda _: spec(), prologue), bias and spec(None, rows)
    of_y = spec(tokens, rows)
    of_index = jax.tree.map(lambda _: spec(), index)
    return local, (of_x, residual and of_y, (weight, weight, *around), of_index), of_y


def _factors_of(stacks: Any, rows: str, name: str) -> Any:
    """What the dimensions of stacks are called: their rows, and others that nothing shares."""
    *_, prologue, bias = stacks
    scale = f"{name}sl {name}sn {name}sk"
    of_prologue = jax.tree.map(lambda _: f"{name}pl {name}pk", prologue)
    of_bias = None if bias is None else f"{name}bl {rows}"
    return f"{name}l {rows} {name}k", scale, of_prologue, of_bias


def axes_of(operand: Any, dim: int, block: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh that divide a dimension into whole blocks, or none."""
    entry = (*operand.sharding.spec, *[None] * operand.ndim)[dim]
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    whole = block * math.prod(mesh.shape[axis] for axis in axes)
    return axes if operand.shape[dim] % whole == 0 else ()
