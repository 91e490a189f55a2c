"""Pallas kernel (Mosaic GPU) behind the ops: what it takes, and what vmap makes of it.

It is for Hopper (compute capability 9.0); every other device keeps the XLA reference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int32

from jaxquant.array import QuantizedArray
from jaxquant.attention import xla
from jaxquant.attention.cache import TILE, KeysOrValues, cache_shape
from jaxquant.attention.partition import across_devices, dims_of
from jaxquant.hopper import multiprocessors
from jaxquant.matmul import QuantizedTokens
from jaxquant.matmul.kernel_cache import kept

_MAX_GROUP = 64
_MAX_HEAD_DIM = 256
# What TMA's swizzled tiles divide.
_HEAD_DIM_ALIGNMENT = 16
_SLOT_ALIGNMENT = 8
# Of a new token's keys and values, a warpgroup holds 64 dims at a time: of each half, if rotated.
_APPENDED_ALIGNMENT = 64


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
    """One pass over the filled slots. See `jaxquant.attention.decode_attention`.

    Raises:
      NotImplementedError: the device or the operands are not what the kernel takes; says why.
    """
    sms = multiprocessors(q, "products of decode attention")
    if isinstance(k, QuantizedArray):
        _refuse("the cache is FP8", "such a cache where it appends")
    _check_operands(q, k, v)
    run = _batchable(window, scale, softcap, sms)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    return run(q, k, v, layer, lengths.astype(jnp.int32))


def append_and_attend(
    qkv: tuple[Float[Array, "B Hq D"], Float[Array, "B H D"], Float[Array, "B H D"]],
    k: KeysOrValues,
    v: KeysOrValues,
    layer: Any,
    lengths: Int[Array, " B"],
    rotation: tuple[Float32[Array, "B pairs"], Float32[Array, "B pairs"]] | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    may_quantize: bool,
) -> tuple[Float[Array, "B Hq D"] | QuantizedTokens, KeysOrValues, KeysOrValues]:
    """All in one launch. See `jaxquant.attention.append_and_attend`.

    Raises:
      NotImplementedError: the device or the operands are not what the kernel takes; says why.
    """
    q, new_k, new_v = qkv
    sms = multiprocessors(q, "products of decode attention")
    D = q.shape[2]
    _check_operands(q, k, v)
    if D % _APPENDED_ALIGNMENT:
        _refuse(f"D is {D}", f"multiples of {_APPENDED_ALIGNMENT}, where it appends")
    if rotation is not None and not _rotates(D, k):
        q, new_k = (xla.rotate_halves(x, *rotation) for x in (q, new_k))
        rotation = None
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    run = _appending(window, scale, softcap, may_quantize, sms)
    return run((q, new_k, new_v), k, v, layer, lengths.astype(jnp.int32), rotation)


def _rotates(D: int, k: KeysOrValues) -> bool:
    """Whether the kernel finds the pairs of a head."""
    whole = D % (2 * _APPENDED_ALIGNMENT) == 0
    return whole or (D == _APPENDED_ALIGNMENT and not isinstance(k, QuantizedArray))


def _refuse(what: str, allowed: str) -> None:
    raise NotImplementedError(f"mosaic_gpu: {what}; the kernel takes {allowed}")


def _check_operands(q: Any, k: Any, v: Any) -> None:
    for name, a in (("q", q), ("k", k), ("v", v)):
        if a.dtype != jnp.bfloat16 and not isinstance(a, QuantizedArray):
            _refuse(f"{name} is {a.dtype}", "bfloat16")
    if q.size == 0 or k.size == 0:
        _refuse(f"an operand is empty (q {list(q.shape)}, k {list(k.shape)})", "others")
    (_, Hq, D), (_, _, H, S, _) = q.shape, k.shape
    if D % _HEAD_DIM_ALIGNMENT or D > _MAX_HEAD_DIM:
        _refuse(f"D is {D}", f"multiples of {_HEAD_DIM_ALIGNMENT} up to {_MAX_HEAD_DIM}")
    alignment = TILE if isinstance(k, QuantizedArray) else _SLOT_ALIGNMENT
    if S % alignment:
        _refuse(f"S is {S}", f"multiples of {alignment}")
    if Hq // H > _MAX_GROUP:
        _refuse(f"{Hq // H} query heads share a key/value head", f"up to {_MAX_GROUP}")


@functools.cache
def _appending(
    window: int | None, scale: float, softcap: float | None, may_quantize: bool, sms: int
) -> Any:
    """The kernel for the cache; `jax.vmap` runs it one after the other."""

    @sequential_vmap
    @jax.jit  # compiled once a shape, also where the caller does not jit
    def run(qkv, k, v, layer, lengths, rotation):
        # Imported here: Mosaic GPU is there only where jaxlib was built with it.
        from jaxquant.attention import decode_fp8_sm90, decode_sm90
        from jaxquant.attention.sm90 import is_quantizable

        kernel: Any = decode_fp8_sm90 if isinstance(k, QuantizedArray) else decode_sm90
        _, B, H, S, D = cache_shape(k)
        q, new_k, new_v = qkv
        Hq = q.shape[1]
        quantized = may_quantize and is_quantizable(B, H, Hq // H, D)
        options: Any = {"window": window, "scale": scale, "softcap": softcap}

        def attend(q, new_k, new_v, k, v, *others):
            # Where these are slices of one product, side by side, XLA takes the product itself, if
            # it sees them in its shape.
            B, H, G, _ = q.shape
            qkv = jnp.concatenate([x.reshape(B, 1, -1) for x in (q, new_k, new_v)], axis=2)
            config = kernel.default_config(B, H, G, S, D, sms)
            out, k, v = kept(kernel.append_and_attend)(
                qkv.reshape(B, -1, D), k, v, *others, config=config, quantized=quantized, **options
            )
            if isinstance(out, QuantizedTokens):
                heads = out.qvalue.reshape(len(out.qvalue), H, -1, D)
                return (heads, out.scale.reshape(H, -1, out.scale.shape[1])), k, v
            return out.reshape(B, H, -1, D), k, v

        operands = q.reshape(B, H, -1, D), new_k, new_v, k, v, layer, lengths, rotation
        # Quantized, tokens are padded, and none may be on another device.
        b = "t" if quantized else "b"
        cache = dims_of(k, "k", b), dims_of(v, "v", b)
        taken = f"{b} h g d", f"{b} h d", f"{b} h d", *cache
        others = "one", b, None if rotation is None else f"{b} pairs"
        left = ("padded h g d", "h groups columns") if quantized else f"{b} h g d"
        out, k, v = across_devices(attend, operands, (*taken, *others), (left, *cache))
        if not quantized:
            return out.reshape(B, Hq, D), k, v
        qvalue, scales = out[0].reshape(-1, Hq * D), out[1].reshape(-1, out[1].shape[-1])
        return QuantizedTokens(qvalue, scales, (B,), jnp.dtype(q.dtype)), k, v

    return run


@functools.cache
def _batchable(window: int | None, scale: float, softcap: float | None, sms: int) -> Any:
    """`_run`, and what `jax.vmap` makes of it."""
    options = {"window": window, "scale": scale, "softcap": softcap, "sms": sms}

    @custom_vmap
    def run(q, k, v, layer, lengths):
        return _run(q, k, v, layer, lengths, **options)

    @run.def_vmap
    def _rule(axis_size, batched, q, k, v, layer, lengths):
        # One after the other, each with its cache read in place: a batch of stacks is a longer
        # stack.
        from jaxquant.matmul.sm90 import in_stack

        L = k.shape[-5]
        index = jnp.broadcast_to(in_stack(layer, L), (axis_size, 1))
        if batched[1] or batched[2]:
            k, v = (
                a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
                for a, is_batched in zip((k, v), batched[1:3], strict=True)
            )
            index = index + L * jnp.arange(axis_size, dtype=jnp.int32)[:, None]
            k, v = (a.reshape(-1, *a.shape[2:]) for a in (k, v))
        q, lengths = (
            a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, is_batched in ((q, batched[0]), (lengths, batched[4]))
        )
        return lax.map(lambda of: run(of[0], k, v, of[1], of[2]), (q, index, lengths)), True

    return run


# Compiled once a shape, also where the caller does not jit.
@functools.partial(jax.jit, static_argnames=("window", "scale", "softcap", "sms"))
def _run(
    q: BFloat16[Array, "B Hq D"],
    k: BFloat16[Array, "L B H S D"],
    v: BFloat16[Array, "L B H S D"],
    layer: Int32[Array, "1"],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sms: int,
) -> BFloat16[Array, "B Hq D"]:
    # Imported here: Mosaic GPU is there only where jaxlib was built with it.
    from jaxquant.attention import decode_sm90

    (B, Hq, D), (_, _, H, S, _) = q.shape, k.shape

    def attend(q, *others):
        B, H, G, _ = q.shape
        config = decode_sm90.default_config(B, H, G, S, D, sms)
        options: Any = {"window": window, "scale": scale, "softcap": softcap, "config": config}
        out = kept(decode_sm90.decode)(q.reshape(B, H * G, D), *others, **options)
        return out.reshape(q.shape)

    cache = dims_of(k, "k"), dims_of(v, "v")
    operands = q.reshape(B, H, Hq // H, D), k, v, layer, lengths
    out = across_devices(attend, operands, ("b h g d", *cache, "one", "b"), "b h g d")
    return out.reshape(q.shape)
