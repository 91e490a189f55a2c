"""Keys and values of a cache: arrays of the model's dtype, or FP8 with a scale for each token.

For a key or a value x of D dims, of one token and one key/value head,

    scale  = max(max |x|, 1e-10) / 448                float32
    qvalue = round_to_nearest_even(x / scale)         float8_e4m3fn

as activations are quantized, to the byte. Both are QuantizedArrays:

    keys    qvalue [L, B, H, S, D], scale [L, B, H, S, 1]
    values  qvalue [L, B, H, S / 16, D, 16], scale [L, B, H, S / 16, 1, 16]

Values lie in pages of 16 slots, each transposed: FP8 tensor cores take only operands whose
contraction axis is the last one, and the sum of values is one over slots. They read blocks of 16
bytes of it. In wider pages, a token's value would lie in more cache lines.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Int

from jaxquant.array import QuantizedArray
from jaxquant.blocked import as_bytes, quantize_activations, take_layer, widen

FP8 = jnp.dtype(jnp.float8_e4m3fn)

# Slots of a page of values, and of what kernels read at a time.
PAGE = 16
TILE = 128

# Of all layers.
KeysOrValues = Float[Array, "L B H S D"] | QuantizedArray


def empty(
    shape: tuple[int, ...], dtype: Any, *, values: bool = False, awaited: int = 0
) -> KeysOrValues:
    """A cache `[L, B, H, S, D]` of zeros.

    Args:
      shape: of which S becomes the next multiple of 128 if the dtype is FP8.
      dtype: of the model, or float8_e4m3fn.
      values: whether it is for values; for keys otherwise.
      awaited: so many slots are left as they are, for a prompt that is to `fill` them in all
        layers. A pass over memory is saved.
    """
    if jnp.dtype(dtype) != FP8:
        return _zeros_from(awaited, shape, dtype)
    *lead, S, D = shape
    whole = jax.ShapeDtypeStruct((*lead, -(-S // TILE) * TILE, D), jnp.bfloat16)
    quantized = jax.eval_shape(quantize_values if values else quantize_keys, whole)
    first = -(-awaited // PAGE) if values else awaited
    return jax.tree.map(lambda a: _zeros_from(first, a.shape, a.dtype), quantized)


def _zeros_from(first: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros from a given slot on, or page; before it, whatever is in memory."""
    if first == 0 or jax.device_count() > 1:  # what is not computed, XLA does not partition
        return jnp.zeros(shape, dtype)
    if jnp.dtype(dtype) == FP8:
        return lax.bitcast_convert_type(_zeros_from(first, shape, jnp.uint8), FP8)
    rest = jnp.zeros((*shape[:3], shape[3] - first, *shape[4:]), dtype)
    return lax.dynamic_update_slice_in_dim(lax.empty(shape, dtype), rest, first, axis=3)


def cache_shape(cache: KeysOrValues) -> tuple[int, ...]:
    """[L, B, H, S, D], without pages."""
    if isinstance(cache, QuantizedArray) and cache.transposed:
        *lead, pages, slots, D = cache.shape
        return (*lead, pages * slots, D)
    return cache.shape


def quantize_keys(k: Float[Array, "*lead S D"]) -> QuantizedArray:
    """Quantizes each token's key."""
    qvalue, scale = quantize_activations(k, k.shape[-1])
    return QuantizedArray(qvalue, scale, block_size=(1, k.shape[-1]), dtype=jnp.dtype(k.dtype))


def quantize_values(v: Float[Array, "*lead S D"]) -> QuantizedArray:
    """Quantizes each token's value, in pages; zeros fill up to a multiple of 128 slots."""
    lead, S = v.shape[:-2], v.shape[-2]
    q = quantize_keys(jnp.pad(v, (*((0, 0) for _ in lead), (0, -S % TILE), (0, 0))))
    qvalue, scale = (a.reshape(*lead, -1, PAGE, a.shape[-1]).mT for a in (q.qvalue, q.scale))
    return dataclasses.replace(
        q, qvalue=qvalue, scale=scale, block_size=q.block_size[::-1], transposed=True
    )


def of_layer(
    cache: KeysOrValues, layer: Any, dtype: Any
) -> tuple[Float[Array, "B H S D"], Float32[Array, "B H S"] | None]:
    """One layer of keys or values, and the scales that it is to be multiplied with, if any.

    Args:
      cache: all layers.
      layer: which of the L.
      dtype: of what becomes of FP8, exactly.
    """
    if not isinstance(cache, QuantizedArray):
        return lax.dynamic_index_in_dim(cache, layer, keepdims=False), None
    qvalue, scale = (take_layer(a, layer) for a in (cache.qvalue, cache.scale))
    values = widen(qvalue).astype(dtype)
    shape = cache_shape(cache)[1:]
    return (values.mT if cache.transposed else values).reshape(shape), scale.reshape(shape[:-1])


def fill(cache: KeysOrValues, new: Float[Array, "B H T D"], layer: Any) -> KeysOrValues:
    """The cache with `new` in the first T slots of one layer."""

    def write(stack: Array, new: Array) -> Array:
        # Else XLA takes the layout of `new`, tokens first, for the stack, which it then transposes.
        new = with_layout_constraint(new[None], Layout(major_to_minor=tuple(range(stack.ndim))))
        return lax.dynamic_update_slice(stack, new, (layer, *(0 for _ in stack.shape[1:])))

    if not isinstance(cache, QuantizedArray):
        return write(cache, new)
    return _write(cache, (quantize_values if cache.transposed else quantize_keys)(new), write)


def append(
    cache: KeysOrValues, new: Float[Array, "B H D"], layer: Any, lengths: Int[Array, " B"]
) -> KeysOrValues:
    """The cache with `new` in slot `lengths - 1` of each sequence in one layer.

    That is the last slot if it is beyond it.
    """
    B = len(new)
    rows, slots = jnp.arange(B), jnp.minimum(lengths, cache_shape(cache)[3]) - 1
    in_pages = isinstance(cache, QuantizedArray) and cache.transposed

    def write(stack: Array, new: Array) -> Array:
        """Where a token is `stack[layer, row, :, slot]`, or `[..., page, :, slot]`."""
        page, slot = jnp.divmod(slots, PAGE)
        if B == 1:  # a scatter of one would read what is there, and select
            at = (page[0], 0, slot[0]) if in_pages else (slots[0], 0)
            new = new[None, :, :, None, :, None] if in_pages else new[None, :, :, None]
            return lax.dynamic_update_slice(stack, new, (layer, 0, 0, *at))
        if in_pages:
            return stack.at[layer, rows, :, page, :, slot].set(new)
        return stack.at[layer, rows, :, slots].set(new)

    if not isinstance(cache, QuantizedArray):
        return write(cache, new)
    return _write(cache, quantize_keys(new), write)


def _write(cache: QuantizedArray, new: QuantizedArray, write: Any) -> QuantizedArray:
    """`write` of values, as bytes, and of scales."""
    qvalue = write(as_bytes(cache.qvalue), as_bytes(new.qvalue))
    return dataclasses.replace(
        cache,
        qvalue=lax.bitcast_convert_type(qvalue, FP8),
        scale=write(cache.scale, new.scale),
    )
