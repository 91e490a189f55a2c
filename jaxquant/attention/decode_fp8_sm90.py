"""Decode attention over an FP8 cache on Hopper: as in `decode_sm90`, but FP8 on the tensor cores.

Nothing of the cache is converted: keys and values go from GMEM to the tensor cores as they are.
What they are multiplied with, queries and weights, is a sum of two FP8 numbers, which is as precise
as a BF16 one:

    x = unit * (first + second / 32),  first = fp8(x / unit),  second = fp8((x / unit - first) * 32)

The two are rows of one operand, so that a product is still one instruction: wgmma has at least 8
columns, and a group of queries leaves some of them idle otherwise.

A slot's scale of keys multiplies its logits. That of values joins them,

    p = exp2(logit + log2(scale_v) - maximum),  out = sum(p * v) / sum(p / scale_v)

so that p is at most 1 in every slot, and has one unit.

The logits of a tile are computed while the ones before become weights. Keys are copied a tile
further ahead than values, which are needed later.

The last tile comes first, so that what it takes beyond its bytes is behind the copies of others.

Of many heads, four share a multiprocessor, each with a warpgroup: 512 heads are one wave. To write
the new values takes 0.9 us of 37 at batch 64; through a tile in SMEM, as whole pages, it takes 0.3
more.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from jaxquant.array import QuantizedArray
from jaxquant.attention import values_sm90
from jaxquant.attention.cache import FP8, TILE
from jaxquant.attention.sm90 import (
    ROW,
    SMEM_BYTES,
    SMEM_RESERVED,
    TRANSPOSED,
    WGMMA,
    Cluster,
    Config,
    Result,
    across,
    column,
    default_cut,
    in_place,
    padded_group,
    reduced,
    scale_of,
)
from jaxquant.matmul.arithmetic_sm90 import quotient, reciprocal
from jaxquant.matmul.sm90 import in_stack, store, swizzled
from jaxquant.matmul.tokens import QuantizedTokens

_LOG2_E = math.log2(math.e)
# Heads for each multiprocessor from which pairs of them leave few idle.
_MANY = 1.75
# Floats of SMEM for the reductions of a thread block's warpgroups.
_REDUCED = 512
# What a first piece holds at most, and what a second one is divided by.
_TOP = 256.0
_SECOND = 32.0
# Smaller queries have its unit, whose inverse would overflow otherwise.
_LEAST_AMAX = 2.0**-100
# Slots of which a multiple is copied of the last tile; of more splits, all of it: there, what it
# takes to find out is longer than what is not copied.
_PIECE = 32
_EXACT_SPLITS = 2
# Exponent of a float32, and 254 in its place: twice the bias.
_EXPONENT = 0x7F800000
_TWICE_BIAS = 0x7F000000


def default_config(B: int, H: int, G: int, S: int, D: int, sms: int) -> Config:
    """As many splits as leave each of the `sms` multiprocessors at most one thread block.

    Of many heads, a multiprocessor has four at a time, in two thread blocks of two.
    """
    heads, N = B * H, padded_group(G)

    def fitting_stages(residents: int, splits: int) -> int:
        """Stages beside the rest where `residents` thread blocks share the multiprocessor."""
        parts = Cluster(heads, splits, D, N).nbytes
        fixed = SMEM_RESERVED + 2 * N * (D + TILE) + 8 * TILE + parts
        return (SMEM_BYTES // residents - fixed) // (2 * TILE * (D + 4))

    # Larger ones leave no SMEM or registers for four.
    if (D, N) == (128, 8) and heads % 2 == 0 and heads > sms * _MANY:
        return Config(TILE, 2, 1, 2)
    return Config(TILE, *default_cut(heads, S, TILE, sms, fitting_stages))


def append_and_attend(
    qkv: BFloat16[Array, "B R D"],
    k: QuantizedArray,
    v: QuantizedArray,
    layer: Int32[Array, "1"],
    lengths: Int32[Array, " B"],
    rotation: tuple[Float32[Array, "B pairs"], Float32[Array, "B pairs"]] | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    config: Config,
    quantized: bool = False,
) -> tuple[BFloat16[Array, "B Hq D"] | QuantizedTokens, QuantizedArray, QuantizedArray]:
    """`jaxquant.attention.append_and_attend` in one kernel, which writes to the cache in place.

    Args:
      qkv: D a multiple of 64 up to 256, with a rotation of 128; at most 64 query heads for each of
        the cache's.
      k: as in `jaxquant.attention.cache`. No value, filled or not, is NaN; scales of what is not
        filled may be anything.
      v: likewise.
      layer: which of the L.
      lengths: filled slots, with the new token's.
      rotation: cosines and sines, or None.
      window: last slots that are attended to, or None for all.
      scale: of the logits.
      softcap: bound of the logits, or None.
      config: see `default_config`; its tile is 128.
      quantized: whether to give QuantizedTokens; see `sm90.is_quantizable`.
    """
    L, B, H, S, D = k.shape
    G = qkv.shape[1] // H - 2
    N = padded_group(G)
    if (missing := N - G - 2 * H) > 0:
        qkv = jnp.pad(qkv, ((0, 0), (0, missing), (0, 0)))
    tables = rotation or ()
    # The first and the second of what is rotated in pairs, or all that there is.
    half = D // 2 if tables else D
    stages, splits, heads = config.stages, config.splits, config.heads
    cluster, result = Cluster(B * H, splits, D, N), Result(B, H, G, D, quantized)
    results = len(result.out_type)
    exact = splits <= _EXACT_SPLITS

    def pieces_smem(cols, of):
        return plgpu.SMEM((heads, 2 * N, cols), FP8, transforms=swizzled(of, FP8))

    def rows(value, count):
        return plgpu.layout_cast(jnp.full((count,), value, jnp.float32), ROW)

    def over_columns(values):
        return lax.broadcast_in_dim(values, (*values.shape, N), [0])

    def rotated(halves, table):
        if table:
            (x1, x2), (cos, sin) = halves, table
            halves = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        return [x.astype(jnp.bfloat16).astype(jnp.float32) for x in halves]

    def store_pieces(ref, x):
        """Both of x `[rows, N]`, at most 256, as rows of an operand."""
        x = plgpu.layout_cast(x, TRANSPOSED)
        first = x.astype(FP8)
        second = ((x - first.astype(jnp.float32)) * _SECOND).astype(FP8)
        ref.at[pl.ds(0, N)].T[...] = first
        ref.at[pl.ds(N, N)].T[...] = second

    def product(a, b, meanwhile):
        """(`a @ b^T`, what `meanwhile` returns.)"""

        def run(accumulator):
            plgpu.wgmma(accumulator, a, b.T)
            result = meanwhile()
            return accumulator[...], result

        both, result = pl.run_scoped(run, plgpu.ACC((a.shape[0], 2 * N), jnp.float32))
        return of_pieces(both), result

    def of_pieces(both):
        return both[:, :N] + both[:, N:] * (1 / _SECOND)

    def scaled(logits):
        """In units of log(2), for exp2."""
        if softcap is None:
            return logits * (scale * _LOG2_E)
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        squared = jnp.exp2(logits * (2 * scale / softcap * _LOG2_E))
        return softcap * _LOG2_E * (1 - 2 / (squared + 1))

    def kernel(qkv_gmem, layer_gmem, lengths_gmem, *refs):
        tables_gmem, refs = refs[: len(tables)], refs[len(tables) :]
        (k_gmem, ks_gmem, v_gmem, vs_gmem), refs = refs[:4], refs[4:]
        out_gmem, refs = refs[:results], refs[results:]
        *parts_gmem, q_smem, p_smem, reduce_smem, k_full, v_full = refs[: 5 + len(cluster.out_type)]
        exchange = refs[5 + len(cluster.out_type) :]
        warpgroup = lax.axis_index("warpgroup") if heads > 1 else 0
        split = lax.axis_index("split") if splits > 1 else 0
        head = lax.axis_index("block") * heads + warpgroup
        b, h = lax.div(head, H), lax.rem(head, H)
        q_smem, p_smem = q_smem.at[warpgroup], p_smem.at[warpgroup]

        def reduce(operation, value):
            return reduced(operation, value, reduce_smem.at[warpgroup])

        cluster.begin(split, exchange)
        # Slices that start here may reach beyond the array. Pallas would refuse static ones.
        zero = lax.mul(head, 0)
        halves = [pl.ds(i, half) for i in range(0, D, half)]

        def load_rows(ref, *index):
            """A value for each row of an accumulator."""
            values = plgpu.load(ref.at[index], layout=ROW, optimized=False)
            return values.astype(jnp.float32)

        length, layer = lengths_gmem[b], layer_gmem[0]
        # Loaded ahead of the copies, so as to wait for both at once.
        group = pl.ds(h * G, N)
        token_q = [
            plgpu.load(qkv_gmem.at[b, group, d].T, layout=TRANSPOSED, optimized=False)
            for d in halves
        ]
        token_k = [load_rows(qkv_gmem, b, H * G + h, d) for d in halves]
        token_v = load_rows(qkv_gmem, b, H * G + H + h)
        table = [load_rows(ref, b) for ref in tables_gmem]
        # Of what the cache holds already.
        end = jnp.minimum(length, S) - 1
        start = lax.mul(end, 0) if window is None else jnp.maximum(end + 1 - window, 0)
        tiles = lax.div(end + (TILE - 1), TILE)
        steps = lax.div(tiles - lax.div(start, TILE) - split + (splits - 1), splits)
        row = in_stack(layer, L) * (B * H) + head

        def first_slot(step):
            return (tiles - 1 - split - step * splits) * TILE

        def v_tile(slot):
            return v_gmem.at[row * (S // TILE) + lax.div(slot, TILE)]

        def attended(shape, slot0, layout: Any = WGMMA):
            slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + slot0
            return (slot >= start) & (slot < end)

        def quantized(values, scale):
            scale = rows(scale, values.shape[0])
            return quotient(values, scale, reciprocal(scale, ROW), ROW).astype(FP8)

        def append(token_smem):
            """Rotates the token and stores it; the sums where it alone is attended to."""
            q = [plgpu.layout_cast(x, WGMMA).astype(jnp.float32) for x in token_q]
            q = rotated(q, [over_columns(values) for values in table])
            k = rotated(token_k, table)
            # One reduction for all three.
            wide = [
                lax.concatenate(q, 0),
                over_columns(lax.concatenate(k, 0)),
                over_columns(token_v),
            ]
            amax = reduce("max", jnp.abs(lax.concatenate(wide, 1)))
            # The power of two at or below the largest, over that of a piece.
            bits = lax.bitcast_convert_type(jnp.maximum(amax[:N], _LEAST_AMAX), jnp.int32)
            bits = (bits & _EXPONENT) - (7 << 23)
            unit = lax.bitcast_convert_type(bits, jnp.float32)
            inverse = lax.bitcast_convert_type(_TWICE_BIAS - bits, jnp.float32)
            store_pieces(q_smem, wide[0] * across(inverse, D))
            for i in range(2):
                token_smem[i, :N] = scale_of(amax[(i + 1) * N : (i + 2) * N])
            plgpu.commit_smem()
            k_scale, v_scale = token_smem[0, 0], token_smem[1, 0]
            k = [quantized(x, k_scale) for x in k]
            v = quantized(token_v, v_scale)

            @pl.when(split == 0)
            def _store_both():
                for x, d in zip(k, halves, strict=True):
                    store(k_gmem.at[row, end, d], x)
                values_sm90.put(v_tile(end), lax.rem(end, TILE), v)
                ks_gmem[row, end] = k_scale
                vs_gmem[row, end] = v_scale

            products = [x * over_columns(y.astype(jnp.float32)) for x, y in zip(q, k, strict=True)]
            logit = scaled(reduce("add", sum(products[1:], products[0])) * column(k_scale, N))
            v_scale = column(v_scale, N)
            # Of the splits, the first attends to it.
            logit += jnp.where(split == 0, 0.0, -jnp.inf) if splits > 1 else 0.0
            number = plgpu.broadcasted_iota(jnp.int32, (TILE, N), 0, layout=WGMMA)
            first = number + split == 0
            weights = jnp.where(first, across(1 / v_scale, TILE), jnp.zeros((TILE, N)))
            total = over_columns(v.astype(jnp.float32) * _TOP)
            return unit, (total, logit + jnp.log2(v_scale), weights)

        def attend(k_smem, v_smem, scales_smem):
            """The sum, the maximum and the sum of the weights over this warpgroup's tiles."""
            k_smem, v_smem, scales_smem = (
                ref.at[warpgroup] for ref in (k_smem, v_smem, scales_smem)
            )

            # Scales of a tile are needed a step longer than its keys.
            def scales_of(step):
                return scales_smem.at[lax.rem(step, stages + 1)]

            def k_stage(step):
                stage = lax.rem(step, stages)
                return k_smem.at[stage], k_full.at[warpgroup * stages + stage]

            def v_stage(step):
                stage = lax.rem(step, stages - 1)
                return v_smem.at[stage], v_full.at[warpgroup * (stages - 1) + stage]

            def copy_k(step, count=TILE):
                @pl.when(step < steps)
                def _copy():
                    (smem, full), slot = k_stage(step), first_slot(step)
                    source = k_gmem.at[row, pl.ds(slot, count), pl.ds(zero, D)]
                    plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(0, count)], full)
                    for i, gmem in enumerate((ks_gmem, vs_gmem)):
                        scales = gmem.at[row, pl.ds(slot, TILE)]
                        plgpu.copy_gmem_to_smem(scales, scales_of(step).at[i], full)

            def copy_v(step, count=TILE):
                @pl.when(step < steps)
                def _copy():
                    (smem, full), rows = v_stage(step), count * D // TILE
                    source = v_tile(first_slot(step)).at[pl.ds(zero, rows), pl.ds(zero, TILE)]
                    plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(0, rows)], full)

            def copy_filled():
                """The last tile, which comes first; of it, only what is filled."""
                # Zero weights would meet NaNs in what SMEM held.
                v_smem[0] = jnp.zeros((D, TILE), FP8)
                plgpu.commit_smem()
                filled = lax.div(end - first_slot(0) + (_PIECE - 1), _PIECE) * _PIECE
                filled = jnp.minimum(filled, TILE)
                for count in range(_PIECE, TILE + 1, _PIECE):

                    @pl.when(filled == count)
                    def _copy(count=count):
                        copy_k(jnp.int32(0), count)
                        copy_v(jnp.int32(0), count)

            def next_logits(step, meanwhile):
                """Without scales; of the last step, they mean nothing."""
                smem, full = k_stage(step)

                @pl.when(step < steps)
                def _wait():
                    plgpu.barrier_wait(full)

                return product(smem, q_smem, meanwhile)

            if exact:
                copy_filled()
            for step in range(exact, stages):
                copy_k(jnp.int32(step))
                if step < stages - 1:
                    copy_v(jnp.int32(step))
            unit, init = append(scales_smem.at[stages])
            logits, _ = next_logits(jnp.int32(0), lambda: None)
            # Behind this barrier, as behind those below, all warps are done with what the next copy
            # overwrites.
            plgpu.commit_smem()
            copy_k(jnp.int32(stages))

            def add_tile(step, carry):
                total, maximum, weights, logits = carry
                slot0 = first_slot(step)

                def softmax():
                    k_scale, v_scale = (
                        plgpu.load(scales_of(step).at[i], layout=ROW, optimized=False)
                        for i in range(2)
                    )
                    x = scaled(logits * across(unit, TILE) * over_columns(k_scale))
                    x += over_columns(jnp.log2(v_scale))
                    x = jnp.where(attended((TILE, N), slot0), x, -jnp.inf)
                    new_maximum = jnp.maximum(maximum, reduce("max", x))
                    p = jnp.exp2(x - across(new_maximum, TILE))
                    shrink = jnp.exp2(maximum - new_maximum)
                    store_pieces(p_smem, p * _TOP)
                    unscaled = jnp.where(attended((TILE,), slot0, ROW), 1 / v_scale, 0.0)
                    return new_maximum, shrink, p * over_columns(unscaled)

                logits, (new_maximum, shrink, p) = next_logits(step + 1, softmax)
                smem, full = v_stage(step)
                plgpu.barrier_wait(full)
                plgpu.commit_smem()
                part, _ = values_sm90.multiply(smem, p_smem, lambda: copy_k(step + 1 + stages))
                plgpu.commit_smem()
                copy_v(step + stages - 1)
                total = total * across(shrink, D) + of_pieces(part)
                return total, new_maximum, weights * across(shrink, TILE) + p, logits

            total, maximum, weights, _ = lax.fori_loop(0, steps, add_tile, (*init, logits))
            return total, maximum, reduce("add", weights)

        ring = [
            plgpu.SMEM((heads, stages, TILE, D), FP8, transforms=swizzled(D, FP8)),
            plgpu.SMEM((heads, stages - 1, D, TILE), FP8),
            plgpu.SMEM((heads, stages + 1, 2, TILE), jnp.float32),
        ]
        sums = pl.run_scoped(attend, *ring, collective_axes="warpgroup")

        def add_up(*result_smem):
            def write(mean):
                ours = [ref.at[warpgroup] for ref in result_smem]
                result.write(mean * (1 / _TOP), head, out_gmem, ours, reduce)

            cluster.add_up(sums, head, split, parts_gmem, exchange, write)

        of_result = result.scratch(D, N, heads)
        pl.run_scoped(add_up, *of_result, collective_axes="warpgroup")

    scratch: list[Any] = [
        pieces_smem(D, D),
        pieces_smem(TILE, TILE),
        plgpu.SMEM((heads, _REDUCED // heads), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=heads * stages),
        plgpu.Barrier(num_barriers=heads * (stages - 1)),
    ]
    shapes = (-1, S, D), (-1, S), (-1, D, TILE), (-1, S)
    stored = k.qvalue, k.scale, v.qvalue, v.scale
    cache = [a.reshape(s) for a, s in zip(stored, shapes, strict=True)]
    run = plgpu.kernel(
        kernel,
        out_type=[*result.out_type, *cluster.out_type],
        scratch_types=[*scratch, *cluster.scratch],
        grid=(B * H // heads,),
        grid_names=("block",),
        **cluster.axes,
        num_threads=heads,
        thread_name="warpgroup",
        kernel_name="jaxquant_decode_attention_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )
    out, cache = in_place(run, [qkv, layer, lengths, *tables], cache)
    qk, ks, qv, vs = (a.reshape(of.shape) for a, of in zip(cache, stored, strict=True))
    k = dataclasses.replace(k, qvalue=qk, scale=ks)
    v = dataclasses.replace(v, qvalue=qv, scale=vs)
    return result.of(out[:results]), k, v
