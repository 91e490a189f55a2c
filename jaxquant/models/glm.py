"""GLM-4: half of each head is rotated, in interleaved pairs; gate and up are one tensor.

`GlmForCausalLM` (glm-4-9b-chat-hf) has Llama's layers; `Glm4ForCausalLM` (GLM-4-0414) also
normalizes what attention and MLP add to the residual stream.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import MLP, Attention, DenseConfig, LayerKind, read_sizes
from jaxquant.models.fused import FusedRows
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import RMSNorm, Stack
from jaxquant.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class GlmConfig(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "GlmConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        sizes: Any = read_sizes(
            hf,
            head_dim=128,
            num_kv_heads=2,
            max_position=131072,
            eps=("rms_norm_eps", 1.5625e-7),
        )
        kind = LayerKind(hf.rope(sizes["head_dim"], partial=0.5, interleaved=True))
        return GlmConfig(
            **sizes,
            layer_kinds=(kind,) * sizes["num_layers"],
            qkv_bias=hf.flag("attention_bias", default=True),
        )


class Glm4Layers(nnx.Module):
    """A stack of equal layers: norms before attention and MLP, and behind them."""

    def __init__(self, cfg: GlmConfig, stack: Stack, dtype: Any):
        def norm() -> RMSNorm:
            return RMSNorm(len(stack.layers), cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)

        self.input_layernorm = norm()
        self.self_attn = Attention(cfg, stack, dtype)
        self.post_self_attn_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.mlp = MLP(cfg, stack, dtype)
        self.post_mlp_layernorm = norm()

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        y, cache = self.self_attn(x, l, *rest, norm=self.input_layernorm.prologue)
        x = x + self.post_self_attn_layernorm(y, l)
        y = self.mlp(x, l, norm=self.post_attention_layernorm.prologue)
        return x + self.post_mlp_layernorm(y, l), cache


class Glm(Llama):
    """Llama's layers with GLM's options."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "mlp/gate_proj": "mlp/gate_up_proj/gate_proj",
        "mlp/up_proj": "mlp/gate_up_proj/up_proj",
    }

    @staticmethod
    def fused(cfg: GlmConfig) -> Mapping[str, FusedRows]:
        """Where gate and up lie in `gate_up_proj`."""
        wide = cfg.intermediate_size
        return {"gate_up_proj": FusedRows({"gate_proj": wide, "up_proj": wide})}


class Glm4(Decoder):
    """A decoder of layers with norms on both sides."""

    layers_type = Glm4Layers
    checkpoint_names = Glm.checkpoint_names
    fused = staticmethod(Glm.fused)
