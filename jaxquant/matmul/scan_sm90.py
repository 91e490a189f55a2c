"""Running sums over groups, by a warp: where each group ends."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.hopper import interpreted
from jaxquant.matmul.ptx_sm90 import REF, address, emit, pointer
from jaxquant.matmul.sm90 import cdiv

_LANES = 32


def running_sums(sizes: Any, table: Any, step: int, alignment: int) -> None:
    """`table[0] = cumsum(sizes)`, and `table[1]` that of the steps that each group takes.

    A group of some rows takes `ceil((start % alignment + size) / step)` steps, an empty one none.
    Each warp does it by itself; who reads the table has to meet them before.

    Args:
      sizes: int32 `[E]`, GMEM, >= 0.
      table: int32 `[2, E]`, SMEM.
      step: > 0.
      alignment: a power of two.
    """
    (E,) = sizes.shape
    if interpreted():
        size = sizes[...]
        rows = jnp.cumsum(size)
        steps = ((rows - size) % alignment + size + step - 1) // step
        table[0] = rows
        table[1] = jnp.cumsum(jnp.where(size > 0, steps, 0))
        return

    @plgpu.inline_mgpu(arg_types=(REF, REF))
    def run(_, sizes, table):
        own = range(cdiv(E, _LANES))  # groups of a lane, neighbours
        lines = [
            ".reg .pred has, other; .reg .b32 t, e, v, at, sum, upto, start; .reg .b64 from;",
            *(f".reg .b32 size{i}, rows{i}, steps{i};" for i in own),
            f"mov.u32 t, %laneid; mul.lo.u32 e, t, {len(own)};",
            "mad.wide.u32 from, e, 4, $0; mad.lo.u32 at, e, 4, $1;",
        ]
        for i in own:
            lines += [
                f"add.u32 v, e, {i}; setp.lt.u32 has, v, {E}; mov.b32 size{i}, 0;",
                f"@has ld.global.nc.b32 size{i}, [from+{4 * i}];",
            ]
        lines += _scan("size", "rows", own)
        for i in own:
            lines += [
                f"sub.u32 start, rows{i}, size{i}; and.b32 start, start, {alignment - 1};",
                f"add.u32 v, start, size{i}; add.u32 v, v, {step - 1}; div.u32 v, v, {step};",
                f"setp.ne.u32 has, size{i}, 0; selp.b32 size{i}, v, 0, has;",
            ]
        lines += _scan("size", "steps", own)
        for i in own:
            lines += [
                f"add.u32 v, e, {i}; setp.lt.u32 has, v, {E};",
                f"@has st.shared.b32 [at+{4 * i}], rows{i};",
                f"@has st.shared.b32 [at+{4 * (i + E)}], steps{i};",
            ]
        emit(lines, [pointer(sizes), address(table)])

    run(sizes, table)  # pyright: ignore[reportCallIssue]


def _scan(of: str, sums: str, own: range) -> list[str]:
    """Lines that put running sums over all lanes, of which each has some neighbours."""
    lines = ["mov.b32 sum, 0;"]
    for i in own:
        lines.append(f"add.u32 sum, sum, {of}{i}; mov.b32 {sums}{i}, sum;")
    lines.append("mov.b32 upto, sum;")
    for distance in (1, 2, 4, 8, 16):
        lines += [
            f"shfl.sync.up.b32 v|other, upto, {distance}, 0, 0xffffffff;",
            "@other add.u32 upto, upto, v;",
        ]
    lines.append("sub.u32 sum, upto, sum;")  # of the lanes before
    return [*lines, *(f"add.u32 {sums}{i}, {sums}{i}, sum;" for i in own)]
