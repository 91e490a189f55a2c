"""What the Hopper kernels share: operand tiling and the ring of SMEM buffers.

A kernel is one producer warpgroup, which copies tiles from GMEM with the tensor memory
accelerator (TMA), and one to three consumer warpgroups, which multiply them. Between the
two stands a ring of `stages` SMEM slots, each of one 128-wide block of K:

    full[slot]    completes when the copies into a slot have landed
    empty[slot]   completes when every consumer has read a slot

Thread blocks are persistent: there is one per multiprocessor, and each works through its share
of the tiles in the same order in both roles.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

FP8 = jnp.float8_e4m3fn
# One scale, one slot of the ring.
K_BLOCK = 128
# Rows of the weight that share a scale.
SCALE_ROWS = 128

# Registers of a multiprocessor by 128 threads, which a thread block that has it to itself gets in
# equal shares of a multiple of 8. The producer only issues copies; what it gives up goes to the
# consumers' accumulators.
_REGISTERS = 512
PRODUCER_REGISTERS = 40
_MAX_REGISTERS = 240

# Bytes of SMEM that a thread block may have, less what barriers and the compiler take.
SMEM_BYTES = 232448 - 2048


def cdiv(a: int, b: int) -> int:
    """The least integer >= a / b."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The least multiple of `multiple` >= a."""
    return cdiv(a, multiple) * multiple


def in_stack(layer: Any, L: int) -> Any:
    """The index of a layer among L, taken as `lax.dynamic_index_in_dim` takes it.

    A negative one counts from the end, and one that is outside becomes the nearest inside.
    """
    return jnp.clip(jnp.where(layer < 0, layer + L, layer), 0, L - 1)


def store(ref: Any, value: jax.Array) -> None:
    """Stores, also less than a cache line at once, which jax 0.12 refuses unless asked."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def swizzled(cols: int, dtype: Any) -> tuple[plgpu.Transform, plgpu.Transform]:
    """The tiling of an SMEM tile of a GMEM matrix with `cols` columns.

    Tiles are 8 rows of 128 bytes, or of 64 or 32 bytes where `cols` is ragged: TMA reads what
    lies outside the matrix as zeros, but only whole tiles at a time. So `cols` has to be a
    multiple of 32, as rows have to be one of 8, or fewer than 8.
    """
    itemsize = jnp.dtype(dtype).itemsize
    tile = math.gcd(cols, 128 // itemsize)
    return (
        plgpu.TilingTransform((8, tile)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(tile * itemsize),  # pyright: ignore[reportAbstractUsage]
    )


def next_slot(slot: Any, stages: int) -> Any:
    """The slot after `slot` in a ring of `stages`."""
    return jnp.where(slot == stages - 1, 0, slot + 1)


def ring_stages(slot_bytes: int, result_bytes: int, steps: int, most: int) -> int:
    """Depth of the ring: what fits beside the result, and at least 2."""
    return max(2, min(most, (SMEM_BYTES - result_bytes) // slot_bytes, steps))


def for_each_tile(tiles: Any, init: Any, body: Callable[[Any, Any], Any]) -> Any:
    """`carry = body(tile, carry)` over this thread block's share of `tiles` tiles."""

    @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=init)
    def result(info, carry):
        return body(info.index[0], carry)

    return result


def fill_ring(
    tiles: Any,
    steps: int,
    stages: int,
    empty: Any,
    copy: Callable[[Any, Any, Any], None],
    fence: Callable[[], None] = plgpu.commit_smem,
    find: Callable[[Any], Any] = lambda tile: tile,
) -> None:
    """The producer: `copy(find(tile), step, slot)` for each tile and each of its K blocks.

    Consumers read the scales with ordinary loads; `fence` orders these before the copies that
    overwrite them.
    """

    def fill_tile(tile, carry):
        found = find(tile)

        def fill_slot(step, carry):
            slot, filled = carry

            @pl.when(filled >= stages)
            def _wait_for_consumers():
                plgpu.barrier_wait(empty.at[slot])
                fence()

            copy(found, step, slot)
            return next_slot(slot, stages), jnp.minimum(filled + 1, stages)

        return lax.fori_loop(0, steps, fill_slot, carry)

    slot, filled = for_each_tile(tiles, (jnp.int32(0), jnp.int32(0)), fill_tile)

    # Every completion of a barrier must be seen, and a thread block must not end while its
    # cluster neighbour still copies into it. The oldest slot of a ring that has wrapped is `slot`.
    def drain(_, slot):
        plgpu.barrier_wait(empty.at[slot])
        return next_slot(slot, stages)

    lax.fori_loop(0, filled, drain, jnp.where(filled == stages, slot, 0))


def spare_registers(kept: int) -> None:
    """Gives all registers of a warpgroup away but so many a thread."""
    plgpu.set_max_registers(kept, action="decrease")


def producer_registers() -> None:
    """Gives the producer's spare registers away."""
    spare_registers(PRODUCER_REGISTERS)


def consumer_registers(consumers: int, others: Sequence[int] = (PRODUCER_REGISTERS,)) -> None:
    """Takes a consumer's share of the registers that the others gave away, who kept so many."""
    warpgroups = consumers + len(others)
    registers = _REGISTERS // warpgroups // 8 * 8 * warpgroups
    share = (registers - sum(others)) // consumers // 8 * 8
    plgpu.set_max_registers(min(_MAX_REGISTERS, share), action="increase")


def zero_accumulator(rows: int, cols: int) -> Any:
    """A float32 zero in the layout that wgmma accumulates in."""
    return plgpu.layout_cast(jnp.zeros((rows, cols), jnp.float32), plgpu.Layout.WGMMA)


def multiply(a: Any, b: Any) -> Any:
    """`a @ b^T` of SMEM tiles a `[64, 128]` and b `[n, 128]`: one K block, in float32.

    The tensor cores add up FP8 products with about 14 bits, so a sum is taken out to float32
    registers after each K block rather than kept there through all of K.
    """

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b.T)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))
