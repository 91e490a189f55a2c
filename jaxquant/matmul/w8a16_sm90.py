"""BF16 activations by a blocked FP8 weight on Hopper: few tokens or many.

A weight becomes BF16 in the registers from which the tensor cores take it, and so runs along
wgmma's 64-row side: what is computed is `w @ x^T`. Each K block's sum is scaled and added up in
float32 registers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jaxquant.blocked import expand_blocks, take_layer, widen
from jaxquant.hopper import interpreted
from jaxquant.matmul import tuning
from jaxquant.matmul.exchange_sm90 import COUNTER, expect, receive, send, wait
from jaxquant.matmul.sm90 import (
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
    swizzled,
    zero_accumulator,
)
from jaxquant.matmul.upcast_sm90 import multiply, upcast

# Tiles are visited in strips this many tiles wide, to meet operands again while L2 has them.
_STRIP = 8
_MAX_STAGES = 16
# Tokens, and multiplications, from which on the kernel loses more to XLA's product in BF16 than a
# pass over the weight takes.
_DEQUANTIZED_TOKENS, _DEQUANTIZED_WORK = 1024, 1 << 35
# Tokens of a tile, where they are few.
_TOKENS = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_m: tokens of a tile.
      tile_n: rows of the weight in a tile.
      groups: consumers that share a tile's rows.
      turns: consumers that share a tile's K blocks.
      splits: thread blocks, a cluster, that share a tile's K blocks; at most 8. The product with
        `turns` divides ceil(K / 128).
    """

    tile_m: int
    tile_n: int
    groups: int
    turns: int = 1
    splits: int = 1


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tuned cut, or that whose busiest multiprocessor (of `sms`) copies the fewest bytes.

    They come from L2, many times over for the tokens, and that is what the kernel waits for.
    """
    tuned = tuning.lookup("w8a16", M, N, K)
    if tuned is not None:
        return Config(**tuned)
    steps = cdiv(K, K_BLOCK)

    def busiest(cut: Config) -> int:
        rounds = cdiv(cdiv(M, cut.tile_m) * cdiv(N, cut.tile_n), sms // cut.splits)
        return rounds * (steps // cut.splits) * _step_bytes(cut)

    return min(cuts(M, N, K), key=busiest)


def cuts(M: int, N: int, K: int) -> list[Config]:
    """What may be the fastest for a product."""
    steps = cdiv(K, K_BLOCK)
    tokens = next((width for width in _TOKENS if M <= width), _TOKENS[-1])
    # More consumers hide more latency, and have the registers for few tokens.
    found = [Config(128, 128, groups=2), Config(tokens, 256, groups=4 if tokens <= 16 else 2)]
    # Of the clusters, those of two always fit the multiprocessors.
    for splits in (1, 2):
        if steps % splits == 0:
            # Each with 8 blocks, less of which do not pay for adding up what one more has.
            turns = math.gcd(steps // splits, 4 if tokens <= 32 and steps // splits >= 32 else 2)
            found.append(Config(tokens, 64, groups=1, turns=turns, splits=splits))
    return found


def dequantizes(M: int, N: int, K: int, out_dtype: Any) -> bool:
    """Whether there is so much to do that `product_dequantized` is faster, and exact enough."""
    much = M >= _DEQUANTIZED_TOKENS and M * N * K >= _DEQUANTIZED_WORK
    return much and out_dtype == jnp.bfloat16


def product_dequantized(
    x: BFloat16[Array, "M K"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
) -> BFloat16[Array, "M N"]:
    """`product` with the layer written out as BF16, which rounds it, and XLA's dot."""
    qvalue, scale = (take_layer(stack, in_stack(layer[0], wq.shape[0])) for stack in (wq, sw))
    w = widen(qvalue) * expand_blocks(scale, (SCALE_ROWS, K_BLOCK), qvalue.shape)
    # Once: a dot that dequantizes its own tiles does so for each tile of tokens.
    w = lax.optimization_barrier(w.astype(x.dtype))
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _step_bytes(config: Config) -> int:
    """What the copies of a K block bring: FP8 and BF16."""
    return (config.tile_n + 2 * config.tile_m) * K_BLOCK


