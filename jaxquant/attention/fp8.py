"""Causal attention in FP8: queries, keys, values and weights are e4m3.

    unit   = the power of two with 128 <= max |x| / unit < 256, of q, of k and of v
    x8     = e4m3(x / unit)
    logits = scale * unit_q * unit_k * q8 . k8
    p      = exp(logits - max logits)
    out    = unit_v * e4m3(sum_s e4m3(256 p) v8 / sum_s 256 p)

in float32 elsewhere. A unit is of a whole batch, padding included. As it is a power of two, another
one rounds nothing else but what is below 2^-13 of the largest: that is all that a sequence gets
from the rest of its batch, or a token from those behind it.

On Hopper this is cuDNN's attention where it can be, whose weights are those to the largest logit so
far; the rest is plain XLA, for some of the queries at a time.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Float32

from jaxquant.attention.cache import FP8
from jaxquant.attention.heads import check_heads, refuse
from jaxquant.blocked import hold, narrow, widen
from jaxquant.hopper import multiprocessors
from jaxquant.matmul import QuantizedTokens
from jaxquant.matmul.kernel_cache import kept
from jaxquant.matmul.tokens import with_one_scale

_logger = logging.getLogger(__name__)

# Of queries, of keys and of values.
Units = tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, ""]]

# What weights, at most 1, are multiplied with.
_WEIGHT_SCALE = 256.0
# The unit of smaller numbers, whose inverse would overflow otherwise.
_LEAST_AMAX = 2.0**-100
_EXPONENT = 0x7F800000
# Queries that the reference attends with at a time: with all, logits would be [T, T].
_QUERIES = 128
# Of cuDNN.
_HEAD_DIMS = (64, 128)
_TILE = 128


def fp8_units(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    stretch: float = 1.0,
) -> Units:
    """The units of queries, keys and values.

    Args:
      q: may be rotated later: no dim becomes larger than sqrt(2) times the largest.
      k: likewise.
      v: as it is.
      stretch: by what factor q and k may grow besides.
    """
    # Their exponents have no derivative.
    q, k, v = (lax.stop_gradient(x) for x in (q, k, v))
    try:
        return _units_by_kernel(q, k, v, stretch)
    except NotImplementedError as reason:
        _logger.debug("units of prompts in FP8 are found through XLA: %s", reason)
    amax = jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in (q, k, v)])
    amax = jnp.maximum(amax * jnp.asarray([stretch, stretch, 1], jnp.float32), _LEAST_AMAX)
    bits = lax.bitcast_convert_type(amax, jnp.int32) & _EXPONENT
    q, k, v = lax.bitcast_convert_type(bits - (7 << 23), jnp.float32)
    return q, k, v


def _units_by_kernel(q: Array, k: Array, v: Array, stretch: float) -> Units:
    """In one pass.

    Raises:
      NotImplementedError: the device or the operands are not what the kernel takes; says why.
    """
    multiprocessors(q, "prompts")
    check_heads(q, k, v)
    if jax.device_count() > 1:  # it would have all of them on each
        refuse(f"there are {jax.device_count()} devices", "one")
    # Where these are slices of one product, side by side, XLA takes the product itself.
    rows, heads = (*q.shape[:2], -1), tuple(x.shape[2] for x in (q, k, v))
    qkv = jnp.concatenate([x.reshape(rows) for x in (q, k, v)], axis=-1)
    return _run(qkv.reshape(-1, sum(heads), q.shape[3]), heads, float(stretch))


# One after the other under `jax.vmap`; compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _run(qkv: Array, heads: tuple[int, ...], stretch: float) -> Units:
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.attention import units_sm90

    def run(qkv):
        return kept(units_sm90.fp8_units)(qkv, heads, stretch, _LEAST_AMAX)

    return sequential_vmap(run)(qkv)


def in_units(qkv: Sequence[Array], units: Units) -> tuple[Array, Array, Array]:
    """`e4m3(x / unit)` of queries, keys and values, of which nothing is above 448 units."""
    q, k, v = (narrow(x.astype(jnp.float32) * (1 / units[i]), FP8) for i, x in enumerate(qkv))
    return q, k, v


def fp8_attention(
    qkv: tuple[Float[Array, "B T Hq D"], Float[Array, "B T H D"], Float[Array, "B T H Dv"]],
    units: Units,
    dtype: Any,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> QuantizedTokens:
    """Each token attends to itself and those before it.

    Args:
      qkv: queries, keys and values `in_units`.
      units: of all three.
      dtype: of what became of them, for the result.
      window: how many tokens a token sees, itself included; None is all.
      scale: what `q k^T` is multiplied with; default `1 / sqrt(D)`.
      softcap: if given, logits become `softcap * tanh(logits / softcap)`.

    Returns:
      `[B, T, Hq * Dv]`. A product takes it as it is, with no other rounding.
    """
    q, k, v = qkv
    if window is not None and window >= q.shape[1]:
        window = None
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    options: Any = {"window": window, "scale": float(scale), "softcap": softcap}
    try:
        y = _cudnn(q, k, v, units, **options)
    except NotImplementedError as reason:
        _logger.debug("FP8 attention of prompts runs through XLA: %s", reason)
        y = _xla(q, k, v, units, **options)
    return with_one_scale(y.reshape(*y.shape[:2], -1), units[2], dtype)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    units: Units,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T Hq Dv"]:
    """The reference, in units of v."""
    (B, T, Hq, D), H = q.shape, k.shape[2]
    chunk = min(T, _QUERIES)
    # FP8 values are exact in bfloat16, which tensor cores take.
    q, k, v = (widen(hold(x)).astype(jnp.bfloat16) for x in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, -T % chunk), (0, 0), (0, 0)))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    slot = jnp.arange(T)

    def attend(start: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(q, start, chunk, axis=1).reshape(B, chunk, H, -1, D)
        logits = product("bthgd,bshd->bhgts", rows, k) * (units[0] * units[1] * scale)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        token = start + jnp.arange(chunk)[:, None]
        mask = slot <= token
        if window is not None:
            mask &= slot > token - window
        logits = jnp.where(mask, logits, -jnp.inf)
        p = jnp.exp(logits - logits.max(axis=-1, keepdims=True)) * _WEIGHT_SCALE
        rounded = widen(hold(narrow(p, FP8))).astype(jnp.bfloat16)
        y = product("bhgts,bshd->bhgtd", rounded, v) / p.sum(axis=-1, keepdims=True)
        return narrow(y, FP8)

    y = lax.map(attend, jnp.arange(0, q.shape[1], chunk))  # [chunks, B, H, G, chunk, Dv]
    return jnp.moveaxis(y, (0, 4), (1, 2)).reshape(B, -1, Hq, v.shape[3])[:, :T]


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    units: Units,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T Hq D"]:
    """cuDNN's, in units of v. What jax has of it is not public."""
    multiprocessors(q, "prompts in FP8")
    (_, T, _, D), Dv = q.shape, v.shape[3]
    if D not in _HEAD_DIMS or D != Dv:
        _refuse(f"D is {D} and {Dv}", f"the same for all, of {_HEAD_DIMS}")
    if window is not None:
        _refuse(f"window is {window} of {T} tokens", "none")
    if softcap is not None:
        _refuse(f"softcap is {softcap}", "none")
    if q.size == 0:
        _refuse(f"q is {list(q.shape)}", "others")
    # What is behind the prompt, no token of it sees.
    q, k, v = (jnp.pad(x, ((0, 0), (0, -T % _TILE), (0, 0), (0, 0))) for x in (q, k, v))
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        # Most of them are of the backward pass.
        params: dict[str, Any] = dict.fromkeys(cudnn.fp8_params_keys, 1.0)
        params |= {"descale_q": units[0], "descale_k": units[1]}
        params |= {"scale_s": _WEIGHT_SCALE, "descale_s": 1 / _WEIGHT_SCALE}
        params = {n: jnp.asarray(p, jnp.float32).reshape(1, 1, 1, 1) for n, p in params.items()}
        options: Any = {"fp8_params": params, "use_fp8": True, "scale": scale}
        y, _, _ = cudnn.dot_product_attention(q, k, v, mask_type=cudnn.MaskType.CAUSAL, **options)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise NotImplementedError(f"cudnn: this jax has no FP8 attention ({error})") from error
    return y[:, :T]


def _refuse(what: str, allowed: str) -> None:
    raise NotImplementedError(f"cudnn: {what}; its FP8 attention takes {allowed}")
