"""Decode on Hopper: a few tokens by a blocked FP8 weight, bound by reading the weight.

The operands change places: wgmma's 64-row side runs over the weight's rows and its other side
over the tokens, so that no row of the tensor cores idles. K is split among the thread blocks of a
cluster where the weight has too few rows to keep all multiprocessors reading; the first of them
adds up the parts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from jaxquant.hopper import interpreted
from jaxquant.matmul import tuning
from jaxquant.matmul.cluster_sm90 import receive, send
from jaxquant.matmul.sm90 import (
    FP8,
    K_BLOCK,
    SCALE_ROWS,
    SMEM_BYTES,
    cdiv,
    consumer_registers,
    fill_ring,
    for_each_tile,
    in_stack,
    producer_registers,
    round_up,
    swizzled,
    zero_accumulator,
)

_TOKENS = (8, 16, 32, 64, 96, 128)
MAX_TOKENS = _TOKENS[-1]
# Bytes of the weight in a slot: few and long reads.
_SLOT_BYTES = 32 << 10
# And in the ring: enough to keep the memory busy; of 64 KB and of 160 KB, products take longer.
_RING_BYTES = 96 << 10
# K blocks of a slot, and tokens of which the products of several and their sum fit into registers.
_BLOCKS = (4, 2, 1)
_MAX_TOGETHER = 64
# With more tokens, K blocks of a tile from which on a second consumer pays.
_LONG = 56
# A barrier's phases are the bits of an int32.
_MAX_STAGES = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_n: rows of the weight in a tile: 64 or 128.
      turns: consumers that share a tile's K blocks.
      splits: thread blocks, a cluster, that share a tile's K blocks.
      blocks: K blocks in a slot of the ring. The product with `turns` and `splits` divides
        ceil(K / 128).
    """

    tile_n: int
    turns: int = 1
    splits: int = 1
    blocks: int = 1

    @property
    def groups(self) -> int:
        """Consumers that share a tile's rows."""
        return self.tile_n // 64


def takes(M: int, N: int, sms: int) -> bool:
    """Whether the product is bound by reading the weight, so that this kernel is the fast one."""
    return M <= 64 or (M <= MAX_TOKENS and 4 * cdiv(N, 128) <= sms)


def padded_tokens(M: int) -> int:
    """Tokens that the kernel computes for M: a width that wgmma has."""
    return next(width for width in _TOKENS if M <= width)


def default_config(M: int, N: int, K: int, sms: int) -> Config:
    """The tuned cut, or as many splits as leave each multiprocessor (`sms`) at most one tile."""
    tuned = tuning.lookup("decode", M, N, K)
    if tuned is not None:
        return Config(**tuned)
    steps = cdiv(K, K_BLOCK)
    tile_n = 64 if cdiv(N, 64) <= sms else 128
    tiles = cdiv(N, tile_n)
    fitting = (s for s in (4, 2) if _fits(tiles, s, sms) and _can_split(steps, s))
    splits = next(fitting, 1)
    own = steps // splits
    if M > _MAX_TOGETHER:
        long = tile_n == 64 and own >= _LONG and own % 2 == 0
        paired = Config(tile_n, 2, splits)
        return paired if long and _has_ring(paired, M) else Config(tile_n, 1, splits)
    most = _SLOT_BYTES // (tile_n * K_BLOCK)
    return Config(tile_n, 1, splits, next(b for b in _BLOCKS if b <= most and own % b == 0))


