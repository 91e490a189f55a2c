"""Attention of whole sequences and over a key/value cache."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of all layers; donate it to the function that extends it.

    Sequences start at slot 0, whatever their length, so but for rounding a result does not depend
    on the rest of the batch. Heads come before slots, so that a decode step reads each head's in
    one piece.

    Attributes:
      k: `[L, B, H, S, D]`, H key/value heads, S slots.
      v: likewise.
      lengths: `[B]` int32, how many slots of each sequence are filled.
    """

    k: Float[Array, "L B H S D"]
    v: Float[Array, "L B H S D"]
    lengths: Int[Array, " B"]

    @staticmethod
    def empty(L: int, B: int, H: int, S: int, D: int, dtype: Any) -> "Cache":
        """A cache with no filled slots."""
        shape = (L, B, H, S, D)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((B,), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Forward:
    """A pass over whole sequences that keeps nothing.

    Attributes:
      positions: `[B, T]` of the tokens.
    """

    positions: Int[Array, "B T"]

    @staticmethod
    def of(tokens: Int[Array, "B T"]) -> "Forward":
        """Of sequences that start at position 0."""
        return Forward(_positions(tokens))

    def attend(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        cache: Any,
        layer: Any,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T Hq D"], Any]:
        """What each token attends to: itself and those before it. And the cache."""
        return causal_attention(q, k, v, window), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefill(Forward):
    """A pass over prompts, padded on the right, that fills an empty cache."""

    @staticmethod
    def of(tokens: Int[Array, "B T"]) -> "Prefill":
        """Of sequences that start at position 0."""
        return Prefill(_positions(tokens))

    def attend(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        cache: Cache,
        layer: Any,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T Hq D"], Cache]:
        """See `Forward.attend`; keys and values are written to the cache."""
        start = (layer, 0, 0, 0, 0)
        cache = dataclasses.replace(
            cache,
            k=lax.dynamic_update_slice(cache.k, k.swapaxes(1, 2)[None], start),
            v=lax.dynamic_update_slice(cache.v, v.swapaxes(1, 2)[None], start),
        )
        return causal_attention(q, k, v, window), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeStep:
    """One more token of each sequence of a cache, which has a slot for it.

    Attributes:
      lengths: `[B]` how many slots are filled; the position of the token.
    """

    lengths: Int[Array, " B"]

    @property
    def positions(self) -> Int[Array, "B 1"]:
        """Of the tokens."""
        return self.lengths[:, None]

    def attend(
        self,
        q: Float[Array, "B 1 Hq D"],
        k: Float[Array, "B 1 H D"],
        v: Float[Array, "B 1 H D"],
        cache: Cache,
        layer: Any,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B 1 Hq D"], Cache]:
        """See `Forward.attend`; keys and values are written to the cache first."""
        at = self.lengths
        rows = jnp.arange(at.shape[0])
        cache = dataclasses.replace(
            cache,
            k=cache.k.at[layer, rows, :, at].set(k[:, 0]),
            v=cache.v.at[layer, rows, :, at].set(v[:, 0]),
        )
        return cached_attention(q, cache.k[layer], cache.v[layer], at, window), cache


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    window: int | None,
) -> Float[Array, "B T Hq D"]:
    """Each token attends to itself and those before it, the last `window` of them if given."""
    left = None if window is None or window >= q.shape[1] else (window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, is_causal=True, local_window_size=left
    )
    # cuDNN's flash attention takes 16-bit inputs and heads of up to 128 in steps of 8.
    flash = q.dtype != jnp.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if flash and q.shape[1] > 1 and jax.default_backend() == "gpu":
        return attend(implementation="cudnn")
    with jax.default_matmul_precision(_precision(q.dtype)):
        return attend(implementation="xla")


def cached_attention(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B H S D"],
    v: Float[Array, "B H S D"],
    position: Int[Array, " B"],
    window: int | None,
) -> Float[Array, "B 1 Hq D"]:
    """The token at `position` of each sequence attends to slots 0 to position, or the last ones."""
    (B, H, S, D), precision = k.shape, _precision(q.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("bhgd,bhsd->bhgs", q.reshape(B, H, -1, D), k) / math.sqrt(D)
    slot, last = jnp.arange(S), position[:, None]
    mask = slot <= last
    if window is not None and window < S:
        mask &= slot > last - window
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return product("bhgs,bhsd->bhgd", weights, v).astype(q.dtype).reshape(q.shape)


def _positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def _precision(dtype: Any) -> str | None:
    # float32 means float32: the default precision on accelerators is TF32.
    return "highest" if dtype == jnp.float32 else None
