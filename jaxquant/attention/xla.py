"""The reference: plain XLA, right on every backend."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jaxquant.attention.cache import KeysOrValues, append, of_layer


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: KeysOrValues,
    v: KeysOrValues,
    layer: Any,
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B Hq D"]:
    """Two products over all slots, with a mask. See `jaxquant.attention.decode_attention`.

    Scales of an FP8 cache multiply logits and weights. Its values are exact in q's dtype.
    """
    (k, k_scale), (v, v_scale) = (of_layer(a, layer, q.dtype) for a in (k, v))
    B, H, S, D = k.shape
    # float32 means float32: the default precision on accelerators is TF32.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("bhgd,bhsd->bhgs", q.reshape(B, H, -1, D), k) * scale
    if k_scale is not None:
        logits *= k_scale[:, :, None]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    slot, end = jnp.arange(S), lengths[:, None]
    mask = slot < end
    if window is not None:
        mask &= slot >= end - window
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    # A weight of 0 does not silence NaN.
    v = jnp.where(mask[:, None, :, None], v, 0)
    if v_scale is not None:
        weights *= jnp.where(mask[:, None], v_scale, 0)[:, :, None]
    return product("bhgs,bhsd->bhgd", weights.astype(v.dtype), v).astype(q.dtype).reshape(q.shape)


def heads_of(
    qkv: Float[Array, "B R D"] | tuple[Array, Array, Array], H: int
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B H D"], Float[Array, "B H D"]]:
    """Queries, keys and values, of H key/value heads, if they are not apart yet."""
    if isinstance(qkv, tuple):
        return qkv
    B, R, D = qkv.shape
    # As columns, in the shape in which the kernel joins them again: XLA does neither then.
    parts = jnp.split(qkv.reshape(B, 1, -1), [(R - 2 * H) * D, (R - H) * D], axis=2)
    q, k, v = (x.reshape(B, -1, D) for x in parts)
    return q, k, v


def append_and_attend(
    qkv: Float[Array, "B R D"] | tuple[Array, Array, Array],
    k: KeysOrValues,
    v: KeysOrValues,
    layer: Any,
    lengths: Int[Array, " B"],
    rotation: tuple[Float32[Array, "B pairs"], Float32[Array, "B pairs"]] | None,
    *,
    attend: Any,
) -> tuple[Float[Array, "B Hq D"], KeysOrValues, KeysOrValues]:
    """One thing after the other. See `jaxquant.attention.append_and_attend`.

    Args:
      qkv: queries, keys and values of the new tokens.
      k: of the cache.
      v: of the cache.
      layer: which of the L.
      lengths: filled slots, with the new token's.
      rotation: cosines and sines, or None.
      attend: `decode_attention` with its options.
    """
    q, new_k, new_v = heads_of(qkv, k.shape[2])
    if rotation is not None:
        q, new_k = (rotate_halves(x, *rotation) for x in (q, new_k))
    k, v = append(k, new_k, layer, lengths), append(v, new_v, layer, lengths)
    return attend(q, k, v, layer, lengths), k, v


def rotate_halves(
    x: Float[Array, "*batch H D"],
    cos: Float32[Array, "*batch pairs"],
    sin: Float32[Array, "*batch pairs"],
) -> Float[Array, "*batch H D"]:
    """Rotates the pairs (i, i + D / 2) of each head, in float32."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
