"""One token, or a few, by a blocked FP8 weight on Hopper, in one launch.

    y = prologue(x) @ w^T + bias + residual

A thread block has the rows of a tile of the weight and all of K, so that no sum crosses thread
blocks. While its producer fills the ring, its consumers quantize x, each thread block all of it:
that is less work than it takes to fill the ring, and saves a launch. Consumers take turns at the
slots and add up in SMEM at the end of a tile.

It does without programmatic dependent launch: XLA runs loops as CUDA graphs, which do not have it
between the kernels of custom calls. A prefetch to L2 takes longer than it saves, be it ahead of the
copies or, at the end, of the next product's weight (4 to 24 MB: 1 to 7 us a layer slower).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul.act_quant_sm90 import (
    GROUPS,
    TILE_GROUPS,
    apply_prologue,
    groups_of,
    quantize_groups,
)
from jaxquant.matmul.prologue import Prologue
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    SMEM_BYTES,
    cdiv,
    fill_ring,
    for_each_tile,
    in_stack,
    swizzled,
    zero_accumulator,
)

# What every consumer quantizes for itself alone pays while it takes less time than the ring.
_MAX_VALUES = 16384
_MAX_TOKENS = 2
# wgmma's 64 rows; a tile that has fewer leaves the rest of the result unused.
_WGMMA_ROWS = 64
# K blocks in a slot: fewer barriers, and two products in flight.
_SLOT_BLOCKS = 2
_SLOT = _SLOT_BLOCKS * K_BLOCK
_CONSUMERS = (4, 3, 2, 1)
# Of the multiprocessors, how many saturate the memory.
_FEW_BLOCKS = 0.48
# What a tile costs besides its rows, in rows.
_TILE_ROWS = 4
# A barrier's phases are the bits of an int32.
_MAX_STAGES = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      rows: of the weight in a tile: a multiple of 8, at most 64 and N.
      consumers: warpgroups that multiply; divides K / 256, so that each has the same K blocks of
        every tile, and a row's bytes do not depend on its tile.
    """

    rows: int
    consumers: int


def takes(M: int, K: int) -> bool:
    """Whether this kernel is there for the product, and the fast one."""
    return (
        M <= _MAX_TOKENS and M * K <= _MAX_VALUES and K % _SLOT == 0 and K >= TILE_GROUPS * K_BLOCK
    )


