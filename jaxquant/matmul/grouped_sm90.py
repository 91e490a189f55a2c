"""Experts on Hopper: groups of tokens, each by a blocked FP8 matrix of its own, in one kernel.

The operands change places, as in `decode_sm90`: wgmma's 64-row side runs over the weight's rows and
its other side over the tokens, which comes in steps of 8. So a tile is as wide as its group has
tokens: little is computed in vain for a few tokens, and a large group is cut into equal tiles.

Which tiles there are follows from the group sizes, which only the device knows. The producer of
each thread block makes a table of where groups and their tiles end, looks its tiles up in it, and
tells the consumers through the ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul import gemm_wgmma_sm90 as tensor_cores
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    cdiv,
    consumer_registers,
    fill_ring,
    for_each_tile,
    in_stack,
    next_slot,
    producer_registers,
    ring_stages,
    round_up,
    store,
    swizzled,
    zero_accumulator,
)

# Rows of wgmma, and warpgroups that multiply: each has so many rows of a tile.
_WGMMA_ROWS = 64
_CONSUMERS = 2
_MAX_STAGES = 12
# Rows of a tile of two waves, and tokens, at most: what a thread's registers hold.
_WIDE_N = 256
_WIDE_TOKENS = 120
# Tiles begin at multiples of so many tokens: TMA counts in whole tiles of SMEM.
_ALIGNMENT = 8
# Entries of the table that a warpgroup makes at a time.
_ENTRIES = 64
# Sizes that it adds up at a time.
_SIZES = 128
# 8 tokens by 64 columns over a warpgroup: 16 threads a token, 4 values each.
_TOKENS_8 = plgpu.Layout.TILED(
    plgpu.Tiling(((_ALIGNMENT, _WGMMA_ROWS), (2, _WGMMA_ROWS), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      widths: tokens that a tile may have, ascending multiples of 8. A tile takes the least that
        holds what it has, and a group with more than the last is cut.
      tile_n: rows of the weight in a tile: a multiple of 8 from 64 to 128, at most N; or 256, of
        an N in multiples of 128, with up to 120 tokens.
    """

    widths: tuple[int, ...]
    tile_n: int = 128

    @property
    def waves(self) -> int:
        """How many times 64 rows of the weight a consumer makes of a tile."""
        return 2 if self.tile_n == _WIDE_N else 1


