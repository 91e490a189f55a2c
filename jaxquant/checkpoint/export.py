"""Writing FP8 checkpoints: a BF16 one quantized as a stream, a loaded model, a parameter tree."""

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint import compressed
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import Item, Plan, make_plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.checkpoint.shard_files import DEFAULT_SHARD_BYTES, TensorSource
from jaxquant.checkpoint.stream import Slab, skipped_reports, stream, tensor_report
from jaxquant.checkpoint.writer import write_folder
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.models.fused import FusedRows, pieces, rows_of, split_name, whole_name
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family, places
from jaxquant.report import QuantReport, TensorReport
from jaxquant.tree import path_name

LAYOUTS = ("fp8", "compressed-tensors")
_SCALE_SUFFIX = "_scale_inv"  # DeepSeek's name; the scale is a multiplier all the same
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def quantize_checkpoint(
    source: str | Path,
    directory: str | Path,
    config: QuantConfig | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    resume: bool = False,
    layout: str = "fp8",
    progress: bool | None = None,
) -> QuantReport:
    """Quantizes a checkpoint on disk to blocked FP8, as a stream.

    The result holds the bytes that loading with the same config gives, in the layout that
    transformers, vLLM and SGLang read; of these, transformers is known to ask for weights that
    divide into whole blocks. It appears whole or not at all.

    Args:
      source: a folder that is not quantized.
      directory: the folder to write.
      config: default `QuantConfig()`.
      max_shard_bytes: per safetensors file.
      overwrite: replace what is at `directory`.
      resume: keep the shards that an earlier run of the same export finished before it was killed
        or failed; if this one fails, keep its own for the next. The bytes are those of one run.
      layout: "fp8", as DeepSeek-V3 and transformers have it, or "compressed-tensors".
      progress: whether to show a bar; None shows it on a terminal.

    Returns:
      The report. Of tensors in shards that an earlier run finished it says so, and no error.

    Raises:
      JaxquantError: another layout, or one that has no words for the config.
      CheckpointError: a source that cannot be quantized, a full disk, NaN or Inf, by name.
    """
    config = config or QuantConfig()
    if layout not in LAYOUTS:
        raise JaxquantError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if layout == "compressed-tensors":
        compressed.check_layout(config)
    with CheckpointFolder(source) as folder:
        plan = make_plan(folder, config)
        if plan.stored:
            raise CheckpointError(f"{folder.path}: the checkpoint is FP8 already; copy it instead")
        total = sum(folder.info(item.name).nbytes for item in plan.items)
        with (
            Progress(f"Quantizing {folder.path.name}", total, progress) as bar,
            contextlib.closing(QuantizedTensors(folder, plan, bar, "write")) as tensors,
        ):
            sources = tensors.sources()
            hf_config = _with_quantization(_as_loaded(folder.config), config, _kept(plan))
            if layout == "compressed-tensors":
                kept = hf_config["quantization_config"]["modules_to_not_convert"]
                quantization = compressed.quantization_config(config, kept)
                sources = compressed.renamed(sources)
                hf_config = {**hf_config, "quantization_config": quantization}
            write_folder(
                directory,
                sources,
                config=hf_config,
                files=folder.other_files(),
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                job=_job(folder),
                resume=resume,
            )
            entries = (*tensors.earlier(), *tensors.entries, *skipped_reports(folder, plan))
            return QuantReport(entries, bar.timing())


def save_model(
    module: Any,
    hf_config: Mapping[str, Any],
    config: QuantConfig | None,
    directory: str | Path,
    files: Iterable[Path] = (),
    **options: Any,
) -> Path:
    """Writes a loaded model as a Hugging Face checkpoint, FP8 where it is FP8.

    Args:
      module: the family's model.
      hf_config: its config.json.
      config: how it is quantized, or None.
      directory: the folder to write.
      files: tokenizer files and such, copied in.
      **options: of `write_folder`: `max_shard_bytes`, `overwrite`.
    """
    family = Family(HFConfig(hf_config))
    slots = family.slots()
    sources, kept = [], []
    for name, place in places(module, slots).items():
        slot, value = slots[name], place.param.get_value()
        where = place.index, place.row, place.group
        sources += _array_sources(name, value, slot.shape, *where)
        if not isinstance(value, QuantizedArray) and _is_linear(name, slot.shape):
            kept.append(whole_name(name, family.fused).removesuffix(".weight"))
    sources = _fuse(sources, family.fused, config.weight_block_size[0] if config else 1)
    dtype = jnp.dtype(module.embed_tokens.weight.get_value().dtype).name
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    hf_config = {k: v for k, v in hf_config.items() if k not in _QUANTIZATION_KEYS}
    hf_config = {**_as_loaded(hf_config), key: dtype}
    if config is not None:
        hf_config = _with_quantization(hf_config, config, kept)
    return write_folder(directory, sources, config=hf_config, files=files, **options)


