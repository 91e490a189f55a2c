"""Llama 2, 3, 3.1, 3.2, Mistral, InternLM3, and what shares their architecture.

Every layer is `x += attention(norm(x)); x += mlp(norm(x))`, with rotary embedding, grouped-query
attention and a gated MLP.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxquant.models.decoder import Decoder
from jaxquant.models.dense import MLP, Attention, DenseConfig, LayerKind, read_sizes
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import RMSNorm, Stack


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DenseConfig):
    """Sizes and options, as in config.json."""

    @staticmethod
    def from_hf(hf: HFConfig) -> "LlamaConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        hf.require("hidden_act", ("silu",), default="silu")
        window: int | None = None
        defaults: Any = {"max_position": 2048}
        qkv_bias = out_bias = hf.flag("attention_bias", default=False)
        mlp_bias = hf.flag("mlp_bias", default=False)
        if hf.model_type == "mistral":  # whose fields have other defaults
            window = hf.optional_size("sliding_window", default=4096)
            defaults = {"num_kv_heads": 8, "max_position": 131072}
        elif hf.model_type == "internlm3":
            qkv_bias = hf.flag("qkv_bias", default=qkv_bias)
            mlp_bias = out_bias = hf.flag("bias", default=mlp_bias)
            defaults = {
                "num_kv_heads": 2,
                "head_dim": 128,
                "max_position": 32768,
                "eps": ("rms_norm_eps", 1e-5),
            }
        sizes: Any = read_sizes(hf, **defaults)
        kind = LayerKind(hf.rope(sizes["head_dim"]), window)
        return LlamaConfig(
            **sizes,
            layer_kinds=(kind,) * sizes["num_layers"],
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            mlp_bias=mlp_bias,
        )


class Layers(nnx.Module):
    """A stack of equal layers."""

    norm_type: ClassVar[Any] = RMSNorm

    def __init__(self, cfg: DenseConfig, stack: Stack, dtype: Any):
        L, eps = len(stack.layers), cfg.rms_norm_eps
        self.input_layernorm = self.norm_type(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(cfg, stack, dtype)
        self.post_attention_layernorm = self.norm_type(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(cfg, stack, dtype)

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, *rest: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        norm = self.input_layernorm.prologue
        x, cache = self.self_attn(x, l, *rest, norm=norm, residual=x)
        return self.mlp(x, l, norm=self.post_attention_layernorm.prologue, residual=x), cache


class Llama(Decoder):
    """A decoder of such layers."""

    layers_type = Layers
