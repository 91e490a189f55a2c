"""Which family a checkpoint belongs to, and where its tensors live in that family's model."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.errors import CheckpointError
from jaxquant.models.hf_config import HFConfig
from jaxquant.tree import path_name

# architecture -> (module, config class, model class)
ARCHITECTURES = {
    "LlamaForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
    "MistralForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lives.

    Attributes:
      path: of the parameter: in the model, or, for one of a layer, in its stack.
      layer: the layer, or None.
      shape: of the checkpoint's tensor.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]


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

    def abstract_model(self, dtype: Any, segments: Sequence[int] | None = None) -> Any:
        """The model with ShapeDtypeStructs for parameters; see the family's class."""
        return self._model(self.cfg, dtype, segments)

    def slots(self) -> dict[str, Slot]:
        """Hugging Face name -> Slot, in the order of the forward pass."""
        one_layer = self.abstract_model(jnp.float32, segments=(1,))
        before, layers, after = {}, [], {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(one_layer)[0]:
            name = path_name(path)
            if name.startswith("layers/0/"):
                layers.append((name.removeprefix("layers/0/"), leaf.shape[1:]))
            elif name.startswith("embed"):
                before[_hf_name(name)] = Slot(name, None, leaf.shape)
            else:
                after[_hf_name(name)] = Slot(name, None, leaf.shape)
        stacked = {
            _hf_name(f"layers/{l}/{path}"): Slot(path, l, shape)
            for l in range(self.cfg.num_layers)
            for path, shape in layers
        }
        return {**before, **stacked, **after}


def get_param(model: nnx.Module, path: str) -> nnx.Param:
    """The parameter at a '/'-joined path."""
    node: Any = model
    for part in path.split("/"):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def _hf_name(path: str) -> str:
    name = path.replace("/", ".")
    return name if name.startswith("lm_head") else f"model.{name}"
