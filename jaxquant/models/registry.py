"""Which family a checkpoint belongs to, and where its tensors live in that family's model."""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxquant.errors import CheckpointError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import FusedLinear, SeparateLinear, Stack

# architecture -> (module, config class, model class)
ARCHITECTURES = {
    "LlamaForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
    "MistralForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one checkpoint tensor is to the model.

    Attributes:
      path: of the parameter in the model, or, for one of a layer, in the layer. A projection has
        its own, whether it is stored in a fused weight or not.
      layer: the layer, or None.
      shape: of the checkpoint's tensor.
      product: name of the fused product that a projection is part of, or None.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    product: str | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor lives in a model.

    Attributes:
      param: the parameter.
      index: the layer in a stack, or None.
      row: the first row; not 0 only in a fused weight.
    """

    param: nnx.Param
    index: int | None
    row: int


class Family:
    """The model of one config.json.

    Args:
      hf: the config.

    Raises:
      CheckpointError: an unknown architecture (lists the known ones), or a variant that the
        family's file does not compute.
    """

    def __init__(self, hf: HFConfig):
        names = hf.fields.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise CheckpointError(
                f"{hf.source}: architecture {name!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        module_name, config_name, model_name = ARCHITECTURES[name]
        module = importlib.import_module(module_name)
        self.cfg: Any = getattr(module, config_name).from_hf(hf)
        self._model = getattr(module, model_name)

    def abstract_model(self, dtype: Any, stacks: Sequence[Stack] | None = None) -> Any:
        """The model with ShapeDtypeStructs for parameters; see `Decoder`."""
        return self._model(self.cfg, dtype, stacks)

    def slots(self) -> dict[str, Slot]:
        """Hugging Face name -> Slot, in the order of the forward pass."""
        model = self.abstract_model(jnp.float32, [Stack(range(1))])
        before, layers, after = {}, [], {}
        for path, _, shape, product in _parameters(model):
            if path.startswith("layers/0/"):
                layers.append((path.removeprefix("layers/0/"), shape[1:], product))
            else:
                part = before if path.startswith("embed") else after
                part[_hf_name(path)] = Slot(path, None, shape)
        stacked = {
            _hf_name(f"layers/{l}/{path}"): Slot(path, l, shape, product)
            for l in range(self.cfg.num_layers)
            for path, shape, product in layers
        }
        return {**before, **stacked, **after}


def places(model: Any, slots: Mapping[str, Slot]) -> dict[str, Place]:
    """Where the tensors of these slots live in a family's model."""
    found = {path: place for path, place, _, _ in _parameters(model)}
    stack_of = {l: s for s, stack in enumerate(model.stacks) for l in stack.layers}
    result = {}
    for name, slot in slots.items():
        if slot.layer is None:
            result[name] = found[slot.path]
        else:
            s = stack_of[slot.layer]
            index = slot.layer - model.stacks[s].layers.start
            result[name] = dataclasses.replace(found[f"layers/{s}/{slot.path}"], index=index)
    return result


def _parameters(
    module: Any, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, Place, tuple[int, ...], str | None]]:
    """Path, place, shape and fused product of each parameter; projections are one by one."""
    if isinstance(module, FusedLinear):
        *parents, product = prefix
        for part, (start, end) in zip(module.names, module.rows, strict=True):
            for name, param in _children(module):
                L, _, *rest = param.get_value().shape
                path = "/".join((*parents, part, name))
                yield path, Place(param, None, start), (L, end - start, *rest), product
        return
    if isinstance(module, SeparateLinear):
        prefix = prefix[:-1]
    for name, child in _children(module):
        path = (*prefix, name)
        if isinstance(child, nnx.Param):
            yield "/".join(path), Place(child, None, 0), child.get_value().shape, None
        else:
            yield from _parameters(child, path)


def _children(module: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and submodules, in the order in which they were made."""
    items = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, child in items:
        if isinstance(child, nnx.Param | nnx.Module | nnx.List):
            yield str(name), child


def _hf_name(path: str) -> str:
    name = path.replace("/", ".")
    return name if name.startswith("lm_head") else f"model.{name}"
