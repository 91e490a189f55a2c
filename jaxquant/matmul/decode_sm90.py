"""Decode on Hopper: a few tokens by a blocked FP8 weight, bound by reading the weight.

The operands change places: wgmma's 64-row side runs over the weight's rows and its other side
over the tokens, so that no row of the tensor cores idles. K is split among thread blocks where
the weight has too few rows to keep them all reading.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.matmul import tuning
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

_TOKENS = (8, 16, 32, 64, 96, 128)
_MAX_STAGES = 12


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_n: rows of the weight in a tile: 64 (one consumer) or 128 (two).
      splits: parts that K is cut into; divides ceil(K / 128).
    """

    tile_n: int
    splits: int


def takes(M: int, N: int, sms: int) -> bool:
    """Whether the product is bound by reading the weight, so that this kernel is the fast one."""
    return M <= 64 or (M <= _TOKENS[-1] and 4 * cdiv(N, 128) <= sms)


def padded_tokens(M: int) -> int:
    """Tokens that the kernel computes for M: a width that wgmma has."""
    return next(width for width in _TOKENS if M <= width)


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tuned cut, or as many splits as leave each multiprocessor (`sms`) at most one tile."""
    tuned = tuning.lookup("decode", M, N, K)
    if tuned is not None:
        return Config(**tuned)
    steps = cdiv(K, K_BLOCK)
    tile_n = 64 if M <= 64 and cdiv(N, 64) <= sms else 128
    fitting = (s for s in (8, 4, 2) if cdiv(N, tile_n) * s <= sms and _can_split(steps, s))
    return Config(tile_n, next(fitting, 1))


def cuts(M: int, N: int, K: int) -> list[Config]:
    """What may be the fastest: whatever the kernel takes, for a product of a few tokens."""
    steps = cdiv(K, K_BLOCK)
    splits = [s for s in (1, 2, 4, 8) if s == 1 or _can_split(steps, s)]
    return [Config(tile_n, splits=s) for tile_n in (64, 128) for s in splits]


def _can_split(steps: int, splits: int) -> bool:
    # A short part has no time to fill the ring.
    return steps % splits == 0 and steps // splits >= 4


def decode(
    xq: Float[Array, "T K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    *,
    M: int,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"]:
    """`y[m, n] = sum_kb (xq[m, kb] . wq[layer, n, kb]) * sx[kb, m] * sw[layer, n // 128, kb]`.

    Args:
      xq: float8_e4m3fn, `padded_tokens(M)` rows; K a multiple of 32.
      sx: the scales of xq, transposed; S a multiple of 64.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      M: tokens, at most 128.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`.
    """
    (tokens, K), N = xq.shape, wq.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    splits, tile_n = config.splits, config.tile_n
    steps = cdiv(K, K_BLOCK) // splits
    consumers = tile_n // 64
    n_tiles = cdiv(N, tile_n)
    slot_bytes = (tile_n + tokens) * K_BLOCK + sx.shape[1] * 4
    stages = ring_stages(slot_bytes, tile_n * tokens * 4, steps, _MAX_STAGES)
    # The store that transposes, and so makes y itself, is there for whole tiles of 16-bit values,
    # and would ignore the column of a second tile where y has one only.
    direct = splits == 1 and out_dtype.itemsize == 2 and N % 64 == 0 and N >= tile_n

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, layer_gmem, y_gmem, *scratch):
        x_smem, w_smem, sx_smem, y_smem, full, empty = scratch
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], wq.shape[0])

        def origin(tile):
            """The first row of the weight and the first K block of a tile."""
            # Neighbours read different parts of K of the same rows.
            return lax.div(tile, splits) * tile_n, lax.rem(tile, splits) * steps

        @pl.when(warpgroup == consumers)
        def _producer():
            if consumers > 1:  # alone, a consumer has registers enough
                producer_registers()

            def copy(tile, step, slot):
                n0, kb0 = origin(tile)
                kb = kb0 + step
                block = pl.ds(kb * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[l, pl.ds(n0, tile_n), block], w_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(x_gmem.at[:, block], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(sx_gmem.at[kb], sx_smem.at[slot], full.at[slot])

            fill_ring(n_tiles * splits, steps, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            if consumers > 1:
                consumer_registers(consumers)
            n_offset = warpgroup * 64

            def main_loop(scale_row, kb0, slot):
                """Adds up this part of K. The weight's scale is loaded one step ahead."""

                def add_block(step, carry):
                    slot, w_scale, total = carry
                    w_scale_next = sw_gmem[l, scale_row, kb0 + jnp.minimum(step + 1, steps - 1)]
                    plgpu.barrier_wait(full.at[slot])
                    x_scale = plgpu.load(
                        sx_smem.at[slot, pl.ds(0, tokens)], layout=plgpu.Layout.WGMMA.reduce(0)
                    )
                    block = multiply(w_smem.at[slot, pl.ds(n_offset, 64)], x_smem.at[slot])
                    plgpu.barrier_arrive(empty.at[slot])
                    scale = lax.broadcast_in_dim(x_scale * w_scale, block.shape, [1])
                    return next_slot(slot, stages), w_scale_next, total + block * scale

                init = (slot, sw_gmem[l, scale_row, kb0], zero_accumulator(64, tokens))
                slot, _, total = lax.fori_loop(0, steps, add_block, init)
                return slot, total

            def epilogue(total, n0, part):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                rows = pl.ds(n0 + n_offset, 64)
                if direct:
                    y = plgpu.layout_cast(total.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    y_smem.at[warpgroup].T[...] = y
                    # Not `:`, since y may have fewer rows. Pallas would refuse a static slice.
                    target = y_gmem.at[pl.ds(lax.mul(part, 0), tokens), rows]
                else:
                    y_smem[warpgroup] = total
                    target = y_gmem.at[part, rows, :]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], target)

            def do_tile(tile, slot):
                n0, kb0 = origin(tile)
                slot, total = main_loop(lax.div(n0, SCALE_ROWS), kb0, slot)
                epilogue(total, n0, lax.rem(tile, splits))
                return slot

            for_each_tile(n_tiles * splits, jnp.int32(0), do_tile)
            plgpu.wait_smem_to_gmem(0)

    if direct:
        # TMA stores whole tiles of 8 rows, or fewer than 8.
        y_rows = M if M < 8 else round_up(M, 8)
        out_type = jax.ShapeDtypeStruct((y_rows, N), out_dtype)
        y_smem = plgpu.SMEM((consumers, tokens, 64), out_dtype, transforms=swizzled(N, out_dtype))
    else:
        # Whole tiles, since these copies are linear: they do not stop where a part ends.
        parts = (splits, round_up(N, tile_n), tokens)
        out_type = jax.ShapeDtypeStruct(parts, jnp.float32)
        y_smem = plgpu.SMEM((consumers, 64, tokens), jnp.float32)
    y = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((stages, tokens, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_n, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, sx.shape[1]), jnp.float32),
            y_smem,
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ],
        grid=(min(sms, n_tiles * splits),),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_decode_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(xq, sx, wq, sw, layer)
    if not direct:
        y = y[:, :N].sum(0).T.astype(out_dtype)
    return y[:M]
