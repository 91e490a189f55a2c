"""One token, or two, by a blocked FP8 weight on Hopper, in one launch.

    y = prologue(x) @ w^T + bias + residual, or SiluMul of that

A thread block has the rows of a tile of the weight and all of K, so that no sum crosses thread
blocks. While its producer fills the ring, its consumers quantize x, each thread block all of it:
that is less work than it takes to fill the ring, and saves a launch. Consumers take turns at the
slots and add up in SMEM at the end of a tile.

A ring that is asked for keeps the memory busy for 3 to 6 us, and what is read later waits so long.
So all else is read first: x before the layer is known, the norm's weight and the scales of the
first tile next. Later scales are read a tile ahead.

It does without programmatic dependent launch: XLA runs programs as CUDA graphs, which do not have
it between the kernels of custom calls. Without graphs, with it, and with the weight asked for ahead
of the wait, the step of an 8B model takes 2.21 ms rather than 2.26 at one token, and 2.73 rather
than 2.70 at 16. A prefetch to L2 takes longer than it saves, be it ahead of the copies or, at the
end, of the next product's weight (4 to 24 MB: 1 to 7 us a layer slower).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul.act_quant_sm90 import (
    from_smem,
    normalize,
    quantize_groups,
    silu_mul,
    square_from,
)
from jaxquant.matmul.prologue import RMSNorm
from jaxquant.matmul.row_groups_sm90 import (
    GROUPS,
    TILE_GROUPS,
    grouped,
    is_whole,
    load_row,
    store_operand,
)
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    SMEM_BYTES,
    cdiv,
    fill_ring,
    for_each_tile,
    in_stack,
    store,
    swizzled,
    zero_accumulator,
)

# Most columns of one token, and of two: what every thread block quantizes for itself alone pays
# while it takes less time than the ring.
_MOST = (14336, 2048)
# wgmma's 64 rows; a tile that has fewer leaves the rest of the result unused.
_WGMMA_ROWS = 64
# A value for each row of a tile, in every warp.
_ROWS = plgpu.Layout.WGMMA.reduce(0)
# K blocks in a slot: rows are read in longer pieces, for fewer barriers.
_SLOT_BLOCKS = (4, 2)
# Two are enough, and leave a ring of few large slots whole.
_CONSUMERS = (2, 3, 1)
# What a tile costs besides its rows, in rows.
_TILE_ROWS = 4
# Most K blocks, and threads of a warpgroup.
_SCALES = 128
# A barrier's phases are the bits of an int32.
_MAX_STAGES = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      rows: of the weight in a tile: a multiple of 8, at most 64 and N.
      slot_blocks: K blocks in a slot, 2 or 4; the last may have some beyond K: zeros.
      consumers: warpgroups that multiply; divides the slots of a tile, so that each has the same K
        blocks of every tile, and a row's bytes do not depend on its tile.
    """

    rows: int
    slot_blocks: int
    consumers: int


def takes(M: int, K: int) -> bool:
    """Whether this is the fastest kernel for the product; K is a multiple of 32."""
    return M <= len(_MOST) and K <= _MOST[M - 1]


def default_config(N: int, K: int, sms: int) -> Config:
    """The tiles that leave the busiest of the `sms` multiprocessors the fewest rows."""
    steps = cdiv(K, K_BLOCK)

    def busiest(rows: int) -> int:
        return cdiv(cdiv(N, rows), sms) * (rows + _TILE_ROWS)

    slot_blocks = next((b for b in _SLOT_BLOCKS if steps % b == 0), _SLOT_BLOCKS[0])
    consumers = next(c for c in _CONSUMERS if cdiv(steps, slot_blocks) % c == 0)
    rows = min(range(min(_WGMMA_ROWS, N), 0, -8), key=busiest)
    return Config(rows, slot_blocks, consumers)


