"""Stores of what a product has in registers, transposed, and of some of its columns only.

A tile with the weight's rows along wgmma's 64-row side has a token in each column. It goes to GMEM
by way of SMEM, to which one instruction transposes 8x8 values. From there threads copy whole
lines, of any number of tokens; TMA copies rectangles of sizes that are known beforehand.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxquant.hopper import interpreted
from jaxquant.matmul.ptx_sm90 import (
    BARRIER,
    MEET,
    REF,
    SCALAR,
    THREAD,
    THREADS,
    address,
    emit,
    pointer,
    scalars,
)

# Columns that are in SMEM at a time.
STAGED = 64
_ROWS = 64
# What the rows of a column take, and what of it a thread copies.
_LINE = 2 * _ROWS
_BYTES = 16
# Columns that a warpgroup copies at once.
_COPIED = THREADS * _BYTES // _LINE


def store_transposed(
    value: Any, staging: Any, y: Any, token: Any, column: Any, low: Any, high: Any
) -> None:
    """`y[token + i, column : column + 64] = value[:, i]` for low <= i < high, by a warpgroup.

    Args:
      value: float32 `[64, n]` in the layout of wgmma, n a multiple of 8.
      staging: bfloat16 `[STAGED, 64]`, SMEM, the warpgroup's own.
      y: bfloat16 `[T, N]`, GMEM; N a multiple of 8.
      token: which row of y.
      column: a multiple of 8.
      low: where to begin.
      high: where to end.
    """
    n, N = value.shape[1], y.shape[1]
    if interpreted():
        value = value.astype(jnp.bfloat16).T

        def store_token(i, _):
            y[token + i, pl.ds(column, _ROWS)] = lax.dynamic_index_in_dim(value, i, keepdims=False)

        lax.fori_loop(low, high, store_token, None)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, REF, REF, *[SCALAR] * 4))
    def run(_, value, staging, y, *bounds):
        i32 = ir.IntegerType.get_signless(32)
        floats = [
            llvm.extractelement(register, utils.c(i, i32))
            for register in value.registers.flat
            for i in range(2)
        ]
        # Of two tokens each: rows r and r + 8 of these, r and r + 8 of the next 8 tokens, ...
        pairs = [f"${6 + i + 1}, ${6 + i}" for i in range(0, len(floats), 2)]
        lines = [
            ".reg .pred mine; .reg .b32 t, l, c, i, at, from, id; .reg .b64 to; .reg .b32 v<4>;",
            f".reg .b32 p<{len(pairs)}>; {THREAD} {BARRIER} and.b32 l, t, 31;",
            *(f"cvt.rn.bf16x2.f32 p{i}, {pair};" for i, pair in enumerate(pairs)),
            # A warp has 16 rows, and stores 4 matrices at once: 8 rows and the next 8, of 8 tokens
            # and the next 8. Lane l has the address of what becomes line l % 8 of matrix l / 8.
            # Chunk c of line i is at c ^ i % 8 of the line, against conflicts.
            "shr.u32 c, t, 5; shl.b32 c, c, 1; shr.u32 i, l, 3; and.b32 i, i, 1; add.u32 c, c, i;",
            "and.b32 i, l, 7; xor.b32 c, c, i; shl.b32 c, c, 4;",
            f"shr.u32 at, l, 4; mad.lo.u32 at, at, 8, i; mad.lo.u32 at, at, {_LINE}, c;",
            "add.u32 at, at, $1;",
            # Then thread t copies chunk t % 8 of line t / 8.
            "and.b32 c, t, 7; shr.u32 i, t, 3;",
            "xor.b32 from, c, i; and.b32 from, from, 7; shl.b32 from, from, 4;",
            f"mad.lo.u32 from, i, {_LINE}, from; add.u32 from, from, $1;",
            f"add.u32 l, i, $2; mad.wide.u32 to, l, {N * 2}, $0;",
            f"mad.lo.u32 c, c, {_BYTES // 2}, $3; mad.wide.u32 to, c, 2, to;",
        ]
        for first in range(0, n, STAGED):
            end = min(first + STAGED, n)
            lines.append(MEET)  # who copied what was there
            for j in range(first, end, 16):
                values = [f"p{j // 4 + i}" for i in range(min(4, (end - j) // 4))]
                lines.append(
                    f"stmatrix.sync.aligned.m8n8.x{len(values)}.trans.shared.b16 "
                    f"[at+{(j - first) * _LINE}], {{{', '.join(values)}}};"
                )
            lines.append(MEET)
            for j in range(first, end, _COPIED):
                lines += [
                    f"add.u32 l, i, {j}; setp.ge.u32 mine, l, $4;",
                    "setp.lt.and.u32 mine, l, $5, mine;",
                    f"@mine ld.shared.v4.b32 {{v0, v1, v2, v3}}, [from+{(j - first) * _LINE}];",
                    f"@mine st.global.v4.b32 [to+{j * N * 2}], {{v0, v1, v2, v3}};",
                ]
        emit(lines, [pointer(y), address(staging), *scalars(*bounds), *floats])

    run(value, staging, y, token, column, low, high)  # pyright: ignore[reportCallIssue]
