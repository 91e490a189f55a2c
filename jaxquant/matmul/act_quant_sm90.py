"""Quantizing activations on Hopper in one pass: each value is read once, from GMEM to SMEM."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from jaxquant.blocked import ACTIVATION_AMAX_FLOOR, ieee_divide
from jaxquant.matmul.sm90 import FP8, K_BLOCK, cdiv, swizzled

# Copies of one row, as of these scales, are linear: TMA would not stop them at the row's end. So
# the scales have a whole number of tiles.
TILE_M = 64
# K blocks of one thread block, and how many there are when a thread block takes several.
_MAX_BLOCKS = 4
_MANY_BLOCKS = 1024
_FMAX = 448.0


def quantize_activations(
    x: Float[Array, "M K"], rows: int, scale_rows: int
) -> tuple[Float[Array, "rows K"], Float32[Array, "(K+127)//128 scale_rows"]]:
    """`jaxquant.blocked.quantize_activations`, to the byte, in the layout that the kernels read.

    Args:
      x: bfloat16 or float32; K a multiple of 32, M one of 8 or less than 8.
      rows: of the values; those from M on are zeros.
      scale_rows: columns of the scales, a multiple of 64; those from M on are the least scale.

    Returns:
      float8_e4m3fn values `[rows, K]`, and float32 scales `[ceil(K / 128), scale_rows]`.
    """
    K = x.shape[1]
    steps = cdiv(K, K_BLOCK)
    m_tiles = cdiv(max(rows, scale_rows), TILE_M)
    # Few tokens: a thread block for each K block, to be done sooner.
    blocks = math.gcd(steps, _MAX_BLOCKS) if m_tiles * steps > _MANY_BLOCKS else 1
    tile = (blocks, TILE_M, K_BLOCK)

    def kernel(x_gmem, q_gmem, s_gmem, x_smem, q_smem, s_smem, landed):
        tokens = pl.ds(lax.axis_index("m") * TILE_M, TILE_M)
        kb0 = lax.axis_index("k") * blocks

        def columns(i):
            return pl.ds((kb0 + i) * K_BLOCK, K_BLOCK)

        for i in range(blocks):  # TMA reads what lies outside x as zeros
            plgpu.copy_gmem_to_smem(x_gmem.at[tokens, columns(i)], x_smem.at[i], landed.at[i])

        @pl.loop(0, blocks)
        def _quantize(i):
            plgpu.barrier_wait(landed.at[i])
            v = plgpu.load(x_smem.at[i], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            amax = jnp.maximum(jnp.max(jnp.abs(v), axis=1), ACTIVATION_AMAX_FLOOR)
            scale = ieee_divide(amax, jnp.full_like(amax, _FMAX))
            q_smem[i] = _divide_for_rounding(v, scale).astype(FP8)
            s_smem[i] = scale

        plgpu.commit_smem()
        for i in range(blocks):
            plgpu.copy_smem_to_gmem(q_smem.at[i], q_gmem.at[tokens, columns(i)], commit_group=False)
            plgpu.copy_smem_to_gmem(s_smem.at[i], s_gmem.at[kb0 + i, tokens], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, K), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM(tile, x.dtype, transforms=swizzled(K, x.dtype)),
            plgpu.SMEM(tile, FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((blocks, TILE_M), jnp.float32),
            plgpu.Barrier(num_barriers=blocks),
        ],
        grid=(m_tiles, steps // blocks),
        grid_names=("m", "k"),
        kernel_name="jaxquant_quantize_activations",
    )(x)


def _divide_for_rounding(v: Float32[Array, "M K"], scale: Float32[Array, "M"]) -> Array:
    """A number that rounds to the same FP8 value as IEEE's `v / scale[:, None]` does.

    The GPU's division is off by up to 2 ulp, which matters where the quotient is as good as
    halfway between two FP8 values. Such a number has 5 significant bits at most, so take the
    nearest one of 5 bits; its remainder, exact where it is small, leads to the quotient.
    """
    high = _round_bits(scale, 12)  # and 12 bits are left, so that products with 5 bits are exact

    def rows(a):
        return lax.broadcast_in_dim(a, v.shape, [0])

    inverse = rows(1 / scale)
    halfway = _round_bits(v * inverse, 19)
    remainder = (v - halfway * rows(high)) - halfway * rows(scale - high)
    return jnp.where(remainder == 0, halfway, halfway + remainder * inverse)


def _round_bits(x: Array, dropped: int) -> Array:
    """x rounded to nearest with its `dropped` last bits zero."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + (1 << (dropped - 1))) & -(1 << dropped)
    return lax.bitcast_convert_type(bits, jnp.float32)
