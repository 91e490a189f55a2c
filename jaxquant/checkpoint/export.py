"""Writing FP8 checkpoints: a BF16 one quantized as a stream, a loaded model, a parameter tree."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxquant import blocked
from jaxquant.array import QuantizedArray
from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.loader import Tally, row_slabs, tensor_report
from jaxquant.checkpoint.plan import Item, Plan, make_plan
from jaxquant.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorSource, write_folder
from jaxquant.config import QuantConfig
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family, places
from jaxquant.report import QuantReport, TensorReport
from jaxquant.tree import error_norms, path_name

_SCALE_SUFFIX = "_scale_inv"  # DeepSeek's name; the scale is a multiplier all the same
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def quantize_checkpoint(
    source: str | Path,
    directory: str | Path,
    config: QuantConfig | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool | None = None,
) -> QuantReport:
    """Quantizes a checkpoint on disk to blocked FP8, one tensor at a time.

    The result holds the bytes that loading with the same config gives, in the layout that
    transformers, vLLM and SGLang read; of these, transformers is known to ask for weights that
    divide into whole blocks. It appears whole or not at all.

    Args:
      source: a folder that is not quantized.
      directory: the folder to write.
      config: default `QuantConfig()`.
      max_shard_bytes: per safetensors file.
      overwrite: replace what is at `directory`.
      progress: whether to show a bar; None shows it on a terminal.

    Raises:
      CheckpointError: a source that cannot be quantized, a full disk, NaN or Inf, by name.
    """
    config = config or QuantConfig()
    with CheckpointFolder(source) as folder:
        plan = make_plan(folder, config)
        if plan.stored:
            raise CheckpointError(f"{folder.path}: the checkpoint is FP8 already; copy it instead")
        entries: list[TensorReport] = []
        sources = [s for item in plan.items for s in _quantized_sources(folder, item, entries)]
        sizes = {item.name: folder.info(item.name).nbytes for item in plan.items}
        with tqdm(
            total=sum(sizes.values()),
            unit="B",
            unit_scale=True,
            desc=f"Quantizing {folder.path.name}",
            disable=None if progress is None else not progress,
            leave=False,
        ) as bar:

            def advance(source: TensorSource) -> None:
                bar.update(sizes.get(source.name, 0))

            write_folder(
                directory,
                sources,
                config=_with_quantization(folder.config, config, _kept(plan)),
                files=folder.other_files(),
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                on_tensor=advance,
            )
    return QuantReport(tuple(entries))


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
        sources += _array_sources(name, value, slot.shape, place.index, place.row)
        if not isinstance(value, QuantizedArray) and _is_linear(name, slot.shape):
            kept.append(name.removesuffix(".weight"))
    dtype = jnp.dtype(module.embed_tokens.weight.get_value().dtype).name
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    hf_config = {k: v for k, v in hf_config.items() if k not in _QUANTIZATION_KEYS}
    hf_config = {**hf_config, key: dtype}
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


def _quantized_sources(
    folder: CheckpointFolder, item: Item, entries: list[TensorReport]
) -> Iterator[TensorSource]:
    info = folder.info(item.name)

    def done(error: float | None) -> None:
        entries.append(tensor_report(folder, item, info.dtype, error))
        folder.release(item.name)

    if item.config is None:

        def read_plain() -> np.ndarray:
            w = folder.read(item.name)
            _check_finite(folder, item, bool(_is_finite(w)))
            done(None)
            return w

        yield TensorSource(item.name, info.dtype, info.shape, read_plain)
        return
    config = item.config.numerics()
    scales: list[np.ndarray] = []

    def read_qvalue() -> np.ndarray:
        w, tally, qvalues = folder.read(item.name), Tally(), []
        for rows, _ in row_slabs(item):
            qa, *outcome = _quantize(w[rows], config)
            tally.add(*outcome)
            qvalues.append(np.asarray(qa.qvalue))
            scales.append(np.asarray(qa.scale))
        _check_finite(folder, item, tally.finite)
        done(tally.relative_error())
        return np.concatenate(qvalues)

    yield TensorSource(item.name, config.fmt_dtype, info.shape, read_qvalue)
    grid = blocked.grid_shape(info.shape, config.weight_block_size)

    def read_scale() -> np.ndarray:
        return np.concatenate(scales)

    yield TensorSource(item.name + _SCALE_SUFFIX, np.dtype(np.float32), grid, read_scale)


def _array_sources(
    name: str, value: Any, shape: tuple[int, ...], index: int | None = None, row: int = 0
) -> Iterator[TensorSource]:
    """Of an array, stored as `shape`: one of a stack, the rows from `row` on."""

    def source(name: str, array: Any, shape: tuple[int, ...], row: int) -> TensorSource:
        def read() -> np.ndarray:
            whole = np.asarray(array if index is None else _take_layer(array, index))
            return np.ascontiguousarray(whole[row : row + shape[0]]) if shape else whole

        return TensorSource(name, np.dtype(array.dtype), shape, read)

    if isinstance(value, QuantizedArray):
        *lead, N, K = shape
        grid = (*lead, *grid_shape((N, K), value.block_size))
        yield source(name, value.qvalue, shape, row)
        yield source(name + _SCALE_SUFFIX, value.scale, grid, row // value.block_size[0])
    else:
        yield source(name, value, shape, row)


_take_layer = jax.jit(blocked.take_layer)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(w: jax.Array, config: QuantConfig) -> tuple[QuantizedArray, Any, Any, Any]:
    qa = blocked.quantize(w, config)
    return qa, jnp.isfinite(qa.scale).all(), *error_norms(w, qa)


@jax.jit
def _is_finite(w: jax.Array) -> jax.Array:
    return jnp.isfinite(w).all()


def _check_finite(folder: CheckpointFolder, item: Item, finite: bool) -> None:
    if not finite:
        raise CheckpointError(f"{folder.shard_of(item.name)}: tensor {item.name} holds NaN or Inf")


def _kept(plan: Plan) -> list[str]:
    """Full paths of the linear modules that a plan leaves unquantized."""
    return [
        item.name.removesuffix(".weight")
        for item in plan.items
        if item.config is None and _is_linear(item.name, item.slot.shape)
    ]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name


def _with_quantization(
    hf_config: Mapping[str, Any], config: QuantConfig, kept: Iterable[str]
) -> dict[str, Any]:
    # A tied head has no tensor, but readers make a linear module of it.
    tied_head = ["lm_head"] if hf_config.get("tie_word_embeddings") else []
    config = dataclasses.replace(
        config,
        # What runs the checkpoint decides on weight-only; other readers know "dynamic" alone.
        activation_scheme="dynamic",
        modules_to_not_convert=(*tied_head, *kept),
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
