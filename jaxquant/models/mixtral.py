"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxquant.models.dense import LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.moe import Layers, MoE, MoEConfig, MoEDecoder, read_routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(MoEConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "MixtralConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        sizes = read_sizes(hf, num_kv_heads=8, max_position=131072, eps=("rms_norm_eps", 1e-5))
        L = sizes["num_layers"]
        kind = LayerKind(hf.rope(sizes["head_dim"]), hf.optional_size("sliding_window"))
        return MixtralConfig(
            **sizes,
            layer_kinds=(kind,) * L,
            routing=read_routing(hf, "num_local_experts", default=8),
            moe_intermediate_size=sizes["intermediate_size"],
            is_sparse=(True,) * L,
        )


class MixtralMoE(MoE):
    """Experts under the names of Mixtral's checkpoints."""

    names = ("w1", "w3", "w2")


class MixtralLayers(Layers):
    """A stack of equal layers."""

    sparse = MixtralMoE


class Mixtral(MoEDecoder):
    """A decoder of such layers."""

    layers_type = MixtralLayers
    checkpoint_names: ClassVar[Mapping[str, str]] = {"mlp": "block_sparse_moe"}
