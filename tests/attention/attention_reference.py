"""Decode attention in float64, and operands for it."""

from typing import Any

import jax.numpy as jnp
import numpy as np


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
