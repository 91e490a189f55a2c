"""Which family a checkpoint belongs to, and where its tensors live in that family's model."""

import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxquant.errors import CheckpointError
from jaxquant.models.fused import FusedRows, StackedExperts
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import ExpertLinear, FusedLinear, SeparateLinear, Stack

# architecture -> (module, config class, model class)
ARCHITECTURES = {
    "LlamaForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
    "MistralForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
    "InternLM2ForCausalLM": ("jaxquant.models.internlm2", "InternLM2Config", "InternLM2"),
    "InternLM3ForCausalLM": ("jaxquant.models.llama", "LlamaConfig", "Llama"),
    "Qwen2ForCausalLM": ("jaxquant.models.qwen", "QwenConfig", "Qwen"),
    "Qwen3ForCausalLM": ("jaxquant.models.qwen", "QwenConfig", "Qwen"),
    "GlmForCausalLM": ("jaxquant.models.glm", "GlmConfig", "Glm"),
    "Glm4ForCausalLM": ("jaxquant.models.glm", "GlmConfig", "Glm4"),
    "Gemma2ForCausalLM": ("jaxquant.models.gemma", "GemmaConfig", "Gemma"),
    "Gemma3ForCausalLM": ("jaxquant.models.gemma", "GemmaConfig", "Gemma"),
    "Phi3ForCausalLM": ("jaxquant.models.phi3", "Phi3Config", "Phi3"),
    "GraniteForCausalLM": ("jaxquant.models.granite", "GraniteConfig", "Granite"),
    "SmolLM3ForCausalLM": ("jaxquant.models.smollm3", "SmolLM3Config", "SmolLM3"),
    "Olmo2ForCausalLM": ("jaxquant.models.olmo2", "Olmo2Config", "Olmo2"),
    "StableLmForCausalLM": ("jaxquant.models.stablelm", "StableLMConfig", "StableLM"),
    "MixtralForCausalLM": ("jaxquant.models.mixtral", "MixtralConfig", "Mixtral"),
    "Qwen2MoeForCausalLM": ("jaxquant.models.qwen_moe", "Qwen2MoEConfig", "Qwen2MoE"),
    "Qwen3MoeForCausalLM": ("jaxquant.models.qwen_moe", "Qwen3MoEConfig", "Qwen3MoE"),
    "DeepseekV2ForCausalLM": ("jaxquant.models.deepseek", "DeepseekV2Config", "Deepseek"),
    "DeepseekV3ForCausalLM": ("jaxquant.models.deepseek", "DeepseekV3Config", "Deepseek"),
    "Glm4MoeForCausalLM": ("jaxquant.models.glm_moe", "Glm4MoEConfig", "Glm4MoE"),
}


EXPERTS = "experts"


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one checkpoint tensor is to the model.

    Attributes:
      path: of the parameter in the model, or, for one of a layer, in the layer. A projection has
        its own, whether it is stored in a fused weight or not.
      layer: the layer, or None.
      shape: of the checkpoint's tensor.
      product: name of the fused product that a projection is part of, or None; `EXPERTS` for all
        projections of a layer's experts.
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
      index: the layer in a stack, then the expert; empty for a parameter that is no stack.
      row: the first row; not 0 only in a fused weight.
      group: where a fused weight has groups of rows, how many of these are the tensor's, and how
        many there are; see `fused.pieces`.
    """

    param: nnx.Param
    index: tuple[int, ...]
    row: int
    group: tuple[int, int] | None = None


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

    @property
    def fused(self) -> Mapping[str, FusedRows]:
        """Modules of the checkpoint that hold the rows of several projections; see `fused.py`."""
        return self._model.fused(self.cfg)

    @property
    def stacked(self) -> StackedExperts | None:
        """How experts lie in a checkpoint that has them stacked, in a family with experts."""
        return self._model.stacked(self.cfg)

    def skips(self, name: str) -> bool:
        """Whether a tensor is of a layer that predicts further tokens, which is not loaded."""
        found, L = re.match(r"model\.layers\.(\d{1,9})\.", name, re.ASCII), self.cfg.num_layers
        return found is not None and 0 <= int(found[1]) - L < getattr(self.cfg, "mtp_layers", 0)

    def abstract_model(self, dtype: Any, stacks: Sequence[Stack] | None = None) -> Any:
        """The model with ShapeDtypeStructs for parameters; see `Decoder`."""
        return self._model(self.cfg, dtype, stacks)

    def slots(self) -> dict[str, Slot]:
        """Hugging Face name -> Slot, in the order of the forward pass."""
        model = self.abstract_model(jnp.float32)
        before, after = {}, {}
        stacks = [[] for _ in model.stacks]
        for path, _, shape, product in _parameters(model):
            if path.startswith("layers/"):
                _, s, in_layer = path.split("/", 2)
                stacks[int(s)].append((in_layer, shape[1:], product))
            else:
                part = before if path.startswith("embed") else after
                part[self._checkpoint_name(path)] = Slot(path, None, shape)
        stacked = {
            self._checkpoint_name(f"layers/{l}/{path}"): Slot(path, l, shape, product)
            for stack, parameters in zip(model.stacks, stacks, strict=True)
            for l in stack.layers
            for path, shape, product in parameters
        }
        return {**before, **stacked, **after}

    def _checkpoint_name(self, path: str) -> str:
        prefix = "" if path.startswith("lm_head") else "model."
        path = f"/{path}/"
        for ours, theirs in self._model.checkpoint_names.items():
            path = path.replace(f"/{ours}/", f"/{theirs}/")
        return prefix + path.strip("/").replace("/", ".")


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
            place = found[f"layers/{s}/{slot.path}"]
            index = (slot.layer - model.stacks[s].layers.start, *place.index)
            result[name] = dataclasses.replace(place, index=index)
    return result


def _parameters(
    module: Any, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, Place, tuple[int, ...], str | None]]:
    """Path, place, shape and fused product of each parameter; projections are one by one."""
    if isinstance(module, FusedLinear):
        *parents, product = prefix
        for part, (start, end) in zip(module.names, module.rows, strict=True):
            for name, param in _children(module):
                L, height, *rest = param.get_value().shape
                path, groups, size = "/".join((*parents, part, name)), module.groups, end - start
                group = None if groups == 1 else (size, height // groups)
                yield path, Place(param, (), start, group), (L, groups * size, *rest), product
        return
    if isinstance(module, ExpertLinear):
        parents, param = prefix[:-1], module.weight
        L, E, _, K = param.get_value().shape
        for e in range(E):
            for part, (start, end) in zip(module.names, module.rows, strict=True):
                path = "/".join((*parents, str(e), part, "weight"))
                yield path, Place(param, (e,), start), (L, end - start, K), EXPERTS
        return
    if isinstance(module, SeparateLinear):
        prefix = prefix[:-1]
    for name, child in _children(module):
        path = (*prefix, name)
        if isinstance(child, nnx.Param):
            yield "/".join(path), Place(child, (), 0), child.get_value().shape, None
        else:
            yield from _parameters(child, path)


def _children(module: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and submodules, in the order in which they were made."""
    items = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, child in items:
        if isinstance(child, nnx.Param | nnx.Module | nnx.List):
            yield str(name), child
