"""Lines of PTX within a kernel, for what Pallas has no name for. Its interpreter runs none."""

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# What an int32 is to `plgpu.inline_mgpu`.
SCALAR = plgpu.Layout.WG_SPLAT(())
REF = plgpu.RefType()
# Of a warpgroup, which so has a barrier of its own, as Mosaic numbers them.
THREADS = 128
THREAD = f"mov.u32 t, %tid.x; and.b32 t, t, {THREADS - 1};"
BARRIER = "mov.u32 id, %tid.x; shr.u32 id, id, 7; add.u32 id, id, 1;"
MEET = f"bar.sync id, {THREADS};"


def emit(lines: list[str], operands: list[Any]) -> None:
    """Has the compiler put in the lines, which name the operands `$0`, `$1` and so on."""
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    kinds = ({i64: "l", f32: "f"}.get(operand.type, "r") for operand in operands)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        operands,
        "\n".join(["{", *lines, "}"]),
        ",".join([*kinds, "~{memory}"]),
        has_side_effects=True,
        asm_dialect=0,
    )


def address(ref: Any) -> Any:
    """Where a ref to SMEM begins."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def pointer(ref: Any) -> Any:
    """Where a ref to GMEM begins."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def scalars(*values: Any) -> list[Any]:
    """The registers of int32 values."""
    return [value.registers.item() for value in values]


def shape(ref: Any) -> tuple[int, ...]:
    """Of a ref inside `plgpu.inline_mgpu`."""
    return tuple(ir.MemRefType(ref.type).shape)
