"""QuantReport: what was quantized, what was kept and why, and what it cost."""

import dataclasses
import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
      path: its '/'-joined path.
      shape: its logical shape.
      quantized: whether it is blocked FP8 now.
      reason: why.
      bytes_before: bytes of the array that came.
      bytes_after: bytes of the array that is there now, scales included.
      relative_error: `||w - dequantize(quantize(w))|| / ||w||` (Frobenius); None if not measured.
    """

    path: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a load or an export took.

    Attributes:
      seconds: from beginning to end.
      nbytes: read.
      stages: seconds by stage, summed over the threads that worked on it side by side.
      peak_memory: highest resident size of the process until then, in bytes; None if not known.
    """

    seconds: float
    nbytes: int
    stages: dict[str, float]
    peak_memory: int | None

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages.items())
        memory = "" if self.peak_memory is None else f"; peak {format_bytes(self.peak_memory)}"
        rate = format_bytes(self.nbytes / self.seconds if self.seconds else 0)
        return (
            f"read {format_bytes(self.nbytes)} in {self.seconds:.1f} s, {rate}/s "
            f"(by thread: {stages}){memory}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class QuantReport:
    """One TensorReport per tensor; prints as a table, and renders as one in a notebook.

    Attributes:
      tensors: the entries.
      timing: what it took to load or to export, of which reports that are equal may differ.
    """

    tensors: tuple[TensorReport, ...]
    timing: Timing | None = dataclasses.field(default=None, compare=False)

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """The tensors that are blocked FP8."""
        return tuple(t for t in self.tensors if t.quantized)

    @property
    def kept(self) -> tuple[TensorReport, ...]:
        """The tensors that stayed as they were."""
        return tuple(t for t in self.tensors if not t.quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors as they came."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors as they are, scales included."""
        return sum(t.bytes_after for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
            "timing": None if self.timing is None else dataclasses.asdict(self.timing),
        }

    def summary(self) -> str:
        """One line."""
        return (
            f"{len(self.quantized)} tensors in FP8, {len(self.kept)} kept; "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )

    def __repr__(self) -> str:
        return f"QuantReport({self.summary()})"

    def __str__(self) -> str:
        lines = [format_table(*_table(self.tensors)), self.summary()]
        return "\n".join(lines if self.timing is None else [*lines, str(self.timing)])

    def _repr_html_(self) -> str:
        header, rows = _table(self.tensors)

        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(r, "td") for r in rows)
        caption = html.escape(self.summary())
        return f"<table><caption>{caption}</caption>{row(header, 'th')}{body}</table>"


def format_bytes(n: float) -> str:
    """Bytes for people, in decimal units: `135.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.95:  # which rounds to 1000.0
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, as wide as they need to be."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def group_layers[T](items: Iterable[T], key: Callable[[T], tuple]) -> list[tuple[tuple, list[T]]]:
    """Groups what differs in layer numbers only.

    Args:
      items: what to group.
      key: of an item, its '/'-joined path first.

    Returns:
      (key with `*` for each number in the path, items), in the order of first appearance.
    """
    groups: dict[tuple, list[T]] = {}
    for item in items:
        path, *rest = key(item)
        pattern = re.sub(r"(?:(?<![^/])|(?<=_))\d+(?![^/])", "*", path)
        groups.setdefault((pattern, *rest), []).append(item)
    return list(groups.items())


def _table(tensors: Iterable[TensorReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    groups = group_layers(tensors, lambda t: (t.path, t.shape, t.quantized, t.reason))
    rows = []
    for (pattern, shape, quantized, reason), ts in groups:
        errors = [t.relative_error for t in ts if t.relative_error is not None]
        before, after = sum(t.bytes_before for t in ts), sum(t.bytes_after for t in ts)
        rows.append(
            (
                pattern,
                str(len(ts)),
                "x".join(map(str, shape)),
                "fp8" if quantized else "kept",
                f"{max(errors):.4f}" if errors else "",
                f"{format_bytes(before)} -> {format_bytes(after)}"
                if after != before
                else format_bytes(before),
                reason,
            )
        )
    return ("tensor", "n", "shape", "", "max error", "size", "why"), rows
