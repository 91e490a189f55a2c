"""Qwen2-MoE and Qwen3-MoE: experts in some layers or all, in Qwen2 beside a shared one.

Qwen1.5-MoE has the architecture of Qwen2-MoE.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxquant.models.dense import MLP, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import Linear, Stack
from jaxquant.models.moe import Layers, MoE, MoEConfig, MoEDecoder, read_routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(MoEConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "Qwen3MoEConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        bias = hf.flag("attention_bias", default=False)
        common = _read(hf, num_kv_heads=4, moe_intermediate_size=768, num_experts=128)
        return Qwen3MoEConfig(**common, qk_norm="head", qkv_bias=bias, out_bias=bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoEConfig(MoEConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "Qwen2MoEConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        return Qwen2MoEConfig(
            **_read(hf, num_kv_heads=16, moe_intermediate_size=1408, num_experts=60),
            qkv_bias=hf.flag("qkv_bias", default=True),
            shared_size=hf.size("shared_expert_intermediate_size", default=5632),
        )


def _read(
    hf: HFConfig, *, num_kv_heads: int, moe_intermediate_size: int, num_experts: int
) -> dict[str, Any]:
    """What both have, given their defaults."""
    hf.require("hidden_act", ("silu",), default="silu")
    hf.require("use_sliding_window", (False, None), default=False)
    sizes = read_sizes(hf, num_kv_heads=num_kv_heads, max_position=32768)
    L = sizes["num_layers"]
    hf.layer_types(L, default=("full_attention",) * L, allowed=("full_attention",))
    # transformers 5 writes Qwen3's as num_local_experts.
    field = "num_local_experts" if "num_local_experts" in hf.fields else "num_experts"
    return {
        **sizes,
        "layer_kinds": (LayerKind(hf.rope(sizes["head_dim"])),) * L,
        "routing": read_routing(
            hf,
            field,
            default=num_experts,
            normalize=hf.flag("norm_topk_prob", default=False),
        ),
        "moe_intermediate_size": hf.size("moe_intermediate_size", default=moe_intermediate_size),
        "is_sparse": _sparse_layers(hf, L),
    }


def _sparse_layers(hf: HFConfig, L: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`th layer, but for `mlp_only_layers`."""
    dense = hf.fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(l) is not int for l in dense):
        raise hf.error("mlp_only_layers", "null or a list of layer numbers")
    step = hf.size("decoder_sparse_step", default=1)
    return tuple(l not in dense and (l + 1) % step == 0 for l in range(L))


class SharedExpertMoE(MoE):
    """Routed experts, and a shared one with a gate."""

    def __init__(self, cfg: MoEConfig, stack: Stack, dtype: Any):
        super().__init__(cfg, stack, dtype)
        self.shared_expert = MLP(cfg.shared(), stack, dtype)
        self.shared_expert_gate = Linear(
            len(stack.layers), 1, cfg.hidden_size, bias=False, dtype=dtype
        )

    def __call__(self, x: Float[Array, "B T K"], l: Any) -> Float[Array, "B T K"]:
        """Applies the experts of one layer."""
        gate = jax.nn.sigmoid(self.shared_expert_gate(x, l))
        return super().__call__(x, l) + gate * self.shared_expert(x, l)


class Qwen2MoELayers(Layers):
    """A stack of equal layers."""

    sparse = SharedExpertMoE


class Qwen2MoE(MoEDecoder):
    """A decoder of such layers."""

    layers_type = Qwen2MoELayers


class Qwen3MoE(MoEDecoder):
    """A decoder without shared experts."""
