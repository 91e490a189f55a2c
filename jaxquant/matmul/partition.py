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
        if quantized:
            of_x = dataclasses.replace(x, qvalue=of_x, scale=spec(columns))
        weight = spec(None, rows, columns)
        around = jax.tree.map(lambda _: spec(), prologue), bias and spec(None, rows)
        of_y = spec(tokens, rows)
        of_index = jax.tree.map(lambda _: spec(), index)
        return mesh, local, of_y, (of_x, residual and of_y, (weight, weight, *around), of_index)

    *_, prologue, bias = stacks
    bias_factors = None if bias is None else "bl n"
    # Which dimensions are cut alike. Others are left to `partition`.
    factors = (
        ["t a", "xk xm"] if quantized else "m a" if tokens_apart else "t a",
        None if residual is None else "m n",
        ("l n k", "sl sn sk", jax.tree.map(lambda _: "pl pk", prologue), bias_factors),
        [f"i{i}" for i, _ in enumerate(jax.tree.leaves(index))],
    )
    operands = jax.tree.leaves(factors)
    product.def_partition(partition, sharding_rule=f"{', '.join(operands)} -> m n")
    return product(x, residual, stacks, index)


def axes_of(operand: Any, dim: int, block: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh that divide a dimension into whole blocks, or none."""
    entry = (*operand.sharding.spec, *[None] * operand.ndim)[dim]
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    whole = block * math.prod(mesh.shape[axis] for axis in axes)
    return axes if operand.shape[dim] % whole == 0 else ()
