"""Decode on Hopper: a few tokens by a blocked FP8 weight, bound by reading the weight.

The operands change places: wgmma's 64-row side runs over the weight's rows and its other side
over the tokens, so that no row of the tensor cores idles. K is split among the thread blocks of a
cluster where the weight has too few rows to keep all multiprocessors reading; the first of them
adds up the parts.

A product of a gate and what it gates may leave SiluMul of that, quantized. A tile then has the 128
rows of a group from both halves of the weight, and a consumer the same 64 from both, so that they
meet in its registers. 112 such tiles, one for each of as many multiprocessors, are read as fast as
224 of half the rows by 132.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.hopper import interpreted
from jaxquant.matmul import tuning
from jaxquant.matmul.act_quant_sm90 import (
    GROUPS,
    SCALE_COLUMNS,
    TILE_GROUPS,
    quantize_groups,
    silu_mul,
)
from jaxquant.matmul.exchange_sm90 import COUNTER, expect, receive, send, wait
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    SMEM_BYTES,
    cdiv,
    consumer_registers,
    fill_ring,
    for_each_tile,
    in_stack,
    producer_registers,
    round_up,
    store,
    swizzled,
    zero_accumulator,
)

_TOKENS = (8, 16, 32, 64, 96, 128)
MAX_TOKENS = _TOKENS[-1]
# Bytes of the weight in a slot: few and long reads.
_SLOT_BYTES = 32 << 10
# And in the ring: enough to keep the memory busy; of 64 KB and of 160 KB, products take longer.
_RING_BYTES = 96 << 10
_GATED_RING_BYTES = 128 << 10
# What a multiprocessor reads in the time of a kernel that quantizes.
_QUANTIZATION_BYTES = 112 << 10
# SMEM that the compiler takes for a maximum.
_REDUCTION_BYTES = 4 << 10
# Of a warpgroup.
_THREADS = 128
# K blocks of a slot, and tokens of which the products of several and their sum fit into registers.
_BLOCKS = (4, 2, 1)
_MAX_TOGETHER = 64
# With more tokens, K blocks of a tile from which on a second consumer pays.
_LONG = 56
# A barrier's phases are the bits of an int32.
_MAX_STAGES = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_n: rows of the weight in a tile: 64 or 128.
      turns: consumers that share a tile's K blocks.
      splits: thread blocks, a cluster, that share a tile's K blocks.
      blocks: K blocks in a slot of the ring. The product with `turns` and `splits` divides
        ceil(K / 128).
    """

    tile_n: int
    turns: int = 1
    splits: int = 1
    blocks: int = 1

    @property
    def groups(self) -> int:
        """Consumers that share a tile's rows."""
        return self.tile_n // 64


def takes(M: int, N: int, sms: int) -> bool:
    """Whether the product is bound by reading the weight, so that this kernel is the fast one."""
    return M <= 64 or (M <= MAX_TOKENS and 4 * cdiv(N, 128) <= sms)


