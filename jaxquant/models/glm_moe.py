"""GLM-4.5 and 4.6 (`Glm4MoeForCausalLM`): routing as in DeepSeek V3, grouped-query attention."""

import dataclasses

from jaxquant.models.dense import LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.moe import (
    Layers,
    MoEConfig,
    MoEDecoder,
    SharedExpertsMoE,
    read_routing,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4MoEConfig(MoEConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "Glm4MoEConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        sizes = read_sizes(hf, max_position=131072, eps=("rms_norm_eps", 1e-5))
        L, wide = sizes["num_layers"], hf.size("moe_intermediate_size", default=1408)
        dense = hf.count("first_k_dense_replace", default=1)
        routing = read_routing(
            hf,
            "n_routed_experts",
            default=128,
            score="sigmoid",
            normalize=hf.flag("norm_topk_prob", default=True),
            scale=hf.number("routed_scaling_factor", default=1.0),
            groups=hf.size("n_group", default=1),
            top_groups=hf.size("topk_group", default=1),
            group_top=2,
        )
        return Glm4MoEConfig(
            **sizes,
            layer_kinds=(LayerKind(hf.rope(sizes["head_dim"], partial=0.5)),) * L,
            qkv_bias=hf.flag("attention_bias", default=False),
            qk_norm="head" if hf.flag("use_qk_norm", default=False) else None,
            routing=routing,
            moe_intermediate_size=wide,
            is_sparse=tuple(l >= dense for l in range(L)),
            shared_size=wide * hf.size("n_shared_experts", default=1),
            correction=True,
            mtp_layers=hf.count("num_nextn_predict_layers", default=0),
        )


class Glm4MoELayers(Layers):
    """A stack of equal layers."""

    sparse = SharedExpertsMoE


class Glm4MoE(MoEDecoder):
    """A decoder of such layers."""

    layers_type = Glm4MoELayers
