"""Prefill on Hopper: many tokens by a blocked FP8 weight, bound by the tensor cores."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    cdiv,
    consumer_registers,
    fill_ring,
    for_each_tile,
    in_stack,
    multiply,
    next_slot,
    producer_registers,
    ring_stages,
    round_up,
    swizzled,
    zero_accumulator,
)

# All of a tile's columns share one scale of the weight.
TILE_N = 128
# Tiles are visited in strips this many tiles wide, to meet operands again while L2 has them.
_STRIP = 8
# Columns of one store. The result has a multiple of them, and more than one: along a dimension of
# a single tile Mosaic leaves out the index, so that a store past its end would land inside.
_STORE_N = 64
_MAX_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_m: tokens of a tile: 64 (two consumers of 64x64), 128 or 192 (one for each 64).
      cluster: whether two neighbours along M share the copies of the weight (multicast).
    """

    tile_m: int
    cluster: bool

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return max(2, self.tile_m // 64)


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tile with the least predicted time; `sms` is the number of multiprocessors."""

    def microseconds(tile_m: int) -> float:
        waves = cdiv(cdiv(M, tile_m) * cdiv(N, TILE_N), sms)
        per_block, per_tile = _MICROSECONDS[tile_m]
        return waves * (cdiv(K, K_BLOCK) * per_block + per_tile)

    tile_m = min(_MICROSECONDS, key=microseconds)
    return Config(tile_m, cluster=tile_m == 192 and M >= 2048)


# By tile_m: of one K block, and of one tile besides, with all multiprocessors of an H200 busy.
_MICROSECONDS = {64: (0.31, 1.5), 128: (0.436, 0.4), 192: (0.565, 1.4)}


def gemm(
    xq: Float[Array, "M K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    *,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"]:
    """`y[m, n] = sum_kb (xq[m, kb] . wq[layer, n, kb]) * sx[kb, m] * sw[layer, n // 128, kb]`.

    Args:
      xq: float8_e4m3fn; K a multiple of 32, M of 8.
      sx: the scales of xq, transposed; S is M rounded up to a multiple of 64.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`.
    """
    (M, K), N = xq.shape, wq.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    N_out = max(round_up(N, _STORE_N), 2 * _STORE_N)
    steps = cdiv(K, K_BLOCK)
    tile_m, consumers = config.tile_m, config.consumers
    # What one consumer makes of a tile.
    rows, cols = 64, TILE_N if tile_m > 64 else TILE_N // consumers
    slot_bytes = (tile_m + TILE_N) * K_BLOCK + tile_m * 4
    result_bytes = consumers * rows * _STORE_N * out_dtype.itemsize
    stages = ring_stages(slot_bytes, result_bytes, steps, _MAX_STAGES)
    neighbours = 2 if config.cluster else 1
    m_tiles, n_tiles = cdiv(M, tile_m * neighbours), cdiv(N, TILE_N)

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, layer_gmem, y_gmem, *scratch):
        x_smem, w_smem, sx_smem, y_smem, full, empty = scratch
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], wq.shape[0])

        def origin(tile):
            """The first row and column of a tile."""
            mi, ni = plgpu.planar_snake(tile, (m_tiles, n_tiles), 0, _STRIP)
            if config.cluster:
                mi = mi * neighbours + lax.axis_index("cluster")
            return mi * tile_m, ni * TILE_N

        @pl.when(warpgroup == consumers)
        def _producer():
            producer_registers()

            def copy(tile, step, slot):
                m0, n0 = origin(tile)
                tokens, block = pl.ds(m0, tile_m), pl.ds(step * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(x_gmem.at[tokens, block], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(sx_gmem.at[step, tokens], sx_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[l, pl.ds(n0, TILE_N), block],
                    w_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if config.cluster else None,
                )

            fill_ring(m_tiles * n_tiles, steps, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            consumer_registers(consumers)
            m_offset = warpgroup * rows if tile_m > 64 else 0
            n_offset = warpgroup * cols if tile_m == 64 else 0

            def main_loop(scale_row, slot):
                """Adds up all of K. The weight's scale is loaded one step ahead."""

                def add_block(step, carry):
                    slot, w_scale, total = carry
                    w_scale_next = sw_gmem[l, scale_row, jnp.minimum(step + 1, steps - 1)]
                    plgpu.barrier_wait(full.at[slot])
                    x_scale = plgpu.load(
                        sx_smem.at[slot, pl.ds(m_offset, rows)],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                    )
                    w = (
                        w_smem.at[slot]
                        if cols == TILE_N
                        else w_smem.at[slot, pl.ds(n_offset, cols)]
                    )
                    block = multiply(x_smem.at[slot, pl.ds(m_offset, rows)], w)
                    plgpu.barrier_arrive(empty.at[slot])
                    scale = lax.broadcast_in_dim(x_scale * w_scale, block.shape, [0])
                    return next_slot(slot, stages), w_scale_next, total + block * scale

                init = (slot, sw_gmem[l, scale_row, 0], zero_accumulator(rows, cols))
                slot, _, total = lax.fori_loop(0, steps, add_block, init)
                return slot, total

            def epilogue(total, m0, n0):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                y = total.astype(out_dtype)
                for n in range(0, cols, _STORE_N):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem[warpgroup] = y[:, n : n + _STORE_N]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[warpgroup],
                        y_gmem.at[pl.ds(m0, rows), pl.ds(n0 + n, _STORE_N)],
                    )

            def do_tile(tile, slot):
                m0, n0 = origin(tile)
                slot, total = main_loop(lax.div(n0, SCALE_ROWS), slot)
                epilogue(total, m0 + m_offset, n0 + n_offset)
                return slot

            for_each_tile(m_tiles * n_tiles, jnp.int32(0), do_tile)
            plgpu.wait_smem_to_gmem(0)

    if config.cluster:
        cluster = {"cluster": (neighbours,), "cluster_names": ("cluster",)}
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=consumers, num_barriers=stages
        )
    else:
        cluster = {}
        empty = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N_out), out_dtype),
        scratch_types=[
            plgpu.SMEM((stages, tile_m, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, TILE_N, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_m), jnp.float32),
            plgpu.SMEM(
                (consumers, rows, _STORE_N), out_dtype, transforms=swizzled(N_out, out_dtype)
            ),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            empty,
        ],
        grid=(sms // neighbours,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_gemm_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **cluster,
    )(xq, sx, wq, sw, layer)
    return y[:, :N]