def product(
    x: BFloat16[Array, "M K"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    *,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"]:
    """`y[m, n] = sum_kb (x[m, kb] . wq[layer, n, kb]) * sw[layer, n // 128, kb]`, in float32.

    Args:
      x: K a multiple of 32; M one of 8, or less than 8.
      wq: float8_e4m3fn or float8_e5m2, finite, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`.
    """
    (M, K), (L, N, _) = x.shape, wq.shape
    out_dtype = jnp.dtype(out_dtype)
    tile_m, tile_n, groups, turns = config.tile_m, config.tile_n, config.groups, config.turns
    splits = config.splits
    steps = cdiv(K, K_BLOCK) // splits
    consumers, waves = groups * turns, tile_n // (64 * groups)
    m_tiles, n_tiles = cdiv(M, tile_m), cdiv(N, tile_n)
    tiles = m_tiles * n_tiles
    # The interpreter knows no SMEM of other thread blocks: there each part is a result.
    parts, senders = (splits, turns) if interpreted() else (1, splits * turns)
    # Stores are counted in a cluster; a thread block's own consumers meet at a barrier.
    counted = splits > 1 and parts == 1
    # The store that transposes, and so makes y itself, is there for whole tiles of 16-bit values,
    # and would ignore the column of a second tile where y has one only.
    direct = parts == 1 and out_dtype.itemsize == 2 and N % 64 == 0 and N >= tile_n

    slot_bytes = _step_bytes(config)
    result_bytes = tile_n * tile_m * (out_dtype.itemsize if direct else 4)
    own_sums_bytes = (senders - 1) * waves * 64 * tile_m * 4
    sums_bytes = groups * own_sums_bytes
    blocks = min(sms // splits, tiles)
    stages = min(_MAX_STAGES, (SMEM_BYTES - result_bytes - sums_bytes) // slot_bytes, steps)
    stages = max(2, stages // turns * turns)

    def kernel(x_gmem, w_gmem, sw_gmem, layer_gmem, y_gmem, *scratch):
        x_smem, w_smem, y_smem, sums_smem, full, empty, together, counter = scratch
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], L)
        part = lax.axis_index("cluster") if splits > 1 else 0

        def origin(tile):
            """The first token and the first row of the weight of a tile."""
            ni, mi = plgpu.planar_snake(tile, (n_tiles, m_tiles), 0, _STRIP)
            return mi * tile_m, ni * tile_n

        @pl.when(warpgroup == consumers)
        def _producer():
            if consumers > 1:  # alone, a consumer has registers enough
                producer_registers()

            def copy(tile, step, slot):
                m0, n0 = origin(tile)
                block = pl.ds((part * steps + step) * K_BLOCK, K_BLOCK)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[l, pl.ds(n0, tile_n), block], w_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m0, tile_m), block], x_smem.at[slot], full.at[slot]
                )

            fill_ring(tiles, steps, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            if consumers > 1:
                consumer_registers(consumers)
            group, turn = lax.rem(warpgroup, groups), lax.div(warpgroup, groups)
            sender = turn if parts > 1 else part * turns + turn

            def wave_rows(wave):
                return (wave * groups + group) * 64

            def load_scales(n0, kb):
                rows = [lax.div(n0 + wave_rows(w), SCALE_ROWS) for w in range(waves)]
                rows = [jnp.minimum(r, sw.shape[1] - 1) for r in rows]
                return tuple(sw_gmem[l, r, jnp.minimum(kb, sw.shape[2] - 1)] for r in rows)

            def main_loop(n0, slot):
                """Adds up this consumer's K blocks.

                What a product begins with is loaded and converted behind the one before.
                """
                kb0, own = part * steps + turn, steps // turns

                def operand(slot, wave):
                    return upcast(w_smem.at[slot, pl.ds(wave_rows(wave), 64)], K)

                def add_block(i, carry):
                    slot, scales, w, totals = carry
                    scales_next = load_scales(n0, kb0 + (i + 1) * turns)
                    slot_next = slot + turns
                    slot_next = jnp.where(slot_next >= stages, slot_next - stages, slot_next)

                    def first_operand():
                        @pl.when(i + 1 < own)
                        def _wait():
                            plgpu.barrier_wait(full.at[slot_next])

                        return operand(slot_next, 0)

                    sums = []
                    for wave in range(waves):
                        last = wave == waves - 1
                        meanwhile = (
                            first_operand if last else functools.partial(operand, slot, wave + 1)
                        )
                        block, w = multiply(w, x_smem.at[slot], meanwhile)
                        if last:
                            plgpu.barrier_arrive(empty.at[slot])
                        sums.append(totals[wave] + block * scales[wave])
                    return slot_next, scales_next, w, tuple(sums)

                totals = tuple(zero_accumulator(64, tile_m) for _ in range(waves))
                plgpu.barrier_wait(full.at[slot])
                carry = slot, load_scales(n0, kb0), operand(slot, 0), totals
                # An even number of operands at a time, which take turns in two sets of registers:
                # ptxas runs no product beside what writes to those that it reads.
                unrolled = 1 + waves % 2

                def add_blocks(i, carry):
                    for j in range(unrolled):
                        carry = add_block(i * unrolled + j, carry)
                    return carry

                carry = lax.fori_loop(0, own // unrolled, add_blocks, carry)
                carry = lax.fori_loop(own - own % unrolled, own, add_block, carry)
                slot, _, _, totals = carry
                return slot, totals

            def arrive(**again):
                """Says that parts may be sent here, and that this consumer's were."""
                if counted:

                    @pl.when(sender == 0)
                    def _expect():
                        expect(counter.at[group], own_sums_bytes, **again)

                plgpu.commit_smem()
                plgpu.barrier_arrive(together)

            def epilogue(totals, m0, n0):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for wave, total in enumerate(totals):
                    for sender in range(senders - 1):
                        total += receive(sums_smem.at[sender, group, wave])
                    if direct:
                        y = total.astype(out_dtype)
                        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                        y_smem.at[group, wave].T[...] = y
                    else:
                        y_smem[group, wave] = total
                plgpu.commit_smem()
                for wave in range(waves):
                    rows, tokens = pl.ds(n0 + wave_rows(wave), 64), pl.ds(m0, tile_m)
                    at = part if parts > 1 else lax.mul(m0, 0)
                    target = y_gmem.at[tokens, rows] if direct else y_gmem.at[at, rows, tokens]
                    plgpu.copy_smem_to_gmem(y_smem.at[group, wave], target)

            def do_tile(tile, slot):
                m0, n0 = origin(tile)
                slot, totals = main_loop(n0, slot)
                if senders == 1:
                    epilogue(totals, m0, n0)
                    return slot

                plgpu.barrier_wait(together)

                @pl.when(sender > 0)
                def _send():
                    for wave, total in enumerate(totals):
                        target = sums_smem.at[sender - 1, group, wave]
                        send(total, target, counter.at[group] if counted else None)

                if not counted:
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(together)
                    plgpu.barrier_wait(together)

                @pl.when(sender == 0)
                def _sum():
                    if counted:
                        wait(counter.at[group])
                    epilogue(totals, m0, n0)

                @pl.when(tile + blocks < tiles)
                def _again():  # the next tile's sums come to the same place
                    plgpu.commit_smem()
                    arrive(again=True)

                return slot

            if senders > 1:
                arrive()

            for_each_tile(tiles, jnp.int32(0) + turn, do_tile)
            plgpu.wait_smem_to_gmem(0)

    if splits > 1:
        cluster: dict[str, Any] = {"cluster": (splits,), "cluster_names": ("cluster",)}
        together = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=consumers)
    else:
        cluster = {}
        together = plgpu.Barrier(num_arrivals=consumers)
    if direct:
        # TMA stores whole tiles of 8 rows, or fewer than 8.
        y_rows = M if M < 8 else round_up(M, 8)
        out_type = jax.ShapeDtypeStruct((y_rows, N), out_dtype)
        y_tiling = swizzled(N, out_dtype)
        y_smem = plgpu.SMEM((groups, waves, tile_m, 64), out_dtype, transforms=y_tiling)
    else:
        # Whole tiles, since these copies are linear: they do not stop where a part ends.
        y_shape = (parts, round_up(N, tile_n), round_up(M, tile_m))
        out_type = jax.ShapeDtypeStruct(y_shape, jnp.float32)
        y_smem = plgpu.SMEM((groups, waves, 64, tile_m), jnp.float32)
    sums_shape = (senders - 1, groups, waves, 64, tile_m) if senders > 1 else (8,)
    y = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((stages, tile_m, K_BLOCK), x.dtype, transforms=swizzled(K, x.dtype)),
            plgpu.SMEM((stages, tile_n, K_BLOCK), wq.dtype, transforms=swizzled(K, wq.dtype)),
            y_smem,
            plgpu.SMEM(sums_shape, jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            together,
            plgpu.SMEM((groups, *COUNTER.shape), jnp.int32),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_w8a16",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **cluster,
    )(x, wq, sw, layer)
    if not direct:
        y = y[:, :N].sum(0).T.astype(out_dtype)
    return y[:M]
