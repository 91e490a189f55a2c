"""Experts on Hopper: groups of tokens, each by a blocked FP8 matrix of its own, in one kernel.

The operands change places, as in `decode_sm90`: wgmma's 64-row side runs over the weight's rows and
its other side over the tokens, which comes in steps of 8. So a tile is as wide as its group has
tokens: little is computed in vain for a few tokens, and a large group is cut into equal tiles.

Which tiles there are follows from the group sizes, which only the device knows. The producer of
each thread block makes a table of where groups and their tiles end, looks its tiles up in it, and
tells the consumers through the ring. A few tokens it gathers itself, by their numbers; many are
sorted by group when it gets them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.hopper import interpreted
from jaxquant.matmul import gather_sm90 as gather, gemm_wgmma_sm90 as tensor_cores
from jaxquant.matmul.scan_sm90 import running_sums
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
    swizzled,
    zero_accumulator,
)
from jaxquant.matmul.store_sm90 import STAGED, store_transposed

# Rows of wgmma, and warpgroups that multiply: each has so many rows of a tile.
_WGMMA_ROWS = 64
_CONSUMERS = 2
_MAX_STAGES = 12
# Rows of a tile of two waves, and tokens, at most: a thread's registers hold the sums of both waves
# and the products that are under way. One wave after the other leaves room for 120 tokens; that
# takes 451 us for 4096 tokens and 128 experts of 1536 x 4096, this 433.
_WIDE_N = 256
_WIDE_TOKENS = 96
# Tiles begin at multiples of so many tokens: TMA counts in whole tiles of SMEM.
_ALIGNMENT = 8
# So many numbers of rows are loaded as the kernel begins, more of them tile by tile.
_ROWS_AT_ONCE = 512


def _fence() -> None:
    """None on a GPU: loads are through long before their thread lets the copy go."""
    if interpreted():
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      widths: tokens that a tile may have, ascending multiples of 8. A tile takes the least that
        holds what it has, and a group with more than the last is cut.
      tile_n: rows of the weight in a tile: a multiple of 8 from 64 to 128, at most N; or 256, of
        an N in multiples of 128, with up to 96 tokens.
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
        # What most groups are cut into, its neighbours, and what is left of odd ones.
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
    rows: Int32[Array, " T"] | None = None,
    *,
    T: int,
    config: Config,
    sms: int,
) -> Float[Array, "T N"]:
    """`y[t, n] = sum_kb (xq[t, kb] . w[n, kb]) * sx[kb, t] * s[n // 128, kb]`, (w, s) of t's group.

    Args:
      xq: float8_e4m3fn, sorted by group; T rounded up to a multiple of 8; K a multiple of 128. Or
        with `rows` any rows.
      sx: the scales of xq, transposed; S is T rounded up to a multiple of 64, or with `rows` any.
      wq: float8_e4m3fn, a stack of layers of E matrices, read in place; N a multiple of 8, at
        least 64.
      sw: the scales of wq.
      group_sizes: tokens of each group. Those beyond their sum come out as zeros.
      layer: which of the stack.
      rows: for each token which row of xq it is, sorted by group.
      T: tokens.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      bfloat16 `[T, N]`.
    """
    (matrices, N, K), E = wq.shape, group_sizes.shape[0]
    widths, tile_n = config.widths, config.tile_n
    most, waves = widths[-1], config.waves
    steps, n_tiles, scale_rows = cdiv(K, K_BLOCK), cdiv(N, tile_n), cdiv(N, SCALE_ROWS)
    gathers = rows is not None
    all_rows = gathers and T <= _ROWS_AT_ONCE
    rows_loaded = round_up(T if all_rows else most, 32)
    scale_cols = most if gathers else min(most, sx.shape[1])
    # Whether a consumer's rows may have two scales.
    straddles = tile_n % _WGMMA_ROWS != 0 or N % _WGMMA_ROWS != 0
    slot_bytes = (tile_n + most) * K_BLOCK + round_up(scale_cols, 32) * 4 + 32
    # Mosaic aligns each array to 1024 bytes.
    other_bytes = (
        STAGED * _CONSUMERS * _WGMMA_ROWS * 2
        + round_up(2 * E * 4, 1024)
        + round_up(rows_loaded * 4, 1024)
        + 4 * 1024
    )
    stages = ring_stages(slot_bytes, other_bytes, steps, _MAX_STAGES)

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, sizes_gmem, layer_gmem, *refs):
        rows_gmem, refs = (refs[0], refs[1:]) if gathers else (None, refs)
        y_gmem, x_smem, w_smem, sx_smem, y_smem, *refs = refs
        table, found, rows_smem, landed, full, empty, tabled = refs
        last_row, last_tile = table.at[0], table.at[1]
        warpgroup = lax.axis_index("warpgroup")
        base = in_stack(layer_gmem[0], matrices // E) * E

        def tiles_of(size):
            """Tiles along the tokens of a group, wherever it begins."""
            return jnp.where(size > 0, lax.div(size + (_ALIGNMENT - 1 + most - 1), most), 0)

        def all_tiles():
            """How many there are, those of the tokens beyond all groups included."""
            return (last_tile[E - 1] + tiles_of(T - last_row[E - 1])) * n_tiles

        def find(tile):
            """A tile's group, first row of the weight, first token, and tokens from and to."""
            group = jnp.int32(0)
            for bit in reversed(range(E.bit_length())):
                further = group + (1 << bit)
                before = last_tile[jnp.minimum(further, E) - 1] * n_tiles <= tile
                group = jnp.where((further <= E) & before, further, group)
            previous = jnp.maximum(group - 1, 0)
            start = jnp.where(group == 0, 0, last_row[previous])
            stop = jnp.where(group == E, T, jnp.minimum(last_row[jnp.minimum(group, E - 1)], T))
            index = tile - jnp.where(group == 0, 0, last_tile[previous]) * n_tiles
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
            if gathers:
                gather.init(landed, stages)
            if all_rows:
                gather.start_rows(rows_gmem, rows_smem)
            running_sums(sizes_gmem, table, most, _ALIGNMENT - 1)
            if all_rows:
                gather.wait_for_rows()
            plgpu.commit_smem()
            plgpu.barrier_arrive(tabled)
            producer_registers()

            def copy_tokens(begin, high, step, slot):
                plgpu.copy_gmem_to_smem(
                    sx_gmem.at[step, pl.ds(first_scale(begin), scale_cols)],
                    sx_smem.at[slot, pl.ds(0, scale_cols)],
                    full.at[slot],
                )
                choice, block = choose(high), pl.ds(step * K_BLOCK, K_BLOCK)
                for i, width in enumerate(widths):

                    @pl.when(choice == i)
                    def _copy(width=width):
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[pl.ds(pl.multiple_of(begin, _ALIGNMENT), width), block],
                            x_smem.at[slot, pl.ds(0, width)],
                            full.at[slot],
                        )

            def gather_tokens(begin, high, step, slot):
                if not all_rows:

                    @pl.when(step == 0)
                    def _load_rows():
                        gather.load_rows(rows_gmem, begin, rows_smem)

                first = begin if all_rows else 0
                tokens = x_gmem, sx_gmem, rows_smem, first, high
                gather.start(*tokens, step, slot, x_smem, sx_smem, landed, K)

            def copy(tile, step, slot):
                group, n0, begin, _, high = tile
                rows, block = pl.ds(pl.multiple_of(n0, 8), tile_n), pl.ds(step * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[matrix(group), rows, block], w_smem.at[slot], full.at[slot]
                )
                (gather_tokens if gathers else copy_tokens)(begin, high, step, slot)

                @pl.when(step == 0)
                def _tell():
                    for i, value in enumerate(tile):
                        found[slot, i] = value

                plgpu.barrier_arrive(full.at[slot])

            fill_ring(all_tiles(), steps, stages, empty, copy, _fence, find)

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

            # A place is a slot, and in which turn of the ring, counted modulo 2.
            def await_slot(place):
                slot, turn = place
                plgpu.barrier_wait(full.at[slot])
                if gathers:
                    gather.wait(landed, slot, turn)

            def next_place(place):
                slot, turn = place
                return next_slot(slot, stages), jnp.where(slot == stages - 1, 1 - turn, turn)

            def await_tile(place, tile_before, is_one):
                """What the producer found, and the tile's first scales."""
                slot, _ = place

                @pl.when(is_one)
                def _wait():
                    await_slot(place)

                tile = tuple(
                    jnp.where(is_one, found[slot, i], before)
                    for i, before in enumerate(tile_before)
                )
                return tile, load_scales(tile[0], tile[1], 0)

            def main_loop(width, tile, place, scales):
                """The sums of 64 rows of the weight at a time by the tokens of a tile."""
                group, n0, begin, *_ = tile
                tokens = pl.ds(0, width)
                scale_tokens = pl.ds(0 if gathers else begin - first_scale(begin), width)
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
                    """Starts a product."""
                    w_rows = pl.ds(n_offset + wave * _WGMMA_ROWS, _WGMMA_ROWS)
                    return tensor_cores.start(w_smem, x_smem, slot, w_rows, tokens, block, K)

                def await_block(step, place):
                    @pl.when(step < steps)
                    def _wait():
                        await_slot(place)

                def load_x_scale(slot):
                    layout = plgpu.Layout.WGMMA.reduce(0)
                    return plgpu.load(sx_smem.at[slot, scale_tokens], layout=layout)

                # What a step begins with was awaited by the one before, in the shadow of its
                # products.
                def add_block(step, carry):
                    place, scales, (block,), (total,) = carry
                    slot, _ = place
                    place_next = next_place(place)
                    block = start(slot, 0, block)
                    x_scale = load_x_scale(slot)
                    await_block(step + 1, place_next)
                    # Behind the fence, which waits for loads as well.
                    scales_next = load_scales(group, n0, step + 1)
                    block = tensor_cores.wait(block, K)
                    plgpu.barrier_arrive(empty.at[slot])
                    total = promote(total, block, x_scale, scales)
                    return place_next, scales_next, (block,), (total,)

                # The product of one wave goes on while the other's is promoted. It takes a ring of
                # two slots, which all tiles so small have.
                def add_waves(step, carry):
                    place, scales, (block, other), (total, other_total) = carry
                    slot, _ = place
                    place_next = next_place(place)
                    block = start(slot, 0, block)
                    x_scale = load_x_scale(slot)
                    other = start(slot, 1, other)
                    scales_next = load_scales(group, n0, step + 1)
                    block = tensor_cores.wait(block, K, pending=1)
                    total = promote(total, block, x_scale, scales)
                    # It branches: without, the compiler moves half of the promotion behind the
                    # wait for the other product, and out of its shadow.
                    await_block(step + 1, place_next)
                    other = tensor_cores.wait(other, K)
                    plgpu.barrier_arrive(empty.at[slot])
                    other_total = promote(other_total, other, x_scale, scales)
                    return place_next, scales_next, (block, other), (total, other_total)

                zeros = (zero_accumulator(_WGMMA_ROWS, width),) * waves
                carry = place, scales, zeros, zeros
                body = add_waves if waves > 1 else add_block
                place, _, _, totals = lax.fori_loop(0, steps, body, carry)
                return place, totals

            def epilogue(total, tile, wave):
                """Registers to GMEM, where the rows of other groups are not to be touched."""
                group, n0, begin, low, high = tile
                # Tokens beyond all groups.
                total = jnp.where(jnp.broadcast_to(group < E, total.shape), total, 0.0)
                column = n0 + n_offset + wave * _WGMMA_ROWS
                store_transposed(total, y_smem.at[warpgroup], y_gmem, begin, column, low, high)

            tiles = all_tiles()

            def do_tile(index, carry):
                place, tile, scales = carry

                def of_width(width):
                    def run(place):
                        place, totals = main_loop(width, tile, place, scales)
                        # Before the results are stored, so that the scales arrive meanwhile.
                        following = await_tile(place, tile, index + sms < tiles)
                        for wave, total in enumerate(totals):
                            epilogue(total, tile, wave)
                        return place, *following

                    return run

                return lax.switch(choose(tile[4]), [of_width(w) for w in widths], place)

            place, none = (jnp.int32(0),) * 2, (jnp.int32(0),) * 5
            has_one = lax.axis_index("sm") < tiles
            for_each_tile(tiles, (place, *await_tile(place, none, has_one)), do_tile)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, N), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((stages, most, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_n, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, round_up(scale_cols, 32)), jnp.float32),
            plgpu.SMEM((_CONSUMERS, STAGED, _WGMMA_ROWS), jnp.bfloat16),
            plgpu.SMEM((2, E), jnp.int32),
            plgpu.SMEM((stages, 8), jnp.int32),
            plgpu.SMEM((rows_loaded,), jnp.int32),
            gather.BARRIERS,
            plgpu.Barrier(num_arrivals=2 if gathers else 4, num_barriers=stages),
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
        group_sizes.astype(jnp.int32),
        layer,
        *([rows] if gathers else []),
    )