def default_config(N: int, K: int, sms: int) -> Config:
    """The largest tiles where they give work to about half of the `sms` multiprocessors or more.

    So many read as fast as all. Where there are several tiles for each, or few in all, those that
    leave the busiest multiprocessor the fewest rows.
    """

    def busiest(rows: int) -> int:
        return cdiv(cdiv(N, rows), sms) * (rows + _TILE_ROWS)

    consumers = next(c for c in _CONSUMERS if K // _SLOT % c == 0)
    if _FEW_BLOCKS * sms <= cdiv(N, _WGMMA_ROWS) <= sms:
        return Config(_WGMMA_ROWS, consumers)
    return Config(min(range(min(_WGMMA_ROWS, N), 0, -8), key=busiest), consumers)


def gemv(
    x: Float[Array, "M A"],
    sx: Float32[Array, " groups"] | None,
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    prologue: Prologue | None = None,
    bias: Float[Array, "Lb N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"]:
    """The product of one layer of a stack, x quantized on the way.

    Args:
      x: bfloat16 or float32, `takes(M, K)`; or float8_e4m3fn, quantized already.
      sx: the scales of x if it is quantized, token after token, else None.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stacks.
      prologue: RMSNorm with a weight `[Ln, K]` of x's dtype, SiluMul or None.
      bias: of `out_dtype`.
      residual: of `out_dtype`.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`.
    """
    M, (L, N, K) = x.shape[0], wq.shape
    rows, consumers = config.rows, config.consumers
    steps, pairs = K // K_BLOCK, K // _SLOT
    atoms = cdiv(steps, TILE_GROUPS)
    n_tiles = cdiv(N, rows)
    blocks = min(sms, n_tiles)
    straddles = SCALE_ROWS % rows != 0 or N % rows != 0
    extras = [e for e in (bias, residual) if e is not None]

    x_bytes = M * atoms * TILE_GROUPS * (K_BLOCK + 4)
    row_bytes = M * _WGMMA_ROWS * 4
    free = SMEM_BYTES - x_bytes - row_bytes * (2 * consumers + 1 + len(extras)) - 4096
    overhang = _WGMMA_ROWS - rows  # of the last slot's operand
    stages = (free // _SLOT - overhang) // rows
    stages = min(_MAX_STAGES, stages, pairs) // consumers * consumers

    operands = groups_of(x, prologue) if sx is None else [x.reshape(-1, K_BLOCK), sx]

    def kernel(*refs):
        x_refs, refs = refs[: len(operands)], refs[len(operands) :]
        w_gmem, sw_gmem, layer_gmem, *extra_gmem = refs[: 3 + len(extras)]
        y_gmem, x_smem, sx_smem, w_smem, sums_smem, y_smem, extra_smem, *barriers = refs[
            3 + len(extras) :
        ]
        full, empty, together, landed = barriers
        warpgroup = lax.axis_index("warpgroup")

        def first_row(tile):
            # The last tile overlaps the one before rather than the end, and computes the same.
            return jnp.minimum(tile * rows, N - rows)

        def weights(l, tile, pair):
            return w_gmem.at[l, pl.ds(first_row(tile), rows), pl.ds(pair * _SLOT, _SLOT)]

        def wait_for_all():
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        def atom_at(m, a):
            return pl.ds((m * atoms + a) * TILE_GROUPS, TILE_GROUPS)

        def fill_x(l):
            """x to SMEM, in atoms of 8 K blocks of a token; the last may overlap the one before."""
            shares = cdiv(atoms, consumers)
            for m in range(M):
                if sx is None:
                    scratch = sums_smem.at[0, warpgroup, m, pl.ds(0, TILE_GROUPS)]
                    read = apply_prologue(prologue, x_refs, scratch, m, l, steps)
                else:
                    read = None
                # Of the last share, some have none, and do the last atom again.
                mine = [jnp.minimum(i * consumers + warpgroup, atoms - 1) for i in range(shares)]
                results = [
                    quantize_groups(read(atom_start(a))) if read else read_quantized(m, a)
                    for a in mine
                ]
                for a, (qvalue, scale) in zip(mine, results, strict=True):
                    x_smem[atom_at(m, a), :] = qvalue.astype(FP8)
                    sx_smem[atom_at(m, a)] = scale

        def read_quantized(m, a):
            at = pl.ds(m * steps + atom_start(a), TILE_GROUPS)
            q_gmem, s_gmem = x_refs
            qvalue = plgpu.load(q_gmem.at[at, :], layout=GROUPS, optimized=False)
            return qvalue, plgpu.load(s_gmem.at[at], layout=GROUPS.reduce(1), optimized=False)

        def atom_start(a):
            return jnp.minimum(a * TILE_GROUPS, steps - TILE_GROUPS)

        def load_scales(l, tile, pair):
            """The weight's, of a slot."""
            n0, pair = first_row(tile), jnp.minimum(pair, pairs - 1)
            scale_rows = [n0, n0 + rows - 1] if straddles else [n0]
            return [
                [sw_gmem[l, lax.div(r, SCALE_ROWS), pair * _SLOT_BLOCKS + b] for r in scale_rows]
                for b in range(_SLOT_BLOCKS)
            ]

        def do_tile(l, tile, carry):
            n, w_scales = carry
            n0 = first_row(tile)
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

            totals = main_loop(l, tile, n, w_scales)
            next_tile = jnp.minimum(tile + blocks, n_tiles - 1)
            w_scales = load_scales(l, next_tile, warpgroup)
            for m, total in enumerate(totals):
                # A token's sums over K blocks stand side by side.
                sums[warpgroup, m] = jnp.sum(total, axis=1)
            wait_for_all()

            @pl.when(warpgroup == 0)
            def _finish():
                epilogue(sums, n0)

            return n + 1, w_scales

        def main_loop(l, tile, n, w_scales):
            """This consumer's share of a tile: `[64, 8]` a token, K block i in column i % 8."""
            n0 = first_row(tile)
            in_top: Any = None
            if straddles:
                row = plgpu.broadcasted_iota(
                    jnp.int32, (_WGMMA_ROWS, 8), 0, layout=plgpu.Layout.WGMMA
                )
                in_top = n0 + row < (lax.div(n0, SCALE_ROWS) + 1) * SCALE_ROWS
            column = plgpu.broadcasted_iota(
                jnp.int32, (_WGMMA_ROWS, 8), 1, layout=plgpu.Layout.WGMMA
            )

            def add_slot(i, carry):
                w_scales, totals = carry
                pair = warpgroup + i * consumers
                slot = lax.rem(n * pairs + pair, stages)
                next_scales = load_scales(l, tile, pair + consumers)
                kb = pair * _SLOT_BLOCKS
                a = lax.div(kb, TILE_GROUPS)
                plgpu.barrier_wait(full.at[slot])

                def multiply(*accumulators):
                    for m in range(M):
                        operand = x_smem.at[atom_at(m, a)]
                        for b in range(_SLOT_BLOCKS):
                            plgpu.wgmma(
                                accumulators[m * _SLOT_BLOCKS + b],
                                w_smem.at[
                                    pl.ds(slot * rows, _WGMMA_ROWS), pl.ds(b * K_BLOCK, K_BLOCK)
                                ],
                                operand.T,
                            )
                    return [accumulator[...] for accumulator in accumulators]

                kind = plgpu.ACC((_WGMMA_ROWS, 8), jnp.float32)
                blocks = pl.run_scoped(multiply, *[kind] * (M * _SLOT_BLOCKS))
                plgpu.barrier_arrive(empty.at[slot])
                results = []
                for m, total in enumerate(totals):
                    x_scale = plgpu.load(
                        sx_smem.at[atom_at(m, a)],
                        layout=plgpu.Layout.WGMMA.reduce(0),
                    )
                    x_scale = lax.broadcast_in_dim(x_scale, total.shape, [1])
                    for b in range(_SLOT_BLOCKS):
                        scale = x_scale * w_scales[b][0]
                        if straddles:
                            scale = jnp.where(in_top, scale, x_scale * w_scales[b][1])
                        # The other columns are other blocks of x by this block of the weight.
                        own = column == kb + b - atom_start(a)
                        total += jnp.where(own, blocks[m * _SLOT_BLOCKS + b] * scale, 0.0)
                    results.append(total)
                return next_scales, results

            totals = [zero_accumulator(_WGMMA_ROWS, 8) for _ in range(M)]
            return lax.fori_loop(0, pairs // consumers, add_slot, (w_scales, totals))[1]

        def epilogue(sums, n0):
            """Adds what the consumers have, the bias and the residual; stores the tile."""

            def row_of(ref, *index):
                return plgpu.load(
                    ref.at[(*index, pl.ds(0, _WGMMA_ROWS))], layout=plgpu.Layout.WGMMA.reduce(1)
                )

            if extras:
                plgpu.barrier_wait(landed)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for m in range(M):
                y = row_of(sums, 0, m)
                for c in range(1, consumers):
                    y += row_of(sums, c, m)
                y = y.astype(out_dtype)
                for e, source in enumerate(extras):
                    extra = row_of(extra_smem, e, m if source is residual else 0)
                    y = (y.astype(jnp.float32) + extra.astype(jnp.float32)).astype(out_dtype)
                y_smem[m] = y
            plgpu.commit_smem()
            for m in range(M):
                plgpu.copy_smem_to_gmem(y_smem.at[m, pl.ds(0, rows)], y_gmem.at[m, pl.ds(n0, rows)])

        @pl.when(warpgroup == consumers)
        def _producer():
            l = in_stack(layer_gmem[0], L)

            def copy(tile, pair, slot):
                target = w_smem.at[pl.ds(slot * rows, rows)]
                plgpu.copy_gmem_to_smem(weights(l, tile, pair), target, full.at[slot])

            fill_ring(n_tiles, pairs, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            l = in_stack(layer_gmem[0], L)
            # Ahead of what takes time.
            w_scales = load_scales(l, lax.axis_index("sm"), warpgroup)
            fill_x(l)
            plgpu.commit_smem()
            wait_for_all()
            for_each_tile(
                n_tiles, (jnp.int32(0), w_scales), lambda tile, carry: do_tile(l, tile, carry)
            )
            plgpu.wait_smem_to_gmem(0)

    copies = sum(M if e is residual else 1 for e in extras)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), out_dtype),
        scratch_types=[
            plgpu.SMEM((M * atoms * TILE_GROUPS, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((M * atoms * TILE_GROUPS,), jnp.float32),
            plgpu.SMEM((stages * rows + overhang, _SLOT), FP8, transforms=swizzled(K, FP8)),
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
    )(*operands, wq, sw, layer, *extras)
