"""Modules of a checkpoint that hold the rows of several projections, apart and together.

Each projection has blocks of its own, so that its bytes do not depend on how it is stored. The
tensor of a projection is named as if its module lay inside the one that holds it: the rows of
`self_attn.qkv_proj.weight` are `self_attn.qkv_proj.q_proj.weight` and so on.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class FusedRows:
    """How the rows of projections lie in a tensor: in equal groups, each with some rows of all.

    Attributes:
      parts: projection -> its rows in a group, in their order.
      groups: how many there are.

    >>> wqkv = FusedRows({"wq": 4, "wk": 2, "wv": 2}, groups=2)  # two query heads to a key head
    >>> wqkv.take(np.arange(16), "wk")
    array([ 4,  5, 12, 13])
    """

    parts: Mapping[str, int]
    groups: int = 1

    def take(self, tensor: np.ndarray, part: str, block: int = 1) -> np.ndarray:
        """The rows of one projection; a view if there is one group.

        Args:
          tensor: the whole, or its scales.
          part: which one.
          block: rows of the whole to a row of `tensor`; see `fits`.
        """
        before = itertools.takewhile(lambda name: name != part, self.parts)
        start = sum(self.parts[name] for name in before) // block
        stop = start - (-self.parts[part] // block)
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        return grouped[:, start:stop].reshape(-1, *tensor.shape[1:])

    def runs(self, height: int, part: str, rows: range, block: int = 1) -> list[range]:
        """Where rows of one projection lie in the whole, piece by piece.

        Args:
          height: rows of the whole tensor.
          part: which projection.
          rows: of it.
          block: as in `take`.

        >>> FusedRows({"wq": 4, "wk": 2, "wv": 2}, groups=2).runs(16, "wk", range(1, 4))
        [range(5, 6), range(12, 14)]
        """
        where = self.take(np.arange(height), part, block)[rows.start : rows.stop]
        cuts = np.flatnonzero(np.diff(where) != 1) + 1
        return [range(int(run[0]), int(run[-1]) + 1) for run in np.split(where, cuts) if run.size]

    def join(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The whole tensor, or its scales, of those of the projections in their order."""
        grouped = [x.reshape(self.groups, -1, *x.shape[1:]) for x in tensors]
        return np.concatenate(grouped, axis=1).reshape(-1, *tensors[0].shape[1:])

    def fits(self, block: int) -> bool:
        """Whether no block of so many rows has rows of two projections, or of two groups."""
        *others, last = self.parts.values()
        return not any(size % block for size in others) and (self.groups == 1 or not last % block)


def split_name(name: str, fused: Mapping[str, FusedRows]) -> tuple[str, str] | None:
    """The name of a projection's tensor as that of the whole, and the projection's; or None."""
    *prefix, module, part, kind = ("", "", *name.split("."))
    if module not in fused or part not in fused[module].parts:
        return None
    return ".".join((*prefix[2:], module, kind)), part


def whole_name(name: str, fused: Mapping[str, FusedRows]) -> str:
    """The name of the tensor in the checkpoint."""
    whole, _ = split_name(name, fused) or (name, "")
    return whole


def rows_of(name: str, fused: Mapping[str, FusedRows]) -> FusedRows | None:
    """How the rows of a whole tensor lie, if it is fused."""
    return fused.get(name.split(".")[-2]) if "." in name else None


def pieces(height: int, row: int, group: tuple[int, int] | None) -> list[tuple[range, int]]:
    """The rows of a tensor piece by piece, and where each piece begins in a parameter.

    Args:
      height: rows of the tensor.
      row: where the first one is.
      group: rows of a piece, and from where one begins to where the next one does; None is one
        piece.

    >>> pieces(4, 6, (2, 8))
    [(range(0, 2), 6), (range(2, 4), 14)]
    """
    size, step = group or (height, 0)
    starts = range(0, height, size) if height else ()
    return [(range(at, at + size), row + i * step) for i, at in enumerate(starts)]


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """How the experts of a layer lie in two tensors `[E, N, K]`, as transformers 5 has them.

    `X.experts.gate_up_proj` is every `X.experts.3.gate_proj.weight` and `up_proj`, in the same way
    `down_proj`.

    Attributes:
      num_experts: of a layer.
      tensors: name -> how the rows of an expert's projections lie in it.
      renamed: part of a path -> what it is called where experts are not stacked.
    """

    num_experts: int
    tensors: Mapping[str, FusedRows]
    renamed: Mapping[str, str]

    def match(self, name: str) -> tuple[str, FusedRows, str] | None:
        """What comes before an expert's number, its rows and the end of its name; or None."""
        found = re.fullmatch(r"(.*\bexperts)\.(\w+?)(?:\.weight)?(_scale_inv|_scale)?", name)
        if found is None or found[2] not in self.tensors:
            return None
        return self.rename(found[1]), self.tensors[found[2]], f"weight{found[3] or ''}"

    def rename(self, name: str) -> str:
        """The name of a tensor or module where experts are not stacked."""
        return ".".join(self.renamed.get(part, part) for part in name.split("."))
