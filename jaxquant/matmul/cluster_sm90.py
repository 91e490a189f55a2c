"""Sums across the thread blocks of a cluster, through the SMEM of its first."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxquant.hopper import interpreted

_LAYOUT = plgpu.Layout.WGMMA
# Floats that a thread moves at once, and threads of a warpgroup.
_FLOATS = 4
_THREADS = 128


def send(value: Any, target: Any) -> None:
    """Writes a float32 value to the first thread block's `target`, for `receive`.

    Both sides have to meet at a barrier of the cluster in between, each warpgroup with
    `plgpu.commit_smem` ahead of it.

    Args:
      value: `[64, n]` in the layout of wgmma; n a multiple of 8.
      target: `[64, n]`, SMEM that every thread block has in the same place.
    """
    if interpreted():  # which has one thread block
        target[...] = value
        return

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, plgpu.RefType()))
    def run(_, value, target):
        floats = [
            llvm.extractelement(register, utils.c(i, ir.IntegerType.get_signless(32)))
            for register in value.registers.flat
            for i in range(2)
        ]
        lines = [".reg .b32 there;", "mapa.shared::cluster.u32 there, $0, 0;"]
        for at in range(0, len(floats), _FLOATS):
            operands = ", ".join(f"${1 + at + i}" for i in range(_FLOATS))
            lines.append(f"st.shared::cluster.v4.f32 [there+{at * 4 * _THREADS}], {{{operands}}};")
        lines.append("fence.acq_rel.cluster;")
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [_address(target), *floats],
            "\n".join(["{", *lines, "}"]),
            ",".join(["r", *["f"] * len(floats), "~{memory}"]),
            has_side_effects=True,
            asm_dialect=0,
        )

    run(value, target)  # pyright: ignore[reportCallIssue]


def receive(source: Any) -> Any:
    """What was sent to this thread block's `source`."""
    if interpreted():
        return plgpu.load(source, layout=_LAYOUT, optimized=False)
    result = plgpu.ShapeDtypeStruct(source.shape, jnp.dtype(jnp.float32), layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def run(_, source):
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(result.shape), dtype=object)
        n = 2 * registers.size
        lines = ["fence.acq_rel.cluster;"]
        for at in range(0, n, _FLOATS):
            results = ", ".join(f"${at + i}" for i in range(_FLOATS))
            lines.append(f"ld.shared.v4.f32 {{{results}}}, [${n}+{at * 4 * _THREADS}];")
        floats = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * n),
            [_address(source)],
            "\n".join(lines),
            ",".join([*["=&f"] * n, "r", "~{memory}"]),
            has_side_effects=True,
            asm_dialect=0,
        )
        for i in range(registers.size):
            register = llvm.mlir_undef(pair)
            for j in range(2):
                value = llvm.extractvalue(f32, floats, [2 * i + j])
                index = utils.c(j, ir.IntegerType.get_signless(32))
                register = llvm.insertelement(register, value, index)
            registers.flat[i] = register
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return run(source)  # pyright: ignore[reportCallIssue]


def _address(ref: Any) -> Any:
    """This thread's share of an SMEM ref."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    offset = arith.muli(thread, utils.c(4 * _FLOATS, i32))
    return arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(ref)), offset)
