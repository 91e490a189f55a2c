"""Quantizing weights on Hopper: each value is read once, into SMEM, and a block knows its scale.

A thread block has one block of 128 x 128. TMA reads what lies outside the matrix as zeros and does
not write there, so that edges take nothing of their own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import memref, vector
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import WEIGHT_AMAX_FLOOR
from jaxquant.hopper import interpreted
from jaxquant.matmul.act_quant_sm90 import GROUPS, TILE_GROUPS
from jaxquant.matmul.arithmetic_sm90 import ceil_to_power_of_two, quotient, reciprocal
from jaxquant.matmul.sm90 import cdiv, store

_BLOCK = 128
# Warpgroups of a thread block, each with rows of its own, and tiles of 8 rows that one has in its
# registers.
_WARPGROUPS = 2
_UNROLLED = 2
_ROWS = GROUPS.reduce(1)


def quantize(
    w: Float[Array, "L N K"], dtype: Any, power_of_two: bool
) -> tuple[Float[Array, "L N K"], Float32[Array, "L (N+127)//128 (K+127)//128"]]:
    """(qvalue, scale) of `jaxquant.quantize` in blocks of 128 x 128, to the byte.

    Args:
      w: bfloat16, float16 or float32; K a multiple of 16.
      dtype: float8_e4m3fn or float8_e5m2.
      power_of_two: whether scales are rounded up to one.
    """
    L, N, K = w.shape
    dtype = jnp.dtype(dtype)
    fmax = float(jnp.finfo(dtype).max)
    tiles = _BLOCK // TILE_GROUPS // _WARPGROUPS
    own = tiles * TILE_GROUPS

    def kernel(w_gmem, q_gmem, s_gmem, w_smem, q_smem, amaxes, landed, met):
        l, i, j = (lax.axis_index(name) for name in ("l", "i", "j"))
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(i * _BLOCK + warpgroup * own, own)
        columns = pl.ds(j * _BLOCK, _BLOCK)
        plgpu.copy_gmem_to_smem(
            w_gmem.at[l, rows, columns], w_smem.at[warpgroup], landed.at[warpgroup]
        )
        plgpu.barrier_wait(landed.at[warpgroup])

        def load(tile):
            at = w_smem.at[warpgroup, pl.ds(tile * TILE_GROUPS, TILE_GROUPS)]
            return plgpu.load(at, layout=GROUPS, optimized=False)

        def block_scale():
            # These maxima keep NaN. In w's dtype, of which one instruction compares two.
            largest = functools.reduce(jnp.maximum, (jnp.abs(load(tile)) for tile in range(tiles)))
            amaxes[warpgroup] = jnp.max(largest.astype(jnp.float32), axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            # A layout in which every warp has all of a part, and so finds its maximum.
            parts = [
                plgpu.load(amaxes.at[g], layout=plgpu.Layout.WGMMA.reduce(0))
                for g in range(_WARPGROUPS)
            ]
            amax = jnp.maximum(jnp.max(functools.reduce(jnp.maximum, parts)), WEIGHT_AMAX_FLOOR)
            scale = quotient(_all(amax), _all(fmax), _all(1 / fmax), _ROWS)
            return ceil_to_power_of_two(scale, _ROWS) if power_of_two else scale

        scale = block_scale()
        divisor, inverse = (
            lax.broadcast_in_dim(a, (TILE_GROUPS, _BLOCK), [0])
            for a in (scale, reciprocal(scale, _ROWS))
        )

        @pl.loop(0, tiles // _UNROLLED)
        def _quantize(step):
            # All loads before the first store, which they could not pass.
            mine = [step * _UNROLLED + i for i in range(_UNROLLED)]
            values = [load(tile).astype(jnp.float32) for tile in mine]
            for tile, v in zip(mine, values, strict=True):
                at = q_smem.at[warpgroup, pl.ds(tile * TILE_GROUPS, TILE_GROUPS)]
                store(at, quotient(v, divisor, inverse, GROUPS).astype(dtype))

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], q_gmem.at[l, rows, columns])

        @pl.when(warpgroup == 0)
        def _store_scale():
            _store_one(s_gmem.at[l, i, j], scale)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # A tiling that tiles nothing: see `act_quant_sm90`.
    linear = (plgpu.TilingTransform((math.gcd(K, _BLOCK),)),)  # pyright: ignore[reportAbstractUsage]
    n_blocks, k_blocks = cdiv(N, _BLOCK), cdiv(K, _BLOCK)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(w.shape, dtype),
            jax.ShapeDtypeStruct((L, n_blocks, k_blocks), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((_WARPGROUPS, own, _BLOCK), w.dtype, transforms=linear),
            plgpu.SMEM((_WARPGROUPS, own, _BLOCK), dtype, transforms=linear),
            plgpu.SMEM((_WARPGROUPS, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_barriers=_WARPGROUPS),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ],
        grid=(k_blocks, n_blocks, L),
        grid_names=("j", "i", "l"),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="jaxquant_quantize_weight",
    )(w)


def _all(value: Any) -> Float32[Array, "8"]:
    return plgpu.layout_cast(jnp.full((TILE_GROUPS,), value, jnp.float32), _ROWS)


def _store_one(ref: Any, equal: Float32[Array, "8"]) -> None:
    """Stores one of values that are equal to an element of GMEM."""
    if interpreted():
        ref[...] = equal[0]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _ROWS))
    def run(_, ref, equal):
        memref.store(vector.extract(equal.registers.flat[0], [], [0]), ref, [])

    run(ref, equal)  # pyright: ignore[reportCallIssue]
