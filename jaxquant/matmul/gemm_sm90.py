"""Prefill on Hopper: many tokens by a blocked FP8 weight, bound by the tensor cores.

The tensor cores multiply a tile K block by K block, and each block's sum is promoted: scaled and
added up in float32 registers. While one warpgroup promotes, the other's products are to keep the
tensor cores at work, so that whatever else there is to wait for is waited for behind products.

A product that is gated has one more warpgroup; see `finisher_sm90`.
"""

import dataclasses
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.blocked import ACTIVATION_GROUP
from jaxquant.errors import JaxquantError
from jaxquant.hopper import interpreted
from jaxquant.matmul import gemm_wgmma_sm90 as tensor_cores, tuning
from jaxquant.matmul.finisher_sm90 import Finisher
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    PRODUCER_REGISTERS,
    SCALE_ROWS,
    SMEM_BYTES,
    cdiv,
    consumer_registers,
    fill_ring,
    for_each_tile,
    in_stack,
    next_slot,
    ring_stages,
    round_up,
    spare_registers,
    swizzled,
    zero_accumulator,
)

# Tiles are visited in strips this many tiles wide, to meet operands again while L2 has them.
_STRIP = 8
# The result has a multiple of so many columns, and more than one: along a dimension of a single
# SMEM tile Mosaic leaves out the index, so that a store past its end would land inside.
_RESULT_COLUMNS = 64
_MAX_STAGES = 8
# A ring has to be this deep before results take more room than one wave of them needs.
_MIN_STAGES = 3
# The columns that tiles may have, by rows: what a thread's registers hold.
TILES = {64: (128,), 128: (64, 96, 112, 128, 144, 160, 192, 256), 192: (128,), 256: (96, 112, 128)}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_m: tokens of a tile, and so who works on it: at 64 two consumers, half of the columns
        each; at 128 two and at 192 three, 64 rows each; at 256 two, 64 rows twice (two waves). At
        128x256 the waves are the halves of the columns.
      cluster: whether two neighbours share the copies of what their tiles have in common
        (multicast): the weight along M, or the tokens along N where a tile has more rows.
      tile_n: columns of a tile, see `TILES`. They may lie in two rows of the weight's scales.

    Raises:
      JaxquantError: a tile that is none of `TILES`.
    """

    tile_m: int
    cluster: bool
    tile_n: int = 128

    def __post_init__(self):
        if self.tile_n not in TILES.get(self.tile_m, ()):
            allowed = ", ".join(f"{m}x{n}" for m, columns in TILES.items() for n in columns)
            raise JaxquantError(f"tile {self.tile_m}x{self.tile_n}; allowed: {allowed}")

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return 3 if self.tile_m == 192 else 2

    @property
    def waves(self) -> int:
        """How many times 64 rows a consumer makes of a tile."""
        return 2 if max(self.tile_m, self.tile_n) == 256 else 1

    @property
    def cols(self) -> int:
        """Columns that a consumer makes of a tile at once."""
        return self.tile_n // 2 if self.tile_m == 64 or self.tile_n == 256 else self.tile_n

    @property
    def cluster_shape(self) -> tuple[int, int]:
        """Thread blocks of a cluster along M and N."""
        if not self.cluster:
            return 1, 1
        return (1, 2) if self.tile_m > self.tile_n else (2, 1)


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tuned tile, or that with the least predicted time; `sms`: multiprocessors of the GPU."""
    tuned = tuning.lookup("gemm", M, N, K)
    if tuned is not None:
        return Config(**tuned)
    return min(PREDICTED, key=lambda config: microseconds(config, M, N, K, sms))


