"""`decode_attention` and `append_and_attend`: check the operands and pick an implementation."""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxquant.array import QuantizedArray
from jaxquant.attention import mosaic_gpu, xla
from jaxquant.attention.cache import KeysOrValues, cache_shape
from jaxquant.errors import JaxquantError
from jaxquant.matmul import QuantizedTokens

_logger = logging.getLogger(__name__)

# Tried in this order. One that cannot run raises NotImplementedError with the reason; the plain
# XLA reference runs anywhere, so it is last.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.decode_attention, "xla": xla.decode_attention}


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: KeysOrValues,
    v: KeysOrValues,
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

    with the softmax in float32. What the other slots hold, be it NaN, does not matter; of an FP8
    cache, that goes for scales, while no value may be NaN.

    Args:
      q: floating.
      k: `[L, B, H, S, D]`, all layers, read in place; the new token's key is in slot
        `lengths - 1`. Floating, or FP8 as `jaxquant.attention.cache` has it: then with its values
        times their scales, exactly, in place of k and v.
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
    _check("decode_attention", q, k, v, layer, lengths, window, scale, softcap)
    operands, options = (q, k, v, layer, lengths), _options(k, window, scale, softcap)
    return _run("decode_attention", IMPLEMENTATIONS, implementation, operands, options)


def append_and_attend(
    qkv: Float[Array, "B R D"] | tuple[Array, Array, Array],
    k: KeysOrValues,
    v: KeysOrValues,
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    rotation: tuple[Float32[Array, "B pairs"], Float32[Array, "B pairs"]] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    may_quantize: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B Hq D"] | QuantizedTokens, KeysOrValues, KeysOrValues]:
    """A new token of each sequence is rotated, appended to one layer of a cache, and attends to it.

    With angles a, pairs (x1, x2) of dims (i, i + D / 2) of a query or key become

        x1 cos(a) - x2 sin(a), x2 cos(a) + x1 sin(a)

    in float32, then rounded. Keys and values go to slot `lengths - 1`, the last one if that is
    beyond it; into an FP8 cache quantized. Donate k and v to a jitted caller: then they are
    written in place.

    Args:
      qkv: floating; R = Hq + 2 H heads: of queries, of keys, of values. Or these three apart,
        where heads are divided among devices.
      k: as in `decode_attention`, all layers.
      v: likewise.
      layer: which of the L, possibly traced.
      lengths: how many slots of each sequence are filled, with the new token's.
      rotation: cosines and sines of the angles of each sequence; None rotates nothing.
      window: see `decode_attention`, likewise the rest.
      scale: of the logits.
      softcap: of the logits.
      may_quantize: whether a kernel may leave what `matmul` would quantize the result to.
      implementation: forces one of `APPENDING`; default: the first that can run.

    Returns:
      What `decode_attention` gives, `[B, Hq, D]` of qkv's dtype, or that as QuantizedTokens
      `[B, Hq * D]`; k and v.

    Raises:
      JaxquantError: shapes or numbers that do not fit, an unknown implementation.
      NotImplementedError: the forced implementation cannot run this, with the reason.

    >>> qkv, cache = jnp.ones((1, 8, 8)), jnp.zeros((2, 1, 2, 16, 8))
    >>> y, k, v = append_and_attend(qkv, cache, cache, 0, jnp.array([1]))
    >>> y[0, 0, 0].item(), k[0, 0, 0, 0, 0].item()
    (1.0, 1.0)
    """
    op = "append_and_attend"
    if not isinstance(qkv, tuple):
        if qkv.ndim != 3 or k.ndim != 5 or qkv.shape[1] <= 2 * k.shape[2]:
            raise JaxquantError(
                f"{op}: qkv is {list(qkv.shape)}, k {list(k.shape)}; "
                "allowed: qkv [B, Hq + 2 H, D], k [L, B, H, S, D]"
            )
        qkv = xla.heads_of(qkv, k.shape[2])
    q, *new = qkv
    _check(op, q, k, v, layer, lengths, window, scale, softcap)
    B, _, D = q.shape
    for x in new:
        if x.shape != (B, k.shape[2], D):
            raise JaxquantError(
                f"{op}: new keys and values are {[list(x.shape) for x in new]}; "
                f"allowed: {[B, k.shape[2], D]}"
            )
    for table in rotation or ():
        if table.shape != (B, D // 2) or D % 2:
            raise JaxquantError(
                f"{op}: rotation has {list(table.shape)}, queries {list(q.shape)}; "
                f"allowed: [{B}, D / 2], for an even D"
            )
    operands = qkv, k, v, layer, lengths, rotation
    options = _options(k, window, scale, softcap) | {"may_quantize": may_quantize}
    return _run(op, APPENDING, implementation, operands, options)


def _in_turn(
    *operands: Any, may_quantize: bool, **options: Any
) -> tuple[Array, KeysOrValues, KeysOrValues]:
    attend = functools.partial(decode_attention, **options)
    return xla.append_and_attend(*operands, attend=attend)


# As above. "xla" rotates and appends; `decode_attention` then has its own choice.
APPENDING = {"mosaic_gpu": mosaic_gpu.append_and_attend, "xla": _in_turn}


def _options(
    k: KeysOrValues, window: int | None, scale: float | None, softcap: float | None
) -> dict[str, Any]:
    S, D = k.shape[3:]
    return {
        "window": None if window is not None and window >= S else window,
        "scale": 1 / math.sqrt(D) if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
    }


def _run(
    op: str,
    implementations: Mapping[str, Callable],
    implementation: str | None,
    operands: tuple,
    options: dict[str, Any],
) -> Any:
    if implementation is not None:
        if implementation not in implementations:
            raise JaxquantError(
                f"{op}: implementation is {implementation!r}; allowed: {', '.join(implementations)}"
            )
        return implementations[implementation](*operands, **options)
    reasons = []
    for name, run in implementations.items():
        try:
            result = run(*operands, **options)
        except NotImplementedError as reason:
            reasons.append(str(reason))
        else:
            q, k = jax.tree.leaves(operands[0])[0], operands[1]
            _logger.debug("%s of %s to k %s: %s", op, list(q.shape), list(k.shape), name)
            return result
    raise NotImplementedError("; ".join(reasons))


def _check(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    lengths: Any,
    window: Any,
    scale: Any,
    softcap: Any,
) -> None:
    def refuse(what: str, allowed: str) -> None:
        raise JaxquantError(f"{op}: {what}; allowed: {allowed}")

    if q.ndim != 3:
        refuse(f"q is {list(q.shape)}", "[B, Hq, D]")
    B, Hq, D = q.shape
    if k.ndim != 5 or (k.shape[1], k.shape[4]) != (B, D):
        refuse(f"k is {list(k.shape)}, q {list(q.shape)}", f"k [L, {B}, H, S, {D}]")
    if cache_shape(v) != cache_shape(k):
        refuse(f"v is {list(cache_shape(v))}, k {list(k.shape)}", "equal shapes")
    blocks = tuple(a.block_size if isinstance(a, QuantizedArray) else None for a in (k, v))
    if blocks not in ((None, None), ((1, D), (D, 1))):
        refuse(f"k and v have blocks {blocks}", f"none, or (1, {D}) and ({D}, 1)")
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
