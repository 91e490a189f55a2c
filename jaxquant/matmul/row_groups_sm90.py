"""Rows by 8 groups of 128 values at a time, also where there are fewer, or the last is cut short.

A matrix whose rows are whole is addressed as one of groups, `[R * K / 128, 128]`: then any 8 of
them are a slice. Others are addressed as they are, `[R, K]`: what lies beyond the end of a row is
read as zeros and is not written.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import ACTIVATION_GROUP
from jaxquant.hopper import interpreted
from jaxquant.matmul.ptx_sm90 import REF, SCALAR, THREADS, scalars
from jaxquant.matmul.sm90 import FP8, store, swizzled

# 8 groups of 128 values over a warpgroup: 16 threads a group, 8 values (16 bytes of bfloat16) each.
TILE_GROUPS = 8
_VALUES = 8
_THREADS_OF_GROUP = ACTIVATION_GROUP // _VALUES
GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE_GROUPS, ACTIVATION_GROUP), (2, ACTIVATION_GROUP), (_VALUES,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_TILE = TILE_GROUPS, ACTIVATION_GROUP
_SIZE = TILE_GROUPS * ACTIVATION_GROUP


def is_whole(K: int) -> bool:
    """Whether rows of K are 8 groups or more, and an even number, so that pairs are aligned."""
    return K % (2 * ACTIVATION_GROUP) == 0 and K >= _SIZE


def grouped_shape(rows: int, K: int) -> tuple[int, int]:
    """The shape that so many rows of K are addressed in."""
    return (rows * K // ACTIVATION_GROUP, ACTIVATION_GROUP) if is_whole(K) else (rows, K)


def grouped(a: Float[Array, "... K"], K: int) -> Float[Array, "_ _"]:
    """Rows of K, as they are addressed."""
    return a.reshape(grouped_shape(a.size // K, K))


def load_row(ref: Any, row: Any, group: Any, K: int) -> Float[Array, "8 128"]:
    """8 groups of a row, from one on, in registers: zeros beyond the row's end.

    Args:
      ref: GMEM, see `grouped`.
      row: which.
      group: the first; where rows are whole, at least 8 follow.
      K: of a row.
    """
    if is_whole(K):
        return load_groups(ref, row * (K // ACTIVATION_GROUP) + group)
    if interpreted():
        values = lax.dynamic_slice_in_dim(_padded(ref[row]), group * ACTIVATION_GROUP, _SIZE)
        return values.reshape(_TILE)
    result = plgpu.ShapeDtypeStruct(_TILE, ref.dtype, layout=GROUPS)

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR), return_type=result)
    def run(_, ref, row, group) -> Any:
        row, column = _place(row, group)
        last = utils.c(K - _VALUES, column.type)
        kind = ir.VectorType.get((_VALUES,), ir.MemRefType(ref.type).element_type)
        layout = GROUPS.to_mgpu()  # pyright: ignore[reportAttributeAccessIssue]
        registers = np.empty(layout.registers_shape(_TILE), dtype=object)
        registers.flat[0] = vector.load(kind, ref, [row, arith.minui(column, last)])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    values = run(ref, *map(jnp.int32, (row, group)))  # pyright: ignore[reportCallIssue]
    group += plgpu.broadcasted_iota(jnp.int32, _TILE, 0, layout=GROUPS)
    column = plgpu.broadcasted_iota(jnp.int32, _TILE, 1, layout=GROUPS)
    inside = group * ACTIVATION_GROUP + column < K
    return jnp.where(inside, values, jnp.zeros((), values.dtype))


def load_groups(ref: Any, group: Any) -> Float[Array, "8 128"]:
    """8 groups from a given one on, in registers, of an array `[groups, 128]`."""
    at = ref.at[pl.ds(group, TILE_GROUPS), :]
    return plgpu.load(at, layout=GROUPS, optimized=False)


def store_row(ref: Any, row: Any, group: Any, value: Float[Array, "8 128"], K: int) -> None:
    """Stores 8 groups, in the layout GROUPS, but for what lies beyond the row: see `load_row`."""
    if is_whole(K):
        ref[pl.ds(row * (K // ACTIVATION_GROUP) + group, TILE_GROUPS), :] = value
        return
    if interpreted():
        for i in range(TILE_GROUPS):
            for first, width in _pieces(K):

                @pl.when((group + i) * ACTIVATION_GROUP == first)
                def _store(i=i, first=first, width=width):
                    ref[row, pl.ds(first, width)] = value[i, :width]

        return

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR, GROUPS))
    def run(_, ref, row, group, value):
        row, column = _place(row, group)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, column, utils.c(K, column.type))):
            vector.store(value.registers.item(), ref, [row, column])

    run(ref, *map(jnp.int32, (row, group)), value)  # pyright: ignore[reportCallIssue]


def store_scales(ref: Any, group: Any, row: Any, scale: Float32[Array, "8"]) -> None:
    """Stores the scales of 8 groups of a row, from one on, but for those that there are not.

    Args:
      ref: float32 `[groups, rows]`, GMEM.
      group: the first.
      row: which.
      scale: in the layout `GROUPS.reduce(1)`.
    """
    groups = ref.shape[0]
    if groups >= TILE_GROUPS:
        store(ref.at[pl.ds(group, TILE_GROUPS), row], scale)
        return
    if interpreted():
        ref[:, row] = scale[:groups]
        return

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, GROUPS.reduce(1)))
    def run(_, ref, row, scale):
        index = ir.IndexType.get()
        own = arith.divui(_thread(), utils.c(_THREADS_OF_GROUP, index))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, own, utils.c(groups, index))):
            at = [own, arith.index_cast(index, *scalars(row))]
            vector.store(scale.registers.item(), ref, at)

    run(ref, jnp.int32(row), scale)  # pyright: ignore[reportCallIssue]


def store_operand(ref: Any, value: Float[Array, "8 128"], K: int) -> None:
    """Stores 8 groups of FP8 as wgmma reads them, beside a weight of rows of K.

    Args:
      ref: `[8, 128]`, SMEM, tiled as `swizzled(K, FP8)` says.
      value: in the layout GROUPS.
      K: of the weight.
    """
    if interpreted() or K % ACTIVATION_GROUP == 0:
        ref[...] = value
        return

    # In narrower tiles SMEM's banks conflict, which Pallas' own store refuses.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(K, FP8)), GROUPS))
    def run(_, ref, value):
        value.store_tiled(ref, swizzle=math.gcd(K, ACTIVATION_GROUP), optimized=False)

    run(ref, value)  # pyright: ignore[reportCallIssue]


def _place(row: Any, group: Any) -> tuple[Any, Any]:
    """Where this thread's values are, of the 8 groups from one on."""
    index = ir.IndexType.get()
    row, group = (arith.index_cast(index, v) for v in scalars(row, group))
    first = arith.muli(group, utils.c(ACTIVATION_GROUP, index))
    return row, arith.addi(first, arith.muli(_thread(), utils.c(_VALUES, index)))


def _thread() -> Any:
    """Which of its warpgroup this thread is."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
    return arith.index_cast(ir.IndexType.get(), thread)


def _pieces(K: int) -> list[tuple[int, int]]:
    """Where each group of a row begins, and its values."""
    return [(k, min(ACTIVATION_GROUP, K - k)) for k in range(0, K, ACTIVATION_GROUP)]


def _padded(row: Any) -> Any:
    """A row and 8 groups of zeros."""
    return jnp.pad(row, (0, _SIZE))
