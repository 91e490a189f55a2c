"""Modules of a checkpoint that hold the rows of several projections: their rows, apart and together.

A projection has blocks of its own, so that its bytes do not depend on what it is stored beside.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class FusedRows:
    """How the rows of projections lie in a tensor: in equal groups, each with some rows of all.

    Attributes:
      parts: projection -> its rows in a group, in their order.
      groups: how many there are.

    >>> wqkv = FusedRows({"wq": 4, "wk": 2, "wv": 2}, groups=2)  # a key head has two query heads
    >>> wqkv.take(np.arange(16), "wk")
    array([ 4,  5, 12, 13])
    """

    parts: Mapping[str, int]
    groups: int = 1

    @property
    def rows(self) -> int:
        """Of the whole tensor."""
        return self.groups * sum(self.parts.values())

    def units(self, rows: int) -> dict[str, int] | None:
        """Projection -> its rows in a group, in a tensor of `rows`: the module's, or its scales.

        None if they are no whole ones, because blocks reach over the edge of a projection.
        """
        sizes = {name: size * rows / self.rows for name, size in self.parts.items()}
        whole = all(size.is_integer() for size in sizes.values())
        return {name: int(size) for name, size in sizes.items()} if whole else None

    def take(self, tensor: np.ndarray, part: str) -> np.ndarray:
        """The rows of one projection; a view if there is one group."""
        sizes = self.units(tensor.shape[0])
        assert sizes is not None
        start = sum(size for name, size in self._before(sizes, part))
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        return grouped[:, start : start + sizes[part]].reshape(-1, *tensor.shape[1:])

    def join(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The whole tensor, of those of the projections in their order."""
        grouped = [x.reshape(self.groups, -1, *x.shape[1:]) for x in tensors]
        return np.concatenate(grouped, axis=1).reshape(-1, *tensors[0].shape[1:])

    @staticmethod
    def _before(sizes: Mapping[str, int], part: str) -> list[tuple[str, int]]:
        items = list(sizes.items())
        return items[: list(sizes).index(part)]