def _fits(tiles: int, splits: int, sms: int) -> bool:
    # Clusters of more than two leave some multiprocessors without one.
    return tiles * splits <= (sms if splits == 2 else sms * 3 // 4)


def cuts(M: int, N: int, K: int) -> list[Config]:
    """What may be the fastest: whatever the kernel takes, for a product of a few tokens."""
    steps = cdiv(K, K_BLOCK)
    found = [
        Config(tile_n, turns, splits, blocks)
        for tile_n, turns in ((64, 1), (64, 2), (128, 1))
        for splits in (1, 2, 4)
        for blocks in (_BLOCKS if M <= _MAX_TOGETHER else (1,))
        if (splits == 1 or _can_split(steps, splits)) and steps // splits % (turns * blocks) == 0
    ]
    return [config for config in found if _has_ring(config, M)]


def _has_ring(config: Config, M: int) -> bool:
    """Whether SMEM has two slots for each consumer of a row beside the sums that meet there."""
    tokens = padded_tokens(M)
    room = SMEM_BYTES - _sums_bytes(config, tokens)
    return room // _slot_bytes(config, tokens) >= 2 * config.turns


def _slot_bytes(config: Config, tokens: int) -> int:
    return config.blocks * ((config.tile_n + tokens) * K_BLOCK + _scale_columns(tokens) * 4)


def _scale_columns(tokens: int) -> int:
    # A slot's scales begin at a multiple of the 128 bytes that TMA needs.
    return round_up(tokens, 32)


def _sums_bytes(config: Config, tokens: int) -> int:
    return config.splits * config.turns * config.tile_n * tokens * 4


def _can_split(steps: int, splits: int) -> bool:
    # A short part has no time to fill the ring.
    return steps % splits == 0 and steps // splits >= 4


def _wrap(slot: Any, stages: int) -> Any:
    """A slot of the ring that is counted on past its end."""
    return jnp.where(slot >= stages, slot - stages, slot)


def adds_residual(M: int, N: int, out_dtype: Any, config: Config) -> bool:
    """Whether `decode` can add a residual: one that TMA reads as it writes the result."""
    return (M < 8 or M % 8 == 0) and _is_direct(N, out_dtype, config)


def _parts(config: Config) -> int:
    """Results that XLA adds up: the interpreter knows no SMEM of other thread blocks."""
    return config.splits if interpreted() else 1


def _is_direct(N: int, out_dtype: Any, config: Config) -> bool:
    # The store that transposes, and so makes y itself, is there for whole tiles of 16-bit values,
    # and would ignore the column of a second tile where y has one only.
    whole = N % 64 == 0 and N >= config.tile_n
    return _parts(config) == 1 and jnp.dtype(out_dtype).itemsize == 2 and whole


def decode(
    xq: Float[Array, "T K"],
    sx: Float32[Array, "(K+127)//128 S"],
    wq: Float[Array, "L N K"],
    sw: Float32[Array, "L (N+127)//128 (K+127)//128"],
    layer: Int32[Array, "1"],
    residual: Float[Array, "M N"] | None = None,
    *,
    M: int,
    out_dtype: Any,
    config: Config,
    sms: int,
) -> Float[Array, "M N"]:
    """`y[m, n] = sum_kb (xq[m, kb] . wq[layer, n, kb]) * sx[kb, m] * sw[layer, n // 128, kb]`.

    With a residual `y + residual`, y rounded first: `jaxquant.matmul.xla.finish`.

    Args:
      xq: float8_e4m3fn, `padded_tokens(M)` rows; K a multiple of 32.
      sx: the scales of xq, transposed; S a multiple of 64.
      wq: float8_e4m3fn, read in place; N a multiple of 8.
      sw: the scales of wq.
      layer: which matrix of the stack.
      residual: of out_dtype, see `adds_residual`.
      M: tokens, at most 128.
      out_dtype: bfloat16 or float32.
      config: see `default_config`.
      sms: multiprocessors of the GPU.

    Returns:
      `[M, N]` of `out_dtype`.
    """
    (tokens, K), N = xq.shape, wq.shape[1]
    out_dtype = jnp.dtype(out_dtype)
    tile_n, groups, turns, splits = config.tile_n, config.groups, config.turns, config.splits
    per_slot = config.blocks
    steps = cdiv(K, K_BLOCK) // splits
    consumers = groups * turns
    n_tiles = cdiv(N, tile_n)
    parts = _parts(config)
    senders = turns if parts > 1 else splits * turns
    direct = _is_direct(N, out_dtype, config)

    slots, slot_k, scale_columns = steps // per_slot, per_slot * K_BLOCK, _scale_columns(tokens)
    y_bytes = tile_n * tokens * (out_dtype.itemsize if direct else 4)
    sums_bytes = (senders - 1) * tile_n * tokens * 4
    room = SMEM_BYTES - y_bytes - sums_bytes
    blocks = min(sms // splits, n_tiles)
    stages = min(
        _MAX_STAGES,
        slots * cdiv(n_tiles, blocks),
        room // _slot_bytes(config, tokens),
        max(_RING_BYTES // (tile_n * slot_k), 2 * turns),
    )
    stages = max(stages // turns, 1) * turns
    residuals = [] if residual is None else [residual]

    def kernel(x_gmem, sx_gmem, w_gmem, sw_gmem, layer_gmem, *refs):
        *residual_gmem, y_gmem, x_smem, w_smem, sx_smem, y_smem, sums_smem = refs[:-4]
        full, empty, landed, together = refs[-4:]
        warpgroup = lax.axis_index("warpgroup")
        l = in_stack(layer_gmem[0], wq.shape[0])
        part = lax.axis_index("cluster") if splits > 1 else 0

        @pl.when(warpgroup == consumers)
        def _producer():
            if consumers > 1:  # alone, a consumer has registers enough
                producer_registers()

            def copy(tile, step, slot):
                kb = (part * slots + step) * per_slot
                rows, block = pl.ds(tile * tile_n, tile_n), pl.ds(kb * K_BLOCK, slot_k)
                scales = sx_gmem.at[pl.ds(kb, per_slot), pl.ds(0, scale_columns)]
                plgpu.copy_gmem_to_smem(w_gmem.at[l, rows, block], w_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[:, block], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(scales, sx_smem.at[slot], full.at[slot])

            fill_ring(n_tiles, slots, stages, empty, copy)

        @pl.when(warpgroup < consumers)
        def _consumer():
            if consumers > 1:
                consumer_registers(consumers)
            group, turn = lax.rem(warpgroup, groups), lax.div(warpgroup, groups)
            n_offset = group * 64
            sender = turn if parts > 1 else part * turns + turn

            def load_scale(n0, kb):
                return sw_gmem[l, lax.div(n0, SCALE_ROWS), jnp.minimum(kb, sw.shape[2] - 1)]

            def main_loop(n0, slot):
                """Adds up this consumer's K blocks. A slot's weight scales are loaded one ahead."""

                def load_scales(step):
                    kb = (part * slots + step) * per_slot
                    return [load_scale(n0, kb + b) for b in range(per_slot)]

                def add_slot(i, carry):
                    slot, w_scales, total = carry
                    next_scales = load_scales(turn + (i + 1) * turns)
                    plgpu.barrier_wait(full.at[slot])

                    def run(*accumulators):
                        for b, accumulator in enumerate(accumulators):
                            columns = pl.ds(b * K_BLOCK, K_BLOCK)
                            rows = w_smem.at[slot, pl.ds(n_offset, 64), columns]
                            plgpu.wgmma(accumulator, rows, x_smem.at[slot, :, columns].T)
                        # Made while the tensor cores are at work.
                        scales = [scale_of(slot, b, s) for b, s in enumerate(w_scales)]
                        return [accumulator[...] for accumulator in accumulators], scales

                    kind = plgpu.ACC((64, tokens), jnp.float32)
                    products, scales = pl.run_scoped(run, *[kind] * per_slot)
                    plgpu.barrier_arrive(empty.at[slot])
                    for product, scale in zip(products, scales, strict=True):
                        total += product * scale
                    return _wrap(slot + turns, stages), next_scales, total

                def scale_of(slot, b, w_scale):
                    x_scale = plgpu.load(
                        sx_smem.at[slot, b, pl.ds(0, tokens)], layout=plgpu.Layout.WGMMA.reduce(0)
                    )
                    return lax.broadcast_in_dim(x_scale * w_scale, (64, tokens), [1])

                init = slot, load_scales(turn), zero_accumulator(64, tokens)
                slot, _, total = lax.fori_loop(0, slots // turns, add_slot, init)
                return slot, total

            def fetch_residual(n0):
                """Puts a tile's residual where its results will be, once those before left."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                rows = pl.ds(n0 + n_offset, 64)
                plgpu.copy_gmem_to_smem(
                    residual_gmem[0].at[pl.ds(lax.mul(n0, 0), tokens), rows],
                    y_smem.at[group],
                    landed.at[group],
                )

            def wait_for_all():
                plgpu.commit_smem()
                plgpu.barrier_arrive(together)
                plgpu.barrier_wait(together)

            def epilogue(total, n0):
                """Registers to SMEM to GMEM; TMA drops what lies outside the result."""
                for i in range(senders - 1):
                    total += receive(sums_smem.at[i, group])
                rows = pl.ds(n0 + n_offset, 64)
                if direct:
                    y = total.astype(out_dtype)
                    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    if residuals:
                        plgpu.barrier_wait(landed.at[group])
                        added = plgpu.load(y_smem.at[group].T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                        y = (y.astype(jnp.float32) + added.astype(jnp.float32)).astype(out_dtype)
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem.at[group].T[...] = y
                    # Not `:`, since y may have fewer rows. Pallas would refuse a static slice.
                    target = y_gmem.at[pl.ds(lax.mul(n0, 0), tokens), rows]
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem[group] = total
                    target = y_gmem.at[part if parts > 1 else lax.mul(n0, 0), rows, :]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[group], target)

            def do_tile(tile, slot):
                n0 = tile * tile_n
                if residuals:

                    @pl.when(sender == 0)
                    def _fetch():
                        fetch_residual(n0)

                slot, total = main_loop(n0, slot)
                if senders == 1:
                    epilogue(total, n0)
                    return slot

                @pl.when(sender > 0)
                def _send():
                    send(total, sums_smem.at[sender - 1, group])

                wait_for_all()

                @pl.when(sender == 0)
                def _sum():
                    epilogue(total, n0)

                if n_tiles > blocks:  # what was sent is read before the next is
                    wait_for_all()
                return slot

            for_each_tile(n_tiles, jnp.int32(0) + turn, do_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if splits > 1:
        cluster: dict[str, Any] = {"cluster": (splits,), "cluster_names": ("cluster",)}
        together = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=consumers)
    else:
        cluster = {}
        together = plgpu.Barrier(num_arrivals=consumers)
    if direct:
        # TMA stores whole tiles of 8 rows, or fewer than 8.
        y_rows = M if M < 8 else round_up(M, 8)
        out_type = jax.ShapeDtypeStruct((y_rows, N), out_dtype)
        y_tiling = swizzled(N, out_dtype)
        y_smem = plgpu.SMEM((groups, tokens, 64), out_dtype, transforms=y_tiling)
    else:
        # Whole tiles, since these copies are linear: they do not stop where a part ends.
        out_type = jax.ShapeDtypeStruct((parts, round_up(N, tile_n), tokens), jnp.float32)
        y_smem = plgpu.SMEM((groups, 64, tokens), jnp.float32)
    sums_shape = (senders - 1, groups, 64, tokens) if senders > 1 else (8,)
    y = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((stages, tokens, slot_k), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, tile_n, slot_k), FP8, transforms=swizzled(K, FP8)),
            plgpu.SMEM((stages, per_slot, scale_columns), jnp.float32),
            y_smem,
            plgpu.SMEM(sums_shape, jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_barriers=groups),
            together,
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="jaxquant_decode_fp8",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **cluster,
    )(xq, sx, wq, sw, layer, *residuals)
    if not direct:
        y = y[:, :N].sum(0).T.astype(out_dtype)
    return y[:M]
