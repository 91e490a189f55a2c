"""Quantizing activations on Hopper: each value is read once, and little else is done with it.

Three kernels, by what there is to do: `quantize_many` for prefill, `quantize_few` for so few
tokens that the time is that of a launch, and `quantize_ragged` for K in no whole groups.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.blocked import ACTIVATION_AMAX_FLOOR, ACTIVATION_GROUP
from jaxquant.matmul.arithmetic_sm90 import approximate_reciprocal, quotient, reciprocal
from jaxquant.matmul.prologue import Prologue, RMSNorm, SiluMul
from jaxquant.matmul.sm90 import FP8, K_BLOCK, SMEM_BYTES, cdiv, in_stack, round_up, swizzled

# Scales have a whole number of so many columns, whichever kernel writes them.
SCALE_COLUMNS = 64
_FMAX = 448.0
# 8 groups of 128 values over a warpgroup: 16 threads a group, 8 values (16 bytes of bfloat16) each.
TILE_GROUPS = 8
GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE_GROUPS, ACTIVATION_GROUP), (2, ACTIVATION_GROUP), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# So few that a thread block for each leaves no multiprocessor with two.
_FEW_TOKENS = 128
# Groups of a token that a thread block takes where it need not take all; those that a copy brings;
# those that a warpgroup has in its registers.
_SHARE_GROUPS = 16
_COPY_GROUPS = 4
_UNROLLED = 2
# Warpgroups of a thread block.
_WARPGROUPS = 2
_FEW_WARPGROUPS = 4
# Thread blocks that share a multiprocessor have to leave room for each other.
_MAX_TOKENS_BYTES = SMEM_BYTES // 2
_RAGGED_TILE_M = 64


def quantize(
    prologue: Prologue | None,
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
    whole = K % ACTIVATION_GROUP == 0
    if whole and M <= _FEW_TOKENS and K >= TILE_GROUPS * ACTIVATION_GROUP:
        return quantize_few(prologue, x, layer, K, rows, scale_rows)
    norms = isinstance(prologue, RMSNorm)
    fits = not norms or TILE_GROUPS * K * x.dtype.itemsize <= _MAX_TOKENS_BYTES
    if prologue is not None and not (whole and fits):
        x, prologue = prologue(x, layer[0]), None
    if whole:
        return quantize_many(prologue, x, layer, K, rows, scale_rows)
    if M > TILE_GROUPS:  # fewer rows TMA pads itself
        x = jnp.pad(x, ((0, -M % TILE_GROUPS), (0, 0)))
    return quantize_ragged(x, rows, scale_rows)


def quantize_many(
    prologue: Prologue | None,
    x: Float[Array, "M A"],
    layer: Int32[Array, "1"],
    K: int,
    rows: int,
    scale_rows: int,
) -> tuple[Float[Array, "rows K"], Float32[Array, "groups scale_rows"]]:
    """`quantize` of many tokens in whole groups.

    A thread block brings 8 tokens to SMEM: all of them for an RMSNorm, which passes over them
    twice, a share otherwise. Its warpgroups take groups of their own.
    """
    M, dtype, steps = x.shape[0], x.dtype, K // ACTIVATION_GROUP
    norm = prologue if isinstance(prologue, RMSNorm) else None
    halves = 2 if isinstance(prologue, SiluMul) else 1
    # Groups of a thread block, of a warpgroup, of a copy.
    share = steps if norm else _largest_divisor(steps, _SHARE_GROUPS // halves)
    warpgroups = math.gcd(share, _WARPGROUPS)
    own = share // warpgroups
    copied = math.gcd(own, _COPY_GROUPS)
    copies, unrolled = own // copied, math.gcd(copied, _UNROLLED)
    weights = [norm.weight] if norm else []

    def kernel(x_gmem, *refs):
        *weight_gmem, layer_gmem, q_gmem, s_gmem, x_smem, s_smem, sums, landed, summed = refs
        warpgroup = lax.axis_index("warpgroup")
        tokens = pl.ds(lax.axis_index("m") * TILE_GROUPS, TILE_GROUPS)
        first = (lax.axis_index("share") * warpgroups + warpgroup) * own

        for i in range(copies):  # TMA reads rows from M on as zeros
            for half in range(halves):
                groups = pl.ds(half * steps + first + i * copied, copied)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[tokens, groups],
                    x_smem.at[warpgroup, i, half],
                    landed.at[warpgroup, i],
                )

        def load(i, j, half=0):
            at = x_smem.at[warpgroup, i, half, :, j]
            return plgpu.load(at, layout=GROUPS, optimized=False).astype(jnp.float32)

        def inverse_norm(norm):
            def add_squares(i, squares):
                plgpu.barrier_wait(landed.at[warpgroup, i])
                for j in range(copied):
                    v = load(i, j)
                    squares += v * v
                return squares

            zero = jnp.zeros((TILE_GROUPS, ACTIVATION_GROUP), jnp.float32)
            squares = lax.fori_loop(0, copies, add_squares, plgpu.layout_cast(zero, GROUPS))
            sums[warpgroup] = jnp.sum(squares, axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(summed)
            plgpu.barrier_wait(summed)
            rows = GROUPS.reduce(1)
            parts = [
                plgpu.load(sums.at[w], layout=rows, optimized=False) for w in range(warpgroups)
            ]
            inverse = lax.rsqrt(functools.reduce(jnp.add, parts) / K + norm.eps)
            return lax.broadcast_in_dim(inverse, zero.shape, [0])

        inverse = inverse_norm(norm) if norm else None
        l = in_stack(layer_gmem[0], norm.weight.shape[0]) if norm else None

        def read(i, j):
            if halves == 2:
                return _silu_mul(load(i, j), load(i, j, 1), dtype)
            v = load(i, j)
            if not norm:
                return v
            columns = pl.ds((first + i * copied + j) * ACTIVATION_GROUP, ACTIVATION_GROUP)
            at = weight_gmem[0].at[l, columns]
            weight = plgpu.load(at, layout=GROUPS.reduce(0), optimized=False)
            return _normalize(v, inverse, lax.broadcast_in_dim(weight, v.shape, [1]))

        @pl.loop(0, copies)
        def _quantize(i):
            if not norm:
                plgpu.barrier_wait(landed.at[warpgroup, i])
            for j in range(0, copied, unrolled):
                # All loads before the first store, which they could not pass.
                results = [quantize_groups(read(i, j + k)) for k in range(unrolled)]
                for k, (qvalue, scale) in enumerate(results):
                    group = i * copied + j + k
                    columns = pl.ds((first + group) * ACTIVATION_GROUP, ACTIVATION_GROUP)
                    q_gmem[tokens, columns] = qvalue.astype(FP8)
                    s_smem[warpgroup, group] = scale

        plgpu.commit_smem()
        scales = s_smem.at[warpgroup, pl.ds(0, own)]
        plgpu.copy_smem_to_gmem(scales, s_gmem.at[pl.ds(first, own), tokens])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, K), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        scratch_types=[
            # A tiling that tiles nothing: left to itself, Mosaic swizzles what TMA writes, and
            # does not take it into account where it reads a slice.
            plgpu.SMEM(
                (warpgroups, copies, halves, TILE_GROUPS, copied, ACTIVATION_GROUP),
                dtype,
                transforms=(plgpu.TilingTransform((ACTIVATION_GROUP,)),),  # pyright: ignore[reportAbstractUsage]
            ),
            # TMA reads from multiples of 128 bytes: where a warpgroup's scales begin.
            plgpu.SMEM((warpgroups, round_up(own, 4), TILE_GROUPS), jnp.float32),
            plgpu.SMEM((warpgroups, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_arrivals=halves, num_barriers=(warpgroups, copies)),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(cdiv(M, TILE_GROUPS), steps // share),
        grid_names=("m", "share"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_many",
    )(x.reshape(M, -1, ACTIVATION_GROUP), *weights, layer)


def quantize_few(
    prologue: Prologue | None,
    x: Float[Array, "M A"],
    layer: Int32[Array, "1"],
    K: int,
    rows: int,
    scale_rows: int | None = None,
) -> tuple[Float[Array, "rows K"], Float32[Array, "..."]]:
    """`quantize` of a few tokens in 8 or more whole groups.

    A thread block has 8 groups of a token in its registers; or, where an RMSNorm has to see all of
    a token, all.

    Args:
      prologue: see `quantize`.
      x: likewise.
      layer: likewise.
      K: likewise.
      rows: likewise.
      scale_rows: of the scales; None to have the scales of a token side by side, `[M * groups]`.
    """
    M, dtype, steps = x.shape[0], x.dtype, K // ACTIVATION_GROUP
    norm, tiles = prologue if isinstance(prologue, RMSNorm) else None, cdiv(steps, TILE_GROUPS)
    warpgroups = min(_FEW_WARPGROUPS, tiles) if norm else 1
    own, shares = (cdiv(tiles, warpgroups), 1) if norm else (1, tiles)
    overlap = warpgroups * own * TILE_GROUPS != steps

    def kernel(*refs):
        *x_refs, layer_gmem, q_gmem, s_gmem, sums, summed = refs
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        m, tile = lax.div(block, shares), lax.rem(block, shares) + warpgroup * own
        # A tile that would pass the end overlaps those before instead, and computes the same.
        firsts = [jnp.minimum((tile + i) * TILE_GROUPS, steps - TILE_GROUPS) for i in range(own)]

        def normalized(norm):
            x_gmem, weight_gmem = x_refs
            weights = in_stack(layer_gmem[0], weight_gmem.shape[0] // steps) * steps
            values = [_load_groups(x_gmem, m * steps + f).astype(jnp.float32) for f in firsts]
            scales = [_load_groups(weight_gmem, weights + first) for first in firsts]
            squares = [
                _square_from(v, (tile + i) * TILE_GROUPS - first, overlap)
                for i, (v, first) in enumerate(zip(values, firsts, strict=True))
            ]
            sums[warpgroup] = jnp.sum(functools.reduce(jnp.add, squares), axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(summed)
            plgpu.barrier_wait(summed)
            parts = [_from(sums.at[w]) for w in range(warpgroups)]
            inverse = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, parts)) / K + norm.eps)
            return [_normalize(v, inverse, scale) for v, scale in zip(values, scales, strict=True)]

        if norm:
            values = normalized(norm)
        else:
            read = apply_prologue(prologue, x_refs, None, m, None, steps)
            values = [read(first) for first in firsts]
        for v, first in zip(values, firsts, strict=True):
            qvalue, scale = quantize_groups(v)
            groups = pl.ds(m * steps + first, TILE_GROUPS)
            q_gmem[groups, :] = qvalue.astype(FP8)
            at = s_gmem.at[groups]
            if scale_rows is not None:
                at = s_gmem.at[pl.ds(first, TILE_GROUPS), m]
            store(at, scale)

    scales = (M * steps,) if scale_rows is None else (steps, scale_rows)
    qvalue, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows * steps, ACTIVATION_GROUP), FP8),
            jax.ShapeDtypeStruct(scales, jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((warpgroups, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        # One axis: others end at 65535.
        grid=(M * shares,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_few",
    )(*groups_of(x, prologue), layer)
    return qvalue.reshape(rows, K), scale


def quantize_persistent(norm, x, layer, K, rows, scale_rows, *, warpgroups, blocks):
    M, dtype, steps = x.shape[0], x.dtype, K // ACTIVATION_GROUP
    tiles = cdiv(steps, TILE_GROUPS)
    warpgroups = min(warpgroups, tiles)
    own = cdiv(tiles, warpgroups)
    overlap = warpgroups * own * TILE_GROUPS != steps

    def kernel(x_gmem, weight_gmem, layer_gmem, q_gmem, s_gmem, sums, summed):
        warpgroup = lax.axis_index("warpgroup")
        tile = warpgroup * own
        firsts = [jnp.minimum((tile + i) * TILE_GROUPS, steps - TILE_GROUPS) for i in range(own)]
        weights = in_stack(layer_gmem[0], weight_gmem.shape[0] // steps) * steps
        scales = [_load_groups(weight_gmem, weights + first) for first in firsts]

        def load(m):
            return tuple(_load_groups(x_gmem, m * steps + f) for f in firsts)

        def token(info, carry):
            (m,), (turn, *values) = info.index, carry
            following = load(jnp.minimum(m + blocks, M - 1))
            values = [v.astype(jnp.float32) for v in values]
            squares = [
                _square_from(v, (tile + i) * TILE_GROUPS - first, overlap)
                for i, (v, first) in enumerate(zip(values, firsts, strict=True))
            ]
            sums[turn, warpgroup] = jnp.sum(functools.reduce(jnp.add, squares), axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(summed)
            plgpu.barrier_wait(summed)
            parts = [_from(sums.at[turn, w]) for w in range(warpgroups)]
            inverse = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, parts)) / K + norm.eps)
            for v, weight, first in zip(values, scales, firsts, strict=True):
                qvalue, scale = quantize_groups(_normalize(v, inverse, weight))
                q_gmem[pl.ds(m * steps + first, TILE_GROUPS), :] = qvalue.astype(FP8)
                store(s_gmem.at[pl.ds(first, TILE_GROUPS), m], scale)
            return 1 - turn, *following

        plgpu.nd_loop((M,), collective_axes="sm", init_carry=(jnp.int32(0), *load(lax.axis_index("sm"))))(token)

    qvalue, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows * steps, ACTIVATION_GROUP), FP8),
            jax.ShapeDtypeStruct((steps, scale_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((2, warpgroups, TILE_GROUPS), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name="jaxquant_quantize_norm",
    )(*groups_of(x, norm), layer)
    return qvalue.reshape(rows, K), scale


def quantize_ragged(
    x: Float[Array, "M K"], rows: int, scale_rows: int
) -> tuple[Float[Array, "rows K"], Float32[Array, "(K+127)//128 scale_rows"]]:
    """`quantize` without a prologue, for K in whole groups or not.

    Args:
      x: bfloat16 or float32; K a multiple of 32, M one of 8 or less than 8.
      rows: of the values; those from M on are zeros.
      scale_rows: columns of the scales, a multiple of 64; those from M on are the least scale.

    Returns:
      float8_e4m3fn values `[rows, K]`, and float32 scales `[ceil(K / 128), scale_rows]`.
    """
    K = x.shape[1]
    steps = cdiv(K, K_BLOCK)
    m_tiles = cdiv(max(rows, scale_rows), _RAGGED_TILE_M)
    blocks = math.gcd(steps, _COPY_GROUPS)
    tile = (blocks, _RAGGED_TILE_M, K_BLOCK)

    def kernel(x_gmem, q_gmem, s_gmem, x_smem, q_smem, s_smem, landed):
        tokens = pl.ds(lax.axis_index("m") * _RAGGED_TILE_M, _RAGGED_TILE_M)
        kb0 = lax.axis_index("k") * blocks

        def columns(i):
            return pl.ds((kb0 + i) * K_BLOCK, K_BLOCK)

        for i in range(blocks):  # TMA reads what lies outside x as zeros
            plgpu.copy_gmem_to_smem(x_gmem.at[tokens, columns(i)], x_smem.at[i], landed.at[i])

        @pl.loop(0, blocks)
        def _quantize(i):
            plgpu.barrier_wait(landed.at[i])
            v = plgpu.load(x_smem.at[i], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
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
            plgpu.SMEM(tile, x.dtype, transforms=swizzled(K, x.dtype)),
            plgpu.SMEM(tile, FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((blocks, _RAGGED_TILE_M), jnp.float32),
            plgpu.Barrier(num_barriers=blocks),
        ],
        grid=(m_tiles, steps // blocks),
        grid_names=("m", "k"),
        kernel_name="jaxquant_quantize_ragged",
    )(x)


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

    if isinstance(prologue, SiluMul):
        gates = m * 2 * steps

        def silu_mul(group):
            halves = (_load_groups(x_gmem, gates + half * steps + group) for half in range(2))
            return _silu_mul(*(half.astype(jnp.float32) for half in halves), dtype)

        return silu_mul
    if isinstance(prologue, RMSNorm):
        weight_gmem = refs[1]
        weights = in_stack(layer, weight_gmem.shape[0] // steps) * steps

        squares = plgpu.layout_cast(jnp.zeros((TILE_GROUPS, ACTIVATION_GROUP), jnp.float32), GROUPS)
        for first in range(0, steps, TILE_GROUPS):
            group = min(first, steps - TILE_GROUPS)
            v = _load_groups(x_gmem, m * steps + group).astype(jnp.float32)
            squares += _square_from(v, first - group, group < first)
        # Mosaic adds up a whole array only where each thread has a stride of it.
        scratch[...] = jnp.sum(squares, axis=1)
        plgpu.commit_smem()
        total = jnp.sum(_from(scratch))
        inverse = lax.rsqrt(total / (steps * ACTIVATION_GROUP) + prologue.eps)

        def rms_norm(group):
            v = _load_groups(x_gmem, m * steps + group).astype(jnp.float32)
            return _normalize(v, inverse, _load_groups(weight_gmem, weights + group))

        return rms_norm
    return lambda group: _load_groups(x_gmem, m * steps + group).astype(jnp.float32)


def _load_groups(ref: Any, group: Any) -> Float[Array, "8 128"]:
    at = ref.at[pl.ds(group, TILE_GROUPS), :]
    return plgpu.load(at, layout=GROUPS, optimized=False)


def _square_from(v: Array, row: Any, overlaps: bool) -> Array:
    """v squared, and zero before a row where tiles overlap: no group is to count twice."""
    if overlaps:
        v = jnp.where(plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=GROUPS) >= row, v, 0.0)
    return v * v


def quantize_groups(
    v: Float32[Array, "groups 128"], layout: Any = GROUPS
) -> tuple[Float32[Array, "groups 128"], Float32[Array, " groups"]]:
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


def _from(scratch: Any) -> Float32[Array, "8"]:
    """8 floats of SMEM in every warp, which so adds them up, or stores a whole sector."""
    return plgpu.load(scratch, layout=plgpu.Layout.WGMMA.reduce(0))


def store(ref: Any, value: Array) -> None:
    """Stores, also less than a cache line or less than fast, which jax 0.12 refuses unless asked."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _silu_mul(gate: Array, up: Array, dtype: Any) -> Array:
    logistic = approximate_reciprocal(1 + jnp.exp(-gate), GROUPS)
    return (gate * logistic * up).astype(dtype).astype(jnp.float32)


def _normalize(v: Array, inverse: Any, weight: Array) -> Array:
    # In the weight's dtype, of which one instruction multiplies two.
    return ((v * inverse).astype(weight.dtype) * weight).astype(jnp.float32)


def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
