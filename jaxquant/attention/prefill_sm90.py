"""What stands between a prompt's projections and its attention, on Hopper, in one pass.

A thread block has 16 tokens (of heads of 128 dims) and up to two heads of queries or of keys, in
registers; or 64 tokens of one head of values, which it transposes in SMEM. Each number is read once
and little else is done with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jaxquant.array import QuantizedArray
from jaxquant.attention import values_sm90
from jaxquant.attention.cache import FP8, TILE, KeysOrValues, cache_shape
from jaxquant.attention.sm90 import WGMMA, in_place
from jaxquant.matmul.act_quant_sm90 import quantize_groups
from jaxquant.matmul.arithmetic_sm90 import product
from jaxquant.matmul.sm90 import cdiv, in_stack, store, swizzled

_THREADS = 128
# 16 bytes of bfloat16.
_VECTOR = 8
# Heads whose reads a thread block has under way at once.
_HEADS = 2
# Tokens of a tile of values.
_VALUE_TOKENS = 64


def rotate_and_fill(
    qkv: BFloat16[Array, "B T R D"],
    k: KeysOrValues,
    v: KeysOrValues,
    layer: Int32[Array, "1"],
    rotation: tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]],
    units: tuple[Float32[Array, "1"], Float32[Array, "1"], Float32[Array, "1"]] | None = None,
) -> tuple[
    tuple[Float[Array, "B T Hq D"], Float[Array, "B T H D"], Float[Array, "B T H D"]],
    KeysOrValues,
    KeysOrValues,
]:
    """Queries, keys and values as attention takes them, and a cache with the latter two.

    All of it is to the byte what XLA makes of the definitions.

    Args:
      qkv: R = Hq + 2 H heads of queries, keys and values; T a multiple of 128, D one of 64.
      k: bfloat16, or FP8 as in `jaxquant.attention.cache`; written in place, the first T slots of
        one layer.
      v: likewise.
      layer: which of the L.
      rotation: cosines and sines of the angles of the pairs (i, i + D / 2).
      units: what queries, keys and values are divided by before they are rounded to FP8, powers of
        two; None leaves them in bfloat16.
    """
    B, T, R, D = qkv.shape
    L, _, H, S, _ = cache_shape(k)
    Hq, half, dtype = R - 2 * H, D // 2, jnp.bfloat16 if units is None else FP8
    scaled = units or ()
    quantized = isinstance(k, QuantizedArray)
    lanes = half // _VECTOR
    rows = _THREADS // lanes
    # Of 128 bytes, of a tile's pages.
    page_rows = _VALUE_TOKENS * D // TILE
    tile = plgpu.Layout.TILED(
        plgpu.Tiling(((rows, half), (rows // 4, half), (_VECTOR,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
    # A group that would pass the last head overlaps the one before instead, and writes the same.
    groups = [cdiv(heads, _HEADS) for heads in (Hq, H)]
    value_blocks = B * T // _VALUE_TOKENS * H
    rotated_blocks = B * T // rows * sum(groups)

    def kernel(qkv_gmem, cos_gmem, sin_gmem, layer_gmem, *refs):
        units_gmem, refs = refs[: len(scaled)], refs[len(scaled) :]
        k_gmem, v_gmem, refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
        q_out, k_out, v_out, x_smem, landed, *refs = refs
        pages_smem, v_smem = refs[:quantized], refs[quantized:]
        block = lax.axis_index("block")
        stack = in_stack(layer_gmem[0], L) * B

        def to_units(which):
            return 1.0 / units_gmem[which][0] if scaled else None

        def as_taken(x, inverse):
            """What attention takes of values that are bfloat16 but for their type."""
            return (x if inverse is None else x * inverse).astype(dtype)

        def sequence_and_slot(token):
            return lax.div(token, T), lax.rem(token, T)

        @pl.when(block < value_blocks)
        def _values():
            token, h = lax.div(block, H) * _VALUE_TOKENS, lax.rem(block, H)
            tokens = pl.ds(token, _VALUE_TOKENS)
            dims = pl.ds((Hq + H + h) * D, D)
            plgpu.copy_gmem_to_smem(qkv_gmem.at[tokens, dims], x_smem, landed)
            inverse = to_units(2)
            plgpu.barrier_wait(landed)
            b, slot = sequence_and_slot(token)
            row = (stack + b) * H + h
            values = plgpu.load(x_smem, layout=WGMMA).astype(jnp.float32)
            slots = pl.ds(slot, _VALUE_TOKENS)
            cached, stored = x_smem, v_gmem[0].at[row, slots]
            if scaled:
                v_smem[0][...] = as_taken(values, inverse)
            if quantized:
                qvalue, scale = quantize_groups(values, WGMMA)
                values_sm90.put_all(pages_smem[0], qvalue.astype(FP8))
                store(v_gmem[1].at[row, slots], scale)
                tile = row * (S // TILE) + lax.div(slot, TILE)
                first = lax.div(lax.rem(slot, TILE), _VALUE_TOKENS) * page_rows
                cached, stored = pages_smem[0], v_gmem[0].at[tile, pl.ds(first, page_rows)]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(cached, stored)
            taken = v_smem[0] if scaled else x_smem
            plgpu.copy_smem_to_gmem(taken, v_out.at[tokens, pl.ds(h * D, D)])
            plgpu.wait_smem_to_gmem(0)

        def rotated(token, first, count):
            """`[rows, half]` of each half of so many heads, as bfloat16 in float32."""
            tokens, halves = pl.ds(token, rows), (pl.ds(0, half), pl.ds(half, half))

            def load(ref):
                return plgpu.load(ref, layout=tile, optimized=False).astype(jnp.float32)

            pairs = [
                [
                    plgpu.load(
                        qkv_gmem.at[tokens, pl.ds((first + i) * D + d.start, half)],
                        layout=tile,
                        optimized=False,
                    )
                    for d in halves
                ]
                for i in range(count)
            ]
            cos, sin = load(cos_gmem.at[tokens]), load(sin_gmem.at[tokens])
            for x1, x2 in pairs:
                x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
                x1cos, x2cos, x1sin, x2sin = (
                    product(x, y, tile) for y in (cos, sin) for x in (x1, x2)
                )
                turned = x1cos - x2sin, x2cos + x1sin
                yield [x.astype(jnp.bfloat16).astype(jnp.float32) for x in turned]

        def write(out, token, head, x, inverse):
            for i, part in enumerate(x):
                at = out.at[pl.ds(token, rows), pl.ds(head * D + i * half, half)]
                store(at, as_taken(part, inverse))

        @pl.when(block >= value_blocks)
        def _rotated():
            token = lax.div(block - value_blocks, sum(groups)) * rows
            group = lax.rem(block - value_blocks, sum(groups))

            @pl.when(group < groups[0])
            def _queries():
                count, inverse = min(_HEADS, Hq), to_units(0)
                first = jnp.minimum(group * _HEADS, Hq - count)
                for i, x in enumerate(rotated(token, first, count)):
                    write(q_out, token, first + i, x, inverse)

            @pl.when(group >= groups[0])
            def _keys():
                count, inverse = min(_HEADS, H), to_units(1)
                first = jnp.minimum((group - groups[0]) * _HEADS, H - count)
                b, slot = sequence_and_slot(token)
                for i, x in enumerate(rotated(token, Hq + first, count)):
                    write(k_out, token, first + i, x, inverse)
                    at = (stack + b) * H + first + i, pl.ds(slot, rows)
                    whole = lax.concatenate(x, 1)
                    if quantized:
                        whole, scale = quantize_groups(whole, tile)
                        store(k_gmem[1].at[at], scale)
                    store(k_gmem[0].at[at], whole.astype(k_gmem[0].dtype))

    shapes = [(-1, S, D), (-1, S), (-1, D, TILE), (-1, S)] if quantized else [(-1, S, D)] * 2
    stored, structure = jax.tree.flatten((k, v))
    parts = len(stored) // 2
    cache = [a.reshape(s) for a, s in zip(stored, shapes, strict=True)]
    tokens_smem = (_VALUE_TOKENS, D)
    scratch: list[Any] = [
        plgpu.SMEM(tokens_smem, jnp.bfloat16, transforms=swizzled(D, jnp.bfloat16)),
        plgpu.Barrier(),
    ]
    if quantized:
        scratch.append(plgpu.SMEM((page_rows, TILE), FP8))
    if scaled:
        scratch.append(plgpu.SMEM(tokens_smem, FP8, transforms=swizzled(D, FP8)))
    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((B * T, heads * D), dtype) for heads in (Hq, H, H)],
        scratch_types=scratch,
        grid=(value_blocks + rotated_blocks,),
        grid_names=("block",),
        kernel_name="jaxquant_rotate_and_fill",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )
    tables = [table.reshape(B * T, half) for table in rotation]
    taken, new = in_place(run, [qkv.reshape(B * T, R * D), *tables, layer, *scaled], cache)
    new = [a.reshape(of.shape) for a, of in zip(new, stored, strict=True)]
    k, v = jax.tree.unflatten(structure, new)
    q, new_k, new_v = (a.reshape(B, T, -1, D) for a in taken)
    return (q, new_k, new_v), k, v