def gemv(
    x: Float[Array, "M A"],
    sx: Float32[Array, " groups"] | None,
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    prologue: RMSNorm | None = None,
    bias: Float[Array, "Lb N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    gated: bool = False,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M _"]:
    """The product of one layer of a stack, x quantized on the way.

    Args:
      x: bfloat16 or float32, K a multiple of 32, see `takes`; or float8_e4m3fn, quantized already,
        if rows of K are whole, see `row_groups_sm90`.
      sx: the scales of x if it is quantized, token after token, else None.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stacks.
      prologue: RMSNorm with a weight `[Ln, K]` of x's dtype, or None.
      bias: of `out_dtype`.
      residual: of `out_dtype`.
      gated: whether the result is SiluMul of the rest; not with a residual. N is a multiple of 16.
      out_dtype: bfloat16 or float32.
      config: see `default_config`, for as many rows as the result has columns.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`, or `[M, N // 2]` if gated.
    """
    M, (L, N, K) = x.shape[0], wq.shape
    rows, slot_blocks, consumers = dataclasses.astuple(config)
    slot_columns = slot_blocks * K_BLOCK
    steps, slots = cdiv(K, K_BLOCK), cdiv(K, slot_columns)
    # Of 8 K blocks, of which the last may overlap the one before, or have some beyond K: zeros.
    atoms = cdiv(steps, TILE_GROUPS)
    last_atom = (steps if is_whole(K) else atoms * TILE_GROUPS) - TILE_GROUPS
    shares = cdiv(atoms, consumers)
    # Of a tile of the result, where it is gated: the rows of the gate, and then those of up.
    parts = 2 if gated else 1
    columns = N // parts
    n_tiles = cdiv(columns, rows)
    blocks = min(sms, n_tiles)
    scale_rows = 2 if SCALE_ROWS % rows != 0 or columns % rows != 0 else 1
    # The scales of a row of blocks are loaded by all threads of a consumer, one each.
    sw_flat = jnp.pad(sw.reshape(-1), (0, max(0, _SCALES - sw.size)))
    extras = [e for e in (bias, residual) if e is not None]

    x_bytes = M * atoms * TILE_GROUPS * (K_BLOCK + 4) + 2 * scale_rows * 2 * _SCALES * 4
    row_bytes = M * _WGMMA_ROWS * 4
    free = SMEM_BYTES - x_bytes - row_bytes * (2 * consumers + 1 + len(extras)) - 4096
    overhang = _WGMMA_ROWS - rows  # of the last slot's operand
    stages = (free // slot_columns - overhang) // rows
    most = min(_MAX_STAGES, parts * slots * cdiv(n_tiles, blocks))
    stages = min(most, stages) // consumers * consumers

    operands = [x] if prologue is None else [x, prologue.weight]
    operands = [grouped(a, K) for a in operands] + ([] if sx is None else [sx])

    def kernel(*refs):
        x_refs, refs = refs[: len(operands)], refs[len(operands) :]
        w_gmem, sw_gmem, layer_gmem, *extra_gmem = refs[: 3 + len(extras)]
        y_gmem, x_smem, sx_smem, w_smem, sw_smem, sums_smem, gate_smem, extra_smem, *barriers = (
            refs[3 + len(extras) :]
        )
        full, empty, together, landed = barriers
        warpgroup = lax.axis_index("warpgroup")

        def first_row(tile, part):
            # The last tile overlaps the one before rather than the end, and computes the same.
            return jnp.minimum(tile * rows, columns - rows) + part * columns

        def wait_for_all():
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        def atom_at(m, a):
            return pl.ds((m * atoms + a) * TILE_GROUPS, TILE_GROUPS)

        def atom_start(a):
            return jnp.minimum(a * TILE_GROUPS, last_atom)

        def scales_at(n, end, kb):
            at = (lax.rem(n, 2) * scale_rows + end) * 2 * _SCALES + _SCALES + kb
            return pl.ds(at, TILE_GROUPS)

        # Of the last share, some have none, and do the last atom again.
        turns = [i * consumers + warpgroup for i in range(shares)]

        def load_x():
            """This consumer's atoms of each token, with their scales if it is quantized."""
            firsts = [atom_start(a) for a in turns]
            values = [[load_row(x_refs[0], m, first, K) for first in firsts] for m in range(M)]
            if sx is None:
                return values
            return [
                [(v, load_scale(x_refs[1], m * steps + a)) for v, a in zip(vs, firsts, strict=True)]
                for m, vs in enumerate(values)
            ]

        def load_scale(ref, first):
            at = ref.at[pl.ds(first, TILE_GROUPS)]
            return plgpu.load(at, layout=GROUPS.reduce(1), optimized=False)

        def load_norm(l):
            if prologue is None:
                return None
            row = in_stack(l, prologue.weight.shape[0])
            return [load_row(x_refs[1], row, atom_start(a), K) for a in turns]

        def fill_x(loaded, norm):
            """x to SMEM."""
            if sx is None:
                loaded = [[v.astype(jnp.float32) for v in token] for token in loaded]
            if prologue is not None:
                loaded = normalized(loaded, norm, prologue.eps)
            for m, token in enumerate(loaded):
                for turn, v in zip(turns, token, strict=True):
                    qvalue, scale = quantize_groups(v) if sx is None else v
                    a = jnp.minimum(turn, atoms - 1)
                    store_operand(x_smem.at[atom_at(m, a)], qvalue.astype(FP8), K)
                    sx_smem[atom_at(m, a)] = scale

        def normalized(tokens, norm, eps):
            overlap = consumers * shares * TILE_GROUPS != steps
            for m, token in enumerate(tokens):
                squares = [
                    square_from(v, turn * TILE_GROUPS - atom_start(turn), overlap)
                    for turn, v in zip(turns, token, strict=True)
                ]
                own = sums_smem.at[0, warpgroup, m, pl.ds(0, TILE_GROUPS)]
                own[...] = jnp.sum(functools.reduce(jnp.add, squares), axis=1)
            plgpu.commit_smem()
            wait_for_all()
            results = []
            for m, token in enumerate(tokens):
                sums = [sums_smem.at[0, c, m, pl.ds(0, TILE_GROUPS)] for c in range(consumers)]
                total = jnp.sum(functools.reduce(jnp.add, map(from_smem, sums)))
                inverse = lax.rsqrt(total / K + eps)
                results.append([normalize(v, inverse, w) for v, w in zip(token, norm, strict=True)])
            return results

        # Of the blocks' rows that a tile meets, those whose scales this consumer brings.
        scale_turns = [i * consumers + warpgroup for i in range(cdiv(scale_rows, consumers))]

        def scales_start(l, tile, part, end):
            """Where those of a row of blocks are loaded from, and how far behind they begin."""
            row = first_row(tile, part) + jnp.minimum(end, scale_rows - 1) * (rows - 1)
            first = (l * sw.shape[1] + lax.div(row, SCALE_ROWS)) * steps
            start = jnp.minimum(first, sw_flat.size - _SCALES)
            return start, first - start

        def load_scales(l, tile, part):
            layout = plgpu.Layout.WG_STRIDED((_SCALES,), vec_size=1)
            loaded = []
            for end in scale_turns:
                start, lead = scales_start(l, tile, part, end)
                at = sw_gmem.at[pl.ds(start, _SCALES)]
                loaded.append((plgpu.load(at, layout=layout, optimized=False), lead))
            return loaded

        def store_scales(n, loaded):
            """Puts them where that of K block i is at `_SCALES + i`."""
            for end, (values, lead) in zip(scale_turns, loaded, strict=True):
                at = (lax.rem(n, 2) * scale_rows + end) * 2 * _SCALES + _SCALES - lead

                @pl.when(end < scale_rows)
                def _store(at=at, values=values):
                    store(sw_smem.at[pl.ds(at, _SCALES)], values)

        def do_tile(l, tile, n):
            return lax.fori_loop(0, parts, functools.partial(do_part, l, tile), n)

        def do_part(l, tile, part, n):
            n0 = first_row(tile, part)
            sums = sums_smem.at[lax.rem(n, 2)]

            @pl.when(warpgroup == 0)
            def _fetch():
                for e, (extra, source) in enumerate(zip(extra_gmem, extras, strict=True)):
                    for m in range(source.shape[0] if source is residual else 1):
                        at = m if source is residual else in_stack(layer_gmem[0], source.shape[0])
                        plgpu.copy_gmem_to_smem(
                            extra.at[at, pl.ds(n0, rows)],
                            extra_smem.at[e, m, pl.ds(0, rows)],
                            landed,
                        )

            next_tile = jnp.where(part == parts - 1, tile + blocks, tile)
            next_part = lax.rem(part + 1, parts)
            next_scales = load_scales(l, jnp.minimum(next_tile, n_tiles - 1), next_part)
            for m, total in enumerate(main_loop(n0, n)):
                # A token's sums over K blocks stand side by side.
                sums[warpgroup, m] = jnp.sum(total, axis=1)
            store_scales(n + 1, next_scales)
            wait_for_all()

            @pl.when(warpgroup == 0)
            def _finish():
                epilogue(sums, n0, part)

            return n + 1

        def main_loop(n0, n):
            """This consumer's share of a tile: `[64, 8]` a token, K block i in column i % 8."""
            shape = (_WGMMA_ROWS, TILE_GROUPS)
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            in_top = n0 + row < (lax.div(n0, SCALE_ROWS) + 1) * SCALE_ROWS
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

            def of_columns(values):
                return lax.broadcast_in_dim(plgpu.load(values, layout=_ROWS), shape, [1])

            def add_slot(i, totals):
                own_slot = warpgroup + i * consumers
                slot = lax.rem(n * slots + own_slot, stages)
                kb = own_slot * slot_blocks
                a = lax.div(kb, TILE_GROUPS)
                w_scales = [
                    of_columns(sw_smem.at[scales_at(n, end, atom_start(a))])
                    for end in range(scale_rows)
                ]
                scale = jnp.where(in_top, *w_scales) if scale_rows == 2 else w_scales[0]
                scales = [scale * of_columns(sx_smem.at[atom_at(m, a)]) for m in range(M)]
                plgpu.barrier_wait(full.at[slot])

                def multiply(*accumulators):
                    for m in range(M):
                        operand = x_smem.at[atom_at(m, a)]
                        for b in range(slot_blocks):
                            plgpu.wgmma(
                                accumulators[m * slot_blocks + b],
                                w_smem.at[
                                    pl.ds(slot * rows, _WGMMA_ROWS), pl.ds(b * K_BLOCK, K_BLOCK)
                                ],
                                operand.T,
                            )
                    return [accumulator[...] for accumulator in accumulators]

                kind = plgpu.ACC(shape, jnp.float32)
                products = pl.run_scoped(multiply, *[kind] * (M * slot_blocks))
                plgpu.barrier_arrive(empty.at[slot])
                results = []
                for m, total in enumerate(totals):
                    # The other columns are other blocks of x by this block of the weight.
                    own = products[m * slot_blocks]
                    for b in range(1, slot_blocks):
                        at = column == kb + b - atom_start(a)
                        own = jnp.where(at, products[m * slot_blocks + b], own)
                    first = kb - atom_start(a)
                    end = jnp.minimum(first + slot_blocks, steps - atom_start(a))
                    inside = (column >= first) & (column < end)
                    results.append(total + jnp.where(inside, own * scales[m], 0.0))
                return results

            totals = [zero_accumulator(*shape) for _ in range(M)]
            return lax.fori_loop(0, slots // consumers, add_slot, totals)

        def epilogue(sums, n0, part):
            """Adds what the consumers have, the bias and the residual; stores the tile."""

            def row_of(ref, *index):
                return plgpu.load(ref.at[(*index, pl.ds(0, rows))], layout=_ROWS)

            if extras:
                plgpu.barrier_wait(landed)
            for m in range(M):
                y = row_of(sums, 0, m)
                for c in range(1, consumers):
                    y += row_of(sums, c, m)
                y = y.astype(out_dtype)
                for e, source in enumerate(extras):
                    extra = row_of(extra_smem, e, m if source is residual else 0)
                    y = (y.astype(jnp.float32) + extra.astype(jnp.float32)).astype(out_dtype)
                if not gated:
                    # Not by way of SMEM: a TMA store and the wait for it take longer.
                    store(y_gmem.at[m, pl.ds(n0, rows)], y)
                    continue

                @pl.when(part == 0)
                def _keep(m=m, y=y):
                    gate_smem[m, pl.ds(0, rows)] = y

                @pl.when(part == 1)
                def _gate(m=m, up=y):
                    gate = row_of(gate_smem, m).astype(jnp.float32)
                    h = silu_mul(gate, up.astype(jnp.float32), out_dtype, _ROWS)
                    store(y_gmem.at[m, pl.ds(n0 - columns, rows)], h.astype(out_dtype))

            plgpu.commit_smem()

        @pl.when(warpgroup == consumers)
        def _producer():
            l = in_stack(layer_gmem[0], L)

            def copy(tile, step, slot):
                n0, k0 = first_row(tile, lax.div(step, slots)), lax.rem(step, slots) * slot_columns
                weights = w_gmem.at[l, pl.ds(n0, rows), pl.ds(k0, slot_columns)]
                target = w_smem.at[pl.ds(slot * rows, rows)]
                plgpu.copy_gmem_to_smem(weights, target, full.at[slot])

            fill_ring(n_tiles, parts * slots, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            # All that is read, at once: what is asked for later waits in memory's queue behind the
            # whole ring.
            loaded = load_x()
            l = in_stack(layer_gmem[0], L)
            norm, scales = load_norm(l), load_scales(l, lax.axis_index("sm"), 0)
            fill_x(loaded, norm)
            store_scales(0, scales)
            plgpu.commit_smem()
            wait_for_all()
            for_each_tile(n_tiles, jnp.int32(0), lambda tile, n: do_tile(l, tile, n))

    copies = sum(M if e is residual else 1 for e in extras)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, columns), out_dtype),
        scratch_types=[
            plgpu.SMEM((M * atoms * TILE_GROUPS, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((M * atoms * TILE_GROUPS,), jnp.float32),
            plgpu.SMEM((stages * rows + overhang, slot_columns), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((2 * scale_rows * 2 * _SCALES,), jnp.float32),
            plgpu.SMEM((2, consumers, M, _WGMMA_ROWS), jnp.float32),
            plgpu.SMEM((M, _WGMMA_ROWS), out_dtype),
            plgpu.SMEM((max(1, len(extras)), M, _WGMMA_ROWS), out_dtype),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers),
            plgpu.Barrier(num_arrivals=max(1, copies)),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_gemv_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands, wq, sw_flat, layer, *extras)
