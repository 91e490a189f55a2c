"""Experts with many tokens each on Hopper: groups of tokens, bound by the tensor cores.

As `gemm_sm90` with tiles of 128x128, of which a consumer has 64 tokens. The last tile of a group
may have 64 tokens only, and then takes half of the products.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.hopper import interpreted
from jaxquant.matmul import gemm_wgmma_sm90 as tensor_cores
from jaxquant.matmul.groups_sm90 import ALIGNMENT, Groups
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
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
from jaxquant.matmul.store_sm90 import store_rows

_CONSUMERS = 2
# Tokens of a consumer, and so of a tile; rows of the weight.
_UNIT = 64
_TILE_M = _CONSUMERS * _UNIT
_TILE_N = 128
_MAX_STAGES = 8
# 64 experts of 2816 x 2048 with 512 tokens each take 350 us, by `grouped_sm90` 390; with half as
# many, of which tiles of 64 tokens are a larger part, there is nothing to gain. Nor where K is
# larger: tiles take different times, so that those that share rows of the weight drift apart, and
# the longer they take the less L2 has these. 128 experts of 1536 x 4096 with 256 tokens each take
# 489 us and 435, and 444 where each next tile is drawn from a counter, which costs small K more.
_LEAST_MEAN = 448
_MAX_K = 2048


def takes(T: int, E: int, N: int, K: int) -> bool:
    """Whether this is the kernel for T tokens in E groups: it can, and is to be the faster."""
    whole = T % ALIGNMENT == 0 and N % _TILE_N == 0
    return whole and T >= _LEAST_MEAN * E and K <= _MAX_K


def _fence() -> None:
    """None on a GPU: loads are through long before their thread lets the copy go."""
    if interpreted():
        plgpu.commit_smem()


def grouped_gemm(
    xq: Float[Array, "T K"],
    sx: Float32[Array, "K//128 S"],
    wq: Float[Array, "LE N K"],
    sw: Float32[Array, "LE N//128 K//128"],
    group_sizes: Int32[Array, " E"],
    layer: Int32[Array, "1"],
    *,
    sms: int,
) -> Float[Array, "T N"]:
    """`grouped_sm90.grouped` of sorted tokens, T a multiple of 8, N of 128."""
    T, (matrices, N, K), E = len(xq), wq.shape, group_sizes.shape[0]
    steps = K // K_BLOCK
    slot_bytes = (_TILE_M + _TILE_N) * K_BLOCK + _TILE_M * 4
    other_bytes = _TILE_M * _TILE_N * 2 + round_up(8 * E, 1024)
    stages = ring_stages(slot_bytes, other_bytes, steps, _MAX_STAGES)

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, sizes_gmem, layer_gmem, y_gmem, *refs):
        x_smem, w_smem, sx_smem, y_smem, table, full, empty, counted = refs
        warpgroup = lax.axis_index("warpgroup")
        base = in_stack(layer_gmem[0], matrices // E) * E
        groups = Groups(table, T, _TILE_M, _UNIT, N // _TILE_N)

        def matrix(group):
            return base + jnp.minimum(group, E - 1)

        @pl.when(warpgroup == _CONSUMERS)
        def _producer():
            groups.count(sizes_gmem)
            plgpu.commit_smem()
            plgpu.barrier_arrive(counted)
            producer_registers()

            def copy(tile, step, slot):
                group, column, begin, _, high = tile
                block = pl.ds(step * K_BLOCK, K_BLOCK)
                begin = pl.multiple_of(begin, ALIGNMENT)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[matrix(group), pl.ds(column * _TILE_N, _TILE_N), block],
                    w_smem.at[slot],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    sx_gmem.at[step, pl.ds(begin, _TILE_M)], sx_smem.at[slot], full.at[slot]
                )
                for rows, taken in ((_UNIT, high <= _UNIT), (_TILE_M, high > _UNIT)):

                    @pl.when(taken)
                    def _copy(rows=rows):
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[pl.ds(begin, rows), block],
                            x_smem.at[slot, pl.ds(0, rows)],
                            full.at[slot],
                        )

            fill_ring(groups.tiles(), steps, stages, empty, copy, _fence, groups.find)

        @pl.when(warpgroup < _CONSUMERS)
        def _consumer():
            consumer_registers(_CONSUMERS)
            plgpu.barrier_wait(counted)
            tiles = groups.tiles()
            own = pl.ds(warpgroup * _UNIT, _UNIT)

            def find_and_load(index):
                """A tile, and its first scale."""
                tile = groups.find(jnp.minimum(index, tiles - 1))
                return tile, load_scale(tile, 0)

            def load_scale(tile, step):
                group, column, *_ = tile
                return sw_gmem[matrix(group), column, jnp.minimum(step, steps - 1)]

            def start(slot, block):
                """Starts a product, and loads its tokens' scales meanwhile."""
                columns = pl.ds(0, _TILE_N)
                block = tensor_cores.start(x_smem, w_smem, slot, own, columns, block, K)
                layout = plgpu.Layout.WGMMA.reduce(1)
                return block, plgpu.load(sx_smem.at[slot, own], layout=layout)

            def promote(total, block, x_scale, scale):
                return total + block * lax.broadcast_in_dim(x_scale * scale, total.shape, [0])

            def await_block(step, slot):
                @pl.when(step < steps)
                def _wait():
                    plgpu.barrier_wait(full.at[slot])

            def main_loop(tile, slot, scale):
                """Adds up all of K, the product of one block under way as another is promoted."""

                def add_block(step, carry):
                    slot, scale, block, total = carry
                    scale_next, slot_next = load_scale(tile, step + 1), next_slot(slot, stages)
                    block, x_scale = start(slot, block)
                    await_block(step + 1, slot_next)
                    block = tensor_cores.wait(block, K)
                    plgpu.barrier_arrive(empty.at[slot])
                    return slot_next, scale_next, block, promote(total, block, x_scale, scale)

                def add_two_blocks(i, carry):
                    slot, scale, block, other, total = carry
                    step, other_slot = 2 * i, next_slot(slot, stages)
                    other_scale, scale_next = load_scale(tile, step + 1), load_scale(tile, step + 2)
                    block, x_scale = start(slot, block)
                    plgpu.barrier_wait(full.at[other_slot])
                    other, other_x_scale = start(other_slot, other)
                    slot_next = next_slot(other_slot, stages)
                    block = tensor_cores.wait(block, K, pending=1)
                    plgpu.barrier_arrive(empty.at[slot])
                    total = promote(total, block, x_scale, scale)
                    # It branches: without, the compiler moves half of the promotion behind the
                    # wait for the other product, and out of its shadow.
                    await_block(step + 2, slot_next)
                    other = tensor_cores.wait(other, K)
                    plgpu.barrier_arrive(empty.at[other_slot])
                    total = promote(total, other, other_x_scale, other_scale)
                    return slot_next, scale_next, block, other, total

                plgpu.barrier_wait(full.at[slot])
                zero = zero_accumulator(_UNIT, _TILE_N)
                init = slot, scale, zero, zero, zero
                slot, scale, block, _, total = lax.fori_loop(0, steps // 2, add_two_blocks, init)
                if steps % 2:
                    slot, *_, total = add_block(steps - 1, (slot, scale, block, total))
                return slot, total

            def skip(_, slot):
                """A block of a tile that the other consumer has to itself."""
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])
                return next_slot(slot, stages)

            def epilogue(total, tile):
                """Registers to SMEM to GMEM, where rows of other groups are not to be touched."""
                group, column, begin, low, high = tile
                first, staged = warpgroup * _UNIT, y_smem.at[warpgroup]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                # Zeros for the tokens beyond all groups.
                total = jnp.where(jnp.broadcast_to(group < E, total.shape), total, 0.0)
                staged[...] = total.astype(jnp.bfloat16)
                plgpu.commit_smem()
                is_whole = (low <= first) & (first + _UNIT <= high)

                @pl.when(is_whole)
                def _whole():
                    rows = pl.ds(pl.multiple_of(begin + first, ALIGNMENT), _UNIT)
                    columns = pl.ds(pl.multiple_of(column * _TILE_N, _TILE_N), _TILE_N)
                    plgpu.copy_smem_to_gmem(staged, y_gmem.at[rows, columns])

                @pl.when(~is_whole)
                def _some():
                    bounds = low - first, high - first
                    store_rows(staged, y_gmem, begin + first, column * _TILE_N, *bounds)

            def do_tile(index, carry):
                slot, tile, scale = carry

                def multiply(slot):
                    slot, total = main_loop(tile, slot, scale)
                    # What it loads arrives while the results are stored.
                    following = find_and_load(index + sms)
                    epilogue(total, tile)
                    return slot, *following

                def leave(slot):
                    return lax.fori_loop(0, steps, skip, slot), *find_and_load(index + sms)

                return lax.cond(tile[-1] > warpgroup * _UNIT, multiply, leave, slot)

            for_each_tile(tiles, (jnp.int32(0), *find_and_load(lax.axis_index("sm"))), do_tile)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, N), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((stages, _TILE_M, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, _TILE_N, K_BLOCK), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, _TILE_M), jnp.float32),
            plgpu.SMEM(
                (_CONSUMERS, _UNIT, _TILE_N), jnp.bfloat16, transforms=swizzled(N, jnp.bfloat16)
            ),
            plgpu.SMEM((2, E), jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            plgpu.Barrier(),
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_grouped_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(xq, sx, wq, sw, group_sizes.astype(jnp.int32), layer)
