"""The reference: plain XLA, right on every backend."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "L B H S D"],
    v: Float[Array, "L B H S D"],
    layer: Any,
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B Hq D"]:
    """Two products over all slots, with a mask. See `jaxquant.attention.decode_attention`."""
    k, v = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k, v))
    B, H, S, D = k.shape
    # float32 means float32: the default precision on accelerators is TF32.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("bhgd,bhsd->bhgs", q.reshape(B, H, -1, D), k) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    slot, end = jnp.arange(S), lengths[:, None]
    mask = slot < end
    if window is not None:
        mask &= slot >= end - window
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    # A weight of 0 does not silence NaN.
    v = jnp.where(mask[:, None, :, None], v, 0)
    return product("bhgs,bhsd->bhgd", weights, v).astype(q.dtype).reshape(q.shape)
