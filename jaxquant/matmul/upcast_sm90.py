"""A product of FP8 by BF16 on Hopper's tensor cores: FP8 becomes BF16 in registers.

Every FP8 value is a BF16 value. Its bits, moved to where BF16 has its exponent and mantissa, are
that value times a power of two, subnormal numbers included, so a product with a power of two
makes it, two values an instruction. Hopper has no instruction for the conversion.

Pallas' interpreter runs no PTX and no wgmma with an operand in registers: there it is a cast and
a dot.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxquant.hopper import interpreted
from jaxquant.matmul.sm90 import K_BLOCK, swizzled

# Who holds what, by four bytes, and how wgmma wants it, by pairs: half of it in the next thread.
_PARTS = 2
_LOADED = fragmented_array.WGMMA_LAYOUT_UPCAST_2X
_OPERAND = fragmented_array.WGMMA_LAYOUT


@dataclasses.dataclass(frozen=True)
class _Format:
    """What turns `s e..e m..m 0000 0000` into BF16."""

    shift: int  # from a half's upper byte to BF16's exponent and mantissa
    bits: int  # which those are then
    factor: int  # 2 to the difference of the exponents' biases, as BF16


_FORMATS = {
    "float8_e4m3fn": _Format(4, 0x07F0, 0x7B80),
    "float8_e5m2": _Format(3, 0x0FE0, 0x7780),
}


def multiply(w: Any, x: Any, meanwhile: Callable[[], Any]) -> tuple[Any, Any]:
    """(`w @ x^T` in float32, what `meanwhile` returns, which runs behind the product).

    Args:
      w: `[64, 128]` from `upcast`.
      x: bfloat16, an SMEM tile `[n, 128]`; n a multiple of 8.
      meanwhile: is not to wait for products.
    """
    if interpreted():
        (w,) = w
        return w.astype(jnp.float32) @ x[...].astype(jnp.float32).T, meanwhile()

    def run(accumulator):
        for i, part in enumerate(w):
            columns = pl.ds(i * part.shape[1], part.shape[1])
            plgpu.wgmma(accumulator, part, x.at[:, columns].T)
        result = meanwhile()
        return accumulator[...], result

    return pl.run_scoped(run, plgpu.ACC((w[0].shape[0], x.shape[0]), jnp.float32))


def upcast(w: Any, K: int) -> tuple[Any, ...]:
    """An SMEM tile `[64, 128]` of FP8 as BF16 in the layout of wgmma, in parts along its columns.

    NaN and infinities become finite.

    Args:
      w: float8_e4m3fn or float8_e5m2.
      K: columns of the matrix that the tile is of, for its swizzling.
    """
    if interpreted():
        return (w[...].astype(jnp.bfloat16),)
    fmt = _FORMATS[jnp.dtype(w.dtype).name]
    transforms = swizzled(K, w.dtype)
    columns = math.gcd(K, K_BLOCK)  # of a swizzled tile, and its bytes
    part = w.shape[1] // _PARTS
    bf16 = jnp.dtype(jnp.bfloat16)
    results = (plgpu.ShapeDtypeStruct((64, part), bf16, layout=plgpu.Layout.WGMMA),) * _PARTS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=results)
    def run(_, w):
        loaded = mgpu.FragmentedArray.load_tiled(
            w, columns, layout=_LOADED, optimized=columns == K_BLOCK
        )
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        odd = arith.andi(utils.thread_idx(), constant(1))
        is_even = arith.cmpi(arith.CmpIPredicate.eq, odd, constant(0))
        # First of the second pair, first of the first, then the seconds: the first pair lies in
        # the halves' upper bytes.
        order = arith.select(is_even, constant(0x1504), constant(0x7362))
        registers = np.empty(_OPERAND.registers_shape(loaded.shape), dtype=object)
        for (i, j, *rest, _), register in np.ndenumerate(loaded.registers):
            own = utils.bitcast(register, i32)
            both = llvm.inline_asm(
                llvm.StructType.get_literal([i32, i32]),
                [own, utils.shfl_bfly(own, 1), order],
                _ptx(fmt),
                "=r,=r,r,r,r",
                asm_dialect=0,
            )
            for half in range(2):
                value = llvm.extractvalue(i32, both, [half])
                registers[(i, 2 * j + half, *rest)] = utils.bitcast(value, pair)
        whole = mgpu.FragmentedArray(_registers=registers, _layout=_OPERAND, _is_signed=None)
        return tuple(whole[:, i * part : (i + 1) * part] for i in range(_PARTS))

    return run(w)  # pyright: ignore[reportCallIssue]


def _ptx(fmt: _Format) -> str:
    """Own four bytes `$2`, the next thread's `$3`, in the order `$4`, to pairs `$0` and `$1`."""
    bits, factor = (f"0x{value:04x}{value:04x}" for value in (fmt.bits, fmt.factor))
    lines = [".reg .b32 pair, moved;", "prmt.b32 pair, $2, $3, $4;"]
    for result in ("$0", "$1"):
        lines += [
            f"shr.b32 moved, pair, {fmt.shift};",
            f"and.b32 moved, moved, {bits};",
            "lop3.b32 moved, pair, 0x80008000, moved, 0xea;",  # (a & b) | c
            f"mov.b32 {result}, {factor};",
            f"mul.rn.bf16x2 {result}, moved, {result};",
            "shl.b32 pair, pair, 8;",
        ]
    return "\n".join(["{", *lines[:-1], "}"])
