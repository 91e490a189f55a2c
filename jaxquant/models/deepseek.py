"""DeepSeek V2 (https://arxiv.org/abs/2405.04434) and V3 (https://arxiv.org/abs/2412.19437).

Multi-head latent attention and experts. V2-Lite, V3.1 and R1 have these architectures too.
"""

import dataclasses
import math
from typing import Any

from jaxquant.models.attention import Cache
from jaxquant.models.dense import LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import Stack
from jaxquant.models.mla import MLA, MLAConfig
from jaxquant.models.moe import Layers, MoEConfig, MoEDecoder, SharedExpertsMoE, read_routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(MoEConfig):
    """Sizes and options, as in config.json."""

    mla: MLAConfig


class DeepseekV2Config(DeepseekConfig):
    """Of V2 and V2-Lite."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "DeepseekV2Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
        hf.require("scoring_func", ("softmax",), default="softmax")
        # DeepSeek's own code then leaves out routed_scaling_factor, others do not.
        hf.require("norm_topk_prob", (False, None), default=False)
        grouped = hf.fields.get("topk_method") == "group_limited_greedy"
        routing = read_routing(
            hf,
            "n_routed_experts",
            normalize=False,
            scale=hf.number("routed_scaling_factor", default=1.0),
            groups=hf.size("n_group") if grouped else 1,
            top_groups=hf.size("topk_group") if grouped else 1,
        )
        return DeepseekV2Config(**_read(hf, interleaved=True), routing=routing)


class DeepseekV3Config(DeepseekConfig):
    """Of V3, V3.1 and R1."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "DeepseekV3Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("topk_method", ("noaux_tc",), default="noaux_tc")
        hf.require("scoring_func", ("sigmoid",), default="sigmoid")
        routing = read_routing(
            hf,
            "n_routed_experts",
            score="sigmoid",
            normalize=hf.flag("norm_topk_prob", default=True),
            scale=hf.number("routed_scaling_factor", default=2.5),
            groups=hf.size("n_group", default=8),
            top_groups=hf.size("topk_group", default=4),
            group_top=2,
        )
        common = _read(hf, interleaved=hf.flag("rope_interleave", default=True))
        return DeepseekV3Config(**common, routing=routing, correction=True)


def _read(hf: HFConfig, *, interleaved: bool) -> dict[str, Any]:
    """What both have."""
    hf.require("hidden_act", ("silu",), default="silu")
    hf.require("moe_layer_freq", (1,), default=1)
    sizes: Any = read_sizes(hf)
    heads, L = sizes["num_heads"], sizes["num_layers"]
    hf.require("num_key_value_heads", (heads, None), default=heads)
    nope, rotated = hf.size("qk_nope_head_dim"), hf.size("qk_rope_head_dim")
    wide, dense = hf.size("moe_intermediate_size"), hf.count("first_k_dense_replace", default=0)
    mla = MLAConfig(
        hidden_size=sizes["hidden_size"],
        num_heads=heads,
        q_rank=hf.optional_size("q_lora_rank"),
        kv_rank=hf.size("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rotated,
        v_dim=hf.size("v_head_dim"),
        scale=_yarn_scale(hf) / math.sqrt(nope + rotated),
        bias=hf.flag("attention_bias", default=False),
    )
    return {
        **sizes,
        "head_dim": nope + rotated,
        "layer_kinds": (LayerKind(hf.rope(rotated, interleaved=interleaved)),) * L,
        "mla": mla,
        "moe_intermediate_size": wide,
        "is_sparse": tuple(l >= dense for l in range(L)),
        "shared_size": wide * hf.count("n_shared_experts", default=0),
        "mtp_layers": hf.count("num_nextn_predict_layers", default=0),
    }


def _yarn_scale(hf: HFConfig) -> float:
    """What yarn multiplies logits with, beside the attention factor of its rotation."""
    rope = hf.section("rope_parameters" if hf.fields.get("rope_parameters") else "rope_scaling")
    mscale = rope.optional_number("mscale_all_dim")
    kind = rope.fields.get("rope_type", rope.fields.get("type", "default"))
    if kind == "default" or mscale is None or (factor := rope.number("factor")) <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


class DeepseekAttention(MLA):
    """Latent attention of a stack of layers."""

    def __init__(self, cfg: DeepseekConfig, stack: Stack, dtype: Any):
        super().__init__(cfg.mla, stack, dtype)


class DeepseekLayers(Layers):
    """A stack of equal layers."""

    attention = DeepseekAttention
    sparse = SharedExpertsMoE


class Deepseek(MoEDecoder):
    """A decoder of such layers."""

    layers_type = DeepseekLayers

    def empty_cache(self, B: int, S: int, dtype: Any = None, awaited: int = 0) -> Cache:
        """A cache of latents for B sequences; see `Decoder.empty_cache`."""
        dtype = dtype or self.embed_tokens.weight.get_value().dtype
        return self.cfg.mla.empty_cache(self.cfg.num_layers, B, S, dtype, awaited)
