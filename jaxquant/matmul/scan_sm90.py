"""Running sums over groups, by a warp: where each group ends."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.hopper import interpreted
from jaxquant.matmul.ptx_sm90 import REF, address, emit, pointer
from jaxquant.matmul.sm90 import cdiv

_LANES = 32


def running_sums(sizes: Any, table: Any, step: int, offset: int) -> None:
    """`table[0] = cumsum(sizes)`, and `table[1]` that of `ceil((sizes + offset) / step)`.

    Empty groups have no steps either. Each warp does it by itself; who reads the table has to meet
    them before.

    Args:
      sizes: int32 `[E]`, GMEM, >= 0.
      table: int32 `[2, E]`, SMEM.
      step: > 0.
      offset: >= 0.
    """
    (E,) = sizes.shape
    if interpreted():
        size = sizes[...]
        table[0] = jnp.cumsum(size)
        table[1] = jnp.cumsum(jnp.where(size > 0, (size + offset + step - 1) // step, 0))
        return

    @plgpu.inline_mgpu(arg_types=(REF, REF))
    def run(_, sizes, table):
        own = range(cdiv(E, _LANES))  # groups of a lane, neighbours
        sums = ("rows", "steps")
        lines = [
            ".reg .pred has, other; .reg .b32 t, e, v, at; .reg .b64 from;",
            *(f".reg .b32 {s}, {s}_upto;" for s in sums),
            *(f".reg .b32 {s}{i};" for s in sums for i in own),
            "mov.u32 t, %laneid; mov.b32 rows, 0; mov.b32 steps, 0;",
            f"mul.lo.u32 e, t, {len(own)}; mad.wide.u32 from, e, 4, $0; mad.lo.u32 at, e, 4, $1;",
        ]
        for i in own:
            lines += [
                f"add.u32 v, e, {i}; setp.lt.u32 has, v, {E}; mov.b32 rows{i}, 0;",
                f"@has ld.global.nc.b32 rows{i}, [from+{4 * i}];",
            ]
        for i in own:
            lines += [
                f"add.u32 v, rows{i}, {offset + step - 1}; div.u32 v, v, {step};",
                f"setp.ne.u32 has, rows{i}, 0; selp.b32 v, v, 0, has;",
                f"add.u32 rows, rows, rows{i}; mov.b32 rows{i}, rows;",
                f"add.u32 steps, steps, v; mov.b32 steps{i}, steps;",
            ]
        lines += [f"mov.b32 {s}_upto, {s};" for s in sums]
        for distance in (1, 2, 4, 8, 16):
            for s in sums:
                lines += [
                    f"shfl.sync.up.b32 v|other, {s}_upto, {distance}, 0, 0xffffffff;",
                    f"@other add.u32 {s}_upto, {s}_upto, v;",
                ]
        lines += [f"sub.u32 {s}, {s}_upto, {s};" for s in sums]  # of the lanes before
        for i in own:
            lines.append(f"add.u32 v, e, {i}; setp.lt.u32 has, v, {E};")
            for j, s in enumerate(sums):
                lines += [
                    f"add.u32 {s}{i}, {s}{i}, {s};",
                    f"@has st.shared.b32 [at+{4 * (i + j * E)}], {s}{i};",
                ]
        emit(lines, [pointer(sizes), address(table)])

    run(sizes, table)  # pyright: ignore[reportCallIssue]
