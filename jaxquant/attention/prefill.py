"""What stands between a prompt's projections and its attention: rotation, FP8, the cache."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Float32, Int

from jaxquant.array import QuantizedArray
from jaxquant.attention.cache import TILE, KeysOrValues, cache_shape, fill
from jaxquant.attention.fp8 import Units, in_units
from jaxquant.attention.heads import check_heads, refuse
from jaxquant.attention.partition import across_devices, dims_of
from jaxquant.attention.xla import rotate_halves
from jaxquant.hopper import multiprocessors
from jaxquant.matmul.kernel_cache import kept

_logger = logging.getLogger(__name__)

# What TMA's swizzled tiles divide.
_SLOT_ALIGNMENT = 8


def rotate_and_fill(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    cache_k: KeysOrValues,
    cache_v: KeysOrValues,
    layer: Int[Array, ""] | int,
    rotation: tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]] | None = None,
    units: Units | None = None,
) -> tuple[tuple[Array, Array, Array], KeysOrValues, KeysOrValues]:
    """Prompts as attention takes them, and a cache with their keys and values.

    Queries and keys are rotated, as in `append_and_attend`. Keys, rotated, and values go to the
    first T slots of one layer of the cache; into an FP8 cache quantized. Donate the caches to a
    jitted caller: then they are written in place. On Hopper, all that is one kernel.

    Args:
      q: queries, floating.
      k: keys, likewise.
      v: values, likewise.
      cache_k: all layers, T slots at least.
      cache_v: likewise.
      layer: which of the L, possibly traced.
      rotation: cosines and sines of the angles of each token; None rotates nothing.
      units: of `fp8_units`; None leaves the dtype.

    Returns:
      Queries, keys and values, `in_units` if units are given; both caches.
    """
    operands = q, k, v, cache_k, cache_v, layer, rotation, units
    try:
        return _kernel(*operands)
    except NotImplementedError as reason:
        _logger.debug("prompts are rotated and cached through XLA: %s", reason)
    return _xla(*operands)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    cache_k: KeysOrValues,
    cache_v: KeysOrValues,
    layer: Any,
    rotation: tuple[Array, Array] | None,
    units: Units | None,
) -> Any:
    """The reference."""
    if rotation is not None:
        q, k = (rotate_halves(x, *rotation) for x in (q, k))
    cache_k, cache_v = (
        fill(cache, x.swapaxes(1, 2), layer) for cache, x in ((cache_k, k), (cache_v, v))
    )
    qkv = (q, k, v) if units is None else in_units((q, k, v), units)
    return qkv, cache_k, cache_v


# Not a custom_jvp: in jax 0.11 that takes nothing which writes in place.
@jax.custom_vjp
def _kernel(
    q: Array,
    k: Array,
    v: Array,
    cache_k: KeysOrValues,
    cache_v: KeysOrValues,
    layer: Any,
    rotation: tuple[Array, Array] | None,
    units: Units | None,
) -> Any:
    """One pass over queries, keys and values.

    Raises:
      NotImplementedError: the device or the operands are not what the kernel takes; says why.
    """
    multiprocessors(q, "prompts")
    if rotation is None:
        refuse("nothing is rotated", "what is rotated by halves of all dims")
    if cache_k.dtype != jnp.bfloat16 and not isinstance(cache_k, QuantizedArray):
        refuse(f"the cache is {cache_k.dtype}", "bfloat16")
    check_heads(q, k, v)
    if q.shape[2] % (H := k.shape[2]):
        refuse(f"q has {q.shape[2]} heads, k {H}", "a multiple of k's")
    T, S = q.shape[1], cache_shape(cache_k)[3]
    alignment = TILE if isinstance(cache_k, QuantizedArray) else _SLOT_ALIGNMENT
    if T > S or S % alignment:
        refuse(f"S is {S}", f"multiples of {alignment}, for all {T} tokens")
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    each = None if units is None else tuple(unit.reshape(1) for unit in units)
    return _run(q, k, v, cache_k, cache_v, layer, rotation, each)


_kernel.defvjp(functools.partial(jax.vjp, _xla), lambda vjp, cotangents: vjp(cotangents))


# One after the other under `jax.vmap`; compiled once a shape, also where the caller does not jit.
@sequential_vmap
@jax.jit
def _run(
    q: Array,
    k: Array,
    v: Array,
    cache_k: KeysOrValues,
    cache_v: KeysOrValues,
    layer: Array,
    rotation: tuple[Array, Array],
    units: tuple[Array, ...] | None,
) -> Any:
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.attention import prefill_sm90

    B, T, Hq, D = q.shape
    H = k.shape[2]

    def run(q, k, v, *others):
        # Where these are slices of one product, side by side, XLA takes the product itself.
        rows = (*q.shape[:2], -1)
        qkv = jnp.concatenate([x.reshape(rows) for x in (q, k, v)], axis=-1)
        qkv = qkv.reshape(*rows, D)
        (q, *kv), *caches = kept(prefill_sm90.rotate_and_fill)(qkv, *others)
        return (q.reshape(*rows, Hq // H, D), *kv), *caches

    taken = "b t h g d", "b t h d", "b t h d"
    cache = dims_of(cache_k, "k"), dims_of(cache_v, "v")
    operands = q.reshape(B, T, H, -1, D), k, v, cache_k, cache_v, layer, rotation, units
    others = "one", "b t pairs", None if units is None else "one"
    (q, *kv), *caches = across_devices(run, operands, (*taken, *cache, *others), (taken, *cache))
    return (q.reshape(B, T, Hq, D), *kv), *caches
