"""QuantReport: what was quantized, what was kept and why, and what it cost."""

import dataclasses
import html
import re
from collections.abc import Iterable
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
class QuantReport:
    """One TensorReport per tensor; prints as a table, and renders as one in a notebook."""

    tensors: tuple[TensorReport, ...]

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
        }

    def summary(self) -> str:
        """One line."""
        return (
            f"{len(self.quantized)} tensors in FP8, {len(self.kept)} kept; "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )

    def __str__(self) -> str:
        header, rows = _table(self.tensors)
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
            for r in [header, *rows]
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], self.summary()])

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
        if abs(n) < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _table(tensors: Iterable[TensorReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row for all tensors that differ in layer numbers only."""
    groups: dict[tuple, list[TensorReport]] = {}
    for t in tensors:
        pattern = re.sub(r"(?<![^/])\d+(?![^/])", "*", t.path)
        groups.setdefault((pattern, t.shape, t.quantized, t.reason), []).append(t)
    rows = []
    for (pattern, shape, quantized, reason), ts in groups.items():
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
