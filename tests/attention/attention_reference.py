"""Decode attention in float64, and operands for it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.array import QuantizedArray
from jaxquant.attention.cache import cache_shape, quantize_keys, quantize_values


def cache_and_query(
    B: int, H: int, G: int, S: int, D: int, dtype: str, *, L: int = 2, lengths: Any = None
) -> tuple:
    """Random q `[B, H * G, D]`, k and v `[L, B, H, S, D]`, NaN in unfilled slots, and lengths."""
    rng = np.random.default_rng(0)
    lengths = np.asarray(rng.integers(1, S + 1, B) if lengths is None else lengths, np.int32)
    shapes = (B, H * G, D), (L, B, H, S, D), (L, B, H, S, D)
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    for b, n in enumerate(lengths):
        k[:, b, :, n:] = v[:, b, :, n:] = np.nan
    return *(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.asarray(lengths)


def cache_and_token(
    B: int, H: int, G: int, S: int, D: int, dtype: str, *, L: int = 2, lengths: Any = None
) -> tuple:
    """Random qkv `[B, H * (G + 2), D]`, and for it k, v, lengths and a rotation.

    The slot of the new token, and those behind it, hold NaN.
    """
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.standard_normal((B, H * (G + 2), D)), dtype)
    _, k, v, lengths = cache_and_query(B, H, G, S, D, dtype, L=L, lengths=lengths)
    rows = jnp.arange(B)
    k, v = (a.at[:, rows, :, lengths - 1].set(jnp.nan) for a in (k, v))
    angles = rng.uniform(0, 2 * np.pi, (B, D // 2))
    rotation = jnp.asarray(np.cos(angles), "float32"), jnp.asarray(np.sin(angles), "float32")
    return qkv, k, v, lengths, rotation


def appended(qkv: Any, k: Any, v: Any, layer: int, lengths: Any, rotation: Any) -> tuple:
    """q, k and v of `definition`, rounded to qkv's dtype: rotated, with the token."""
    H, dtype = k.shape[2], qkv.dtype
    q, new_k, new_v = np.split(np.asarray(qkv, np.float64), [-2 * H, -H], axis=1)
    if rotation is not None:
        cos, sin = (np.asarray(table, np.float64)[:, None] for table in rotation)

        def rotated(x):
            x1, x2 = np.split(x, 2, axis=-1)
            return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

        q, new_k = (np.asarray(jnp.asarray(rotated(x), dtype), np.float64) for x in (q, new_k))
    k, v = (np.array(a, np.float64) for a in (k, v))
    for b, n in enumerate(lengths):
        k[layer, b, :, n - 1], v[layer, b, :, n - 1] = new_k[b], new_v[b]
    return q, k, v


def fp8_cache_and_token(*shape: int, dtype: str, L: int = 2, lengths: Any = None) -> tuple:
    """As `cache_and_token`, with an FP8 cache; what is not filled is finite there."""
    qkv, k, v, *rest = cache_and_token(*shape, dtype, L=L, lengths=lengths)
    return qkv, quantize_keys(jnp.nan_to_num(k)), quantize_values(jnp.nan_to_num(v)), *rest


def dequantized(cache: QuantizedArray) -> np.ndarray:
    """`[L, B, H, S, D]`, exactly."""
    values = np.asarray(cache.qvalue).astype(np.float64) * np.asarray(cache.scale, np.float64)
    return (values.swapaxes(-1, -2) if cache.transposed else values).reshape(cache_shape(cache))


def definition(
    q: Any,
    k: Any,
    v: Any,
    layer: int,
    lengths: Any,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (B, Hq, D), H = q.shape, k.shape[2]
    y = np.empty_like(q)
    for b in range(B):
        n = int(lengths[b])
        slots = slice(0 if window is None else max(0, n - window), n)
        for h in range(Hq):
            head = layer, b, h // (Hq // H), slots
            logits = k[head] @ q[b, h] * (D**-0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            y[b, h] = weights @ v[head] / weights.sum()
    return y


def relative_error(y: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


def causal(
    q: Any,
    k: Any,
    v: Any,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Each token of `[B, T, H, D]` attends to itself and those before it."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    G, T = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (np.repeat(a, G, axis=2) for a in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    mask = np.tri(T, dtype=bool)
    if window is not None:
        mask &= ~np.tri(T, k=-window, dtype=bool)
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    y = np.einsum("bhts,bshd->bthd", weights, v)
    return y / weights.sum(axis=-1).swapaxes(1, 2)[..., None]
