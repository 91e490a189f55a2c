"""What decode attention kernels for Hopper share: how work is cut, and sums over a cluster."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxquant.blocked import ACTIVATION_AMAX_FLOOR, ACTIVATION_GROUP
from jaxquant.hopper import interpreted
from jaxquant.matmul import gemv_sm90
from jaxquant.matmul.arithmetic_sm90 import quotient, reciprocal
from jaxquant.matmul.exchange_sm90 import COUNTER, expect, receive, send, wait
from jaxquant.matmul.sm90 import FP8, round_up, swizzled
from jaxquant.matmul.tokens import QuantizedTokens, kernel_layout

WGMMA = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
# A value for each slot or dim of an accumulator, and one for each query head, in every thread that
# holds its row or column.
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)

# The largest cluster that fits everywhere. Of 16, too few fit into an H200 at a time.
MAX_SPLITS = 8
# More were slower: then fewer thread blocks fit into a multiprocessor.
MAX_STAGES = 3
# SMEM of a multiprocessor, and what a thread block loses of its share to barriers and alignment.
SMEM_BYTES = 228 << 10
SMEM_RESERVED = 5 << 10
_FMAX = 448.0


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile: slots of the cache in a tile, a multiple of 64; over FP8, 128.
      stages: tiles of keys and tiles of values that SMEM holds, at least 2; of FP8 values, one
        fewer.
      splits: thread blocks that share a head, 1 to 8.
      heads: of a thread block, 1, or 2 with a warpgroup each; 2 only over FP8, without splits.
    """

    tile: int
    stages: int
    splits: int
    heads: int = 1


def padded_group(G: int) -> int:
    """Query heads that a kernel computes for a group of G: a width that wgmma has.

    Not a multiple of 32: such a row of float32 would hit the same SMEM banks as the next one.
    """
    N = round_up(G, 8)
    return N + 8 if N % 32 == 0 else N


