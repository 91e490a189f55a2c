"""The plan of a load or an export: every tensor of the model, where it is, and what becomes of it.

Made from headers alone, so that what is wrong with a checkpoint is said before work begins.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxquant.blocked import grid_shape
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.reader import brief
from jaxquant.checkpoint.stored import SCALE_SUFFIXES, stored_quantization
from jaxquant.config import QuantConfig, keeps_module
from jaxquant.errors import CheckpointError
from jaxquant.models.fused import FusedRows, whole_name
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import EXPERTS, Family, Slot
from jaxquant.tree import decide

# Buffers that old checkpoints carry and models recompute.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_FP8 = {np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)}
_PLAIN = {np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor of the model.

    Attributes:
      name: in the checkpoint.
      slot: where it lives in the model.
      config: how it is (or becomes) FP8, or None if it is kept.
      scale_name: of its scales, if it is FP8 in the checkpoint already.
      reason: why, for the report.
    """

    name: str
    slot: Slot
    config: QuantConfig | None
    scale_name: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All tensors, in the order of the forward pass.

    Attributes:
      items: one per tensor of the model.
      family: of the model.
      config: how the model is quantized, or None.
      stored: whether the checkpoint is FP8 already.
      skipped: names of tensors that the model does without.
    """

    items: tuple[Item, ...]
    family: Family
    config: QuantConfig | None
    stored: bool
    skipped: tuple[str, ...] = ()

    def only(self, layers: range) -> "Plan":
        """The plan of some layers, as for one stage of a pipeline.

        What comes before the layers belongs to the first one, what comes after to the last one,
        together with the embedding if it is the head as well.
        """
        numbers = [item.slot.layer for item in self.items]
        first = next(i for i, layer in enumerate(numbers) if layer is not None)
        last_layer = self.family.cfg.num_layers - 1
        tied = self.items[-1].name != "lm_head.weight"
        kept = []
        for i, item in enumerate(self.items):
            if item.slot.layer is not None:
                keep = item.slot.layer in layers
            elif i < first:
                keep = 0 in layers or (tied and last_layer in layers)
            else:
                keep = last_layer in layers
            if keep:
                kept.append(item)
        return dataclasses.replace(self, items=tuple(kept))


def make_plan(folder: CheckpointFolder, config: QuantConfig | None) -> Plan:
    """Matches a checkpoint with its family and with what was asked for.

    Args:
      folder: the checkpoint.
      config: how to quantize; None takes the checkpoint as it is, FP8 or not.

    Raises:
      CheckpointError: missing or unexpected tensors, shapes that do not fit config.json, dtypes
        that cannot be loaded, another quantization than was asked for, or nothing to quantize.
    """
    source = str(folder.path / "config.json")
    family = Family(HFConfig(folder.config, source))
    if family.cfg.num_layers > len(folder.names):  # not even one tensor each
        raise CheckpointError(
            f"{source}: num_hidden_layers is {family.cfg.num_layers}, but there are only "
            f"{len(folder.names)} tensors"
        )
    stored = stored_quantization(folder.config, source)
    if stored is not None and config is not None and not config.same_bytes(stored):
        raise CheckpointError(
            f"{source}: the checkpoint is FP8 already ({stored.describe()}), but "
            f"{config.describe()} was asked for; load it as it is, or start from the BF16 one"
        )
    block = 1 if stored is None else stored.weight_block_size[0]
    folder.split(family.fused, block)
    if family.stacked is not None:
        folder.unstack(family.stacked, block)
    slots = family.slots()
    if config is not None:
        _check_kept_modules(folder, config, slots)
        if config.quantize_head and family.cfg.tie_word_embeddings:
            raise CheckpointError(
                f"{source}: tie_word_embeddings is true: the head is the embedding, which is kept; "
                "leave out quantize_head"
            )
    scales = _scale_names(folder, slots)
    skipped = tuple(filter(family.skips, folder.names))
    _check_names(folder, slots, {*scales.values(), *skipped}, family.fused)
    items = tuple(
        _item(folder, name, slot, config, stored, scales.get(name)) for name, slot in slots.items()
    )
    _check_experts(folder, items)
    result = config or stored
    if result is not None and not any(item.config for item in items):
        raise CheckpointError(
            f"{folder.path}: FP8 was asked for, but no tensor would be quantized; "
            f"modules_to_not_convert is {list(result.modules_to_not_convert)}"
        )
    return Plan(items, family, result, stored is not None, skipped)


def _item(
    folder: CheckpointFolder,
    name: str,
    slot: Slot,
    config: QuantConfig | None,
    stored: QuantConfig | None,
    scale_name: str | None,
) -> Item:
    info = folder.info(name)
    where = f"{folder.shard_of(name)}: tensor {name}"
    if info.shape != slot.shape:
        raise CheckpointError(
            f"{where} has shape {list(info.shape)}; config.json asks for {list(slot.shape)}"
        )
    path = name.replace(".", "/")
    if info.dtype in _FP8:
        if stored is None or info.dtype != stored.fmt_dtype:
            said = "no FP8" if stored is None else stored.fmt
            raise CheckpointError(f"{where} is {info.dtype}, but config.json says {said}")
        if not name.endswith(".weight") or len(slot.shape) != 2 or "embed" in name:
            raise CheckpointError(f"{where} is FP8; allowed: FP8 weights of projections and heads")
        if scale_name is None:
            raise CheckpointError(
                f"{where} is FP8 and has no scales; looked for "
                + ", ".join(_scale_candidates(name))
            )
        asked = config or stored
        if config is not None and (entry := keeps_module(config, path.split("/"))):
            raise CheckpointError(
                f"{where} is FP8 already, but modules_to_not_convert has {entry!r}; "
                "start from the BF16 checkpoint"
            )
        _check_scale(folder, name, scale_name, slot, stored)
        return Item(name, slot, asked, scale_name, "FP8 in the checkpoint")
    if info.dtype not in _PLAIN:
        raise CheckpointError(f"{where} is {info.dtype}; allowed: BF16, F16, F32, or FP8")
    if config is None or stored is not None:
        reason = "not FP8 in the checkpoint" if stored else "no FP8 asked for"
        return Item(name, slot, None, None, reason)
    decision = decide(path, info.shape, info.dtype, config)
    return Item(name, slot, decision.config, None, decision.reason)


def _check_kept_modules(
    folder: CheckpointFolder, config: QuantConfig, slots: Iterable[str]
) -> None:
    paths = [name.split(".") for name in slots]
    names = {
        tuple(entry.replace("/", ".").split(".")): entry for entry in config.modules_to_not_convert
    }
    lengths = {len(parts) for parts in names}
    for path in paths:  # once through, as there may be thousands of paths and hundreds of names
        for n in lengths:
            for i in range(len(path) - n + 1):
                names.pop(tuple(path[i : i + n]), None)
    for entry in names.values():
        if entry != "lm_head":  # a tied head is named by habit, and has no tensor
            raise CheckpointError(
                f"{folder.path}: modules_to_not_convert has {entry!r}, which is no module of the "
                f"model; modules are named like {'.'.join(paths[1][:-1])}"
            )


def _check_scale(
    folder: CheckpointFolder, name: str, scale_name: str, slot: Slot, stored: QuantConfig
) -> None:
    info = folder.info(scale_name)
    where = f"{folder.shard_of(scale_name)}: tensor {scale_name}"
    want = grid_shape(slot.shape, stored.weight_block_size)
    if info.shape != want:
        raise CheckpointError(
            f"{where} has shape {list(info.shape)}; blocks of {stored.weight_block_size} of "
            f"{name} {list(slot.shape)} ask for {list(want)}"
        )
    if info.dtype not in _PLAIN | {np.dtype(jnp.float8_e8m0fnu)}:
        raise CheckpointError(f"{where} is {info.dtype}; allowed: F32, BF16, F16, F8_E8M0")


def _scale_candidates(name: str) -> list[str]:
    return [name + s for s in SCALE_SUFFIXES] + [name.removesuffix(".weight") + ".scale"]


def _scale_names(folder: CheckpointFolder, names: Iterable[str]) -> dict[str, str]:
    """FP8 tensor -> its scales; those of a tensor that is not FP8 mean that something is wrong."""
    present = set(folder.names)
    found = {}
    for name in present.intersection(names):
        scale = next((c for c in _scale_candidates(name) if c in present), None)
        if scale is not None and folder.info(name).dtype in _FP8:
            found[name] = scale
    return found


def _check_names(
    folder: CheckpointFolder,
    slots: Mapping[str, Slot],
    others: set[str],
    fused: Mapping[str, FusedRows],
) -> None:
    present = set(folder.names)
    missing = dict.fromkeys(whole_name(name, fused) for name in slots if name not in present)
    if missing:
        raise CheckpointError(f"{folder.path}: missing tensors: {_some(list(missing))}")
    tied = set() if "lm_head.weight" in slots else {"lm_head.weight"}  # some store it twice
    unexpected = sorted(
        name for name in present - slots.keys() - others - tied if not _IGNORED.search(name)
    )
    if unexpected:
        raise CheckpointError(
            f"{folder.path}: tensors that config.json's architecture does not have: "
            + _some(unexpected)
        )


def _check_experts(folder: CheckpointFolder, items: Iterable[Item]) -> None:
    """All projections of a layer's experts are FP8 alike, or none: they are stacked."""
    first: dict[int | None, Item] = {}
    for item in items:
        if item.slot.product == EXPERTS:
            other = first.setdefault(item.slot.layer, item)
            if item.config != other.config:
                quantized, kept = (item, other) if item.config else (other, item)
                raise CheckpointError(
                    f"{folder.path}: tensor {quantized.name} is to be FP8 ({quantized.reason}), "
                    f"but {kept.name} is not ({kept.reason}); allowed: all experts of a layer, or "
                    "none of them"
                )


def _some(names: list[str], n: int = 4) -> str:
    some = ", ".join(name if name.isprintable() else brief(name) for name in names[:n])
    return some + (f", ... ({len(names)} in all)" if len(names) > n else "")
