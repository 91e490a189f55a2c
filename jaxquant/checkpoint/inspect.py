"""What a checkpoint holds, from its headers alone."""

import dataclasses
import os
from typing import Any

from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.hub import resolve
from jaxquant.checkpoint.stored import stored_quantization
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family
from jaxquant.report import format_bytes, format_table, group_layers


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint's architecture, quantization and tensors.

    Attributes:
      path: the folder.
      architecture: the first of config.json's `architectures`.
      supported: whether jaxquant loads it; if not, `why_not` says why.
      quantization: its blocked FP8 config, or None.
      tensors: (name, dtype, shape, bytes) of each, sorted by name.
    """

    path: str
    architecture: str | None
    supported: bool
    why_not: str
    quantization: dict[str, Any] | None
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        keys = ("name", "dtype", "shape", "bytes")
        tensors = [dict(zip(keys, tensor, strict=True)) for tensor in self.tensors]
        return {**dataclasses.asdict(self), "tensors": tensors}

    def __str__(self) -> str:
        groups = group_layers(self.tensors, lambda t: (t[0].replace(".", "/"), t[1], t[2]))
        rows = [
            (
                pattern.replace("/", "."),
                str(len(tensors)),
                dtype,
                "x".join(map(str, shape)),
                format_bytes(sum(t[3] for t in tensors)),
            )
            for (pattern, dtype, shape), tensors in groups
        ]
        quantization = "none"
        if self.quantization is not None:
            quantization = QuantConfig.from_dict(self.quantization).describe()
        total = sum(t[3] for t in self.tensors)
        return "\n".join(
            [
                f"{self.path}",
                f"architecture: {self.architecture}" + ("" if self.supported else " (unsupported)"),
                *([f"  {self.why_not}"] if self.why_not else []),
                f"quantization: {quantization}",
                format_table(("tensor", "n", "dtype", "shape", "size"), rows),
                f"{len(self.tensors)} tensors, {format_bytes(total)}",
            ]
        )


def inspect(path_or_hub_id: str | os.PathLike) -> Inspection:
    """Reads the headers of a checkpoint, of any architecture.

    Raises:
      CheckpointError: files that are missing or broken.
    """
    path = resolve(path_or_hub_id)
    with CheckpointFolder(path) as folder:
        source = str(path / "config.json")
        names = folder.config.get("architectures")
        why_not, quantization = "", None
        try:
            Family(HFConfig(folder.config, source))
            stored = stored_quantization(folder.config, source)
            quantization = None if stored is None else stored.to_dict()
        except CheckpointError as error:
            why_not = str(error)
        return Inspection(
            path=str(path),
            architecture=names[0] if isinstance(names, list) and names else None,
            supported=not why_not,
            why_not=why_not,
            quantization=quantization,
            tensors=tuple(
                (name, str(info.dtype), info.shape, info.nbytes)
                for name, info in sorted(folder.tensors.items())
            ),
        )