def default_cut(
    heads: int, S: int, tile: int, sms: int, fitting_stages: Callable[[int, int], int]
) -> tuple[int, int]:
    """Stages and splits: as many as leave each multiprocessor at most one thread block.

    Args:
      heads: of all sequences.
      S: slots; more splits than tiles would leave some without one.
      tile: slots of a tile.
      sms: multiprocessors.
      fitting_stages: what SMEM holds for (thread blocks on a multiprocessor, splits).
    """
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * heads <= sms and splits * tile < S:
        splits *= 2
    while True:
        # Larger clusters than pairs do not find places for a thread block on each multiprocessor.
        alone = heads * splits <= (sms if splits <= 2 else sms * 3 // 4)
        stages = fitting_stages(1 if alone else 2, splits)
        if stages >= 2:
            return min(stages, MAX_STAGES), splits
        if splits == 1:
            return min(fitting_stages(1, 1), MAX_STAGES), 1
        splits //= 2


def is_quantizable(B: int, H: int, G: int, D: int) -> bool:
    """Whether a kernel can leave its result quantized, and the product that follows gains by it."""
    whole = D % ACTIVATION_GROUP == 0 and (G < 8 or G == padded_group(G))
    return whole and not gemv_sm90.takes(B, H * G * D)


def in_place(
    kernel: Callable[..., Any], operands: Sequence[Array], cache: Sequence[Array]
) -> tuple[Any, list[Array]]:
    """What `kernel(*operands, *refs)` returns, and the cache, of which the refs are, after it.

    Barriers keep slices of its operands and results apart from it. XLA would make one fusion of
    them, which forgets what is written in place, and so loses it (jax 0.11.2 and 0.12).
    """
    operands, cache = lax.optimization_barrier((tuple(operands), list(cache)))
    refs = [jax.new_ref(a) for a in cache]
    results = kernel(*operands, *refs)
    return lax.optimization_barrier((results, [jax.freeze(ref) for ref in refs]))


def column(value: Any, N: int) -> Any:
    """The same value for each query head."""
    return plgpu.layout_cast(jnp.full((N,), value, jnp.float32), COLUMN)


def across(values: Any, rows: int) -> Any:
    """Values of columns `[N]` in each of so many rows."""
    return lax.broadcast_in_dim(values, (rows, *values.shape), [1])


def reduced(operation: str, value: Any, scratch: Any = None) -> Any:
    """The maximum or the sum over the rows of a value in the layout of wgmma.

    Args:
      operation: "max" or "add".
      value: float32, of N columns.
      scratch: SMEM of this warpgroup, a multiple of 256 floats; without it, Pallas finds some, the
        same for all warpgroups.
    """
    if scratch is None or interpreted():
        return {"max": jnp.max, "add": jnp.sum}[operation](value, axis=0)
    result = plgpu.ShapeDtypeStruct(value.shape[1:], jnp.dtype(jnp.float32), layout=COLUMN)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()), return_type=result)
    def run(_, value, scratch):
        return value.reduce(operation, 0, scratch)

    return run(value, scratch)  # pyright: ignore[reportCallIssue]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The thread blocks that share a head: each hands its part of the result to the first.

    A part is a mean over slots, and the logarithm of the sum of the weights.

    Attributes:
      heads: of all sequences.
      splits: thread blocks of a cluster.
      rows: dims of a head, a multiple of 64.
      N: query heads of a group, padded.
    """

    heads: int
    splits: int
    rows: int
    N: int

    @property
    def parts(self) -> tuple[int, ...]:
        """The shape of all but the first: means, and 64 rows of logarithms."""
        return self.splits - 1, self.rows + 64, self.N

    @property
    def nbytes(self) -> int:
        """SMEM that the parts take."""
        return math.prod(self.parts) * 4

    @property
    def out_type(self) -> list[jax.ShapeDtypeStruct]:
        """Of the kernel, to follow its result."""
        if self.splits == 1 or not interpreted():
            return []
        # The interpreter knows no SMEM of other thread blocks.
        return [jax.ShapeDtypeStruct((self.heads, *self.parts), jnp.float32)]

    @property
    def scratch(self) -> list[Any]:
        """Of the kernel."""
        if self.splits == 1:
            return []
        parts = [] if interpreted() else [plgpu.SMEM(self.parts, jnp.float32), COUNTER]
        return [plgpu.ClusterBarrier(collective_axes=("split",)), *parts]

    @property
    def axes(self) -> dict[str, Any]:
        """Options of the kernel."""
        return {"cluster": (self.splits,), "cluster_names": ("split",)} if self.splits > 1 else {}

    def begin(self, split: Any, exchange: Any) -> None:
        """What has to be done long before `add_up`, with the same arguments."""
        if self.splits == 1 or interpreted():
            return
        met, _, counter = exchange

        @pl.when(split == 0)
        def _expect():
            expect(counter, self.nbytes)

        plgpu.commit_smem()
        plgpu.barrier_arrive(met)

    def add_up(
        self, sums: tuple, head: Any, split: Any, parts_gmem: Any, exchange: Any, write: Any
    ) -> None:
        """`write(total / weight)` of the sums of all thread blocks, by the first.

        Args:
          sums: this one's total `[rows, N]`, its maximum `[N]` and the sum of its weights `[N]`.
          head: which one.
          split: which thread block of its cluster.
          parts_gmem: of `out_type`.
          exchange: of `scratch`.
          write: does with the result what is to be done.
        """
        total, maximum, weight = sums
        if self.splits == 1:
            write(total / across(weight, self.rows))
            return
        # Without a tile, the mean is 0 / 1 and the logarithm that of 0.
        mean = total / across(jnp.where(weight > 0, weight, column(1, self.N)), self.rows)
        log = across(maximum + jnp.log2(weight), 64)
        if interpreted():
            met, parts, counter = *exchange, parts_gmem[0].at[head], None
        else:
            met, parts, counter = exchange
            plgpu.barrier_wait(met)

        @pl.when(split > 0)
        def _send():
            send(lax.concatenate([mean, log], 0), parts.at[split - 1], counter)

        if interpreted():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        @pl.when(split == 0)
        def _combine():
            wait(counter)
            others = [receive(parts.at[i]) for i in range(self.splits - 1)]
            means = [mean, *(part[: self.rows] for part in others)]
            logs = [log, *(part[self.rows :] for part in others)]
            # That of the first is finite: it has a tile, or the new token.
            largest = functools.reduce(jnp.maximum, logs)
            shares = [jnp.exp2(log - largest) for log in logs]
            inverse = 1 / functools.reduce(jnp.add, shares)

            def weighted_mean(rows):
                parts = [share * mean[rows] for share, mean in zip(shares, means, strict=True)]
                return functools.reduce(jnp.add, parts) * inverse

            # As many rows at a time as have logarithms.
            pieces = [weighted_mean(slice(i, i + 64)) for i in range(0, self.rows, 64)]
            write(lax.concatenate(pieces, 0) if len(pieces) > 1 else pieces[0])


@dataclasses.dataclass(frozen=True)
class Result:
    """What a kernel leaves: bfloat16, or FP8 as the product that follows takes it.

    Attributes:
      B: sequences.
      H: key/value heads.
      G: query heads that share one.
      D: dims of a head.
      quantized: whether it is FP8; see `is_quantizable`.
    """

    B: int
    H: int
    G: int
    D: int
    quantized: bool

    @property
    def out_type(self) -> list[jax.ShapeDtypeStruct]:
        """Of the kernel."""
        # TMA leaves out what is beyond fewer than 8 rows.
        rows = self.G if self.G < 8 else padded_group(self.G)
        if not self.quantized:
            return [jax.ShapeDtypeStruct((self.B * self.H, rows, self.D), jnp.bfloat16)]
        qvalue, scale = kernel_layout(self.B, self.H * self.G * self.D)
        tokens = qvalue.shape[0]
        return [jax.ShapeDtypeStruct((tokens * self.H, self.G, self.D), FP8), scale]

    def scratch(self, dims: int, N: int, heads: int = 1) -> list[Any]:
        """What `write` takes of SMEM, for so many heads of so many rows and columns."""
        dtype = FP8 if self.quantized else jnp.bfloat16
        scratch = [plgpu.SMEM((heads, N, dims), dtype, transforms=swizzled(self.D, dtype))]
        if self.quantized:
            scratch.append(plgpu.SMEM((heads, dims // ACTIVATION_GROUP, N), jnp.float32))
        return scratch

    def write(self, y: Any, head: Any, out_gmem: Any, smem: Any, reduce: Any) -> None:
        """Stores a head's result.

        Args:
          y: `[D, N]`, not rounded yet; of the rows behind D, and of the columns behind G, nothing
            is stored.
          head: of all sequences.
          out_gmem: of `out_type`.
          smem: a head's of `scratch`.
          reduce: over rows; see `reduced`.
        """
        y = y.astype(jnp.bfloat16)
        dims, N = y.shape
        y_gmem, y_smem = out_gmem[0], smem[0]
        # Slices that start here may reach beyond the array. Pallas would refuse static ones.
        zero = lax.mul(head, 0)
        target = y_gmem.at[head, pl.ds(zero, N), pl.ds(zero, dims)]

        groups = range(dims // ACTIVATION_GROUP) if self.quantized else ()
        for i in groups:
            dims_of = slice(i * ACTIVATION_GROUP, (i + 1) * ACTIVATION_GROUP)
            values = y[dims_of].astype(jnp.float32)
            scale = scale_of(reduce("max", jnp.abs(values)))
            full, inverse = (across(a, len(values)) for a in (scale, reciprocal(scale, COLUMN)))
            values = plgpu.layout_cast(quotient(values, full, inverse, WGMMA), TRANSPOSED)
            y_smem.at[:, pl.ds(dims_of.start, ACTIVATION_GROUP)].T[...] = values.astype(FP8)
            smem[1][i] = scale
        if not self.quantized:
            y_smem.T[...] = plgpu.layout_cast(y, TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, target)
        b, h = lax.div(head, self.H), lax.rem(head, self.H)
        for g in range(self.G):
            for i in groups:
                out_gmem[1][(h * self.G + g) * len(groups) + i, b] = smem[1][i, g]
        # That it arrives is for the kernel's end to wait for.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def of(self, out: Any) -> Any:
        """`[B, Hq, D]`, or QuantizedTokens, of what the kernel left."""
        if not self.quantized:
            return out[0][:, : self.G].reshape(self.B, self.H * self.G, self.D)
        qvalue, scale = out
        K = self.H * self.G * self.D
        return QuantizedTokens(qvalue.reshape(-1, K), scale, (self.B,), jnp.dtype(jnp.bfloat16))


def scale_of(amax: Any) -> Any:
    """`max(amax, 1e-10) / 448` of columns `[N]`."""
    (N,) = amax.shape
    fmax = column(_FMAX, N)
    return quotient(
        jnp.maximum(amax, ACTIVATION_AMAX_FLOOR), fmax, reciprocal(fmax, COLUMN), COLUMN
    )
