"""Tiles of rows that are sorted by group, of sizes that only the device knows.

A group has as many tiles along its rows as it needs, all with the same rows but the last. They
begin at multiples of `ALIGNMENT` rows, so that the first may begin with rows of the group before,
and the last may end with some of the next.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxquant.matmul.scan_sm90 import running_sums

# Tiles begin at multiples of so many rows: TMA counts in whole tiles of SMEM.
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Groups:
    """What there is to find.

    Attributes:
      table: int32 `[2, E]`, SMEM: where each group ends, in rows and in tiles along the rows.
      T: rows. Those beyond all groups are a group of their own, the last.
      most: rows of a tile, at most.
      step: of which the rows of a tile are a multiple.
      across: tiles that have the same rows.
    """

    table: Any
    T: int
    most: int
    step: int
    across: int

    def count(self, sizes: Any) -> None:
        """Fills the table, from the sizes in GMEM; see `running_sums`."""
        running_sums(sizes, self.table, self.most, ALIGNMENT)

    def tiles(self) -> Any:
        """How many there are, those of the rows beyond all groups included."""
        last = self.table.shape[1] - 1
        rest = self._along(self.table[0, last], self.T)
        return (self.table[1, last] + rest) * self.across

    def find(self, tile: Any) -> tuple[Any, Any, Any, Any, Any]:
        """A tile's group, which it is across, its first row, and its group's rows, from and to."""
        last_row, last_tile, E = self.table.at[0], self.table.at[1], self.table.shape[1]
        group = jnp.int32(0)
        for bit in reversed(range(E.bit_length())):
            further = group + (1 << bit)
            before = last_tile[jnp.minimum(further, E) - 1] * self.across <= tile
            group = jnp.where((further <= E) & before, further, group)
        previous = jnp.maximum(group - 1, 0)
        start = jnp.where(group == 0, 0, last_row[previous])
        stop = jnp.where(
            group == E, self.T, jnp.minimum(last_row[jnp.minimum(group, E - 1)], self.T)
        )
        index = tile - jnp.where(group == 0, 0, last_tile[previous]) * self.across
        offset = lax.rem(start, ALIGNMENT)
        count = jnp.maximum(self._along(start, stop), 1)
        rows = lax.div(offset + stop - start + count - 1, count)
        rows = lax.div(rows + self.step - 1, self.step) * self.step
        # Tiles of the same rows of the weight are neighbours, so that L2 has these.
        begin = start - offset + lax.rem(index, count) * rows
        low = jnp.maximum(start - begin, 0)
        high = jnp.maximum(jnp.minimum(stop - begin, rows), low)
        return group, lax.div(index, count), begin, low, high

    def _along(self, start: Any, stop: Any) -> Any:
        """Tiles along the rows of a group."""
        rows = lax.rem(start, ALIGNMENT) + stop - start
        return jnp.where(stop > start, lax.div(rows + self.most - 1, self.most), 0)
