"""What decode attention kernels for Hopper share: how work is cut, and sums over a cluster."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.matmul.sm90 import round_up

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
# The maximum and the sum of the weights, and padding, since 128 threads share a copy.
STATISTICS = 4
# SMEM of a multiprocessor, and what a thread block loses of its share to barriers and alignment.
SMEM_BYTES = 228 << 10
SMEM_RESERVED = 5 << 10


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tile: slots of the cache in a tile, a multiple of 64.
      stages: tiles of keys and tiles of values that SMEM holds, at least 2.
      splits: thread blocks that share a head, 1 to 8.
    """

    tile: int
    stages: int
    splits: int


def padded_group(G: int) -> int:
    """Query heads that a kernel computes for a group of G: a width that wgmma has.

    Not a multiple of 32: such a row of float32 would hit the same SMEM banks as the next one.
    """
    N = round_up(G, 8)
    return N + 8 if N % 32 == 0 else N


def column(value: Any, N: int) -> Any:
    """The same value for each query head."""
    return plgpu.layout_cast(jnp.full((N,), value, jnp.float32), COLUMN)


def across(values: Any, rows: int) -> Any:
    """Values of columns `[N]` in each of so many rows."""
    return lax.broadcast_in_dim(values, (rows, *values.shape), [1])


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The thread blocks that share a head: each leaves its part of the sum in GMEM.

    Attributes:
      heads: of all sequences.
      splits: thread blocks of a cluster.
      rows: dims of a head.
      N: query heads of a group, padded.
    """

    heads: int
    splits: int
    rows: int
    N: int

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Shapes of a part: the sum, its maximum and weight."""
        return ((self.rows, self.N), (STATISTICS, self.N)) if self.splits > 1 else ()

    @property
    def out_type(self) -> list[jax.ShapeDtypeStruct]:
        """Of the kernel, to follow its result."""
        lead = self.heads * self.splits
        return [jax.ShapeDtypeStruct((lead, *part), jnp.float32) for part in self.parts]

    @property
    def scratch(self) -> list[Any]:
        """Of the kernel."""
        if self.splits == 1:
            return []
        return [
            *(plgpu.SMEM(part, jnp.float32) for part in self.parts),
            plgpu.Barrier(num_arrivals=len(self.parts)),
            plgpu.ClusterBarrier(collective_axes=("split",)),
        ]

    @property
    def axes(self) -> dict[str, Any]:
        """Options of the kernel."""
        return {"cluster": (self.splits,), "cluster_names": ("split",)} if self.splits > 1 else {}

    def add_up(
        self, sums: tuple, head: Any, split: Any, parts_gmem: Any, exchange: Any, write: Any
    ) -> None:
        """`write(total, weight)` of the sums of all thread blocks, by the first.

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
            write(total, weight)
            return

        sum_smem, statistics_smem, landed, arrived = exchange
        sum_smem[...] = total
        statistics_smem[0] = maximum
        statistics_smem[1] = weight
        plgpu.commit_smem()
        for part_smem, part_gmem in zip((sum_smem, statistics_smem), parts_gmem, strict=True):
            plgpu.copy_smem_to_gmem(part_smem, part_gmem.at[head * self.splits + split])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(arrived)
        plgpu.barrier_wait(arrived)

        def add_parts(*parts_smem):
            sums_smem, statistics_smem = parts_smem
            for part_gmem, part_smem in zip(parts_gmem, parts_smem, strict=True):
                plgpu.copy_gmem_to_smem(
                    part_gmem.at[pl.ds(head * self.splits, self.splits)], part_smem, landed
                )
            plgpu.barrier_wait(landed)

            def add_part(i, carry):
                total, maximum, weight = carry
                part = plgpu.load(sums_smem.at[i], layout=WGMMA)
                part_maximum = plgpu.load(statistics_smem.at[i, 0], layout=COLUMN)
                part_weight = plgpu.load(statistics_smem.at[i, 1], layout=COLUMN)
                new_maximum = jnp.maximum(maximum, part_maximum)
                shrink, part_shrink = (jnp.exp2(m - new_maximum) for m in (maximum, part_maximum))
                total = total * across(shrink, self.rows) + part * across(part_shrink, self.rows)
                return total, new_maximum, weight * shrink + part_weight * part_shrink

            # The first part has a tile, or the new token, so that its maximum is finite.
            zeros = plgpu.layout_cast(jnp.zeros((self.rows, self.N), jnp.float32), WGMMA)
            init = zeros, column(-jnp.inf, self.N), column(0, self.N)
            total, _, weight = lax.fori_loop(0, self.splits, add_part, init)
            return total, weight

        @pl.when(split == 0)
        def _combine():
            parts_smem = [plgpu.SMEM((self.splits, *part), jnp.float32) for part in self.parts]
            write(*pl.run_scoped(add_parts, *parts_smem, collective_axes="warpgroup"))
