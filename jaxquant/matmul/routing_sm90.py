"""The experts of tokens on Hopper, chosen by a router's logits, and the tokens sorted by expert.

A warp has a token, and 32 of the experts in each register. k times the warp finds the best of those
that are left. A few tokens are sorted too: with all of them in one thread block, each of its
threads counts what comes before one of them.

None of this runs in Pallas' interpreter.
"""

import dataclasses
import math
import struct
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from jaxquant.matmul.ptx_sm90 import REF, SCALAR, address, emit, pointer, scalars
from jaxquant.matmul.sm90 import cdiv, round_up

_LANES = 32
# What a lane has of a token's experts in registers.
_MAX_EXPERTS = 512
# Warpgroups of the thread block that has a few tokens, and that many chosen experts, at most.
_WARPGROUPS = 4
_MAX_SORTED = 128
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Options:
    """How experts are chosen.

    Attributes:
      k: how many, of each token.
      softmax: whether scores are the softmax of logits, else their sigmoid.
      normalize: whether weights are made to add up to 1.
      scale: by which weights are multiplied then.
    """

    k: int
    softmax: bool
    normalize: bool
    scale: float


def takes(E: int, k: int) -> bool:
    """Whether a warp can choose k of E experts."""
    return E <= _MAX_EXPERTS and k <= _LANES


def sorts(T: int, k: int) -> bool:
    """Whether `route` can sort so many tokens: they are few."""
    return T * k <= _MAX_SORTED


def choose(
    logits: Float32[Array, "T E"],
    bias: Float32[Array, " E"] | None,
    options: Options,
) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
    """Weights and numbers of the experts of each token.

    Args:
      logits: the router's.
      bias: added to the scores for the choice, not for the weights.
      options: how to choose; see `takes`.
    """
    T, k = len(logits), options.k
    biases = [] if bias is None else [bias]

    def kernel(logits_gmem, *refs):
        *bias_gmem, weights_gmem, experts_gmem = refs
        refs = logits_gmem, *bias_gmem, weights_gmem, experts_gmem
        _choose(refs, None, lax.axis_index("block") * 4, 4, options)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((T, k), jnp.float32),
            jax.ShapeDtypeStruct((T, k), jnp.int32),
        ),
        grid=(cdiv(T, 4),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="jaxquant_choose_experts",
    )(logits, *biases)


