"""Decode attention on Hopper: one query token of each sequence, bound by reading the cache.

The operands change places, as in the decode matmul: wgmma's 64-row side runs over the slots of the
cache and then over the dims of a head, its other side over the N query heads that share a
key/value head, so that few of its rows idle. A tile of T slots is

    logits = k [T, D] @ q^T [D, N],  p = exp2(logits - maximum),  sum^T += v^T [D, T] @ p [T, N]

A thread block is one warpgroup. It works through tiles of one head and itself copies the next ones
while it computes; a second thread block on the multiprocessor hides what is left of the latencies.

Where there are few heads, a cluster of thread blocks deals the tiles of one among its members. Each
writes its part of the sum to the SMEM of the first, which adds them up, in order.

The result may be quantized for the product behind it: a head of 128 dims is a group of its input. A
prefetch of that product's weight to L2 meanwhile costs more than it saves (0.6 us, 0.45).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from jaxquant.attention.sm90 import (
    MAX_STAGES,
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
)
from jaxquant.matmul.sm90 import in_stack, round_up, store, swizzled
from jaxquant.matmul.tokens import QuantizedTokens

_LOG2_E = math.log2(math.e)
# Slots from which larger tiles pay where a multiprocessor has but one thread block.
_LONG = 4096


def default_config(B: int, H: int, G: int, S: int, D: int, sms: int) -> Config:
    """As many splits as leave each of the `sms` multiprocessors at most one thread block."""
    heads, N, D = B * H, padded_group(G), round_up(D, 64)
    tile = 128 if D == 64 else 64

    def fitting_stages(residents: int, splits: int) -> int:
        """Stages beside the rest where `residents` thread blocks share the multiprocessor."""
        fixed = SMEM_RESERVED + 2 * N * (D + tile) + Cluster(heads, splits, D, N).nbytes
        fixed += 4 * 2 * D * (N + 1) if D == 64 else 0  # see `swapped`
        return (SMEM_BYTES // residents - fixed) // (4 * tile * D)

    stages, splits = default_cut(heads, S, tile, sms, fitting_stages)
    if D == 128 and S >= _LONG and 2 * splits * heads <= sms:
        tile = 128
        if (longer := fitting_stages(1, splits)) >= 2:
            return Config(tile, min(longer, MAX_STAGES), splits)
        tile = 64
    return Config(tile, stages, splits)


def decode(
    q: BFloat16[Array, "B Hq D"],
    k: BFloat16[Array, "L B H S D"],
    v: BFloat16[Array, "L B H S D"],
    layer: Int32[Array, "1"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    config: Config,
) -> BFloat16[Array, "B Hq D"]:
    """`jaxquant.attention.decode_attention` in one kernel.

    Args:
      q: D a multiple of 16 up to 256, at most 64 heads for each of the cache's.
      k: S a multiple of 8.
      v: likewise.
      layer: which of the L.
      lengths: filled slots; the others are not read, but for those in the last one's tile.
      window: last slots that are attended to, or None for all.
      scale: of the logits.
      softcap: bound of the logits, or None.
      config: see `default_config`.
    """
    G = q.shape[1] // k.shape[2]
    # TMA pads fewer than 8 rows itself.
    rows = G if G < 8 else padded_group(G)
    q = q.reshape(-1, G, q.shape[-1])
    if rows > G:
        q = jnp.pad(q, ((0, 0), (0, rows - G), (0, 0)))
    options: Any = {"window": window, "scale": scale, "softcap": softcap, "config": config}
    cache = [a.reshape(-1, *a.shape[-2:]) for a in (k, v)]
    return _launch(q, cache, k.shape, G, layer, lengths, **options)


def append_and_attend(
    qkv: BFloat16[Array, "B R D"],
    k: BFloat16[Array, "L B H S D"],
    v: BFloat16[Array, "L B H S D"],
    layer: Int32[Array, "1"],
    lengths: Int32[Array, " B"],
    rotation: tuple[Float32[Array, "B pairs"], Float32[Array, "B pairs"]] | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    config: Config,
    quantized: bool = False,
) -> tuple[
    BFloat16[Array, "B Hq D"] | QuantizedTokens,
    BFloat16[Array, "L B H S D"],
    BFloat16[Array, "L B H S D"],
]:
    """`jaxquant.attention.append_and_attend` in one kernel, which writes to the cache in place.

    Args:
      qkv: D a multiple of 64 up to 256, with a rotation 64 or a multiple of 128; at most 64 query
        heads for each of the cache's.
      k: as for `decode`.
      v: likewise.
      layer: which of the L.
      lengths: filled slots, with the new token's.
      rotation: cosines and sines, or None.
      window: as for `decode`.
      scale: of the logits.
      softcap: bound of the logits, or None.
      config: see `default_config`.
      quantized: whether to give QuantizedTokens; see `sm90.is_quantizable`.
    """
    H, S, D = k.shape[2:]
    G = qkv.shape[1] // H - 2
    # Where the last group, padded, ends.
    if (missing := padded_group(G) - G - 2 * H) > 0:
        qkv = jnp.pad(qkv, ((0, 0), (0, missing), (0, 0)))
    if rotation is not None and D == 64:  # for all dims, with what `swapped` gives
        cos, sin = rotation
        rotation = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    options: Any = {"window": window, "scale": scale, "softcap": softcap, "config": config}
    options["quantized"] = quantized

    def run(qkv, layer, lengths, *refs):
        *tables, k_ref, v_ref = refs
        cache = k_ref, v_ref
        return _launch(qkv, cache, k.shape, G, layer, lengths, tables, appends=True, **options)

    cache = [a.reshape(-1, S, D) for a in (k, v)]
    y, cache = in_place(run, [qkv, layer, lengths, *(rotation or ())], cache)
    k, v = (a.reshape(k.shape) for a in cache)
    return y, k, v


def _launch(
    q: Any,
    cache: Any,
    shape: tuple[int, ...],
    G: int,
    layer: Any,
    lengths: Any,
    tables: Sequence[Any] = (),
    *,
    appends: bool = False,
    window: int | None,
    scale: float,
    softcap: float | None,
    config: Config,
    quantized: bool = False,
) -> Any:
    """The kernel of both; if it appends, q is qkv, and the cache are refs."""
    L, B, H, S, D = shape
    N, dims = padded_group(G), round_up(D, 64)
    # The first and the second of what is rotated in pairs, or all that there is. 64 dims have pairs
    # in different warps.
    half = dims // 2 if tables and dims > 64 else dims
    swaps = bool(tables) and half == dims
    new = 1 if appends else 0
    cluster = Cluster(B * H, config.splits, dims, N)
    result = Result(B, H, G, D, quantized)
    results = len(result.out_type)
    tile, stages, splits = config.tile, config.stages, config.splits

    def smem(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(D, jnp.bfloat16))

    swap = [plgpu.SMEM((128, *of), jnp.float32) for of in [(N,), ()]] if swaps else []

    def zeros(rows):
        return plgpu.layout_cast(jnp.zeros((rows, N), jnp.float32), WGMMA)

    def over_columns(values):
        return lax.broadcast_in_dim(values, (*values.shape, N), [0])

    def rotated(halves, table, other):
        if swaps:
            (x,), (cos, sin) = halves, table
            halves = [x * cos + other * sin]
        elif table:
            (x1, x2), (cos, sin) = halves, table
            halves = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        return [x.astype(jnp.bfloat16) for x in halves]

    def swapped(x, scratch, layout):
        """The last 32 of 64 rows, and then the first, by way of 128 rows of SMEM."""
        later, earlier = (
            plgpu.load(scratch.at[pl.ds(at, 64)], layout=layout, optimized=False) for at in (64, 0)
        )
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
        return jnp.where(row < 32, later, earlier)

    def product(a, b):
        def run(accumulator):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((a.shape[0], N), jnp.float32))

    def scaled(logits):
        """In units of log(2), for exp2."""
        if softcap is None:
            return logits * (scale * _LOG2_E)
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        squared = jnp.exp2(logits * (2 * scale / softcap * _LOG2_E))
        return softcap * _LOG2_E * (1 - 2 / (squared + 1))

    def kernel(q_gmem, k_gmem, v_gmem, layer_gmem, lengths_gmem, *refs):
        tables_gmem, refs = refs[: len(tables)], refs[len(tables) :]
        out_gmem, refs = refs[:results], refs[results:]
        parts_gmem, refs = refs[: len(cluster.out_type)], refs[len(cluster.out_type) :]
        swap_smem, refs = refs[: len(swap)], refs[len(swap) :]
        q_smem, p_smem, q_full, k_full, v_full, *exchange = refs
        head = lax.axis_index("head")
        split = lax.axis_index("split") if splits > 1 else 0
        b, h = lax.div(head, H), lax.rem(head, H)
        cluster.begin(split, exchange)
        # Slices that start here may reach beyond the array. Pallas would refuse static ones.
        zero = lax.mul(head, 0)
        halves = [pl.ds(i, half) for i in range(0, dims, half)]

        def load_rows(ref, *index):
            """A value for each row of an accumulator."""
            values = plgpu.load(ref.at[index], layout=ROW, optimized=False)
            return values.astype(jnp.float32)

        def load_token():
            heads = pl.ds(h * G, N)
            q = [
                plgpu.load(q_gmem.at[b, heads, d].T, layout=TRANSPOSED, optimized=False)
                for d in halves
            ]
            k = [load_rows(q_gmem, b, H * G + h, d) for d in halves]
            v = load_rows(q_gmem, b, H * G + H + h)
            return q, k, v, [load_rows(ref, b) for ref in tables_gmem]

        # Loaded ahead of the copies, so as to wait for both at once.
        token: Any = None
        if appends:
            token = load_token()
        else:
            whole = pl.ds(zero, N), pl.ds(zero, dims)
            plgpu.copy_gmem_to_smem(q_gmem.at[(head, *whole)], q_smem, q_full)
        # Of what the cache holds already.
        end = jnp.minimum(lengths_gmem[b], S) - new
        start = lax.mul(end, 0) if window is None else jnp.maximum(end + new - window, 0)
        first_tile = lax.div(start, tile) + split
        steps = lax.div(lax.div(end + (tile - 1), tile) - first_tile + (splits - 1), splits)
        row = in_stack(layer_gmem[0], L) * (B * H) + head

        def first_slot(step):
            return (first_tile + step * splits) * tile

        def attended(shape, slot0):
            slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + slot0
            return (slot >= start) & (slot < end)

        def append():
            """Rotates the token and stores it; the sums where it alone is attended to."""
            q, k, v, table = token
            q = [plgpu.layout_cast(x, WGMMA).astype(jnp.float32) for x in q]
            others = [None, None]
            if swaps:
                for x, scratch in zip((q[0], k[0]), swap_smem, strict=True):
                    scratch[pl.ds(32, 64)] = x
                plgpu.commit_smem()
                others = [
                    swapped(x, scratch, layout)
                    for x, scratch, layout in zip(
                        (q[0], k[0]), swap_smem, (WGMMA, ROW), strict=True
                    )
                ]
            q = rotated(q, [over_columns(values) for values in table], others[0])
            for x, d in zip(q, halves, strict=True):
                q_smem.at[:, d].T[...] = plgpu.layout_cast(x, TRANSPOSED)
            plgpu.commit_smem()
            k = rotated(k, table, others[1])

            @pl.when(split == 0)
            def _store_both():
                for x, d in zip(k, halves, strict=True):
                    store(k_gmem.at[row, end, d], x)
                store(v_gmem.at[row, end], v.astype(jnp.bfloat16))

            products = [
                x.astype(jnp.float32) * over_columns(y.astype(jnp.float32))
                for x, y in zip(q, k, strict=True)
            ]
            logit = scaled(jnp.sum(sum(products[1:], products[0]), axis=0))
            # Of the splits, the first attends to it.
            logit += jnp.where(split == 0, 0.0, -jnp.inf) if splits > 1 else 0.0
            number = plgpu.broadcasted_iota(jnp.int32, (tile, N), 0, layout=WGMMA)
            return over_columns(v), logit, jnp.where(number + split == 0, 1.0, 0.0)

        def attend(k_smem, v_smem):
            """The sum, the maximum and the sum of the weights over this thread block's tiles."""

            def copy(gmem, smem, full, step):
                @pl.when(step < steps)
                def _copy():
                    stage = lax.rem(step, stages)
                    slots = pl.ds(first_slot(step), tile)
                    plgpu.copy_gmem_to_smem(
                        gmem.at[row, slots, pl.ds(zero, dims)], smem.at[stage], full.at[stage]
                    )

            for step in range(stages):
                copy(k_gmem, k_smem, k_full, jnp.int32(step))
                if step < stages - 1:
                    copy(v_gmem, v_smem, v_full, jnp.int32(step))
            if appends:
                init = append()
            else:
                plgpu.barrier_wait(q_full)
                init = zeros(dims), column(-jnp.inf, N), zeros(tile)

            def add_tile(step, carry):
                total, maximum, weights = carry
                stage, slot0 = lax.rem(step, stages), first_slot(step)

                plgpu.barrier_wait(k_full.at[stage])
                logits = product(k_smem.at[stage], q_smem.T)
                logits = jnp.where(attended((tile, N), slot0), scaled(logits), -jnp.inf)
                new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=0))
                p = jnp.exp2(logits - across(new_maximum, tile))
                shrink = jnp.exp2(maximum - new_maximum)
                p_smem.T[...] = plgpu.layout_cast(p.astype(jnp.bfloat16), TRANSPOSED)

                plgpu.barrier_wait(v_full.at[stage])

                @pl.when((slot0 < start) | (slot0 + tile > end))
                def _silence():  # a weight of 0 does not silence NaN
                    for i in range(0, tile, 64):
                        values = v_smem.at[stage, pl.ds(i, 64)]
                        value = plgpu.load(values, layout=WGMMA)
                        mask = attended((64, dims), slot0 + i)
                        values[...] = jnp.where(mask, value, jnp.zeros_like(value))

                # Behind this barrier all warps are done with these keys and the last values.
                plgpu.commit_smem()
                copy(k_gmem, k_smem, k_full, step + stages)
                copy(v_gmem, v_smem, v_full, step + stages - 1)

                total = total * across(shrink, dims) + product(v_smem.at[stage].T, p_smem.T)
                return total, new_maximum, weights * across(shrink, tile) + p

            total, maximum, weights = lax.fori_loop(0, steps, add_tile, init)
            return total, maximum, jnp.sum(weights, axis=0)

        ring = smem(stages, tile, dims), smem(stages, tile, dims)
        sums = pl.run_scoped(attend, *ring, collective_axes="warpgroup")

        def add_up(*result_smem):
            def write(mean):
                ours = [ref.at[0] for ref in result_smem]
                result.write(mean, head, out_gmem, ours, reduced)

            cluster.add_up(sums, head, split, parts_gmem, exchange, write)

        pl.run_scoped(add_up, *result.scratch(dims, N), collective_axes="warpgroup")

    scratch: list[Any] = [
        *swap,
        smem(N, dims),
        smem(N, tile),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    out = plgpu.kernel(
        kernel,
        out_type=[*result.out_type, *cluster.out_type],
        scratch_types=[*scratch, *cluster.scratch],
        grid=(B * H,),
        grid_names=("head",),
        **cluster.axes,
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="jaxquant_decode_attention",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(q, *cache, layer, lengths, *tables)
    return result.of(out[:results])
