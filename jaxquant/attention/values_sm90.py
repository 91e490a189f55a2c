"""A tile of an FP8 cache's values: 128 slots, 8 pages `[D, 16]`, in SMEM byte for byte as in GMEM.

Tensor cores read blocks of 8 rows of 16 bytes. Eight dims of a page are one, so that a tile is an
operand of wgmma as it is, of the kind that is not swizzled. Pallas has no name for that, hence the
PTX; its interpreter runs none, and multiplies plainly.

A tile is given as `[D, 128]`: in rows of 128 bytes, which TMA copies fastest.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from jaxquant.attention.cache import FP8, PAGE, TILE
from jaxquant.attention.sm90 import ROW, WGMMA
from jaxquant.hopper import interpreted
from jaxquant.matmul.gemm_wgmma_sm90 import inline_wgmma, wait
from jaxquant.matmul.sm90 import swizzled

# Dims and slots of one instruction.
_M, _K = 64, 32


def multiply(values: Any, weights: Any, meanwhile: Any) -> Any:
    """`values @ weights^T`, float32 `[D, n]`, and what `meanwhile` returns.

    Args:
      values: float8_e4m3fn, SMEM `[D, 128]`.
      weights: float8_e4m3fn, SMEM `[n, 128]`, `swizzled`.
      meanwhile: runs while the tensor cores do.
    """
    (D, _), (n, _) = values.shape, weights.shape
    if interpreted():
        pages = values[...].astype(jnp.float32).reshape(-1, D, PAGE)
        pages = lax.transpose(pages, (1, 0, 2)).reshape(D, -1)
        total = pages @ weights[...].astype(jnp.float32).T
        return plgpu.layout_cast(total, WGMMA), meanwhile()
    # What the products replace.
    block = plgpu.layout_cast(jnp.zeros((_M, n), jnp.float32), WGMMA)
    blocks = [_start(values, weights, dim, block) for dim in range(0, D, _M)]
    result = meanwhile()
    blocks = [wait(block, TILE) for block in blocks]
    return (lax.concatenate(blocks, 0) if len(blocks) > 1 else blocks[0]), result


def _start(values: Any, weights: Any, dim: int, block: Any) -> Any:
    """Starts `block = values[dim : dim + 64] @ weights^T`, and returns what becomes of block."""
    D = values.shape[0]
    operand = plgpu.RefType(swizzled(TILE, FP8))
    result = plgpu.ShapeDtypeStruct(block.shape, jnp.dtype(jnp.float32), layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), operand, WGMMA), return_type=result)
    def run(_, a, b, block):
        n = block.shape[1]
        i64 = ir.IntegerType.get_signless(64)
        # Blocks of 8 dims follow one another, pages likewise.
        a = mma_utils.encode_descriptor(a, D * PAGE, 8 * PAGE, None)
        a = arith.addi(a, utils.c(dim * PAGE // 16, i64))
        b = mma_utils.create_descriptor(
            mgpu.memref_transpose(b, (1, 0, 3, 2)),
            swizzle=128,
            large_tile=(TILE, TILE),
            group_size=(TILE, n),
            logical_k_major=True,
        )[0][0]
        return inline_wgmma(_ptx(n, D), block, a, b)

    return run(values, weights, block)  # pyright: ignore[reportCallIssue]


def _ptx(n: int, D: int) -> str:
    """The instructions of a tile: registers `$0`.. hold the sum, then come the descriptors."""
    registers = n // 2
    total = "{" + ",".join(f"${i}" for i in range(registers)) + "}"
    lines = [".reg .pred add; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for i in range(TILE // _K):
        # Descriptors count in 16 bytes.
        lines += [
            f"setp.ne.b32 add, {i}, 0;",
            f"add.s64 a, ${2 * registers}, {i * _K * D // 16};",
            f"add.s64 b, ${2 * registers + 1}, {i * _K // 16};",
            f"wgmma.mma_async.sync.aligned.m64n{n}k{_K}.f32.e4m3.e4m3 {total}, a, b, add, 1, 1;",
        ]
    return "\n".join(["{", *lines, "wgmma.commit_group.sync.aligned;", "}"])


def put(tile: Any, slot: Any, value: Any) -> None:
    """Writes one slot of a tile.

    Args:
      tile: float8_e4m3fn, GMEM `[D, 128]`.
      slot: which one, int32.
      value: float8_e4m3fn `[D]`, of the rows of an accumulator.
    """
    D = tile.shape[0]
    if interpreted():
        rows = D * PAGE // TILE
        page = tile.at[pl.ds(lax.div(slot, PAGE) * rows, rows)]
        old = page[...].reshape(D, PAGE)
        here = lax.broadcasted_iota(jnp.int32, old.shape, 1) == lax.rem(slot, PAGE)
        new = jnp.where(here, lax.broadcast_in_dim(value, old.shape, [0]), old)
        page[...] = new.reshape(page.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), ROW))
    def run(_, tile, slot, value):
        slot = arith.index_cast(ir.IndexType.get(), slot.registers.item())
        value.foreach(lambda x, index: _store(x, tile, D, slot, *index))

    run(tile, slot, value)  # pyright: ignore[reportCallIssue]


def put_all(pages: Any, values: Any) -> None:
    """Writes all slots of some pages.

    Args:
      pages: float8_e4m3fn, SMEM `[slots * D / 128, 128]`.
      values: float8_e4m3fn `[slots, D]`, in the layout of wgmma.
    """
    D = values.shape[1]
    if interpreted():
        in_pages = lax.transpose(values.reshape(-1, PAGE, D), (0, 2, 1))
        pages[...] = in_pages.reshape(pages.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
    def run(_, pages, values):
        values.foreach(lambda x, index: _store(x, pages, D, *index))

    run(pages, values)  # pyright: ignore[reportCallIssue]


def _store(x: Any, pages: Any, D: int, slot: Any, dim: Any) -> None:
    """One value, of one slot and dim."""

    def number(n):
        return utils.c(n, slot.type)

    page, within = (f(slot, number(PAGE)) for f in (arith.divui, arith.remui))
    line, part = (f(dim, number(TILE // PAGE)) for f in (arith.divui, arith.remui))
    row = arith.addi(arith.muli(page, number(D * PAGE // TILE)), line)
    memref.store(x, pages, [row, arith.addi(arith.muli(part, number(PAGE)), within)])
