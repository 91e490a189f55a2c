"""Read Hugging Face style checkpoint folders: config.json and one or more safetensors files."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

from jaxquant.checkpoint.reader import SafetensorsFile, TensorInfo, brief
from jaxquant.errors import CheckpointError
from jaxquant.models.fused import FusedRows, StackedExperts, rows_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
_WEIGHT_SUFFIXES = _PICKLE_SUFFIXES | {
    ".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".npy", ".npz",
    ".onnx", ".onnx_data", ".ot", ".pb", ".pte", ".tflite",
}  # fmt: skip
# A pickle of protocol 2 or later, and the zip that torch.save and numpy.savez write.
_PICKLE_MAGICS = (b"\x80", b"PK\x03\x04")
# The largest tokenizer.json files are about 40 MB.
_MAX_OTHER_BYTES = 128 * 2**20


class CheckpointFolder:
    """A checkpoint folder: its `config` and its tensors over all shards.

    The weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names,
    else the folder's only `*.safetensors` file. Opening checks that every shard exists; a shard's
    header is read and held against the index when one of its tensors is first asked for.

    The index and the shards must agree exactly. A tensor that lies in a shard and not in the index
    is refused: readers that go by the index would not load it, readers that go by the shards
    (transformers, vLLM) would.

    Raises `CheckpointError` naming the file or tensor; pickle files are never opened.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not os.path.isdir(self.path):
            what = "not a folder" if os.path.exists(self.path) else "no such folder"
            raise CheckpointError(f"{self.path}: {what}; give the one that holds {CONFIG_NAME}")
        self._files: dict[Path, SafetensorsFile] = {}
        self._names_of = find_weights(self.path)
        self.shards = tuple(self._names_of)
        self.config = read_json_object(self.path / CONFIG_NAME)
        if not self._names_of[self.shards[0]]:  # no index: the file itself says what it holds
            file = self._files[self.shards[0]] = SafetensorsFile(self.shards[0])
            self._names_of = {file.path: frozenset(file.tensors)}
        self._shard_of = {name: shard for shard, names in self._names_of.items() for name in names}
        self._parts: dict[str, _Part] = {}

    def split(self, fused: Mapping[str, FusedRows], block: int = 1) -> None:
        """From now on, has the projections of fused modules in place of the whole tensors.

        They are named as in `jaxquant.models.fused`.

        Args:
          fused: name of a module -> how its rows lie.
          block: rows of the weights to a row of their scales.
        """
        for whole in self._shard_of:
            if (rows := rows_of(whole, fused)) is not None:
                module, kind = whole.rsplit(".", 1)
                for part in rows.parts:
                    of = block if "scale" in kind else 1
                    self._parts[f"{module}.{part}.{kind}"] = _Part(whole, rows, part, of)

    def unstack(self, stacked: StackedExperts, block: int = 1) -> None:
        """From now on, has a tensor for each projection of each expert in place of stacked ones.

        Args:
          stacked: how experts lie.
          block: rows of the weights to a row of their scales.
        """
        matches = {name: match for name in self._shard_of if (match := stacked.match(name))}
        for whole, (experts, rows, kind) in matches.items():
            of = block if "scale" in kind else 1
            for e in range(stacked.num_experts):
                for part in rows.parts:
                    name = f"{experts}.{e}.{part}.{kind}"
                    self._parts[name] = _Part(whole, rows, part, of, (e, stacked.num_experts))
        for name in self._shard_of if matches else ():
            if name not in matches and (other := stacked.rename(name)) != name:
                self._parts[other] = _Part(name, None, "", 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted; costs no shard's opening."""
        whole = {part.whole for part in self._parts.values()}
        return tuple(sorted((self._shard_of.keys() - whole) | self._parts.keys()))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's `TensorInfo`, shard by shard; reads all headers."""
        return {
            name: info for shard in self.shards for name, info in self._file(shard).tensors.items()
        }

    @property
    def nbytes(self) -> int:
        """The size of all tensors on disk, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, empty if there is none."""
        path = self.path / "generation_config.json"
        return read_json_object(path) if os.path.exists(path) else {}

    def shard_of(self, name: str) -> Path:
        """Return the file that holds tensor `name`."""
        shard = self._shard_of.get(self._parts[name].whole if name in self._parts else name)
        if shard is None:
            raise CheckpointError(
                f"{self.path}: no tensor {brief(name)} among its {len(self._shard_of)}"
            )
        return shard

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of tensor `name`."""
        file, part = self._file(self.shard_of(name)), self._parts.get(name)
        if part is None:
            return file.tensors[name]
        info = file.tensors[part.whole]
        shape = part.shape(info, file.path)
        nbytes = math.prod(shape) * info.dtype.itemsize
        return dataclasses.replace(info, name=name, shape=shape, stop=info.start + nbytes)

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name` as a read-only view of its memory-mapped shard.

        The rows of a projection that lie in several groups are a copy.
        """
        file, part = self._file(self.shard_of(name)), self._parts.get(name)
        if part is None:
            return file.read(name)
        part.shape(file.tensors[part.whole], file.path)
        return part.take(file.read(part.whole))

    def read_rows(
        self,
        name: str,
        rows: slice,
        columns: slice = slice(None),
        *,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return rows of tensor `name`, or some columns of them, as `SafetensorsFile` does."""
        file, part = self._file(self.shard_of(name)), self._parts.get(name)
        if part is None:
            return file.read_rows(name, rows, columns, out=out)
        shape = part.shape(file.tensors[part.whole], file.path)
        return part.read_rows(file, range(shape[0] if shape else 1)[rows], columns, out)

    def other_files(self) -> list[Path]:
        """Return the files that an export carries over, sorted by name.

        The small top-level ones beside the weights, their index and config.json: tokenizer,
        generation config, chat template, license. Never hidden files, never pickles.
        """
        return sorted(path for path in self.path.iterdir() if _is_carried(path))

    def close(self) -> None:
        """Let go of the files; tensors already read stay valid, a later read opens anew."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _file(self, shard: Path) -> SafetensorsFile:
        """Return the opened shard, checked against the index."""
        file = self._files.get(shard)
        if file is not None:
            return file
        file = SafetensorsFile(shard)
        listed = self._names_of[shard]
        if missing := sorted(listed - file.tensors.keys()):
            raise CheckpointError(
                f"{shard}: {len(missing)} of the {len(listed)} tensors that {INDEX_NAME} puts in "
                f"it are not there, first {brief(missing[0])}; download the folder again"
            )
        for name in sorted(file.tensors.keys() - listed):
            if name in self._shard_of:
                raise CheckpointError(
                    f"{shard}: tensor {brief(name)} is also in {self._shard_of[name].name}, "
                    f"where {INDEX_NAME} puts it; remove one of the two"
                )
            raise CheckpointError(
                f"{shard}: tensor {brief(name)} is not in {INDEX_NAME}; add it to weight_map or "
                f"remove it from the shard"
            )
        self._files[shard] = file
        return file


@dataclasses.dataclass(frozen=True)
class _Part:
    """The rows of one projection in a tensor that holds several.

    Attributes:
      whole: name of that tensor.
      rows: how the rows lie; None: this is the whole, under another name.
      name: of the projection.
      block: rows of the weights to a row of the tensor.
      expert: number of the expert, and of how many, if the tensor has a leading axis of experts.
    """

    whole: str
    rows: FusedRows | None
    name: str
    block: int
    expert: tuple[int, int] | None = None

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The part, given the whole."""
        if self.expert is not None:
            tensor = tensor[self.expert[0]]
        return tensor if self.rows is None else self.rows.take(tensor, self.name, self.block)

    def read_rows(
        self, file: SafetensorsFile, rows: range, columns: slice, out: np.ndarray | None
    ) -> np.ndarray:
        """Rows of the part, read from the file that the whole is in."""
        if self.rows is None:
            return file.read_rows(self.whole, slice(rows.start, rows.stop), columns, out=out)
        shape = file.tensors[self.whole].shape
        height = shape[0] if self.expert is None else shape[1]
        first = 0 if self.expert is None else self.expert[0] * height
        pieces, end = [], 0
        for run in self.rows.runs(height, self.name, rows, self.block):
            lines = slice(first + run.start, first + run.stop)
            into = None if out is None else out[end:]
            pieces.append(file.read_rows(self.whole, lines, columns, flat=True, out=into))
            end += pieces[-1].nbytes
        if len(pieces) == 1 or out is None:
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return out[:end].view(pieces[0].dtype).reshape(-1, *pieces[0].shape[1:])

    def shape(self, info: TensorInfo, path: Path) -> tuple[int, ...]:
        """Of the part, given the whole and the file that it is in."""
        if self.rows is None:
            return info.shape
        rows, sizes, shape = self.rows, self.rows.parts, info.shape
        where = f"{path}: tensor {brief(self.whole)}"
        if self.expert is not None:
            if len(shape) != 3 or shape[0] != self.expert[1]:
                raise CheckpointError(
                    f"{where} has shape {list(shape)}; config.json asks for {self.expert[1]} "
                    f"experts: [{self.expert[1]}, out, in]"
                )
            shape = shape[1:]
        want = -(-rows.groups * sum(sizes.values()) // self.block)
        if not shape or shape[0] != want:
            raise CheckpointError(
                f"{where} has shape {list(info.shape)}; config.json asks for {want} rows, of "
                + ", ".join(sizes)
            )
        if not rows.fits(self.block):
            raise CheckpointError(
                f"{where} is for blocks of {self.block} rows, which do not divide its parts "
                f"({', '.join(f'{part} {size}' for part, size in sizes.items())} rows); start from "
                "the BF16 checkpoint"
            )
        return (rows.groups * -(-sizes[self.name] // self.block), *shape[1:])


def find_weights(folder: Path) -> dict[Path, frozenset[str]]:
    """Return the folder's safetensors files, each with the names that the index puts in it.

    A file that stands without an index comes alone and with no names. Raises `CheckpointError` if
    there is none or no telling which, if a shard is missing, and if the index is malformed.
    """
    single = folder / WEIGHTS_NAME
    if os.path.exists(single):  # before the index, as in transformers
        return {single: frozenset()}
    index = folder / INDEX_NAME
    if os.path.exists(index):
        return _read_index(index)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(weights) == 1:
        return {folder / weights[0]: frozenset()}
    if weights:
        raise CheckpointError(
            f"{folder}: {len(weights)} safetensors files ({_some(weights)}) and no {INDEX_NAME} "
            f"to say which belong together; add the index or leave one file"
        )
    if pickles := [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]:
        raise CheckpointError(
            f"{folder}: only pickle checkpoints ({_some(pickles)}), which can run code when "
            f"loaded and are never opened; convert them to safetensors"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(
            f"{folder}: only GGUF files ({_some(ggufs)}); give the safetensors checkpoint they "
            f"were made from"
        )
    raise CheckpointError(f"{folder}: no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `CheckpointError` if there is anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {brief(value)}")
    return value


def _read_index(index: Path) -> dict[Path, frozenset[str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map must map tensor names to files, got {brief(weight_map)}"
        )
    names_of: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: tensor {brief(name)}: expected a file name, got {brief(file)}"
            )
        names_of.setdefault(file, set()).add(name)
    for file, names in names_of.items():
        # The name decides, not where it leads: shards in the hub's cache are symbolic links.
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or ":" in file:
            raise CheckpointError(f"{index}: file {brief(file)} lies outside the folder")
        if pure.suffix != ".safetensors":
            raise CheckpointError(f"{index}: file {brief(file)} is not a safetensors file")
        if not os.path.isfile(index.parent / file):
            raise CheckpointError(
                f"{index.parent}: shard {brief(file)} is missing, {INDEX_NAME} puts {len(names)} "
                f"tensors in it; download the folder again"
            )
    return {index.parent / file: frozenset(names_of[file]) for file in sorted(names_of)}


def _is_carried(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name == CONFIG_NAME or name.endswith(".index.json"):
        return False
    if path.suffix.lower() in _WEIGHT_SUFFIXES or not path.is_file():
        return False
    if path.stat().st_size > _MAX_OTHER_BYTES:
        return False
    with path.open("rb") as file:
        return not file.read(4).startswith(_PICKLE_MAGICS)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
