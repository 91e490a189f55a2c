"""OLMo 2: norms behind attention and MLP instead of before, and over whole queries and keys."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import MLP, Attention, DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import RMSNorm, Stack


@dataclasses.dataclass(frozen=True)
class Olmo2Config(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "Olmo2Config":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        sizes: Any = read_sizes(hf, max_position=2048, eps=("rms_norm_eps", 1e-5))
        bias = hf.flag("attention_bias", default=False)
        return Olmo2Config(
            **sizes,
            layer_kinds=(LayerKind(hf.rope(sizes["head_dim"])),) * sizes["num_layers"],
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="all",
        )


class Layers(nnx.Module):
    """A stack of equal layers."""

    def __init__(self, cfg: Olmo2Config, stack: Stack, dtype: Any):
        L, eps = len(stack.layers), cfg.rms_norm_eps
        self.self_attn = Attention(cfg, stack, dtype)
        self.post_attention_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(cfg, stack, dtype)
        self.post_feedforward_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        y, cache = self.self_attn(x, l, *rest)
        x = x + self.post_attention_layernorm(y, l)
        return x + self.post_feedforward_layernorm(self.mlp(x, l), l), cache


class Olmo2(Decoder):
    """A decoder of such layers."""

    layers_type = Layers
