"""The Llama family: Llama 2, 3, 3.1, 3.2, Mistral, and what shares their architecture.

Equal layers are stacked and scanned: one layer is compiled, and a kernel can read its weights in
place from the stack. Layers that differ in what is quantized are in stacks of their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.models.hf_config import HFConfig
from jaxquant.models.layers import (
    Cache,
    Linear,
    RMSNorm,
    Rope,
    Table,
    cached_attention,
    causal_attention,
)


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
    """Grouped-query attention of L stacked layers."""

    def __init__(self, cfg: LlamaConfig, L: int, dtype: Any):
        q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        bias = cfg.attention_bias
        self.q_proj = Linear(L, q_size, cfg.hidden_size, bias=bias, dtype=dtype)
        self.k_proj = Linear(L, kv_size, cfg.hidden_size, bias=bias, dtype=dtype)
        self.v_proj = Linear(L, kv_size, cfg.hidden_size, bias=bias, dtype=dtype)
        self.o_proj = Linear(L, cfg.hidden_size, q_size, bias=bias, dtype=dtype)

    def qkv(
        self, x: Float[Array, "B T K"], layer: Any, cfg: LlamaConfig, positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Queries `[B, T, Hq, D]` and keys, rotated, and values `[B, T, H, D]`."""

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], -1, cfg.head_dim)

        q, k, v = (heads(proj(x, layer)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return cfg.rope.rotate(q, positions), cfg.rope.rotate(k, positions), v


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` of L stacked layers."""

    def __init__(self, cfg: LlamaConfig, L: int, dtype: Any):
        wide, narrow, bias = cfg.intermediate_size, cfg.hidden_size, cfg.mlp_bias
        self.gate_proj = Linear(L, wide, narrow, bias=bias, dtype=dtype)
        self.up_proj = Linear(L, wide, narrow, bias=bias, dtype=dtype)
        self.down_proj = Linear(L, narrow, wide, bias=bias, dtype=dtype)

    def __call__(self, x: Float[Array, "B T K"], layer: Any) -> Float[Array, "B T K"]:
        """Applies the MLP of one layer."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x, layer)) * self.up_proj(x, layer), layer)


class Layers(nnx.Module):
    """L equal layers."""

    def __init__(self, cfg: LlamaConfig, L: int, dtype: Any):
        self.count = L
        eps = cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(cfg, L, dtype)
        self.post_attention_layernorm = RMSNorm(L, cfg.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(cfg, L, dtype)

    def attention_inputs(
        self, x: Float[Array, "B T K"], layer: Any, cfg: LlamaConfig, positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Norm, then queries, keys and values."""
        return self.self_attn.qkv(self.input_layernorm(x, layer), layer, cfg, positions)

    def finish(
        self, x: Float[Array, "B T K"], attended: Array, layer: Any
    ) -> Float[Array, "B T K"]:
        """Output projection and MLP, each added to the residual stream."""
        x = x + self.self_attn.o_proj(attended.reshape(*x.shape[:-1], -1), layer)
        return x + self.mlp(self.post_attention_layernorm(x, layer), layer)


class Llama(nnx.Module):
    """The decoder. Parameters are ShapeDtypeStructs until they are loaded.

    Args:
      cfg: the sizes.
      dtype: of parameters and activations.
      segments: how many consecutive layers each stack holds; default one stack of all.
    """

    def __init__(self, cfg: LlamaConfig, dtype: Any, segments: Sequence[int] | None = None):
        self.cfg = cfg
        self.embed_tokens = Table(cfg.vocab_size, cfg.hidden_size, dtype)
        self.layers = nnx.List([Layers(cfg, L, dtype) for L in segments or (cfg.num_layers,)])
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None if cfg.tie_word_embeddings else Table(cfg.vocab_size, cfg.hidden_size, dtype)
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of every token, without a cache."""
        cfg, positions = self.cfg, _positions(tokens)
        x = self.embed_tokens.embed(tokens)
        for stack in self.layers:

            def layer(x: Array, l: Array, stack: Layers = stack) -> tuple[Array, None]:
                q, k, v = stack.attention_inputs(x, l, cfg, positions)
                return stack.finish(x, causal_attention(q, k, v, cfg.window), l), None

            x, _ = lax.scan(layer, x, jnp.arange(stack.count))
        return self.head(x)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Fills an empty cache with prompts.

        Args:
          tokens: the prompts, padded on the right.
          lengths: their lengths, 1 to T.
          cache: at least T slots.

        Returns:
          Logits of the last token of each prompt, and the cache.
        """
        cfg, positions = self.cfg, _positions(tokens)

        def attend(q: Array, k: Array, v: Array, cache: Cache, l: Array) -> tuple[Array, Cache]:
            cache = dataclasses.replace(
                cache,
                k=lax.dynamic_update_slice(cache.k, k.swapaxes(1, 2)[None], (l, 0, 0, 0, 0)),
                v=lax.dynamic_update_slice(cache.v, v.swapaxes(1, 2)[None], (l, 0, 0, 0, 0)),
            )
            return causal_attention(q, k, v, cfg.window), cache

        x, cache = self._cached_layers(tokens, positions, cache, attend)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), dataclasses.replace(cache, lengths=lengths)

    def decode(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float32[Array, "B V"], Cache]:
        """Appends one token to each sequence; the cache must have a slot for it.

        Returns:
          Logits of these tokens, and the cache.
        """
        cfg, position = self.cfg, cache.lengths
        rows = jnp.arange(tokens.shape[0])

        def attend(q: Array, k: Array, v: Array, cache: Cache, l: Array) -> tuple[Array, Cache]:
            cache = dataclasses.replace(
                cache,
                k=cache.k.at[l, rows, :, position].set(k[:, 0]),
                v=cache.v.at[l, rows, :, position].set(v[:, 0]),
            )
            out = cached_attention(q, cache.k[l], cache.v[l], position, cfg.window)
            return out, cache

        x, cache = self._cached_layers(tokens[:, None], position[:, None], cache, attend)
        return self.head(x[:, 0]), dataclasses.replace(cache, lengths=position + 1)

    def _cached_layers(
        self, tokens: Array, positions: Array, cache: Cache, attend: Any
    ) -> tuple[Float[Array, "B T K"], Cache]:
        # The cache is carried and written in place; as a scanned input it would be copied.
        cfg, first = self.cfg, 0
        carry = self.embed_tokens.embed(tokens), cache
        for stack in self.layers:

            def layer(
                carry: tuple[Array, Cache], l: Array, stack: Layers = stack, first: int = first
            ) -> tuple[tuple[Array, Cache], None]:
                x, cache = carry
                q, k, v = stack.attention_inputs(x, l, cfg, positions)
                attended, cache = attend(q, k, v, cache, first + l)
                return (stack.finish(x, attended, l), cache), None

            carry, _ = lax.scan(layer, carry, jnp.arange(stack.count))
            first += stack.count
        return carry

    def head(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """Final norm and logits in float32."""
        return (self.lm_head or self.embed_tokens).logits(self.norm(x))

    def empty_cache(self, B: int, S: int) -> Cache:
        """A cache for B sequences of up to S tokens."""
        cfg, dtype = self.cfg, self.embed_tokens.weight.get_value().dtype
        return Cache.empty(cfg.num_layers, B, cfg.num_kv_heads, S, cfg.head_dim, dtype)


def _positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
