"""`decode_attention`: checks the operands and picks an implementation."""

import logging
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.attention import mosaic_gpu, xla
from jaxquant.errors import JaxquantError

_logger = logging.getLogger(__name__)

# Tried in this order. One that cannot run raises NotImplementedError with the reason; the plain
# XLA reference runs anywhere, so it is last.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.decode_attention, "xla": xla.decode_attention}


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "L B H S D"],
    v: Float[Array, "L B H S D"],
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Hq D"]:
    """The newest token of each sequence attends to the filled slots of one layer of a cache.

    With g = Hq // H query heads to a key/value head, n = lengths[b], and slots s from
    max(0, n - window) to n - 1,

        logits[s] = scale * q[b, h] . k[layer, b, h // g, s]
        out[b, h] = sum_s softmax(logits)[s] * v[layer, b, h // g, s]

    with the softmax in float32. What the other slots hold, be it NaN, does not matter.

    Args:
      q: floating.
      k: all layers, read in place; the new token's key is in slot `lengths - 1`.
      v: likewise.
      layer: which of the L, possibly traced.
      lengths: how many slots of each sequence are filled, 1 to S.
      window: how many of the last slots are attended to; default: all.
      scale: default `1 / sqrt(D)`.
      softcap: logits become `softcap * tanh(logits / softcap)`, as in Gemma 2
        (https://arxiv.org/abs/2408.00118).
      implementation: forces one of `IMPLEMENTATIONS`; default: the first that can run.

    Returns:
      `[B, Hq, D]` of q's dtype.

    Raises:
      JaxquantError: shapes or numbers that do not fit, an unknown implementation.
      NotImplementedError: the forced implementation cannot run this, with the reason.

    >>> q, cache = jnp.ones((1, 4, 8)), jnp.ones((2, 1, 2, 16, 8))
    >>> decode_attention(q, cache, 3 * cache, 0, jnp.array([5]))[0, 0, 0].item()
    3.0
    """
    _check(q, k, v, layer, lengths, window, scale, softcap)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxquantError(
            f"decode_attention: implementation is {implementation!r}; "
            f"allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    if window is not None and window >= k.shape[3]:
        window = None
    options = {
        "window": window,
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
    }
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](q, k, v, layer, lengths, **options)
    reasons = []
    for name, run in IMPLEMENTATIONS.items():
        try:
            y = run(q, k, v, layer, lengths, **options)
        except NotImplementedError as reason:
            reasons.append(str(reason))
        else:
            _logger.debug("attention of q %s to k %s: %s", list(q.shape), list(k.shape), name)
            return y
    raise NotImplementedError("; ".join(reasons))


def _check(
    q: Any, k: Any, v: Any, layer: Any, lengths: Any, window: Any, scale: Any, softcap: Any
) -> None:
    def refuse(what: str, allowed: str) -> None:
        raise JaxquantError(f"decode_attention: {what}; allowed: {allowed}")

    if q.ndim != 3:
        refuse(f"q is {list(q.shape)}", "[B, Hq, D]")
    B, Hq, D = q.shape
    if k.ndim != 5 or (k.shape[1], k.shape[4]) != (B, D):
        refuse(f"k is {list(k.shape)}, q {list(q.shape)}", f"k [L, {B}, H, S, {D}]")
    if v.shape != k.shape:
        refuse(f"v is {list(v.shape)}, k {list(k.shape)}", "equal shapes")
    L, H = k.shape[0], k.shape[2]
    if H == 0 or Hq % H:
        refuse(f"q has {Hq} heads, k {H}", "a multiple of k's")
    if lengths.shape != (B,):
        refuse(f"lengths is {list(lengths.shape)}", f"[{B}]")
    for name, a in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            refuse(f"{name} has dtype {a.dtype}", "a floating dtype")
    if isinstance(layer, int | np.integer) and not -L <= layer < L:
        refuse(f"layer is {layer}", f"0 to {L - 1}")
    if window is not None and window < 1:
        refuse(f"window is {window}", "at least 1, or None")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            refuse(f"{name} is {value}", "a positive number, or None")