def microseconds(config: Config, M: int, N: int, K: int, sms: int) -> float:
    """The predicted time: waves of tiles, times what a tile takes (see `PREDICTED`)."""
    along_m, along_n = config.cluster_shape
    clusters = cdiv(M, config.tile_m * along_m) * cdiv(N, config.tile_n * along_n)
    waves = cdiv(clusters, sms // (along_m * along_n))
    per_block, per_tile = (PREDICTED | _PREDICTED_GATED)[config]
    return waves * (cdiv(K, K_BLOCK) * per_block + per_tile)


def can_gate(N: int, out_dtype: Any) -> bool:
    """Whether `gemm` can gate a product: the result is in whole groups, and SMEM has the room."""
    return N % (2 * ACTIVATION_GROUP) == 0 and _holds_tile(GATED, jnp.dtype(out_dtype))


def gates(M: int, N: int, K: int, out_dtype: Any, sms: int) -> bool:
    """Whether to have `gemm` gate a product: it can, and is to be faster than two kernels are."""
    apart = min(microseconds(config, M, N, K, sms) for config in PREDICTED)
    faster = microseconds(GATED, M, N, K, sms) < apart + M * N * _GATE_APART
    return can_gate(N, out_dtype) and M >= _LEAST_GATED and faster


# Microseconds of a K block, and of a tile besides, with all multiprocessors of an H200 at work.
PREDICTED = {
    Config(256, True, 128): (0.745, 1.60),
    Config(128, True, 192): (0.551, 0.97),
    Config(128, False, 192): (0.565, 0.90),
    Config(128, False, 128): (0.375, 0.60),
    Config(128, True, 112): (0.379, 0.60),
    Config(128, False, 96): (0.300, 0.60),
    Config(128, False, 64): (0.255, 0.50),
    Config(64, False, 128): (0.290, 0.80),
}
# The tile of a product that is gated: half of its columns are gate, the others up.
GATED = Config(128, True, 256)
_PREDICTED_GATED = {GATED: (0.745, 3.0)}
# What another kernel takes to gate a value of the product and quantize it.
_GATE_APART = 146 / (8192 * 28672)
# Fewer tokens have too few tiles for a prediction by waves.
_LEAST_GATED = 512
# Registers of its producer and its finisher. Its consumers need no less than these leave: the
# compiler would put scales where products have to wait for them.
_GATED_REGISTERS = (24, 40)


# 8192x4096x4096: 211 and 220 us; the product alone takes 206, and XLA's sum behind it 39 more.
# 128x128, 4096x4096x4096: 104 us, with XLA's sum 123; 512x4096x4096: 15.7 and 18.7.
_MEASURED_WITH_RESIDUAL = (Config(128, True, 192), Config(256, True, 128), Config(128, False, 128))


def can_add_residual(M: int, N: int, out_dtype: Any, config: Config) -> bool:
    """Whether `gemm` can add a residual: one that TMA reads as it writes the result."""
    aligned = M % 8 == 0 and N % _RESULT_COLUMNS == 0 and N >= 2 * _RESULT_COLUMNS
    return aligned and _holds_tile(config, jnp.dtype(out_dtype))


def adds_residual(M: int, N: int, out_dtype: Any, config: Config) -> bool:
    """Whether to have `gemm` add a residual: it can, and was seen to be the faster on an H200."""
    return config in _MEASURED_WITH_RESIDUAL and can_add_residual(M, N, out_dtype, config)


def _holds_tile(config: Config, out_dtype: Any) -> bool:
    """Whether SMEM has room for a whole tile of results beside a ring."""
    results = config.waves * _result_bytes(config, out_dtype)
    return results + _MIN_STAGES * _slot_bytes(config) <= SMEM_BYTES


def _slot_bytes(config: Config) -> int:
    return (config.tile_m + config.tile_n) * K_BLOCK + config.tile_m * 4


def _result_bytes(config: Config, out_dtype: Any) -> int:
    return config.consumers * 64 * config.cols * out_dtype.itemsize


def _fence() -> None:
    """None on a GPU: loads are through long before their thread lets the copy go."""
    if interpreted():
        plgpu.commit_smem()


@overload
def gemm(
    xq: Array, sx: Array, wq: Array, sw: Array, layer: Array, residual: Array | None = None, *,
    gated: Literal[False] = False, out_dtype: Any, config: Config, sms: int,
) -> Array: ...  # fmt: skip


@overload
def gemm(
    xq: Array, sx: Array, wq: Array, sw: Array, layer: Array, *,
    gated: Literal[True], out_dtype: Any, config: Config, sms: int,
) -> tuple[Array, Array]: ...  # fmt: skip


def gemm(
    xq: Float[Array, "M K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    residual: Float[Array, "M N"] | None = None,
    *,
    gated: bool = False,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"] | tuple[Float[Array, "M N//2"], Float32[Array, "N//256 S"]]:
    """`y[m, n] = sum_kb (xq[m, kb] . wq[layer, n, kb]) * sx[kb, m] * sw[layer, n // 128, kb]`.

    With a residual `y + residual`, y rounded first: `jaxquant.matmul.xla.finish`. Gated, what
    `jaxquant.matmul.act_quant_sm90.quantize` makes of y behind SiluMul, to the byte.

    Args:
      xq: float8_e4m3fn; K a multiple of 32, M of 8.
      sx: the scales of xq, transposed; S is M rounded up to a multiple of 64.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      residual: of out_dtype, see `can_add_residual`; not if gated.
      gated: whether the result is gated and quantized, see `can_gate`; the weight's rows are the
        gate's, then those of up.
      out_dtype: bfloat16 or float32.
      config: see `default_config`, or `GATED` if it is.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`, or if gated float8_e4m3fn `[M, N // 2]` and float32 scales,
      transposed, with as many columns as sx.
    """
    (M, K), N = xq.shape, wq.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    N_out = max(round_up(N, _RESULT_COLUMNS), 2 * _RESULT_COLUMNS)
    steps, scale_rows = cdiv(K, K_BLOCK), cdiv(N, SCALE_ROWS)
    tile_m, tile_n, consumers = config.tile_m, config.tile_n, config.consumers
    along_m, along_n = config.cluster_shape
    # Where a tile's rows of the weight begin, from its first column on: the gate's, and up's.
    parts = (0, N // 2) if gated else (0,)
    part_rows = tile_n // len(parts)
    m_tiles, n_tiles = cdiv(M, tile_m * along_m), cdiv(N // len(parts), part_rows * along_n)
    tiles, blocks = m_tiles * n_tiles, sms // (along_m * along_n)
    # Of the producer, and of the finisher, which only a product has that is gated.
    registers = _GATED_REGISTERS if gated else (PRODUCER_REGISTERS,)
    # What one consumer makes of a tile: 64 rows at a time, in segments that share a scale.
    waves, cols = config.waves, config.cols
    segment = math.gcd(tile_n, SCALE_ROWS) if SCALE_ROWS % tile_n else cols
    segments = cols // segment
    by_columns = tile_n == 256
    # With registers for the sums of two K blocks, one is promoted in the shadow of the other. It
    # takes a ring of three slots, which all tiles so small have, or of as many as there are blocks.
    in_pairs = waves == 1 and consumers == 2 and cols <= 128

    # With room for all of a tile its stores go on under the next tile's products, and the copy
    # of its residual under its own.
    results = waves if _holds_tile(config, out_dtype) else 1
    slot_bytes, result_bytes = _slot_bytes(config), _result_bytes(config, out_dtype)
    stages = ring_stages(slot_bytes, results * result_bytes, steps, _MAX_STAGES)

    residuals = [] if residual is None else [residual]

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, layer_gmem, *refs):
        residual_gmem, refs = refs[: len(residuals)], refs[len(residuals) :]
        y_gmem, refs = refs[: len(y_types)], refs[len(y_types) :]
        x_smem, w_smem, sx_smem, y_smem, full, empty, landed, *handing = refs
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], wq.shape[0])

        def origin(tile):
            """The first row and column of a tile."""
            mi, ni = plgpu.planar_snake(tile, (m_tiles, n_tiles), 0, _STRIP)
            if along_m > 1:
                mi = mi * along_m + lax.axis_index("cluster")
            if along_n > 1:
                ni = ni * along_n + lax.axis_index("cluster")
            return mi * tile_m, ni * part_rows

        finisher = None
        if gated:
            (q_gmem, s_gmem), (made, taken) = y_gmem, handing
            finisher = Finisher(y_smem, q_gmem, s_gmem, made, taken, tiles, blocks)

        @pl.when(warpgroup == consumers)
        def _producer():
            spare_registers(registers[0])
            shared_x = "cluster" if along_n > 1 else None
            shared_w = "cluster" if along_m > 1 else None

            def copy(tile, step, slot):
                m0, n0 = origin(tile)
                tokens, block = pl.ds(m0, tile_m), pl.ds(step * K_BLOCK, K_BLOCK)
                weights = [
                    (
                        w_gmem.at[l, pl.ds(n0 + part, part_rows), block],
                        w_smem.at[slot, pl.ds(i * part_rows, part_rows)],
                        shared_w,
                    )
                    for i, part in enumerate(parts)
                ]
                for source, target, shared in (
                    (x_gmem.at[tokens, block], x_smem.at[slot], shared_x),
                    *weights,
                    (sx_gmem.at[step, tokens], sx_smem.at[slot], shared_x),
                ):
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=shared)

            # By one warp: four would take issue slots from the promotions.
            @plgpu.warp_map
            def _fill(warp):
                @pl.when(warp == 0)
                def _():
                    fill_ring(tiles, steps, stages, empty, copy, _fence)

        @pl.when(warpgroup < consumers)
        def _consumer():
            consumer_registers(consumers, registers)

            def rows_of(wave):
                """Where the 64 rows of a wave begin in the tile."""
                if tile_m == 64:
                    return 0
                return (warpgroup if by_columns else wave * consumers + warpgroup) * 64

            def columns_of(wave):
                """Likewise its columns."""
                if tile_m == 64:
                    return warpgroup * cols
                return wave * cols if by_columns else 0

            def load_scales(n0, step):
                """The weight's scales in the one or two of its rows that a tile meets."""

                def load(row):
                    row = jnp.minimum(row, scale_rows - 1)
                    return sw_gmem[l, row, jnp.minimum(step, steps - 1)]

                row = lax.div(n0, SCALE_ROWS)
                if segments == 1 and not by_columns:
                    return (load(row),)
                return load(row), load(row + (parts[-1] // SCALE_ROWS if gated else 1))

            def copy_residual(m0, n0):
                """Puts a tile's residual where its results will be, once those before left."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for wave in range(waves):
                    rows = pl.ds(m0 + rows_of(wave), 64)
                    plgpu.copy_gmem_to_smem(
                        residual_gmem[0].at[rows, pl.ds(n0 + columns_of(wave), cols)],
                        y_smem.at[warpgroup, wave],
                        landed.at[warpgroup],
                    )

            def main_loop(m0, n0, slot, scales):
                """Adds up all of K: `[wave][segment]` of results."""
                # Where the second row of scales begins.
                meeting = SCALE_ROWS - lax.rem(n0, SCALE_ROWS)

                def start(slot, wave, block):
                    """Starts a product, and loads its tokens' scales meanwhile."""
                    rows, columns = pl.ds(rows_of(wave), 64), pl.ds(columns_of(wave), cols)
                    block = tensor_cores.start(x_smem, w_smem, slot, rows, columns, block, K)
                    layout = plgpu.Layout.WGMMA.reduce(1)
                    return block, plgpu.load(sx_smem.at[slot, rows], layout=layout)

                def promote(totals, block, x_scale, scales):
                    """`totals + block * scale`, by segment."""
                    sums = []
                    for i, total in enumerate(totals):
                        columns = range(cols)[i * segment : (i + 1) * segment]
                        w_scale, *second = scales
                        if second:
                            w_scale = jnp.where(columns[0] < meeting, w_scale, second[0])
                        scale = lax.broadcast_in_dim(x_scale * w_scale, total.shape, [0])
                        sums.append(total + block[:, columns[0] : columns[-1] + 1] * scale)
                    return tuple(sums)

                def await_block(step, slot):
                    @pl.when(step < steps)
                    def _wait():
                        plgpu.barrier_wait(full.at[slot])

                def amid_products(step):
                    if residuals:  # half way, where the stores of the tile before are long done

                        @pl.when(step == steps // 4 * 2)
                        def _copy():
                            copy_residual(m0, n0)

                # What a step begins with was awaited and loaded by the one before, in the shadow
                # of its products.
                def add_block(step, carry):
                    slot, scales, block, totals = carry
                    scales_next, slot_next = load_scales(n0, step + 1), next_slot(slot, stages)
                    sums = []
                    for wave in range(waves):
                        block, x_scale = start(slot, wave, block)
                        # Not in a later wave: the compiler would promote all of them behind it.
                        if wave == 0:
                            amid_products(step)
                            await_block(step + 1, slot_next)
                        block = tensor_cores.wait(block, K)
                        if wave == waves - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        wave_scales = scales[wave : wave + 1] if by_columns else scales
                        sums.append(promote(totals[wave], block, x_scale, wave_scales))
                    return slot_next, scales_next, block, tuple(sums)

                def add_two_blocks(i, carry):
                    slot, scales, block, other, (totals,) = carry
                    step = 2 * i
                    other_slot = next_slot(slot, stages)
                    other_scales, scales_next = load_scales(n0, step + 1), load_scales(n0, step + 2)
                    block, x_scale = start(slot, 0, block)
                    plgpu.barrier_wait(full.at[other_slot])
                    other, other_x_scale = start(other_slot, 0, other)
                    slot_next = next_slot(other_slot, stages)
                    amid_products(step)
                    block = tensor_cores.wait(block, K, pending=1)
                    plgpu.barrier_arrive(empty.at[slot])
                    totals = promote(totals, block, x_scale, scales)
                    # It branches: without, the compiler moves half of the promotion behind the
                    # wait for the other product, and out of its shadow.
                    await_block(step + 2, slot_next)
                    other = tensor_cores.wait(other, K)
                    plgpu.barrier_arrive(empty.at[other_slot])
                    totals = promote(totals, other, other_x_scale, other_scales)
                    return slot_next, scales_next, block, other, (totals,)

                block = zero_accumulator(64, cols)
                totals = (tuple(zero_accumulator(64, segment) for _ in range(segments)),) * waves
                plgpu.barrier_wait(full.at[slot])
                if not in_pairs:
                    init = slot, scales, block, totals
                    slot, *_, totals = lax.fori_loop(0, steps, add_block, init)
                    return slot, totals
                init = slot, scales, block, block, totals
                slot, scales, block, _, totals = lax.fori_loop(0, steps // 2, add_two_blocks, init)
                if steps % 2:
                    slot, *_, totals = add_block(steps - 1, (slot, scales, block, totals))
                return slot, totals

            def epilogue(totals, m0, n0):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                if residuals:
                    plgpu.barrier_wait(landed.at[warpgroup])
                for first in range(0, waves, results):
                    if not residuals:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for i in range(results):
                        y, *others = totals[first + i]
                        if others:
                            y = lax.concatenate([y, *others], 1)
                        y = y.astype(out_dtype)
                        if residuals:
                            at = y_smem.at[warpgroup, i]
                            added = plgpu.load(at, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                            y = (y.astype(jnp.float32) + added).astype(out_dtype)
                        y_smem[warpgroup, i] = y
                    plgpu.commit_smem()
                    for i in range(results):
                        rows = pl.ds(m0 + rows_of(first + i), 64)
                        plgpu.copy_smem_to_gmem(
                            y_smem.at[warpgroup, i],
                            y_gmem[0].at[rows, pl.ds(n0 + columns_of(first + i), cols)],
                        )

            def do_tile(tile, carry):
                slot, scales = carry
                m0, n0 = origin(tile)
                slot, totals = main_loop(m0, n0, slot, scales)
                # Those of the next tile arrive while this one is stored.
                _, n0_next = origin(jnp.minimum(tile + blocks, tiles - 1))
                scales = load_scales(n0_next, 0)
                if finisher is None:
                    epilogue(totals, m0, n0)
                else:
                    finisher.hand_over(warpgroup, tile, totals, m0, n0)
                return slot, scales

            _, n0 = origin(jnp.minimum(lax.axis_index("sm"), tiles - 1))
            for_each_tile(tiles, (jnp.int32(0), load_scales(n0, 0)), do_tile)
            plgpu.wait_smem_to_gmem(0)

        if finisher is not None:

            @pl.when(warpgroup > consumers)
            def _finisher():
                spare_registers(registers[-1])
                finisher.run(origin)

    if config.cluster:
        cluster = {"cluster": (2,), "cluster_names": ("cluster",)}
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=consumers, num_barriers=stages
        )
    else:
        cluster = {}
        empty = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    if gated:
        F = N // 2
        y_types = (
            jax.ShapeDtypeStruct((M, F), FP8),
            jax.ShapeDtypeStruct((F // ACTIVATION_GROUP, sx.shape[1]), jnp.float32),
        )
    else:
        y_types = (jax.ShapeDtypeStruct((M, N_out), out_dtype),)
    y_tiling = swizzled(math.gcd(cols, N_out), out_dtype)
    y = plgpu.kernel(
        kernel,
        out_type=y_types,
        scratch_types=[
            plgpu.SMEM((stages, tile_m, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_n, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_m), jnp.float32),
            plgpu.SMEM((consumers, results, 64, cols), out_dtype, transforms=y_tiling),
            plgpu.Barrier(num_arrivals=2 + len(parts), num_barriers=stages),
            empty,
            plgpu.Barrier(num_arrivals=waves, num_barriers=consumers),
            *[plgpu.Barrier(num_barriers=consumers)] * (2 if gated else 0),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=consumers + len(registers),
        thread_name="warpgroup",
        kernel_name="jaxquant_gemm_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=gated),
        **cluster,
    )(xq, sx, wq, sw, layer, *residuals)
    return y if gated else y[0][:, :N]