def save_params(params: Any, directory: str | Path, **options: Any) -> Path:
    """Writes a parameter tree as safetensors, names joined with '.'.

    A QuantizedArray at `X` becomes `X` and `X_scale_inv`, K-major, several dimensions in or out as
    one; the name of a transposed one ends in `weight` instead of `kernel`, since `[out, in]` is
    what that means elsewhere.

    Raises:
      JaxquantError: QuantizedArrays of different configs; a leaf that is no array.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    sources, configs, kept, scales = [], {}, [], []
    for path, leaf in leaves:
        name = path_name(path).replace("/", ".")
        if not isinstance(leaf, QuantizedArray | jax.Array | np.ndarray):
            raise JaxquantError(f"{name}: {type(leaf).__name__}; allowed: arrays")
        if isinstance(leaf, QuantizedArray):
            if leaf.transposed:
                name = re.sub(r"(^|\.)kernel$", r"\1weight", name)
            configs[_config_of(leaf)] = name
            scales.append(leaf.scale)
        elif leaf.ndim >= 2:
            kept.append(re.sub(r"\.(weight|kernel)$", "", name))
        stored = leaf.qvalue if isinstance(leaf, QuantizedArray) else leaf
        sources += _array_sources(name, leaf, tuple(stored.shape))
    if len(configs) > 1:
        which = "; ".join(f"{name}: {c.describe()}" for c, name in configs.items())
        raise JaxquantError(f"one checkpoint has one quantization config, but: {which}")
    config = {}
    for quantization in configs:
        scale_fmt = "ue8m0" if all(map(_are_powers_of_two, scales)) else None
        quantization = dataclasses.replace(quantization, scale_fmt=scale_fmt)
        config = _with_quantization({}, quantization, kept)
    return write_folder(directory, sources, config=config, **options)


class QuantizedTensors:
    """The tensors of a checkpoint as they are exported: quantized as a plan says, as a stream.

    The stream begins at the tensor that is read first, and goes on in order: those before it are
    in shards that an earlier run finished.

    Args:
      folder: the checkpoint.
      plan: made from it.
      progress: told of every slab.
      stage: what is done with them, for the timing.

    Attributes:
      entries: reports of what was read.
    """

    def __init__(self, folder: CheckpointFolder, plan: Plan, progress: Progress, stage: str):
        self.entries: list[TensorReport] = []
        self._folder, self._plan, self._progress, self._stage = folder, plan, progress, stage
        self._stream: Generator[Slab] | None = None

    def sources(self) -> list[TensorSource]:
        """All tensors; scales follow their weights.

        Raises:
          CheckpointError: projections that the checkpoint holds as one tensor, whose blocks are
            not its own.
        """
        sources = [source for item in self._plan.items for source in self._sources(item)]
        config = self._plan.config
        block = 1 if config is None else config.weight_block_size[0]
        return _fuse(sources, self._plan.family.fused, block)

    def earlier(self) -> list[TensorReport]:
        """Reports of what came before the stream began."""
        items = self._plan.items[: len(self._plan.items) - len(self.entries)]
        entries = [tensor_report(self._folder, item, None, None) for item in items]
        return [dataclasses.replace(e, reason=f"{e.reason}; by an earlier run") for e in entries]

    def close(self) -> None:
        """Ends the stream."""
        if self._stream is not None:
            self._stream.close()

    def _slabs(self, item: Item) -> Iterator[Slab]:
        if self._stream is None:
            items = self._plan.items
            first = items.index(item)
            self._progress.skip(sum(self._folder.info(i.name).nbytes for i in items[:first]))
            self._stream = stream(self._folder, items[first:], None, self._progress)
        for slab in self._stream:
            assert slab.item is item
            with self._progress.stage(self._stage):
                yield slab
            if slab.report is not None:
                self.entries.append(slab.report)
                return

    def _sources(self, item: Item) -> Iterator[TensorSource]:
        info = self._folder.info(item.name)
        if item.config is None:
            yield TensorSource(
                item.name, info.dtype, info.shape, lambda: (s.value for s in self._slabs(item))
            )
            return
        scales: list[np.ndarray] = []

        def read_qvalue() -> Iterator[Any]:
            for slab in self._slabs(item):
                scales.append(np.asarray(slab.value.scale))
                yield slab.value.qvalue

        def read_scale() -> np.ndarray:
            if not scales:  # the values are in a shard that an earlier run finished
                collections.deque(read_qvalue(), maxlen=0)
            return np.concatenate(scales)

        grid = grid_shape(info.shape, item.config.weight_block_size)
        yield TensorSource(item.name, item.config.fmt_dtype, info.shape, read_qvalue)
        yield TensorSource(item.name + _SCALE_SUFFIX, np.dtype(np.float32), grid, read_scale)


def _job(folder: CheckpointFolder) -> str:
    """What the bytes of an export follow from, besides its names, shapes and config."""
    sizes = [
        (shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in folder.shards
    ]
    return f"{jaxquant.__version__} {sizes}"


def _array_sources(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    index: tuple[int, ...] = (),
    row: int = 0,
    group: tuple[int, int] | None = None,
) -> Iterator[TensorSource]:
    """Of an array, stored as `shape`: one of a stack, the rows from `row` on, by `group`."""

    def source(name: str, array: Any, shape: tuple[int, ...], block: int) -> TensorSource:
        def read() -> np.ndarray:
            whole = np.asarray(_take(array, index) if index else array)
            if not shape:
                return whole
            of_blocks = None if group is None else (group[0] // block, group[1] // block)
            rows = [
                whole[at : at + len(piece)]
                for piece, at in pieces(shape[0], row // block, of_blocks)
            ]
            return np.ascontiguousarray(rows[0]) if len(rows) == 1 else np.concatenate(rows)

        return TensorSource(name, np.dtype(array.dtype), shape, read)

    if isinstance(value, QuantizedArray):
        *lead, N, K = shape
        grid = (*lead, *grid_shape((N, K), value.block_size))
        yield source(name, value.qvalue, shape, 1)
        yield source(name + _SCALE_SUFFIX, value.scale, grid, value.block_size[0])
    else:
        yield source(name, value, shape, 1)


@jax.jit
def _take(array: jax.Array, index: tuple) -> jax.Array:
    return functools.reduce(blocked.take_layer, index, array)


def _fuse(
    sources: Iterable[TensorSource], fused: Mapping[str, FusedRows], block: int
) -> list[TensorSource]:
    """The tensors as the checkpoint has them: projections of a fused module as one.

    Raises:
      CheckpointError: some of the projections are FP8 and some are not, or their blocks are none
        of the whole.
    """
    found: dict[str, dict[str, TensorSource]] = {}
    for source in sources:
        whole, part = split_name(source.name, fused) or (source.name, "")
        found.setdefault(whole, {})[part] = source
    return [
        _join(name, parts, fused, block) if "" not in parts else parts[""]
        for name, parts in found.items()
    ]


def _join(
    name: str, parts: Mapping[str, TensorSource], fused: Mapping[str, FusedRows], block: int
) -> TensorSource:
    rows = rows_of(name, fused)
    assert rows is not None
    sources = list(parts.values())
    if tuple(parts) != tuple(rows.parts) or len({source.dtype for source in sources}) > 1:
        raise CheckpointError(
            f"tensor {name.removesuffix(_SCALE_SUFFIX)} is written whole, so that all or none of "
            f"{', '.join(rows.parts)} can be FP8; name {name.split('.')[-2]} in "
            "modules_to_not_convert, or none of them"
        )
    if name.endswith(_SCALE_SUFFIX) and not rows.fits(block):
        sizes = ", ".join(f"{part} {size}" for part, size in rows.parts.items())
        raise CheckpointError(
            f"tensor {name.removesuffix(_SCALE_SUFFIX)} is written whole, but blocks of {block} "
            f"rows do not divide its parts ({sizes} rows); take a weight_block_size that does"
        )
    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])

    def read() -> np.ndarray:
        return rows.join([np.concatenate(list(source.pieces())) for source in sources])

    return TensorSource(name, sources[0].dtype, shape, read)


def _kept(plan: Plan) -> list[str]:
    """Full paths of the linear modules that a plan leaves unquantized."""
    return [
        whole_name(item.name, plan.family.fused).removesuffix(".weight")
        for item in plan.items
        if item.config is None and _is_linear(item.name, item.slot.shape)
    ]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name


def _as_loaded(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of what is loaded: layers that predict further tokens are not."""
    mtp = "num_nextn_predict_layers"
    return {**hf_config, mtp: 0} if mtp in hf_config else dict(hf_config)


def _with_quantization(
    hf_config: Mapping[str, Any], config: QuantConfig, kept: Iterable[str]
) -> dict[str, Any]:
    # A tied head has no tensor, but readers make a linear module of it.
    tied_head = ["lm_head"] if hf_config.get("tie_word_embeddings") else []
    config = dataclasses.replace(
        config,
        # What runs the checkpoint decides on weight-only; other readers know "dynamic" alone.
        activation_scheme="dynamic",
        modules_to_not_convert=tuple(dict.fromkeys((*tied_head, *kept))),
    )
    fields = config.to_dict()
    if config.scale_fmt is None:
        del fields["scale_fmt"]  # as in DeepSeek-V3; transformers refuses null
    return {**hf_config, "quantization_config": fields}


def _config_of(qa: QuantizedArray) -> QuantConfig:
    fmt = "e5m2" if qa.qvalue.dtype == jnp.float8_e5m2 else "e4m3"
    return QuantConfig(fmt=fmt, weight_block_size=qa.block_size)


def _are_powers_of_two(scale: Any) -> bool:
    mantissa, _ = np.frexp(np.asarray(scale))
    return bool((mantissa == 0.5).all())
