"""The decoder that families share: embedding, stacks of layers, norm, head; prefill and decode.

Equal layers are stacked and scanned: one layer is compiled, and a kernel can read its weights in
place from the stack. Layers that differ in what is quantized are in stacks of their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.models.attention import Cache, DecodeStep, Forward, Prefill
from jaxquant.models.layers import RMSNorm, Stack, Table


class Decoder(nnx.Module):
    """A decoder-only model. Parameters are ShapeDtypeStructs until they are loaded.

    A family sets `layers_type`: made of `(cfg, stack, dtype)`, called with

        x             [B, T, K], the residual stream
        l             which layer of the stack
        tokens        what is done: `attention.Forward`, `Prefill` or `DecodeStep`
        cache         the Cache that goes with it, or None
        cache_layer   which layer of the model

    and returning x and the cache.

    Args:
      cfg: the family's sizes; with vocab_size, hidden_size, num_layers, rms_norm_eps,
        tie_word_embeddings, and for the cache num_kv_heads and head_dim.
      dtype: of parameters and activations.
      stacks: how layers are stored; default one stack of all.
    """

    layers_type: ClassVar[Any]

    def __init__(self, cfg: Any, dtype: Any, stacks: Sequence[Stack] | None = None):
        stacks = stacks or [Stack(range(cfg.num_layers))]
        self.cfg = cfg
        self.stacks = tuple(stacks)
        self.embed_tokens = Table(cfg.vocab_size, cfg.hidden_size, dtype)
        self.layers = nnx.List([self.layers_type(cfg, stack, dtype) for stack in stacks])
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None if cfg.tie_word_embeddings else Table(cfg.vocab_size, cfg.hidden_size, dtype)
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of every token, without a cache."""
        x, _ = self._run(tokens, Forward.of(tokens), None)
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
        x, cache = self._run(tokens, Prefill.of(tokens), cache)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), dataclasses.replace(cache, lengths=lengths)

    def decode(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float32[Array, "B V"], Cache]:
        """Appends one token to each sequence; the cache must have a slot for it.

        Returns:
          Logits of these tokens, and the cache.
        """
        lengths = cache.lengths
        x, cache = self._run(tokens[:, None], DecodeStep(lengths), cache)
        return self.head(x[:, 0]), dataclasses.replace(cache, lengths=lengths + 1)

    def _run(
        self, ids: Int[Array, "B T"], tokens: Any, cache: Any
    ) -> tuple[Float[Array, "B T K"], Any]:
        # The cache is carried and written in place; as a scanned input it would be copied.
        carry = self.embed_tokens.embed(ids), cache
        for stack, layers in zip(self.stacks, self.layers, strict=True):

            def layer(
                carry: tuple, l: Array, layers: Any = layers, first: int = stack.layers.start
            ) -> tuple[tuple, None]:
                x, cache = carry
                return layers(x, l, tokens, cache, first + l), None

            carry, _ = lax.scan(layer, carry, jnp.arange(len(stack.layers)))
        return carry

    def head(self, x: Float[Array, "*batch K"]) -> Float32[Array, "*batch V"]:
        """Final norm and logits in float32."""
        return (self.lm_head or self.embed_tokens).logits(self.norm(x))

    def empty_cache(self, B: int, S: int) -> Cache:
        """A cache for B sequences of up to S tokens."""
        cfg, dtype = self.cfg, self.embed_tokens.weight.get_value().dtype
        return Cache.empty(cfg.num_layers, B, cfg.num_kv_heads, S, cfg.head_dim, dtype)