def route(
    logits: Float32[Array, "T E"],
    bias: Float32[Array, " E"] | None,
    options: Options,
) -> tuple[Float32[Array, "T k"], Int32[Array, " Tk"], Int32[Array, "T k"], Int32[Array, " E"]]:
    """`choose` and `jaxquant.matmul.routing.sorted_by_expert` of it, for few tokens; see `sorts`.

    Returns:
      The weights, the tokens sorted by expert, where each token's are among them, and how many an
      expert has.
    """
    (T, E), k = logits.shape, options.k
    biases = [] if bias is None else [bias]
    warpgroups = min(_WARPGROUPS, cdiv(max(T, E // 8, 4), 4))

    def kernel(logits_gmem, *refs):
        *bias_gmem, weights_gmem, rows_gmem, places_gmem, sizes_gmem, keys, met = refs
        refs = logits_gmem, *bias_gmem, weights_gmem, places_gmem
        _choose(refs, keys, jnp.int32(0), warpgroups * 4, options)
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        _sort(keys, rows_gmem, places_gmem, sizes_gmem, warpgroups * 128)

    weights, rows, places, sizes = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((T, k), jnp.float32),
            jax.ShapeDtypeStruct((T * k,), jnp.int32),
            jax.ShapeDtypeStruct((T, k), jnp.int32),
            jax.ShapeDtypeStruct((E,), jnp.int32),
        ),
        scratch_types=[
            plgpu.SMEM((round_up(T * k, 4),), jnp.int32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="jaxquant_route",
    )(logits, *biases)
    return weights, rows, places, sizes


def _choose(refs: Any, keys: Any, first: Any, warps: int, options: Options) -> None:
    """Each warp: the experts of token `first + warp`, and of every `warps`-th from there on.

    Args:
      refs: logits, bias if there is one, weights, experts, all GMEM.
      keys: SMEM, for `expert * T * k + i` of each i of the `T * k` chosen ones; None for the whole
        T in several thread blocks.
      first: token.
      warps: how many work on it, of the thread block.
      options: see `choose`.
    """
    (T, E), k = refs[0].shape, options.k
    has_bias, sorts = len(refs) == 4, keys is not None
    shared = [keys] if sorts else []
    n = len(refs)

    @plgpu.inline_mgpu(arg_types=(*[REF] * n, SCALAR, *[REF] * len(shared)))
    def run(_, *operands):
        refs, (first, *shared) = operands[:n], operands[n:]
        own = range(cdiv(E, _LANES))
        lines = [
            ".reg .pred has, more, mine; .reg .b32 t, lane, e, v, best, which, chosen, picked, at;",
            ".reg .f32 top, total, score, weight, x; .reg .b64 from, to;",
            f".reg .b32 key<{len(own)}>; .reg .f32 score<{len(own)}>;",
            "mov.u32 lane, %laneid; mov.u32 t, %tid.x; shr.u32 t, t, 5;",
            f"add.u32 t, t, ${n};",
            *(["token:"] if sorts else []),
            f"setp.lt.u32 more, t, {T}; @!more bra done;",
            f"mad.lo.u32 e, t, {E}, lane; mad.wide.u32 from, e, 4, $0;",
        ]
        for i in own:
            lines += [
                f"add.u32 e, lane, {i * _LANES}; setp.lt.u32 has, e, {E};",
                f"mov.f32 score{i}, 0fFF800000;",
                f"@has ld.global.nc.f32 score{i}, [from+{i * _LANES * 4}];",
            ]
        if options.softmax:
            lines.append("mov.f32 top, score0; mov.f32 total, 0f00000000;")
            lines += [f"max.f32 top, top, score{i};" for i in own[1:]]
            lines += _butterfly("max.f32", "top")
            for i in own:
                lines += [
                    f"sub.f32 x, score{i}, top; mul.f32 x, x, {_hex(_LOG2_E)};",
                    f"ex2.approx.ftz.f32 score{i}, x; add.f32 total, total, score{i};",
                ]
            lines += _butterfly("add.f32", "total")
            lines += [f"div.rn.f32 score{i}, score{i}, total;" for i in own]
        else:
            for i in own:
                lines += [
                    f"mul.f32 x, score{i}, {_hex(-_LOG2_E)}; ex2.approx.ftz.f32 x, x;",
                    f"add.f32 x, x, 0f3F800000; rcp.rn.f32 score{i}, x;",
                ]
        if has_bias:
            lines.append("mad.wide.u32 from, lane, 4, $1;")
        for i in own:
            lines += [f"add.u32 e, lane, {i * _LANES}; setp.lt.u32 has, e, {E};"]
            lines.append(f"mov.f32 x, score{i};")
            if has_bias:
                lines += [
                    "mov.f32 weight, 0f00000000;",
                    f"@has ld.global.nc.f32 weight, [from+{i * _LANES * 4}];",
                    "add.f32 x, x, weight;",
                ]
            # As unsigned integers these are in the order of the merits, 0 being the least.
            lines += [
                f"mov.b32 v, x; shr.s32 key{i}, v, 31; or.b32 key{i}, key{i}, 0x80000000;",
                f"xor.b32 key{i}, key{i}, v; selp.b32 key{i}, key{i}, 0, has;",
            ]
        lines += [
            "mov.b32 picked, 0; mov.b32 chosen, 0; mov.f32 weight, 0f00000000;",
            "pick: mov.b32 best, key0; mov.b32 which, 0xffffffff;",
            *(f"max.u32 best, best, key{i};" for i in own[1:]),
            "redux.sync.max.u32 best, best, 0xffffffff;",
        ]
        for i in reversed(own):  # the first of those that are equal
            lines += [
                f"setp.eq.u32 has, key{i}, best; add.u32 e, lane, {i * _LANES};",
                "@has mov.b32 which, e;",
            ]
        lines.append("redux.sync.min.u32 which, which, 0xffffffff; mov.f32 score, score0;")
        for i in own:
            lines += [
                f"add.u32 e, lane, {i * _LANES}; setp.eq.u32 has, e, which;",
                f"@has mov.b32 key{i}, 0; @has mov.f32 score, score{i};",
            ]
        lines += [
            f"and.b32 e, which, {_LANES - 1}; shfl.sync.idx.b32 score, score, e, 31, 0xffffffff;",
            "setp.eq.u32 mine, lane, picked;",
            "@mine mov.b32 chosen, which; @mine mov.f32 weight, score;",
            f"add.u32 picked, picked, 1; setp.lt.u32 has, picked, {k}; @has bra pick;",
        ]
        if options.normalize:
            lines += [
                "mov.f32 total, weight;",
                *_butterfly("add.f32", "total"),
                f"add.f32 total, total, {_hex(1e-20)}; div.rn.f32 weight, weight, total;",
            ]
        if options.scale != 1:
            lines.append(f"mul.f32 weight, weight, {_hex(options.scale)};")
        lines += [
            f"setp.lt.u32 mine, lane, {k}; mad.lo.u32 e, t, {k}, lane;",
            f"mad.wide.u32 to, e, 4, ${n - 2}; @mine st.global.f32 [to], weight;",
        ]
        if sorts:
            lines += [
                f"mad.lo.u32 v, chosen, {T * k}, e; mad.lo.u32 at, e, 4, ${n + 1};",
                "@mine st.shared.b32 [at], v;",
                f"add.u32 t, t, {warps}; bra token;",
            ]
        else:
            lines.append(f"mad.wide.u32 to, e, 4, ${n - 1}; @mine st.global.b32 [to], chosen;")
        lines.append("done:")
        emit(lines, [*map(pointer, refs), *scalars(first), *map(address, shared)])

    run(*refs, first, *shared)  # pyright: ignore[reportCallIssue]


def _sort(keys: Any, rows: Any, places: Any, sizes: Any, threads: int) -> None:
    """Each thread counts what is before one of the chosen, and the tokens of one of the experts."""
    (E,), (T, k) = sizes.shape, places.shape
    n, padded = T * k, keys.shape[0]

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF))
    def run(_, keys, rows, places, sizes):
        lines = [
            ".reg .pred has, less, mine; .reg .b32 t, i, j, at, key, low, place, size, v, w<4>;",
            ".reg .b64 to; mov.u32 t, %tid.x; mov.b32 i, t;",
            *(f"st.shared.b32 [$0+{4 * j}], 0x7fffffff;" for j in range(n, padded)),
        ]
        if padded > n:
            lines.append("bar.sync 0;")
        lines += [
            "several:",
            f"min.u32 v, i, {n - 1}; mad.lo.u32 at, v, 4, $0; ld.shared.b32 key, [at];",
            f"mul.lo.u32 low, i, {n}; mov.b32 place, 0; mov.b32 size, 0;",
            "mov.b32 at, $0; mov.b32 j, 0;",
            "count: ld.shared.v4.b32 {w0, w1, w2, w3}, [at];",
        ]
        for j in range(4):
            lines += [
                f"setp.lt.s32 less, w{j}, key; @less add.u32 place, place, 1;",
                f"sub.u32 v, w{j}, low; setp.lt.u32 less, v, {n}; @less add.u32 size, size, 1;",
            ]
        lines += [
            f"add.u32 at, at, 16; add.u32 j, j, 4; setp.lt.u32 less, j, {n}; @less bra count;",
            f"setp.lt.u32 mine, i, {E}; mad.wide.u32 to, i, 4, $3;",
            "@mine st.global.b32 [to], size;",
            f"setp.lt.u32 mine, i, {n}; mad.wide.u32 to, i, 4, $2;",
            f"@mine st.global.b32 [to], place; div.u32 v, i, {k};",
            "mad.wide.u32 to, place, 4, $1; @mine st.global.b32 [to], v;",
            f"add.u32 i, i, {threads}; setp.lt.u32 mine, i, {max(n, E)}; @mine bra several;",
        ]
        emit(lines, [address(keys), *map(pointer, (rows, places, sizes))])

    run(keys, rows, places, sizes)  # pyright: ignore[reportCallIssue]


def _butterfly(operation: str, register: str) -> list[str]:
    """Lines that reduce a float over the lanes of a warp, with x for what another has."""
    return [
        f"shfl.sync.bfly.b32 x, {register}, {distance}, 31, 0xffffffff; "
        f"{operation} {register}, {register}, x;"
        for distance in (16, 8, 4, 2, 1)
    ]


def _hex(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"
