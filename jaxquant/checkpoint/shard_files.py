"""Which tensor lies where: tensors dealt out to safetensors files, each file laid out."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxquant.checkpoint.folder import WEIGHTS_NAME
from jaxquant.checkpoint.reader import DTYPE_NAMES, TensorInfo, brief
from jaxquant.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: dtype and shape known beforehand, the values made by `read()` in its turn.

    `read().dtype == dtype` and `read().shape == shape`; anything `np.asarray` takes will do. An
    iterator gives the tensor in pieces, some rows each.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor, in one piece or in those that `read` gives."""
        # What `read` returns lives in this expression alone, and is gone before the next is made.
        values = self.read()
        return map(np.asarray, values if isinstance(values, Iterator) else iter((values,)))


@dataclass(frozen=True)
class Shard:
    """One safetensors file to write.

    Attributes:
        file_name: in the folder.
        sources: its tensors, in the order in which they are written.
        header: the bytes before the tensors, with the header's length in front.
        infos: where each tensor lies in the file, by name.
    """

    file_name: str
    sources: tuple[TensorSource, ...]
    header: bytes
    infos: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return len(self.header) + sum(source.nbytes for source in self.sources)


def deal_out(tensors: Iterable[TensorSource], max_shard_bytes: int) -> list[Shard]:
    """Deal the tensors out to shards, in order, and lay each shard out."""
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    seen: set[str] = set()
    groups: list[list[TensorSource]] = []
    filled = 0
    for source in tensors:
        _check_source(source, seen)
        seen.add(source.name)
        if not groups or filled + source.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.nbytes
    if not groups:
        raise CheckpointError("no tensors to write")
    if len(groups) == 1:
        return [_lay_out(WEIGHTS_NAME, groups[0])]
    count = len(groups)
    return [
        _lay_out(f"model-{i:05}-of-{count:05}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _check_source(source: TensorSource, seen: set[str]) -> None:
    where = f"tensor {brief(source.name)}"
    if source.name in seen:
        raise CheckpointError(f"{where}: two tensors of that name")
    if source.name == "__metadata__":
        raise CheckpointError(f"{where}: the name is reserved by the safetensors format")
    if source.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{where}: dtype {source.dtype} has no place in safetensors, allowed are "
            f"{', '.join(str(dtype) for dtype in DTYPE_NAMES)}"
        )


def _lay_out(file_name: str, sources: Sequence[TensorSource]) -> Shard:
    """Give every tensor its place: the wide dtypes first, so that all are aligned."""
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for source in sorted(sources, key=lambda source: -source.dtype.itemsize):
        header[source.name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": [int(size) for size in source.shape],
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    infos = {}
    for source in sources:
        begin, end = header[source.name]["data_offsets"]
        infos[source.name] = TensorInfo(
            source.name, source.dtype, tuple(source.shape), start + begin, start + end
        )
    return Shard(file_name, tuple(sources), len(text).to_bytes(8, "little") + text, infos)


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    file_of = {name: shard.file_name for shard in shards for name in shard.infos}
    total = sum(source.nbytes for shard in shards for source in shard.sources)
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file_of[name] for name in sorted(file_of)},
    }
