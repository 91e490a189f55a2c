"""What the thread blocks of a cluster hand to the first: stores whose bytes a barrier counts.

No side waits for more than these bytes. A fence at the scope of a cluster waits for all that a
thread has under way, and takes longer than all the rest.

Pallas' interpreter knows no SMEM of other thread blocks: there the parts are in GMEM, and the
thread blocks have to meet at a barrier between `send` and `receive`.
"""

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
# Words of SMEM that a counter takes: 8 bytes, of 128 so as to keep what follows aligned.
COUNTER = plgpu.SMEM((32,), jnp.int32)


def expect(counter: Any, nbytes: int, *, again: bool = False) -> None:
    """Begins to count, in the first thread block; all have to meet before one sends.

    Args:
      counter: SMEM of the type COUNTER.
      nbytes: what all others send.
      again: whether it has counted before, for all threads of this warpgroup.
    """
    invalidate = "@first mbarrier.inval.shared::cta.b64 [$0];" if again else ""
    _run_ptx(
        f"""
        .reg .pred first;
        setp.eq.u32 first, $1, 0;
        {invalidate}
        @first mbarrier.init.shared::cta.b64 [$0], 1;
        @first fence.mbarrier_init.release.cluster;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $2;
        """,
        counter,
        lambda: [_thread(), utils.c(nbytes, ir.IntegerType.get_signless(32))],
    )


def wait(counter: Any) -> None:
    """Waits for what is expected."""
    _run_ptx(
        """
        .reg .pred all;
        again:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 all, [$0], 0;
        @!all bra again;
        """,
        counter,
    )


def send(value: Any, target: Any, counter: Any) -> None:
    """Writes a float32 value to the first thread block's `target`, for `receive`.

    Args:
      value: `[m, n]` in the layout of wgmma; m a multiple of 64, n of 8.
      target: `[m, n]`, SMEM that every thread block has in the same place.
      counter: likewise; or None, where the target is this thread block's and a barrier follows: a
        kernel without clusters may not count.
    """
    if interpreted():
        target[...] = value
        return
    here = counter is None

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, plgpu.RefType(), plgpu.RefType()))
    def run(_, value, target, counter):
        i32 = ir.IntegerType.get_signless(32)
        floats = [
            llvm.extractelement(register, utils.c(i, i32))
            for register in value.registers.flat
            for i in range(2)
        ]
        if here:
            lines, store, there, counted = [], "st.shared.v4.f32", "$0", ""
        else:
            lines = [
                ".reg .b32 there, counted;",
                "mapa.shared::cluster.u32 there, $0, 0;",
                "mapa.shared::cluster.u32 counted, $1, 0;",
            ]
            store = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
            there, counted = "there", ", [counted]"
        for at in range(0, len(floats), _FLOATS):
            operands = ", ".join(f"${2 + at + i}" for i in range(_FLOATS))
            lines.append(f"{store} [{there}+{at * 4 * _THREADS}], {{{operands}}}{counted};")
        _inline("\n".join(lines), [_share(target), _address(counter)], floats)

    run(value, target, target if here else counter)  # pyright: ignore[reportCallIssue]


def receive(source: Any) -> Any:
    """What was sent to this thread block's `source`, behind `wait`."""
    if interpreted():
        return plgpu.load(source, layout=_LAYOUT, optimized=False)
    result = plgpu.ShapeDtypeStruct(source.shape, jnp.dtype(jnp.float32), layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def run(_, source):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(result.shape), dtype=object)
        n = 2 * registers.size
        lines = []
        for at in range(0, n, _FLOATS):
            results = ", ".join(f"${at + i}" for i in range(_FLOATS))
            lines.append(f"ld.shared.v4.f32 {{{results}}}, [${n}+{at * 4 * _THREADS}];")
        floats = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * n),
            [_share(source)],
            "\n".join(lines),
            ",".join([*["=&f"] * n, "r", "~{memory}"]),
            has_side_effects=True,
            asm_dialect=0,
        )
        for i in range(registers.size):
            register = llvm.mlir_undef(ir.VectorType.get((2,), f32))
            for j in range(2):
                value = llvm.extractvalue(f32, floats, [2 * i + j])
                register = llvm.insertelement(register, value, utils.c(j, i32))
            registers.flat[i] = register
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return run(source)  # pyright: ignore[reportCallIssue]


def _run_ptx(lines: str, counter: Any, operands: Any = list) -> None:
    if interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, counter):
        _inline(lines, [_address(counter), *operands()])

    run(counter)  # pyright: ignore[reportCallIssue]


def _inline(lines: str, words: Any, floats: Any = ()) -> None:
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [*words, *floats],
        "\n".join(["{", lines, "}"]),
        ",".join([*["r"] * len(words), *["f"] * len(floats), "~{memory}"]),
        has_side_effects=True,
        asm_dialect=0,
    )


def _address(ref: Any) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _thread() -> Any:
    """Which of its warpgroup this thread is."""
    return arith.remui(utils.thread_idx(), utils.c(_THREADS, ir.IntegerType.get_signless(32)))


def _share(ref: Any) -> Any:
    """Where this thread's floats are."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.addi(_address(ref), arith.muli(_thread(), utils.c(4 * _FLOATS, i32)))
