"""Quantizing activations on Hopper: each value is read once, and little else is done with it.

Four kernels, by what there is to do: `quantize_tokens`, `quantize_short` for tokens of
few groups, `quantize_normalized` for what stands behind an RMSNorm, which has to see all of a token
first, and `quantize_ragged` for K in no whole groups, and for more or fewer tokens than the others
can address.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.blocked import ACTIVATION_AMAX_FLOOR, ACTIVATION_GROUP
from jaxquant.hopper import interpreted
from jaxquant.matmul.arithmetic_sm90 import approximate_reciprocal, quotient, reciprocal
from jaxquant.matmul.prologue import RMSNorm, SiluMul, rounded
from jaxquant.matmul.row_groups_sm90 import (
    GROUPS,
    TILE_GROUPS,
    grouped,
    grouped_shape,
    load_groups,
    load_row,
    store_row,
    store_scales,
)
from jaxquant.matmul.sm90 import FP8, K_BLOCK, cdiv, in_stack, round_up, store, swizzled

# Scales have a whole number of so many columns, whichever kernel writes them.
SCALE_COLUMNS = 64
_FMAX = 448.0
# Warpgroups that share a token, and tiles that one has in its registers, at most.
_NORM_WARPGROUPS = 2
_MAX_TILES = 8
# Warpgroups that normalize at once: eight on each multiprocessor of an H200.
_RESIDENT = 1056
# What is read without TMA has offsets of 32 bits.
_MAX_BYTES = 1 << 31
# Groups of a thread block where K is ragged.
_COPY_GROUPS = 4
_RAGGED_TILE_M = 64


def quantize(
    prologue: RMSNorm | SiluMul | None,
    x: Float[Array, "M A"],
    layer: Int32[Array, "1"],
    K: int,
    rows: int,
) -> tuple[Float[Array, "rows K"], Float32[Array, "(K+127)//128 S"]]:
    """`jaxquant.blocked.quantize_activations(prologue(x, layer))`, in the products' layout.

    The values are those of `quantize_activations` to the byte. An RMSNorm adds up its squares in
    another order than XLA, and a SiluMul divides more coarsely: before it is rounded to x's dtype,
    what they give may differ by an ulp.

    Args:
      prologue: RMSNorm with a weight `[L, K]` of x's dtype, SiluMul or None.
      x: bfloat16 or float32.
      layer: of the weights.
      K: columns after the prologue, a multiple of 32.
      rows: of the values, a multiple of 8 and at least M.

    Returns:
      float8_e4m3fn `[rows, K]`, and float32 scales, transposed: S is M rounded up to a multiple of
      64. What belongs to rows from M on is undefined.
    """
    M = x.shape[0]
    scale_rows = round_up(M, SCALE_COLUMNS)
    tiles = in_tiles(x, K)
    groups = cdiv(K, ACTIVATION_GROUP)
    if isinstance(prologue, RMSNorm):
        small = x.size * x.dtype.itemsize < _MAX_BYTES
        if small and groups <= _NORM_WARPGROUPS * _MAX_TILES * TILE_GROUPS:
            return quantize_normalized(prologue, x, layer, rows, scale_rows)
        x, prologue = prologue(x, layer[0]), None
    if tiles:
        return quantize_tokens(prologue, x, K, rows, scale_rows)
    if M >= TILE_GROUPS and K % ACTIVATION_GROUP == 0 and _bytes(x) < _MAX_BYTES:
        return quantize_short(prologue, x, K, rows, scale_rows)
    if prologue is not None and K % ACTIVATION_GROUP:
        x, prologue = prologue(x, layer[0]), None
    if M > TILE_GROUPS:  # fewer rows TMA pads itself
        x = jnp.pad(x, ((0, -M % TILE_GROUPS), (0, 0)))
    return quantize_ragged(prologue, x, K, rows, scale_rows)


def in_tiles(x: Float[Array, "M A"], K: int) -> bool:
    """Whether `quantize_tokens` takes x."""
    groups, rest = divmod(K, ACTIVATION_GROUP)
    return rest == 0 and groups >= TILE_GROUPS and _bytes(x) < _MAX_BYTES


def _bytes(x: Array) -> int:
    return x.size * x.dtype.itemsize


def quantize_tokens(
    prologue: SiluMul | None,
    x: Float[Array, "M A"],
    K: int,
    rows: int,
    scale_rows: int | None = None,
    places: Int32[Array, " Mk"] | None = None,
) -> tuple[Float[Array, "rows K"], Float32[Array, "..."]]:
    """`quantize` of tokens of 8 or more whole groups, of which a thread block has 8.

    Args:
      prologue: see `quantize`.
      x: likewise.
      K: likewise.
      rows: likewise.
      scale_rows: of the scales; None to have the scales of a token side by side, `[M * groups]`.
      places: the k rows that become the first token, then those of the second, and so on; without
        them each token becomes one row, in order.
    """
    M, steps = x.shape[0], K // ACTIVATION_GROUP
    tiles = cdiv(steps, TILE_GROUPS)
    targets = [] if places is None else [places]
    copies = 1 if places is None else places.shape[0] // M

    def kernel(x_gmem, *refs):
        *places_gmem, q_gmem, s_gmem = refs
        block = lax.axis_index("block")
        m, tile = lax.div(block, tiles), lax.rem(block, tiles)
        # A tile that would pass the end overlaps the one before instead, and computes the same.
        first = jnp.minimum(tile * TILE_GROUPS, steps - TILE_GROUPS)
        if prologue is None:
            values = load_groups(x_gmem, m * steps + first).astype(jnp.float32)
        else:
            halves = [load_groups(x_gmem, (2 * m + half) * steps + first) for half in range(2)]
            gate, up = (half.astype(jnp.float32) for half in halves)
            values = silu_mul(gate, up, x.dtype, GROUPS).astype(jnp.float32)
        rows_of_m = [
            jnp.clip(ref[m * copies + i], 0, rows - 1) for ref in places_gmem for i in range(copies)
        ] or [m]
        qvalue, scale = quantize_groups(values)
        qvalue = qvalue.astype(FP8)
        for row in rows_of_m:
            groups = pl.ds(row * steps + first, TILE_GROUPS)
            q_gmem[groups, :] = qvalue
            at = s_gmem.at[groups]
            if scale_rows is not None:
                at = s_gmem.at[pl.ds(first, TILE_GROUPS), row]
            store(at, scale)

    qvalue, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows * steps, ACTIVATION_GROUP), FP8),
            jax.ShapeDtypeStruct(
                (M * steps,) if scale_rows is None else (steps, scale_rows), jnp.float32
            ),
        ),
        grid=(M * tiles,),  # only the last axis goes beyond 65535
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_tokens",
    )(x.reshape(-1, ACTIVATION_GROUP), *targets)
    return qvalue.reshape(rows, K), scale


def quantize_short(
    prologue: SiluMul | None, x: Float[Array, "M A"], K: int, rows: int, scale_rows: int
) -> tuple[Float[Array, "rows K"], Float32[Array, "groups scale_rows"]]:
    """`quantize` of 8 or more tokens in whole groups: a thread block has one group of 8 tokens."""
    M, steps = x.shape[0], K // ACTIVATION_GROUP

    def kernel(x_gmem, q_gmem, s_gmem):
        block = lax.axis_index("block")
        group = lax.rem(block, steps)
        # A tile that would pass the end overlaps the one before instead, and computes the same.
        tokens = pl.ds(
            jnp.minimum(lax.div(block, steps) * TILE_GROUPS, M - TILE_GROUPS), TILE_GROUPS
        )

        def columns(group):
            return pl.ds(group * ACTIVATION_GROUP, ACTIVATION_GROUP)

        def load(group):
            at = x_gmem.at[tokens, columns(group)]
            return plgpu.load(at, layout=GROUPS, optimized=False).astype(jnp.float32)

        values = load(group)
        if prologue is not None:
            values = silu_mul(values, load(steps + group), x.dtype, GROUPS).astype(jnp.float32)
        qvalue, scale = quantize_groups(values)
        q_gmem[tokens, columns(group)] = qvalue.astype(FP8)
        store(s_gmem.at[group, tokens], scale)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, K), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        grid=(cdiv(M, TILE_GROUPS) * steps,),  # only the last axis goes beyond 65535
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_short",
    )(x)


def quantize_normalized(
    norm: RMSNorm, x: Float[Array, "M K"], layer: Int32[Array, "1"], rows: int, scale_rows: int
) -> tuple[Float[Array, "rows K"], Float32[Array, "groups scale_rows"]]:
    """`quantize` of tokens behind an RMSNorm.

    A thread block has all of a token in its registers, and reads the next one meanwhile. The norm's
    weight stays.
    """
    M, K = x.shape
    steps = cdiv(K, ACTIVATION_GROUP)
    tiles = cdiv(steps, TILE_GROUPS)
    warpgroups = min(_NORM_WARPGROUPS, tiles)
    own = cdiv(tiles, warpgroups)
    overlap = warpgroups * own * TILE_GROUPS != steps
    blocks = min(_RESIDENT // warpgroups, M)

    def kernel(x_gmem, weight_gmem, layer_gmem, q_gmem, s_gmem, sums, summed):
        warpgroup = lax.axis_index("warpgroup")
        starts = [(warpgroup * own + i) * TILE_GROUPS for i in range(own)]
        # A tile that would pass the end overlaps those before instead, and computes the same.
        firsts = [jnp.minimum(start, max(0, steps - TILE_GROUPS)) for start in starts]
        l = in_stack(layer_gmem[0], norm.weight.shape[0])
        scales = [load_row(weight_gmem, l, first, K) for first in firsts]

        def load(m):
            return [load_row(x_gmem, m, first, K) for first in firsts]

        @plgpu.nd_loop(
            (M,), collective_axes="block", init_carry=(0, *load(lax.axis_index("block")))
        )
        def _quantize(info, carry):
            (m,), (turn, *current) = info.index, carry
            following = load(jnp.minimum(m + blocks, M - 1)) if blocks < M else current
            values = [v.astype(jnp.float32) for v in current]
            squares = [
                square_from(v, start - first, overlap)
                for v, start, first in zip(values, starts, firsts, strict=True)
            ]
            # Sums take turns in two places: who is ahead writes none that is still to be read.
            sums[turn, warpgroup] = jnp.sum(functools.reduce(jnp.add, squares), axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(summed)
            plgpu.barrier_wait(summed)
            parts = [from_smem(sums.at[turn, w]) for w in range(warpgroups)]
            inverse = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, parts)) / K + norm.eps)
            for v, weight, first in zip(values, scales, firsts, strict=True):
                qvalue, scale = quantize_groups(normalize(v, inverse, weight))
                store_row(q_gmem, m, first, qvalue.astype(FP8), K)
                store_scales(s_gmem, first, m, scale)
            return 1 - turn, *following

    qvalue, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(grouped_shape(rows, K), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((2, warpgroups, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_normalized",
    )(grouped(x, K), grouped(norm.weight, K), layer)
    return qvalue.reshape(rows, K), scale


def quantize_ragged(
    prologue: SiluMul | None, x: Float[Array, "M A"], K: int, rows: int, scale_rows: int
) -> tuple[Float[Array, "rows K"], Float32[Array, "(K+127)//128 scale_rows"]]:
    """`quantize` without an RMSNorm, for K in whole groups or not.

    Args:
      prologue: None if K is not in whole groups.
      x: bfloat16 or float32; M a multiple of 8 or less than 8.
      K: a multiple of 32.
      rows: of the values; those from M on are zeros.
      scale_rows: columns of the scales, a multiple of 64; those from M on are the least scale.

    Returns:
      float8_e4m3fn values `[rows, K]`, and float32 scales `[ceil(K / 128), scale_rows]`.
    """
    halves = 1 if prologue is None else 2
    steps = cdiv(K, K_BLOCK)
    m_tiles = cdiv(max(rows, scale_rows), _RAGGED_TILE_M)
    blocks = math.gcd(steps, _COPY_GROUPS // halves)
    tile = (blocks, _RAGGED_TILE_M, K_BLOCK)

    def kernel(x_gmem, q_gmem, s_gmem, x_smem, q_smem, s_smem, landed):
        tokens = pl.ds(lax.axis_index("m") * _RAGGED_TILE_M, _RAGGED_TILE_M)
        kb0 = lax.axis_index("k") * blocks

        def columns(i):
            return pl.ds((kb0 + i) * K_BLOCK, K_BLOCK)

        for i in range(blocks):  # TMA reads what lies outside x as zeros
            for half in range(halves):
                of_half = pl.ds((half * steps + kb0 + i) * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[tokens, of_half], x_smem.at[half, i], landed.at[i]
                )

        @pl.loop(0, blocks)
        def _quantize(i):
            plgpu.barrier_wait(landed.at[i])

            def load(half):
                v = plgpu.load(x_smem.at[half, i], layout=plgpu.Layout.WGMMA)
                return v.astype(jnp.float32)

            v = load(0)
            if prologue is not None:
                v = silu_mul(v, load(1), x.dtype, plgpu.Layout.WGMMA).astype(jnp.float32)
            qvalue, scale = quantize_groups(v, plgpu.Layout.WGMMA)
            q_smem[i] = qvalue.astype(FP8)
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
            plgpu.SMEM((halves, *tile), x.dtype, transforms=swizzled(K, x.dtype)),
            plgpu.SMEM(tile, FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((blocks, _RAGGED_TILE_M), jnp.float32),
            plgpu.Barrier(num_arrivals=halves, num_barriers=blocks),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=prologue is not None),
        grid=(m_tiles, steps // blocks),
        grid_names=("m", "k"),
        kernel_name="jaxquant_quantize_ragged",
    )(x)


def square_from(v: Array, row: Any, overlaps: bool) -> Array:
    """v squared, and zero before a row where tiles overlap: no group is to count twice."""
    if overlaps:
        v = jnp.where(plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=GROUPS) >= row, v, 0.0)
    return v * v


def quantize_groups(
    v: Float32[Array, "groups K"], layout: Any = GROUPS
) -> tuple[Float32[Array, "groups K"], Float32[Array, " groups"]]:
    """Values to be rounded to FP8, and scales, of activations in registers in that layout."""
    rows = layout.reduce(1)

    def constant(value):
        return plgpu.layout_cast(jnp.full(amax.shape, value, jnp.float32), rows)

    def spread(a):
        return lax.broadcast_in_dim(a, v.shape, [0])

    amax = jnp.maximum(jnp.max(jnp.abs(v), axis=1), ACTIVATION_AMAX_FLOOR)
    scale = quotient(amax, constant(_FMAX), constant(1 / _FMAX), rows)
    inverse = reciprocal(scale, rows)
    return quotient(v, spread(scale), spread(inverse), layout), scale


def from_smem(scratch: Any) -> Float32[Array, "8"]:
    """8 floats of SMEM in every warp, which so adds them up, or stores a whole sector."""
    return plgpu.load(scratch, layout=plgpu.Layout.WGMMA.reduce(0))


def silu_mul(gate: Array, up: Array, dtype: Any, layout: Any) -> Array:
    """SiluMul of float32 values in registers, in that layout, rounded to dtype."""
    logistic = approximate_reciprocal(1 + jnp.exp(-gate), layout)
    return (gate * logistic * up).astype(dtype)


def normalize(v: Array, inverse: Any, weight: Array) -> Array:
    """RMSNorm of float32 values in registers, given what they are multiplied with first."""
    normed = (v * inverse).astype(weight.dtype)
    if interpreted():  # XLA:CPU would not round the product
        return rounded(normed.astype(jnp.float32) * weight, weight.dtype).astype(jnp.float32)
    # In the weight's dtype, of which one instruction multiplies two.
    return (normed * weight).astype(jnp.float32)