def default_config(T: int, E: int, N: int, sms: int) -> Config:
    """Widths for T tokens in E groups, of which most are likely to have about as many.

    Where there are few tiles, their rows are such that the busiest of the `sms` multiprocessors
    has the fewest.
    """
    mean = T / E
    if mean <= 8:
        widths = (8, 16, 32, 64)
    elif mean <= 48:
        widths = (16, 32, 48, 64, 96)
    elif mean <= 144 or N % _WIDE_N:
        widths = (64, 96, 112, 120, 128, 136, 144)
    else:
        # What most groups are cut into, their neighbours, and what is left of odd ones.
        cuts = cdiv(round(mean) + _ALIGNMENT - 1, _WIDE_TOKENS)
        usual = round_up(cdiv(round(mean) + _ALIGNMENT // 2, cuts), _ALIGNMENT)
        near = (w for w in (usual - 8, usual, usual + 8) if w < _WIDE_TOKENS)
        return Config(tuple(sorted({64, *near, _WIDE_TOKENS})), _WIDE_N)
    widths = tuple(sorted({min(w, round_up(T, _ALIGNMENT)) for w in widths}))
    hit = max(1, round(E * (1 - (1 - 1 / E) ** T)))

    def busiest(tile_n: int) -> int:
        return cdiv(hit * cdiv(N, tile_n), sms) * tile_n

    most = min(2 * _WGMMA_ROWS, N // 8 * 8)
    if mean > 8 or cdiv(hit * cdiv(N, most), sms) > 8:
        return Config(widths, most)
    return Config(widths, min(range(most, _WGMMA_ROWS - 1, -8), key=busiest))


def grouped(
    xq: Float[Array, "T8 K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "LE N K"],
    sw: Float32[Array, "LE (N+127)//128 (K+127)//128"],
    group_sizes: Int32[Array, " E"],
    layer: Int32[Array, "1"],
    *,
    T: int,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "T N"]:
    """`y[t, n] = sum_kb (xq[t, kb] . w[n, kb]) * sx[kb, t] * s[n // 128, kb]`, (w, s) of t's group.

    Args:
      xq: float8_e4m3fn, sorted by group; T rounded up to a multiple of 8; K a multiple of 128.
      sx: the scales of xq, transposed; S is T rounded up to a multiple of 64.
      wq: float8_e4m3fn, a stack of layers of E matrices, read in place; N a multiple of 8, at
        least 64.
      sw: the scales of wq.
      group_sizes: tokens of each group. Those beyond their sum come out as zeros.
      layer: which of the stack.
      T: tokens.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[T, N]` of `out_dtype`.
    """
    (matrices, N, K), E = wq.shape, group_sizes.shape[0]
    out_dtype = jnp.dtype(out_dtype)
    widths, tile_n = config.widths, config.tile_n
    most, waves = widths[-1], config.waves
    steps, n_tiles, scale_rows = cdiv(K, K_BLOCK), cdiv(N, tile_n), cdiv(N, SCALE_ROWS)
    scale_cols = min(most, sx.shape[1])
    # Whether a consumer's rows may have two scales.
    straddles = tile_n % _WGMMA_ROWS != 0 or N % _WGMMA_ROWS != 0
    # The store that transposes without conflicts is there for whole tiles of 16-bit values.
    tiled_y = not straddles and out_dtype.itemsize == 2
    padded_groups = round_up(E, _SIZES) if E > _SIZES else round_up(E, 8)
    entries = round_up(padded_groups, _ENTRIES)
    group_sizes = jnp.pad(group_sizes.astype(jnp.int32), (0, padded_groups - E))
    slot_bytes = (tile_n + most) * K_BLOCK + round_up(scale_cols, 32) * 4 + 32
    # Mosaic aligns each array to 1024 bytes.
    other_bytes = (
        (most + 2 * _ALIGNMENT) * _CONSUMERS * _WGMMA_ROWS * out_dtype.itemsize
        + round_up(2 * entries * 4, 1024)
        + 3 * 1024
    )
    stages = ring_stages(slot_bytes, other_bytes, steps, _MAX_STAGES)

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, sizes_gmem, layer_gmem, y_gmem, *scratch):
        x_smem, w_smem, sx_smem, y_smem, edges, table, found, full, empty, tabled = scratch
        last_row, last_tile = table.at[0], table.at[1]
        warpgroup = lax.axis_index("warpgroup")
        base = in_stack(layer_gmem[0], matrices // E) * E

        def tiles_of(size):
            """Tiles along the tokens of a group, wherever it begins."""
            return jnp.where(size > 0, lax.div(size + (_ALIGNMENT - 1 + most - 1), most), 0)

        def make_table():
            """Where each group and its tiles end. A warpgroup adds up all sizes in parallel."""
            layout = plgpu.Layout.WGMMA
            at_once = min(_SIZES, padded_groups)
            entry, e = (
                plgpu.broadcasted_iota(jnp.int32, (_ENTRIES, at_once), axis, layout=layout)
                for axis in (0, 1)
            )
            parts = range(0, padded_groups, at_once)
            sizes = [
                plgpu.load(
                    sizes_gmem.at[pl.ds(part, at_once)], layout=layout.reduce(0), optimized=False
                )
                for part in parts
            ]
            for first in range(0, entries, _ENTRIES):
                rows = tiles = None
                for part, size in zip(parts, sizes, strict=True):
                    upto = part + e <= first + entry

                    def add_up(total, values, upto=upto):
                        values = lax.broadcast_in_dim(values, upto.shape, [1])
                        added = jnp.sum(jnp.where(upto, values, 0), axis=1)
                        return added if total is None else total + added

                    rows, tiles = add_up(rows, size), add_up(tiles, tiles_of(size) * n_tiles)
                last_row[pl.ds(first, _ENTRIES)] = rows
                last_tile[pl.ds(first, _ENTRIES)] = tiles
            plgpu.commit_smem()

        def all_tiles():
            """How many there are, those of the tokens beyond all groups included."""
            return last_tile[E - 1] + tiles_of(T - last_row[E - 1]) * n_tiles

        def find(tile):
            """A tile's group, first row of the weight, first token, and tokens from and to."""
            group = jnp.int32(0)
            for bit in reversed(range(E.bit_length())):
                further = group + (1 << bit)
                before = last_tile[jnp.minimum(further, E) - 1] <= tile
                group = jnp.where((further <= E) & before, further, group)
            previous = jnp.maximum(group - 1, 0)
            start = jnp.where(group == 0, 0, last_row[previous])
            stop = jnp.where(group == E, T, jnp.minimum(last_row[jnp.minimum(group, E - 1)], T))
            index = tile - jnp.where(group == 0, 0, last_tile[previous])
            offset = lax.rem(start, _ALIGNMENT)
            count = jnp.maximum(tiles_of(stop - start), 1)
            width = lax.div(offset + stop - start + count - 1, count)
            width = lax.div(width + _ALIGNMENT - 1, _ALIGNMENT) * _ALIGNMENT
            # Tiles of the same rows of the weight are neighbours, so that L2 has these. The last
            # rows are in two tiles if that makes them a whole one.
            n0 = jnp.minimum(lax.div(index, count) * tile_n, N - tile_n)
            begin = start - offset + lax.rem(index, count) * width
            low = jnp.maximum(start - begin, 0)
            high = jnp.maximum(jnp.minimum(stop - begin, width), low)
            return group, n0, begin, low, high

        def choose(high):
            """Which of the widths a tile has."""
            return sum(((high > w).astype(jnp.int32) for w in widths[:-1]), jnp.int32(0))

        def first_scale(begin):
            """Where the copy of a tile's scales begins: not so that it passes the end."""
            return jnp.minimum(begin, sx.shape[1] - scale_cols)

        def matrix(group):
            return base + jnp.minimum(group, E - 1)

        @pl.when(warpgroup == _CONSUMERS)
        def _producer():
            make_table()
            plgpu.barrier_arrive(tabled)
            producer_registers()

            def copy(tile, step, slot):
                group, n0, begin, _, high = tile
                block = pl.ds(step * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[matrix(group), pl.ds(pl.multiple_of(n0, 8), tile_n), block],
                    w_smem.at[slot],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    sx_gmem.at[step, pl.ds(first_scale(begin), scale_cols)],
                    sx_smem.at[slot, pl.ds(0, scale_cols)],
                    full.at[slot],
                )
                choice = choose(high)
                for i, width in enumerate(widths):

                    @pl.when(choice == i)
                    def _copy_tokens(width=width):
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[pl.ds(pl.multiple_of(begin, _ALIGNMENT), width), block],
                            x_smem.at[slot, pl.ds(0, width)],
                            full.at[slot],
                        )

                @pl.when(step == 0)
                def _tell():
                    for i, value in enumerate(tile):
                        found[slot, i] = value

                plgpu.barrier_arrive(full.at[slot])

            fill_ring(all_tiles(), steps, stages, empty, copy, find=find)

        @pl.when(warpgroup < _CONSUMERS)
        def _consumer():
            consumer_registers(_CONSUMERS)
            plgpu.barrier_wait(tabled)
            n_offset = pl.multiple_of(warpgroup * (tile_n - waves * _WGMMA_ROWS), 8)

            def load_scales(group, n0, step):
                """The weight's scales in the one or two of its rows that a consumer may meet."""

                def load(row):
                    row = jnp.minimum(row, scale_rows - 1)
                    return sw_gmem[matrix(group), row, jnp.minimum(step, steps - 1)]

                row = lax.div(n0 + n_offset, SCALE_ROWS)
                return (load(row), load(row + 1)) if straddles else (load(row),)

            def await_tile(slot, tile_before, is_one):
                """What the producer found, and the tile's first scales."""

                @pl.when(is_one)
                def _wait():
                    plgpu.barrier_wait(full.at[slot])

                tile = tuple(
                    jnp.where(is_one, found[slot, i], before)
                    for i, before in enumerate(tile_before)
                )
                return tile, load_scales(tile[0], tile[1], 0)

            def main_loop(width, tile, slot, scales):
                """The sums of 64 rows of the weight at a time by the tokens of a tile."""
                group, n0, begin, *_ = tile
                tokens = pl.ds(0, width)
                scale_tokens = pl.ds(begin - first_scale(begin), width)
                meeting = SCALE_ROWS - lax.rem(n0 + n_offset, SCALE_ROWS)

                def promote(total, block, x_scale, scales):
                    if not straddles:
                        scale = lax.broadcast_in_dim(x_scale * scales[0], block.shape, [1])
                        return total + block * scale
                    rows = plgpu.Layout.WGMMA.reduce(1)
                    row = plgpu.broadcasted_iota(jnp.int32, (_WGMMA_ROWS,), 0, layout=rows)
                    w_scale = jnp.where(row < meeting, *scales)
                    w_scale = lax.broadcast_in_dim(w_scale, block.shape, [0])
                    return total + block * lax.broadcast_in_dim(x_scale, block.shape, [1]) * w_scale

                def start(slot, wave, block):
                    w_rows = pl.ds(n_offset + wave * _WGMMA_ROWS, _WGMMA_ROWS)
                    return tensor_cores.start(w_smem, x_smem, slot, w_rows, tokens, block, K)

                # What a step begins with was awaited by the one before, in the shadow of its
                # products.
                def add_block(step, carry):
                    slot, scales, block, totals = carry
                    scales_next = load_scales(group, n0, step + 1)
                    slot_next = next_slot(slot, stages)
                    block = start(slot, 0, block)
                    x_scale = plgpu.load(
                        sx_smem.at[slot, scale_tokens], layout=plgpu.Layout.WGMMA.reduce(0)
                    )

                    @pl.when(step + 1 < steps)
                    def _await_next():
                        plgpu.barrier_wait(full.at[slot_next])

                    sums = []
                    for wave, total in enumerate(totals):
                        if wave > 0:
                            block = start(slot, wave, block)
                        block = tensor_cores.wait(block, K)
                        if wave == waves - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        sums.append(promote(total, block, x_scale, scales))
                    return slot_next, scales_next, block, tuple(sums)

                zero = zero_accumulator(_WGMMA_ROWS, width)
                init = slot, scales, zero, (zero,) * waves
                slot, _, _, totals = lax.fori_loop(0, steps, add_block, init)
                return slot, totals

            def epilogue(width, total, tile, wave):
                """Registers to SMEM to GMEM, where the rows of other groups are not to be touched.

                Copies have sizes that are known beforehand: those of the bits of a number of rows.
                """
                _, n0, begin, low, high = tile
                column = n0 + n_offset + wave * _WGMMA_ROWS
                if not straddles:
                    column = pl.multiple_of(column, _WGMMA_ROWS)
                columns = pl.ds(column, _WGMMA_ROWS)

                def store_rows(source, row, rows, target_row, sizes):
                    for size in sizes:

                        @pl.when((rows & size) != 0)
                        def _store(row=row, target_row=target_row, size=size):
                            plgpu.copy_smem_to_gmem(
                                source.at[pl.ds(pl.multiple_of(row, sizes[-1]), size)],
                                y_gmem.at[
                                    pl.ds(pl.multiple_of(target_row, sizes[-1]), size), columns
                                ],
                            )

                        row += rows & size
                        target_row += rows & size

                y = total.astype(out_dtype)
                if out_dtype.itemsize == 2:
                    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if not tiled_y:
                    store(y_smem.at[warpgroup, pl.ds(0, width)].T, y)
                    plgpu.commit_smem()
                    sizes = [s for s in (128, 64, 32, 16, 8, 4, 2, 1) if s <= min(width, T)]
                    store_rows(y_smem.at[warpgroup], low, high - low, begin + low, sizes)
                    return
                y_smem.at[warpgroup, pl.ds(0, width)].T[...] = y
                plgpu.commit_smem()
                # What is in whole tiles of SMEM, and the tokens before and behind it.
                low8 = lax.div(low + _ALIGNMENT - 1, _ALIGNMENT) * _ALIGNMENT
                high8 = lax.div(high, _ALIGNMENT) * _ALIGNMENT
                behind = jnp.maximum(jnp.minimum(low8, high), high8)
                sizes = [s for s in (128, 64, 32, 16, 8) if s <= min(width, T)]
                whole = jnp.maximum(high8 - low8, 0)
                store_rows(y_smem.at[warpgroup], low8, whole, begin + low8, sizes)
                for i, (start, stop) in enumerate(((low, jnp.minimum(low8, high)), (behind, high))):

                    @pl.when(stop > start)
                    def _store_edge(i=i, start=start, stop=stop):
                        block = lax.div(start, _ALIGNMENT) * _ALIGNMENT
                        block = pl.multiple_of(block, _ALIGNMENT)
                        source = y_smem.at[warpgroup, pl.ds(block, _ALIGNMENT)]
                        edges[warpgroup, i] = plgpu.load(source, layout=_TOKENS_8, optimized=False)
                        plgpu.commit_smem()
                        sizes = [s for s in (4, 2, 1) if s <= T]
                        at = edges.at[warpgroup, i]
                        store_rows(at, start - block, stop - start, begin + start, sizes)

            tiles = all_tiles()

            def do_tile(index, carry):
                slot, tile, scales = carry

                def of_width(width):
                    def run(slot):
                        slot, totals = main_loop(width, tile, slot, scales)
                        # Before the results are stored, so that the scales arrive meanwhile.
                        following = await_tile(slot, tile, index + sms < tiles)
                        in_group = jnp.broadcast_to(tile[0] < E, totals[0].shape)
                        for wave, total in enumerate(totals):
                            epilogue(width, jnp.where(in_group, total, 0.0), tile, wave)
                        return slot, *following

                    return run

                return lax.switch(choose(tile[4]), [of_width(w) for w in widths], slot)

            slot, none = jnp.int32(0), (jnp.int32(0),) * 5
            has_one = lax.axis_index("sm") < tiles
            for_each_tile(tiles, (slot, *await_tile(slot, none, has_one)), do_tile)
            plgpu.wait_smem_to_gmem(0)

    # TMA stores whole tiles of 8 rows, or fewer than 8.
    y_rows = T if T < _ALIGNMENT else round_up(T, _ALIGNMENT)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((y_rows, N), out_dtype),
        scratch_types=[
            plgpu.SMEM((stages, most, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_n, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, round_up(scale_cols, 32)), jnp.float32),
            plgpu.SMEM(
                (_CONSUMERS, most, _WGMMA_ROWS),
                out_dtype,
                transforms=swizzled(_WGMMA_ROWS, out_dtype) if tiled_y else (),
            ),
            plgpu.SMEM((_CONSUMERS, 2, _ALIGNMENT, _WGMMA_ROWS), out_dtype),
            plgpu.SMEM((2, entries), jnp.int32),
            plgpu.SMEM((stages, 8), jnp.int32),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            plgpu.Barrier(),
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_grouped_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(
        xq,
        sx,
        wq,
        sw,
        group_sizes,
        layer,
    )
    return y[:T]
