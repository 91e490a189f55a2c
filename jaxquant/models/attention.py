"""Attention of whole sequences and over a key/value cache."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.array import QuantizedArray
from jaxquant.attention import (
    Units,
    append,
    append_and_attend,
    empty,
    fp8_attention,
    fp8_units,
    in_units,
    rotate_and_fill,
)
from jaxquant.matmul import QuantizedTokens
from jaxquant.models.layers import Rope, Rotations


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of all layers; donate it to the function that extends it.

    Sequences start at slot 0, whatever their length, so but for rounding a result does not depend
    on the rest of the batch. Heads come before slots, so that a decode step reads each head's in
    one piece.

    Attributes:
      k: `[L, B, H, S, D]`, H key/value heads, S slots; of the model's dtype, or FP8 as
        `jaxquant.attention.cache` has it.
      v: likewise, with a D of their own.
      lengths: `[B]` int32, how many slots of each sequence are filled.
    """

    k: Float[Array, "L B H S D"] | QuantizedArray
    v: Float[Array, "L B H S Dv"] | QuantizedArray
    lengths: Int[Array, " B"]

    @staticmethod
    def empty(
        L: int,
        B: int,
        H: int,
        S: int,
        D: int,
        dtype: Any,
        *,
        Dv: int | None = None,
        awaited: int = 0,
    ) -> "Cache":
        """A cache with no filled slots; Dv is D unless given, `awaited` as in `attention.empty`."""
        k = empty((L, B, H, S, D), dtype, awaited=awaited)
        v = empty((L, B, H, S, D if Dv is None else Dv), dtype, values=True, awaited=awaited)
        return Cache(k, v, jnp.zeros((B,), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Forward:
    """A pass over whole sequences that keeps nothing.

    Attributes:
      rotations: of the tokens.
      dtype: what tokens attend in: None, that of queries, or "float8_e4m3fn"; see
        `jaxquant.attention.fp8`.
    """

    rotations: Rotations
    dtype: str | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "B T"],
        ropes: Iterable[Rope | None],
        lengths: Int[Array, " B"] | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Of sequences that start at position 0; padding behind `lengths` has none of its own."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if lengths is not None:
            positions = jnp.minimum(positions, lengths[:, None] - 1)
        return cls(Rotations.of(ropes, positions), dtype)

    def attend(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        cache: Any,
        layer: Any,
        *,
        rope: Rope | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        may_quantize: bool = False,
    ) -> tuple[Float[Array, "B T Hq D"] | QuantizedTokens, Any]:
        """What each token gets from itself and those before it, and the cache.

        Args:
          q: queries, not rotated yet.
          k: keys, likewise.
          v: values.
          cache: the Cache, or None.
          layer: which of its layers is meant.
          rope: rotates queries and keys, if given; one of those in `rotations`.
          window: how many tokens a token sees, itself included; None is all.
          scale: what `q k^T` is multiplied with; default `1 / sqrt(D)`.
          softcap: if given, scores become `softcap * tanh(scores / softcap)`.
          may_quantize: whether the result may be QuantizedTokens `[B, T, Hq * D]`.
        """
        units = self.units(q, k, v, rope)
        q, k = (self.rotations.rotate(y, rope) for y in (q, k))
        options: Any = {"window": window, "scale": scale, "softcap": softcap}
        if units is None:
            return causal_attention(q, k, v, **options), cache
        y = fp8_attention(in_units((q, k, v), units), units, q.dtype, **options)
        return y if may_quantize else of_heads(y, q.shape[2]), cache

    def units(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H Dv"],
        rope: Rope | None = None,
    ) -> Units | None:
        """Of FP8, if that is what tokens attend in, given what is still to be rotated."""
        if self.dtype is None:
            return None
        return fp8_units(q, k, v, 1.0 if rope is None else max(1.0, rope.attention_factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefill(Forward):
    """A pass over prompts, padded on the right, that fills an empty cache."""

    def attend(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        cache: Cache,
        layer: Any,
        *,
        rope: Rope | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        may_quantize: bool = False,
    ) -> tuple[Float[Array, "B T Hq D"] | QuantizedTokens, Cache]:
        """See `Forward.attend`; keys and values are written to the cache."""
        units, rotation = self.units(q, k, v, rope), None
        if rope is not None and rope.rotates_halves_of(q.shape[-1]):
            rotation = self.rotations.table(rope)
        else:
            q, k = (self.rotations.rotate(y, rope) for y in (q, k))
        qkv, *new = rotate_and_fill(q, k, v, cache.k, cache.v, layer, rotation, units)
        cache = dataclasses.replace(cache, k=new[0], v=new[1])
        options: Any = {"window": window, "scale": scale, "softcap": softcap}
        if units is None:
            return causal_attention(*qkv, **options), cache
        y = fp8_attention(qkv, units, q.dtype, **options)
        return y if may_quantize else of_heads(y, q.shape[2]), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeStep:
    """One more token of each sequence of a cache, which has a slot for it.

    Attributes:
      filled: `[B]` how many slots are filled, with it. Made once: XLA would add in each layer.
      rotations: of the tokens.
    """

    filled: Int[Array, " B"]
    rotations: Rotations

    @staticmethod
    def of(lengths: Int[Array, " B"], ropes: Iterable[Rope | None]) -> "DecodeStep":
        """Of sequences with so many filled slots."""
        return DecodeStep(lengths + 1, Rotations.of(ropes, lengths[:, None]))

    def append(
        self,
        cache: Cache,
        k: Float[Array, "B 1 H D"],
        v: Float[Array, "B 1 H Dv"],
        layer: Any,
    ) -> Cache:
        """The cache with the key and the value of each token in one layer."""
        return dataclasses.replace(
            cache,
            k=append(cache.k, k[:, 0], layer, self.filled),
            v=append(cache.v, v[:, 0], layer, self.filled),
        )

    def attend(
        self,
        q: Float[Array, "B 1 Hq D"],
        k: Float[Array, "B 1 H D"],
        v: Float[Array, "B 1 H D"],
        cache: Cache,
        layer: Any,
        *,
        rope: Rope | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        may_quantize: bool = False,
    ) -> tuple[Float[Array, "B 1 Hq D"] | QuantizedTokens, Cache]:
        """See `Forward.attend`; keys and values are written to the cache first."""
        B, _, _, D = q.shape
        rotation = None
        if rope is not None and rope.rotates_halves_of(D):
            cos, sin = self.rotations.table(rope)
            rotation = cos[:, 0], sin[:, 0]
        else:
            q, k = (self.rotations.rotate(y, rope) for y in (q, k))
        options: Any = {"window": window, "scale": scale, "softcap": softcap}
        options["may_quantize"] = may_quantize
        qkv = q[:, 0], k[:, 0], v[:, 0]
        out, *new = append_and_attend(
            qkv, cache.k, cache.v, layer, self.filled, rotation, **options
        )
        quantized = isinstance(out, QuantizedTokens)
        out = dataclasses.replace(out, batch=(B, 1)) if quantized else out[:, None]
        return out, dataclasses.replace(cache, k=new[0], v=new[1])


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T Hq D"]:
    """Each token attends to itself and those before it; see `Forward.attend`."""
    T, D = q.shape[1], q.shape[-1]
    if softcap is not None:
        return _capped_attention(q, k, v, window, scale, softcap)
    left = None if window is None or window >= T else (window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, is_causal=True, local_window_size=left, scale=scale
    )
    # cuDNN's flash attention takes 16-bit inputs and heads of up to 128 in steps of 8.
    flash = q.dtype != jnp.float32 and D % 8 == 0 and D <= 128
    if flash and T > 1 and jax.default_backend() == "gpu":
        return attend(implementation="cudnn")
    with jax.default_matmul_precision(_precision(q.dtype)):
        return attend(implementation="xla")


def of_heads(y: QuantizedTokens, Hq: int) -> Float[Array, "B T Hq D"]:
    """What is quantized, in its dtype, head by head."""
    return y.dequantize().astype(y.dtype).reshape(*y.batch, Hq, -1)


def _capped_attention(
    q: Array, k: Array, v: Array, window: int | None, scale: float | None, softcap: float
) -> Array:
    """With a softcap, which neither XLA's attention nor cuDNN's has."""
    B, T, _, D = q.shape
    product = functools.partial(
        jnp.einsum, precision=_precision(q.dtype), preferred_element_type=jnp.float32
    )
    logits = product("bthgd,bshd->bhgts", q.reshape(B, T, k.shape[2], -1, D), k)
    logits *= 1 / math.sqrt(D) if scale is None else scale
    slot, token = jnp.arange(T), jnp.arange(T)[:, None]
    mask = slot <= token
    if window is not None:
        mask &= slot > token - window
    logits = jnp.where(mask, softcap * jnp.tanh(logits / softcap), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return product("bhgts,bshd->bthgd", weights, v).astype(q.dtype).reshape(q.shape)


def _precision(dtype: Any) -> str | None:
    # float32 means float32: the default precision on accelerators is TF32.
    return "highest" if dtype == jnp.float32 else None