def padded_tokens(M: int) -> int:
    """Tokens that the kernel computes for M: a width that wgmma has."""
    return next(width for width in _TOKENS if M <= width)


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tuned cut, or as many splits as leave each multiprocessor (`sms`) at most one tile."""
    tuned = tuning.lookup("decode", M, N, K)
    if tuned is not None:
        return Config(**tuned)
    steps = cdiv(K, K_BLOCK)
    tile_n = 64 if cdiv(N, 64) <= sms else 128
    tiles = cdiv(N, tile_n)
    fitting = (s for s in (4, 2) if _fits(tiles, s, sms) and _can_split(steps, s))
    splits = next(fitting, 1)
    own = steps // splits
    if M > _MAX_TOGETHER:
        long = tile_n == 64 and own >= _LONG and own % 2 == 0
        paired = Config(tile_n, 2, splits)
        return paired if long and _has_ring(paired, M) else Config(tile_n, 1, splits)
    most = _SLOT_BYTES // (tile_n * K_BLOCK)
    return Config(tile_n, 1, splits, next(b for b in _BLOCKS if b <= most and own % b == 0))


def _fits(tiles: int, splits: int, sms: int) -> bool:
    # Clusters of more than two leave some multiprocessors without one.
    return tiles * splits <= (sms if splits == 2 else sms * 3 // 4)


def cuts(M: int, N: int, K: int) -> list[Config]:
    """What may be the fastest: whatever the kernel takes, for a product of a few tokens."""
    steps = cdiv(K, K_BLOCK)
    found = [
        Config(tile_n, turns, splits, blocks)
        for tile_n, turns in ((64, 1), (64, 2), (128, 1))
        for splits in (1, 2, 4)
        for blocks in (_BLOCKS if M <= _MAX_TOGETHER else (1,))
        if (splits == 1 or _can_split(steps, splits)) and steps // splits % (turns * blocks) == 0
    ]
    return [config for config in found if _has_ring(config, M)]


def _has_ring(config: Config, M: int, halves: int = 1) -> bool:
    """Whether SMEM has two slots for each consumer of a row beside the sums that meet there."""
    tokens = padded_tokens(M)
    room = SMEM_BYTES - halves * _sums_bytes(config, tokens)
    return room // _slot_bytes(config, tokens, halves) >= 2 * config.turns


def _slot_bytes(config: Config, tokens: int, halves: int = 1) -> int:
    rows = halves * config.tile_n + tokens
    return config.blocks * (rows * K_BLOCK + _scale_columns(tokens) * 4)


def _scale_columns(tokens: int) -> int:
    # A slot's scales begin at a multiple of the 128 bytes that TMA needs.
    return round_up(tokens, 32)


def _sums_bytes(config: Config, tokens: int) -> int:
    return config.splits * config.turns * config.tile_n * tokens * 4


def _can_split(steps: int, splits: int) -> bool:
    # A short part has no time to fill the ring.
    return steps % splits == 0 and steps // splits >= 4


def _wrap(slot: Any, stages: int) -> Any:
    """A slot of the ring that is counted on past its end."""
    return jnp.where(slot >= stages, slot - stages, slot)


def adds_residual(M: int, N: int, out_dtype: Any, config: Config) -> bool:
    """Whether `decode` can add a residual: one that TMA reads as it writes the result."""
    return (M < 8 or M % 8 == 0) and _is_direct(N, out_dtype, config)


def gates(M: int, N: int, out_dtype: Any, config: Config) -> bool:
    """Whether `decode` can apply SiluMul to a product, and quantize that.

    A tile has a whole group of the quantization, of which the rows of both halves fit into the
    registers.
    """
    whole = N % (2 * K_BLOCK) == 0 and config.tile_n == K_BLOCK and config.turns == 1
    return M <= _MAX_TOGETHER and whole and _is_direct(N, out_dtype, config)


def gated_config(M: int, N: int, K: int, sms: int) -> Config | None:
    """The cut for `decode` of a gated product, or None where it had better not be one kernel.

    That is where whole groups, twice 128 rows, leave the busiest multiprocessor more to read than
    `default_config` does, by more than a kernel that quantizes takes.
    """
    if M > _MAX_TOGETHER or N % (2 * K_BLOCK):
        return None
    steps, tiles = cdiv(K, K_BLOCK), N // (2 * K_BLOCK)
    found = (
        Config(K_BLOCK, 1, splits, blocks)
        for splits in (4, 2, 1)
        if splits == 1 or (_fits(tiles, splits, sms) and _can_split(steps, splits))
        for blocks in (2, 1)
        if steps // splits % blocks == 0
    )
    config = next(config for config in found if _has_ring(config, M, 2))
    apart = default_config(M, N, K, sms)
    own = _busiest(tiles, 2 * K_BLOCK, config.splits, sms)
    others = _busiest(cdiv(N, apart.tile_n), apart.tile_n, apart.splits, sms)
    return config if (own - others) * K <= _QUANTIZATION_BYTES else None


def _busiest(tiles: int, rows: int, splits: int, sms: int) -> int:
    """Rows that the busiest of the multiprocessors reads, of tiles of so many."""
    return cdiv(tiles * splits, sms) * rows // splits


def _parts(config: Config) -> int:
    """Results that XLA adds up: the interpreter knows no SMEM of other thread blocks."""
    return config.splits if interpreted() else 1


def _is_direct(N: int, out_dtype: Any, config: Config) -> bool:
    # The store that transposes, and so makes y itself, is there for whole tiles of 16-bit values,
    # and would ignore the column of a second tile where y has one only.
    whole = N % 64 == 0 and N >= config.tile_n
    return _parts(config) == 1 and jnp.dtype(out_dtype).itemsize == 2 and whole


def decode(
    xq: Float[Array, "T K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    residual: Float[Array, "M N"] | None = None,
    *,
    gated: bool = False,
    M: int,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Any:
    """`y[m, n] = sum_kb (xq[m, kb] . wq[layer, n, kb]) * sx[kb, m] * sw[layer, n // 128, kb]`.

    With a residual `y + residual`, y rounded first: `jaxquant.matmul.xla.finish`. If it is gated,
    SiluMul of y, rounded first, quantized: to the byte what `act_quant_sm90.quantize` makes of y.

    Args:
      xq: float8_e4m3fn, `padded_tokens(M)` rows; K a multiple of 32.
      sx: the scales of xq, transposed; S a multiple of 64.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      residual: of out_dtype, see `adds_residual`.
      gated: whether y is a gate and what it gates, as `gates` allows; not with a residual.
      M: tokens, at most 128.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`; if gated, (qvalue, scale) of `QuantizedTokens` `[M, N // 2]`, as
      `tokens.kernel_layout` has them.
    """
    (tokens, K), N = xq.shape, wq.shape[1]
    # Of a tile of the result, where it is gated: the rows of the gate, and those of up.
    halves = 2 if gated else 1
    columns = N // halves
    out_dtype = jnp.dtype(out_dtype)
    tile_n, groups, turns, splits = config.tile_n, config.groups, config.turns, config.splits
    per_slot = config.blocks
    steps = cdiv(K, K_BLOCK) // splits
    consumers = groups * turns
    n_tiles = cdiv(columns, tile_n)
    parts = _parts(config)
    senders = turns if parts > 1 else splits * turns
    # Stores are counted in a cluster; a thread block's own consumers meet at a barrier.
    counted = splits > 1 and parts == 1
    direct = _is_direct(N, out_dtype, config)

    slots, slot_k, scale_columns = steps // per_slot, per_slot * K_BLOCK, _scale_columns(tokens)
    slot_bytes = _slot_bytes(config, tokens, halves)
    y_bytes = tile_n * tokens * (out_dtype.itemsize if direct else 4)
    own_sums_bytes = (senders - 1) * halves * 64 * tokens * 4
    sums_bytes = groups * own_sums_bytes
    # The scales of a tile are loaded by all threads of a consumer, one each.
    scales_width = round_up(steps, _THREADS)
    sw_flat = jnp.pad(sw.reshape(-1), (0, max(0, scales_width - sw.size)))
    scales_bytes = consumers * halves * scales_width * 4
    room = SMEM_BYTES - y_bytes - sums_bytes - scales_bytes - (_REDUCTION_BYTES if gated else 0)
    blocks = min(sms // splits, n_tiles)
    stages = min(
        _MAX_STAGES,
        slots * cdiv(n_tiles, blocks),
        room // slot_bytes,
        max((_GATED_RING_BYTES if gated else _RING_BYTES) // (halves * tile_n * slot_k), 2 * turns),
    )
    stages = max(stages // turns, 1) * turns
    residuals = [] if residual is None else [residual]

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, layer_gmem, *refs):
        residual_gmem, refs = refs[: len(residuals)], refs[len(residuals) :]
        (y_gmem, *scale_gmem), refs = refs[:halves], refs[halves:]  # scales, if it is gated
        x_smem, w_smem, sx_smem, sw_smem, y_smem, sums_smem, *barriers = refs
        full, empty, landed, together, counter = barriers
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], wq.shape[0])
        part = lax.axis_index("cluster") if splits > 1 else 0

        @pl.when(warpgroup == consumers)
        def _producer():
            if consumers > 1:  # alone, a consumer has registers enough
                producer_registers()

            def copy(tile, step, slot):
                kb = (part * slots + step) * per_slot
                block = pl.ds(kb * K_BLOCK, slot_k)
                scales = sx_gmem.at[pl.ds(kb, per_slot), pl.ds(0, scale_columns)]
                for half in range(halves):
                    rows = pl.ds(half * columns + tile * tile_n, tile_n)
                    target = w_smem.at[slot, pl.ds(half * tile_n, tile_n)]
                    plgpu.copy_gmem_to_smem(w_gmem.at[l, rows, block], target, full.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[:, block], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(scales, sx_smem.at[slot], full.at[slot])

            fill_ring(n_tiles, slots, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            def scales_start(tile, half):
                """Where a tile's scales are loaded from, and how far behind it they begin."""
                row = l * sw.shape[1] + lax.div(half * columns + tile * tile_n, SCALE_ROWS)
                first = row * sw.shape[2] + part * steps
                start = jnp.minimum(first, sw_flat.size - scales_width)
                return start, first - start

            def load_scales(tile):
                starts = [scales_start(tile, half)[0] for half in range(halves)]
                layout = plgpu.Layout.WG_STRIDED((scales_width,), vec_size=1)
                return [
                    plgpu.load(
                        sw_gmem.at[pl.ds(start, scales_width)], layout=layout, optimized=False
                    )
                    for start in starts
                ]

            # Ahead of the ring: what is asked for later waits in memory's queue behind all of it.
            first_scales = load_scales(lax.axis_index("sm"))
            if consumers > 1:
                consumer_registers(consumers)
            group, turn = lax.rem(warpgroup, groups), lax.div(warpgroup, groups)
            n_offset = group * 64
            sender = turn if parts > 1 else part * turns + turn

            def main_loop(tile, slot):
                """Adds up this consumer's K blocks."""

                # Of K blocks, and of the gate and of up.
                pieces = [(b, half) for half in range(halves) for b in range(per_slot)]
                offsets = [scales_start(tile, half)[1] for half in range(halves)]

                def add_slot(i, carry):
                    slot, totals = carry
                    first = (turn + i * turns) * per_slot
                    w_scales = [
                        sw_smem[warpgroup, half, offsets[half] + first + b] for b, half in pieces
                    ]
                    plgpu.barrier_wait(full.at[slot])

                    def run(*accumulators):
                        for (b, half), accumulator in zip(pieces, accumulators, strict=True):
                            block = pl.ds(b * K_BLOCK, K_BLOCK)
                            rows = w_smem.at[slot, pl.ds(half * tile_n + n_offset, 64), block]
                            plgpu.wgmma(accumulator, rows, x_smem.at[slot, :, block].T)
                        # Made while the tensor cores are at work.
                        scales = [
                            scale_of(slot, b, s) for (b, _), s in zip(pieces, w_scales, strict=True)
                        ]
                        return [accumulator[...] for accumulator in accumulators], scales

                    kind = plgpu.ACC((64, tokens), jnp.float32)
                    products, scales = pl.run_scoped(run, *[kind] * len(pieces))
                    plgpu.barrier_arrive(empty.at[slot])
                    totals = list(totals)
                    for (_, half), product, scale in zip(pieces, products, scales, strict=True):
                        totals[half] += product * scale
                    return _wrap(slot + turns, stages), totals

                def scale_of(slot, b, w_scale):
                    x_scale = plgpu.load(
                        sx_smem.at[slot, b, pl.ds(0, tokens)], layout=plgpu.Layout.WGMMA.reduce(0)
                    )
                    return lax.broadcast_in_dim(x_scale * w_scale, (64, tokens), [1])

                init = slot, [zero_accumulator(64, tokens)] * halves
                return lax.fori_loop(0, slots // turns, add_slot, init)

            def fetch_residual(n0):
                """Puts a tile's residual where its results will be, once those before left."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                rows = pl.ds(n0 + n_offset, 64)
                plgpu.copy_gmem_to_smem(
                    residual_gmem[0].at[pl.ds(lax.mul(n0, 0), tokens), rows],
                    y_smem.at[group],
                    landed.at[group],
                )

            def arrive(**again):
                """Says that parts may be sent here, and that this consumer's were."""
                if counted:

                    @pl.when(sender == 0)
                    def _expect():
                        expect(counter.at[group], own_sums_bytes, **again)

                plgpu.commit_smem()
                plgpu.barrier_arrive(together)

            def quantize(totals, tile):
                """SiluMul in registers; a token's columns meet in SMEM, and are quantized."""

                def meet():
                    plgpu.barrier_arrive(landed)
                    plgpu.barrier_wait(landed)

                gate, up = (total.astype(out_dtype).astype(jnp.float32) for total in totals)
                h = silu_mul(gate, up, out_dtype, plgpu.Layout.WGMMA)
                own = y_smem.at[:, pl.ds(n_offset, 64)]
                own.T[...] = plgpu.layout_cast(h, plgpu.Layout.WGMMA_TRANSPOSED)
                meet()
                shares = tokens // TILE_GROUPS

                @pl.when(group < shares)
                def _quantize():
                    for i in range(cdiv(shares, groups)):
                        m = pl.ds((i * groups + group) * TILE_GROUPS, TILE_GROUPS)
                        values = plgpu.load(y_smem.at[m], layout=GROUPS, optimized=False)
                        qvalue, scale = quantize_groups(values.astype(jnp.float32))
                        at = y_gmem.at[m, pl.ds(tile * K_BLOCK, K_BLOCK)]
                        store(at, qvalue.astype(FP8))
                        store(scale_gmem[0].at[tile, m], scale)

                if n_tiles > blocks:  # what is in SMEM is read before the next is
                    meet()

            def epilogue(totals, tile):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                n0 = tile * tile_n
                for i in range(senders - 1):
                    for half in range(halves):
                        totals[half] += receive(sums_smem.at[i, half * groups + group])
                if gated:
                    quantize(totals, tile)
                    return
                (total,) = totals
                rows = pl.ds(n0 + n_offset, 64)
                if direct:
                    y = total.astype(out_dtype)
                    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    if residuals:
                        plgpu.barrier_wait(landed.at[group])
                        added = plgpu.load(y_smem.at[group].T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                        y = (y.astype(jnp.float32) + added.astype(jnp.float32)).astype(out_dtype)
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem.at[group].T[...] = y
                    # Not `:`, since y may have fewer rows. Pallas would refuse a static slice.
                    target = y_gmem.at[pl.ds(lax.mul(n0, 0), tokens), rows]
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem[group] = total
                    target = y_gmem.at[part if parts > 1 else lax.mul(n0, 0), rows, :]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[group], target)

            def do_tile(tile, carry):
                slot, scales = carry
                n0 = tile * tile_n
                for half, values in enumerate(scales):
                    sw_smem[warpgroup, half] = values
                plgpu.commit_smem()
                if n_tiles > blocks:  # the next tile's are loaded meanwhile
                    scales = load_scales(jnp.minimum(tile + blocks, n_tiles - 1))
                if residuals:

                    @pl.when(sender == 0)
                    def _fetch():
                        fetch_residual(n0)

                slot, totals = main_loop(tile, slot)
                if senders == 1:
                    epilogue(totals, tile)
                    return slot, scales

                plgpu.barrier_wait(together)

                @pl.when(sender > 0)
                def _send():
                    for half, total in enumerate(totals):
                        target = sums_smem.at[sender - 1, half * groups + group]
                        send(total, target, counter.at[group] if counted else None)

                if not counted:
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(together)
                    plgpu.barrier_wait(together)

                @pl.when(sender == 0)
                def _sum():
                    if counted:
                        wait(counter.at[group])
                    epilogue(totals, tile)

                @pl.when(tile + blocks < n_tiles)
                def _again():
                    plgpu.commit_smem()
                    arrive(again=True)

                return slot, scales

            if senders > 1:
                arrive()

            for_each_tile(n_tiles, (jnp.int32(0) + turn, first_scales), do_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if splits > 1:
        cluster: dict[str, Any] = {"cluster": (splits,), "cluster_names": ("cluster",)}
        together = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=consumers)
    else:
        cluster = {}
        together = plgpu.Barrier(num_arrivals=consumers)
    if gated:
        assert gates(M, N, out_dtype, config)
        out_type = (
            jax.ShapeDtypeStruct((tokens, columns), FP8),
            jax.ShapeDtypeStruct((n_tiles, round_up(M, SCALE_COLUMNS)), jnp.float32),
        )
        y_smem = plgpu.SMEM((tokens, tile_n), out_dtype, transforms=swizzled(N, out_dtype))
    elif direct:
        # TMA stores whole tiles of 8 rows, or fewer than 8.
        y_rows = M if M < 8 else round_up(M, 8)
        out_type = jax.ShapeDtypeStruct((y_rows, N), out_dtype)
        y_tiling = swizzled(N, out_dtype)
        y_smem = plgpu.SMEM((groups, tokens, 64), out_dtype, transforms=y_tiling)
    else:
        # Whole tiles, since these copies are linear: they do not stop where a part ends.
        out_type = jax.ShapeDtypeStruct((parts, round_up(N, tile_n), tokens), jnp.float32)
        y_smem = plgpu.SMEM((groups, 64, tokens), jnp.float32)
    sums_shape = (senders - 1, halves * groups, 64, tokens) if senders > 1 else (8,)
    y = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((stages, tokens, slot_k), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, halves * tile_n, slot_k), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, per_slot, scale_columns), jnp.float32),
            plgpu.SMEM((consumers, halves, scales_width), jnp.float32),
            y_smem,
            plgpu.SMEM(sums_shape, jnp.float32),
            plgpu.Barrier(num_arrivals=2 + halves, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups) if gated else plgpu.Barrier(num_barriers=groups),
            together,
            plgpu.SMEM((groups, *COUNTER.shape), jnp.int32),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_decode_fp8",
        # Of the functions there is the exponential only, and then it is that of `quantize_tokens`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=gated),
        **cluster,
    )(xq, sx, wq, sw_flat, layer, *residuals)
    if gated:
        return y
    if not direct:
        y = y[:, :N].sum(0).T.astype(out_dtype)
    return y[:M]
