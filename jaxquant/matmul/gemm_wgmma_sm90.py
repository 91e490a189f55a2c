"""One K block on Hopper's tensor cores, as PTX.

`plgpu.wgmma` adds to an accumulator. The sum of a K block starts at zero, so that its registers
would have to be cleared for each, and for that the compiler keeps a second set, which a thread
block of 256x128 results has no room for (ptxas spills 108 bytes). The instruction itself can
overwrite its result; Pallas has no name for that.

Pallas' interpreter runs no PTX, and where K is no multiple of 128 SMEM tiles are narrower than
this is written for: both take `plgpu.wgmma`.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxquant.hopper import interpreted
from jaxquant.matmul.sm90 import FP8, K_BLOCK, multiply, swizzled

_LAYOUT = plgpu.Layout.WGMMA
# What a thread's registers of the result are to LLVM: single floats.
_REGISTERS = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
_SCALAR = plgpu.Layout.WG_SPLAT(())
_K_INSTRUCTION = 32
_SWIZZLE = 128


def start(x: Any, w: Any, slot: Any, rows: Any, columns: Any, block: Any, K: int) -> Any:
    """Starts `block = x[slot, rows] @ w[slot, columns]^T`.

    Args:
      x: float8_e4m3fn, SMEM `[stages, m, 128]`.
      w: likewise, `[stages, n, 128]`.
      slot: which of the stages.
      rows: 64 of x, a `pl.ds`.
      columns: a multiple of 8 of the rows of w, likewise.
      block: a float32 value `[64, columns]` in the layout of wgmma, which the product replaces.
        Taken so that the products of a loop, each of which gets the one before, share registers.
      K: columns of the matrices that the tiles are of.

    Returns:
      The product, not to be read before `wait`.
    """
    if not _as_ptx(K):
        return multiply(x.at[slot, rows], w.at[slot, columns])
    tile = plgpu.RefType(swizzled(K, FP8))
    result = plgpu.ShapeDtypeStruct(block.shape, jnp.dtype(jnp.float32), layout=_LAYOUT)
    strides = [ring.shape[1] * K_BLOCK for ring in (x, w)]

    @plgpu.inline_mgpu(arg_types=(tile, tile, _SCALAR, _LAYOUT), return_type=result)
    def run(_, a, b, slot, block):
        n = block.shape[1]
        b = mgpu.memref_transpose(b, (1, 0, 3, 2))
        a, b = (
            mma_utils.create_descriptor(
                operand,
                swizzle=_SWIZZLE,
                large_tile=(rows, K_BLOCK),
                group_size=group,
                logical_k_major=is_b,
            )[0][0]
            for operand, rows, group, is_b in (
                (a, 64, (64, K_BLOCK), False),
                (b, K_BLOCK, (K_BLOCK, n), True),
            )
        )
        return inline_wgmma(_multiply_ptx(n, *strides), block, a, b, slot.registers.item())

    # Descriptors of the first slot, that they may be made ahead of the loop.
    return run(x.at[0, rows], w.at[0, columns], slot, block)  # pyright: ignore[reportCallIssue]


def wait(block: Any, K: int, pending: int = 0) -> Any:
    """Waits for what `start` returned, all but the last `pending` starts, and returns it."""
    if not _as_ptx(K):
        return block
    result = plgpu.ShapeDtypeStruct(block.shape, jnp.dtype(jnp.float32), layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=result)
    def run(_, block):
        return inline_wgmma(f"wgmma.wait_group.sync.aligned {pending};", block)

    return run(block)  # pyright: ignore[reportCallIssue]


def _as_ptx(K: int) -> bool:
    return K % K_BLOCK == 0 and not interpreted()


def _multiply_ptx(n: int, a_stride: int, b_stride: int) -> str:
    """The four instructions of a K block.

    Registers `$0`.. hold the sum, then come a's and b's tile in the first slot, and the slot; a's
    and b's slots are so many bytes apart.
    """
    registers = n // 2
    total = "{" + ",".join(f"${i}" for i in range(registers)) + "}"
    a, b, slot = (f"${registers * 2 + i}" for i in range(3))
    # Descriptors count in 16 bytes.
    lines = [
        ".reg .pred add; .reg .b64 a, b, a0, b0;",
        f"mul.wide.u32 a0, {slot}, {a_stride // 16}; add.s64 a0, a0, {a};",
        f"mul.wide.u32 b0, {slot}, {b_stride // 16}; add.s64 b0, b0, {b};",
        "wgmma.fence.sync.aligned;",
    ]
    for i in range(K_BLOCK // _K_INSTRUCTION):
        step = i * _K_INSTRUCTION // 16
        lines += [
            f"setp.ne.b32 add, {i}, 0;",
            f"add.s64 a, a0, {step}; add.s64 b, b0, {step};",
            f"wgmma.mma_async.sync.aligned.m64n{n}k{_K_INSTRUCTION}.f32.e4m3.e4m3 "
            f"{total}, a, b, add, 1, 1;",
        ]
    return "\n".join(["{", *lines, "wgmma.commit_group.sync.aligned;", "}"])


def inline_wgmma(ptx: str, block: Any, *operands: Any) -> Any:
    """Runs PTX that reads and writes `block` in its registers."""
    block = block.to_layout(_REGISTERS)
    registers = list(block.registers.flat)
    types = [r.type for r in registers]
    same = map(str, range(len(registers)))
    kinds = ("l" if o.type == ir.IntegerType.get_signless(64) else "r" for o in operands)
    constraints = ",".join([*("=f" for _ in registers), *same, *kinds])
    results = llvm.inline_asm(
        llvm.StructType.get_literal(types),
        [*registers, *operands],
        ptx,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )
    for i, t in enumerate(types):
        registers[i] = llvm.extractvalue(t, results, [i])
    out = block.registers.copy()
    out.flat[:] = registers
    result = mgpu.FragmentedArray(_registers=out, _layout=block.layout, _is_signed=None)
    return result.to_layout(mgpu.WGMMA_LAYOUT)
