"""The units of prompts that attend in FP8, on Hopper, in one pass over queries, keys and values.

A thread block goes through the heads of a few tokens and leaves each token's largest numbers. Three
more make units of those.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from jaxquant.matmul.act_quant_sm90 import from_smem
from jaxquant.matmul.arithmetic_sm90 import floor_to_power_of_two
from jaxquant.matmul.sm90 import store

# Numbers of a tile, of which each thread reads 8: 16 bytes of bfloat16.
_TILE = 1024
# Tiles whose reads a thread block has under way at once.
_TILES = 8
_FROM_AMAX = 2.0**-7


def fp8_units(
    qkv: BFloat16[Array, "M R D"], heads: tuple[int, ...], stretch: float, least: float
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, ""]]:
    """`jaxquant.attention.fp8.fp8_units`, to the byte.

    Args:
      qkv: heads of queries, keys and values; M a multiple of 128, D one of 64, 128 and 256.
      heads: how many of each.
      stretch: by what factor queries and keys may grow.
      least: what is taken for less than that.
    """
    M, R, D = qkv.shape
    width = min(D, 128)
    rows = _TILE // width
    ends = [sum(heads[: i + 1]) * D for i in range(3)]
    parameters = plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True)

    def largest(x_gmem, amax_gmem):
        tokens = pl.ds(lax.axis_index("block") * rows, rows)
        for i, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            values = [
                plgpu.load(
                    x_gmem.at[tokens, pl.ds(column, width)],
                    layout=_tiled(rows, width),
                    optimized=False,
                )
                for column in range(start, end, width)
            ]
            amax = functools.reduce(jnp.maximum, [jnp.abs(v.astype(jnp.float32)) for v in values])
            store(amax_gmem.at[i, tokens], jnp.max(amax, axis=1))

    amax = plgpu.kernel(
        largest,
        out_type=jax.ShapeDtypeStruct((3, M), jnp.float32),
        grid=(M // rows,),
        grid_names=("block",),
        compiler_params=parameters,
        kernel_name="jaxquant_largest",
    )(qkv.reshape(M, R * D))

    columns = math.gcd(M // 8, 128)
    tiles = M // columns // 8
    batch = math.gcd(tiles, _TILES)
    layout = _tiled(8, columns)

    def of_largest(amax_gmem, *refs):
        *units_gmem, smem = refs
        which = lax.axis_index("which")

        def load(tile):
            at = amax_gmem.at[pl.ds((which * tiles + tile) * 8, 8), :]
            return plgpu.load(at, layout=layout, optimized=False)

        def step(i, carry):
            return functools.reduce(jnp.maximum, [load(i * batch + j) for j in range(batch)], carry)

        zeros = plgpu.layout_cast(jnp.zeros((8, columns), jnp.float32), layout)
        amax = jnp.max(lax.fori_loop(0, tiles // batch, step, zeros), axis=1)
        amax = jnp.maximum(amax * jnp.where(which == 2, 1.0, stretch), least)
        smem[...] = floor_to_power_of_two(amax, layout.reduce(1)) * _FROM_AMAX
        plgpu.commit_smem()
        unit = jnp.max(from_smem(smem))
        for i, ref in enumerate(units_gmem):

            @pl.when(which == i)
            def _store(ref=ref):
                ref[0] = unit

    units = plgpu.kernel(
        of_largest,
        out_type=[jax.ShapeDtypeStruct((1,), jnp.float32)] * 3,
        scratch_types=[plgpu.SMEM((8,), jnp.float32)],
        grid=(3,),
        grid_names=("which",),
        compiler_params=parameters,
        kernel_name="jaxquant_units",
    )(amax.reshape(-1, columns))
    q, k, v = (unit.reshape(()) for unit in units)
    return q, k, v


def _tiled(rows: int, columns: int) -> Any:
    """A tile in registers: a warp has a quarter of its rows, a thread neighbours of one."""
    per_row = 128 // rows
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rows, columns), (rows // 4, columns), (columns // per_row,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
