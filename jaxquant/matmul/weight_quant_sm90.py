"""Quantizing weights on Hopper: each value is read once from memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import WEIGHT_AMAX_FLOOR
from jaxquant.hopper import interpreted
from jaxquant.matmul.act_quant_sm90 import GROUPS, TILE_GROUPS
from jaxquant.matmul.arithmetic_sm90 import ceil_to_power_of_two, quotient, reciprocal
from jaxquant.matmul.sm90 import cdiv

_BLOCK = 128
_WARPGROUPS = 2
_UNROLLED = 2
_ROWS = GROUPS.reduce(1)


def quantize(
    w: Float[Array, "L N K"], dtype: Any, power_of_two: bool
) -> tuple[Float[Array, "L N K"], Float32[Array, "L (N+127)//128 (K+127)//128"]]:
    L, N, K = w.shape
    dtype = jnp.dtype(dtype)
    fmax = float(jnp.finfo(dtype).max)
    warpgroups, unrolled = _WARPGROUPS, _UNROLLED
    tiles = _BLOCK // TILE_GROUPS // warpgroups
    own = tiles * TILE_GROUPS

    def kernel(w_gmem, q_gmem, s_gmem, w_smem, q_smem, amaxes, landed, met):
        l, i, j = (lax.axis_index(name) for name in "lij")
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(i * _BLOCK + warpgroup * own, own)
        columns = pl.ds(j * _BLOCK, _BLOCK)
        # TMA reads what lies outside the matrix as zeros, and does not write there.
        plgpu.copy_gmem_to_smem(
            w_gmem.at[l, rows, columns], w_smem.at[warpgroup], landed.at[warpgroup]
        )
        plgpu.barrier_wait(landed.at[warpgroup])

        def load(tile):
            at = w_smem.at[warpgroup, pl.ds(tile * TILE_GROUPS, TILE_GROUPS)]
            return plgpu.load(at, layout=GROUPS, optimized=False)

        largest = functools.reduce(jnp.maximum, (jnp.abs(load(t)) for t in range(tiles)))
        amaxes[warpgroup] = jnp.max(largest.astype(jnp.float32), axis=1)
        plgpu.commit_smem()
        if warpgroups > 1:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
        parts = [
            plgpu.load(amaxes.at[g], layout=plgpu.Layout.WGMMA.reduce(0)) for g in range(warpgroups)
        ]
        amax = jnp.maximum(jnp.max(functools.reduce(jnp.maximum, parts)), WEIGHT_AMAX_FLOOR)
        scale = quotient(_constant(amax), _constant(fmax), _constant(1 / fmax), _ROWS)
        if power_of_two:
            scale = ceil_to_power_of_two(scale, _ROWS)
        divisor, inverse = (
            lax.broadcast_in_dim(a, (TILE_GROUPS, _BLOCK), [0])
            for a in (scale, reciprocal(scale, _ROWS))
        )

        @pl.loop(0, tiles // unrolled)
        def _quantize(step):
            # All loads before the first store, which they could not pass.
            values = [load(step * unrolled + i).astype(jnp.float32) for i in range(unrolled)]
            for i, v in enumerate(values):
                at = pl.ds((step * unrolled + i) * TILE_GROUPS, TILE_GROUPS)
                _store(
                    q_smem.at[warpgroup, at], quotient(v, divisor, inverse, GROUPS).astype(dtype)
                )

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], q_gmem.at[l, rows, columns])

        @pl.when(warpgroup == 0)
        def _store_scale():
            _store_first(s_gmem.at[l, i, j], scale)

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
            plgpu.SMEM((warpgroups, own, _BLOCK), w.dtype, transforms=linear),
            plgpu.SMEM((warpgroups, own, _BLOCK), dtype, transforms=linear),
            plgpu.SMEM((warpgroups, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(k_blocks, n_blocks, L),
        grid_names=("j", "i", "l"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="jaxquant_quantize_weight",
    )(w)


def _constant(value: Any) -> Float32[Array, "8"]:
    return plgpu.layout_cast(jnp.full((TILE_GROUPS,), value, jnp.float32), _ROWS)


def _store(ref: Any, value: Array) -> None:
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _store_first(ref: Any, value: Array) -> None:
    """Stores one element of equal ones."""
    if interpreted():
        ref[...] = value[0]
        return

    from jaxlib.mlir.dialects import memref, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _ROWS))
    def run(_, ref, value):
        memref.store(vector.extract(value.registers.flat[0], [], [0]), ref, [])

    run(ref, value)  # pyright: ignore[reportCallIssue]
