"""What a function does with its quantized arguments: Use, and Fp8Report, a table of them."""

import dataclasses
import html
from collections.abc import Iterable
from typing import NamedTuple

from jaxquant.report import format_table, group_layers


class Use(NamedTuple):
    """One place where a program uses a quantized array.

    Attributes:
      leaf: number of the array among the quantized arguments.
      site: where: the positions of the equations, the outer ones first.
      times: how often it runs, the trips of scans multiplied; those of while loops are not known.
      primitive: what uses it.
      line: the line of user code; None for products that run as FP8.
      reason: why it was dequantized; "" for products that run as FP8.
    """

    leaf: int
    site: tuple[int, ...]
    times: int
    primitive: str
    line: str | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What became of one quantized array.

    Attributes:
      path: its '/'-joined path.
      shape: its logical shape.
      matmuls: how many FP8 products it enters, the trips of scans multiplied.
      dequantized: `(primitive, line of user code, why)` of each use that dequantizes it.
    """

    path: str
    shape: tuple[int, ...]
    matmuls: int
    dequantized: tuple[tuple[str, str, str], ...] = ()

    @property
    def notes(self) -> str:
        """How it was dequantized; or that it is not used."""
        if not self.dequantized:
            return "" if self.matmuls else "not used"
        notes = (
            f"{primitive} at {line}" + (f": {reason}" if reason else "")
            for primitive, line, reason in self.dequantized
        )
        return "dequantized for " + "; ".join(notes)


@dataclasses.dataclass(frozen=True)
class Fp8Report:
    """One LeafReport per quantized argument; prints as a table, in a notebook too."""

    leaves: tuple[LeafReport, ...]

    @property
    def dequantized(self) -> tuple[LeafReport, ...]:
        """Those that are dequantized somewhere."""
        return tuple(leaf for leaf in self.leaves if leaf.dequantized)

    @property
    def idle(self) -> tuple[LeafReport, ...]:
        """Those that enter no FP8 product."""
        return tuple(leaf for leaf in self.leaves if not leaf.matmuls)

    def summary(self) -> str:
        """One line."""
        return (
            f"{sum(leaf.matmuls for leaf in self.leaves)} FP8 matmuls of {len(self.leaves)} "
            f"quantized arrays; {len(self.dequantized)} dequantized, {len(self.idle)} in no matmul"
        )

    def __str__(self) -> str:
        return f"{format_table(*self._table())}\n{self.summary()}"

    def _repr_html_(self) -> str:
        header, rows = self._table()

        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(r, "td") for r in rows)
        caption = html.escape(self.summary())
        return f"<table><caption>{caption}</caption>{row(header, 'th')}{body}</table>"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        groups = group_layers(self.leaves, lambda l: (l.path, l.shape, l.notes))
        rows = [
            (
                path,
                str(len(leaves)),
                "x".join(map(str, shape)),
                str(sum(leaf.matmuls for leaf in leaves)),
                notes,
            )
            for (path, shape, notes), leaves in groups
        ]
        return ("array", "n", "shape", "FP8 matmuls", ""), rows


def make_report(
    paths: Iterable[str], shapes: Iterable[tuple[int, ...]], uses: Iterable[Use]
) -> Fp8Report:
    """The report of these uses; paths and shapes are those of the quantized arguments."""
    matmuls: dict[int, int] = {}
    dequantized: dict[int, dict[tuple[str, str, str], None]] = {}
    for use in uses:
        if use.line is not None:
            dequantized.setdefault(use.leaf, {})[use.primitive, use.line, use.reason] = None
        else:
            matmuls[use.leaf] = matmuls.get(use.leaf, 0) + use.times
    return Fp8Report(
        tuple(
            LeafReport(path, shape, matmuls.get(i, 0), tuple(dequantized.get(i, ())))
            for i, (path, shape) in enumerate(zip(paths, shapes, strict=True))
        )
    )
