"""Quantizing activations on Hopper in one pass: each value is read once, from GMEM to SMEM."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.blocked import ACTIVATION_AMAX_FLOOR, ACTIVATION_GROUP, ieee_divide
from jaxquant.matmul.prologue import Prologue, RMSNorm, SiluMul
from jaxquant.matmul.sm90 import FP8, K_BLOCK, cdiv, in_stack, swizzled

# Copies of one row, as of these scales, are linear: TMA would not stop them at the row's end. So
# the scales have a whole number of tiles.
TILE_M = 64
# K blocks of one thread block, and how many there are when a thread block takes several.
_MAX_BLOCKS = 4
_MANY_BLOCKS = 1024
_FMAX = 448.0
# 8 groups of 128 values over a warpgroup: 16 threads a group, 8 values (16 bytes of bfloat16) each.
TILE_GROUPS = 8
GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE_GROUPS, ACTIVATION_GROUP), (2, ACTIVATION_GROUP), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


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


def quantize_tokens(
    prologue: Prologue | None,
    x: Float[Array, "M A"],
    layer: Int32[Array, "1"],
    K: int,
    rows: int,
    scale_rows: int,
) -> tuple[Float[Array, "rows K"], Float32[Array, "blocks scale_rows"]]:
    """`quantize_activations(prologue(x, layer))` in one kernel; what is from row M on is undefined.

    A thread block has 8 tokens and some K blocks. For RMSNorm it adds up the squares of all of a
    token, in another order than XLA: the quotient may differ by an ulp, before it is rounded.

    Args:
      prologue: RMSNorm with a weight `[L, K]` of x's dtype, SiluMul or None.
      x: bfloat16 or float32, M at least 8.
      layer: of the weights.
      K: columns of the result, a multiple of 128.
      rows: of the values, at least M.
      scale_rows: columns of the scales, at least M.

    Returns:
      float8_e4m3fn `[rows, K]` and float32 scales `[K / 128, scale_rows]`.
    """
    M, dtype = x.shape[0], x.dtype
    steps, m_tiles = K // ACTIVATION_GROUP, cdiv(M, TILE_GROUPS)
    # Few tokens: few K blocks for each thread block, to be done sooner.
    fits = (d for d in range(steps, 0, -1) if steps % d == 0 and m_tiles * d <= _MANY_BLOCKS)
    shares = next(fits, 1)
    blocks = steps // shares
    weights = [prologue.weight] if isinstance(prologue, RMSNorm) else []

    def kernel(x_gmem, *refs):
        *weight_gmem, layer_gmem, q_gmem, s_gmem, scratch = refs
        # The last tile overlaps the one before rather than the end, and computes the same.
        tokens = pl.ds(jnp.minimum(lax.axis_index("m") * TILE_GROUPS, M - TILE_GROUPS), TILE_GROUPS)

        def columns(kb):
            return pl.ds(kb * ACTIVATION_GROUP, ACTIVATION_GROUP)

        def load(kb):
            at = x_gmem.at[tokens, columns(kb)]
            return plgpu.load(at, layout=GROUPS, optimized=False).astype(jnp.float32)

        l = inverse = None
        if isinstance(prologue, RMSNorm):
            zero = jnp.zeros((TILE_GROUPS, ACTIVATION_GROUP), jnp.float32)
            squares = plgpu.layout_cast(zero, GROUPS)
            unrolled = math.gcd(steps, 4 * _MAX_BLOCKS)

            def add_squares(i, squares):
                for j in range(unrolled):
                    v = load(i * unrolled + j)
                    squares += v * v
                return squares

            squares = lax.fori_loop(0, steps // unrolled, add_squares, squares)
            inverse = lax.rsqrt(jnp.sum(squares, axis=1) / K + prologue.eps)
            inverse = lax.broadcast_in_dim(inverse, (TILE_GROUPS, ACTIVATION_GROUP), [0])
            l = in_stack(layer_gmem[0], prologue.weight.shape[0])

        def read(kb):
            if isinstance(prologue, SiluMul):
                return _silu_mul(load(kb), load(steps + kb), dtype)
            if isinstance(prologue, RMSNorm):
                at = weight_gmem[0].at[l, columns(kb)]
                weight = plgpu.load(at, layout=GROUPS.reduce(0), optimized=False)
                weight = lax.broadcast_in_dim(
                    weight.astype(jnp.float32), (TILE_GROUPS, ACTIVATION_GROUP), [1]
                )
                return _normalize(load(kb), inverse, weight, dtype)
            return load(kb)

        unrolled_blocks = math.gcd(blocks, _MAX_BLOCKS)

        @pl.loop(0, blocks // unrolled_blocks)
        def _quantize(i):
            first = lax.axis_index("share") * blocks + i * unrolled_blocks
            # All loads before the first store, which they could not pass.
            results = [quantize_groups(read(first + j)) for j in range(unrolled_blocks)]
            for j, (qvalue, scale) in enumerate(results):
                q_gmem[tokens, columns(first + j)] = qvalue.astype(FP8)
                scratch[j] = scale
            plgpu.commit_smem()
            for j in range(unrolled_blocks):
                _store(s_gmem.at[first + j, tokens], _from(scratch.at[j]))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, K), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        scratch_types=[plgpu.SMEM((_MAX_BLOCKS, TILE_GROUPS), jnp.float32)],
        grid=(m_tiles, shares),
        grid_names=("m", "share"),
        kernel_name="jaxquant_quantize_tokens",
    )(x, *weights, layer)


def quantize_token(
    prologue: Prologue | None, x: Float[Array, "M A"], layer: Int32[Array, "1"], K: int
) -> tuple[Float[Array, "M K"], Float32[Array, " groups"]]:
    """`quantize_tokens` for a few, a thread block for 8 groups of one, K at least 1024.

    Returns:
      float8_e4m3fn `[M, K]`, and the scales of a token side by side.
    """
    M, steps = x.shape[0], K // ACTIVATION_GROUP

    def kernel(*refs):
        *x_refs, layer_gmem, q_gmem, s_gmem, scratch = refs
        m = lax.axis_index("m")
        read = apply_prologue(prologue, x_refs, scratch, m, layer_gmem[0], steps)
        group = jnp.minimum(lax.axis_index("tile") * TILE_GROUPS, steps - TILE_GROUPS)
        qvalue, scale = quantize_groups(read(group))
        at = pl.ds(m * steps + group, TILE_GROUPS)
        q_gmem[at, :] = qvalue.astype(FP8)
        scratch[...] = scale
        plgpu.commit_smem()
        _store(s_gmem.at[at], _from(scratch))

    qvalue, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((M * steps, ACTIVATION_GROUP), FP8),
            jax.ShapeDtypeStruct((M * steps,), jnp.float32),
        ),
        scratch_types=[plgpu.SMEM((TILE_GROUPS,), jnp.float32)],
        grid=(M, cdiv(steps, TILE_GROUPS)),
        grid_names=("m", "tile"),
        kernel_name="jaxquant_quantize_token",
    )(*groups_of(x, prologue), layer)
    return qvalue.reshape(M, K), scale


def groups_of(x: Float[Array, "M A"], prologue: Prologue | None) -> list[Array]:
    """x, and the weights of an RMSNorm, as groups of 128: what `apply_prologue` reads."""
    arrays = [x, prologue.weight] if isinstance(prologue, RMSNorm) else [x]
    return [a.reshape(-1, ACTIVATION_GROUP) for a in arrays]


def apply_prologue(
    prologue: Prologue | None, refs: Any, scratch: Any, m: Any, layer: Any, steps: int
) -> Callable[[Any], Float32[Array, "8 128"]]:
    """A function that reads 8 groups of token m, from a given one on, and applies the prologue.

    Args:
      prologue: RMSNorm, SiluMul or None.
      refs: x as groups, `[tokens * groups, 128]`, and for RMSNorm the weights likewise.
      scratch: 8 floats in SMEM, this warpgroup's own.
      m: the token.
      layer: of the weights.
      steps: groups of a token after the prologue, 8 or more.
    """
    x_gmem = refs[0]
    dtype = x_gmem.dtype

    def load(ref, group):
        at = ref.at[pl.ds(group, TILE_GROUPS), :]
        return plgpu.load(at, layout=GROUPS, optimized=False).astype(jnp.float32)

    if isinstance(prologue, SiluMul):
        gates = m * 2 * steps

        def silu_mul(group):
            gate, up = load(x_gmem, gates + group), load(x_gmem, gates + steps + group)
            return _silu_mul(gate, up, dtype)

        return silu_mul
    if isinstance(prologue, RMSNorm):
        weight_gmem = refs[1]
        weights = in_stack(layer, weight_gmem.shape[0] // steps) * steps

        squares = plgpu.layout_cast(jnp.zeros((TILE_GROUPS, ACTIVATION_GROUP), jnp.float32), GROUPS)
        for first in range(0, steps, TILE_GROUPS):
            group = min(first, steps - TILE_GROUPS)
            v = load(x_gmem, m * steps + group)
            if group < first:  # count no group twice
                row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=GROUPS)
                v = jnp.where(row >= first - group, v, 0.0)
            squares += v * v
        # Mosaic adds up a whole array only where each thread has a stride of it.
        scratch[...] = jnp.sum(squares, axis=1)
        plgpu.commit_smem()
        total = jnp.sum(_from(scratch))
        inverse = lax.rsqrt(total / (steps * ACTIVATION_GROUP) + prologue.eps)

        def rms_norm(group):
            v = load(x_gmem, m * steps + group)
            return _normalize(v, inverse, load(weight_gmem, weights + group), dtype)

        return rms_norm
    return lambda group: load(x_gmem, m * steps + group)


def quantize_groups(
    v: Float32[Array, "groups 128"],
) -> tuple[Float32[Array, "groups 128"], Float32[Array, " groups"]]:
    """Values to be rounded to FP8, and scales, of activations in registers."""
    amax = jnp.maximum(jnp.max(jnp.abs(v), axis=1), ACTIVATION_AMAX_FLOOR)
    scale = ieee_divide(amax, jnp.full_like(amax, _FMAX))
    return _divide_for_rounding(v, scale), scale


def _from(scratch: Any) -> Float32[Array, "8"]:
    """8 floats of SMEM in every warp, which so adds them up, or stores a whole sector."""
    return plgpu.load(scratch, layout=plgpu.Layout.WGMMA.reduce(0))


def _store(ref: Any, value: Array) -> None:
    """Stores to GMEM, also less than a cache line, which jax 0.12 refuses unless asked."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _silu_mul(gate: Array, up: Array, dtype: Any) -> Array:
    return (gate / (1 + jnp.exp(-gate)) * up).astype(dtype).astype(jnp.float32)


def _normalize(v: Array, inverse: Any, weight: Array, dtype: Any) -> Array:
    normed = (v * inverse).astype(dtype).astype(jnp.float32)
    return (normed * weight).astype(dtype).astype(jnp.float32)


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
