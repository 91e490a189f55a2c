"""The Llama family: Llama 2, 3, 3.1, 3.2, Mistral, and what shares their architecture.

Every layer is `x += attention(norm(x)); x += mlp(norm(x))`, with rotary embedding, grouped-query
attention and a gated MLP.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxquant.models.decoder import Decoder
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import Linear, RMSNorm, Rope, Stack, projections


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options, as in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: Rope
    rms_norm_eps: float
    window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @staticmethod
    def from_hf(hf: HFConfig) -> "LlamaConfig":
        """Reads config.json; what this file does not compute is refused by name."""
        mistral = hf.model_type == "mistral"  # whose fields have other defaults
        hf.require("hidden_act", ("silu",), default="silu")
        heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
        kv_heads = hf.size("num_key_value_heads", default=8 if mistral else heads)
        if heads % kv_heads:
            raise hf.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        head_dim = hf.size("head_dim", default=hidden // heads)
        return LlamaConfig(
            vocab_size=hf.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=hf.size("intermediate_size"),
            num_layers=hf.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=hf.size("max_position_embeddings", default=131072 if mistral else 2048),
            rope=hf.rope(head_dim),
            rms_norm_eps=hf.number("rms_norm_eps", default=1e-6),
            window=hf.optional_size("sliding_window", default=4096) if mistral else None,
            tie_word_embeddings=hf.flag("tie_word_embeddings", default=False),
            attention_bias=hf.flag("attention_bias", default=False),
            mlp_bias=hf.flag("mlp_bias", default=False),
        )


class Attention(nnx.Module):
    """Grouped-query attention of a stack of layers."""

    def __init__(self, cfg: LlamaConfig, stack: Stack, dtype: Any):
        self.cfg = cfg
        q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        options: Any = {"bias": cfg.attention_bias, "dtype": dtype}
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = projections("qkv_proj", qkv, cfg.hidden_size, stack, **options)
        self.o_proj = Linear(len(stack.layers), cfg.hidden_size, q_size, **options)

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, tokens: Any, cache: Any, cache_layer: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies the attention of one layer; see `Decoder` for `tokens` and `cache`."""
        cfg = self.cfg
        heads = (*x.shape[:-1], -1, cfg.head_dim)
        q, k, v = (y.reshape(heads) for y in self.qkv_proj(x, l))
        q, k = (cfg.rope.rotate(y, tokens.positions) for y in (q, k))
        attended, cache = tokens.attend(q, k, v, cache, cache_layer, window=cfg.window)
        return self.o_proj(attended.reshape(*x.shape[:-1], -1), l), cache


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` of a stack of layers."""

    def __init__(self, cfg: LlamaConfig, stack: Stack, dtype: Any):
        wide, narrow = cfg.intermediate_size, cfg.hidden_size
        options: Any = {"bias": cfg.mlp_bias, "dtype": dtype}
        gate_up = {"gate_proj": wide, "up_proj": wide}
        self.gate_up_proj = projections("gate_up_proj", gate_up, narrow, stack, **options)
        self.down_proj = Linear(len(stack.layers), narrow, wide, **options)

    def __call__(self, x: Float[Array, "B T K"], l: Any) -> Float[Array, "B T K"]:
        """Applies the MLP of one layer."""
        gate, up = self.gate_up_proj(x, l)
        return self.down_proj(jax.nn.silu(gate) * up, l)


class Layers(nnx.Module):
    """A stack of equal layers."""

    def __init__(self, cfg: LlamaConfig, stack: Stack, dtype: Any):
        L, eps = len(stack.layers), cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(cfg, stack, dtype)
        self.post_attention_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(cfg, stack, dtype)

    def __call__(
        self, x: Float[Array, "B T K"], l: Any, tokens: Any, cache: Any, cache_layer: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        """Applies one layer; see `Decoder`."""
        y, cache = self.self_attn(self.input_layernorm(x, l), l, tokens, cache, cache_layer)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x, l), l), cache


class Llama(Decoder):
    """A decoder of such layers."""

    layers_type = Layers
